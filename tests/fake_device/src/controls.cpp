// The C interface that Python uses through ctypes. Text comes back in a buffer of the calling thread.
#include <c10/core/DeviceType.h>

#include <cstring>
#include <stdexcept>

#include "machine.hpp"

namespace fake {
void register_hooks();
}

using fake::Machine;

namespace {

thread_local std::string answer;

std::string joined(const std::vector<std::string>& texts) {
  std::string all;
  for (const std::string& text : texts) all += text + '\0';
  return all;
}

}  // namespace

extern "C" {

const char* fake_answer(int64_t* bytes) {
  *bytes = static_cast<int64_t>(answer.size());
  return answer.data();
}

// Once, before the first tensor.
void fake_start(int devices, int64_t (*take)(), int64_t (*tell)(int64_t, char*, int64_t)) {
  Machine& m = Machine::get();
  m.set_devices(devices);
  m.take_stack = take;
  m.tell_stack = [tell](int64_t stack) {
    std::string text(8192, '\0');
    text.resize(static_cast<size_t>(tell(stack, &text[0], static_cast<int64_t>(text.size()))));
    return text;
  };
  fake::register_hooks();
}

void fake_set_mode(int mode) {
  Machine::get().set_mode(static_cast<fake::Mode>(mode));
}
void fake_set_lag(int64_t lag) {
  Machine::get().set_lag(lag);
}
void fake_reset() {
  Machine::get().reset();
}
void fake_take_races() {
  answer = joined(Machine::get().take_races());
}

// "what:stack number" of each host synchronisation.
void fake_syncs() {
  std::vector<std::string> texts;
  for (const auto& [what, stack] : Machine::get().syncs()) texts.push_back(std::to_string(stack) + ":" + what);
  answer = joined(texts);
}

// An access on a stream of the device that holds the memory; 1: it is a race, and the answer says which.
// stream: as torch numbers them, 0 the default one; -1: the current one; -2: the host makes the access.
int fake_touch(const void* data, int64_t bytes, int write, const char* op, const char* shape, int64_t stream) {
  Machine& m = Machine::get();
  const fake::Range range{data, static_cast<size_t>(bytes), write != 0, shape};
  try {
    if (stream == -2) {
      m.host_access(range);
    } else {
      const int holder = m.device_of_pointer(data);
      const int device = holder < 0 ? Machine::device() : holder;
      const uint32_t number = stream > 0 ? static_cast<uint32_t>(stream) : static_cast<uint32_t>(device);
      m.perform(stream < 0 ? Machine::stream(device) : number, op, {range});
    }
  } catch (const std::runtime_error& race) {
    answer = race.what();
    return 1;
  }
  return 0;
}
}
