// The public face of the optimizer kernels: which instruction set, and how the work is divided over threads.
#include "optimizers.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "workers.hpp"

namespace distlib {
namespace {

constexpr size_t kSquareBlock = 16384;      // elements whose squares add up before they meet the others
constexpr size_t kElementsAThread = 65536;  // waking a thread takes as long as stepping some of these
constexpr size_t kGrain = 1024;             // where work is divided: a multiple of every vector and cache line

int threads_for(uint64_t elements, int threads) {
  return static_cast<int>(std::max<uint64_t>(1, std::min<uint64_t>(std::max(threads, 1), elements / kElementsAThread)));
}

// The first element of part `index` of `parts`.
uint64_t boundary(uint64_t elements, int parts, int index) {
  if (index == parts) return elements;
  return elements / parts * index / kGrain * kGrain;
}

template <class T>
T* advance(T* at, size_t bytes) {
  return at == nullptr ? nullptr
                       : static_cast<T*>(static_cast<void*>(
                             static_cast<char*>(const_cast<void*>(static_cast<const void*>(at))) + bytes));
}

Segment slice(const Batch& batch, const Segment& whole, uint64_t from, uint64_t count) {
  const size_t size = element_size(batch.param);
  return {advance(whole.param, from * size), advance(whole.grad, from * element_size(batch.grad)),
          advance(whole.m, from * size),     advance(whole.v, from * size),
          advance(whole.copy, from * 2),     count};
}

uint64_t elements(const Batch* batches, size_t count) {
  uint64_t total = 0;
  for (size_t b = 0; b < count; ++b)
    for (size_t s = 0; s < batches[b].segment_count; ++s) total += batches[b].segments[s].count;
  return total;
}

}  // namespace

const char* unsupported(const Batch& batch) {
  const bool single =
      batch.param == DType::F32 && (batch.grad == DType::F32 || batch.grad == DType::F16 || batch.grad == DType::BF16);
  const bool twice = batch.param == DType::F64 && batch.grad == DType::F64;
  if (!single && !twice) return "parameters are fp32 with fp32, fp16 or bf16 gradients, or fp64 with fp64 gradients";
  if (twice && batch.copy != Copy::NONE) return "fp64 parameters have no compute copy in the same pass";
  return nullptr;
}

const OptimizerTable* optimizers_for(const char* isa) {
  if (table_for(isa) == nullptr) return nullptr;
  if (!std::strcmp(isa, "avx512")) return avx512_optimizers();
  if (!std::strcmp(isa, "avx2")) return avx2_optimizers();
  if (!std::strcmp(isa, "neon")) return neon_optimizers();
  return scalar_optimizers();
}

void update_with(const OptimizerTable& table, const Batch* batches, size_t count, int threads) {
  const uint64_t total = elements(batches, count);
  const int parts = threads_for(total, threads);
  in_parallel(parts, [&](int part) {
    const uint64_t from = boundary(total, parts, part), to = boundary(total, parts, part + 1);
    uint64_t begin = 0;  // of the segment, among all elements
    for (size_t b = 0; b < count && begin < to; ++b) {
      const Batch& batch = batches[b];
      const auto step =
          table.step[static_cast<int>(batch.hyper.rule)][static_cast<int>(batch.grad)][static_cast<int>(batch.copy)];
      for (size_t s = 0; s < batch.segment_count && begin < to; ++s) {
        const Segment& segment = batch.segments[s];
        const uint64_t low = std::max(begin, from), high = std::min(begin + segment.count, to);
        if (low < high) step(batch.hyper, slice(batch, segment, low - begin, high - low));
        begin += segment.count;
      }
    }
  });
}

double sum_of_squares_with(const OptimizerTable& table, const Squares* squares, size_t count, int threads) {
  uint64_t total = 0;
  for (size_t b = 0; b < count; ++b)
    for (size_t r = 0; r < squares[b].run_count; ++r) total += squares[b].runs[r].count;
  std::vector<double> blocks((total + kSquareBlock - 1) / kSquareBlock, 0.0);
  const int parts = threads_for(total, threads);
  in_parallel(parts, [&](int part) {
    const uint64_t first = blocks.size() * part / parts, last = blocks.size() * (part + 1) / parts;
    const uint64_t from = first * kSquareBlock, to = std::min<uint64_t>(last * kSquareBlock, total);
    double lanes[kSquareLanes] = {};
    const auto finish = [&](uint64_t block) {
      double sum = 0;
      for (double& lane : lanes) {
        sum += lane;
        lane = 0;
      }
      blocks[block] = sum;
    };
    uint64_t begin = 0;
    for (size_t b = 0; b < count && begin < to; ++b) {
      const size_t size = element_size(squares[b].dtype);
      const auto square = table.square[static_cast<int>(squares[b].dtype)];
      for (size_t r = 0; r < squares[b].run_count && begin < to; ++r) {
        const auto& run = squares[b].runs[r];
        uint64_t low = std::max(begin, from);
        const uint64_t high = std::min(begin + run.count, to);
        while (low < high) {
          const uint64_t end = std::min(high, (low / kSquareBlock + 1) * kSquareBlock);
          square(lanes, low % kSquareLanes, static_cast<const char*>(run.at) + (low - begin) * size, end - low);
          if (end % kSquareBlock == 0) finish(end / kSquareBlock - 1);
          low = end;
        }
        begin += run.count;
      }
    }
    if (to > from && to % kSquareBlock != 0) finish(to / kSquareBlock);
  });
  double sum = 0;
  for (const double block : blocks) sum += block;
  return std::isnan(sum) ? std::numeric_limits<double>::quiet_NaN() : sum;
}

void update(const Batch* batches, size_t count, int threads) {
  update_with(*optimizers_for(simd_name()), batches, count, threads);
}

double sum_of_squares(const Squares* squares, size_t count, int threads) {
  return sum_of_squares_with(*optimizers_for(simd_name()), squares, count, threads);
}

}  // namespace distlib
