// The sum of squares of a table, to the bit of the CPU core's: a warp per block of 16,384 elements, lane i % 32 for
// element i.
//
// The core adds up blocks in order, one after the other, and so must one thread here: one addition for each block,
// while the blocks themselves are read by all of the GPU.
#include "elements.cuh"
#include "launch.cuh"
#include "memory.cuh"
#include "optimizer.h"

namespace distlib {
namespace cuda {
namespace {

constexpr uint64_t kBlock = 16384;
constexpr int kWarps = kThreads / 32;

template <class Type>
__device__ __forceinline__ double add_square(double sum, typename Type::Raw raw) {
  const double value = static_cast<double>(Type::wide(raw));
  return sum + value * value;
}

// sum + the squares of every 32nd of `count` elements, from element `first` on. Eight loads are under way at once.
template <class Type>
__device__ __forceinline__ double add_squares(double sum, uint64_t address, uint64_t first, uint64_t count) {
  using Raw = typename Type::Raw;
  constexpr int kAtOnce = 8;
  const Raw* const at = global<const Raw>(address);
  uint64_t i = first;
  for (; i + (kAtOnce - 1) * 32 < count; i += kAtOnce * 32) {
    Raw raw[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) raw[k] = at[i + k * 32];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) sum = add_square<Type>(sum, raw[k]);
  }
  for (; i < count; i += 32) sum = add_square<Type>(sum, at[i]);
  return sum;
}

__global__ __launch_bounds__(kThreads) void squares_kernel(const DistlibSquareRow* rows, const int32_t* block_rows,
                                                           uint64_t total, unsigned* counter, double* partials,
                                                           double* sum, float* found_inf) {
  const uint64_t blocks = (total + kBlock - 1) / kBlock, block = uint64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const unsigned lane = threadIdx.x % 32;
  if (block < blocks) {
    const uint64_t begin = block * kBlock, end = begin + kBlock < total ? begin + kBlock : total;
    double mine = 0;
    uint64_t low = begin;
    for (const DistlibSquareRow* row = rows + block_rows[block]; low < end; ++row) {
      const uint64_t row_end = row->begin + row->count, high = row_end < end ? row_end : end;
      const uint64_t first = (lane - low) % 32, from = low - row->begin;
      switch (row->dtype) {
        case CODE_F32:
          mine = add_squares<F32>(mine, row->at + from * 4, first, high - low);
          break;
        case CODE_F64:
          mine = add_squares<F64>(mine, row->at + from * 8, first, high - low);
          break;
        case CODE_F16:
          mine = add_squares<F16>(mine, row->at + from * 2, first, high - low);
          break;
        default:
          mine = add_squares<BF16>(mine, row->at + from * 2, first, high - low);
      }
      low = high;
    }
    double lanes = 0;
    for (int i = 0; i < 32; ++i) lanes += __shfl_sync(0xffffffffu, mine, i);
    if (lane == 0) partials[block] = lanes;
  }
  if (!is_last_block(counter)) return;
  constexpr int kStaged = 4 * kThreads;
  __shared__ double staged[kStaged];
  double all = 0;
  for (uint64_t from = 0; from < blocks; from += kStaged) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t i = from + k * kThreads + threadIdx.x;
      // Zeros change no sum of squares: with them the loop below has a fixed length.
      staged[k * kThreads + threadIdx.x] = i < blocks ? static_cast<const volatile double*>(partials)[i] : 0.0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 16
      for (int i = 0; i < kStaged; ++i) all += staged[i];
    }
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  *sum = canonical(all);
  if (found_inf != nullptr && all - all != 0) *found_inf = 1;
}

}  // namespace
}  // namespace cuda
}  // namespace distlib

DISTLIB_API int64_t distlib_cuda_sum_of_squares(const void* rows, const void* block_rows, int64_t total, void* scratch,
                                                void* sum, void* found_inf, void* stream) {
  using namespace distlib::cuda;
  const uint64_t elements = static_cast<uint64_t>(total), blocks = (elements + kBlock - 1) / kBlock;
  if (total < 0 || blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (total == 0) return cudaMemsetAsync(sum, 0, sizeof(double), as_stream(stream));
  const auto grid = static_cast<unsigned>((blocks + kWarps - 1) / kWarps);
  DL_LAUNCH(squares_kernel, grid, kThreads, as_stream(stream), static_cast<const DistlibSquareRow*>(rows),
            static_cast<const int32_t*>(block_rows), elements, static_cast<unsigned*>(scratch),
            static_cast<double*>(scratch) + 1, static_cast<double*>(sum), static_cast<float*>(found_inf));
  return launched();
}
