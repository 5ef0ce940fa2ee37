// Many tensors into one buffer, or out of it, in one launch: copied or cast, scaled, searched for infinities, squared.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A table lies in device memory and is used for as long as no address changes. Rows are these four words:
struct DistlibPackRow {
  uint64_t from, to;  // addresses; aligned to their elements; nothing may overlap
  uint64_t count;     // elements, above 0
  uint64_t first_chunk;
};
// Each row is cut into chunks of `chunk` elements (a multiple of 16), the last of it shorter; chunks are numbered
// through all rows, and chunk_rows[c] (int32) is the row of chunk c.

// to = from, in the dtype of `to`, of all rows. Codes of dtypes: 0 fp32, 1 fp64, 2 fp16, 3 bf16, 7 bytes. Pairs: equal
// ones, fp32 with fp16 or bf16; bytes only to bytes, and plainly. Others are refused with cudaErrorInvalidValue (1).
//
// Plainly: scale 1, and device_scale, sum and found_inf null. Equal dtypes are then moved bit for bit.
// Else: value = from * s, rounded to `to`; s is scale * *device_scale (float, null: 1) in fp64, rounded to fp32 once
// (fp64 tensors: not). A NaN is stored as the positive quiet one.
//   sum        double: becomes the sum of the squares, in fp64, of the values as they are stored
//   found_inf  float: becomes 1 if a stored value is infinite or NaN; is else left as it is, so that several tables can
//              share it
// The sum is added in an order that depends on the table, on `chunk` and on addresses modulo 128, not on time.
//
// scratch: 8 * (1 + chunks) bytes, zero before the first launch, and of one launch at a time. Needed with `sum`.
int64_t distlib_cuda_pack(const void* rows, const void* chunk_rows, int64_t chunks, int64_t chunk, int64_t from,
                          int64_t to, double scale, const void* device_scale, void* scratch, void* sum, void* found_inf,
                          void* stream);

#ifdef __cplusplus
}
#endif
