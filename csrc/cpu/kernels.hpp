// Element-wise reduction and copying of plain memory, by the widest instruction set that this CPU has.
#pragma once

#include <cstddef>
#include <cstdint>

namespace distlib {

enum class DType : uint8_t { F32, F64, F16, BF16, I8, I32, I64, U8, BOOL, I16 };
enum class RedOp : uint8_t { SUM, AVG, MIN, MAX, PRODUCT, BAND, BOR, BXOR };
constexpr int kDTypes = 10;
constexpr int kRedOps = 8;

// Bytes of one element.
size_t element_size(DType dtype);

// Whether `reduce` accepts the pair: bitwise operators take integers and bool, AVG everything but bool.
bool reducible(DType dtype, RedOp op);

// dsts[j][i] = srcs[0][i] op srcs[1][i] op ... op srcs[nsrc-1][i], strictly in that order, for all j < ndst and
// i < count. The result has the same bits on every instruction set:
//   - F16, BF16: accumulated in fp32 and rounded once, to nearest even. Everything else in its own type; integers wrap.
//   - AVG: the sum divided by `divisor` (>= 1) at the end; floats in the accumulation type before that one rounding,
//     integers truncating toward zero.
//   - BOOL: SUM, MAX, BOR are "or"; PRODUCT, MIN, BAND are "and"; BXOR is "xor". Any non-zero byte is true; results
//     are 0 or 1.
//   - MIN, MAX: a NaN in any source gives NaN; of equal values (-0 and +0) the earlier source's is kept.
//   - A computed NaN is always the positive quiet NaN without payload. With one source nothing is computed (except
//     AVG with a divisor above 1, and BOOL): it is copied bit for bit.
// Any dst may be exactly one of the sources (the same pointer); nothing may overlap otherwise. Pointers need no more
// than the element's alignment. The pair must be `reducible`, nsrc >= 1.
//
// One pass: each source is read once and each destination written once, whatever nsrc and ndst. Destinations that are
// no source bypass the caches when the call as a whole touches several MiB, so prefer one large call to many slices.
void reduce(void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t count, DType dtype, RedOp op,
            int divisor);

// Copies `bytes` bytes between ranges that do not overlap. Copies of several MiB bypass the destination's caches.
void copy(void* dst, const void* src, size_t bytes);

// "avx512" | "avx2" | "neon" | "scalar": chosen once, at the first call of any function here that needs it.
// The environment variable DISTLIB_SIMD forces one of them.
const char* simd_name();

// Null, or why DISTLIB_SIMD could not be followed, with the fix: for `distlib doctor` and a warning at start.
const char* simd_error();

// ---- Internal: one table of kernels per instruction set, exposed so that tests can compare them. ----

struct KernelTable {
  using Reduce = void (*)(void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t count, int divisor,
                          bool bypass_caches);
  const char* name;
  Reduce reduce[kDTypes][kRedOps];                               // null where the pair is not reducible
  void (*large_copy)(void* dst, const void* src, size_t bytes);  // null: memcpy is the best there is
};

// The table for "scalar", "avx2", "avx512" or "neon"; null where this build or this CPU has no such thing.
const KernelTable* table_for(const char* isa);

// `reduce` and `copy` on a given table, with the choice to bypass the caches made by the caller.
void reduce_with(const KernelTable& table, void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t count,
                 DType dtype, RedOp op, int divisor, bool bypass_caches);
void copy_with(const KernelTable& table, void* dst, const void* src, size_t bytes, bool bypass_caches);

// Compiled in or null; says nothing about the CPU.
const KernelTable* scalar_table();
const KernelTable* avx2_table();
const KernelTable* avx512_table();
const KernelTable* neon_table();

}  // namespace distlib
