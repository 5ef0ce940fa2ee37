// Pack and unpack: a block of threads for each chunk of a row.
#include "bucket.h"

#include "convert.cuh"
#include "elements.cuh"
#include "launch.cuh"
#include "memory.cuh"

namespace distlib {
namespace cuda {
namespace {

constexpr int kAhead = 8;  // partial sums that a thread reads before it adds them

// Threads of a block, by what they do with its elements. Few large blocks work on few stretches of memory at a time,
// which DRAM likes; those that sum, or read twice as much as they write, do better with more, whose ends do not
// coincide. Measured on an H200 for each: benchmarks/RESULTS.md.
constexpr int kMoving = 512, kNarrowing = 256, kWidening = 512, kScaling = 256;

struct Job {
  const DistlibPackRow* rows;
  const int32_t* chunk_rows;
  uint64_t chunk;
  double scale;
  const float* device_scale;
  unsigned* counter;
  double* partials;
  double* sum;
  float* found_inf;
};

template <class Raw>
struct Moved : Move<Raw> {
  static constexpr bool kKeeps = false;
  static constexpr int kThreads = kMoving;
  __device__ explicit Moved(const Job&) {}
};

template <class FromType, class ToType>
struct Cast {
  using From = typename FromType::Raw;
  using To = typename ToType::Raw;
  static constexpr bool kKeeps = false;
  static constexpr int kThreads = sizeof(From) < sizeof(To) ? kWidening : kNarrowing;
  __device__ explicit Cast(const Job&) {}
  __device__ __forceinline__ To operator()(From raw) { return ToType::raw(FromType::wide(raw)); }
};

template <class FromType, class ToType>
struct Scaled {
  using From = typename FromType::Raw;
  using To = typename ToType::Raw;
  using Wide = typename ToType::Wide;
  static constexpr bool kKeeps = true;
  static constexpr int kThreads = kScaling;
  Wide scale;
  double squares = 0;
  bool finite = true;

  __device__ explicit Scaled(const Job& job)
      : scale(static_cast<Wide>(job.scale * (job.device_scale == nullptr ? 1.0 : double{*job.device_scale}))) {}

  __device__ __forceinline__ To operator()(From raw) {
    const To stored = ToType::raw(canonical(FromType::wide(raw) * scale));
    const Wide value = ToType::wide(stored);
    squares += static_cast<double>(value) * static_cast<double>(value);
    if (sizeof(Wide) == 8) finite = finite && value - value == 0;  // squares of shorter types do not overflow
    return stored;
  }

  __device__ bool is_finite() const { return finite && (sizeof(Wide) == 8 || squares - squares == 0); }
};

template <class Each>
__global__ __launch_bounds__(Each::kThreads, 1024 / Each::kThreads) void pack_kernel(const Job job) {
  constexpr int kThreads = Each::kThreads;
  using From = typename Each::From;
  using To = typename Each::To;
  const DistlibPackRow row = job.rows[job.chunk_rows[blockIdx.x]];
  const Chunk part = chunk_of(row, job.chunk);
  Each each(job);
  convert<kThreads>(each, global<const From>(row.from) + part.begin, global<To>(row.to) + part.begin, part.count);
  if constexpr (Each::kKeeps) {
    if (job.found_inf != nullptr && !each.is_finite()) *job.found_inf = 1;  // whoever writes, writes the same
    if (job.sum == nullptr) return;
    const double sum = block_sum<kThreads>(each.squares);
    if (threadIdx.x == 0) job.partials[blockIdx.x] = sum;
    if (!is_last_block(job.counter)) return;
    const volatile double* const partials = job.partials;
    double mine = 0;
    for (unsigned from = threadIdx.x; from < gridDim.x; from += kAhead * kThreads) {
      double some[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const unsigned i = from + k * kThreads;
        some[k] = i < gridDim.x ? partials[i] : 0.0;
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) mine += some[k];
    }
    const double total = block_sum<kThreads>(mine);
    if (threadIdx.x == 0) *job.sum = canonical(total);
  }
}

template <class Each>
int start(const Job& job, int64_t chunks, void* stream) {
  DL_LAUNCH((pack_kernel<Each>), static_cast<unsigned>(chunks), Each::kThreads, as_stream(stream), job);
  return launched();
}

template <class From, class To>
int start_cast(const Job& job, bool plain, int64_t chunks, void* stream) {
  return plain ? start<Cast<From, To>>(job, chunks, stream) : start<Scaled<From, To>>(job, chunks, stream);
}

template <class Type>
int start_same(const Job& job, bool plain, int64_t chunks, void* stream) {
  return plain ? start<Moved<typename Type::Raw>>(job, chunks, stream) : start<Scaled<Type, Type>>(job, chunks, stream);
}

}  // namespace
}  // namespace cuda
}  // namespace distlib

DISTLIB_API int64_t distlib_cuda_pack(const void* rows, const void* chunk_rows, int64_t chunks, int64_t chunk,
                                      int64_t from, int64_t to, double scale, const void* device_scale, void* scratch,
                                      void* sum, void* found_inf, void* stream) {
  using namespace distlib::cuda;
  const bool plain = scale == 1 && device_scale == nullptr && sum == nullptr && found_inf == nullptr;
  if (chunks < 0 || chunks > 0x7fffffff || chunk <= 0 || chunk % 16 != 0 || (sum != nullptr && scratch == nullptr))
    return cudaErrorInvalidValue;
  if (chunks == 0) return sum == nullptr ? 0 : cudaMemsetAsync(sum, 0, sizeof(double), as_stream(stream));
  const Job job = {static_cast<const DistlibPackRow*>(rows),
                   static_cast<const int32_t*>(chunk_rows),
                   static_cast<uint64_t>(chunk),
                   scale,
                   static_cast<const float*>(device_scale),
                   static_cast<unsigned*>(scratch),
                   static_cast<double*>(scratch) + 1,
                   static_cast<double*>(sum),
                   static_cast<float*>(found_inf)};
  switch (from * 8 + to) {
    case CODE_F32 * 8 + CODE_F32:
      return start_same<F32>(job, plain, chunks, stream);
    case CODE_F64 * 8 + CODE_F64:
      return start_same<F64>(job, plain, chunks, stream);
    case CODE_F16 * 8 + CODE_F16:
      return start_same<F16>(job, plain, chunks, stream);
    case CODE_BF16 * 8 + CODE_BF16:
      return start_same<BF16>(job, plain, chunks, stream);
    case CODE_F32 * 8 + CODE_F16:
      return start_cast<F32, F16>(job, plain, chunks, stream);
    case CODE_F32 * 8 + CODE_BF16:
      return start_cast<F32, BF16>(job, plain, chunks, stream);
    case CODE_F16 * 8 + CODE_F32:
      return start_cast<F16, F32>(job, plain, chunks, stream);
    case CODE_BF16 * 8 + CODE_F32:
      return start_cast<BF16, F32>(job, plain, chunks, stream);
    case CODE_BYTES * 8 + CODE_BYTES:
      return plain ? start<Moved<uint8_t>>(job, chunks, stream) : cudaErrorInvalidValue;
    default:
      return cudaErrorInvalidValue;
  }
}
