// How fast the kernels move bytes, as a ratio to memcpy in the same rounds: 1.0 is memcpy's rate of reading and
// writing. Time is the thread's own, so that other processes on the machine disturb it less.
//
//   g++ -O3 -std=c++17 -ffp-contract=off -Icsrc/cpu tests/cpp/kernels_bench.cpp csrc/cpu/kernels*.cpp -o kernels_bench
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.hpp"

using namespace distlib;

namespace {

// Shared 4 KiB pages, as in an arena.
uint8_t* shared_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) std::abort();
  std::memset(pages, 0, bytes);
  return static_cast<uint8_t*>(pages);
}

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

double median(std::vector<double>& values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main() {
  const int rounds = 21;
  std::printf("%s: bytes read and written per second, over memcpy's in the same rounds (medians of %d)\n", simd_name(),
              rounds);
  std::printf("%-6s %-9s %5s %5s %-9s %9s %12s\n", "dtype", "MiB each", "srcs", "dsts", "", "GB/s", "over memcpy");
  for (size_t mib : {1, 16, 64}) {
    const size_t bytes = mib << 20;
    std::vector<uint8_t*> buffers;
    for (int k = 0; k < 16; ++k) buffers.push_back(shared_pages(bytes));
    const auto row = [&](const char* label, int nsrc, int ndst, bool in_place, auto run) {
      std::vector<double> memcpys, ours;
      for (int round = 0; round < rounds; ++round) {
        const double start = thread_seconds();
        std::memcpy(buffers[15], buffers[14], bytes);
        const double middle = thread_seconds();
        run();
        memcpys.push_back(middle - start);
        ours.push_back(thread_seconds() - middle);
      }
      const double seconds = median(ours), streams = nsrc + ndst;
      std::printf("%-6s %-9zu %5d %5d %-9s %9.1f %12.2f\n", label, mib, nsrc, ndst, in_place ? "in place" : "",
                  static_cast<double>(bytes) * streams / seconds / 1e9, median(memcpys) / seconds * streams / 2);
    };
    row("copy", 1, 1, false, [&] { copy(buffers[8], buffers[0], bytes); });
    for (DType dtype : {DType::F32, DType::BF16, DType::F16})
      for (int nsrc : {2, 3, 4, 8})
        for (bool in_place : {true, false})
          for (int ndst : {1, nsrc}) {
            if (dtype != DType::F32 && (nsrc == 3 || nsrc == 8)) continue;
            if (!in_place && nsrc + ndst > 14) continue;
            void** to = reinterpret_cast<void**>(buffers.data()) + (in_place ? 0 : nsrc);
            const void* const* from = reinterpret_cast<const void* const*>(buffers.data());
            row(dtype == DType::F32    ? "f32"
                : dtype == DType::BF16 ? "bf16"
                                       : "f16",
                nsrc, ndst, in_place,
                [&] { reduce(to, ndst, from, nsrc, bytes / element_size(dtype), dtype, RedOp::SUM, 1); });
          }
    for (uint8_t* pages : buffers) munmap(pages, bytes);
  }
}
