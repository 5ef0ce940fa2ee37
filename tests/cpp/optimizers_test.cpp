// Every optimizer kernel of every instruction set gives, bit for bit, what an element-by-element oracle gives, however
// many threads and segments share the work.
//
//   cd csrc/cpu; g++ -O3 -std=c++17 -ffp-contract=off -pthread -I. ../../tests/cpp/optimizers_test.cpp
//       optimizers*.cpp workers.cpp kernels*.cpp -o optimizers_test
//   ./optimizers_test     exit status 1, and the first failures on stderr, if any
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "half.hpp"
#include "optimizers.hpp"
#include "workers.hpp"

using namespace distlib;

namespace {

int failures = 0;

void fail(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "%s\n", what.c_str());
}

const char* const kIsas[] = {"scalar", "neon", "avx2", "avx512"};
const char* const kRuleNames[] = {"adamw", "sgd", "lion"};

// ---- The oracle: the formulas of Hyper, one rounding a line ----

template <class T>
T toward(T from, T to, double beta) {
  const T weight = T(1 - beta), rest = T(beta);
  const T way = to - from;
  if (weight < T(0.5)) {
    const T part = weight * way;
    return from + part;
  }
  const T part = rest * way;
  return to - part;
}

template <class T>
void oracle(const Hyper& h, T& p, T g, T* m, T* v) {
  g = T(h.scale) * g;
  if (h.l2 != 0 && h.rule != Rule::LION) {
    const T pull = T(h.l2) * p;
    g = g + pull;
  }
  if (h.rule == Rule::ADAMW) {
    p = T(h.decay) * p;
    *m = toward(*m, g, h.beta1);
    const T kept = T(h.beta2) * *v;
    const T weighted = T(1 - h.beta2) * g;
    const T squared = weighted * g;
    *v = kept + squared;
    const T length = std::sqrt(*v) * T(h.root_scale);
    const T below = length + T(h.eps);
    const T above = T(h.rate) * *m;
    const T change = above / below;
    p = p - change;
  } else if (h.rule == Rule::SGD) {
    if (h.momentum != 0) {
      const T kept = T(h.momentum) * *m;
      const T added = T(1 - h.dampening) * g;
      *m = h.first ? g : kept + added;
      const T ahead = T(h.momentum) * *m;
      g = h.nesterov ? g + ahead : *m;
    }
    const T change = T(h.rate) * g;
    p = p - change;
  } else {
    const T between = toward(*m, g, h.beta1);
    const T sign = between > 0 ? T(1) : between < 0 ? T(-1) : between;
    const T pull = T(h.l2) * p;
    const T way = sign + pull;
    const T change = T(h.rate) * way;
    p = p - change;
    *m = toward(*m, g, h.beta2);
  }
}

template <class T>
T canonical(T value) {
  return value != value ? std::numeric_limits<T>::quiet_NaN() : value;
}

// ---- One model in memory ----

struct Model {
  DType param, grad;
  Copy copy;
  std::vector<double> memory[5];  // param, grad, m, v, copy: as bytes, aligned for any type
  size_t count, shift;

  size_t size(int which) const {
    if (which == 1) return element_size(grad);
    return which == 4 ? 2 : element_size(param);
  }
  char* at(int which, size_t index = 0) {
    return reinterpret_cast<char*>(memory[which].data()) + (shift + index) * size(which);
  }

  Model(DType p, DType g, Copy c, size_t n, size_t s, unsigned seed) : param(p), grad(g), copy(c), count(n), shift(s) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    const double special[] = {0.0, -0.0, 1e-42, 3e38, -3e38, INFINITY, -INFINITY, NAN, 65504.0, 1.00390625};
    for (int which = 0; which < 5; ++which) {
      memory[which].assign((n + s) * size(which) / sizeof(double) + 16, 0.0);
      for (size_t i = 0; i < n && which < 4; ++i) {
        double value = normal(random);
        if (which == 3) value *= value;
        if (random() % 8 == 0) value = which == 3 ? std::fabs(special[random() % 10]) : special[random() % 10];
        put(which, i, value);
      }
    }
  }

  void put(int which, size_t index, double value) {
    const DType type = which == 1 ? grad : param;
    const float single = static_cast<float>(value);
    uint16_t half = type == DType::F16 ? float_to_half(single) : float_to_bf16(single);
    if (type == DType::F64) std::memcpy(at(which, index), &value, 8);
    if (type == DType::F32) std::memcpy(at(which, index), &single, 4);
    if (type == DType::F16 || type == DType::BF16) std::memcpy(at(which, index), &half, 2);
  }

  template <class T>
  T gradient(size_t index) {
    T value{};
    if (grad == DType::F16 || grad == DType::BF16) {
      uint16_t half;
      std::memcpy(&half, at(1, index), 2);
      return static_cast<T>(grad == DType::F16 ? half_to_float(half) : bf16_to_float(half));
    }
    std::memcpy(&value, at(1, index), sizeof value);
    return value;
  }

  template <class T>
  void expect(const Hyper& hyper) {
    for (size_t i = 0; i < count; ++i) {
      T p, m, v;
      std::memcpy(&p, at(0, i), sizeof p);
      std::memcpy(&m, at(2, i), sizeof m);
      std::memcpy(&v, at(3, i), sizeof v);
      oracle<T>(hyper, p, gradient<T>(i), &m, &v);
      p = canonical(p);
      m = canonical(m);
      v = canonical(v);
      std::memcpy(at(0, i), &p, sizeof p);
      if (hyper.rule != Rule::SGD || hyper.momentum != 0) std::memcpy(at(2, i), &m, sizeof m);
      if (hyper.rule == Rule::ADAMW) std::memcpy(at(3, i), &v, sizeof v);
      const auto single = static_cast<float>(p);
      const uint16_t half = copy == Copy::BF16 ? float_to_bf16(single) : float_to_half(single);
      if (copy != Copy::NONE) std::memcpy(at(4, i), &half, 2);
    }
  }

  Segment segment(const Hyper& hyper, size_t from, size_t to) {
    const bool keeps_m = hyper.rule != Rule::SGD || hyper.momentum != 0;
    return {at(0, from),
            at(1, from),
            keeps_m ? at(2, from) : nullptr,
            hyper.rule == Rule::ADAMW ? at(3, from) : nullptr,
            copy != Copy::NONE ? at(4, from) : nullptr,
            to - from};
  }
};

std::vector<Hyper> hypers() {
  Hyper adamw, l2, sgd, nesterov, plain, lion;
  adamw.scale = -0.7, adamw.rate = 1e-2, adamw.decay = 0.99;
  adamw.beta1 = 0.9, adamw.beta2 = 0.999, adamw.eps = 1e-8, adamw.root_scale = 3;
  l2.l2 = 0.1, l2.rate = 1e-2, l2.beta1 = 0.3, l2.beta2 = 0.4, l2.eps = 1e-3;
  sgd.rule = nesterov.rule = plain.rule = Rule::SGD;
  sgd.rate = nesterov.rate = plain.rate = 0.1;
  sgd.l2 = 0.1, sgd.momentum = 0.9, sgd.dampening = 0.2;
  nesterov.momentum = 0.9, nesterov.nesterov = true, nesterov.first = true;
  lion.rule = Rule::LION, lion.rate = 1e-3, lion.l2 = 0.1, lion.beta1 = 0.9, lion.beta2 = 0.99;
  return {adamw, l2, sgd, nesterov, plain, lion};
}

void check(const char* isa, const Hyper& hyper, DType param, DType grad, Copy copy, size_t count, size_t shift,
           int threads, const std::vector<size_t>& cuts) {
  Model ours(param, grad, copy, count, shift, 1 + unsigned(count)), expected = ours;
  std::vector<Segment> segments;
  size_t from = 0;
  for (const size_t cut : cuts) {
    segments.push_back(ours.segment(hyper, from, cut));
    from = cut;
  }
  segments.push_back(ours.segment(hyper, from, count));
  const Batch batch{hyper, param, grad, copy, segments.data(), segments.size()};
  update_with(*optimizers_for(isa), &batch, 1, threads);
  if (param == DType::F64) {
    expected.expect<double>(hyper);
  } else {
    expected.expect<float>(hyper);
  }
  for (int which = 0; which < 5; ++which) {
    const size_t bytes = ours.memory[which].size() * sizeof(double);
    if (std::memcmp(ours.memory[which].data(), expected.memory[which].data(), bytes) != 0)
      fail(std::string(isa) + " " + kRuleNames[int(hyper.rule)] + ": memory " + std::to_string(which) + ", grad type " +
           std::to_string(int(grad)) + ", copy " + std::to_string(int(copy)) + ", count " + std::to_string(count) +
           ", shift " + std::to_string(shift) + ", threads " + std::to_string(threads));
  }
}

void check_steps(const char* isa) {
  const std::pair<DType, DType> types[] = {
      {DType::F32, DType::F32}, {DType::F32, DType::F16}, {DType::F32, DType::BF16}, {DType::F64, DType::F64}};
  for (const Hyper& hyper : hypers()) {
    for (const auto& [param, grad] : types) {
      for (const Copy copy : {Copy::NONE, Copy::BF16, Copy::F16}) {
        const Batch batch{hyper, param, grad, copy, nullptr, 0};
        if ((unsupported(batch) != nullptr) != (param == DType::F64 && copy != Copy::NONE))
          fail("unsupported() is wrong");
        if (unsupported(batch) != nullptr) continue;
        for (size_t count = 0; count < 70; ++count) check(isa, hyper, param, grad, copy, count, count % 5, 1, {});
        check(isa, hyper, param, grad, copy, 3001, 1, 1, {0, 1, 17, 2000, 2000});
      }
    }
    for (const int threads : {2, 3}) check(isa, hyper, DType::F32, DType::F32, Copy::BF16, 200003, 1, threads, {77});
  }
}

// ---- Sums of squares ----

void check_squares(const char* isa) {
  for (const DType type : {DType::F32, DType::F64, DType::F16, DType::BF16}) {
    for (const size_t count : {0, 1, 31, 32, 33, 100, 16383, 16384, 16385, 200003}) {
      Model model(type == DType::F64 ? DType::F64 : DType::F32, type, Copy::NONE, count, 3, 9);
      for (size_t i = 0; i < count; ++i) model.put(1, i, std::sin(double(i)) * 3);
      double expected = 0;
      for (size_t block = 0; block < count; block += 16384) {
        double lanes[kSquareLanes] = {}, sum = 0;
        for (size_t i = block; i < count && i < block + 16384; ++i) {
          const double value = type == DType::F64 ? model.gradient<double>(i) : double(model.gradient<float>(i));
          lanes[i % kSquareLanes] += value * value;
        }
        for (const double lane : lanes) sum += lane;
        expected += sum;
      }
      for (const int threads : {1, 2, 3}) {
        for (const size_t cut : {size_t{0}, count / 3, count}) {
          const Squares::Run runs[] = {{model.at(1), cut}, {model.at(1, cut), count - cut}};
          const Squares squares{type, runs, 2};
          const double sum = sum_of_squares_with(*optimizers_for(isa), &squares, 1, threads);
          if (sum != expected)
            fail(std::string(isa) + ": sum of squares of type " + std::to_string(int(type)) + ", count " +
                 std::to_string(count) + ", threads " + std::to_string(threads) + ", cut " + std::to_string(cut));
        }
      }
    }
  }
}

// ---- Threads ----

void check_workers() {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        std::atomic<int> calls[5] = {};
        in_parallel(5, [&](int part) { ++calls[part]; });
        for (auto& count : calls) wrong += count != 1;
      }
    });
  for (auto& caller : callers) caller.join();
  if (wrong != 0) fail("in_parallel: a part was not called exactly once");
}

}  // namespace

int main() {
  int found = 0;
  for (const char* isa : kIsas) {
    if (optimizers_for(isa) == nullptr) continue;
    ++found;
    check_steps(isa);
    check_squares(isa);
  }
  check_workers();
  if (found == 0) fail("no instruction set at all");
  std::printf("%d instruction sets, %d failures\n", found, failures);
  return failures != 0;
}
