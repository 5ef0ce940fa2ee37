// How fast the kernels move bytes, as a ratio to memcpy in the same round: 1.0 is memcpy's rate of reading and writing.
//
//   g++ -O3 -std=c++17 -ffp-contract=off -Icsrc/cpu tests/cpp/kernels_bench.cpp csrc/cpu/kernels*.cpp -o kernels_bench
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
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

}  // namespace

int main() {
  const int rounds = 21;
  std::printf("%s: bytes read and written per second, over memcpy's in the same round (medians of %d)\n", simd_name(),
              rounds);
  std::printf("%-6s %-9s %5s %5s %-9s %9s %12s\n", "dtype", "MiB each", "srcs", "dsts", "", "GB/s", "over memcpy");
  for (size_t mib : {1, 16, 64}) {
    const size_t bytes = mib << 20;
    std::vector<uint8_t*> buffers;
    for (int k = 0; k < 16; ++k) buffers.push_back(shared_pages(bytes));
    const auto row = [&](const char* label, int nsrc, int ndst, bool in_place, auto run) {
      std::vector<double> rates, ratios;
      for (int round = 0; round < rounds; ++round) {
        const auto now = std::chrono::steady_clock::now;
        const auto start = now();
        std::memcpy(buffers[15], buffers[14], bytes);
        const auto middle = now();
        run();
        const std::chrono::duration<double> ours = now() - middle, memcpys = middle - start;
        rates.push_back(static_cast<double>(bytes) * (nsrc + ndst) / ours.count() / 1e9);
        ratios.push_back(memcpys / ours * (nsrc + ndst) / 2);
      }
      std::sort(rates.begin(), rates.end());
      std::sort(ratios.begin(), ratios.end());
      std::printf("%-6s %-9zu %5d %5d %-9s %9.1f %12.2f\n", label, mib, nsrc, ndst, in_place ? "in place" : "",
                  rates[rounds / 2], ratios[rounds / 2]);
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
