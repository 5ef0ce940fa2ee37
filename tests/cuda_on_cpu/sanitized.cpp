// Every kernel of tables and blocks on memory that ends where it must, for AddressSanitizer and UBSan to watch; and
// what the fibers promise. Returns 0 when all is well.
#include "cuda/blocks.h"
#include "cuda/bucket.h"
#include "cuda/launch.cuh"
#include "cuda/library.h"
#include "cuda/optimizer.h"

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

void require(bool condition, const char* what, uint64_t which = 0) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%llu)\n", what, static_cast<unsigned long long>(which));
  std::exit(1);
}

// Bytes that begin `shift` after an aligned address and end where the allocation does.
class Bytes {
 public:
  Bytes(size_t size, size_t shift) : memory_(static_cast<char*>(std::calloc(size + shift, 1))), shift_(shift) {}
  ~Bytes() { std::free(memory_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;
  char* at() const { return memory_ + shift_; }
  uint64_t address() const { return reinterpret_cast<uint64_t>(at()); }

 private:
  char* memory_;
  size_t shift_;
};

constexpr uint64_t kCounts[] = {1, 2, 7, 8, 15, 16, 17, 31, 64, 65, 100, 255, 256, 257, 1000};
constexpr size_t kSizes[] = {4, 8, 2, 2, 0, 0, 0, 1};  // of dtypes, by code

void pack_everything() {
  const int64_t pairs[][2] = {{0, 0}, {0, 3}, {0, 2}, {3, 0}, {2, 0}, {2, 2}, {3, 3}, {1, 1}, {7, 7}};
  for (const auto& pair : pairs)
    for (const uint64_t count : kCounts)
      for (size_t shift = 0; shift < 4; ++shift)
        for (size_t other = 0; other < 9; other += 1 + other / 2)
          for (const bool plain : {true, false}) {
            if (pair[0] == 7 && !plain) continue;
            const size_t from_size = kSizes[pair[0]], to_size = kSizes[pair[1]];
            const Bytes from(count * from_size, shift * from_size), to(count * to_size, other * to_size);
            const int64_t chunk = 64, chunks = static_cast<int64_t>((count + 63) / 64);
            const DistlibPackRow row = {from.address(), to.address(), count, 0};
            const std::vector<int32_t> chunk_rows(static_cast<size_t>(chunks), 0);
            std::vector<double> scratch(static_cast<size_t>(chunks) + 1, 0.0);
            double sum = 1;
            float found = 0;
            require(
                distlib_cuda_pack(&row, chunk_rows.data(), chunks, chunk, pair[0], pair[1], plain ? 1 : 0.5, nullptr,
                                  scratch.data(), plain ? nullptr : &sum, plain ? nullptr : &found, nullptr) == 0,
                "pack", count);
            require(plain || (sum == 0 && found == 0 && scratch[0] == 0), "the sum of zeros", count);
          }
}

void step_everything() {
  struct Case {
    int64_t rule, param, grad, copy, has_m;
  };
  const Case cases[] = {{0, 0, 0, 0, 1}, {0, 0, 3, 3, 1}, {0, 0, 2, 2, 1}, {1, 0, 3, 0, 0},
                        {1, 0, 3, 3, 1}, {2, 0, 0, 2, 1}, {0, 1, 1, 0, 1}, {0, 3, 3, 0, 1}};
  for (const Case& c : cases)
    for (const uint64_t count : kCounts)
      for (size_t shift = 0; shift < 5; ++shift)
        for (const size_t other : {shift, size_t{1}}) {
          const size_t size = kSizes[c.param], state = size == 2 ? 4 : size, grad = kSizes[c.grad];
          const Bytes p(count * size, shift * size), g(count * grad, other * grad), m(count * state, shift * state),
              v(count * state, other * state), beside(count * 2, shift * 2);
          const bool has_beside = c.copy != 0 || c.param == 3;
          const DistlibStepRow row = {p.address(),
                                      g.address(),
                                      c.has_m != 0 ? m.address() : 0,
                                      c.rule == 0 ? v.address() : 0,
                                      has_beside ? beside.address() : 0,
                                      count,
                                      0,
                                      0};
          const int64_t chunks = static_cast<int64_t>((count + 63) / 64);
          const std::vector<int32_t> chunk_rows(static_cast<size_t>(chunks), 0);
          DistlibScalars scalars = {}, given = {};
          given.scale = given.decay = given.root_scale = 1;
          given.rate = given.eps = 0.1;
          require(distlib_cuda_step_scalars(&scalars, &given, nullptr) == 0, "scalars");
          require(distlib_cuda_step(&row, chunk_rows.data(), chunks, 64, c.rule, c.param, c.grad, c.copy, c.has_m,
                                    &scalars, nullptr) == 0,
                  "step", count);
        }
}

void square_everything() {
  for (const int64_t dtype : {0, 1, 2, 3})
    for (const uint64_t count : {uint64_t{1}, uint64_t{33}, uint64_t{16384}, uint64_t{16390}, uint64_t{70001}}) {
      const size_t size = kSizes[dtype];
      const Bytes values(count * size, size);
      const DistlibSquareRow row = {values.address(), count, 0, dtype};
      const size_t blocks = (count + 16383) / 16384;
      const std::vector<int32_t> block_rows(blocks, 0);
      std::vector<double> scratch(blocks + 1, 0.0);
      double sum = 1;
      require(distlib_cuda_sum_of_squares(&row, block_rows.data(), static_cast<int64_t>(count), scratch.data(), &sum,
                                          nullptr, nullptr) == 0 &&
                  sum == 0,
              "sum of squares", count);
    }
}

void quantize_and_reorder() {
  for (const int64_t dtype : {0, 2, 3})
    for (const uint64_t count : kCounts)
      for (const size_t shift : {0, 1, 3}) {
        const size_t size = kSizes[dtype], blocks = (count + 255) / 256;
        const Bytes values(count * size, shift * size), packed(blocks * 260, shift), out(count * size, shift * size);
        const auto n = static_cast<int64_t>(count);
        require(distlib_cuda_quantize(values.at(), n, dtype, packed.at(), nullptr) == 0, "quantize", count);
        require(distlib_cuda_dequantize(packed.at(), 1, 0, n, dtype, out.at(), nullptr) == 0, "dequantize", count);
      }
  for (const int64_t row : {1, 15, 16, 17, 70000})
    for (const size_t shift : {0, 1, 4}) {
      const Bytes from(static_cast<size_t>(row) * 6, shift), to(static_cast<size_t>(row) * 6, 5);
      require(distlib_cuda_reorder(from.at(), to.at(), row, 2, 3, nullptr) == 0, "reorder", static_cast<uint64_t>(row));
    }
}

// ---- What the fibers promise ----

__global__ void warp_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int sum = lane;
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  int down = __shfl_down_sync(0xffffffffu, lane, 3);
  const int up = __shfl_up_sync(0xffffffffu, lane, 3), from = __shfl_sync(0xffffffffu, lane, 5);
  const unsigned odd = __ballot_sync(0xffffffffu, lane & 1);
  if (lane >= 29) down -= lane;  // has nobody below: its own value
  const bool good = sum == 496 && down == (lane < 29 ? lane + 3 : 0) && up == (lane < 3 ? lane : lane - 3) &&
                    from == 5 && odd == 0xaaaaaaaau && __any_sync(0xffffffffu, lane == 7) &&
                    !__all_sync(0xffffffffu, lane == 7);
  if (good) atomicAdd(out, 1);
}

// Threads that wait by spinning, at barriers, and that have ended.
__global__ void meeting_kernel(uint32_t* word, int* out) {
  __shared__ int shared[128];
  if (threadIdx.x == 0) {
    while (distlib::cuda::load_acquire(word) != 1) distlib::cuda::spin_pause();
    distlib::cuda::store_release(word, 2u);
  }
  if (threadIdx.x == 127) {
    distlib::cuda::store_release(word, 1u);
    while (distlib::cuda::load_acquire(word) != 2) distlib::cuda::spin_pause();
  }
  if (threadIdx.x >= 64 && threadIdx.x < 96) return;
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  const int met = __syncthreads_count(threadIdx.x % 2 == 0);
  const unsigned other = threadIdx.x < 64 ? 63 - threadIdx.x : 223 - threadIdx.x;
  const bool good = met == 48 && shared[other] == static_cast<int>(other) && __syncthreads_or(threadIdx.x == 5) != 0 &&
                    __syncthreads_and(threadIdx.x != 5) == 0;
  if (good) atomicAdd(out, 1);
}

void fibers_meet() {
  int warps = 0, met = 0;
  DL_LAUNCH(warp_kernel, 3, 96, distlib::cuda::as_stream(nullptr), &warps);
  require(warps == 3 * 96, "warp operations", static_cast<uint64_t>(warps));
  for (int turn = 0; turn < 3; ++turn) {
    uint32_t word = 0;
    DL_LAUNCH(meeting_kernel, 1, 128, distlib::cuda::as_stream(nullptr), &word, &met);
  }
  require(met == 3 * 96, "barriers", static_cast<uint64_t>(met));
  DL_LAUNCH(warp_kernel, 1, 1025, distlib::cuda::as_stream(nullptr), &warps);
  require(distlib::cuda::launched() == cudaErrorInvalidConfiguration, "a block that is too large");
  require(distlib::cuda::launched() == 0, "an error that is told once");
}

}  // namespace

int main() {
  require(distlib_cuda_version() > 0, "version");
  fibers_meet();
  pack_everything();
  step_everything();
  square_everything();
  quantize_and_reorder();
  return 0;
}
