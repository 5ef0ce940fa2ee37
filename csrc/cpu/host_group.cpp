// The protocol: the queue of a group's operations, publishing and waiting, and what happens when a rank fails.
#include "host_group.hpp"

#include <algorithm>
#include <cstring>

#include "run.hpp"

namespace distlib {
namespace {

constexpr int64_t SLICE_NS = 50 * 1000000;  // how long a wait sleeps before it looks for dead ranks, aborts and signals

constexpr int64_t WRITING_NS = 1000000000;  // how long a rank may take to write why it ended the group

const char* kind_name(uint8_t k) {
  static const char* names[] = {"barrier",   "all_reduce", "reduce",  "reduce_scatter", "all_gather",
                                "broadcast", "gather",     "scatter", "all_to_all"};
  return k < sizeof names / sizeof *names ? names[k] : "unknown operation";
}
const char* op_name(uint8_t o) {
  static const char* names[] = {"sum", "avg", "min", "max", "product", "band", "bor", "bxor"};
  return o < 8 ? names[o] : "?";
}
const char* dtype_label(uint8_t d) {
  static const char* names[] = {"float32", "float64", "float16", "bfloat16", "int8",      "int32",
                                "int64",   "uint8",   "bool",    "int16",    "complex64", "complex128"};
  return d < sizeof names / sizeof *names ? names[d] : "other dtype";
}
std::string seconds(int64_t ns) {
  char text[32];
  snprintf(text, sizeof text, "%.1f s", double(ns) * 1e-9);
  return text;
}

}  // namespace

thread_local bool (*HostGroup::interrupted)() = nullptr;

HostGroup::HostGroup(GroupConfig config)
    : config_(std::move(config)),
      n_(int(config_.peers.size())),
      me_(config_.rank),
      owner_pid_(getpid()),
      control_(arena_of(config_.leader) + config_.control_offset, n_) {
  config_.slot_bytes = std::max<size_t>(config_.slot_bytes, size_t(n_) * 64) & ~size_t(63);
}

HostGroup::~HostGroup() {
  close();
}

// ---------------------------------------------------------------- the queue

void HostGroup::submit(const std::shared_ptr<Task>& task, bool inline_ok) {
  if (foreign()) {  // in a forked child the lock may be held by a thread that is not there
    task->outcome.status = check();
    task->done = true;
    return;
  }
  if (!task->call.arrived_ns) task->call.arrived_ns = now_ns();
  std::unique_lock<std::mutex> lock(queue_mutex_);
  if (inline_ok && queue_.empty() && !busy_ && !stop_) {
    busy_ = true;
    lock.unlock();
    task->outcome = execute(task->call, true);
    task->done = true;
    lock.lock();
    busy_ = false;
    if (!queue_.empty()) queued_.notify_one();
    if (stop_ && queue_.empty()) leave();  // closed meanwhile, by another thread
    return;
  }
  if (stop_) {
    task->outcome.status = {Code::ABORTED, "group '" + config_.name + "' was closed on this rank"};
    task->done = true;
    return;
  }
  queue_.push_back(task);
  if (!thread_.joinable()) thread_ = std::thread(&HostGroup::work, this);
  queued_.notify_one();
}

void HostGroup::work() {
  std::unique_lock<std::mutex> lock(queue_mutex_);
  for (;;) {
    queued_.wait(lock, [&] { return (!queue_.empty() && !busy_) || (stop_ && queue_.empty()); });
    if (queue_.empty()) return;
    auto task = queue_.front();
    queue_.pop_front();
    busy_ = true;
    lock.unlock();
    Outcome outcome = execute(task->call, false);
    uint64_t notify;
    {
      std::lock_guard<std::mutex> guard(task->mutex);
      task->outcome = std::move(outcome);
      task->done = true;
      notify = task->notify;
    }
    task->finished.notify_all();
    if (notify) Completions::instance().push(notify);
    lock.lock();
    busy_ = false;
    // An inline caller never waits for its turn: it queues when something is before it.
  }
}

void HostGroup::close() {
  if (foreign()) {  // a forked child holds a copy of this object, not its threads
    if (thread_.joinable()) thread_.detach();
    return;
  }
  if (closed_.exchange(true)) return;
  control_.line(me_).exit.store(CLOSED, std::memory_order_release);
  {
    std::lock_guard<std::mutex> lock(queue_mutex_);
    stop_ = true;
  }
  queued_.notify_all();
  if (thread_.joinable()) thread_.join();
  std::lock_guard<std::mutex> lock(queue_mutex_);
  if (!busy_) leave();  // else the thread that runs an operation leaves after it
}

void HostGroup::leave() {
  if (!left_.exchange(true)) control_.line(me_).exit.store(LEFT, std::memory_order_release);
}

// Whether every rank has come as far as `state` on its way out. A process that ended has.
bool HostGroup::all_are(ExitState state) const {
  for (int r = 0; r < n_; ++r)
    if (control_.line(r).exit.load(std::memory_order_acquire) < state &&
        (r == me_ || config_.peers[size_t(r)]->alive()))
      return false;
  return true;
}

bool HostGroup::reap() {
  if (foreign()) return true;
  const bool leads = me_ == config_.leader;
  if (!gone_) {
    if (!all_are(LEFT)) return false;
    if (staging_) config_.arena->release(staging_ - 1);
    staging_ = 0;
    gone_ = true;
    control_.line(me_).exit.store(GONE, std::memory_order_release);
  }
  return !leads || all_are(GONE);
}

// ---------------------------------------------------------------- faults

void HostGroup::abort(const std::string& text) {
  if (left_) return;
  Header& h = control_.header();
  uint32_t running = RUNNING;
  if (h.abort.value.compare_exchange_strong(running, WRITING)) write_abort(text);
}

void HostGroup::write_abort(const std::string& text) {
  Header& h = control_.header();
  size_t n = std::min(text.size(), sizeof h.text - 1);
  memcpy(h.text, text.data(), n);
  h.text[n] = 0;
  h.abort.set(ABORTED_);
  for (int r = 0; r < n_; ++r) {
    futex_wake_all(control_.line(r).epoch.value);
    control_.bell(r).ring();
  }
}

bool HostGroup::aborted(std::string& text) const {
  Header& h = control_.header();
  if (h.abort.value.load(std::memory_order_acquire) != ABORTED_) return false;
  text.assign(h.text, strnlen(h.text, sizeof h.text));
  return true;
}

Status HostGroup::fail(Code code, const std::string& text) {
  abort(text);
  std::string first;
  // Another rank may have been quicker: then its words count, here as everywhere. Unless it ended while it wrote them.
  for (int64_t until = now_ns() + WRITING_NS; !aborted(first); cpu_relax())
    if (now_ns() > until) write_abort(text);
  return {text.compare(0, first.size(), first) == 0 ? code : Code::ABORTED, first};
}

Status HostGroup::check() const {
  if (foreign())
    return {Code::FORKED, "group '" + config_.name + "' belongs to pid " + std::to_string(owner_pid_) +
                              "; this is a child forked after it was made (pid " + std::to_string(getpid()) +
                              "). Start distlib in the child, or use the 'spawn' start method"};
  if (closed_.load()) return {Code::ABORTED, "group '" + config_.name + "' was closed on this rank"};
  std::string text;
  if (aborted(text)) return {Code::ABORTED, text};
  return {};
}

std::string HostGroup::rank_name(int r) const {
  int pid = r == me_ ? owner_pid_ : config_.peers[size_t(r)]->pid();
  return "rank " + std::to_string(config_.labels[size_t(r)]) + " (pid " + std::to_string(pid) + ")";
}

Status HostGroup::check_left(int r) const {
  if (r == me_ || !control_.line(r).exit.load(std::memory_order_acquire)) return {};
  return {Code::DEAD, rank_name(r) + " left the group"};
}

Status HostGroup::check_alive(int r) const {
  Status left = check_left(r);
  if (!left.ok() || r == me_) return left;
  if (!config_.peers[size_t(r)]->alive()) return {Code::DEAD, rank_name(r) + " ended (it exited, or was killed)"};
  return {};
}

std::string HostGroup::describe(const Descriptor& d) const {
  std::string s = kind_name(d.kind);
  if (Kind(d.kind) == Kind::BARRIER) return s;
  s += std::string("(") + dtype_label(d.dtype) + ", " + std::to_string(d.count) + " elements";
  if (reduces(Kind(d.kind))) s += std::string(", ") + op_name(d.op);
  Kind k = Kind(d.kind);
  if (k == Kind::REDUCE || k == Kind::BROADCAST || k == Kind::GATHER || k == Kind::SCATTER)
    s += ", root " + std::to_string(d.root);
  return s + ")";
}

// Which ranks have not come as far as `epoch`, and what each was last seen doing.
std::string HostGroup::missing(const Run& run, uint32_t epoch) const {
  std::string s;
  for (int r = 0; r < n_; ++r) {
    RankLine& line = control_.line(r);
    if (int32_t(line.epoch.value.load(std::memory_order_acquire) - epoch) >= 0) continue;
    s += s.empty() ? "" : "; ";
    s += rank_name(r);
    uint64_t seen = std::max(line.descriptor[0].sequence, line.descriptor[1].sequence);
    if (!seen)
      s += " has not started any operation";
    else if (seen == run.mine.sequence)
      s += " stopped in the middle of it";
    else
      s += " was last seen in " + describe(line.descriptor[seen & 1]) + " #" + std::to_string(seen);
  }
  return s;
}

// ---------------------------------------------------------------- steps

Status HostGroup::wait_for(Run& run, int r, uint32_t epoch) {
  Signal& signal = control_.line(r).epoch;
  auto come = [&](uint32_t& v) {
    v = signal.value.load(std::memory_order_acquire);
    return int32_t(v - epoch) >= 0;
  };
  uint32_t v;
  if (come(v)) return {};
  int64_t begin = now_ns();
  // On the progress thread, spinning would take the core from the computation that the operation runs beside.
  const int64_t spin = run.on_caller ? config_.spin_ns : 0;
  if (spin > 0)
    for (int64_t until = begin + spin; now_ns() < until;)
      for (int i = 0; i < 32; ++i) {
        cpu_relax();
        if (come(v)) {
          run.out.waited_ns += now_ns() - begin;
          return {};
        }
      }
  for (int64_t looked = begin;;) {
    if (come(v)) {
      run.out.waited_ns += now_ns() - begin;
      return {};
    }
    std::string text;
    if (aborted(text)) return {Code::ABORTED, text};
    if (closed_.load()) return {Code::ABORTED, "group '" + config_.name + "' was closed on this rank"};
    int64_t now = now_ns();
    auto what = [&] {
      return describe(run.mine) + " #" + std::to_string(run.mine.sequence) + " of group '" + config_.name + "'";
    };
    if (now - looked >= SLICE_NS) {
      looked = now;
      if (interrupted && interrupted()) {
        abort(rank_name(me_) + " was interrupted during " + what());
        return {Code::INTERRUPTED, "interrupted during " + what()};
      }
      Status alive = check_alive(r);
      if (!alive.ok() && !come(v)) return fail(Code::DEAD, what() + " cannot complete: " + alive.text);
    }
    if (now >= run.deadline)
      return fail(Code::TIMEOUT, what() + " ran into the timeout of " + seconds(run.call.timeout_ns) + " on " +
                                     rank_name(me_) + ", waiting for: " + missing(run, epoch));
    signal.sleep(v, std::max<int64_t>(1000, std::min(SLICE_NS, run.deadline - now)));
  }
}

Status HostGroup::publish(Run& run) {
  uint32_t e = uint32_t(++epoch_);
  control_.line(me_).epoch.set(e);
  for (int i = 1; i < n_; ++i) {
    Status s = wait_for(run, (me_ + i) % n_, e);
    if (!s.ok()) return s;
  }
  return {};
}

// Every rank has published its descriptor: all compare all, so all come to the same verdict.
Status HostGroup::compare(Run& run) {
  const Descriptor& a = run.mine;
  bool same = true;
  for (int r = 0; r < n_; ++r) {
    const Descriptor& b = control_.line(r).descriptor[sequence_ & 1];
    same = same && a.sequence == b.sequence && a.kind == b.kind && a.dtype == b.dtype && a.op == b.op &&
           a.root == b.root && a.count == b.count && a.slot_bytes == b.slot_bytes;
  }
  if (same) return {};
  std::string text = "ranks disagree in call #" + std::to_string(sequence_) + " of group '" + config_.name + "': ";
  for (int r = 0; r < n_; ++r) {
    if (r) text += "; ";
    text += "rank " + std::to_string(config_.labels[size_t(r)]) + " called " +
            describe(control_.line(r).descriptor[sequence_ & 1]);
  }
  return fail(Code::MISMATCH,
              text + ". Every rank must make the same calls in the same order, with the same DISTLIB_STAGING_KB");
}

// Every pair's sizes, by every rank: a pair that disagrees ends the operation for all.
Status HostGroup::compare_pieces(Run& run) {
  for (int from = 0; from < n_; ++from)
    for (int to = 0; to < n_; ++to) {
      uint64_t sent = control_.pieces(from, sequence_)[to].bytes;
      uint64_t expected = control_.pieces(to, sequence_)[from].expects;
      if (sent == expected) continue;
      return fail(Code::MISMATCH, describe(run.mine) + " #" + std::to_string(sequence_) + " of group '" + config_.name +
                                      "': rank " + std::to_string(config_.labels[size_t(from)]) + " sends " +
                                      std::to_string(sent) + " bytes to rank " +
                                      std::to_string(config_.labels[size_t(to)]) + ", which expects " +
                                      std::to_string(expected));
    }
  return {};
}

void HostGroup::record_arrivals(const Run& run) {
  int64_t first = INT64_MAX;
  for (int r = 0; r < n_; ++r) first = std::min(first, control_.line(r).descriptor[sequence_ & 1].arrived_ns);
  std::lock_guard<std::mutex> lock(lateness_mutex_);
  auto& late = lateness_[run.call.label];
  late.resize(size_t(n_) + 1);
  for (int r = 0; r < n_; ++r) late[size_t(r)] += control_.line(r).descriptor[sequence_ & 1].arrived_ns - first;
  ++late[size_t(n_)];
}

std::map<uint32_t, std::vector<int64_t>> HostGroup::lateness() const {
  std::lock_guard<std::mutex> lock(lateness_mutex_);
  return lateness_;
}

Status HostGroup::ensure_staging() {
  if (staging_) return {};
  size_t offset = 0;
  Status s = config_.arena->allocate(3 * config_.slot_bytes, true, offset);
  if (!s.ok()) return s;
  staging_ = offset + 1;
  control_.line(me_).staging.store(offset, std::memory_order_release);
  return {};
}

char* HostGroup::slot(int r, uint64_t epoch) const {
  return arena_of(r) + control_.line(r).staging.load(std::memory_order_acquire) + (epoch % 3) * config_.slot_bytes;
}

}  // namespace distlib
