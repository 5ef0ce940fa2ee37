// The few functions of CUDA's driver that segments use (csrc/cuda/segment.cu), on memfds: memory is a descriptor here,
// which other processes get over a socket, as they do with a driver.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "cuda_on_cpu.hpp"

#define CUDART_VERSION 13000

using CUresult = int;
using CUdeviceptr = unsigned long long;
using CUmemGenericAllocationHandle = unsigned long long;  // a descriptor of this process, plus 1

enum CUmemAllocationType { CU_MEM_ALLOCATION_TYPE_PINNED = 1 };
enum CUmemAllocationHandleType { CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1 };
enum CUmemLocationType { CU_MEM_LOCATION_TYPE_DEVICE = 1 };
enum CUmemAllocationGranularity_flags { CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0 };
enum CUmemAccess_flags { CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3 };

struct CUmemLocation {
  CUmemLocationType type;
  int id;
};
struct CUmemAllocationProp {
  CUmemAllocationType type;
  CUmemAllocationHandleType requestedHandleTypes;
  CUmemLocation location;
};
struct CUmemAccessDesc {
  CUmemLocation location;
  CUmemAccess_flags flags;
};

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;

namespace driver_on_cpu {

constexpr int kInvalid = 1, kOutOfMemory = 2;

inline CUresult granularity(size_t* unit, const CUmemAllocationProp*, CUmemAllocationGranularity_flags) {
  *unit = 1 << 16;
  return 0;
}

inline CUresult create(CUmemGenericAllocationHandle* handle, size_t bytes, const CUmemAllocationProp*,
                       unsigned long long) {
  const int fd = memfd_create("device-memory", MFD_CLOEXEC);
  if (fd < 0) return kOutOfMemory;
  if (ftruncate(fd, static_cast<off_t>(bytes))) {
    close(fd);
    return kOutOfMemory;
  }
  *handle = static_cast<CUmemGenericAllocationHandle>(fd) + 1;
  return 0;
}

inline CUresult release(CUmemGenericAllocationHandle handle) {
  return close(static_cast<int>(handle - 1)) ? kInvalid : 0;
}

inline CUresult to_descriptor(void* fd, CUmemGenericAllocationHandle handle, CUmemAllocationHandleType,
                              unsigned long long) {
  const int copy = dup(static_cast<int>(handle - 1));
  std::memcpy(fd, &copy, sizeof copy);
  return copy < 0 ? kInvalid : 0;
}

inline CUresult from_descriptor(CUmemGenericAllocationHandle* handle, void* fd, CUmemAllocationHandleType) {
  const int copy = dup(static_cast<int>(reinterpret_cast<intptr_t>(fd)));
  *handle = static_cast<CUmemGenericAllocationHandle>(copy) + 1;
  return copy < 0 ? kInvalid : 0;
}

inline CUresult reserve(CUdeviceptr* at, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  void* found = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (found == MAP_FAILED) return kOutOfMemory;
  *at = reinterpret_cast<CUdeviceptr>(found);
  return 0;
}

inline CUresult give_back(CUdeviceptr at, size_t bytes) {
  return munmap(reinterpret_cast<void*>(at), bytes) ? kInvalid : 0;
}

// Mapped without access, which `allow` gives, as with a driver.
inline CUresult map(CUdeviceptr at, size_t bytes, size_t, CUmemGenericAllocationHandle handle, unsigned long long) {
  void* wanted = reinterpret_cast<void*>(at);
  return mmap(wanted, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, static_cast<int>(handle - 1), 0) == wanted ? 0
                                                                                                           : kInvalid;
}

inline CUresult unmap(CUdeviceptr at, size_t bytes) {
  void* wanted = reinterpret_cast<void*>(at);
  return mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == wanted ? 0 : kInvalid;
}

inline CUresult allow(CUdeviceptr at, size_t bytes, const CUmemAccessDesc*, size_t) {
  return mprotect(reinterpret_cast<void*>(at), bytes, PROT_READ | PROT_WRITE) ? kInvalid : 0;
}

template <class Function>
void* address_of(Function* function) {
  void* address;
  std::memcpy(&address, &function, sizeof address);
  return address;
}

}  // namespace driver_on_cpu

inline int cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned, unsigned long long,
                                            cudaDriverEntryPointQueryResult* result) {
  using namespace driver_on_cpu;
  const struct {
    const char* name;
    void* function;
  } table[] = {
      {"cuMemGetAllocationGranularity", address_of(granularity)},
      {"cuMemCreate", address_of(create)},
      {"cuMemRelease", address_of(release)},
      {"cuMemExportToShareableHandle", address_of(to_descriptor)},
      {"cuMemImportFromShareableHandle", address_of(from_descriptor)},
      {"cuMemAddressReserve", address_of(reserve)},
      {"cuMemAddressFree", address_of(give_back)},
      {"cuMemMap", address_of(map)},
      {"cuMemUnmap", address_of(unmap)},
      {"cuMemSetAccess", address_of(allow)},
  };
  *found = nullptr;
  for (const auto& row : table)
    if (!std::strcmp(row.name, name)) *found = row.function;
  *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return 0;
}
