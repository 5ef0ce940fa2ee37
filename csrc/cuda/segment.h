// Memory that more than one may touch: of a device, by several processes of one host; of the host, by a device too.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// How another process comes to a segment. By handle: 64 bytes, which any process of the host may open; not every system
// allows it. By descriptor: a file descriptor, which only those get that it is passed to over a Unix socket.
enum { DISTLIB_BY_HANDLE = 0, DISTLIB_BY_DESCRIPTOR = 1, DISTLIB_HANDLE_BYTES = 64 };

// Unlike the rest of the interface (library.h) these allocate, may wait for the device, and leave it current on the
// calling thread: for starts, not for steps.

// Makes a segment of zeros on `device`. *bytes: at least so many are wanted; becomes how many there are. Fills
// *address, and `handle` or *fd (the caller's to close; -1 by handle).
int distlib_cuda_segment_make(int64_t device, int64_t way, uint64_t* bytes, void** address, unsigned char* handle,
                              int* fd);
// Frees what distlib_cuda_segment_make made. No other process may have it open any more.
int distlib_cuda_segment_free(int64_t device, int64_t way, int64_t bytes, void* address);

// Maps another process's segment so that `device` can reach it. `bytes`: as its maker was told. `fd` stays the
// caller's.
int distlib_cuda_segment_open(int64_t device, int64_t way, int64_t bytes, const unsigned char* handle, int64_t fd,
                              void** address);
int distlib_cuda_segment_close(int64_t device, int64_t way, int64_t bytes, void* address);

// Zeroed memory of the host that kernels of `device` reach at *address.
int distlib_cuda_pinned_make(int64_t device, int64_t bytes, void** host, void** address);
int distlib_cuda_pinned_free(void* host);

// Copies between the host and a segment, for tests and for starts; waits until it is done.
int distlib_cuda_segment_write(int64_t device, void* address, const void* host, int64_t bytes);
int distlib_cuda_segment_read(int64_t device, void* host, const void* address, int64_t bytes);

#ifdef __cplusplus
}
#endif
