// The kernels on 32-byte vectors for x86 CPUs with AVX2 and F16C.
#include "half.hpp"
#include "kernels.hpp"
#include "optimizers.hpp"

#if defined(__x86_64__)

#include <immintrin.h>

#define DISTLIB_VECTOR_BYTES 32

// Everything between push and pop, and only that, may use AVX2. It all has internal linkage and calls no inline
// function of the standard library, so that no AVX2 code can be merged into what other CPUs run.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif

namespace distlib {
namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

__attribute__((always_inline)) inline Floats load_half(const void* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from)));
}

__attribute__((always_inline)) inline Floats load_bf16(const void* from) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return (Floats)_mm256_slli_epi32(words, 16);
}

__attribute__((always_inline)) inline Halves to_half(Floats value) {
  return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// To nearest, ties to even. Needs no case for NaN: the canonical one, the only one to come here, rounds to itself.
__attribute__((always_inline)) inline Halves to_bf16(Floats value) {
  const Words bits = (Words)value;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

constexpr bool kCanBypassCaches = true;

template <class Stored>
__attribute__((always_inline)) inline void bypassing_store(void* to, Stored value) {
  if constexpr (sizeof(Stored) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
  } else {
    _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)value);
  }
}

__attribute__((always_inline)) inline void bypass_fence() {
  _mm_sfence();
}

__attribute__((always_inline)) inline Floats root(Floats value) {
  return (Floats)_mm256_sqrt_ps((__m256)value);
}

#include "kernels.inl"
#include "optimizers.inl"

constexpr KernelTable kTable = make_table("avx2");
constexpr OptimizerTable kOptimizers = make_optimizers();

}  // namespace
}  // namespace distlib

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace distlib {
const KernelTable* avx2_table() {
  return &kTable;
}
const OptimizerTable* avx2_optimizers() {
  return &kOptimizers;
}
}  // namespace distlib

#else

namespace distlib {
const KernelTable* avx2_table() {
  return nullptr;
}
const OptimizerTable* avx2_optimizers() {
  return nullptr;
}
}  // namespace distlib

#endif
