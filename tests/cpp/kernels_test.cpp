// Every kernel of every instruction set gives, bit for bit, what an element-by-element oracle gives.
//
//   g++ -O3 -std=c++17 -ffp-contract=off -Icsrc/cpu tests/cpp/kernels_test.cpp csrc/cpu/kernels*.cpp -o kernels_test
//   ./kernels_test     exit status 1, and the first failures on stderr, if any
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "half.hpp"
#include "kernels.hpp"

using namespace distlib;

namespace {

int failures = 0;

__attribute__((format(printf, 1, 2))) void fail(const char* format, ...) {
  if (++failures > 20) return;
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fputc('\n', stderr);
}

const char* const kDTypeNames[] = {"f32", "f64", "f16", "bf16", "i8", "i32", "i64", "u8", "bool", "i16"};
const char* const kOpNames[] = {"sum", "avg", "min", "max", "product", "band", "bor", "bxor"};
const char* const kIsas[] = {"scalar", "neon", "avx2", "avx512"};
const size_t kLine = 64;  // a cache line; also the bytes around every destination that must not change

// Buffers start on a line, so that a test chooses every misalignment.
template <class T>
struct OnLine {
  using value_type = T;
  OnLine() = default;
  template <class U>
  OnLine(const OnLine<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{kLine})); }
  void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{kLine}); }
  bool operator==(const OnLine&) const { return true; }
  bool operator!=(const OnLine&) const { return false; }
};
using Bytes = std::vector<uint8_t, OnLine<uint8_t>>;

// ---- The oracle: conversions by real arithmetic (half.hpp works on bits), operators one element at a time ----

// A float format with `precision` significant bits and smallest exponent `least`, decoded and encoded through double.
double decode(uint16_t bits, int precision, int least) {
  const int mantissa_bits = precision - 1, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits & 0x7fff) >> mantissa_bits, top = 0x7fff >> mantissa_bits;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == top) return mantissa ? std::nan("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, least - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), least + exponent - 1 - mantissa_bits);
}

uint16_t encode(double value, int precision, int least) {
  const int mantissa_bits = precision - 1, infinity = (0x7fff >> mantissa_bits) << mantissa_bits;
  if (std::isnan(value)) return static_cast<uint16_t>(infinity | 1 << (mantissa_bits - 1));
  const int sign = std::signbit(value) ? 0x8000 : 0;
  value = std::fabs(value);
  int exponent = 0;
  std::frexp(value, &exponent);
  if (std::isinf(value) || exponent > 2 - least) return static_cast<uint16_t>(sign | infinity);
  const int quantum = std::max(value == 0 ? least : exponent - 1, least) - mantissa_bits;
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(value, -quantum)));  // ties to even
  const int biased = quantum + mantissa_bits - least;
  return static_cast<uint16_t>(sign | std::min((biased << mantissa_bits) + steps, infinity));
}

double decode16(uint16_t bits, DType dtype) {
  return dtype == DType::F16 ? decode(bits, 11, -14) : decode(bits, 8, -126);
}
uint16_t encode16(double value, DType dtype) {
  return dtype == DType::F16 ? encode(value, 11, -14) : encode(value, 8, -126);
}

template <class T>
T get(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
T combine_floats(T a, T b, RedOp op) {
  switch (op) {
    case RedOp::MIN:
      return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : b < a ? b : a;
    case RedOp::MAX:
      return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : b > a ? b : a;
    case RedOp::PRODUCT:
      return a * b;
    default:
      return a + b;
  }
}

// In 128 bits nothing overflows; the result is cut to the element's width, which is what wrapping means.
__extension__ using Wide = __int128;

Wide combine_integers(Wide a, Wide b, RedOp op) {
  switch (op) {
    case RedOp::MIN:
      return std::min(a, b);
    case RedOp::MAX:
      return std::max(a, b);
    case RedOp::PRODUCT:
      return a * b;
    case RedOp::BAND:
      return a & b;
    case RedOp::BOR:
      return a | b;
    case RedOp::BXOR:
      return a ^ b;
    default:
      return a + b;
  }
}

using Sources = std::vector<const uint8_t*>;
using Oracle = void (*)(const Sources& srcs, size_t i, DType dtype, RedOp op, int divisor, uint8_t* to);

template <class T>
void oracle_floats(const Sources& srcs, size_t i, DType, RedOp op, int divisor, uint8_t* to) {
  T acc = get<T>(srcs[0] + i * sizeof(T));
  for (size_t k = 1; k < srcs.size(); ++k) acc = combine_floats(acc, get<T>(srcs[k] + i * sizeof(T)), op);
  if (op == RedOp::AVG) acc /= static_cast<T>(divisor);
  if (std::isnan(acc)) acc = std::numeric_limits<T>::quiet_NaN();
  std::memcpy(to + i * sizeof(T), &acc, sizeof(T));
}

void oracle_16(const Sources& srcs, size_t i, DType dtype, RedOp op, int divisor, uint8_t* to) {
  const auto at = [&](size_t k) { return static_cast<float>(decode16(get<uint16_t>(srcs[k] + i * 2), dtype)); };
  float acc = at(0);
  for (size_t k = 1; k < srcs.size(); ++k) acc = combine_floats(acc, at(k), op);
  if (op == RedOp::AVG) acc /= static_cast<float>(divisor);
  const uint16_t bits = encode16(static_cast<double>(acc), dtype);
  std::memcpy(to + i * 2, &bits, 2);
}

template <class T>
void oracle_integers(const Sources& srcs, size_t i, DType, RedOp op, int divisor, uint8_t* to) {
  T acc = get<T>(srcs[0] + i * sizeof(T));
  for (size_t k = 1; k < srcs.size(); ++k)
    acc = static_cast<T>(combine_integers(acc, get<T>(srcs[k] + i * sizeof(T)), op));
  if (op == RedOp::AVG) acc = static_cast<T>(acc / divisor);
  std::memcpy(to + i * sizeof(T), &acc, sizeof(T));
}

void oracle_bool(const Sources& srcs, size_t i, DType, RedOp op, int, uint8_t* to) {
  bool acc = srcs[0][i] != 0;
  for (size_t k = 1; k < srcs.size(); ++k) {
    const bool next = srcs[k][i] != 0;
    if (op == RedOp::SUM || op == RedOp::MAX || op == RedOp::BOR) acc = acc || next;
    if (op == RedOp::PRODUCT || op == RedOp::MIN || op == RedOp::BAND) acc = acc && next;
    if (op == RedOp::BXOR) acc = acc != next;
  }
  to[i] = acc;
}

const Oracle kOracles[kDTypes] = {// in the order of DType
                                  oracle_floats<float>,
                                  oracle_floats<double>,
                                  oracle_16,
                                  oracle_16,
                                  oracle_integers<int8_t>,
                                  oracle_integers<int32_t>,
                                  oracle_integers<int64_t>,
                                  oracle_integers<uint8_t>,
                                  oracle_bool,
                                  oracle_integers<int16_t>};

void oracle(const Sources& srcs, size_t count, DType dtype, RedOp op, int divisor, uint8_t* to) {
  if (srcs.size() == 1 && dtype != DType::BOOL && !(op == RedOp::AVG && divisor > 1)) {
    if (count) std::memcpy(to, srcs[0], count * element_size(dtype));  // nothing computed: every bit kept
    return;
  }
  for (size_t i = 0; i < count; ++i) kOracles[static_cast<int>(dtype)](srcs, i, dtype, op, divisor, to);
}

// ---- Inputs: a third any bits, a third the hard values, a third small numbers ----

std::vector<uint64_t> hard_values(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return {0,           0x80000000u, 1,           0x80000001u, 0x007fffffu, 0x00800000u, 0x7f7fffffu,
              0xff7fffffu, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc12345u, 0x7f800001u, 0x3f800000u};
    case DType::F64:
      return {0,
              1ull << 63,
              1,
              0x000fffffffffffffull,
              0x7fefffffffffffffull,
              0xffefffffffffffffull,
              0x7ff0000000000000ull,
              0xfff0000000000000ull,
              0xfff8000000000123ull,
              0x7ff0000000000001ull};
    case DType::F16:
      return {0,      0x8000, 1,      0x8001, 0x03ff, 0x0400, 0x7bff, 0xfbff,
              0x7c00, 0xfc00, 0x7e00, 0xfe12, 0x7c01, 0x3c00, 0x3555};
    case DType::BF16:
      return {0,      0x8000, 1,      0x8001, 0x007f, 0x0080, 0x7f7f, 0xff7f,
              0x7f80, 0xff80, 0x7fc0, 0xffc1, 0x7f81, 0x3f80, 0x3eab};
    case DType::BOOL:
      return {0, 0, 0, 1, 1, 1, 2, 255};
    default:
      return {0, 1, ~0ull, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0x7fffffffull, 0x80000000ull, ~0ull >> 1, 1ull << 63};
  }
}

void fill(uint8_t* to, size_t count, DType dtype, std::mt19937_64& random) {
  const size_t size = element_size(dtype);
  const std::vector<uint64_t> hard = hard_values(dtype);
  for (size_t i = 0; i < count; ++i) {
    const uint64_t bits = random();
    uint64_t element = bits;
    const double small = static_cast<int>(bits % 2048) / 16.0 - 64.0;
    if (bits >> 62 == 0) {
      element = hard[bits % hard.size()];
    } else if (bits >> 62 <= 2) {
      element = static_cast<uint64_t>(static_cast<int64_t>(small));
      if (dtype == DType::F32) element = float_bits(static_cast<float>(small) * 1.1f);
      if (dtype == DType::F64) element = get<uint64_t>(&small);
      if (dtype == DType::F16 || dtype == DType::BF16) element = encode16(small, dtype);
    }
    if (dtype == DType::BOOL && bits >> 62 != 0) element = bits & 1;
    std::memcpy(to + i * size, &element, size);
  }
}

// ---- Properties ----

// Sources and destinations of one shape, filled once; `check` runs a kernel on fresh copies and compares.
class Case {
 public:
  Case(DType dtype, int nsrc, size_t count, size_t shift, std::mt19937_64& random)
      : dtype_(dtype), nsrc_(nsrc), count_(count), bytes_(count * element_size(dtype)), expected_(bytes_ + 1) {
    for (int k = 0; k < nsrc; ++k) {  // every source at its own misalignment (all aligned alike for shift 0)
      offsets_.push_back(kLine + shift * static_cast<size_t>(k + 1) * element_size(dtype) % kLine);
      inputs_.emplace_back(bytes_ + 3 * kLine, uint8_t{0xa5});
      fill(inputs_.back().data() + offsets_.back(), count, dtype, random);
    }
    sources_ = outputs_ = inputs_;
    for (int j = 0; j < nsrc; ++j)  // nothing of the answer lies in a destination beforehand
      std::fill_n(outputs_[j].begin() + static_cast<long>(offsets_[j]), bytes_, uint8_t{0x5b});
    blanks_ = outputs_;
  }

  void expect(RedOp op, int divisor) {
    op_ = op;
    divisor_ = divisor;
    Sources from;
    for (int k = 0; k < nsrc_; ++k) from.push_back(inputs_[k].data() + offsets_[k]);
    oracle(from, count_, dtype_, op, divisor, expected_.data());
  }

  void check(const KernelTable& table, int ndst, bool in_place, bool bypass) {
    const void* from[8];
    void* to[8];
    std::vector<Bytes>& written = in_place ? sources_ : outputs_;
    for (int j = 0; j < nsrc_; ++j) written[j] = (in_place ? inputs_ : blanks_)[j];
    for (int k = 0; k < nsrc_; ++k) from[k] = (in_place ? sources_ : inputs_)[k].data() + offsets_[k];
    for (int j = 0; j < ndst; ++j)  // in place: the last sources, so that dsts[j] is not always srcs[j]
      to[j] = in_place ? sources_[nsrc_ - 1 - j].data() + offsets_[nsrc_ - 1 - j] : outputs_[j].data() + offsets_[j];
    reduce_with(table, to, ndst, from, nsrc_, count_, dtype_, op_, divisor_, bypass);
    bool good = true;
    for (int j = 0; j < ndst && good; ++j) {
      const int k = in_place ? nsrc_ - 1 - j : j;
      good = !std::memcmp(to[j], expected_.data(), bytes_) && untouched_around(written[k], k);
    }
    for (int k = 0; in_place && k < nsrc_ - ndst; ++k) good = good && sources_[k] == inputs_[k];
    if (!good)
      fail("%s: %s %s, %d sources, %d destinations%s%s, %zu elements, divisor %d: wrong", table.name,
           kDTypeNames[static_cast<int>(dtype_)], kOpNames[static_cast<int>(op_)], nsrc_, ndst,
           in_place ? " in place" : "", bypass ? " bypassing caches" : "", count_, divisor_);
  }

 private:
  bool untouched_around(const Bytes& buffer, int k) const {
    const auto guard = [](uint8_t byte) { return byte == 0xa5; };
    return std::all_of(buffer.begin(), buffer.begin() + static_cast<long>(offsets_[k]), guard) &&
           std::all_of(buffer.begin() + static_cast<long>(offsets_[k] + bytes_), buffer.end(), guard);
  }

  DType dtype_;
  int nsrc_;
  size_t count_, bytes_;
  RedOp op_ = RedOp::SUM;
  int divisor_ = 1;
  std::vector<size_t> offsets_;
  std::vector<Bytes> inputs_, sources_, outputs_, blanks_;
  Bytes expected_;
};

std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> found;
  for (const char* isa : kIsas)
    if (const KernelTable* table = table_for(isa)) found.push_back(table);
  return found;
}

void every_kernel_equals_the_oracle() {
  std::vector<size_t> counts = {1000, 4097};
  for (size_t n = 0; n <= 67; ++n) counts.push_back(n);
  const std::vector<const KernelTable*> all = tables();
  std::mt19937_64 random(20240607);
  for (int t = 0; t < kDTypes; ++t)
    for (int nsrc = 1; nsrc <= 8; ++nsrc)
      for (size_t count : counts)
        for (size_t shift : {0, 1, 3}) {
          Case one(static_cast<DType>(t), nsrc, count, shift, random);
          for (int o = 0; o < kRedOps; ++o) {
            const RedOp op = static_cast<RedOp>(o);
            if (!reducible(static_cast<DType>(t), op)) continue;
            const int divisors[] = {nsrc, 1, 3, 300, 0x7fffffff};
            one.expect(op, op == RedOp::AVG ? divisors[(count + shift) % 5] : 1);
            for (const KernelTable* table : all)
              for (int ndst = 1; ndst <= nsrc; ++ndst)
                for (bool in_place : {false, true}) one.check(*table, ndst, in_place, count % 2);
          }
        }
}

void conversions_are_exact_and_round_to_nearest_even() {
  for (DType dtype : {DType::F16, DType::BF16}) {
    const bool half = dtype == DType::F16;
    const auto encode_fast = half ? float_to_half : float_to_bf16;
    const auto decode_fast = half ? half_to_float : bf16_to_float;
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
      const uint16_t here = static_cast<uint16_t>(bits);
      const double exact = decode16(here, dtype);
      const float got = decode_fast(here);
      if (std::isnan(exact) ? !std::isnan(got) : float_bits(got) != float_bits(static_cast<float>(exact)))
        fail("%s 0x%04x decodes to 0x%08x", half ? "f16" : "bf16", bits, float_bits(got));
      if (std::isnan(exact)) continue;
      // Around each value and the middle between it and the next: where rounding changes its mind.
      const double next = decode16(static_cast<uint16_t>(here + 1), dtype);
      const double middle = std::isfinite(next) && std::isfinite(exact) ? (exact + next) / 2 : 65520.0;
      for (double centre : {exact, middle})
        for (int step = -2; step <= 2; ++step) {
          const float value = float_from_bits(float_bits(static_cast<float>(centre)) + static_cast<uint32_t>(step));
          const uint16_t want = encode16(static_cast<double>(value), dtype), found = encode_fast(value);
          if (std::isnan(value) ? !std::isnan(decode_fast(found)) : want != found)
            fail("%s: 0x%08x encodes to 0x%04x, not 0x%04x", half ? "f16" : "bf16", float_bits(value), found, want);
        }
    }
  }
}

template <class T>
void expect_pair(const char* what, DType dtype, RedOp op, T a, T b, T want) {
  for (const KernelTable* table : tables()) {
    std::vector<T> left(33, a), right(33, b), out(33);
    const void* from[] = {left.data(), right.data()};
    void* to[] = {out.data()};
    reduce_with(*table, to, 1, from, 2, out.size(), dtype, op, 2, false);
    for (const T& got : out)
      if (std::memcmp(&got, &want, sizeof want)) return fail("%s: %s", table->name, what);
  }
}

void named_cases() {
  const float inf = INFINITY, nan = float_from_bits(0x7fc00000), strange_nan = float_from_bits(0xffc00123);
  expect_pair("inf - inf is the canonical NaN", DType::F32, RedOp::SUM, inf, -inf, nan);
  expect_pair("0 * inf is the canonical NaN", DType::F32, RedOp::PRODUCT, 0.0f, inf, nan);
  expect_pair("min keeps a NaN on the left", DType::F32, RedOp::MIN, strange_nan, 1.0f, nan);
  expect_pair("min keeps a NaN on the right", DType::F32, RedOp::MIN, 1.0f, strange_nan, nan);
  expect_pair("max keeps a NaN over infinity", DType::F32, RedOp::MAX, strange_nan, inf, nan);
  expect_pair("min of -0 and +0 is the first", DType::F32, RedOp::MIN, -0.0f, 0.0f, -0.0f);
  expect_pair("max of -0 and +0 is the first", DType::F32, RedOp::MAX, -0.0f, 0.0f, -0.0f);
  expect_pair("-0 + -0 is -0", DType::F32, RedOp::SUM, -0.0f, -0.0f, -0.0f);
  expect_pair("subnormals are kept", DType::F32, RedOp::AVG, 3e-45f, 0.0f, 1.4e-45f);
  expect_pair("f32 overflows to infinity", DType::F32, RedOp::SUM, 3e38f, 3e38f, inf);
  expect_pair<uint16_t>("65504 + 16 rounds to infinity in f16", DType::F16, RedOp::SUM, 0x7bff, 0x4c00, 0x7c00);
  expect_pair<uint16_t>("65504 + 15 rounds to 65504 in f16", DType::F16, RedOp::SUM, 0x7bff, 0x4b80, 0x7bff);
  expect_pair<uint16_t>("the average of two 65504 is 65504 in f16", DType::F16, RedOp::AVG, 0x7bff, 0x7bff, 0x7bff);
  expect_pair<uint16_t>("a bf16 NaN does not round to infinity", DType::BF16, RedOp::SUM, 0x7f81, 0x3f80, 0x7fc0);
  expect_pair<uint16_t>("1 + 2^-8 is a tie, to even, in bf16", DType::BF16, RedOp::SUM, 0x3f80, 0x3b80, 0x3f80);
  expect_pair<int8_t>("i8 wraps", DType::I8, RedOp::SUM, 100, 100, -56);
  expect_pair<int16_t>("i16 products wrap", DType::I16, RedOp::PRODUCT, -1, -32768, -32768);
  expect_pair<int32_t>("i32 wraps", DType::I32, RedOp::SUM, 0x7fffffff, 1, -0x7fffffff - 1);
  expect_pair<int32_t>("integer averages truncate toward zero", DType::I32, RedOp::AVG, -2, -3, -2);
  expect_pair<uint8_t>("u8 is ordered as unsigned", DType::U8, RedOp::MAX, 1, 200, 200);
  expect_pair<int8_t>("i8 is ordered as signed", DType::I8, RedOp::MAX, 1, -56, 1);
  expect_pair<uint8_t>("any non-zero byte is true", DType::BOOL, RedOp::BAND, 2, 4, 1);
}

void large_calls_equal_small_ones() {
  const size_t count = (size_t{3} << 20) + 5;
  std::vector<float> a(count), b(count), out(count + 3), small(count);
  for (size_t i = 0; i < count; ++i) a[i] = static_cast<float>(i) * 0.37f, b[i] = 1e6f / static_cast<float>(i + 1);
  const void* from[] = {a.data(), b.data()};
  void* to[] = {out.data() + 3};
  for (size_t i = 0; i < count; ++i) small[i] = a[i] + b[i];
  reduce(to, 1, from, 2, count, DType::F32, RedOp::SUM, 1);
  if (std::memcmp(to[0], small.data(), count * 4)) fail("a large reduction is wrong");
  for (const KernelTable* table : tables()) {
    for (size_t shift : {0, 1, 17, 64}) {
      std::fill(out.begin(), out.end(), 0.0f);
      char* target = reinterpret_cast<char*>(out.data()) + shift % 12;
      copy_with(*table, target, reinterpret_cast<const char*>(a.data()) + shift, count * 4 - 64, true);
      if (std::memcmp(target, reinterpret_cast<const char*>(a.data()) + shift, count * 4 - 64))
        fail("%s: a large copy is wrong at shift %zu", table->name, shift);
    }
  }
  copy(out.data(), b.data(), count * 4);
  copy(out.data() + 1, a.data(), 4);
  copy(nullptr, nullptr, 0);
  if (out[0] != b[0] || out[1] != a[0] || std::memcmp(&out[2], &b[2], (count - 2) * 4)) fail("copy is wrong");
}

// In a child, since the choice is made once per process. Call before anything here asks for it.
void simd_choice(const char* wanted, const char* name, bool error) {
  const pid_t child = fork();
  if (child == 0) {
    if (wanted) setenv("DISTLIB_SIMD", wanted, 1);
    if (!wanted) unsetenv("DISTLIB_SIMD");
    const char* message = simd_error();
    const bool good =
        !std::strcmp(simd_name(), name) && (message != nullptr) == error && (!error || std::strstr(message, wanted));
    _exit(good ? 0 : 1);
  }
  int status = -1;
  if (waitpid(child, &status, 0) != child || status != 0)
    fail("DISTLIB_SIMD=%s does not give %s", wanted ? wanted : "", name);
}

void simd_can_be_forced_and_says_when_it_cannot() {
  const char* best = "scalar";
  for (const char* isa : kIsas)
    if (table_for(isa)) best = isa;
  simd_choice(nullptr, best, false);
  simd_choice("", best, false);
  simd_choice("sse9", best, true);
  for (const char* isa : kIsas) simd_choice(isa, table_for(isa) ? isa : best, !table_for(isa));
}

}  // namespace

int main() {
  simd_can_be_forced_and_says_when_it_cannot();
  conversions_are_exact_and_round_to_nearest_even();
  named_cases();
  every_kernel_equals_the_oracle();
  large_calls_equal_small_ones();
  std::string tested;
  for (const KernelTable* table : tables()) tested += std::string(" ") + table->name;
  std::printf("kernels_test:%s: %d failures\n", tested.c_str(), failures);
  return failures ? 1 : 0;
}
