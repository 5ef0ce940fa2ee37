// The kernels on 16-byte vectors for 64-bit ARM, where NEON is always present.
#include "half.hpp"
#include "kernels.hpp"
#include "optimizers.hpp"

#if defined(__aarch64__)

#include <arm_neon.h>

#define DISTLIB_VECTOR_BYTES 16

namespace distlib {
namespace {

typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));
typedef uint16_t Halves __attribute__((vector_size(8)));

__attribute__((always_inline)) inline Floats load_half(const void* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Floats)vcvt_f32_f16((float16x4_t)halves);
}

__attribute__((always_inline)) inline Halves to_half(Floats value) {
  return (Halves)vcvt_f16_f32((float32x4_t)value);
}

__attribute__((always_inline)) inline Floats load_bf16(const void* from) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  return (Floats)(__builtin_convertvector(halves, Words) << 16);
}

// To nearest, ties to even. Needs no case for NaN: the canonical one, the only one to come here, rounds to itself.
__attribute__((always_inline)) inline Halves to_bf16(Floats value) {
  const Words bits = (Words)value;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

// These CPUs notice a long run of whole-line stores themselves; the hint instruction (STNP) gains nothing more.
constexpr bool kCanBypassCaches = false;

template <class Stored>
void bypassing_store(void*, Stored) {}

inline void bypass_fence() {}

__attribute__((always_inline)) inline Floats root(Floats value) {
  return (Floats)vsqrtq_f32((float32x4_t)value);
}

#include "kernels.inl"
#include "optimizers.inl"

constexpr KernelTable kTable = make_table("neon");
constexpr OptimizerTable kOptimizers = make_optimizers();

}  // namespace

const KernelTable* neon_table() {
  return &kTable;
}
const OptimizerTable* neon_optimizers() {
  return &kOptimizers;
}

}  // namespace distlib

#else

namespace distlib {
const KernelTable* neon_table() {
  return nullptr;
}
const OptimizerTable* neon_optimizers() {
  return nullptr;
}
}  // namespace distlib

#endif
