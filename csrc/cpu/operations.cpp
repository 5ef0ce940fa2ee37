// What each collective does between its steps: who stages what, who reads or sums what.
#include <algorithm>
#include <cstring>

#include "run.hpp"

namespace distlib {
namespace {

// All destinations get the same bytes, so they are staged once.
bool shared_source(Kind k) {
  return k == Kind::ALL_REDUCE || k == Kind::ALL_GATHER || k == Kind::BROADCAST;
}

}  // namespace

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

}  // namespace distlib
