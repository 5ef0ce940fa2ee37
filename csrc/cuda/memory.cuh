// Global memory in words as wide as addresses permit, and tables whose rows are cut into chunks, one per block.
#pragma once

#include "launch.cuh"

namespace distlib {
namespace cuda {

constexpr int kThreads = 256;  // of a block, in kernels that walk a table, unless they say otherwise

template <int Bytes>
struct WordOf;
template <>
struct WordOf<1> {
  using type = uint8_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<16> {
  using type = uint4;
};

// An address of a table as a pointer. Said to be one of global memory, as loads and stores would otherwise have to find
// out whether it is one of shared memory; the number stays the same.
template <class T>
__device__ __forceinline__ T* global(uint64_t address) {
#ifdef DISTLIB_CUDA_ON_CPU
  return reinterpret_cast<T*>(address);
#else
  return static_cast<T*>(__cvta_global_to_generic(address));
#endif
}

__device__ __forceinline__ bool is_aligned(const void* at, unsigned bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

// N neighbouring elements in registers.
template <class Raw, int N>
struct alignas(sizeof(Raw) * N < 16 ? sizeof(Raw) * N : 16) Several {
  Raw at[N];
};

// A word of global memory in one instruction. By its name: the compiler takes some copies of four numbers apart.
template <class Word>
__device__ __forceinline__ Word load_word(const Word* from) {
  return *from;
}

template <class Word>
__device__ __forceinline__ void store_word(Word* to, const Word& word) {
  *to = word;
}

#ifndef DISTLIB_CUDA_ON_CPU
__device__ __forceinline__ uint2 load_word(const uint2* from) {
  uint2 word;
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];"
               : "=r"(word.x), "=r"(word.y)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

__device__ __forceinline__ uint4 load_word(const uint4* from) {
  uint4 word;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return word;
}

__device__ __forceinline__ void store_word(uint2* to, const uint2& word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
               : "memory");
}

__device__ __forceinline__ void store_word(uint4* to, const uint4& word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
#endif

// Loads by words of `Width` bytes, to which `from` must be aligned. All of global memory.
template <int Width, class Raw, int N>
__device__ __forceinline__ Several<Raw, N> load_several(const Raw* from) {
  using Word = typename WordOf<Width>::type;
  static_assert(sizeof(Raw) * N % Width == 0, "whole words");
  Several<Raw, N> result;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Raw) * N / Width); ++i)
    reinterpret_cast<Word*>(&result)[i] = load_word(reinterpret_cast<const Word*>(from) + i);
  return result;
}

template <int Width, class Raw, int N>
__device__ __forceinline__ void store_several(Raw* to, const Several<Raw, N>& values) {
  using Word = typename WordOf<Width>::type;
  static_assert(sizeof(Raw) * N % Width == 0, "whole words");
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Raw) * N / Width); ++i)
    store_word(reinterpret_cast<Word*>(to) + i, reinterpret_cast<const Word*>(&values)[i]);
}

// How many of `count` elements lie before the first that is aligned to `bytes`.
template <class Raw>
__device__ __forceinline__ uint64_t head_of(const Raw* at, unsigned bytes, uint64_t count) {
  const uint64_t head = (bytes - reinterpret_cast<uintptr_t>(at) % bytes) % bytes / sizeof(Raw);
  return head < count ? head : count;
}

// The part of a row that this block works on. Rows have `count` elements and know their first chunk; chunk_rows tells
// the row of each chunk.
struct Chunk {
  uint64_t begin, count;
};

template <class Row>
__device__ __forceinline__ Chunk chunk_of(const Row& row, uint64_t chunk) {
  const uint64_t begin = (blockIdx.x - row.first_chunk) * chunk, left = row.count - begin;
  return {begin, left < chunk ? left : chunk};
}

// The sum over a block of so many threads, in an order that is always the same; the result is thread 0's.
template <int Threads>
__device__ __forceinline__ double block_sum(double value) {
  __shared__ double warps[Threads / 32];
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0)
    for (const double warp : warps) sum += warp;
  return sum;
}

// Whether this is the last block of the grid to get here; it sees what the others wrote before. The counter is 0 before
// the launch, and again after it.
__device__ __forceinline__ bool is_last_block(unsigned* counter) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // one thread's, behind the barrier, is for all of the block: a fence waits for what was stored
    last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace cuda
}  // namespace distlib
