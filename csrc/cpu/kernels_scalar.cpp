// The kernels one element at a time, in plain C++: runs everywhere and is the reference for all the others.
#include "half.hpp"
#include "kernels.hpp"
#include "optimizers.hpp"

#define DISTLIB_VECTOR_BYTES 0

namespace distlib {
namespace {

using Floats = float;

float load_half(const void* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return half_to_float(half);
}

float load_bf16(const void* from) {
  uint16_t value;
  std::memcpy(&value, from, sizeof value);
  return bf16_to_float(value);
}

uint16_t to_half(float value) {
  return float_to_half(value);
}

uint16_t to_bf16(float value) {
  return float_to_bf16(value);
}

constexpr bool kCanBypassCaches = false;

template <class Stored>
void bypassing_store(void*, Stored) {}

void bypass_fence() {}

float root(float value) {
  return __builtin_sqrtf(value);
}

#include "kernels.inl"
#include "optimizers.inl"

}  // namespace

const KernelTable* scalar_table() {
  static constexpr KernelTable table = make_table("scalar");
  return &table;
}

const OptimizerTable* scalar_optimizers() {
  static constexpr OptimizerTable table = make_optimizers();
  return &table;
}

}  // namespace distlib
