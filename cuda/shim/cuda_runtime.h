// Stands in for CUDA's header of this name so that a kernel compiles as plain C++ and its arithmetic, indices and
// barriers are tested on a machine without a GPU. shim/driver.cpp launches; tests/ops/shim.py compiles both.
//
// Blocks run one after another; the threads of a block are fibers on one operating-system thread, each running until
// it meets a barrier or a shuffle. That is deterministic, and shim_schedule() reverses the order in which threads run,
// so a missing barrier shows as a different result. Shared memory starts as NaN. A barrier or shuffle that only some
// threads reach, and a failed WKV_ASSERT, end the launch with a text. Covers what the kernels
// here use: one-dimensional grids, one shared object per kernel, one struct of arguments.
#pragma once

#define WKV_HOST_SHIM

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

namespace shim {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedBytes = 48 * 1024;  // what CUDA gives a block statically

enum State { kReady, kAtShuffle, kAtBarrier, kDone };

struct Fiber {
  State state;
  bool started;
  jmp_buf resume;
  unsigned shuffles;
  float posted[2];  // alternating, so that a fast thread does not overwrite what a slow one has yet to read
};

struct Machine {
  Fiber fibers[kMaxThreads];
  int threads = 0, current = 0;
  int64_t first_block = 0, last_block = INT64_MAX;
  bool reversed = false;
  jmp_buf scheduler;
  ucontext_t origin;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  char failure[256] = "";
  alignas(64) unsigned char shared[kSharedBytes];
};
inline Machine machine;
alignas(64) inline char stacks[kMaxThreads][kStackBytes];

// AddressSanitizer must be told which stack runs; elsewhere these do nothing.
#ifdef __SANITIZE_ADDRESS__
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline void enter_fiber(int i) {
  __sanitizer_start_switch_fiber(nullptr, stacks[i], kStackBytes);
}
inline void in_fiber() { __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes); }
inline void leave_fiber() { __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_bytes); }
inline void in_scheduler() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
#else
inline void enter_fiber(int) {}
inline void in_fiber() {}
inline void leave_fiber() {}
inline void in_scheduler() {}
#endif

// Called by a fiber: back to the scheduler, and on from here when it is this thread's turn again.
inline void yield(State state) {
  Fiber& self = machine.fibers[machine.current];
  self.state = state;
  if (_setjmp(self.resume) == 0) {
    leave_fiber();
    _longjmp(machine.scheduler, 1);
  }
  in_fiber();
}

inline bool note_failure(const char* what) {
  std::snprintf(machine.failure, sizeof machine.failure, "host shim: %s (block %u, thread %u)", what, blockIdx.x,
                threadIdx.x);
  return false;
}

// The failed thread is never resumed and its block is abandoned.
inline void require(bool condition, const char* what) {
  if (condition) return;
  note_failure(what);
  yield(kDone);
}

template <typename T>
T& shared_memory() {
  static_assert(sizeof(T) <= kSharedBytes, "more shared memory than a block has");
  return *reinterpret_cast<T*>(machine.shared);
}

inline void fiber_main() {
  in_fiber();
  machine.body(machine.arguments);
  yield(kDone);
}

inline void resume(int i) {
  machine.current = i;
  threadIdx.x = unsigned(i);
  Fiber& fiber = machine.fibers[i];
  if (_setjmp(machine.scheduler) == 0) {
    enter_fiber(i);
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks[i];
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, fiber_main, 0);
    swapcontext(&machine.origin, &context);
  }
  in_scheduler();
}

inline int count(int first, int last, State state) {
  return int(std::count_if(machine.fibers + first, machine.fibers + last,
                           [state](const Fiber& fiber) { return fiber.state == state; }));
}

inline bool run_ready(int first, int last) {
  for (int n = 0; n < last - first; ++n) {
    const int i = machine.reversed ? last - 1 - n : first + n;
    if (machine.fibers[i].state == kReady) resume(i);
    if (machine.failure[0]) return false;
  }
  return true;
}

inline void release(int first, int last) {
  for (int i = first; i < last; ++i) machine.fibers[i].state = kReady;
}

// Until each of the warp's threads waits at a barrier or has ended.
inline bool run_warp(int first, int last) {
  while (run_ready(first, last)) {
    const int waiting = count(first, last, kAtShuffle);
    if (waiting == 0) return true;
    if (waiting < last - first) return note_failure("only some threads of a warp reached a shuffle");
    release(first, last);
  }
  return false;
}

inline bool run_block() {
  const int threads = machine.threads;
  for (int i = 0; i < threads; ++i) machine.fibers[i].started = false;
  for (int i = 0; i < threads; ++i) machine.fibers[i].shuffles = 0;
  std::memset(machine.shared, 0xff, sizeof machine.shared);  // NaN as float
  release(0, threads);
  while (count(0, threads, kDone) < threads) {
    const int warps = (threads + kWarp - 1) / kWarp;
    for (int n = 0; n < warps; ++n) {
      const int first = (machine.reversed ? warps - 1 - n : n) * kWarp;
      if (!run_warp(first, std::min(first + kWarp, threads))) return false;
    }
    const int waiting = count(0, threads, kAtBarrier);
    if (waiting > 0 && waiting < threads) return note_failure("only some threads of a block reached __syncthreads");
    if (waiting == threads) release(0, threads);
  }
  return true;
}

}  // namespace shim

inline void __syncthreads() { shim::yield(shim::kAtBarrier); }

inline float __shfl_xor_sync(unsigned mask, float x, int other) {
  using shim::machine;
  const int lane = machine.current % shim::kWarp, first = machine.current - lane;
  const int lanes = std::min(shim::kWarp, machine.threads - first);
  shim::require(mask == uint32_t((uint64_t(1) << lanes) - 1), "the shuffle's mask is not the warp's threads");
  shim::require((lane ^ other) < lanes, "shuffle with a thread that does not exist");
  shim::Fiber& self = machine.fibers[machine.current];
  const unsigned turn = self.shuffles++ % 2;
  self.posted[turn] = x;
  shim::yield(shim::kAtShuffle);
  return machine.fibers[first + (lane ^ other)].posted[turn];
}

namespace shim {

// Runs body(arguments) as every thread of every block. False, with a text in machine.failure, if the kernel is broken.
inline bool launch(void (*body)(void*), void* arguments, int64_t blocks, int threads,
                   size_t shared_bytes) {
  machine.body = body;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.failure[0] = 0;
  blockIdx.x = threadIdx.x = 0;
  if (shared_bytes > kSharedBytes) return note_failure("more shared memory than a block has");
  if (blocks < 1 || threads < 1 || threads > kMaxThreads) return note_failure("invalid grid or block size");
  const int64_t last = std::min(machine.last_block, blocks);
  for (int64_t i = machine.first_block; i < last; ++i) {
    blockIdx.x = unsigned(i);
    if (!run_block()) return false;
  }
  return true;
}

}  // namespace shim

// Run only blocks [first, last) of every launch, and the threads of a block in reverse order.
extern "C" inline __attribute__((used, visibility("default"))) void shim_schedule(int64_t first, int64_t last,
                                                                                  int reversed) {
  shim::machine.first_block = first;
  shim::machine.last_block = last;
  shim::machine.reversed = reversed != 0;
}
