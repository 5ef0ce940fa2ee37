// The version of the interface and the words of its errors.
#include "library.h"

#include "launch.cuh"

DISTLIB_API int64_t distlib_cuda_version() {
  return 1;
}

DISTLIB_API const char* distlib_cuda_error_text(int64_t code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
