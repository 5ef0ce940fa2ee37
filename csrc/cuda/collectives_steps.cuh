// Where things lie in a segment, and how a block of threads steps: publish, wait for the others, or give up.
#pragma once

#include "collectives.h"
#include "launch.cuh"

// Arguments of kernels are read where they are, not copied first. Functions that are called in many places are there
// once.
#ifdef DISTLIB_CUDA_ON_CPU
#define DL_ARGUMENT const
#define DL_ONCE __attribute__((noinline))
#else
#define DL_ARGUMENT const __grid_constant__
#define DL_ONCE __noinline__
#endif

namespace distlib {
namespace cuda {

enum : uint32_t { kTimeout = 1, kMismatch = 3, kAborted = 4 };  // as the core numbers them

constexpr uint64_t kLine = 128;  // bytes that only one writes

// What a block tells the others with the first step of a collective.
struct alignas(kLine) Header {
  distlib_what what;
  uint64_t sends[DISTLIB_RANKS], expects[DISTLIB_RANKS];  // all_to_all: bytes by rank
  uint64_t longest;                                       // of what it sends
};

struct alignas(kLine) Envelope {  // of the first piece of a message
  uint64_t bytes, sequence;
  int64_t tag;
};

struct alignas(kLine) Counter {
  uint32_t value;
};

// A segment:
//
//   failed | epochs[block][rank] | headers[block][2] | counters[rank][lane][4] | envelopes[rank][depth] |
//   slots[block][2] | rings[rank][lane][depth]
//
// Counters are pushed, data is pulled: who waits looks into its own memory. epochs: how far each rank's block has come,
// written by that rank. counters: see Count.
enum Count : uint64_t {  // of the pieces of messages between this rank and another
  kProduced,             // by this rank: its own record
  kConsumed,             // by this rank, of the other's
  kProducedByPeer,       // as the other wrote here
  kConsumedByPeer,
  kCounts
};

struct Layout {
  uint64_t epochs, headers, counters, envelopes, slots, rings, end;

  __host__ __device__ explicit Layout(const distlib_group& g) {
    const uint64_t ranks = static_cast<uint64_t>(g.size), blocks = static_cast<uint64_t>(g.blocks);
    epochs = kLine;
    headers = epochs + blocks * ranks * sizeof(Counter);
    counters = headers + blocks * 2 * sizeof(Header);
    envelopes = counters + ranks * DISTLIB_LANES * kCounts * sizeof(Counter);
    slots = envelopes + ranks * DISTLIB_DEPTH * sizeof(Envelope);
    rings = slots + blocks * 2 * g.slot_bytes;
    end = rings + ranks * DISTLIB_LANES * DISTLIB_DEPTH * g.ring_bytes;
  }
};

// A block of threads that takes part in a collective or a message. All its threads make the same calls.
class Team {
 public:
  const distlib_group& g;
  const Layout at;
  const uint64_t timeout_ns;

  __device__ Team(const distlib_group& group, uint64_t timeout, uint64_t sequence, bool is_message)
      : g(group), at(group), timeout_ns(timeout), sequence_(sequence), is_message_(is_message) {}

  // Whether there is anything to do: not after a failure, nor an abort.
  __device__ bool enter() {
    __syncthreads();  // what the block shared before is read by all
    if (threadIdx.x == 0) {
      stopped() = load_acquire(failed());
      if (!stopped() && load_acquire(&g.status->abort)) fail(kAborted, 0);
    }
    __syncthreads();
    return !stopped();
  }

  __device__ char* segment(int rank) const { return static_cast<char*>(g.segment[rank]); }

  template <class T>
  __device__ T* place(int rank, uint64_t offset, uint64_t index) const {
    return reinterpret_cast<T*>(segment(rank) + offset) + index;
  }

  // Publishes `value` in `counters` places, at(0), at(1), ...: all that the block wrote before, and that it has read.
  template <class At>
  __device__ void publish(int counters, uint32_t value, At at) {
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i < counters)
      store_release(at(i), value);  // a release of what the barrier has gathered, too: no fence beside it
  }

  // One thread's wait until a counter that another rank writes has come as far as `value`. If it is late, missing()
  // tells a bit for each rank that is.
  template <class Missing>
  __device__ void await(const uint32_t* counter, uint32_t value, Missing missing) {
    if (reached(counter, value)) return;
    const uint64_t begin = now_ns();
    for (uint32_t looks = 1; !reached(counter, value); ++looks) {
      if (looks > kHot) spin_pause();
      if (looks % kHot) continue;
      // Over the bus to the host: not with every look.
      if (load_acquire(failed())) {
        stopped() = 1;
        return;
      }
      if (load_acquire(&g.status->abort)) return fail(kAborted, 0);
      if (now_ns() - begin > timeout_ns) return fail(kTimeout, missing());
    }
  }

  __device__ static bool reached(const uint32_t* counter, uint32_t value) {
    return static_cast<int32_t>(load_acquire(counter) - value) >= 0;  // counters wrap around
  }

  // Whether all may go on; every thread asks after its waits.
  __device__ bool together() {
    __syncthreads();
    return !stopped();
  }

  // Ends the rank's part in the group. The first to fail writes why, for the host. One thread calls.
  __device__ void fail(uint32_t code, uint64_t missing) {
    if (claim()) {
      g.status->missing = missing;
      g.status->from = g.status->to = -1;
      report(code);
    }
  }

  // The same for two ranks that differ about what one sends the other.
  __device__ void fail_pair(int from, int to, uint64_t sent, uint64_t expected, int64_t sent_tag,
                            int64_t expected_tag) {
    if (claim()) {
      g.status->from = from;
      g.status->to = to;
      g.status->sent = sent;
      g.status->expected = expected;
      g.status->sent_tag = sent_tag;
      g.status->expected_tag = expected_tag;
      report(kMismatch);
    }
  }

  // Who fails first may write the status, then calls report().
  __device__ bool claim() {
    stopped() = 1;
    return atomicCAS(failed(), 0u, 1u) == 0u;
  }

  __device__ void report(uint32_t code) {
    g.status->sequence = sequence_;
    g.status->is_message = is_message_;
    store_release(&g.status->code, code);
  }

 private:
  static constexpr uint32_t kHot = 64;  // looks without a pause, and between looks at the clock

  __device__ uint32_t* failed() const { return place<uint32_t>(g.rank, 0, 0); }
  __device__ static uint32_t& stopped() {
    __shared__ uint32_t value;
    return value;
  }

  const uint64_t sequence_;
  const bool is_message_;
};

// ---- Bytes ----

// Copies by all threads of the block, 16 bytes at a time where both sides allow it.
__device__ DL_ONCE inline void copy(void* to, const void* from, uint64_t bytes) {
  const uint64_t both = reinterpret_cast<uint64_t>(to) | reinterpret_cast<uint64_t>(from);
  const uint64_t step = blockDim.x;
  uint64_t done = 0;
  if (both % 16 == 0) {
    uint4* const t = static_cast<uint4*>(to);
    const uint4* const f = static_cast<const uint4*>(from);
    const uint64_t vectors = bytes / 16;
    uint64_t i = threadIdx.x;
    for (; i + 3 * step < vectors; i += 4 * step) {  // four loads under way: another device is far
      const uint4 a = f[i], b = f[i + step], c = f[i + 2 * step], d = f[i + 3 * step];
      t[i] = a;
      t[i + step] = b;
      t[i + 2 * step] = c;
      t[i + 3 * step] = d;
    }
    for (; i < vectors; i += step) t[i] = f[i];
    done = vectors * 16;
  } else if (both % 4 == 0) {
    for (uint64_t i = threadIdx.x; i < bytes / 4; i += step)
      static_cast<uint32_t*>(to)[i] = static_cast<const uint32_t*>(from)[i];
    done = bytes / 4 * 4;
  }
  for (uint64_t i = done + threadIdx.x; i < bytes; i += step)
    static_cast<char*>(to)[i] = static_cast<const char*>(from)[i];
}

}  // namespace cuda
}  // namespace distlib
