// Reductions over the ranks' staging slots, in rank order: the same bits as the core's (csrc/cpu/kernels.hpp).
#pragma once

#include "collectives_steps.cuh"
#include "elements.cuh"

namespace distlib {
namespace cuda {

enum : int32_t { kF32, kF64, kF16, kBF16, kI8, kI32, kI64, kU8, kBool, kI16 };
enum : int32_t { kSum, kAvg, kMin, kMax, kProduct, kBand, kBor, kBxor };

// ---- Formats: how an element lies in memory, what it is added up as, how it is compared and finished ----

template <class Float>
struct Floating {
  using Element = Float;
  using Sum = Float;
  using Ordered = Float;
  static constexpr bool kBitwise = false;
  __device__ static Sum widen(Element value) { return value; }
  __device__ static Element narrow(Sum value) { return value; }
  __device__ static Sum finish(Sum value, int divisor) {
    return canonical(divisor > 1 ? value / static_cast<Float>(divisor) : value);
  }
};
using Float32 = Floating<float>;
using Float64 = Floating<double>;

struct Float16 : Float32 {
  using Element = uint16_t;
  __device__ static Sum widen(Element value) { return from_half(value); }
  __device__ static Element narrow(Sum value) { return to_half(value); }
};

struct BFloat16 : Float32 {
  using Element = uint16_t;
  __device__ static Sum widen(Element value) { return from_bf16(value); }
  __device__ static Element narrow(Sum value) { return to_bf16(value); }
};

// Added and multiplied as unsigned, where wrapping is defined; compared and divided as what they are.
template <class Int, class Unsigned>
struct Integer {
  using Element = Unsigned;
  using Sum = Unsigned;
  using Ordered = Int;
  static constexpr bool kBitwise = true;
  __device__ static Sum widen(Element value) { return value; }
  __device__ static Element narrow(Sum value) { return value; }
  __device__ static Sum finish(Sum value, int divisor) {
    return divisor > 1 ? static_cast<Sum>(static_cast<Int>(value) / static_cast<Int>(divisor)) : value;
  }
};

struct Boolean : Integer<uint8_t, uint8_t> {
  __device__ static Sum widen(Element value) { return value != 0; }
};

// Of bool, sum and max are "or", product and min are "and": the caller says so by the op.
__device__ inline int32_t op_on(int32_t dtype, int32_t op) {
  if (dtype != kBool) return op;
  return op == kSum || op == kMax ? kBor : op == kProduct || op == kMin ? kBand : op;
}

template <class F>
__device__ inline typename F::Sum combine(int32_t op, typename F::Sum a, typename F::Sum b) {
  using Sum = typename F::Sum;
  const typename F::Ordered x = static_cast<typename F::Ordered>(a), y = static_cast<typename F::Ordered>(b);
  if constexpr (F::kBitwise) {
    if (op == kBand) return static_cast<Sum>(a & b);
    if (op == kBor) return static_cast<Sum>(a | b);
    if (op == kBxor) return static_cast<Sum>(a ^ b);
  }
  // A NaN that comes later is taken; one that is there stays. Of equal values the earlier is kept.
  if (op == kMin) return y < x || y != y ? b : a;
  if (op == kMax) return y > x || y != y ? b : a;
  if constexpr (F::kBitwise && sizeof(Sum) < sizeof(unsigned)) {
    if (op == kProduct) return static_cast<Sum>(static_cast<unsigned>(a) * static_cast<unsigned>(b));
  } else {
    if (op == kProduct) return a * b;
  }
  return static_cast<Sum>(a + b);
}

template <class Word>
union Pack {  // 16 bytes, as memory moves them and as elements
  uint4 vector;
  Word element[16 / sizeof(Word)];
};

// to = slots of all ranks at `offset` of their segments, reduced. By all threads of the block; offset % 16 == 0.
template <class F>
__device__ void reduce(const Team& team, void* to, uint64_t offset, uint64_t count, int32_t op, int divisor) {
  using Element = typename F::Element;
  using Sum = typename F::Sum;
  constexpr int kWide = 16 / sizeof(Element), kAtOnce = 4;
  const int ranks = team.g.size;
  uint64_t done = 0;
  if (reinterpret_cast<uint64_t>(to) % 16 == 0) {
    const uint64_t vectors = count / kWide;
    for (uint64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      Sum total[kWide];
      for (int first = 0; first < ranks; first += kAtOnce) {
        Pack<Element> given[kAtOnce];  // several loads under way: other devices are far
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k)
          if (first + k < ranks) given[k].vector = team.place<uint4>(first + k, offset, i)[0];
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (first + k >= ranks) break;
#pragma unroll
          for (int e = 0; e < kWide; ++e) {
            const Sum value = F::widen(given[k].element[e]);
            total[e] = first + k == 0 ? value : combine<F>(op, total[e], value);
          }
        }
      }
      Pack<Element> result;
#pragma unroll
      for (int e = 0; e < kWide; ++e) result.element[e] = F::narrow(F::finish(total[e], divisor));
      static_cast<uint4*>(to)[i] = result.vector;
    }
    done = vectors * kWide;
  }
  for (uint64_t i = done + threadIdx.x; i < count; i += blockDim.x) {
    Sum total = F::widen(team.place<Element>(0, offset, i)[0]);
    for (int r = 1; r < ranks; ++r) total = combine<F>(op, total, F::widen(team.place<Element>(r, offset, i)[0]));
    static_cast<Element*>(to)[i] = F::narrow(F::finish(total, divisor));
  }
}

// The same by the dtype's number.
__device__ inline void reduce(const Team& team, const distlib_call& call, void* to, uint64_t offset, uint64_t count) {
  const int divisor = call.what.op == kAvg ? call.divisor : 1;
  const int32_t op = op_on(call.dtype, call.what.op);
  if (team.g.size == 1 && divisor <= 1 && call.dtype != kBool)  // nothing is computed: not even a NaN is touched
    return copy(to, team.segment(0) + offset, count * static_cast<uint64_t>(call.element));
  switch (call.dtype) {
    case kF32:
      return reduce<Float32>(team, to, offset, count, op, divisor);
    case kF64:
      return reduce<Float64>(team, to, offset, count, op, divisor);
    case kF16:
      return reduce<Float16>(team, to, offset, count, op, divisor);
    case kBF16:
      return reduce<BFloat16>(team, to, offset, count, op, divisor);
    case kI8:
      return reduce<Integer<int8_t, uint8_t>>(team, to, offset, count, op, divisor);
    case kI16:
      return reduce<Integer<int16_t, uint16_t>>(team, to, offset, count, op, divisor);
    case kI32:
      return reduce<Integer<int32_t, uint32_t>>(team, to, offset, count, op, divisor);
    case kI64:
      return reduce<Integer<int64_t, uint64_t>>(team, to, offset, count, op, divisor);
    case kBool:
      return reduce<Boolean>(team, to, offset, count, op, divisor);
    default:
      return reduce<Integer<uint8_t, uint8_t>>(team, to, offset, count, op, divisor);
  }
}

}  // namespace cuda
}  // namespace distlib
