// The library itself: its version, and words for its error codes.
//
// All of csrc/cuda has a plain C interface. Every integer is 64 bits wide and every number a double, so that callers
// need no prototypes. Pointers may be null only where it is said. Functions return 0 or an error code, never
// synchronise, never allocate, and only launch kernels on `stream` (a cudaStream_t of the current device): they can be
// captured in CUDA graphs. Exceptions say so.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Raised whenever a function or a table changes its meaning; distlib/cuda/library.py asks for it.
int64_t distlib_cuda_version(void);

// What an error code means, as CUDA says it. Any thread, any time.
const char* distlib_cuda_error_text(int64_t code);

#ifdef __cplusplus
}
#endif
