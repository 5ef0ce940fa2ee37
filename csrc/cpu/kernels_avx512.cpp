// The kernels on 64-byte vectors for x86 CPUs with AVX-512 F, BW, DQ and VL.
#include "half.hpp"
#include "kernels.hpp"
#include "optimizers.hpp"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // both about GCC 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define DISTLIB_VECTOR_BYTES 64

// Everything between push and pop, and only that, may use AVX-512. It all has internal linkage and calls no inline
// function of the standard library, so that no AVX-512 code can be merged into what other CPUs run.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,f16c")
#endif

namespace distlib {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

__attribute__((always_inline)) inline Floats load_half(const void* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
}

__attribute__((always_inline)) inline Floats load_bf16(const void* from) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  return (Floats)_mm512_slli_epi32(words, 16);
}

__attribute__((always_inline)) inline Halves to_half(Floats value) {
  return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// To nearest, ties to even. Needs no case for NaN: the canonical one, the only one to come here, rounds to itself.
__attribute__((always_inline)) inline Halves to_bf16(Floats value) {
  const Words bits = (Words)value;
  return __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Halves);
}

constexpr bool kCanBypassCaches = true;

template <class Stored>
__attribute__((always_inline)) inline void bypassing_store(void* to, Stored value) {
  if constexpr (sizeof(Stored) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)value);
  } else {
    _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)value);
  }
}

__attribute__((always_inline)) inline void bypass_fence() {
  _mm_sfence();
}

__attribute__((always_inline)) inline Floats root(Floats value) {
  return (Floats)_mm512_sqrt_ps((__m512)value);
}

#include "kernels.inl"
#include "optimizers.inl"

constexpr KernelTable kTable = make_table("avx512");
constexpr OptimizerTable kOptimizers = make_optimizers();

}  // namespace
}  // namespace distlib

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace distlib {
const KernelTable* avx512_table() {
  return &kTable;
}
const OptimizerTable* avx512_optimizers() {
  return &kOptimizers;
}
}  // namespace distlib

#else

namespace distlib {
const KernelTable* avx512_table() {
  return nullptr;
}
const OptimizerTable* avx512_optimizers() {
  return nullptr;
}
}  // namespace distlib

#endif
