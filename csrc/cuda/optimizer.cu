// Optimizer steps: a block per chunk of a row, four elements of every array at once, two such groups under way.
//
// What is left out for a reason: software pipelining and more groups (registers), stores past the caches (what is
// written was just read).
#include "optimizer.h"

#include "elements.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace distlib {
namespace cuda {
namespace {

// ---- Rules: see csrc/cpu/optimizers.hpp ----

// from + weight (to - from), exact for a weight of 1, too; `rest` is 1 - weight.
template <class T>
__device__ __forceinline__ T towards(T from, T to, T weight, T rest) {
  const T way = to - from;
  return weight < T(0.5) ? from + weight * way : to - rest * way;
}

__device__ __forceinline__ float root(float value) {
  return sqrtf(value);
}

__device__ __forceinline__ double root(double value) {
  return sqrt(value);
}

template <class T>
struct AdamW {
  static constexpr bool kFirst = true, kSecond = true;
  T scale, l2, decay, weight1, rest1, weight2, rest2, rate, root_scale, eps;
  __device__ explicit AdamW(const DistlibScalars& s)
      : scale(T(s.scale)),
        l2(T(s.l2)),
        decay(T(s.decay)),
        weight1(T(1 - s.beta1)),
        rest1(T(s.beta1)),
        weight2(T(1 - s.beta2)),
        rest2(T(s.beta2)),
        rate(T(s.rate)),
        root_scale(T(s.root_scale)),
        eps(T(s.eps)) {}

  __device__ __forceinline__ void step(T& p, T g, T& m, T& v) const {
    g = scale * g;
    if (l2 != 0) g = g + l2 * p;
    p = decay * p;
    m = towards(m, g, weight1, rest1);
    v = rest2 * v + (weight2 * g) * g;
    p = p - (rate * m) / (root(v) * root_scale + eps);
  }
};

template <class T, bool Momentum>
struct Sgd {
  static constexpr bool kFirst = Momentum, kSecond = false;
  T scale, l2, rate, momentum, keep;
  bool nesterov, first;
  __device__ explicit Sgd(const DistlibScalars& s)
      : scale(T(s.scale)),
        l2(T(s.l2)),
        rate(T(s.rate)),
        momentum(T(s.momentum)),
        keep(T(1 - s.dampening)),
        nesterov(s.nesterov != 0),
        first(s.first != 0) {}

  __device__ __forceinline__ void step(T& p, T g, T& m, T&) const {
    g = scale * g;
    if (l2 != 0) g = g + l2 * p;
    if (Momentum) {
      m = first ? g : momentum * m + keep * g;
      g = nesterov ? g + momentum * m : m;
    }
    p = p - rate * g;
  }
};

template <class T>
struct Lion {
  static constexpr bool kFirst = true, kSecond = false;
  T scale, l2, weight1, rest1, weight2, rest2, rate;
  __device__ explicit Lion(const DistlibScalars& s)
      : scale(T(s.scale)),
        l2(T(s.l2)),
        weight1(T(1 - s.beta1)),
        rest1(T(s.beta1)),
        weight2(T(1 - s.beta2)),
        rest2(T(s.beta2)),
        rate(T(s.rate)) {}

  __device__ __forceinline__ void step(T& p, T g, T& m, T&) const {
    g = scale * g;
    const T between = towards(m, g, weight1, rest1);
    const T sign = between > 0 ? T(1) : (between < 0 ? T(-1) : between);
    p = p - rate * (sign + l2 * p);
    m = towards(m, g, weight2, rest2);
  }
};

// ---- Parameters: what their bits are, and what is written beside them ----

// fp32 or fp64, and perhaps a copy in a half type.
template <class Type>
struct Whole {
  using Element = typename Type::Wide;
  using Raw = typename Type::Raw;
  static constexpr bool kReadsBeside = false;
  int64_t copy;
  __device__ __forceinline__ bool writes_beside() const { return copy != 0; }
  static __device__ __forceinline__ Element join(Raw raw, uint16_t) { return Type::wide(raw); }
  __device__ __forceinline__ void split(Element value, Raw& raw, uint16_t& beside) const {
    raw = Type::raw(value);
    if (copy == CODE_BF16) beside = to_bf16(static_cast<float>(value));
    if (copy == CODE_F16) beside = to_half(static_cast<float>(value));
  }
};

// The upper half of the master, rounded, and what that leaves: see optimizer.h.
struct Halves {
  using Element = float;
  using Raw = uint16_t;
  static constexpr bool kReadsBeside = true;
  int64_t copy;
  __device__ __forceinline__ bool writes_beside() const { return true; }
  static __device__ __forceinline__ float join(uint16_t high, uint16_t remainder) {
    return float_of((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(static_cast<int16_t>(remainder)));
  }
  __device__ __forceinline__ void split(float value, uint16_t& high, uint16_t& remainder) const {
    const uint32_t bits = bits_of(value);
    high = static_cast<uint16_t>((bits + 0x8000u) >> 16);
    remainder = static_cast<uint16_t>(bits);  // modulo 2^16, bits - (high << 16)
  }
};

// ---- The loop ----

template <int N, class Rule, class Grad, class Param>
struct Group {
  using Element = typename Param::Element;
  Several<typename Param::Raw, N> p;
  Several<typename Grad::Raw, N> g;
  Several<Element, N> m, v;
  Several<uint16_t, N> beside;

  template <class T>
  static constexpr int kWidth = sizeof(T) * N < 16 ? sizeof(T) * N : 16;  // bytes of a word

  __device__ __forceinline__ void load(const DistlibStepRow& row, uint64_t i) {
    p = load_several<kWidth<typename Param::Raw>, typename Param::Raw, N>(at<typename Param::Raw>(row.param, i));
    g = load_several<kWidth<typename Grad::Raw>, typename Grad::Raw, N>(at<typename Grad::Raw>(row.grad, i));
    if constexpr (Rule::kFirst) m = load_several<kWidth<Element>, Element, N>(at<Element>(row.m, i));
    if constexpr (Rule::kSecond) v = load_several<kWidth<Element>, Element, N>(at<Element>(row.v, i));
    if constexpr (Param::kReadsBeside) beside = load_several<kWidth<uint16_t>, uint16_t, N>(at<uint16_t>(row.copy, i));
  }

  __device__ __forceinline__ void step(const Rule& rule, const Param& param) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      Element value = Param::join(p.at[k], Param::kReadsBeside ? beside.at[k] : uint16_t{0});
      Element first = Rule::kFirst ? m.at[k] : Element(0), second = Rule::kSecond ? v.at[k] : Element(0);
      rule.step(value, static_cast<Element>(Grad::wide(g.at[k])), first, second);
      param.split(canonical(value), p.at[k], beside.at[k]);
      if (Rule::kFirst) m.at[k] = canonical(first);
      if (Rule::kSecond) v.at[k] = canonical(second);
    }
  }

  __device__ __forceinline__ void store(const Param& param, const DistlibStepRow& row, uint64_t i) const {
    store_several<kWidth<typename Param::Raw>>(at<typename Param::Raw>(row.param, i), p);
    if constexpr (Rule::kFirst) store_several<kWidth<Element>>(at<Element>(row.m, i), m);
    if constexpr (Rule::kSecond) store_several<kWidth<Element>>(at<Element>(row.v, i), v);
    if (param.writes_beside()) store_several<kWidth<uint16_t>>(at<uint16_t>(row.copy, i), beside);
  }

  template <class T>
  static __device__ __forceinline__ T* at(uint64_t address, uint64_t i) {
    return global<T>(address) + i;
  }

  // Whether all arrays are aligned for loads and stores of such groups, from element i on.
  static __device__ __forceinline__ bool fits(const DistlibStepRow& row, const Param& param, uint64_t i) {
    return is_aligned(at<typename Param::Raw>(row.param, i), kWidth<typename Param::Raw>) &&
           is_aligned(at<typename Grad::Raw>(row.grad, i), kWidth<typename Grad::Raw>) &&
           (!Rule::kFirst || is_aligned(at<Element>(row.m, i), kWidth<Element>)) &&
           (!Rule::kSecond || is_aligned(at<Element>(row.v, i), kWidth<Element>)) &&
           (!param.writes_beside() || is_aligned(at<uint16_t>(row.copy, i), kWidth<uint16_t>));
  }
};

// Four blocks to a processor, of which some compute while others wait for memory; fp32 needs no more registers.
template <class Rule, class Grad, class Param>
__global__ __launch_bounds__(kThreads, 4) void step_kernel(const DistlibStepRow* rows, const int32_t* chunk_rows,
                                                           uint64_t chunk, int64_t copy,
                                                           const DistlibScalars* scalars) {
  if (scalars->skip != 0) return;
  constexpr int kWide = sizeof(typename Param::Element) == 8 ? 2 : 4;
  using Wide = Group<kWide, Rule, Grad, Param>;
  using One = Group<1, Rule, Grad, Param>;
  const Rule rule(*scalars);
  const Param param = {copy};
  const DistlibStepRow row = rows[chunk_rows[blockIdx.x]];
  const Chunk part = chunk_of(row, chunk);
  const uint64_t end = part.begin + part.count;
  const auto* const first = reinterpret_cast<const typename Param::Raw*>(row.param) + part.begin;
  const uint64_t head = head_of(first, sizeof(*first) * kWide, part.count), begin = part.begin + head;
  const auto single = [&](uint64_t i) {
    One one;
    one.load(row, i);
    one.step(rule, param);
    one.store(param, row, i);
  };
  if (!Wide::fits(row, param, begin)) {  // arrays that no shift aligns together
    for (uint64_t i = part.begin + threadIdx.x; i < end; i += kThreads) single(i);
    return;
  }
  if (threadIdx.x < head) single(part.begin + threadIdx.x);
  const uint64_t groups = (end - begin) / kWide, done = begin + groups * kWide;
  uint64_t group = threadIdx.x;
  for (; group + kThreads < groups; group += 2 * kThreads) {
    const uint64_t i = begin + group * kWide, j = i + kThreads * kWide;
    Wide one, other;
    one.load(row, i);
    other.load(row, j);
    one.step(rule, param);
    one.store(param, row, i);
    other.step(rule, param);
    other.store(param, row, j);
  }
  if (group < groups) {
    Wide one;
    one.load(row, begin + group * kWide);
    one.step(rule, param);
    one.store(param, row, begin + group * kWide);
  }
  if (threadIdx.x < end - done) single(done + threadIdx.x);
}

// ---- Which kernel ----

struct Table {
  const DistlibStepRow* rows;
  const int32_t* chunk_rows;
  unsigned chunks;
  uint64_t chunk;
  int64_t copy;
  const DistlibScalars* scalars;
  cudaStream_t stream;
};

template <class Rule, class Grad, class Param>
int start(const Table& t) {
  DL_LAUNCH((step_kernel<Rule, Grad, Param>), t.chunks, kThreads, t.stream, t.rows, t.chunk_rows, t.chunk, t.copy,
            t.scalars);
  return launched();
}

template <class Grad, class Param>
int start_rule(const Table& t, int64_t rule, bool has_m) {
  using T = typename Param::Element;
  switch (rule) {
    case 0:
      return start<AdamW<T>, Grad, Param>(t);
    case 1:
      return has_m ? start<Sgd<T, true>, Grad, Param>(t) : start<Sgd<T, false>, Grad, Param>(t);
    case 2:
      return start<Lion<T>, Grad, Param>(t);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace distlib

DISTLIB_API int64_t distlib_cuda_step(const void* rows, const void* chunk_rows, int64_t chunks, int64_t chunk,
                                      int64_t rule, int64_t param, int64_t grad, int64_t copy, int64_t has_m,
                                      const void* scalars, void* stream) {
  using namespace distlib::cuda;
  if (chunks < 0 || chunks > 0x7fffffff || chunk <= 0 || chunk % 16 != 0) return cudaErrorInvalidValue;
  if (chunks == 0) return 0;
  const Table table = {static_cast<const DistlibStepRow*>(rows),
                       static_cast<const int32_t*>(chunk_rows),
                       static_cast<unsigned>(chunks),
                       static_cast<uint64_t>(chunk),
                       copy,
                       static_cast<const DistlibScalars*>(scalars),
                       as_stream(stream)};
  if (param == CODE_F32 && (copy == 0 || copy == CODE_F16 || copy == CODE_BF16)) {
    if (grad == CODE_F32) return start_rule<F32, Whole<F32>>(table, rule, has_m != 0);
    if (grad == CODE_F16) return start_rule<F16, Whole<F32>>(table, rule, has_m != 0);
    if (grad == CODE_BF16) return start_rule<BF16, Whole<F32>>(table, rule, has_m != 0);
  }
  if (param == CODE_F64 && grad == CODE_F64 && copy == 0) return start_rule<F64, Whole<F64>>(table, rule, has_m != 0);
  if (param == CODE_BF16 && rule == 0) {
    if (grad == CODE_F32) return start<AdamW<float>, F32, Halves>(table);
    if (grad == CODE_F16) return start<AdamW<float>, F16, Halves>(table);
    if (grad == CODE_BF16) return start<AdamW<float>, BF16, Halves>(table);
  }
  return cudaErrorInvalidValue;
}
