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

// N neighbouring elements that begin `skip` bytes behind `from`, which is aligned to their bytes: cut out of two words,
// of which a neighbouring thread loads one too. Loads of single elements would ask the cache for a line several times.
template <class Raw, int N>
__device__ __forceinline__ Several<Raw, N> load_shifted(const char* from, unsigned skip) {
  constexpr int kBytes = sizeof(Raw) * N, kWords = kBytes / 4;
  static_assert(kBytes == 8 || kBytes == 16, "words of 8 or 16 bytes");
  auto words = load_several<kBytes, uint32_t, 2 * kWords>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
  for (int step = kWords / 2; step > 0; step /= 2) {
    const bool moves = (skip / 4 & step) != 0;
#pragma unroll
    for (int i = 0; i + step < 2 * kWords; ++i) words.at[i] = moves ? words.at[i + step] : words.at[i];
  }
  Several<uint32_t, kWords> cut;
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    cut.at[i] = static_cast<uint32_t>((uint64_t{words.at[i + 1]} << 32 | words.at[i]) >> (skip % 4 * 8));
  Several<Raw, N> result;
  memcpy(&result, &cut, sizeof result);
  return result;
}

constexpr unsigned kLineBytes = 128;  // of the cache: stores begin with a whole one

// Elements that a thread takes at once: 16 bytes of the wider type. So neighbouring threads have neighbouring memory on
// both sides, and what a warp reads or writes at once has no gaps.
template <class Each>
constexpr int kGroupOf = 16 / (sizeof(typename Each::From) > sizeof(typename Each::To) ? sizeof(typename Each::From)
                                                                                       : sizeof(typename Each::To));

// Groups of which those of `to` are aligned from element `head` on. Shifted: those of `from` are not. A thread has 64
// bytes of loads under way before it stores anything.
template <bool Shifted, class Each>
__device__ __forceinline__ void convert_groups(Each& each, const typename Each::From* from, typename Each::To* to,
                                               uint64_t count, uint64_t head) {
  using From = typename Each::From;
  using To = typename Each::To;
  constexpr int kGroup = kGroupOf<Each>, kBytes = sizeof(From) * kGroup;
  constexpr int kAtOnce = (Shifted ? 32 : 64) / kBytes;  // shifted loads are twice as many bytes
  unsigned skip = 0;
  uint64_t groups = (count - head) / kGroup;
  if constexpr (Shifted) {  // of the words of a group, none may begin before the run, nor end behind it
    skip = reinterpret_cast<uintptr_t>(from + head) % kBytes;
    const uint64_t before = skip / sizeof(From);  // elements of a group's first word that are not its own
    if (head < before) head += kGroup;
    if (head > count) head = count;
    groups = (count - head + before) / kGroup;
    if (groups > 0) --groups;
  }
  if (threadIdx.x < head) to[threadIdx.x] = each(from[threadIdx.x]);
  const char* const words = reinterpret_cast<const char*>(from + head) - skip;
  to += head;
  const auto load = [&](uint64_t group) {
    if constexpr (Shifted) {
      return load_shifted<From, kGroup>(words + group * kBytes, skip);
    } else {
      return load_several<kBytes, From, kGroup>(from + head + group * kGroup);
    }
  };
  const auto finish = [&](const Several<From, kGroup>& values, uint64_t group) {
    Several<To, kGroup> results;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) results.at[i] = each(values.at[i]);
    store_several<sizeof(To) * kGroup>(to + group * kGroup, results);
  };
  uint64_t group = threadIdx.x;
  for (; group + (kAtOnce - 1) * kThreads < groups; group += kAtOnce * kThreads) {
    Several<From, kGroup> values[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) values[k] = load(group + k * kThreads);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) finish(values[k], group + k * kThreads);
  }
  for (; group < groups; group += kThreads) finish(load(group), group);
  const uint64_t done = groups * kGroup;
  if (threadIdx.x < count - head - done) to[done + threadIdx.x] = each(from[head + done + threadIdx.x]);
}

// to[i] = each(from[i]), i < count, by all kThreads threads of the block.
template <class Each>
__device__ __forceinline__ void convert(Each& each, const typename Each::From* from, typename Each::To* to,
                                        uint64_t count) {
  const uint64_t head = head_of(to, kLineBytes, count);
  if (is_aligned(from + head, sizeof(*from) * kGroupOf<Each>)) {
    convert_groups<false>(each, from, to, count, head);
  } else {
    convert_groups<true>(each, from, to, count, head);
  }
}

}  // namespace cuda
}  // namespace distlib
