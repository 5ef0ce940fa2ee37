// Collectives between the ranks of one group on one host, over shared memory.
//
// The protocol. Each rank owns a counter, its epoch. An operation is a sequence of steps; in each a rank writes what
// the others need, publishes (epoch + 1), waits until all epochs have come as far, then reads what the others wrote.
// The first publication of an operation carries its descriptor, which every rank compares with its own: ranks that
// disagree all see the same disagreement and all raise.
//
// Data is pulled. A piece that lies in its owner's arena is read where it lies (one copy less: "direct"); any other
// piece goes through the owner's staging slots, chunk by chunk, small enough to stay in cache. Three slots take turns
// by epoch: a rank that writes slot e+3 has passed the wait of e+2, so all have finished reading e.
#pragma once
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "arena.hpp"
#include "control.hpp"
#include "kernels.hpp"
#include "status.hpp"

namespace distlib {

enum class Kind : uint8_t {
  BARRIER,
  ALL_REDUCE,
  REDUCE,
  REDUCE_SCATTER,
  ALL_GATHER,
  BROADCAST,
  GATHER,
  SCATTER,
  ALL_TO_ALL
};

struct Span {
  char* p = nullptr;
  uint64_t bytes = 0;
};

// One collective, as this rank sees it. `send[d]` goes to rank d and `recv[s]` comes from rank s (empty: nothing);
// ALL_REDUCE and REDUCE use send[0] and recv[0] alone, which may be the same memory.
struct Call {
  Kind kind = Kind::BARRIER;
  DType dtype = DType::U8;
  RedOp op = RedOp::SUM;
  uint8_t dtype_name = 0;  // what the user called it: compared between ranks, not interpreted
  int root = 0;
  uint64_t count = 0;
  int divisor = 1;
  int64_t timeout_ns = 0;
  int64_t arrived_ns = 0;  // when this rank was ready for it; 0: when it was submitted
  uint32_t label = 0;      // lateness is kept by label
  std::vector<Span> send, recv;
};

struct Outcome {
  Status status;
  uint64_t sequence = 0;
  uint64_t peer_bytes = 0;  // read from or written to other ranks' memory by this rank
  int64_t waited_ns = 0;
};

struct Task {
  Call call;
  Outcome outcome;
  bool done = false;
  uint64_t notify = 0;  // non-zero: pushed to the completion queue when done
  std::mutex mutex;
  std::condition_variable finished;
};

// Ids of finished tasks whose futures somebody holds; one consumer.
class Completions {
 public:
  static Completions& instance();
  void push(uint64_t id);
  bool pop(uint64_t& id, double seconds);

 private:
  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<uint64_t> ids_;
};

struct GroupConfig {
  std::string name;
  int rank = 0;
  std::vector<int> labels;                   // what each rank is called in messages: its global rank
  std::vector<std::shared_ptr<Peer>> peers;  // by rank; null for this rank
  std::shared_ptr<Arena> arena;
  int leader = 0;             // the rank whose arena holds the control block
  size_t control_offset = 0;  // in the leader's arena
  int64_t spin_ns = 0;        // how long a wait spins before it sleeps; 0 where ranks outnumber cores
  size_t slot_bytes = size_t(1) << 20;
  size_t direct_from = size_t(128) << 10;  // bytes from which arena memory is read in place
  size_t oneshot_to = size_t(512) << 10;   // bytes (times ranks) up to which every rank reduces everything itself
};

class HostGroup {
 public:
  explicit HostGroup(GroupConfig config);
  ~HostGroup();
  HostGroup(const HostGroup&) = delete;
  HostGroup& operator=(const HostGroup&) = delete;

  int size() const { return n_; }
  int rank() const { return me_; }

  // Runs the task on the calling thread if nothing is queued before it and `inline_ok`, else on the progress thread.
  void submit(const std::shared_ptr<Task>& task, bool inline_ok);

  // Ends the group for every rank: pending and later calls fail with `text`. The first text wins.
  void abort(const std::string& text);
  bool aborted(std::string& text) const;
  // Leaves the group; the others see it if they still wait for this rank. Safe to call twice.
  void close();
  // Gives back what the group holds in this rank's arena once every rank has left it; false while one has not: it may
  // still read the last operation's bytes. On the leader it is true only when no rank needs the control block any more.
  bool reap();
  bool reaped() const { return gone_; }

  // By label: nanoseconds by which each rank arrived after the first, summed over operations; last, their number.
  std::map<uint32_t, std::vector<int64_t>> lateness() const;

  // Used by Mailbox.
  const GroupConfig& config() const { return config_; }
  const Control& control() const { return control_; }
  char* arena_of(int r) const { return r == me_ ? config_.arena->base() : config_.peers[size_t(r)]->base(); }
  bool foreign() const { return getpid() != owner_pid_; }  // in a child forked after the group was made
  Status check() const;                                    // forked, closed or aborted
  Status check_left(int r) const;                          // that rank has not left: it said so, if it has
  Status check_alive(int r) const;                         // that rank lives and has not left
  std::string rank_name(int r) const;                      // "rank 3 (pid 77)"
  // Set around a call that may block the main thread: returns true when a signal handler wants it to end.
  static thread_local bool (*interrupted)();

 private:
  struct Run;  // one operation under way
  Outcome execute(const Call& call, bool on_caller);
  Status exchange(Run& run);
  Status reduce_all(Run& run);
  Status reduce_direct(Run& run, const std::vector<uint64_t>& offsets, size_t count);
  Status reduce_pair(Run& run, size_t count);
  Status reduce_staged(Run& run, size_t count);
  Status publish(Run& run);  // publish this rank's step and wait for all the others'
  Status wait_for(Run& run, int r, uint32_t epoch);
  Status compare(Run& run);
  Status compare_pieces(Run& run);
  Status ensure_staging();
  Status fail(Code code, const std::string& text);
  void write_abort(const std::string& text);
  std::string describe(const Descriptor& d) const;
  std::string missing(const Run& run, uint32_t epoch) const;
  void record_arrivals(const Run& run);
  char* slot(int r, uint64_t epoch) const;
  void work();
  void leave();  // under queue_mutex_
  bool all_are(ExitState state) const;

  GroupConfig config_;
  int n_, me_;
  int owner_pid_;
  Control control_;
  uint64_t epoch_ = 0;
  uint64_t sequence_ = 0;
  size_t staging_ = 0;  // offset + 1 of this rank's staging slots, 0 before the first use
  std::atomic<bool> closed_{false};
  std::atomic<bool> left_{false};  // from then on only reap() may touch the control block
  bool gone_ = false;

  mutable std::mutex lateness_mutex_;
  std::map<uint32_t, std::vector<int64_t>> lateness_;

  std::mutex queue_mutex_;
  std::condition_variable queued_;
  std::deque<std::shared_ptr<Task>> queue_;
  bool busy_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace distlib
