// Segments of device memory that other processes map: by CUDA's handles, or by file descriptors.
#include "segment.h"

#include <cstring>

#include "launch.cuh"

#ifdef DISTLIB_CUDA_ON_CPU
#include "driver_on_cpu.hpp"
#else
#include <cuda.h>
#endif

namespace {

constexpr uint64_t kPage = uint64_t{2} << 20;

// The driver's functions are looked up at run time: linked, the library could not even be loaded without a driver.
struct Driver {
  CUresult (*granularity)(size_t*, const CUmemAllocationProp*, CUmemAllocationGranularity_flags);
  CUresult (*create)(CUmemGenericAllocationHandle*, size_t, const CUmemAllocationProp*, unsigned long long);
  CUresult (*release)(CUmemGenericAllocationHandle);
  CUresult (*to_descriptor)(void*, CUmemGenericAllocationHandle, CUmemAllocationHandleType, unsigned long long);
  CUresult (*from_descriptor)(CUmemGenericAllocationHandle*, void*, CUmemAllocationHandleType);
  CUresult (*reserve)(CUdeviceptr*, size_t, size_t, CUdeviceptr, unsigned long long);
  CUresult (*give_back)(CUdeviceptr, size_t);
  CUresult (*map)(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long);
  CUresult (*unmap)(CUdeviceptr, size_t);
  CUresult (*allow)(CUdeviceptr, size_t, const CUmemAccessDesc*, size_t);
  int error = 0;

  template <class Function>
  void find(const char* name, Function*& function) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const int code = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
    const int code = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
    if (!error) error = code ? code : found ? 0 : static_cast<int>(cudaErrorNotSupported);
    std::memcpy(&function, &found, sizeof found);
  }

  Driver() {
    find("cuMemGetAllocationGranularity", granularity);
    find("cuMemCreate", create);
    find("cuMemRelease", release);
    find("cuMemExportToShareableHandle", to_descriptor);
    find("cuMemImportFromShareableHandle", from_descriptor);
    find("cuMemAddressReserve", reserve);
    find("cuMemAddressFree", give_back);
    find("cuMemMap", map);
    find("cuMemUnmap", unmap);
    find("cuMemSetAccess", allow);
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

CUmemAllocationProp properties(int64_t device) {
  CUmemAllocationProp wanted;
  std::memset(&wanted, 0, sizeof wanted);
  wanted.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  wanted.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  wanted.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  wanted.location.id = static_cast<int>(device);
  return wanted;
}

// Gives memory an address at which `device` reaches it.
int map_for(int64_t device, uint64_t bytes, CUmemGenericAllocationHandle memory, void** address) {
  CUdeviceptr at = 0;
  if (const int code = driver().reserve(&at, bytes, 0, 0, 0)) return code;
  int code = driver().map(at, bytes, 0, memory, 0);
  if (code) {
    driver().give_back(at, bytes);
    return code;
  }
  CUmemAccessDesc access;
  std::memset(&access, 0, sizeof access);
  access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  access.location.id = static_cast<int>(device);
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  code = driver().allow(at, bytes, &access, 1);
  if (code) {
    driver().unmap(at, bytes);
    driver().give_back(at, bytes);
    return code;
  }
  *address = reinterpret_cast<void*>(at);
  return 0;
}

int make_by_descriptor(int64_t device, uint64_t* bytes, void** address, int* fd) {
  if (driver().error) return driver().error;
  const CUmemAllocationProp wanted = properties(device);
  size_t unit = 0;
  if (const int code = driver().granularity(&unit, &wanted, CU_MEM_ALLOC_GRANULARITY_MINIMUM)) return code;
  *bytes = (*bytes + unit - 1) / unit * unit;
  CUmemGenericAllocationHandle memory{};
  if (const int code = driver().create(&memory, *bytes, &wanted, 0)) return code;
  int code = driver().to_descriptor(fd, memory, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0);
  if (!code) code = map_for(device, *bytes, memory, address);
  const int released = driver().release(memory);  // the mapping and the descriptor keep it
  return code ? code : released;
}

int open_by_descriptor(int64_t device, uint64_t bytes, int64_t fd, void** address) {
  if (driver().error) return driver().error;
  CUmemGenericAllocationHandle memory{};
  void* as_pointer = reinterpret_cast<void*>(static_cast<intptr_t>(fd));
  if (const int code = driver().from_descriptor(&memory, as_pointer, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR))
    return code;
  const int code = map_for(device, bytes, memory, address);
  const int released = driver().release(memory);
  return code ? code : released;
}

int unmap(uint64_t bytes, void* address) {
  const CUdeviceptr at = reinterpret_cast<CUdeviceptr>(address);
  const int code = driver().unmap(at, bytes);
  const int freed = driver().give_back(at, bytes);
  return code ? code : freed;
}

int fill_with_zeros(void* address, uint64_t bytes) {
  const int code = cudaMemsetAsync(address, 0, bytes, nullptr);
  return code ? code : static_cast<int>(cudaStreamSynchronize(nullptr));
}

// An error that is returned must not be found again by whoever asks CUDA for its last one.
int reported(int code) {
  if (code) cudaGetLastError();
  return code;
}

int set_device(int64_t device) {
  return cudaSetDevice(static_cast<int>(device));
}

int copy_now(int64_t device, void* to, const void* from, uint64_t bytes, cudaMemcpyKind kind) {
  if (const int code = set_device(device)) return reported(code);
  const int code = cudaMemcpyAsync(to, from, bytes, kind, nullptr);
  return reported(code ? code : static_cast<int>(cudaStreamSynchronize(nullptr)));
}

}  // namespace

DISTLIB_API int distlib_cuda_segment_make(int64_t device, int64_t way, uint64_t* bytes, void** address,
                                          unsigned char* handle, int* fd) {
  *fd = -1;
  *address = nullptr;
  if (const int code = set_device(device)) return reported(code);
  if (way == DISTLIB_BY_DESCRIPTOR) {
    const int code = make_by_descriptor(device, bytes, address, fd);
    return reported(code ? code : fill_with_zeros(*address, *bytes));
  }
  // A handle opens all that CUDA keeps beside the memory in its page: so the page is the segment's alone.
  *bytes = (*bytes + kPage - 1) / kPage * kPage;
  if (const int code = cudaMalloc(address, *bytes)) return reported(code);
  cudaIpcMemHandle_t exported;
  int code = cudaIpcGetMemHandle(&exported, *address);
  if (!code) code = fill_with_zeros(*address, *bytes);
  if (code) {
    cudaFree(*address);
    *address = nullptr;
    return reported(code);
  }
  static_assert(sizeof exported == DISTLIB_HANDLE_BYTES, "the interface has room for CUDA's handles");
  std::memcpy(handle, &exported, sizeof exported);
  return 0;
}

DISTLIB_API int distlib_cuda_segment_free(int64_t device, int64_t way, int64_t bytes, void* address) {
  if (const int code = set_device(device)) return reported(code);
  return reported(way == DISTLIB_BY_DESCRIPTOR ? unmap(bytes, address) : static_cast<int>(cudaFree(address)));
}

DISTLIB_API int distlib_cuda_segment_open(int64_t device, int64_t way, int64_t bytes, const unsigned char* handle,
                                          int64_t fd, void** address) {
  *address = nullptr;
  if (const int code = set_device(device)) return reported(code);
  if (way == DISTLIB_BY_DESCRIPTOR) return reported(open_by_descriptor(device, bytes, fd, address));
  cudaIpcMemHandle_t exported;
  std::memcpy(&exported, handle, sizeof exported);
  return reported(cudaIpcOpenMemHandle(address, exported, cudaIpcMemLazyEnablePeerAccess));
}

DISTLIB_API int distlib_cuda_segment_close(int64_t device, int64_t way, int64_t bytes, void* address) {
  if (const int code = set_device(device)) return reported(code);
  return reported(way == DISTLIB_BY_DESCRIPTOR ? unmap(bytes, address)
                                               : static_cast<int>(cudaIpcCloseMemHandle(address)));
}

DISTLIB_API int distlib_cuda_pinned_make(int64_t device, int64_t bytes, void** host, void** address) {
  if (const int code = set_device(device)) return reported(code);
  if (const int code = cudaHostAlloc(host, bytes, cudaHostAllocMapped | cudaHostAllocPortable)) return reported(code);
  std::memset(*host, 0, bytes);
  return reported(cudaHostGetDevicePointer(address, *host, 0));
}

DISTLIB_API int distlib_cuda_pinned_free(void* host) {
  return reported(cudaFreeHost(host));
}

DISTLIB_API int distlib_cuda_segment_write(int64_t device, void* address, const void* host, int64_t bytes) {
  return copy_now(device, address, host, bytes, cudaMemcpyHostToDevice);
}

DISTLIB_API int distlib_cuda_segment_read(int64_t device, void* host, const void* address, int64_t bytes) {
  return copy_now(device, host, address, bytes, cudaMemcpyDeviceToHost);
}
