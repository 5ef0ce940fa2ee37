// The body of every kernel, compiled once per instruction set: included by kernels_<isa>.cpp inside an anonymous
// namespace, and nowhere else.
//
// The including file gives DISTLIB_VECTOR_BYTES (0: one element at a time), load_half, to_half, load_bf16, to_bf16,
// kCanBypassCaches, bypassing_store and bypass_fence. Vectors are the compilers' own vector types, whose +, *, <, ?:
// work lane by lane exactly as on scalars: the same text below is the scalar reference and the AVX-512 kernel.
//
//              group of 4 vectors
//   srcs[0]  |####|....            For each group: read it from every source in rank order, accumulating in
//   srcs[1]  |####|....            registers, then write it to every destination. A line is read and (in place)
//   srcs[2]  |####|....            written while it is in L1.
//
// Measured and left out: cache-sized blocks in place of register-sized groups (1.15 to 2 times slower), software
// prefetch (up to 1.2 times slower), copies of the loop for 2, 3 and 4 sources (no difference, in cache or out of it).

#define DISTLIB_INLINE __attribute__((always_inline)) inline

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T>
struct VectorOf<T, 0> {
  typedef T type;
};

template <class To, class From>
DISTLIB_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "only a change of type");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
DISTLIB_INLINE T load(const void* from) {
  T value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// ---- Formats: how an element lies in memory (Stored), how it is accumulated (Acc), how it is ordered (Ordered) ----

template <class Elem, class AccElem, class OrderedElem, int Bytes = DISTLIB_VECTOR_BYTES>
struct Plain {
  using Element = Elem;
  using Acc = typename VectorOf<AccElem, Bytes>::type;
  using Ordered = typename VectorOf<OrderedElem, Bytes>::type;
  using Stored = Acc;
  static constexpr size_t kLanes = Bytes ? Bytes / sizeof(AccElem) : 1;
  static DISTLIB_INLINE Acc read(const void* from) { return load<Acc>(from); }
  static DISTLIB_INLINE Stored pack(Acc value) { return value; }
};

// Different ways to an invalid result give different NaNs, and which operand's NaN survives depends on how a compiler
// orders them: one canonical NaN makes all instruction sets agree.
template <class Bits, class Acc>
DISTLIB_INLINE Acc canonical_nan(Acc value, Bits quiet_nan) {
  return bits_as<Acc>((Bits)(value != value ? quiet_nan : bits_as<Bits>(value)));
}

template <class Elem, class BitsElem, BitsElem QuietNan>
struct Floating : Plain<Elem, Elem, Elem> {
  using Base = Plain<Elem, Elem, Elem>;
  using Bits = typename VectorOf<BitsElem, DISTLIB_VECTOR_BYTES>::type;
  static DISTLIB_INLINE typename Base::Acc finish(typename Base::Acc value, int divisor) {
    if (divisor > 1) value = value / static_cast<Elem>(divisor);
    return canonical_nan<Bits>(value, Bits{} + QuietNan);
  }
};
using F32 = Floating<float, uint32_t, 0x7fc00000u>;
using F64 = Floating<double, uint64_t, 0x7ff8000000000000u>;

struct F16 : F32 {
  using Element = uint16_t;
  using Stored = VectorOf<uint16_t, DISTLIB_VECTOR_BYTES / 2>::type;
  static DISTLIB_INLINE Acc read(const void* from) { return load_half(from); }
  static DISTLIB_INLINE Stored pack(Acc value) { return to_half(value); }
};

struct BF16 : F32 {
  using Element = uint16_t;
  using Stored = VectorOf<uint16_t, DISTLIB_VECTOR_BYTES / 2>::type;
  static DISTLIB_INLINE Acc read(const void* from) { return load_bf16(from); }
  static DISTLIB_INLINE Stored pack(Acc value) { return to_bf16(value); }
};

// Integers are added and multiplied as unsigned, where wrapping is defined, and compared and divided as what they are.
template <class Elem, class UnsignedElem>
struct Integer : Plain<Elem, UnsignedElem, Elem> {
  using Base = Plain<Elem, UnsignedElem, Elem>;
  static DISTLIB_INLINE typename Base::Acc finish(typename Base::Acc value, int divisor) {
    if (divisor <= 1) return value;
    Elem lanes[Base::kLanes];
    __builtin_memcpy(lanes, &value, sizeof value);
    for (size_t lane = 0; lane < Base::kLanes; ++lane) lanes[lane] = static_cast<Elem>(lanes[lane] / divisor);
    return load<typename Base::Acc>(lanes);
  }
};
using I8 = Integer<int8_t, uint8_t>;
using I16 = Integer<int16_t, uint16_t>;
using I32 = Integer<int32_t, uint32_t>;
using I64 = Integer<int64_t, uint64_t>;
using U8 = Integer<uint8_t, uint8_t>;

struct Bool : Plain<uint8_t, uint8_t, uint8_t> {
  static DISTLIB_INLINE Acc read(const void* from) { return (Acc)((load<Acc>(from) != 0) & 1); }
  static DISTLIB_INLINE Acc finish(Acc value, int) { return value; }
};

// ---- Operators ----

struct Sum {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    return (Acc)(a + b);
  }
};

struct Product {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    if constexpr (F::kLanes == 1 && sizeof(Acc) < sizeof(int)) {
      return (Acc)(static_cast<unsigned>(a) * static_cast<unsigned>(b));  // else promoted to int: may overflow
    } else {
      return a * b;
    }
  }
};

// (b != b): a NaN that comes later is taken; one that is already there is never less or greater, so it stays.
struct Min {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    const auto x = (typename F::Ordered)a, y = (typename F::Ordered)b;
    return (Acc)(((y < x) | (y != y)) ? y : x);
  }
};

struct Max {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    const auto x = (typename F::Ordered)a, y = (typename F::Ordered)b;
    return (Acc)(((y > x) | (y != y)) ? y : x);
  }
};

struct And {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    return (Acc)(a & b);
  }
};

struct Or {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    return (Acc)(a | b);
  }
};

struct Xor {
  template <class F, class Acc>
  static DISTLIB_INLINE Acc apply(Acc a, Acc b) {
    return (Acc)(a ^ b);
  }
};

// ---- The one loop ----

constexpr size_t kLine = 64;

// `Vectors` vectors starting `offset` bytes into every source and destination.
template <class F, class Op, int Vectors>
DISTLIB_INLINE void reduce_group(void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t offset,
                                 int divisor, bool bypass) {
  using Acc = typename F::Acc;
  using Stored = typename F::Stored;
  Acc acc[Vectors];
  const char* first = static_cast<const char*>(srcs[0]) + offset;
  for (int v = 0; v < Vectors; ++v) acc[v] = F::read(first + v * sizeof(Stored));
  for (int k = 1; k < nsrc; ++k) {
    const char* next = static_cast<const char*>(srcs[k]) + offset;
    for (int v = 0; v < Vectors; ++v) acc[v] = Op::template apply<F>(acc[v], F::read(next + v * sizeof(Stored)));
  }
  Stored result[Vectors];
  for (int v = 0; v < Vectors; ++v) result[v] = F::pack(F::finish(acc[v], divisor));
  for (int j = 0; j < ndst; ++j) {
    char* to = static_cast<char*>(dsts[j]) + offset;
    for (int v = 0; v < Vectors; ++v) {
      if (bypass) {
        bypassing_store(to + v * sizeof(Stored), result[v]);
      } else {
        __builtin_memcpy(to + v * sizeof(Stored), &result[v], sizeof(Stored));
      }
    }
  }
}

// Fewer elements than a vector has: the same arithmetic on a vector padded with zeros.
template <class F, class Op>
__attribute__((noinline)) void reduce_few(void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t offset,
                                          size_t bytes, int divisor) {
  unsigned char padded[sizeof(typename F::Stored)] = {};
  __builtin_memcpy(padded, static_cast<const char*>(srcs[0]) + offset, bytes);
  auto acc = F::read(padded);
  for (int k = 1; k < nsrc; ++k) {
    __builtin_memcpy(padded, static_cast<const char*>(srcs[k]) + offset, bytes);
    acc = Op::template apply<F>(acc, F::read(padded));
  }
  const auto result = F::pack(F::finish(acc, divisor));
  for (int j = 0; j < ndst; ++j) __builtin_memcpy(static_cast<char*>(dsts[j]) + offset, &result, bytes);
}

template <class F, class Op>
void reduce_kernel(void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t count, int divisor,
                   bool bypass_caches) {
  constexpr size_t kVector = sizeof(typename F::Stored);
  constexpr int kVectors = 4;
  const size_t bytes = count * sizeof(typename F::Element);
  bool bypass = kCanBypassCaches && bypass_caches;
  for (int j = 1; j < ndst; ++j)  // stores that bypass caches must be aligned: all of them, by one shift
    bypass = bypass && (reinterpret_cast<uintptr_t>(dsts[j]) - reinterpret_cast<uintptr_t>(dsts[0])) % kLine == 0;

  size_t offset = 0;
  if (bytes >= 16 * kLine) {
    const size_t head = -reinterpret_cast<uintptr_t>(dsts[0]) % kLine;
    while (offset < head) {
      const size_t part = head - offset < kVector ? head - offset : kVector;
      reduce_few<F, Op>(dsts, ndst, srcs, nsrc, offset, part, divisor);
      offset += part;
    }
  } else {
    bypass = false;
  }
  for (; offset + kVectors * kVector <= bytes; offset += kVectors * kVector)
    reduce_group<F, Op, kVectors>(dsts, ndst, srcs, nsrc, offset, divisor, bypass);
  for (; offset + kVector <= bytes; offset += kVector)
    reduce_group<F, Op, 1>(dsts, ndst, srcs, nsrc, offset, divisor, bypass);
  if (offset < bytes) reduce_few<F, Op>(dsts, ndst, srcs, nsrc, offset, bytes - offset, divisor);
  if (bypass) bypass_fence();
}

void large_copy(void* dst, const void* src, size_t bytes) {
  reduce_kernel<U8, Or>(&dst, 1, &src, 1, bytes, 0, true);
}

// ---- The table ----

template <class F>
constexpr void fill_arithmetic(KernelTable::Reduce* ops) {
  ops[static_cast<int>(RedOp::SUM)] = reduce_kernel<F, Sum>;
  ops[static_cast<int>(RedOp::AVG)] = reduce_kernel<F, Sum>;  // told apart by the divisor
  ops[static_cast<int>(RedOp::MIN)] = reduce_kernel<F, Min>;
  ops[static_cast<int>(RedOp::MAX)] = reduce_kernel<F, Max>;
  ops[static_cast<int>(RedOp::PRODUCT)] = reduce_kernel<F, Product>;
}

template <class F>
constexpr void fill_integer(KernelTable::Reduce* ops) {
  fill_arithmetic<F>(ops);
  ops[static_cast<int>(RedOp::BAND)] = reduce_kernel<F, And>;
  ops[static_cast<int>(RedOp::BOR)] = reduce_kernel<F, Or>;
  ops[static_cast<int>(RedOp::BXOR)] = reduce_kernel<F, Xor>;
}

constexpr void fill_bool(KernelTable::Reduce* ops) {
  ops[static_cast<int>(RedOp::SUM)] = reduce_kernel<Bool, Or>;
  ops[static_cast<int>(RedOp::MAX)] = reduce_kernel<Bool, Or>;
  ops[static_cast<int>(RedOp::BOR)] = reduce_kernel<Bool, Or>;
  ops[static_cast<int>(RedOp::PRODUCT)] = reduce_kernel<Bool, And>;
  ops[static_cast<int>(RedOp::MIN)] = reduce_kernel<Bool, And>;
  ops[static_cast<int>(RedOp::BAND)] = reduce_kernel<Bool, And>;
  ops[static_cast<int>(RedOp::BXOR)] = reduce_kernel<Bool, Xor>;
}

constexpr KernelTable make_table(const char* name) {
  KernelTable table = {name, {}, kCanBypassCaches ? large_copy : nullptr};
  fill_arithmetic<F32>(table.reduce[static_cast<int>(DType::F32)]);
  fill_arithmetic<F64>(table.reduce[static_cast<int>(DType::F64)]);
  fill_arithmetic<F16>(table.reduce[static_cast<int>(DType::F16)]);
  fill_arithmetic<BF16>(table.reduce[static_cast<int>(DType::BF16)]);
  fill_integer<I8>(table.reduce[static_cast<int>(DType::I8)]);
  fill_integer<I16>(table.reduce[static_cast<int>(DType::I16)]);
  fill_integer<I32>(table.reduce[static_cast<int>(DType::I32)]);
  fill_integer<I64>(table.reduce[static_cast<int>(DType::I64)]);
  fill_integer<U8>(table.reduce[static_cast<int>(DType::U8)]);
  fill_bool(table.reduce[static_cast<int>(DType::BOOL)]);
  return table;
}
