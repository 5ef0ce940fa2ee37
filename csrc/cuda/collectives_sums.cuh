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

// total[e] = total[e] op given[e]. The op is chosen once for all elements.
template <class F, int Count>
__device__ __forceinline__ void combine(int32_t op, typename F::Sum (&total)[Count],
                                        const typename F::Element (&given)[Count]) {
  using Sum = typename F::Sum;
  using Ordered = typename F::Ordered;
  const auto each = [&](auto change) {
#pragma unroll
    for (int e = 0; e < Count; ++e) total[e] = change(total[e], F::widen(given[e]));
  };
  if constexpr (F::kBitwise) {
    if (op == kBand) return each([](Sum a, Sum b) { return static_cast<Sum>(a & b); });
    if (op == kBor) return each([](Sum a, Sum b) { return static_cast<Sum>(a | b); });
    if (op == kBxor) return each([](Sum a, Sum b) { return static_cast<Sum>(a ^ b); });
  }
  // A NaN that comes later is taken; one that is there stays. Of equal values the earlier is kept.
  if (op == kMin)
    return each([](Sum a, Sum b) {
      const Ordered x = static_cast<Ordered>(a), y = static_cast<Ordered>(b);
      return y < x || y != y ? b : a;
    });
  if (op == kMax)
    return each([](Sum a, Sum b) {
      const Ordered x = static_cast<Ordered>(a), y = static_cast<Ordered>(b);
      return y > x || y != y ? b : a;
    });
  if (op == kProduct)
    return each([](Sum a, Sum b) {
      if constexpr (F::kBitwise && sizeof(Sum) < sizeof(unsigned)) {  // else promoted to int, which may overflow
        return static_cast<Sum>(static_cast<unsigned>(a) * static_cast<unsigned>(b));
      } else {
        return a * b;
      }
    });
  each([](Sum a, Sum b) { return static_cast<Sum>(a + b); });
}

template <class Word, int Count>
union Pack {  // as memory moves them, and as elements
  uint4 vector;
  Word element[Count];
};

// to = slots of all ranks at `offset` of their segments, reduced. By all threads of the block; offset % 16 == 0. Its
// own function, as its registers would be the whole kernel's.
template <class F>
__device__ DL_ONCE void reduce(const distlib_group& g, void* to, uint64_t offset, uint64_t count, int32_t op,
                               int divisor) {
  using Element = typename F::Element;
  constexpr int kWide = 16 / sizeof(Element);
  const auto slot = [&](int r) { return static_cast<const char*>(g.segment[r]) + offset; };
  uint64_t done = 0;
  if (reinterpret_cast<uint64_t>(to) % 16 == 0) {
    const uint64_t vectors = count / kWide;
    for (uint64_t i = threadIdx.x; i < vectors; i += blockDim.x) {
      const auto load = [&](int r) { return reinterpret_cast<const uint4*>(slot(r))[i]; };
      typename F::Sum total[kWide];
      Pack<Element, kWide> given, ahead;
      given.vector = load(0);
      ahead.vector = load(g.size > 1 ? 1 : 0);
#pragma unroll
      for (int e = 0; e < kWide; ++e) total[e] = F::widen(given.element[e]);
      for (int r = 1; r < g.size; ++r) {
        given.vector = ahead.vector;
        if (r + 1 < g.size) ahead.vector = load(r + 1);  // under way while this one is added: other devices are far
        combine<F, kWide>(op, total, given.element);
      }
#pragma unroll
      for (int e = 0; e < kWide; ++e) given.element[e] = F::narrow(F::finish(total[e], divisor));
      static_cast<uint4*>(to)[i] = given.vector;
    }
    done = vectors * kWide;
  }
  for (uint64_t i = done + threadIdx.x; i < count; i += blockDim.x) {
    typename F::Sum total[1] = {F::widen(reinterpret_cast<const Element*>(slot(0))[i])};
    for (int r = 1; r < g.size; ++r) {
      const Element given[1] = {reinterpret_cast<const Element*>(slot(r))[i]};
      combine<F, 1>(op, total, given);
    }
    static_cast<Element*>(to)[i] = F::narrow(F::finish(total[0], divisor));
  }
}

// The same by the dtype's number.
__device__ DL_ONCE inline void reduce(const Team& team, const distlib_call& call, void* to, uint64_t offset,
                                      uint64_t count) {
  const int divisor = call.what.op == kAvg ? call.divisor : 1;
  const int32_t op = op_on(call.dtype, call.what.op);
  if (team.g.size == 1 && divisor <= 1 && call.dtype != kBool)  // nothing is computed: not even a NaN is touched
    return copy(to, team.segment(0) + offset, count * static_cast<uint64_t>(call.element));
  switch (call.dtype) {
    case kF32:
      return reduce<Float32>(team.g, to, offset, count, op, divisor);
    case kF64:
      return reduce<Float64>(team.g, to, offset, count, op, divisor);
    case kF16:
      return reduce<Float16>(team.g, to, offset, count, op, divisor);
    case kBF16:
      return reduce<BFloat16>(team.g, to, offset, count, op, divisor);
    case kI8:
      return reduce<Integer<int8_t, uint8_t>>(team.g, to, offset, count, op, divisor);
    case kI16:
      return reduce<Integer<int16_t, uint16_t>>(team.g, to, offset, count, op, divisor);
    case kI32:
      return reduce<Integer<int32_t, uint32_t>>(team.g, to, offset, count, op, divisor);
    case kI64:
      return reduce<Integer<int64_t, uint64_t>>(team.g, to, offset, count, op, divisor);
    case kBool:
      return reduce<Boolean>(team.g, to, offset, count, op, divisor);
    default:
      return reduce<Integer<uint8_t, uint8_t>>(team.g, to, offset, count, op, divisor);
  }
}

}  // namespace cuda
}  // namespace distlib
