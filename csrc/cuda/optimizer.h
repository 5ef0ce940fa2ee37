// Optimizer steps and sums of squares over tables of segments, with scalars that lie in device memory.
//
// A step is two launches: one that writes the scalars, of the host's numbers or of numbers that the device has, and one
// that steps a table. Formulas, order of operations and bits are those of csrc/cpu/optimizers.hpp.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// ---- Scalars ----

// Hyper of csrc/cpu/optimizers.hpp, in words of 8 bytes; `skip`: a step does nothing. Rounded when they are used.
struct DistlibScalars {
  double scale, rate, decay, l2, beta1, beta2, eps, root_scale, momentum, dampening;
  int64_t nesterov, first, skip;
};

// *scalars (device) = *given (host memory, read before this returns).
int64_t distlib_cuda_step_scalars(void* scalars, const struct DistlibScalars* given, void* stream);

// What a step is made from. Numbers are the host's; addresses, where not null, are of device memory, and what lies
// there is read when the stream gets to it.
struct DistlibPrepare {
  int64_t rule;  // 0 AdamW, 1 SGD, 2 Lion
  double lr, beta1, beta2, eps, weight_decay, momentum, dampening;
  int64_t nesterov, maximize;
  double step;              // the number of this step, from 1, where device_step is null
  double scale, max_norm;   // of all gradients; max_norm 0: no clipping
  const float* device_lr;   // instead of lr
  const double* squares;    // the sum of the squares of all gradients, as they are; needed with max_norm
  const float* loss_scale;  // gradients are divided by it
  const float* found_inf;   // not 0: the step is skipped
  float* device_step;       // steps taken; counted up, unless this one is skipped
  double* norm;             // becomes the norm of the scaled gradients, before clipping
};

// In fp64, as distlib/optim does on the host: scale = given scale / loss scale; norm = sqrt(squares) * scale; scale *=
// min(1, max_norm / (norm + 1e-6)); then rate, decay and root_scale of the rule and step. SGD's step 1 is its `first`.
// Powers of the betas are the device's: they may differ from the host's in their last bits.
int64_t distlib_cuda_step_prepare(void* scalars, const struct DistlibPrepare* given, void* stream);

// ---- Steps ----

// A table lies in device memory, as those of bucket.h do. Rows are these eight words:
struct DistlibStepRow {
  uint64_t param, grad, m, v, copy;  // addresses, aligned to their elements; 0: the rule or the table has none
  uint64_t count;                    // elements, above 0
  uint64_t first_chunk, unused;
};

// One step of all rows. rule as above. Codes of dtypes as in bucket.h. Parameters are
//   fp32 (0)  with fp32, fp16 or bf16 gradients, m and v in fp32; copy: 0 none, 2 fp16, 3 bf16: the new parameters
//   fp64 (1)  with fp64 gradients, m and v in fp64, no copy
//   bf16 (3)  AdamW only, with bf16, fp16 or fp32 gradients, m and v in fp32; `copy` is the column of remainders: the
//             master is the fp32 number whose bits are (parameter << 16) + remainder (int16), and the parameter the
//             master rounded to nearest, ties away from zero
// SGD's momentum must be 0 exactly where `m` of the rows is: `has_m` 0. Others: cudaErrorInvalidValue (1).
int64_t distlib_cuda_step(const void* rows, const void* chunk_rows, int64_t chunks, int64_t chunk, int64_t rule,
                          int64_t param, int64_t grad, int64_t copy, int64_t has_m, const void* scalars, void* stream);

// ---- Sums of squares ----

struct DistlibSquareRow {
  uint64_t at, count;  // address, aligned to its elements; elements, above 0
  uint64_t begin;      // elements of the rows before
  int64_t dtype;
};

// *sum (double) = the sum of the squares of all rows' `total` elements, by the blocks and in the order of
// csrc/cpu/optimizers.hpp: the same bits. block_rows[b] (int32) is the row that element 16,384 b lies in. found_inf
// (float, may be null) becomes 1 if the sum is infinite or NaN, is else left. scratch: 8 * (1 + blocks) bytes, zero
// before the first launch.
int64_t distlib_cuda_sum_of_squares(const void* rows, const void* block_rows, int64_t total, void* scratch, void* sum,
                                    void* found_inf, void* stream);

#ifdef __cplusplus
}
#endif
