// What all kernels are launched with and wait with: the same source for nvcc and, in tests, for a plain C++ compiler.
//
// With DISTLIB_CUDA_ON_CPU the header tests/cuda_on_cpu/cuda_on_cpu.hpp is included before anything else and stands for
// CUDA. Arithmetic must give the same bits on both: compile with -fmad=false, or -ffp-contract=off.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef DISTLIB_CUDA_ON_CPU
#include <cuda_runtime.h>
#endif

#define DISTLIB_API extern "C" __attribute__((visibility("default")))

// DL_LAUNCH(kernel, grid, block, stream, arguments...); a kernel with template arguments goes in parentheses. `stream`
// is a cudaStream_t. What went wrong is told by launched().
#ifdef DISTLIB_CUDA_ON_CPU
#define DL_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), cuda_on_cpu::launch_checked(grid, block, [&]() { kernel(__VA_ARGS__); }))
#else
#define DL_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace distlib {
namespace cuda {

// 0, or the error code of the launch before.
inline int launched() {
  return static_cast<int>(cudaGetLastError());
}

inline cudaStream_t as_stream(void* stream) {
  return static_cast<cudaStream_t>(stream);
}

// ---- Memory that other GPUs, other processes and the host see ----

// What was written before the matching store_release is seen by who read its value here.
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* from) {
#ifdef DISTLIB_CUDA_ON_CPU
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
#else
  uint32_t value;
  asm volatile("ld.acquire.sys.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
#endif
}

__device__ __forceinline__ uint64_t load_acquire(const uint64_t* from) {
#ifdef DISTLIB_CUDA_ON_CPU
  return __atomic_load_n(from, __ATOMIC_ACQUIRE);
#else
  unsigned long long value;
  asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
  return value;
#endif
}

__device__ __forceinline__ void store_release(uint32_t* to, uint32_t value) {
#ifdef DISTLIB_CUDA_ON_CPU
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.sys.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
#endif
}

__device__ __forceinline__ void store_release(uint64_t* to, uint64_t value) {
#ifdef DISTLIB_CUDA_ON_CPU
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.sys.u64 [%0], %1;" : : "l"(to), "l"(static_cast<unsigned long long>(value)) : "memory");
#endif
}

// To be called between two looks at what another thread, block, GPU or process will write.
__device__ __forceinline__ void spin_pause() {
#ifdef DISTLIB_CUDA_ON_CPU
  cuda_on_cpu::running->spin();
#else
  __nanosleep(100);
#endif
}

// Nanoseconds of a clock that all threads of the device share; its start is arbitrary.
__device__ __forceinline__ uint64_t now_ns() {
#ifdef DISTLIB_CUDA_ON_CPU
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
#else
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
#endif
}

}  // namespace cuda
}  // namespace distlib
