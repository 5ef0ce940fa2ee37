// The public face of the kernels: which instruction set to use, and when to bypass the caches.
#include "kernels.hpp"

#include <cassert>
#include <cstdlib>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace distlib {
namespace {

// A call that touches less than this leaves its result in the caches for whoever reads it next. Measured with 2 to 9
// streams on a 32 MiB L3: below 4 MiB ordinary stores win by up to 1.2, from 16 MiB on bypassing ones by 1.2 to 1.8.
constexpr size_t kBypassBytes = size_t{8} << 20;

bool cpu_has(const char* isa) {
#if defined(__x86_64__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  const bool avx2 = f16c && __builtin_cpu_supports("avx2");  // which also asks whether the kernel saves the registers
  if (!std::strcmp(isa, "avx2")) return avx2;
  if (!std::strcmp(isa, "avx512"))
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return !std::strcmp(isa, "scalar") || !std::strcmp(isa, "neon");  // part of every CPU they are compiled for
}

struct Choice {
  const KernelTable* table = nullptr;
  std::string error;

  Choice() {
    for (const char* isa : {"avx512", "avx2", "neon", "scalar"})
      if (!table) table = table_for(isa);
    const char* wanted = std::getenv("DISTLIB_SIMD");
    if (!wanted || !*wanted) return;
    if (const KernelTable* forced = table_for(wanted)) {
      table = forced;
      return;
    }
    std::string available;
    for (const char* isa : {"scalar", "neon", "avx2", "avx512"})
      if (table_for(isa)) available += (available.empty() ? "" : ", ") + std::string(isa);
    error = "DISTLIB_SIMD=" + std::string(wanted) + " cannot be used: this build on this CPU has " + available +
            "; set DISTLIB_SIMD to one of these, or unset it";
  }
};

const Choice& choice() {
  static const Choice chosen;
  return chosen;
}

bool is_bitwise(RedOp op) {
  return op == RedOp::BAND || op == RedOp::BOR || op == RedOp::BXOR;
}

}  // namespace

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::F16:
    case DType::BF16:
    case DType::I16:
      return 2;
    case DType::I8:
    case DType::U8:
    case DType::BOOL:
      return 1;
  }
  return 0;
}

bool reducible(DType dtype, RedOp op) {
  const bool floating = dtype == DType::F32 || dtype == DType::F64 || dtype == DType::F16 || dtype == DType::BF16;
  if (is_bitwise(op)) return !floating;
  return op != RedOp::AVG || dtype != DType::BOOL;
}

const KernelTable* table_for(const char* isa) {
  if (!cpu_has(isa)) return nullptr;
  if (!std::strcmp(isa, "avx512")) return avx512_table();
  if (!std::strcmp(isa, "avx2")) return avx2_table();
  if (!std::strcmp(isa, "neon")) return neon_table();
  return scalar_table();
}

void reduce_with(const KernelTable& table, void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t count,
                 DType dtype, RedOp op, int divisor, bool bypass_caches) {
  assert(reducible(dtype, op) && nsrc >= 1 && (op != RedOp::AVG || divisor >= 1));
  if (count == 0 || ndst == 0) return;
  if (op != RedOp::AVG) divisor = 1;
  if (nsrc == 1 && divisor == 1 && dtype != DType::BOOL) {  // nothing to compute: move bytes
    count *= element_size(dtype);
    dtype = DType::U8;
    op = RedOp::BOR;
  }
  table.reduce[static_cast<int>(dtype)][static_cast<int>(op)](dsts, ndst, srcs, nsrc, count, divisor, bypass_caches);
}

void copy_with(const KernelTable& table, void* dst, const void* src, size_t bytes, bool bypass_caches) {
  if (bytes == 0 || dst == src) return;
  if (bypass_caches && table.large_copy) {
    table.large_copy(dst, src, bytes);
  } else {
    std::memcpy(dst, src, bytes);
  }
}

void reduce(void* const* dsts, int ndst, const void* const* srcs, int nsrc, size_t count, DType dtype, RedOp op,
            int divisor) {
  const size_t bytes = count * element_size(dtype);
  // A destination that is a source is in the caches already when it is written: bypassing would only evict it.
  bool bypass_caches = bytes >= kBypassBytes / static_cast<size_t>(nsrc + ndst);
  for (int j = 0; j < ndst && bypass_caches; ++j)
    for (int k = 0; k < nsrc && bypass_caches; ++k) bypass_caches = dsts[j] != srcs[k];
  reduce_with(*choice().table, dsts, ndst, srcs, nsrc, count, dtype, op, divisor, bypass_caches);
}

void copy(void* dst, const void* src, size_t bytes) {
  copy_with(*choice().table, dst, src, bytes, bytes >= kBypassBytes / 2);
}

const char* simd_name() {
  return choice().table->name;
}

const char* simd_error() {
  return choice().error.empty() ? nullptr : choice().error.c_str();
}

}  // namespace distlib
