// Conversions between float and the two 16-bit float formats, by integer arithmetic only: the scalar reference.
#pragma once

#include <cstdint>
#include <cstring>

namespace distlib {

// Every function here is `static`, not merely `inline`: each translation unit keeps its own copy, so the linker
// can never give the scalar path a copy that was compiled for a wider instruction set.

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// IEEE binary16 -> float, exact. A NaN stays a NaN (made quiet) and keeps its sign and payload.
static inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) {
    const uint32_t quiet = mantissa ? 0x400000u : 0u;
    return float_from_bits(sign | 0x7f800000u | quiet | (mantissa << 13));
  }
  if (exponent != 0) return float_from_bits(sign | ((exponent + 112) << 23) | (mantissa << 13));
  if (mantissa == 0) return float_from_bits(sign);
  uint32_t float_exponent = 113;  // a subnormal half is a normal float: shift its leading one into place
  while (!(mantissa & 0x400u)) {
    mantissa <<= 1;
    --float_exponent;
  }
  return float_from_bits(sign | (float_exponent << 23) | ((mantissa & 0x3ffu) << 13));
}

// float -> IEEE binary16, to nearest, ties to even; too large becomes infinity, NaN the quiet NaN of its sign.
static inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and above, infinity
  if (magnitude >= 0x38800000u) {                                              // a normal half, 2^-14 and above
    // A carry out of the mantissa moves to the next exponent, from 65520 on to infinity: what rounding asks for.
    const uint32_t rebased = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | ((rebased + 0xfffu + ((rebased >> 13) & 1u)) >> 13));
  }
  if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);  // below half of the smallest subnormal
  const uint32_t shift = 126u - (magnitude >> 23);                  // 14 (largest subnormal) to 24
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const uint32_t half_ulp = (1u << (shift - 1)) - 1u;
  return static_cast<uint16_t>(sign | ((mantissa + half_ulp + ((mantissa >> shift) & 1u)) >> shift));
}

// bfloat16 -> float, exact.
static inline float bf16_to_float(uint16_t value) {
  return float_from_bits(static_cast<uint32_t>(value) << 16);
}

// float -> bfloat16, to nearest, ties to even; NaN becomes the quiet NaN of its sign.
static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | 0x7fc0u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace distlib
