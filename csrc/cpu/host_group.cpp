#include "host_group.hpp"

#include <algorithm>
#include <cstring>

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
bool reduces(Kind k) {
  return k == Kind::ALL_REDUCE || k == Kind::REDUCE || k == Kind::REDUCE_SCATTER;
}

// All destinations get the same bytes, so they are staged once.
bool shared_source(Kind k) {
  return k == Kind::ALL_REDUCE || k == Kind::ALL_GATHER || k == Kind::BROADCAST;
}

std::string seconds(int64_t ns) {
  char text[32];
  snprintf(text, sizeof text, "%.1f s", double(ns) * 1e-9);
  return text;
}

}  // namespace

thread_local bool (*HostGroup::interrupted)() = nullptr;

struct HostGroup::Run {
  const Call& call;
  Outcome& out;
  Descriptor& mine;  // this rank's descriptor
  int64_t start, deadline;
  bool on_caller;  // a caller's thread waits in this operation
  bool direct;     // memory in the arena may be read in place
};

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

Status HostGroup::check_alive(int r) const {
  if (r == me_) return {};
  if (control_.line(r).exit.load(std::memory_order_acquire)) return {Code::DEAD, rank_name(r) + " left the group"};
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
      if (from == to || sent == expected) continue;
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

// ---------------------------------------------------------------- operations

Outcome HostGroup::execute(const Call& call, bool on_caller) {
  Outcome out;
  out.status = check();
  if (!out.status.ok()) return out;
  out.sequence = ++sequence_;
  int64_t start = now_ns();
  Descriptor& d = control_.line(me_).descriptor[sequence_ & 1];
  Run run{call, out, d, start, start + call.timeout_ns, on_caller, true};
  d.count = call.count;
  d.offset = STAGED;
  d.max_staged = 0;
  d.arrived_ns = call.arrived_ns ? call.arrived_ns : start;
  d.root = call.root;
  d.slot_bytes = uint32_t(config_.slot_bytes);
  d.kind = uint8_t(call.kind);
  d.dtype = call.dtype_name;
  d.op = uint8_t(call.op);
  d.any_direct = 0;
  d.sequence = sequence_;
  out.status = call.kind == Kind::ALL_REDUCE || call.kind == Kind::REDUCE ? reduce_all(run) : exchange(run);
  if (out.status.code == Code::MEMORY) out.status = fail(Code::MEMORY, rank_name(me_) + ": " + out.status.text);
  return out;
}

// Moves pieces between ranks; with a reduction, a rank's pieces are summed in rank order as they arrive.
Status HostGroup::exchange(Run& run) {
  const Call& call = run.call;
  const bool shared = shared_source(call.kind), one_lane = shared || call.kind == Kind::GATHER;
  const size_t lane = (one_lane ? config_.slot_bytes : config_.slot_bytes / size_t(n_)) & ~size_t(63);

  // What this rank holds for the others, and where.
  Piece* mine = control_.pieces(me_, sequence_);
  uint64_t total = 0;
  for (int d = 0; d < n_; ++d)
    if (d != me_ && (!shared || total == 0)) total += call.send[size_t(d)].bytes;
  int staged_to = -1;  // the last destination with a staged piece; -1: nothing to stage
  for (int d = 0; d < n_; ++d) {
    const Span& s = call.send[size_t(d)];
    size_t offset = 0;
    bool direct =
        run.direct && total >= config_.direct_from && s.bytes && config_.arena->contains(s.p, s.bytes, offset);
    mine[d] = {direct ? offset : STAGED, s.bytes, call.recv[size_t(d)].bytes};
    if (d == me_ || !s.bytes) continue;
    if (direct) {
      run.mine.any_direct = 1;
    } else {
      staged_to = d;
      run.mine.max_staged = std::max(run.mine.max_staged, s.bytes);
    }
  }
  if (staged_to >= 0) {
    Status s = ensure_staging();
    if (!s.ok()) return s;
  }
  auto stage = [&](size_t from) {
    char* to = staged_to >= 0 ? slot(me_, epoch_ + 1) : nullptr;
    for (int d = 0; d <= staged_to; ++d) {
      const Span& s = call.send[size_t(d)];
      if (d == me_ || mine[d].offset != STAGED || from >= s.bytes) continue;
      copy(to + (one_lane ? 0 : size_t(d) * lane), s.p + from, std::min<uint64_t>(lane, s.bytes - from));
      if (one_lane) break;
    }
  };

  stage(0);
  Status s = publish(run);
  if (s.ok()) s = compare(run);
  if (!s.ok()) return s;
  record_arrivals(run);

  uint64_t max_staged = 0;
  bool any_direct = false;
  for (int r = 0; r < n_; ++r) {
    const Descriptor& d = control_.line(r).descriptor[sequence_ & 1];
    max_staged = std::max(max_staged, d.max_staged);
    any_direct = any_direct || d.any_direct;
  }
  if (call.kind == Kind::ALL_TO_ALL) {  // elsewhere the descriptors say all of it
    s = compare_pieces(run);
    if (!s.ok()) return s;
  }

  const size_t element = element_size(call.dtype);
  for (size_t from = 0;;) {
    // Where each rank's bytes [from, from + lane) for this rank lie now. A direct piece is whole from the start.
    auto source = [&](int r, size_t at) -> const char* {
      if (r == me_) return call.send[size_t(me_)].p + at;
      const Piece& piece = control_.pieces(r, sequence_)[me_];
      if (piece.offset != STAGED) return arena_of(r) + piece.offset + at;
      return slot(r, epoch_) + (one_lane ? 0 : size_t(me_) * lane);
    };
    if (reduces(call.kind)) {
      const Span& to = call.recv[size_t(me_)];
      uint64_t end = max_staged ? std::min<uint64_t>(to.bytes, from + lane) : to.bytes;
      if (from < end) {
        const void* sources[MAX_RANKS];
        for (int r = 0; r < n_; ++r) sources[r] = source(r, from);
        void* dst = to.p + from;
        reduce(&dst, 1, sources, n_, (end - from) / element, call.dtype, call.op, call.divisor);
        run.out.peer_bytes += (end - from) * size_t(n_ - 1);
      }
    } else {
      for (int i = 0; i < n_; ++i) {
        int r = (me_ + i) % n_;
        const Span& to = call.recv[size_t(r)];
        bool whole = r == me_ || control_.pieces(r, sequence_)[me_].offset != STAGED;
        if (whole ? from > 0 : from >= to.bytes) continue;
        uint64_t bytes = whole ? to.bytes : std::min<uint64_t>(lane, to.bytes - from);
        const char* at = bytes ? source(r, from) : nullptr;
        if (bytes && at != to.p + from) copy(to.p + from, at, bytes);
        if (r != me_) run.out.peer_bytes += bytes;
      }
    }
    from += lane;
    if (from >= max_staged) break;
    stage(from);
    s = publish(run);
    if (!s.ok()) return s;
  }
  // The owner of a direct piece may write to it again only when all have read it.
  return any_direct ? publish(run) : Status{};
}

// All-reduce and reduce: each rank sums one slice for all. Small ones: each rank sums everything for itself.
Status HostGroup::reduce_all(Run& run) {
  const Call& call = run.call;
  const Span &in = call.send[0], &out = call.recv[0];
  const size_t element = element_size(call.dtype), count = in.bytes / element;
  const bool to_all = call.kind == Kind::ALL_REDUCE;

  if (to_all && (in.bytes * size_t(n_) <= config_.oneshot_to)) {
    Call whole = call;
    whole.send.assign(size_t(n_), in);
    whole.recv.assign(size_t(n_), out);
    // Read while the others write their result in place: staged, even where it lies in the arena.
    Run inner{whole, run.out, run.mine, run.start, run.deadline, run.on_caller, false};
    return exchange(inner);
  }

  size_t offset = 0;
  if (in.p == out.p && config_.arena->contains(in.p, in.bytes, offset)) run.mine.offset = offset;
  Status s = ensure_staging();
  if (s.ok()) s = publish(run);
  if (s.ok()) s = compare(run);
  if (!s.ok()) return s;
  record_arrivals(run);

  std::vector<uint64_t> offsets;
  for (int r = 0; r < n_; ++r) offsets.push_back(control_.line(r).descriptor[sequence_ & 1].offset);
  bool direct = std::find(offsets.begin(), offsets.end(), STAGED) == offsets.end();
  if (direct) return reduce_direct(run, offsets, count);
  return n_ == 2 && to_all ? reduce_pair(run, count) : reduce_staged(run, count);
}

Status HostGroup::reduce_direct(Run& run, const std::vector<uint64_t>& offsets, size_t count) {
  const Call& call = run.call;
  const size_t element = element_size(call.dtype);
  const size_t share = ((count + size_t(n_) - 1) / size_t(n_) + 63) & ~size_t(63);
  const size_t begin = std::min(count, share * size_t(me_)), end = std::min(count, begin + share);
  if (begin < end) {
    const void* sources[MAX_RANKS];
    void* results[MAX_RANKS];
    int targets = 0;
    for (int r = 0; r < n_; ++r) {
      char* p = arena_of(r) + offsets[size_t(r)] + begin * element;
      sources[r] = p;
      if (call.kind == Kind::ALL_REDUCE || r == call.root) {
        results[targets++] = p;
        if (r != me_) run.out.peer_bytes += (end - begin) * element;
      }
    }
    reduce(results, targets, sources, n_, end - begin, call.dtype, call.op, call.divisor);
    run.out.peer_bytes += (end - begin) * element * size_t(n_ - 1);
  }
  return publish(run);
}

// Between two ranks each may as well sum everything: the same bytes move, and no sum has to be copied home.
Status HostGroup::reduce_pair(Run& run, size_t count) {
  const Call& call = run.call;
  const size_t element = element_size(call.dtype), chunk = config_.slot_bytes / element, bytes = count * element;
  for (size_t from = 0; from < bytes; from += chunk * element) {
    const size_t length = std::min(chunk * element, bytes - from);
    copy(slot(me_, epoch_ + 1), call.send[0].p + from, length);
    Status s = publish(run);
    if (!s.ok()) return s;
    const void* sources[2];
    sources[me_] = call.send[0].p + from;
    sources[1 - me_] = slot(1 - me_, epoch_);
    void* result = call.recv[0].p + from;
    reduce(&result, 1, sources, 2, length / element, call.dtype, call.op, call.divisor);
    run.out.peer_bytes += length;
  }
  return {};
}

// A pipeline over chunks; in each step a rank stages chunk t, sums its slice of chunk t-1, and takes chunk t-2 home.
Status HostGroup::reduce_staged(Run& run, size_t count) {
  const Call& call = run.call;
  const char* in = call.send[0].p;
  char* out = call.kind == Kind::ALL_REDUCE || call.root == me_ ? call.recv[0].p : nullptr;
  const size_t element = element_size(call.dtype);
  const size_t line = 64 / element;  // slices are whole cache lines
  const size_t chunk = config_.slot_bytes / size_t(n_) / 64 * line * size_t(n_), chunks = (count + chunk - 1) / chunk;
  const uint64_t first = epoch_ + 1;  // chunk c lies in the slot of epoch first + c
  struct Slice {
    size_t begin, count;  // in elements, from the start of the chunk
  };
  auto slice = [&](size_t c, int r) {
    size_t length = std::min(chunk, count - c * chunk);
    size_t share = (length + line * size_t(n_) - 1) / (line * size_t(n_)) * line;
    size_t begin = std::min(length, share * size_t(r));
    return Slice{begin, std::min(share, length - begin)};
  };
  for (size_t t = 0; t < chunks + 2; ++t) {
    if (t >= 2 && out) {
      size_t c = t - 2;
      for (int i = 0; i < n_; ++i) {
        int r = (me_ + i) % n_;
        Slice s = slice(c, r);
        if (!s.count) continue;
        copy(out + (c * chunk + s.begin) * element, slot(r, first + c) + s.begin * element, s.count * element);
        if (r != me_) run.out.peer_bytes += s.count * element;
      }
    }
    if (t >= 1 && t - 1 < chunks) {
      Slice s = slice(t - 1, me_);
      const void* sources[MAX_RANKS];
      for (int r = 0; r < n_; ++r) sources[r] = slot(r, first + t - 1) + s.begin * element;
      void* result = slot(me_, first + t - 1) + s.begin * element;
      if (s.count) reduce(&result, 1, sources, n_, s.count, call.dtype, call.op, call.divisor);
      run.out.peer_bytes += s.count * element * size_t(n_ - 1);
    }
    if (t < chunks) copy(slot(me_, first + t), in + t * chunk * element, std::min(chunk, count - t * chunk) * element);
    if (t < chunks + 1) {
      Status s = publish(run);
      if (!s.ok()) return s;
    }
  }
  return {};
}

// ---------------------------------------------------------------- completions

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
