// Collectives and messages in mapped memory: what each rank writes, and what it reads after each step.
#include "collectives.h"

#include "collectives_steps.cuh"
#include "collectives_sums.cuh"

namespace distlib {
namespace cuda {
namespace {

enum : int32_t {  // as native.KINDS
  kBarrier,
  kAllReduce,
  kReduce,
  kReduceScatter,
  kAllGather,
  kBroadcast,
  kGather,
  kScatter,
  kAllToAll,
};
constexpr int32_t kAllToAllBlocks = 8;  // its ranks know only their own sizes: not how many blocks pay

__host__ __device__ inline uint64_t lower(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}

__host__ __device__ inline uint64_t ceiling(uint64_t a, uint64_t b) {
  return (a + b - 1) / b;
}

// How a collective is cut: into pieces of which each fills a slot, dealt to the blocks in turn. What goes to each rank
// by itself has a part of the slot. In elements; of an all-to-all in bytes.
struct Cut {
  uint64_t element, part, piece, total;

  __host__ __device__ Cut(const distlib_group& g, const distlib_call& c) {
    const uint64_t part_bytes = g.slot_bytes / static_cast<uint64_t>(g.size) / kLine * kLine;
    const bool parted = c.what.kind == kReduceScatter || c.what.kind == kScatter || c.what.kind == kAllToAll;
    element = c.what.kind == kAllToAll ? 1 : static_cast<uint64_t>(c.element);
    part = part_bytes / element;
    piece = (parted ? part_bytes : c.sliced ? part_bytes * static_cast<uint64_t>(g.size) : g.slot_bytes) / element;
    total = c.what.kind == kAllToAll ? 0 : c.what.count;
  }

  __host__ __device__ uint64_t pieces() const { return ceiling(total, piece); }
  __host__ __device__ uint64_t length(uint64_t i) const {
    return i * piece < total ? lower(piece, total - i * piece) : 0;
  }

  // Of a piece of `length` elements, those that a rank sums: whole lines, so that two ranks never write into one.
  struct Slice {
    uint64_t begin, length;
  };
  __host__ __device__ Slice slice(uint64_t length, int rank, int ranks) const {
    const uint64_t each = ceiling(ceiling(length, static_cast<uint64_t>(ranks)) * element, kLine) * kLine / element;
    const uint64_t begin = lower(length, each * static_cast<uint64_t>(rank));
    return {begin, lower(each, length - begin)};
  }
};

inline uint32_t grid_of(const distlib_group& g, const distlib_call& c) {
  const uint64_t most =
      static_cast<uint64_t>(c.what.kind == kAllToAll && kAllToAllBlocks < g.blocks ? kAllToAllBlocks : g.blocks);
  if (c.what.kind == kAllToAll) return static_cast<uint32_t>(most);
  const uint64_t pieces = Cut(g, c).pieces();
  return static_cast<uint32_t>(pieces == 0 ? 1 : lower(pieces, most));
}

// One block's part in a collective.
class Part {
 public:
  __device__ Part(Team& team, const distlib_call& call)
      : team_(team), c_(call), cut_(team.g, call), me_(team.g.rank), n_(team.g.size), total_(cut_.total) {
    epoch_ = *counter(me_, me_);
  }

  __device__ void run() {
    // Every block takes at least one step, so that ranks compare notes also about nothing.
    for (uint64_t i = blockIdx.x; i == blockIdx.x || i * cut_.piece < total_; i += gridDim.x)
      if (!piece(i)) return;
  }

 private:
  // False where the block must end.
  __device__ bool piece(uint64_t i) {
    const uint64_t at = i * cut_.piece * cut_.element, length = cut_.length(i), bytes = length * cut_.element;
    const uint64_t part = cut_.part * cut_.element;
    char* const mine = slot(me_, epoch_ + 1);
    switch (c_.what.kind) {
      case kAllReduce:
        copy(mine, given(0) + at, bytes);
        if (!step(i)) return false;
        if (c_.sliced) return sum_slices(i, at, length);
        reduce(team_, c_, taken(0) + at, slot_offset(epoch_), length);
        return true;
      case kReduce:
        copy(mine, given(0) + at, bytes);
        if (!step(i)) return false;
        if (me_ == c_.what.root) reduce(team_, c_, taken(0) + at, slot_offset(epoch_), length);
        return true;
      case kReduceScatter:
        for (int to = 0; to < n_; ++to) copy(mine + static_cast<uint64_t>(to) * part, given(to) + at, bytes);
        if (!step(i)) return false;
        reduce(team_, c_, taken(0) + at, slot_offset(epoch_) + static_cast<uint64_t>(me_) * part, length);
        return true;
      case kAllGather:
      case kGather:
        copy(mine, given(0) + at, bytes);
        if (!step(i)) return false;
        if (c_.what.kind == kGather && me_ != c_.what.root) return true;
        for (int k = 0; k < n_; ++k) copy(taken(from(k)) + at, slot(from(k), epoch_), bytes);
        return true;
      case kBroadcast:
        if (me_ == c_.what.root) copy(mine, given(0) + at, bytes);
        if (!step(i)) return false;
        if (me_ != c_.what.root) copy(taken(0) + at, slot(c_.what.root, epoch_), bytes);
        return true;
      case kScatter:
        if (me_ == c_.what.root)
          for (int to = 0; to < n_; ++to) copy(mine + static_cast<uint64_t>(to) * part, given(to) + at, bytes);
        if (!step(i)) return false;
        copy(taken(0) + at, slot(c_.what.root, epoch_) + static_cast<uint64_t>(me_) * part, bytes);
        return true;
      case kAllToAll:
        for (int to = 0; to < n_; ++to)
          copy(mine + static_cast<uint64_t>(to) * part, given(to) + at, left(c_.send_bytes[to], at));
        if (!step(i)) return false;
        for (int k = 0; k < n_; ++k)
          copy(taken(from(k)) + at, slot(from(k), epoch_) + static_cast<uint64_t>(me_) * part,
               left(c_.recv_bytes[from(k)], at));
        return true;
      default:
        return step(i);
    }
  }

  // The second half of a sliced all-reduce: each rank sums its slice of the piece for all.
  __device__ bool sum_slices(uint64_t i, uint64_t at, uint64_t length) {
    const Cut::Slice my = cut_.slice(length, me_, n_);
    reduce(team_, c_, slot(me_, epoch_ + 1) + my.begin * cut_.element, slot_offset(epoch_) + my.begin * cut_.element,
           my.length);
    if (!step(i, false)) return false;
    for (int k = 0; k < n_; ++k) {
      const int r = from(k);
      const Cut::Slice theirs = cut_.slice(length, r, n_);
      const uint64_t begin = theirs.begin * cut_.element;
      copy(taken(0) + at + begin, slot(r, epoch_) + begin, theirs.length * cut_.element);
    }
    return true;
  }

  // Publishes what was written, and waits until every rank's block has done the same.
  __device__ bool step(uint64_t i, bool may_compare = true) {
    const bool compares = may_compare && i == blockIdx.x && (blockIdx.x == 0 || c_.what.kind == kAllToAll);
    ++epoch_;
    if (compares) write_header();
    team_.publish(n_, epoch_, [&](int r) { return counter(r, me_); });
    const int r = static_cast<int>(threadIdx.x);
    if (r < n_ && r != me_) team_.await(counter(me_, r), epoch_, [&] { return missing(); });
    if (!team_.together()) return false;
    return !compares || compare();
  }

  // A bit for each rank that has not come as far.
  __device__ uint64_t missing() const {
    uint64_t bits = 0;
    for (int r = 0; r < n_; ++r)
      if (r != me_ && !Team::reached(counter(me_, r), epoch_)) bits |= uint64_t{1} << r;
    return bits;
  }

  __device__ Header* header(int r) const {
    return team_.place<Header>(r, team_.at.headers, blockIdx.x * 2 + (epoch_ & 1));
  }

  __device__ void write_header() {
    Header* const mine = header(me_);
    const int r = static_cast<int>(threadIdx.x);
    if (r == 0) mine->what = c_.what;
    if (c_.what.kind != kAllToAll) return;
    if (r < n_) {
      mine->sends[r] = c_.send_bytes[r];
      mine->expects[r] = c_.recv_bytes[r];
    }
    if (r == 0) {
      mine->longest = 0;
      for (int to = 0; to < n_; ++to)
        if (c_.send_bytes[to] > mine->longest) mine->longest = c_.send_bytes[to];
    }
  }

  // All ranks compare all calls, so all come to the same verdict.
  __device__ bool compare() {
    const int r = static_cast<int>(threadIdx.x);
    if (r < n_ && !same(header(r)->what, c_.what) && team_.claim()) {
      for (int k = 0; k < n_; ++k) team_.g.status->seen[k] = header(k)->what;
      team_.g.status->from = team_.g.status->to = -1;
      team_.report(kMismatch);
    }
    if (!team_.together()) return false;
    if (c_.what.kind != kAllToAll) return true;
    for (int k = 0; k < n_; ++k) total_ = total_ < header(k)->longest ? header(k)->longest : total_;
    for (int pair = static_cast<int>(threadIdx.x); pair < n_ * n_; pair += static_cast<int>(blockDim.x)) {
      const int src = pair / n_, dst = pair % n_;
      const uint64_t sent = header(src)->sends[dst], expected = header(dst)->expects[src];
      if (sent != expected) team_.fail_pair(src, dst, sent, expected, 0, 0);
    }
    // Its own barrier: no thread may be in the next step's waits while another looks whether to go on.
    return team_.together();
  }

  __device__ static bool same(const distlib_what& a, const distlib_what& b) {
    return a.sequence == b.sequence && a.kind == b.kind && a.dtype == b.dtype && a.op == b.op && a.root == b.root &&
           a.count == b.count;
  }

  __device__ uint64_t left(uint64_t bytes, uint64_t at) const { return at < bytes ? lower(cut_.part, bytes - at) : 0; }

  // Ranks begin with the next one, so that nobody is everybody's first.
  __device__ int from(int k) const { return (me_ + 1 + k) % n_; }

  __device__ uint64_t slot_offset(uint32_t epoch) const {
    return team_.at.slots + (uint64_t{blockIdx.x} * 2 + (epoch & 1)) * team_.g.slot_bytes;
  }
  __device__ char* slot(int r, uint32_t epoch) const { return team_.segment(r) + slot_offset(epoch); }
  // In the segment of rank `of`: how far this block of rank `by` has come.
  __device__ uint32_t* counter(int of, int by) const {
    const uint64_t place = uint64_t{blockIdx.x} * static_cast<uint64_t>(n_) + static_cast<uint64_t>(by);
    return &team_.place<Counter>(of, team_.at.epochs, place)->value;
  }
  __device__ const char* given(int r) const { return static_cast<const char*>(c_.send[r]); }
  __device__ char* taken(int r) const { return static_cast<char*>(c_.recv[r]); }

  Team& team_;
  const distlib_call& c_;
  const Cut cut_;
  const int me_, n_;
  uint64_t total_;
  uint32_t epoch_;
};

__global__ void __launch_bounds__(512) collective_kernel(DL_ARGUMENT distlib_group g, DL_ARGUMENT distlib_call c) {
  Team team(g, c.timeout_ns, c.what.sequence, false);
  if (team.enter()) Part(team, c).run();
}

// One lane's part in a message: pieces go through a ring in the sender's segment.
__global__ void __launch_bounds__(512) message_kernel(DL_ARGUMENT distlib_group g, DL_ARGUMENT distlib_message m) {
  Team team(g, m.timeout_ns, m.sequence, true);
  if (!team.enter()) return;
  const uint32_t lane = blockIdx.x;
  const int sender = m.sending ? g.rank : m.peer, receiver = m.sending ? m.peer : g.rank;
  const uint64_t pair = static_cast<uint64_t>(receiver) * DISTLIB_LANES + lane;  // in the sender's segment
  const auto counter = [&](int of, int with, Count which) {                      // in the segment of rank `of`
    const uint64_t place = (static_cast<uint64_t>(with) * DISTLIB_LANES + lane) * kCounts + which;
    return &team.place<Counter>(of, team.at.counters, place)->value;
  };
  uint32_t* const mine = counter(g.rank, m.peer, m.sending ? kProduced : kConsumed);
  uint32_t* const theirs = counter(g.rank, m.peer, m.sending ? kConsumedByPeer : kProducedByPeer);
  uint32_t* const told = counter(m.peer, g.rank, m.sending ? kProducedByPeer : kConsumedByPeer);
  const auto both = [&](int i) { return i == 0 ? mine : told; };
  uint32_t count = *mine;
  for (uint64_t i = lane; i == lane || i * g.ring_bytes < m.bytes; i += gridDim.x, ++count) {
    const uint64_t at = i * g.ring_bytes, bytes = at < m.bytes ? lower(g.ring_bytes, m.bytes - at) : 0;
    char* const ring =
        team.segment(sender) + team.at.rings + (pair * DISTLIB_DEPTH + count % DISTLIB_DEPTH) * g.ring_bytes;
    Envelope* const envelope = team.place<Envelope>(
        sender, team.at.envelopes, static_cast<uint64_t>(receiver) * DISTLIB_DEPTH + count % DISTLIB_DEPTH);
    if (threadIdx.x == 0)
      team.await(theirs, m.sending ? count + 1 - DISTLIB_DEPTH : count + 1, [&] { return uint64_t{1} << m.peer; });
    if (!team.together()) return;
    if (m.sending) {
      copy(ring, static_cast<const char*>(m.data) + at, bytes);
      if (i == 0 && threadIdx.x == 0) {
        envelope->bytes = m.bytes;
        envelope->tag = m.tag;
        envelope->sequence = m.sequence;
      }
      team.publish(2, count + 1, both);
      continue;
    }
    if (i == 0) {
      if (threadIdx.x == 0 && (envelope->bytes != m.bytes || envelope->tag != m.tag))
        team.fail_pair(sender, receiver, envelope->bytes, m.bytes, envelope->tag, m.tag);
      if (!team.together()) return;
    }
    copy(static_cast<char*>(m.data) + at, ring, bytes);
    team.publish(2, count + 1, both);
  }
}

__global__ void start_kernel(DL_ARGUMENT distlib_group g, uint32_t epoch) {
  const Layout at(g);
  char* const mine = static_cast<char*>(g.segment[g.rank]);
  for (int b = static_cast<int>(threadIdx.x); b < g.blocks * g.size; b += static_cast<int>(blockDim.x))
    reinterpret_cast<Counter*>(mine + at.epochs)[b].value = epoch;
  for (int k = static_cast<int>(threadIdx.x); k < g.size * DISTLIB_LANES * static_cast<int>(kCounts);
       k += static_cast<int>(blockDim.x))
    reinterpret_cast<Counter*>(mine + at.counters)[k].value = epoch;
}

bool valid(const distlib_group& g) {
  return g.size >= 1 && g.size <= DISTLIB_RANKS && g.rank >= 0 && g.rank < g.size && g.blocks >= 1 &&
         g.blocks <= DISTLIB_BLOCKS && g.threads >= 32 && g.threads <= 512 && g.threads % 32 == 0 &&
         g.slot_bytes % kLine == 0 && g.slot_bytes >= kLine * static_cast<uint64_t>(g.size) &&
         g.ring_bytes % kLine == 0 && g.ring_bytes >= kLine;
}

// Bytes that this rank will read from the others' segments, counted piece by piece as the kernel goes.
uint64_t reads(const distlib_group& g, const distlib_call& c) {
  const Cut cut(g, c);
  const uint64_t others = static_cast<uint64_t>(g.size) - 1;
  uint64_t bytes = 0;
  if (c.what.kind == kAllToAll) {
    for (int r = 0; r < g.size; ++r) bytes += r == g.rank ? 0 : c.recv_bytes[r];
    return bytes;
  }
  for (uint64_t i = 0; i < cut.pieces(); ++i) {
    const uint64_t length = cut.length(i), whole = length * cut.element;
    const bool is_root = g.rank == c.what.root;
    switch (c.what.kind) {
      case kAllReduce: {
        const uint64_t mine = c.sliced ? cut.slice(length, g.rank, g.size).length * cut.element : whole;
        bytes += others * mine + (whole - mine);
        break;
      }
      case kReduce:
      case kGather:
        bytes += is_root ? others * whole : 0;
        break;
      case kReduceScatter:
      case kAllGather:
        bytes += others * whole;
        break;
      case kBroadcast:
      case kScatter:
        bytes += is_root ? 0 : whole;
        break;
      default:
        break;
    }
  }
  return bytes;
}

}  // namespace
}  // namespace cuda
}  // namespace distlib

using namespace distlib::cuda;

DISTLIB_API int distlib_cuda_collective_structures(uint64_t* bytes) {
  const uint64_t sizes[] = {sizeof(distlib_what), sizeof(distlib_status), sizeof(distlib_group), sizeof(distlib_call),
                            sizeof(distlib_message)};
  for (const uint64_t size : sizes) *bytes++ = size;
  return 0;
}

DISTLIB_API int distlib_cuda_group_bytes(const distlib_group* group, uint64_t* bytes) {
  if (!valid(*group)) return cudaErrorInvalidValue;
  *bytes = Layout(*group).end;
  return 0;
}

DISTLIB_API int distlib_cuda_group_start_at(const distlib_group* group, int64_t device, int64_t epoch) {
  if (!valid(*group)) return cudaErrorInvalidValue;
  if (const int code = cudaSetDevice(static_cast<int>(device))) return code;
  // CUDA loads a kernel when it is first asked for, and may wait for the device to do so: not while kernels wait there.
  cudaFuncAttributes unused;
  if (const int code = cudaFuncGetAttributes(&unused, collective_kernel)) return code;
  if (const int code = cudaFuncGetAttributes(&unused, message_kernel)) return code;
  DL_LAUNCH(start_kernel, dim3(1), dim3(128), nullptr, *group, static_cast<uint32_t>(epoch));
  const int code = launched();
  return code ? code : static_cast<int>(cudaStreamSynchronize(nullptr));
}

DISTLIB_API int distlib_cuda_collective(const distlib_group* group, const distlib_call* call, void* stream,
                                        uint64_t* peer_bytes) {
  if (!valid(*group)) return cudaErrorInvalidValue;
  const dim3 grid(grid_of(*group, *call)), block(static_cast<unsigned>(group->threads));
  *peer_bytes = reads(*group, *call);
  DL_LAUNCH(collective_kernel, grid, block, as_stream(stream), *group, *call);
  return launched();
}

DISTLIB_API int distlib_cuda_message(const distlib_group* group, const distlib_message* message, void* stream) {
  if (!valid(*group) || message->peer < 0 || message->peer >= group->size || message->peer == group->rank)
    return cudaErrorInvalidValue;
  const uint64_t pieces = ceiling(message->bytes, group->ring_bytes);
  const dim3 grid(static_cast<unsigned>(lower(pieces == 0 ? 1 : pieces, DISTLIB_LANES)));
  DL_LAUNCH(message_kernel, grid, dim3(static_cast<unsigned>(group->threads)), as_stream(stream), *group, *message);
  return launched();
}
