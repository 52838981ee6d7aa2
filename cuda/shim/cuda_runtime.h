// Stands in for CUDA's header of this name so that a kernel compiles as plain C++ and its arithmetic, indices and
// barriers are tested on a machine without a GPU. shim/driver.cpp launches; tests/ops/shim.py compiles both.
//
// Blocks run one after another; the threads of a block are fibers on one operating-system thread, each running until
// it meets a barrier or a shuffle. That is deterministic, and shim_schedule() reverses the order in which threads run,
// so a missing barrier shows as a different result; where a kernel tells its accesses to shared memory (WKV_READS,
// WKV_WRITES), it is found itself. Shared memory starts as NaN. A barrier or an operation of a whole warp that only some
// threads reach, a race, and a failed WKV_ASSERT end the launch with a text. Covers what the kernels here use:
// one-dimensional grids, one shared object per kernel, one struct of arguments. shim/warp.h adds tensor cores.
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
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline Index threadIdx, blockIdx, blockDim;

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
constexpr size_t kSharedBytes = 512 * 1024;  // more than any card has, since Exact32 takes twice of what runs there
constexpr size_t kStaticBytes = 48 * 1024;   // what CUDA gives a block without being asked
constexpr size_t kPostBytes = 64;

enum State { kReady, kTogether, kAtBarrier, kDone };

struct Fiber {
  State state;
  bool started;
  jmp_buf resume;
  unsigned turns;  // operations of a whole warp so far
};

// An operation of a whole warp: what each lane brings and takes. Two of them alternate, so that a fast thread does not
// overwrite what a slow one has yet to take.
struct Together {
  const char* what;
  bool done;
  alignas(16) unsigned char brought[kWarp][kPostBytes], taken[kWarp][kPostBytes];
};

// Who last wrote and read two bytes of shared memory, and after how many barriers of the block and of the warp.
struct Access {
  int writer, reader;  // threads; kNobody, kSeveral
  unsigned written_block, written_warp, read_block, read_warp;
};
constexpr int kNobody = -1, kSeveral = -2;

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
  Together together[2];
  size_t dynamic_bytes = 0;
  unsigned blocks_begun = 0, block_barriers = 0, warp_barriers[kMaxThreads / kWarp];
  int64_t bytes_in = 0, bytes_out = 0;  // of global memory, as far as kernels count them
  alignas(128) unsigned char shared[kSharedBytes];
  Access access[kSharedBytes / 2];
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
  static_assert(sizeof(T) <= kStaticBytes, "more shared memory than a block has");
  return *reinterpret_cast<T*>(machine.shared);
}

template <typename T>
T& dynamic_shared() {
  require(sizeof(T) <= machine.dynamic_bytes, "more shared memory than the launch asked for");
  return *reinterpret_cast<T*>(machine.shared);
}

// Whether this thread may rely on the order of its access and one by `thread` after so many barriers.
inline bool in_order(int thread, unsigned block, unsigned warp) {
  const int self = machine.current;
  if (thread == kNobody || thread == self || block < machine.block_barriers) return true;
  return thread >= 0 && thread / kWarp == self / kWarp && warp < machine.warp_barriers[self / kWarp];
}

inline Access* accesses(const void* pointer, size_t bytes, size_t* count) {
  const size_t at = size_t(static_cast<const unsigned char*>(pointer) - machine.shared);
  require(at < kSharedBytes && at + bytes <= kSharedBytes, "not in shared memory");
  *count = (at % 2 + bytes + 1) / 2;
  return machine.access + at / 2;
}

// Called where kernels read and write shared memory: fails if another thread's write, or a read before a write, is not
// set apart by a barrier.
inline void reads(const void* pointer, size_t bytes) {
  size_t count;
  Access* access = accesses(pointer, bytes, &count);
  const int self = machine.current;
  for (Access* a = access; a < access + count; ++a) {
    require(in_order(a->writer, a->written_block, a->written_warp), "a race: read without a barrier after the write");
    const bool current = a->read_block == machine.block_barriers && a->reader != kNobody;
    a->reader = current && a->reader != self ? kSeveral : self;
    a->read_block = machine.block_barriers;
    a->read_warp = machine.warp_barriers[self / kWarp];
  }
}
inline void writes(const void* pointer, size_t bytes) {
  size_t count;
  Access* access = accesses(pointer, bytes, &count);
  const int self = machine.current;
  for (Access* a = access; a < access + count; ++a) {
    require(in_order(a->reader, a->read_block, a->read_warp), "a race: written without a barrier after a read");
    require(in_order(a->writer, a->written_block, a->written_warp), "a race: written twice without a barrier");
    a->writer = self, a->written_block = machine.block_barriers;
    a->written_warp = machine.warp_barriers[self / kWarp];
  }
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
    const int waiting = count(first, last, kTogether);
    if (waiting == 0) return true;
    if (waiting < last - first) return note_failure("only some threads of a warp reached an operation of all of them");
    release(first, last);
  }
  return false;
}

inline bool run_block() {
  const int threads = machine.threads;
  for (int i = 0; i < threads; ++i) machine.fibers[i].started = false;
  for (int i = 0; i < threads; ++i) machine.fibers[i].turns = 0;
  const size_t bytes = std::max(machine.dynamic_bytes, kStaticBytes);
  std::memset(machine.shared, 0xff, bytes);  // NaN as float
  std::fill_n(machine.access, bytes / 2, Access{kNobody, kNobody, 0, 0, 0, 0});
  machine.block_barriers = 0;
  ++machine.blocks_begun;
  std::fill_n(machine.warp_barriers, kMaxThreads / kWarp, 0u);
  release(0, threads);
  while (count(0, threads, kDone) < threads) {
    const int warps = (threads + kWarp - 1) / kWarp;
    for (int n = 0; n < warps; ++n) {
      const int first = (machine.reversed ? warps - 1 - n : n) * kWarp;
      if (!run_warp(first, std::min(first + kWarp, threads))) return false;
    }
    const int waiting = count(0, threads, kAtBarrier);
    if (waiting > 0 && waiting < threads) return note_failure("only some threads of a block reached __syncthreads");
    if (waiting == threads) release(0, threads), ++machine.block_barriers;
  }
  return true;
}

}  // namespace shim

inline void __syncthreads() { shim::yield(shim::kAtBarrier); }

namespace shim {

// `together(brought, taken)` happens once, when every lane of the warp has brought its In; each takes its Out.
template <typename Out, typename In, typename F>
Out by_the_warp(const char* what, const In& in, F together) {
  static_assert(sizeof(In) <= kPostBytes && sizeof(Out) <= kPostBytes);
  const int lane = machine.current % kWarp, lanes = std::min(kWarp, machine.threads - machine.current + lane);
  Together& turn = machine.together[machine.fibers[machine.current].turns++ % 2];
  std::memcpy(turn.brought[lane], &in, sizeof in);
  turn.what = what;
  turn.done = false;
  yield(kTogether);
  require(turn.what == what, "the threads of a warp do different things at a time");
  if (!turn.done) {
    In brought[kWarp];
    Out taken[kWarp];
    for (int i = 0; i < lanes; ++i) std::memcpy(&brought[i], turn.brought[i], sizeof(In));
    together(brought, taken);
    for (int i = 0; i < lanes; ++i) std::memcpy(turn.taken[i], &taken[i], sizeof(Out));
    turn.done = true;
  }
  Out out;
  std::memcpy(&out, turn.taken[lane], sizeof out);
  return out;
}

// x of the lane `source`.
template <typename T>
T from_lane(const char* what, unsigned mask, T x, int source) {
  const int first = machine.current / kWarp * kWarp, lanes = std::min(kWarp, machine.threads - first);
  require(mask == uint32_t((uint64_t(1) << lanes) - 1), "the shuffle's mask is not the warp's threads");
  require(source >= 0 && source < lanes, "shuffle with a thread that does not exist");
  struct Post {
    T x;
    int source;
  };
  return by_the_warp<T>(what, Post{x, source}, [lanes](const Post* brought, T* taken) {
    for (int i = 0; i < lanes; ++i) taken[i] = brought[brought[i].source].x;
  });
}

}  // namespace shim

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int other) {
  return shim::from_lane("shuffle", mask, x, (shim::machine.current % shim::kWarp) ^ other);
}
template <typename T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return shim::from_lane("shuffle", mask, x, lane);
}
inline void __syncwarp() {
  shim::by_the_warp<int>("barrier of a warp", 0, [](const int*, int* taken) {
    std::fill_n(taken, shim::kWarp, 0);
    ++shim::machine.warp_barriers[shim::machine.current / shim::kWarp];
  });
}

namespace shim {

// Runs body(arguments) as every thread of every block. False, with a text in machine.failure, if the kernel is broken.
inline bool launch(void (*body)(void*), void* arguments, int64_t blocks, int threads, size_t dynamic_bytes = 0) {
  machine.body = body;
  machine.arguments = arguments;
  machine.threads = threads;
  machine.failure[0] = 0;
  machine.dynamic_bytes = dynamic_bytes;
  blockIdx.x = threadIdx.x = 0;
  blockDim.x = unsigned(threads);
  if (dynamic_bytes > kSharedBytes) return note_failure("more shared memory than there is");
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
// Bytes that kernels have read from and written to global memory since the last call, as far as they count them.
extern "C" inline __attribute__((used, visibility("default"))) void shim_traffic(int64_t* in, int64_t* out) {
  *in = shim::machine.bytes_in, *out = shim::machine.bytes_out;
  shim::machine.bytes_in = shim::machine.bytes_out = 0;
}
