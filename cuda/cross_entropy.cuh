// The cross-entropy of rows of logits, and in place of the logits its gradient: src/rwkv_bone/ops/cross_entropy.py has the
// definition, `softmax_gradient_`. A block makes a row. It reads it once for the largest logit and the sum of
// exponentials, each thread scaling its sum whenever it meets a larger logit, and once more for the gradient. Arithmetic is
// fp32; sums go over threads in a fixed order, so results repeat bit for bit. V is the size of the vocabulary.
#pragma once

#include "regions.cuh"

namespace cross_entropy {

using namespace wkv;
using regions::kWidth;
using regions::load;
using regions::Row;
using regions::row_of;
using regions::store;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kLowest = -3.402823466e38f;  // finite, so that nothing becomes inf - inf where logits are -inf

template <typename T>
struct Arguments {
  int64_t vocabulary;
  T* logits;               // [blocks, V]
  const int64_t* targets;  // [blocks]
  int64_t l2wrap;          // the bits of a float32
  int64_t gradient;        // 0: the logits stay as they are
  float* losses;           // [blocks]
};

struct Shared {
  float value[kWarps];
  int64_t place[kWarps];
};

// f of all threads' x, the same for each of them.
template <typename X, typename F>
__device__ __forceinline__ X over_block(X x, X* shared, F f) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x = f(x, __shfl_xor_sync(0xffffffffu, x, other));
  __syncthreads();  // whoever still reads what was there before
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  X all = shared[0];
  for (int warp = 1; warp < kWarps; ++warp) all = f(all, shared[warp]);
  return all;
}

// W numbers at a time, W a pack's or 1: rows begin anywhere if V is no multiple of a pack.
template <int W, typename T>
__device__ __forceinline__ Row<W> read(const T* from) {
  if constexpr (W == 1)
    return {to_float(*from)};
  else
    return load<W>(from);
}

template <typename T, int W>
__device__ __forceinline__ void write(T* to, const Row<W>& row) {
  if constexpr (W == 1)
    assign(*to, row[0]);
  else
    store(to, row);
}

template <typename T, int W>
__device__ __forceinline__ void row(const Arguments<T>& p, Shared& shared) {
  T* logits = p.logits + int64_t(blockIdx.x) * p.vocabulary;
  const int64_t packs = p.vocabulary / W, target = p.targets[blockIdx.x];
  const auto larger = [](float a, float b) { return a > b ? a : b; };

  float largest = kLowest, sum = 0.0f;
  int64_t at = packs;  // the first pack of this thread that holds its largest
  for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
    const Row<W> x = read<W>(logits + pack * W);
    float here = x[0];
#pragma unroll
    for (int e = 1; e < W; ++e) here = larger(here, x[e]);
    if (here > largest) {
      sum *= expf(largest - here);
      largest = here, at = pack;
    }
#pragma unroll
    for (int e = 0; e < W; ++e) sum += expf(x[e] - largest);
  }
  const float most = over_block(largest, shared.value, larger);
  sum *= expf(largest - most);
  const float total = over_block(sum, shared.value, [](float a, float b) { return a + b; });
  at = over_block(largest == most ? at : packs, shared.place, [](int64_t a, int64_t b) { return a < b ? a : b; });

  // Read before anybody writes a gradient.
  if (threadIdx.x == 0) {
    const bool there = target >= 0 && target < p.vocabulary;
    p.losses[blockIdx.x] = (there ? most - to_float(logits[target]) : __uint_as_float(0x7fc00000)) + logf(total);
  }
  if (!p.gradient) return;
  __syncthreads();
  const float l2wrap = __uint_as_float(uint32_t(p.l2wrap)), share = 1.0f / total;
  for (int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
    const Row<W> x = read<W>(logits + pack * W);
    Row<W> gradient =
        row_of<W>([&](int e) { return expf(x[e] - most) * share - (pack * W + e == target ? 1.0f : 0.0f); });
    bool found = pack != at;
#pragma unroll
    for (int e = 0; e < W; ++e) {
      if (!found && x[e] == most) gradient[e] += l2wrap * most, found = true;
    }
    write(logits + pack * W, gradient);
  }
}

template <typename T>
__device__ __forceinline__ void rows(const Arguments<T>& p) {
  WKV_SHARED(Shared, shared);
  if (p.vocabulary % kWidth<T> == 0)
    row<T, kWidth<T>>(p, shared);
  else
    row<T, 1>(p, shared);
}

}  // namespace cross_entropy

#define CROSS_ENTROPY_KERNELS(T, label, one)                                                                     \
  WKV_BYTES(cross_entropy_forward_##label##_##one, cross_entropy::Arguments<T>)                                  \
  extern "C" __global__ void __launch_bounds__(cross_entropy::kThreads)                                          \
      cross_entropy_forward_##label##_##one(cross_entropy::Arguments<T> arguments) {                             \
    cross_entropy::rows<T>(arguments);                                                                           \
  }
