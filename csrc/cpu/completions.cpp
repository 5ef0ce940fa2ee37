// The queue of finished operations whose futures somebody holds.
#include "host_group.hpp"

namespace distlib {

Completions& Completions::instance() {
  static auto* queue = new Completions;  // never destroyed: a daemon thread may wait in it at exit
  return *queue;
}

void Completions::push(uint64_t id) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ids_.push_back(id);
  }
  arrived_.notify_one();
}

bool Completions::pop(uint64_t& id, double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!arrived_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !ids_.empty(); })) return false;
  id = ids_.front();
  ids_.pop_front();
  return true;
}

}  // namespace distlib
