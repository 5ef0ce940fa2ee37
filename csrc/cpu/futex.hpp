// Sleeping on a word of shared memory (Linux futex(2)), and the clock that all ranks of a host share.
#pragma once
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace distlib {

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t(t.tv_sec) * 1000000000 + t.tv_nsec;
}

// Sleeps until somebody wakes the word, its value is no longer `seen`, or `ns` have passed. Not FUTEX_PRIVATE: the
// sleepers are in other processes.
inline void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, int64_t ns) {
  timespec t{time_t(ns / 1000000000), long(ns % 1000000000)};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &t, nullptr, 0);
}

inline void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// A word that others sleep on: one writer, any number of sleepers. `sleepers` spares the writer a system call.
struct alignas(64) Signal {
  std::atomic<uint32_t> value;
  std::atomic<uint32_t> sleepers;

  void set(uint32_t v) {
    value.store(v, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) futex_wake_all(value);
  }
  void ring() {  // for words with many writers: any change is the message
    value.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst)) futex_wake_all(value);
  }
  void sleep(uint32_t seen, int64_t ns) {
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    if (value.load(std::memory_order_seq_cst) == seen) futex_wait(value, seen, ns);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
  }
};
static_assert(sizeof(Signal) == 64, "one cache line");
static_assert(std::atomic<uint32_t>::is_always_lock_free, "futex words are plain 32-bit atomics");

}  // namespace distlib
