// Block int8 quantization, and rows put in another order: what gathers of parameters need beside the network.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Packed values, as distlib/sharded/quantize.py has them: int8 of all blocks of 256 elements, padded with zeros, then
// an fp32 scale of each block: its largest magnitude / 127. Any alignment. Codes of dtypes: 0 fp32, 2 fp16, 3 bf16.
// The same bits as quantize.py's, but for the bits of NaNs.

// packed (260 bytes a block) = values.
int64_t distlib_cuda_quantize(const void* values, int64_t count, int64_t dtype, void* packed, void* stream);

// out = values of `rows` packed rows, whose first bytes are packed_stride bytes apart; `count` elements each, which
// follow each other in `out`.
int64_t distlib_cuda_dequantize(const void* packed, int64_t rows, int64_t packed_stride, int64_t count, int64_t dtype,
                                void* out, void* stream);

// A matrix of rows of row_bytes bytes, [rails][nodes] in `from`, becomes [nodes][rails] in `to`: what the rails of a
// hierarchical gather brought in, in order of rank. Any row size and alignment.
int64_t distlib_cuda_reorder(const void* from, void* to, int64_t row_bytes, int64_t nodes, int64_t rails, void* stream);

#ifdef __cplusplus
}
#endif
