// Threads of a block as fibers of one CPU thread: each has a stack and runs until it must wait for others of its block.
//
// Blocks run one after the other. A fiber gives way at __syncthreads, at warp operations and in spin_pause; who waits
// is asked again in every round. A round in which nobody gets on and nobody spins is a deadlock, and says so.
#pragma once

#include <sched.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local uint3 threadIdx = {0, 0, 0}, blockIdx = {0, 0, 0};
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

[[noreturn]] inline void give_up(const char* why) {
  std::fprintf(stderr, "CUDA on the CPU: block (%u, %u, %u), thread (%u, %u, %u): %s\n", blockIdx.x, blockIdx.y,
               blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z, why);
  std::abort();
}

#if defined(__x86_64__) && !defined(DISTLIB_UCONTEXT)  // defined where the other way is to be tested
#define DISTLIB_OWN_SWITCH
// What a call must preserve goes on the stack, the stack pointer to *save; then the same back from `load`. swapcontext
// does it, too, but with a system call each time.
__attribute__((naked, noinline, used)) static void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

// Where a fiber, or the thread that all of them run on, goes on.
struct Context {
#if defined(DISTLIB_OWN_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t saved;
#endif
  const void* bottom = nullptr;  // of its stack; AddressSanitizer wants to know
  size_t size = 0;
  void* fake = nullptr;
};

inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
#endif
#if defined(DISTLIB_OWN_SWITCH)
  switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.saved, &to.saved);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

struct Warp {
  unsigned arrived = 0;
  uint64_t generation = 0;
  uint64_t slots[2][warpSize] = {};  // of this operation and the one before, which slower lanes still read
};

class Block;
inline thread_local Block* running = nullptr;

class Block {
 public:
  using Body = void (*)(void*);

  ~Block() {
    for (const Fiber* fiber : fibers_) {
      munmap(fiber->memory, kGuard + kStack);
      delete fiber;
    }
  }

  // Runs `body` once per thread of the block; returns when all have ended.
  void run(dim3 shape, Body body, void* given) {
    const unsigned threads = shape.x * shape.y * shape.z;
    while (fibers_.size() < threads) fibers_.push_back(make());
    warps_.assign((threads + warpSize - 1) / warpSize, Warp());
    body_ = body;
    given_ = given;
    threads_ = alive_ = threads;
    arrived_ = 0;
    for (unsigned i = 0; i < threads; ++i) {
      fibers_[i]->done = false;
      fibers_[i]->index = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    }
    Block* const before = running;
    running = this;
    for (unsigned idle = 0; alive_ > 0; ++idle) {
      progressed_ = spun_ = false;
      for (current_ = 0; current_ < threads; ++current_) {
        if (fibers_[current_]->done) continue;
        threadIdx = fibers_[current_]->index;
        switch_context(host_, fibers_[current_]->context);
      }
      if (progressed_) {
        idle = 0;
        continue;
      }
      if (!spun_) give_up("deadlock: threads wait for each other at different barriers or warp operations");
      if (idle < kYields)  // what it waits for is another process's to do
        sched_yield();
      else
        usleep(kNap);  // there may be more processes than cores
    }
    running = before;
  }

  // Lets the other threads of the block go on.
  void yield() { switch_context(fibers_[current_]->context, host_); }

  void spin() {
    spun_ = true;
    yield();
  }

  // Waits for all threads of the block that have not ended. Returns the sum of what they gave.
  int barrier(int value) {
    const uint64_t mine = generation_;
    sums_[mine & 1] += value;
    ++arrived_;
    release_if_complete();
    while (generation_ == mine) yield();
    progressed_ = true;
    return sums_[mine & 1];
  }

  // All lanes of `mask` meet; slots then holds what each gave, until the operation after the next.
  const uint64_t* meet(unsigned mask, uint64_t value) {
    const unsigned lane = current_ % warpSize;
    if (!(mask >> lane & 1)) give_up("a warp operation whose mask leaves out the thread that calls it");
    Warp& warp = warps_[current_ / warpSize];
    const unsigned lanes = threads_ - current_ / warpSize * warpSize;
    const unsigned present = lanes >= warpSize ? ~0u : (1u << lanes) - 1;
    const uint64_t mine = warp.generation;
    warp.slots[mine & 1][lane] = value;
    if (++warp.arrived == static_cast<unsigned>(__builtin_popcount(mask & present))) {
      warp.arrived = 0;
      ++warp.generation;
    }
    while (warp.generation == mine) yield();
    progressed_ = true;
    return warp.slots[mine & 1];
  }

  unsigned lane() const { return current_ % warpSize; }

 private:
  struct Fiber {
    Context context;
    char* memory;
    bool done;
    uint3 index;
  };

#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 256 << 10;
#else
  static constexpr size_t kStack = 64 << 10;
#endif
  static constexpr size_t kGuard = 64 << 10;          // at least a page everywhere
  static constexpr unsigned kYields = 16, kNap = 50;  // rounds; microseconds

  [[noreturn]] static void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &running->host_.bottom, &running->host_.size);
#endif
    for (;;) {  // a fiber serves one block after the other
      Block& block = *running;
      block.body_(block.given_);
      block.fibers_[block.current_]->done = true;
      block.progressed_ = true;
      --block.alive_;
      block.release_if_complete();
      block.yield();
    }
  }

  static Fiber* make() {
    Fiber* const fiber = new Fiber();
    void* const memory =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) give_up("no memory for a fiber's stack");
    fiber->memory = static_cast<char*>(memory);
    fiber->context.bottom = fiber->memory + kGuard;
    fiber->context.size = kStack;
#if defined(DISTLIB_OWN_SWITCH)
    // Six registers to be popped, then where to "return" to; a function begins 8 bytes off a multiple of 16.
    void** const top = reinterpret_cast<void**>(fiber->memory + kGuard + kStack - 24);
    top[0] = nullptr;
    top[-1] = reinterpret_cast<void*>(&fiber_main);
    for (int i = 2; i <= 7; ++i) top[-i] = nullptr;
    fiber->context.stack_pointer = top - 7;
#else
    getcontext(&fiber->context.saved);
    fiber->context.saved.uc_stack.ss_sp = fiber->memory + kGuard;
    fiber->context.saved.uc_stack.ss_size = kStack;
    fiber->context.saved.uc_link = nullptr;
    makecontext(&fiber->context.saved, reinterpret_cast<void (*)()>(&fiber_main), 0);
#endif
    return fiber;
  }

  void release_if_complete() {
    if (arrived_ == 0 || arrived_ < alive_) return;
    arrived_ = 0;
    ++generation_;
    sums_[generation_ & 1] = 0;
  }

  std::vector<Fiber*> fibers_;
  std::vector<Warp> warps_;
  Context host_;
  Body body_ = nullptr;
  void* given_ = nullptr;
  unsigned threads_ = 0, alive_ = 0, arrived_ = 0, current_ = 0;
  uint64_t generation_ = 0;
  int sums_[2] = {0, 0};
  bool progressed_ = false, spun_ = false;
};

// Runs a kernel: `body` is called by every thread of every block.
template <class Kernel>
void launch(dim3 grid, dim3 block, Kernel body) {
  static thread_local Block fibers;
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        fibers.run(block, [](void* given) { (*static_cast<Kernel*>(given))(); }, &body);
      }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  cuda_on_cpu::running->barrier(0);
}

inline int __syncthreads_count(int predicate) {
  return cuda_on_cpu::running->barrier(predicate != 0);
}

inline int __syncthreads_or(int predicate) {
  return cuda_on_cpu::running->barrier(predicate != 0) != 0;
}

inline int __syncthreads_and(int predicate) {
  return cuda_on_cpu::running->barrier(predicate == 0) == 0;
}

inline void __syncwarp(unsigned mask = ~0u) {
  cuda_on_cpu::running->meet(mask, 0);
}

namespace cuda_on_cpu {

// The value of lane `source` of the same `width` lanes, or one's own where there is no such lane.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warps exchange 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const int lane = static_cast<int>(running->lane()), base = lane / width * width;
  const uint64_t* const slots = running->meet(mask, bits);
  if (source < base || source >= base + width) return value;
  std::memcpy(&value, &slots[source], sizeof value);
  return value;
}

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  const int lane = static_cast<int>(cuda_on_cpu::running->lane());
  return cuda_on_cpu::shuffle(mask, value, lane / width * width + source % width, width);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<int>(cuda_on_cpu::running->lane() + delta), width);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<int>(cuda_on_cpu::running->lane()) - static_cast<int>(delta),
                              width);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize) {
  return cuda_on_cpu::shuffle(mask, value, static_cast<int>(cuda_on_cpu::running->lane()) ^ lanes, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* const slots = cuda_on_cpu::running->meet(mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane)
    if (mask >> lane & 1 && slots[lane]) votes |= 1u << lane;
  return votes;
}

inline int __any_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, predicate) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  return __ballot_sync(mask, !predicate) == 0;
}
