// Element types as kernels see them: what lies in memory (Raw), what is computed with (Wide), and conversions between.
//
// They give the bits of csrc/cpu/half.hpp: on a GPU by its own instructions, which differ from it only in NaNs.
#pragma once

#include "launch.cuh"

#ifdef DISTLIB_CUDA_ON_CPU
#include "cpu/half.hpp"
#endif

namespace distlib {
namespace cuda {

// As DType of csrc/cpu/kernels.hpp numbers them; BYTES: elements of any size, only moved.
enum Code : int64_t { CODE_F32 = 0, CODE_F64 = 1, CODE_F16 = 2, CODE_BF16 = 3, CODE_BYTES = 7 };

__device__ __forceinline__ uint32_t bits_of(float value) {
  return __float_as_uint(value);
}

__device__ __forceinline__ float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}

__device__ __forceinline__ uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

__device__ __forceinline__ double double_of(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Which NaN an operation gives differs between processors: the one that is stored is always this.
__device__ __forceinline__ float canonical(float value) {
  return value == value ? value : float_of(0x7fc00000u);
}

__device__ __forceinline__ double canonical(double value) {
  return value == value ? value : double_of(0x7ff8000000000000u);
}

__device__ __forceinline__ float from_half(uint16_t half) {
#ifdef DISTLIB_CUDA_ON_CPU
  return half_to_float(half);
#else
  const uint32_t magnitude = half & 0x7fffu;
  if (magnitude > 0x7c00u) return float_of((half & 0x8000u) << 16 | 0x7fc00000u | (half & 0x3ffu) << 13);
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
#endif
}

__device__ __forceinline__ uint16_t to_half(float value) {
#ifdef DISTLIB_CUDA_ON_CPU
  return float_to_half(value);
#else
  uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return value == value ? half : static_cast<uint16_t>((bits_of(value) >> 16 & 0x8000u) | 0x7e00u);
#endif
}

__device__ __forceinline__ float from_bf16(uint16_t value) {
  return float_of(static_cast<uint32_t>(value) << 16);
}

__device__ __forceinline__ uint16_t to_bf16(float value) {
#ifdef DISTLIB_CUDA_ON_CPU
  return float_to_bf16(value);
#else
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return value == value ? rounded : static_cast<uint16_t>((bits_of(value) >> 16 & 0x8000u) | 0x7fc0u);
#endif
}

struct F32 {
  using Raw = uint32_t;
  using Wide = float;
  static __device__ __forceinline__ float wide(Raw raw) { return float_of(raw); }
  static __device__ __forceinline__ Raw raw(float value) { return bits_of(value); }
};

struct F64 {
  using Raw = uint64_t;
  using Wide = double;
  static __device__ __forceinline__ double wide(Raw raw) { return double_of(raw); }
  static __device__ __forceinline__ Raw raw(double value) { return bits_of(value); }
};

struct F16 {
  using Raw = uint16_t;
  using Wide = float;
  static __device__ __forceinline__ float wide(Raw raw) { return from_half(raw); }
  static __device__ __forceinline__ Raw raw(float value) { return to_half(value); }
};

struct BF16 {
  using Raw = uint16_t;
  using Wide = float;
  static __device__ __forceinline__ float wide(Raw raw) { return from_bf16(raw); }
  static __device__ __forceinline__ Raw raw(float value) { return to_bf16(value); }
};

}  // namespace cuda
}  // namespace distlib
