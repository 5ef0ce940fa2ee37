// A run of elements moved or changed on the way, by one block of threads, whatever the alignment of both ends.
#pragma once

#include "launch.cuh"
#include "memory.cuh"

namespace distlib {
namespace cuda {

// What happens to an element: nothing.
template <class Raw>
struct Move {
  using From = Raw;
  using To = Raw;
  __device__ __forceinline__ To operator()(From raw) { return raw; }
};

// Loads of `Width` bytes, to which from + head must be aligned; stores of 16, to which to + head must be. A thread has
// 64 bytes of loads under way, before it stores anything.
template <int Width, class Each>
__device__ __forceinline__ void convert_from(Each& each, const typename Each::From* from, typename Each::To* to,
                                             uint64_t count, uint64_t head) {
  using From = typename Each::From;
  using To = typename Each::To;
  constexpr int kGroup = 16 / (sizeof(From) < sizeof(To) ? sizeof(From) : sizeof(To));
  constexpr int kAtOnce = 64 / (kGroup * static_cast<int>(sizeof(From)));
  if (threadIdx.x < head) to[threadIdx.x] = each(from[threadIdx.x]);
  from += head;
  to += head;
  const uint64_t groups = (count - head) / kGroup;
  const auto finish = [&](const Several<From, kGroup>& values, uint64_t group) {
    Several<To, kGroup> results;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) results.at[i] = each(values.at[i]);
    store_several<16>(to + group * kGroup, results);
  };
  uint64_t group = threadIdx.x;
  for (; group + (kAtOnce - 1) * kThreads < groups; group += kAtOnce * kThreads) {
    Several<From, kGroup> values[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      values[k] = load_several<Width, From, kGroup>(from + (group + k * kThreads) * kGroup);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) finish(values[k], group + k * kThreads);
  }
  for (; group < groups; group += kThreads) finish(load_several<Width, From, kGroup>(from + group * kGroup), group);
  const uint64_t done = groups * kGroup;
  if (threadIdx.x < count - head - done) to[done + threadIdx.x] = each(from[done + threadIdx.x]);
}

// to[i] = each(from[i]), i < count, by all kThreads threads of the block.
template <class Each>
__device__ __forceinline__ void convert(Each& each, const typename Each::From* from, typename Each::To* to,
                                        uint64_t count) {
  constexpr unsigned kSize = sizeof(typename Each::From);
  const uint64_t head = head_of(to, 16, count);
  if (is_aligned(from + head, 16)) {
    convert_from<16>(each, from, to, count, head);
  } else if (kSize < 4 && is_aligned(from + head, 4)) {
    convert_from<4>(each, from, to, count, head);
  } else {
    convert_from<kSize>(each, from, to, count, head);
  }
}

}  // namespace cuda
}  // namespace distlib
