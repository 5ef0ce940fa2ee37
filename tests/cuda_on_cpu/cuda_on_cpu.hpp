// Makes a plain C++ compiler accept csrc/cuda: CUDA's words, atomics, and the few functions of its runtime that are
// used.
//
//   g++ -x c++ -std=c++17 -ffp-contract=off -DDISTLIB_CUDA_ON_CPU -include cuda_on_cpu.hpp -shared -fPIC csrc/cuda/*.cu
//
// Launches run at once, so streams are always idle. "Device" memory is a memfd mapped by its owner; other processes of
// the user open it through /proc/PID/fd. Atomics and fences are real ones, also between processes.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>

#include "fibers.hpp"

// ---- Words ----

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __constant__ static const
#define __shared__ static thread_local  // blocks of one CPU thread run one after the other
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// ---- Numbers ----

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int __popc(unsigned bits) {
  return __builtin_popcount(bits);
}

inline int __popcll(unsigned long long bits) {
  return __builtin_popcountll(bits);
}

inline int __ffs(int bits) {
  return __builtin_ffs(bits);
}

inline int __clz(int bits) {
  return bits == 0 ? 32 : __builtin_clz(static_cast<unsigned>(bits));
}

template <class T>
T __ldg(const T* from) {
  return *from;
}

// ---- Atomics and fences ----

namespace cuda_on_cpu {

// to = change(to), as one step. Returns what was there. For types that the CPU has no instruction for.
template <class T, class Bits, class Change>
T exchange_with(T* to, Change change) {
  static_assert(sizeof(T) == sizeof(Bits), "compared as bits");
  Bits* const at = reinterpret_cast<Bits*>(to);
  Bits seen = __atomic_load_n(at, __ATOMIC_RELAXED);
  for (;;) {
    T before;
    std::memcpy(&before, &seen, sizeof before);
    const T after = change(before);
    Bits wanted;
    std::memcpy(&wanted, &after, sizeof wanted);
    if (__atomic_compare_exchange_n(at, &seen, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) return before;
  }
}

}  // namespace cuda_on_cpu

inline int atomicAdd(int* to, int value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}

inline unsigned atomicAdd(unsigned* to, unsigned value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}

inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}

inline float atomicAdd(float* to, float value) {
  return cuda_on_cpu::exchange_with<float, uint32_t>(to, [=](float before) { return before + value; });
}

inline double atomicAdd(double* to, double value) {
  return cuda_on_cpu::exchange_with<double, uint64_t>(to, [=](double before) { return before + value; });
}

template <class T>
T atomicMax(T* to, T value) {
  return cuda_on_cpu::exchange_with<T, T>(to, [=](T before) { return before < value ? value : before; });
}

template <class T>
T atomicMin(T* to, T value) {
  return cuda_on_cpu::exchange_with<T, T>(to, [=](T before) { return value < before ? value : before; });
}

template <class T>
T atomicOr(T* to, T value) {
  return __atomic_fetch_or(to, value, __ATOMIC_SEQ_CST);
}

template <class T>
T atomicAnd(T* to, T value) {
  return __atomic_fetch_and(to, value, __ATOMIC_SEQ_CST);
}

template <class T>
T atomicExch(T* to, T value) {
  return __atomic_exchange_n(to, value, __ATOMIC_SEQ_CST);
}

template <class T>
T atomicCAS(T* to, T expected, T wanted) {
  __atomic_compare_exchange_n(to, &expected, wanted, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

inline void __threadfence_block() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

inline void __threadfence_system() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// ---- The runtime: errors ----

enum cudaError_t {  // numbered as CUDA's
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorDeviceUninitialized = 201,
  cudaErrorMapBufferObjectFailed = 205,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorNotReady = 600,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999,
};

typedef struct EmulatedStream* cudaStream_t;

namespace cuda_on_cpu {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t result(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() {
  const cudaError_t error = cuda_on_cpu::last_error;
  cuda_on_cpu::last_error = cudaSuccess;
  return error;
}

inline cudaError_t cudaPeekAtLastError() {
  return cuda_on_cpu::last_error;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorDeviceUninitialized:
      return "invalid device context";
    case cudaErrorMapBufferObjectFailed:
      return "mapping of buffer object failed";
    case cudaErrorInvalidResourceHandle:
      return "invalid resource handle";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unknown error";
  }
}

// ---- The runtime: launches and streams ----

namespace cuda_on_cpu {

template <class Kernel>
void launch_checked(dim3 grid, dim3 block, Kernel kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535) {
    last_error = cudaErrorInvalidConfiguration;  // as CUDA does, it is found by who asks for the last error
    return;
  }
  launch(grid, block, kernel);
}

}  // namespace cuda_on_cpu

struct cudaFuncAttributes {};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}

inline cudaError_t cudaStreamQuery(cudaStream_t) {
  return cudaSuccess;
}

inline cudaError_t cudaDeviceSynchronize() {
  return cudaSuccess;
}

enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  if (bytes != 0) std::memmove(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  return cudaMemcpyAsync(to, from, bytes, kind);
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
  if (bytes != 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return cudaMemsetAsync(to, value, bytes);
}

// ---- The runtime: devices ----

enum cudaDeviceAttr {
  cudaDevAttrClockRate = 13,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrCanMapHostMemory = 19,
};

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  return cuda_on_cpu::result(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cuda_on_cpu::result(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 2;
      return cudaSuccess;
    case cudaDevAttrCanMapHostMemory:
      *value = 1;
      return cudaSuccess;
    case cudaDevAttrClockRate:
      *value = 1000000;
      return cudaSuccess;
  }
  return cuda_on_cpu::result(cudaErrorInvalidValue);
}

inline cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) {
  *can = 0;
  return cuda_on_cpu::result(device == 0 && peer == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

// ---- The runtime: memory ----

struct cudaIpcMemHandle_t {
  char reserved[64];
};

constexpr unsigned cudaHostAllocDefault = 0, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2;
constexpr unsigned cudaIpcMemLazyEnablePeerAccess = 1;

namespace cuda_on_cpu {

struct Handle {
  int32_t pid, fd;
  uint64_t bytes, device, inode;  // of the file: a number that another file has by now must not be opened
};
static_assert(sizeof(Handle) <= sizeof(cudaIpcMemHandle_t), "what CUDA's handle has room for");

struct Allocation {
  size_t bytes;
  int fd;  // -1: opened from another process, or the host's
};

struct Memory {
  std::mutex mutex;
  std::map<char*, Allocation> allocations, opened, host;
};

inline Memory& memory() {
  static Memory* const kept = new Memory();  // outlives whoever frees at exit
  return *kept;
}

inline size_t pages(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

inline cudaError_t unmap(std::map<char*, Allocation>& of, void* at) {
  const std::lock_guard<std::mutex> lock(memory().mutex);
  const auto found = of.find(static_cast<char*>(at));
  if (found == of.end()) return result(cudaErrorInvalidValue);
  munmap(at, found->second.bytes);
  if (found->second.fd >= 0) close(found->second.fd);
  of.erase(found);
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaMalloc(void** out, size_t bytes) {
  using namespace cuda_on_cpu;
  *out = nullptr;
  if (bytes == 0) return cudaSuccess;
  const size_t size = pages(bytes);
  const int fd = memfd_create("emulated device memory", MFD_CLOEXEC);
  if (fd < 0) return result(cudaErrorMemoryAllocation);
  void* const at = ftruncate(fd, static_cast<off_t>(size)) == 0
                       ? mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
                       : MAP_FAILED;
  if (at == MAP_FAILED) {
    close(fd);
    return result(cudaErrorMemoryAllocation);
  }
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().allocations[static_cast<char*>(at)] = {size, fd};
  *out = at;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaMalloc(T** out, size_t bytes) {
  return cudaMalloc(reinterpret_cast<void**>(out), bytes);
}

inline cudaError_t cudaFree(void* at) {
  return at == nullptr ? cudaSuccess : cuda_on_cpu::unmap(cuda_on_cpu::memory().allocations, at);
}

inline cudaError_t cudaHostAlloc(void** out, size_t bytes, unsigned /*flags*/) {
  using namespace cuda_on_cpu;
  const size_t size = pages(bytes == 0 ? 1 : bytes);
  void* const at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return result(cudaErrorMemoryAllocation);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().host[static_cast<char*>(at)] = {size, -1};
  *out = at;
  return cudaSuccess;
}

template <class T>
cudaError_t cudaHostAlloc(T** out, size_t bytes, unsigned flags) {
  return cudaHostAlloc(reinterpret_cast<void**>(out), bytes, flags);
}

template <class T>
cudaError_t cudaMallocHost(T** out, size_t bytes) {
  return cudaHostAlloc(reinterpret_cast<void**>(out), bytes, cudaHostAllocDefault);
}

inline cudaError_t cudaFreeHost(void* at) {
  return at == nullptr ? cudaSuccess : cuda_on_cpu::unmap(cuda_on_cpu::memory().host, at);
}

template <class T>
cudaError_t cudaHostGetDevicePointer(T** out, void* at, unsigned /*flags*/) {
  *out = static_cast<T*>(at);
  return cudaSuccess;
}

// The handle stands for the whole allocation that `at` points into, as CUDA's does.
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* out, void* at) {
  using namespace cuda_on_cpu;
  const std::lock_guard<std::mutex> lock(memory().mutex);
  auto after = memory().allocations.upper_bound(static_cast<char*>(at));
  if (after == memory().allocations.begin()) return result(cudaErrorInvalidValue);
  const auto& [begin, allocation] = *--after;
  struct stat about;
  if (static_cast<char*>(at) >= begin + allocation.bytes || fstat(allocation.fd, &about) != 0)
    return result(cudaErrorInvalidValue);
  const Handle handle = {static_cast<int32_t>(getpid()), allocation.fd, allocation.bytes, about.st_dev, about.st_ino};
  *out = {};
  std::memcpy(out->reserved, &handle, sizeof handle);
  return cudaSuccess;
}

inline cudaError_t cudaIpcOpenMemHandle(void** out, cudaIpcMemHandle_t given, unsigned /*flags*/) {
  using namespace cuda_on_cpu;
  Handle handle;
  std::memcpy(&handle, given.reserved, sizeof handle);
  if (handle.pid == getpid()) return result(cudaErrorDeviceUninitialized);  // CUDA refuses the owner's own, too
  char path[64];
  std::snprintf(path, sizeof path, "/proc/%d/fd/%d", handle.pid, handle.fd);
  const int fd = open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return result(cudaErrorInvalidResourceHandle);
  struct stat about;
  void* at = MAP_FAILED;
  if (fstat(fd, &about) == 0 && about.st_dev == handle.device && about.st_ino == handle.inode)
    at = mmap(nullptr, handle.bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (at == MAP_FAILED) return result(cudaErrorMapBufferObjectFailed);
  const std::lock_guard<std::mutex> lock(memory().mutex);
  memory().opened[static_cast<char*>(at)] = {handle.bytes, -1};
  *out = at;
  return cudaSuccess;
}

inline cudaError_t cudaIpcCloseMemHandle(void* at) {
  return cuda_on_cpu::unmap(cuda_on_cpu::memory().opened, at);
}
