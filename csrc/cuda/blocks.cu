// Quantization: a warp per block of 256 elements, eight a lane. Re-order: a block of threads per 64 KiB of a row.
#include "blocks.h"

#include <cmath>

#include "convert.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace distlib {
namespace cuda {
namespace {

constexpr int kBlock = 256, kLaneElements = kBlock / 32, kWarps = kThreads / 32;
constexpr uint64_t kCopied = 64 << 10;  // bytes that a block of threads re-orders

// The elements of this lane; zeros past the end.
template <class Type>
__device__ __forceinline__ Several<typename Type::Raw, kLaneElements> load_lane(const typename Type::Raw* from,
                                                                                uint64_t left) {
  using Raw = typename Type::Raw;
  if (left >= kLaneElements && is_aligned(from, 16)) return load_several<16, Raw, kLaneElements>(from);
  Several<Raw, kLaneElements> values;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) values.at[i] = static_cast<uint64_t>(i) < left ? from[i] : Raw{0};
  return values;
}

template <class Type>
__global__ __launch_bounds__(kThreads) void quantize_kernel(const typename Type::Raw* values, uint64_t count,
                                                            uint64_t blocks, uint8_t* packed) {
  const uint64_t block = uint64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (block >= blocks) return;  // a whole warp
  const unsigned lane = threadIdx.x % 32;
  const uint64_t begin = block * kBlock + lane * kLaneElements;
  const auto mine = load_lane<Type>(values + begin, begin < count ? count - begin : 0);
  float wide[kLaneElements];
  uint32_t largest = 0;  // as bits, magnitudes are in order, and a NaN is above all of them
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    wide[i] = Type::wide(mine.at[i]);
    const uint32_t magnitude = bits_of(wide[i]) & 0x7fffffffu;
    if (magnitude > largest) largest = magnitude;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    if (other > largest) largest = other;
  }
  const float scale = canonical(float_of(largest) / 127.0f), step = scale > 0 ? scale : 1.0f;
  Several<uint8_t, kLaneElements> bytes;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float rounded = rintf(wide[i] / step);
    const float clamped = rounded > 127 ? 127.0f : (rounded < -127 ? -127.0f : rounded);
    bytes.at[i] = static_cast<uint8_t>(static_cast<int8_t>(clamped == clamped ? static_cast<int>(clamped) : 0));
  }
  uint8_t* const to = packed + begin;
  if (is_aligned(to, 8)) {
    store_several<8>(to, bytes);
  } else {
    store_several<1>(to, bytes);
  }
  uint8_t* const scales = packed + blocks * kBlock;
  if (lane < 4) scales[block * 4 + lane] = static_cast<uint8_t>(bits_of(scale) >> (8 * lane));
}

template <class Type>
__global__ __launch_bounds__(kThreads) void dequantize_kernel(const uint8_t* packed, uint64_t stride, uint64_t count,
                                                              uint64_t blocks, typename Type::Raw* out) {
  using Raw = typename Type::Raw;
  const uint64_t block = uint64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (block >= blocks) return;
  packed += blockIdx.y * stride;
  out += blockIdx.y * count;
  const uint8_t* const at = packed + blocks * kBlock + block * 4;
  const float scale = float_of(at[0] | at[1] << 8 | at[2] << 16 | static_cast<uint32_t>(at[3]) << 24);
  const uint64_t begin = block * kBlock + threadIdx.x % 32 * kLaneElements;
  if (begin >= count) return;
  const uint8_t* const from = packed + begin;
  const auto bytes = is_aligned(from, 8) ? load_several<8, uint8_t, kLaneElements>(from)
                                         : load_several<1, uint8_t, kLaneElements>(from);
  Several<Raw, kLaneElements> values;
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    values.at[i] = Type::raw(canonical(static_cast<float>(static_cast<int8_t>(bytes.at[i])) * scale));
  if (begin + kLaneElements <= count && is_aligned(out + begin, 16)) {
    store_several<16>(out + begin, values);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i)
    if (begin + i < count) out[begin + i] = values.at[i];
}

__global__ __launch_bounds__(kThreads) void reorder_kernel(const uint8_t* from, uint8_t* to, uint64_t row_bytes,
                                                           unsigned nodes, unsigned rails) {
  const uint64_t chunks = (row_bytes + kCopied - 1) / kCopied;
  const uint64_t row = blockIdx.x / chunks, begin = blockIdx.x % chunks * kCopied;
  const uint64_t node = row / rails, rail = row % rails, left = row_bytes - begin;
  Move<uint8_t> each;
  convert(each, from + (rail * nodes + node) * row_bytes + begin, to + row * row_bytes + begin,
          left < kCopied ? left : kCopied);
}

uint64_t blocks_of(uint64_t count) {
  return (count + kBlock - 1) / kBlock;
}

template <class Type>
int start_quantize(const void* values, uint64_t count, void* packed, void* stream) {
  const uint64_t blocks = blocks_of(count);
  DL_LAUNCH((quantize_kernel<Type>), static_cast<unsigned>((blocks + kWarps - 1) / kWarps), kThreads, as_stream(stream),
            static_cast<const typename Type::Raw*>(values), count, blocks, static_cast<uint8_t*>(packed));
  return launched();
}

template <class Type>
int start_dequantize(const void* packed, unsigned rows, uint64_t stride, uint64_t count, void* out, void* stream) {
  const uint64_t blocks = blocks_of(count);
  const dim3 grid(static_cast<unsigned>((blocks + kWarps - 1) / kWarps), rows);
  DL_LAUNCH((dequantize_kernel<Type>), grid, kThreads, as_stream(stream), static_cast<const uint8_t*>(packed), stride,
            count, blocks, static_cast<typename Type::Raw*>(out));
  return launched();
}

}  // namespace
}  // namespace cuda
}  // namespace distlib

DISTLIB_API int64_t distlib_cuda_quantize(const void* values, int64_t count, int64_t dtype, void* packed,
                                          void* stream) {
  using namespace distlib::cuda;
  if (count < 0 || count > int64_t{1} << 40) return cudaErrorInvalidValue;
  if (count == 0) return 0;
  const uint64_t n = static_cast<uint64_t>(count);
  switch (dtype) {
    case CODE_F32:
      return start_quantize<F32>(values, n, packed, stream);
    case CODE_F16:
      return start_quantize<F16>(values, n, packed, stream);
    case CODE_BF16:
      return start_quantize<BF16>(values, n, packed, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

DISTLIB_API int64_t distlib_cuda_dequantize(const void* packed, int64_t rows, int64_t packed_stride, int64_t count,
                                            int64_t dtype, void* out, void* stream) {
  using namespace distlib::cuda;
  if (count < 0 || count > int64_t{1} << 40 || rows < 0 || rows > 65535) return cudaErrorInvalidValue;
  if (count == 0 || rows == 0) return 0;
  const uint64_t n = static_cast<uint64_t>(count), stride = static_cast<uint64_t>(packed_stride);
  const auto r = static_cast<unsigned>(rows);
  switch (dtype) {
    case CODE_F32:
      return start_dequantize<F32>(packed, r, stride, n, out, stream);
    case CODE_F16:
      return start_dequantize<F16>(packed, r, stride, n, out, stream);
    case CODE_BF16:
      return start_dequantize<BF16>(packed, r, stride, n, out, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

DISTLIB_API int64_t distlib_cuda_reorder(const void* from, void* to, int64_t row_bytes, int64_t nodes, int64_t rails,
                                         void* stream) {
  using namespace distlib::cuda;
  if (row_bytes < 0 || nodes < 0 || rails < 0) return cudaErrorInvalidValue;
  if (row_bytes == 0 || nodes == 0 || rails == 0) return 0;
  const uint64_t bytes = static_cast<uint64_t>(row_bytes), chunks = (bytes + kCopied - 1) / kCopied;
  const uint64_t grid = chunks * static_cast<uint64_t>(nodes) * static_cast<uint64_t>(rails);
  if (grid > 0x7fffffff) return cudaErrorInvalidValue;
  DL_LAUNCH(reorder_kernel, static_cast<unsigned>(grid), kThreads, as_stream(stream), static_cast<const uint8_t*>(from),
            static_cast<uint8_t*>(to), bytes, static_cast<unsigned>(nodes), static_cast<unsigned>(rails));
  return launched();
}
