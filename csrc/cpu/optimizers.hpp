// Optimizer steps and sums of squares over lists of segments of plain memory: one call for a whole model.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.hpp"

namespace distlib {

enum class Rule : uint8_t { ADAMW, SGD, LION };
enum class Copy : uint8_t { NONE, BF16, F16 };
constexpr int kRules = 3;
constexpr int kCopies = 3;

// The scalars of one step. They are rounded to the parameters' type once; 1 - x is taken before that.
//
//   g = scale * gradient        and where l2 is not 0, but for LION: g = g + l2 * p
//
//   ADAMW  p = decay * p        m = m + (1 - beta1) (g - m)     v = beta2 * v + ((1 - beta2) * g) * g
//          p = p - (rate * m) / (sqrt(v) * root_scale + eps)
//   SGD    m = momentum * m + (1 - dampening) * g     (first: m = g)
//          u = nesterov ? g + momentum * m : m        (momentum 0: u = g, and there is no m)
//          p = p - rate * u
//   LION   u = sign(m + (1 - beta1) (g - m))          (u of a NaN is NaN, of a zero zero)
//          p = p - rate * (u + l2 * p)                m = m + (1 - beta2) (g - m)
//
// m + w (g - m) is computed as g - (1 - w) (g - m) where w >= 1/2, so that w = 1 gives g. Multiplications and additions
// are rounded one by one, never fused, in the order written: every instruction set and any division of the work over
// threads and segments gives the same bits. A NaN that is stored is always the positive quiet NaN without payload.
struct Hyper {
  Rule rule = Rule::ADAMW;
  double scale = 1, rate = 0, decay = 1, l2 = 0;
  double beta1 = 0, beta2 = 0, eps = 0, root_scale = 1;
  double momentum = 0, dampening = 0;
  bool nesterov = false, first = false;
};

// `count` elements from each address. m, v, copy: null where the rule or the batch has none. Addresses need no more
// than the element's alignment; nothing may overlap.
struct Segment {
  void* param;
  const void* grad;
  void* m;
  void* v;
  void* copy;
  uint64_t count;
};

// Segments that are stepped alike. param: F32, with grad F32, F16 or BF16 and any copy; or F64 with grad F64 and no
// copy. m and v have the parameters' type. copy: the new parameters rounded to nearest even.
struct Batch {
  Hyper hyper;
  DType param, grad;
  Copy copy;
  const Segment* segments;
  size_t segment_count;
};

// Null, or what a batch asks for that there is no kernel for.
const char* unsupported(const Batch& batch);

// One step of all batches, by up to `threads` threads. Batches must not be `unsupported`.
void update(const Batch* batches, size_t count, int threads);

// Gradients of one dtype (F32, F16, BF16, F64) to be squared and summed.
struct Squares {
  struct Run {
    const void* at;
    uint64_t count;
  };
  DType dtype;
  const Run* runs;
  size_t run_count;
};

// The sum of the squares of all elements, in fp64. The elements of all runs, numbered through, are cut into blocks of
// 16,384; in a block, element i adds to partial sum i % 32; partial sums, then blocks, add up in order. So the bits
// depend on the elements' order alone: not on threads, instruction set, or where one run ends and the next begins.
// Of fp32 and half gradients the sum is finite exactly if all are. A NaN is the positive quiet NaN.
double sum_of_squares(const Squares* squares, size_t count, int threads);

// ---- Internal: one table of kernels per instruction set, exposed so that tests can compare them. ----

constexpr int kGradTypes = 4;  // F32, F64, F16, BF16, as DType numbers them
constexpr size_t kSquareLanes = 32;

struct OptimizerTable {
  using Step = void (*)(const Hyper& hyper, const Segment& segment);
  using Square = void (*)(double* lanes, size_t lane, const void* at, size_t count);
  Step step[kRules][kGradTypes][kCopies];  // null where there is none
  Square square[kGradTypes];               // element i adds to lanes[(lane + i) % kSquareLanes]
};

// Compiled in or null; says nothing about the CPU.
const OptimizerTable* scalar_optimizers();
const OptimizerTable* avx2_optimizers();
const OptimizerTable* avx512_optimizers();
const OptimizerTable* neon_optimizers();

// The table beside `table_for(isa)`; null where that is.
const OptimizerTable* optimizers_for(const char* isa);

void update_with(const OptimizerTable& table, const Batch* batches, size_t count, int threads);
double sum_of_squares_with(const OptimizerTable& table, const Squares* squares, size_t count, int threads);

}  // namespace distlib
