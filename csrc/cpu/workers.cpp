// The threads behind in_parallel: started when first needed, asleep between calls, never ended.
#include "workers.hpp"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace distlib {
namespace {

class Workers {
 public:
  const pid_t pid = getpid();

  void run(int parts, const std::function<void(int)>& part) {
    std::lock_guard<std::mutex> one_call(calls_);
    grow(parts - 1);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      part_ = &part;
      parts_ = parts;
      next_ = 0;
      unfinished_ = parts;
    }
    wake_.notify_all();
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return unfinished_ == 0; });
    part_ = nullptr;
  }

 private:
  void grow(int wanted) {
    for (; started_ < wanted; ++started_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;  // the threads that there are take all parts
      }
    }
  }

  void serve() {
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return part_ != nullptr && next_ < parts_; });
      }
      work();
    }
  }

  // Takes parts until there are none left.
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (part_ != nullptr && next_ < parts_) {
      const int index = next_++;
      const auto* part = part_;
      lock.unlock();
      (*part)(index);
      lock.lock();
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::mutex calls_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* part_ = nullptr;
  int parts_ = 0, next_ = 0, unfinished_ = 0, started_ = 0;
};

// Not destroyed at the end of the process: its threads may still look at it. A forked child has none of the threads,
// and perhaps a locked mutex, so it takes a new one.
Workers& workers() {
  static std::atomic<Workers*> current{nullptr};
  Workers* have = current.load();
  while (have == nullptr || have->pid != getpid()) {
    auto* fresh = new Workers;
    if (current.compare_exchange_strong(have, fresh)) return *fresh;
    delete fresh;
  }
  return *have;
}

}  // namespace

void in_parallel(int parts, const std::function<void(int)>& part) {
  if (parts <= 1) {
    if (parts == 1) part(0);
    return;
  }
  workers().run(parts, part);
}

}  // namespace distlib
