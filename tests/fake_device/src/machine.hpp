// The fake machine: devices whose memory is the host's, streams that run at once, and a book of what a real device
// could have reordered. No torch here.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <set>
#include <unordered_map>

#include "ledger.hpp"

namespace fake {

enum class Mode { OFF, RAISE, COLLECT };

// The part of memory that an operator reads or writes.
struct Range {
  const void* data;
  size_t bytes;
  bool write;
  std::string shape;
};

struct Stream {
  int device;
  Clock clock;
  int64_t asked = 0;  // queries since it was last given work
};

struct Event {
  Clock clock;
  bool recorded = false;
  int64_t asked = 0;
  std::chrono::steady_clock::time_point when;
};

struct Block {
  char* data;
  size_t bytes;  // capacity
  size_t asked;  // what was asked for
  int device;    // -1: pinned memory of the host
  uint32_t stream;
  bool lent = true;
  Ledger ledger;
  std::set<uint32_t> users;                            // streams of record_stream
  std::vector<std::pair<uint32_t, uint64_t>> holders;  // once freed: what must have passed before it is lent again
  int64_t waited = 0;                                  // allocations that have gone by since
};

struct Stats {
  int64_t allocated = 0, allocated_peak = 0, reserved = 0, reserved_peak = 0;
  int64_t requested = 0, requested_peak = 0, blocks = 0, blocks_peak = 0, segments = 0;
};

class Machine {
 public:
  static Machine& get();

  // The calling thread's.
  static int device();
  static void set_device(int device);
  static uint32_t stream(int device);
  static void set_stream(uint32_t number);

  int devices() const { return devices_; }
  void set_devices(int count);

  uint32_t new_stream(int device);
  int device_of(uint32_t stream);

  void record(Event& event, uint32_t stream);
  void wait(uint32_t stream, const Event& event);
  bool passed(Event& event);  // a query; the host knows it then
  bool passed_all(uint32_t stream);
  void synchronize(const Event& event);
  void synchronize_stream(uint32_t stream, const char* why);
  void synchronize_device(int device);

  // One operation on a stream: raises (or collects) what is not ordered, then notes the ranges.
  void perform(uint32_t stream, const char* op, const std::vector<Range>& ranges);
  // The host reads or writes memory that copies under way may use.
  void host_access(const Range& range);

  void* allocate(int device, uint32_t stream, size_t bytes);
  void* allocate_pinned(size_t bytes);
  void release(void* data);
  void record_stream(const void* data, uint32_t stream);
  void empty_cache();
  bool is_pinned(const void* data);
  int device_of_pointer(const void* data);  // -1: not ours
  Stats stats(int device);
  void reset_peak(int device);

  void set_mode(Mode mode);
  void set_lag(int64_t lag) { lag_ = lag; }
  std::vector<std::string> take_races();
  std::vector<std::pair<std::string, int64_t>> syncs();
  void reset();  // forgets races, syncs and accesses; everything so far is ordered before everything later

  // int64_t stack(): the number of the Python stack of this thread; text of one. Never called under the mutex.
  std::function<int64_t()> take_stack;
  std::function<std::string(int64_t)> tell_stack;

 private:
  struct Race {
    Access earlier, now;
    bool lent_again;
  };
  struct Pool {
    std::multimap<size_t, Block*> free;
    std::vector<Block*> unclean;  // of these, the ones that other streams may still use
    std::vector<Block*> held;     // freed, but a stream of record_stream may still use them
  };

  int64_t stack_here() const { return take_stack ? take_stack() : -1; }
  void note_sync(const char* why, int64_t stack);
  void report(const std::vector<Race>& races, int64_t stack);
  uint64_t begin(uint32_t stream);
  bool knows(const Clock& clock) const;
  Block* find(const void* data);
  void settle(uint32_t stream, size_t need, const Access& now, std::vector<Race>& races);
  std::string name(uint32_t stream) const;

  std::mutex mutex_;
  int devices_ = 1;
  std::atomic<Mode> mode_{Mode::RAISE};
  int64_t lag_ = 0;
  std::vector<Stream> streams_ = std::vector<Stream>(1);
  Clock host_;
  std::map<const char*, Block*> lent_;
  std::unordered_map<uint32_t, Pool> pools_;
  std::vector<Stats> stats_ = std::vector<Stats>(1);
  std::vector<std::string> races_;
  std::vector<std::pair<std::string, int64_t>> syncs_;
};

}  // namespace fake
