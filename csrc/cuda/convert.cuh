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

// N neighbouring elements that begin `skip` bytes behind the first of two neighbouring words, to whose bytes `words` is
// aligned.
template <class Raw, int N>
__device__ __forceinline__ Several<Raw, N> cut_out(Several<uint32_t, sizeof(Raw) * N / 2> words, unsigned skip) {
  constexpr int kBytes = sizeof(Raw) * N, kWords = kBytes / 4;
  static_assert(kBytes == 8 || kBytes == 16, "words of 8 or 16 bytes");
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

// The word at `from`, and the one behind it.
template <int Bytes>
__device__ __forceinline__ Several<uint32_t, Bytes / 2> load_two(const char* from) {
  return load_several<Bytes, uint32_t, Bytes / 2>(reinterpret_cast<const uint32_t*>(from));
}

// Count words and the ones behind them, each `stride` bytes after the one before. All lanes of a warp call, with
// neighbouring words: each takes the second from its neighbour. Loaded twice, the L2 cache would be asked twice for
// most of them: of a stream, little stays in the L1 cache.
template <int Bytes, int Count>
__device__ __forceinline__ void load_two_each(Several<uint32_t, Bytes / 2> (&both)[Count], const char* from,
                                              uint64_t stride) {
  constexpr int kWords = Bytes / 4;
  using Word = Several<uint32_t, kWords>;
  const bool is_last = threadIdx.x % 32 == 31;
  Word own[Count], behind[Count];
#pragma unroll
  for (int k = 0; k < Count; ++k)
    own[k] = load_several<Bytes, uint32_t, kWords>(reinterpret_cast<const uint32_t*>(from + k * stride));
  if (is_last) {
#pragma unroll
    for (int k = 0; k < Count; ++k)
      behind[k] = load_several<Bytes, uint32_t, kWords>(reinterpret_cast<const uint32_t*>(from + k * stride + Bytes));
  }
#pragma unroll
  for (int k = 0; k < Count; ++k) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t neighbours = __shfl_down_sync(0xffffffffu, own[k].at[i], 1);
      both[k].at[i] = own[k].at[i];
      both[k].at[kWords + i] = is_last ? behind[k].at[i] : neighbours;
    }
  }
}

constexpr unsigned kLineBytes = 128;  // of the cache: stores begin with a whole one

// Elements that a thread takes at once: 16 bytes of the wider type. So neighbouring threads have neighbouring memory on
// both sides, and what a warp reads or writes at once has no gaps.
template <class Each>
constexpr int kGroupOf = 16 / (sizeof(typename Each::From) > sizeof(typename Each::To) ? sizeof(typename Each::From)
                                                                                       : sizeof(typename Each::To));

// Groups of which those of `to` are aligned from element `head` on. Shifted: those of `from` are not. A thread has 64
// bytes of loads under way before it stores anything.
template <int Threads, bool Shifted, class Each>
__device__ __forceinline__ void convert_groups(Each& each, const typename Each::From* from, typename Each::To* to,
                                               uint64_t count, uint64_t head) {
  using From = typename Each::From;
  using To = typename Each::To;
  constexpr int kGroup = kGroupOf<Each>, kBytes = sizeof(From) * kGroup;
  constexpr int kAtOnce = 64 / kBytes;
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
      return cut_out<From, kGroup>(load_two<kBytes>(words + group * kBytes), skip);
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
  for (; (group | 31) + (kAtOnce - 1) * Threads < groups; group += kAtOnce * Threads) {  // the same for a whole warp
    if constexpr (Shifted) {
      Several<uint32_t, kBytes / 2> both[kAtOnce];
      load_two_each<kBytes>(both, words + group * kBytes, Threads * kBytes);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) finish(cut_out<From, kGroup>(both[k], skip), group + k * Threads);
    } else {
      Several<From, kGroup> values[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) values[k] = load(group + k * Threads);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) finish(values[k], group + k * Threads);
    }
  }
  // The rest: some together, too, for a warp that took one after the other would hold up its block.
  constexpr int kFew = kAtOnce / 2;
  for (; group < groups; group += kFew * Threads) {
    Several<From, kGroup> values[kFew];
#pragma unroll
    for (int k = 0; k < kFew; ++k)
      if (group + k * Threads < groups) values[k] = load(group + k * Threads);
#pragma unroll
    for (int k = 0; k < kFew; ++k)
      if (group + k * Threads < groups) finish(values[k], group + k * Threads);
  }
  const uint64_t done = groups * kGroup;
  if (threadIdx.x < count - head - done) to[done + threadIdx.x] = each(from[head + done + threadIdx.x]);
}

// to[i] = each(from[i]), i < count, by all `Threads` threads of the block.
template <int Threads = kThreads, class Each>
__device__ __forceinline__ void convert(Each& each, const typename Each::From* from, typename Each::To* to,
                                        uint64_t count) {
  const uint64_t head = head_of(to, kLineBytes, count);
  if (is_aligned(from + head, sizeof(*from) * kGroupOf<Each>)) {
    convert_groups<Threads, false>(each, from, to, count, head);
  } else {
    convert_groups<Threads, true>(each, from, to, count, head);
  }
}

}  // namespace cuda
}  // namespace distlib
