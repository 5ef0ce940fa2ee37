// The body of every optimizer kernel, compiled once per instruction set: included by kernels_<isa>.cpp inside an
// anonymous namespace after kernels.inl, whose VectorOf and load it uses, and nowhere else.
//
// The including file gives DISTLIB_VECTOR_BYTES (0: one element at a time), Floats, load_half, to_half, load_bf16,
// to_bf16 and root. Vectors are the compilers' own vector types, whose operators work lane by lane exactly as on
// scalars: the same text below is the scalar reference and the AVX-512 kernel. fp64 goes one element at a time.

template <class Value>
DISTLIB_INLINE void store(void* to, Value value) {
  __builtin_memcpy(to, &value, sizeof value);
}

DISTLIB_INLINE double root(double value) {
  return __builtin_sqrt(value);
}

// ---- Types: the parameters', the gradients', the compute copy's ----

struct Single {
  using Element = float;
  using Value = Floats;
  using Bits = VectorOf<uint32_t, DISTLIB_VECTOR_BYTES>::type;
  static constexpr size_t kLanes = sizeof(Floats) / sizeof(float);
  static constexpr uint32_t kQuietNan = 0x7fc00000u;
};

struct Double {
  using Element = double;
  using Value = double;
  using Bits = uint64_t;
  static constexpr size_t kLanes = 1;
  static constexpr uint64_t kQuietNan = 0x7ff8000000000000u;
};

// Which operand's NaN survives depends on how a compiler orders them: one NaN makes all instruction sets agree.
template <class P>
DISTLIB_INLINE typename P::Value canonical_nan(typename P::Value value) {
  using Bits = typename P::Bits;
  const Bits bits = load<Bits>(&value);
  const Bits result = (Bits)(value != value ? Bits{} + P::kQuietNan : bits);
  return load<typename P::Value>(&result);
}

struct GradF32 {
  using Param = Single;
  using Element = float;
  static DISTLIB_INLINE Floats read(const void* from) { return load<Floats>(from); }
};
struct GradF16 {
  using Param = Single;
  using Element = uint16_t;
  static DISTLIB_INLINE Floats read(const void* from) { return load_half(from); }
};
struct GradBF16 {
  using Param = Single;
  using Element = uint16_t;
  static DISTLIB_INLINE Floats read(const void* from) { return load_bf16(from); }
};
struct GradF64 {
  using Param = Double;
  using Element = double;
  static DISTLIB_INLINE double read(const void* from) { return load<double>(from); }
};

struct NoCopy {
  static constexpr size_t kBytes = 0;
  template <class Value>
  static DISTLIB_INLINE void write(void*, Value) {}
};
struct CopyBF16 {
  static constexpr size_t kBytes = 2;
  static DISTLIB_INLINE void write(void* to, Floats value) { store(to, to_bf16(value)); }
};
struct CopyF16 {
  static constexpr size_t kBytes = 2;
  static DISTLIB_INLINE void write(void* to, Floats value) { store(to, to_half(value)); }
};

// ---- Rules: see Hyper. `step` takes the gradient as it was read. ----

// from + weight (to - from), exact for a weight of 1, too; `rest` is 1 - weight.
template <class Value, class T>
DISTLIB_INLINE Value towards(Value from, Value to, T weight, T rest) {
  const Value way = to - from;
  return weight < T(0.5) ? from + weight * way : to - rest * way;
}

template <class T>
struct AdamWStep {
  static constexpr bool kFirst = true, kSecond = true;
  T scale, l2, decay, weight1, rest1, weight2, rest2, rate, root_scale, eps;
  explicit DISTLIB_INLINE AdamWStep(const Hyper& h)
      : scale(T(h.scale)),
        l2(T(h.l2)),
        decay(T(h.decay)),
        weight1(T(1 - h.beta1)),
        rest1(T(h.beta1)),
        weight2(T(1 - h.beta2)),
        rest2(T(h.beta2)),
        rate(T(h.rate)),
        root_scale(T(h.root_scale)),
        eps(T(h.eps)) {}

  template <class Value>
  DISTLIB_INLINE void step(Value& p, Value g, Value& m, Value& v) const {
    g = scale * g;
    if (l2 != 0) g = g + l2 * p;
    p = decay * p;
    m = towards(m, g, weight1, rest1);
    v = rest2 * v + (weight2 * g) * g;
    p = p - (rate * m) / (root(v) * root_scale + eps);
  }
};

template <class T, bool Momentum>
struct SGDStep {
  static constexpr bool kFirst = Momentum, kSecond = false;
  T scale, l2, rate, momentum, keep;
  bool nesterov, first;
  explicit DISTLIB_INLINE SGDStep(const Hyper& h)
      : scale(T(h.scale)),
        l2(T(h.l2)),
        rate(T(h.rate)),
        momentum(T(h.momentum)),
        keep(T(1 - h.dampening)),
        nesterov(h.nesterov),
        first(h.first) {}

  template <class Value>
  DISTLIB_INLINE void step(Value& p, Value g, Value& m, Value&) const {
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
struct LionStep {
  static constexpr bool kFirst = true, kSecond = false;
  T scale, l2, weight1, rest1, weight2, rest2, rate;
  explicit DISTLIB_INLINE LionStep(const Hyper& h)
      : scale(T(h.scale)),
        l2(T(h.l2)),
        weight1(T(1 - h.beta1)),
        rest1(T(h.beta1)),
        weight2(T(1 - h.beta2)),
        rest2(T(h.beta2)),
        rate(T(h.rate)) {}

  template <class Value>
  DISTLIB_INLINE void step(Value& p, Value g, Value& m, Value&) const {
    g = scale * g;
    const Value between = towards(m, g, weight1, rest1);
    const Value zero = Value{}, up = zero + T(1), down = zero - T(1);
    const Value sign = between > zero ? up : (between < zero ? down : between);
    p = p - rate * (sign + l2 * p);
    m = towards(m, g, weight2, rest2);
  }
};

// ---- The one loop ----

// Measured and left out: software prefetch, 512 to 4,096 bytes ahead (up to 1.5 times slower); 8 vectors at once
// (slower). Stores that bypass the caches have no place here: what is written was just read.

// N neighbouring vectors: several cache lines of one array are read before the next array's, which memory likes better.
template <class Step, class Grad, class Copy, size_t N>
DISTLIB_INLINE void step_vectors(const Step& rule, char* param, const char* grad, char* m, char* v, char* copy) {
  using P = typename Grad::Param;
  using Value = typename P::Value;
  constexpr size_t kBytes = sizeof(Value), kGrad = sizeof(typename Grad::Element) * P::kLanes;
  Value p[N], g[N], first[N] = {}, second[N] = {};
#pragma GCC unroll 8
  for (size_t k = 0; k < N; ++k) p[k] = load<Value>(param + k * kBytes);
#pragma GCC unroll 8
  for (size_t k = 0; k < N; ++k) g[k] = Grad::read(grad + k * kGrad);
  if constexpr (Step::kFirst) {
#pragma GCC unroll 8
    for (size_t k = 0; k < N; ++k) first[k] = load<Value>(m + k * kBytes);
  }
  if constexpr (Step::kSecond) {
#pragma GCC unroll 8
    for (size_t k = 0; k < N; ++k) second[k] = load<Value>(v + k * kBytes);
  }
#pragma GCC unroll 8
  for (size_t k = 0; k < N; ++k) {
    rule.step(p[k], g[k], first[k], second[k]);
    p[k] = canonical_nan<P>(p[k]);
  }
#pragma GCC unroll 8
  for (size_t k = 0; k < N; ++k) {
    store(param + k * kBytes, p[k]);
    Copy::write(copy + k * P::kLanes * Copy::kBytes, p[k]);
  }
  if constexpr (Step::kFirst) {
#pragma GCC unroll 8
    for (size_t k = 0; k < N; ++k) store(m + k * kBytes, canonical_nan<P>(first[k]));
  }
  if constexpr (Step::kSecond) {
#pragma GCC unroll 8
    for (size_t k = 0; k < N; ++k) store(v + k * kBytes, canonical_nan<P>(second[k]));
  }
}

constexpr size_t kAtOnce = 4;  // vectors of an array

template <class Step, class Grad, class Copy>
void step_segment(const Hyper& hyper, const Segment& segment) {
  using P = typename Grad::Param;
  constexpr size_t kLanes = P::kLanes, kSize = sizeof(typename P::Element), kGrad = sizeof(typename Grad::Element);
  const Step rule(hyper);
  char *p = static_cast<char*>(segment.param), *m = static_cast<char*>(segment.m), *v = static_cast<char*>(segment.v);
  char* copy = static_cast<char*>(segment.copy);
  const char* g = static_cast<const char*>(segment.grad);
  const size_t count = segment.count;
  size_t i = 0;
  const auto first = [&](size_t index) { return Step::kFirst ? m + index * kSize : m; };
  const auto second = [&](size_t index) { return Step::kSecond ? v + index * kSize : v; };
  for (; i + kAtOnce * kLanes <= count; i += kAtOnce * kLanes)
    step_vectors<Step, Grad, Copy, kAtOnce>(rule, p + i * kSize, g + i * kGrad, first(i), second(i),
                                            copy + i * Copy::kBytes);
  for (; i + kLanes <= count; i += kLanes)
    step_vectors<Step, Grad, Copy, 1>(rule, p + i * kSize, g + i * kGrad, first(i), second(i), copy + i * Copy::kBytes);
  if (i == count) return;
  // Fewer elements than a vector has: the same arithmetic on vectors padded with zeros.
  typename P::Element params[kLanes] = {}, firsts[kLanes] = {}, seconds[kLanes] = {};
  typename Grad::Element grads[kLanes] = {};
  char copies[kLanes * 2] = {};
  const size_t few = count - i;
  __builtin_memcpy(params, p + i * kSize, few * kSize);
  __builtin_memcpy(grads, g + i * kGrad, few * kGrad);
  if constexpr (Step::kFirst) __builtin_memcpy(firsts, m + i * kSize, few * kSize);
  if constexpr (Step::kSecond) __builtin_memcpy(seconds, v + i * kSize, few * kSize);
  step_vectors<Step, Grad, Copy, 1>(rule, reinterpret_cast<char*>(params), reinterpret_cast<const char*>(grads),
                                    reinterpret_cast<char*>(firsts), reinterpret_cast<char*>(seconds), copies);
  __builtin_memcpy(p + i * kSize, params, few * kSize);
  if constexpr (Step::kFirst) __builtin_memcpy(m + i * kSize, firsts, few * kSize);
  if constexpr (Step::kSecond) __builtin_memcpy(v + i * kSize, seconds, few * kSize);
  if constexpr (Copy::kBytes != 0) __builtin_memcpy(copy + i * Copy::kBytes, copies, few * Copy::kBytes);
}

template <class Grad, class Copy>
void step_sgd(const Hyper& hyper, const Segment& segment) {
  using T = typename Grad::Param::Element;
  if (hyper.momentum != 0) {
    step_segment<SGDStep<T, true>, Grad, Copy>(hyper, segment);
  } else {
    step_segment<SGDStep<T, false>, Grad, Copy>(hyper, segment);
  }
}

// ---- Sums of squares ----

template <class Grad>
void square(double* lanes, size_t lane, const void* from, size_t count) {
  using P = typename Grad::Param;
  constexpr size_t kSize = sizeof(typename Grad::Element), kLanes = P::kLanes;
  const char* at = static_cast<const char*>(from);
  const auto single = [&](size_t i) {
    typename Grad::Element padded[kLanes] = {};
    __builtin_memcpy(padded, at + i * kSize, kSize);
    const auto value = Grad::read(padded);
    typename P::Element element;
    __builtin_memcpy(&element, &value, sizeof element);
    lanes[(lane + i) % kSquareLanes] += static_cast<double>(element) * static_cast<double>(element);
  };
  size_t i = 0;
  for (; i < count && (lane + i) % kSquareLanes != 0; ++i) single(i);
  if constexpr (kLanes > 1) {
    // Vectors of fp64 as wide as those of fp32, each from half of one: conversions that are one instruction.
    constexpr size_t kHalf = kLanes / 2, kVectors = kSquareLanes / kHalf;
    using Half = typename VectorOf<float, kHalf * sizeof(float)>::type;
    using Doubles = typename VectorOf<double, kHalf * sizeof(double)>::type;
    Doubles sums[kVectors];
    __builtin_memcpy(sums, lanes, sizeof sums);
    for (; i + kSquareLanes <= count; i += kSquareLanes) {
#pragma GCC unroll 16
      for (size_t k = 0; k < kVectors; k += 2) {
        const auto values = Grad::read(at + (i + k * kHalf) * kSize);
        Half halves[2];
        __builtin_memcpy(halves, &values, sizeof halves);
#pragma GCC unroll 2
        for (size_t h = 0; h < 2; ++h) {
          const Doubles value = __builtin_convertvector(halves[h], Doubles);
          sums[k + h] = sums[k + h] + value * value;
        }
      }
    }
    __builtin_memcpy(lanes, sums, sizeof sums);
  } else {
    for (; i + kSquareLanes <= count; i += kSquareLanes) {
      for (size_t k = 0; k < kSquareLanes; ++k) {
        const auto value = static_cast<double>(Grad::read(at + (i + k) * kSize));
        lanes[k] += value * value;
      }
    }
  }
  for (; i < count; ++i) single(i);
}

// ---- The table ----

template <class Grad, class Element, class Copy>
constexpr void fill(OptimizerTable& table, DType grad, distlib::Copy copy) {
  const int g = static_cast<int>(grad), c = static_cast<int>(copy);
  table.step[static_cast<int>(Rule::ADAMW)][g][c] = step_segment<AdamWStep<Element>, Grad, Copy>;
  table.step[static_cast<int>(Rule::SGD)][g][c] = step_sgd<Grad, Copy>;
  table.step[static_cast<int>(Rule::LION)][g][c] = step_segment<LionStep<Element>, Grad, Copy>;
  table.square[g] = square<Grad>;
}

template <class Grad>
constexpr void fill_single(OptimizerTable& table, DType grad) {
  fill<Grad, float, NoCopy>(table, grad, distlib::Copy::NONE);
  fill<Grad, float, CopyBF16>(table, grad, distlib::Copy::BF16);
  fill<Grad, float, CopyF16>(table, grad, distlib::Copy::F16);
}

constexpr OptimizerTable make_optimizers() {
  OptimizerTable table = {};
  fill_single<GradF32>(table, DType::F32);
  fill_single<GradF16>(table, DType::F16);
  fill_single<GradBF16>(table, DType::BF16);
  fill<GradF64, double, NoCopy>(table, DType::F64, distlib::Copy::NONE);
  return table;
}
