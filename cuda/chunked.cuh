// What the chunked WKV kernels share: where a block works, sums over the tokens of a chunk, a ring of loads for the
// serial kernels. Legend: B batch, T tokens, H heads, N head size, D documents, L tokens of a chunk.
//
// A sequence is cut into chunks of L tokens from its own first token. What a last chunk lacks are tokens that leave the
// state alone: zeros, with a decay of 1. Chunks are numbered as the segments of Sequences are; a number is a *slot*,
// and a hand-over has a place for every slot and head.
#pragma once

#include "warp.cuh"

namespace wkv {

// One chunk of one head of one sequence. Slots, heads and sequences have 32 bits here, since a 64-bit division takes a
// hundred instructions; a grid has no more blocks anyway.
template <int N, int L>
struct Chunk {
  int64_t number;        // slot * H + head, where its hand-overs are
  int head;
  int tokens;            // 1 to L; 0: there is no chunk of that slot
  int64_t base, stride;  // elements of a [B, T, H, N] tensor: of its first token, and from one token to the next

  __device__ __forceinline__ explicit Chunk(const Sequences& all) : number(blockIdx.x) {
    const unsigned heads = unsigned(all.heads), slot = blockIdx.x / heads;
    const unsigned each = (unsigned(all.tokens) + L - 1) / L;
    const unsigned sequence = all.offsets ? unsigned(all.template sequence_of<L>(slot)) : slot / each;
    const unsigned first = all.offsets ? unsigned(all.template first_segment<L>(sequence)) : sequence * each;
    place(all, sequence, int(blockIdx.x - slot * heads), int(slot - first) * L);
  }
  // The chunk of a sequence and head that begins `from` tokens after its sequence.
  __device__ __forceinline__ Chunk(const Sequences& all, int64_t number, unsigned sequence, int head, int from)
      : number(number) {
    place(all, sequence, head, from);
  }

 private:
  __device__ __forceinline__ void place(const Sequences& all, unsigned sequence, int in_head, int from) {
    const int left = int(all.length(sequence)) - from;
    head = in_head;
    tokens = left < 0 ? 0 : left < L ? left : L;
    stride = all.heads * N;
    base = (all.begin(sequence) + from) * stride + head * N;
  }
};

// A thread's share of an L x N matrix: kRows rows of eight columns.
template <int N, int L>
struct Share {
  static constexpr int kThreads = L * N / 8 < 4 * N ? L * N / 8 : 4 * N;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kRows = L * N / 8 / kThreads;
  static constexpr int kOctets = N / 8;
  static_assert(kOctets < 32 && kThreads % 32 == 0);
  int row, column;

  __device__ __forceinline__ Share()
      : row(int(threadIdx.x / unsigned(kOctets)) * kRows), column(int(threadIdx.x % unsigned(kOctets)) * 8) {}

  // Eight elements of each of this thread's rows of a [B, T, H, N] tensor; zeros behind the chunk's last token.
  template <typename T>
  __device__ __forceinline__ void load(Octet<T> (&out)[kRows], const T* tensor, const Chunk<N, L>& chunk) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      out[i] = load_octet(tensor + chunk.base + (row + i) * chunk.stride + column, row + i < chunk.tokens);
  }
};

// A chunk of a tensor on its way to shared memory, as it is.
template <typename T, typename F, int N, int L>
__device__ __forceinline__ void fetch(Operand<F, L, N>& to, const T* tensor, const Chunk<N, L>& chunk) {
  const Share<N, L> part;
#pragma unroll
  for (int i = 0; i < Share<N, L>::kRows; ++i) {
    const int t = part.row + i;
    to.fetch_octet(t, part.column, tensor + chunk.base + t * chunk.stride + part.column, t < chunk.tokens);
  }
}

__device__ __forceinline__ void read_shared(float (&out)[8], const float* from) {
  WKV_READS(from, sizeof out);
  const Octet<float> got = *reinterpret_cast<const Octet<float>*>(from);
#pragma unroll
  for (int e = 0; e < 8; ++e) out[e] = got.value[e];
}
__device__ __forceinline__ void write_shared(float* to, const float (&x)[8]) {
  Octet<float> put;
#pragma unroll
  for (int e = 0; e < 8; ++e) put.value[e] = x[e];
  WKV_WRITES(to, sizeof put);
  *reinterpret_cast<Octet<float>*>(to) = put;
}

// Sums over the tokens of a chunk, for each of its N channels.
template <int N, int L>
struct TokenSums {
  using Part = Share<N, L>;
  float total[Part::kWarps][N];

  // before[i]: the sum of the rows before a thread's row i; upto[i]: with it. One barrier.
  __device__ __forceinline__ void run(
      const Part& part, const float (&x)[Part::kRows][8], float (&before)[Part::kRows][8], float (&upto)[Part::kRows][8]) {
    const int lane = lane_id();
    float own[8], sum[8], others[8] = {};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      own[e] = x[0][e];
#pragma unroll
      for (int i = 1; i < Part::kRows; ++i) own[e] += x[i][e];
      sum[e] = own[e];
#pragma unroll
      for (int distance = Part::kOctets; distance < 32; distance *= 2) {
        const float earlier = from_lane(sum[e], (lane - distance) & 31);
        if (lane >= distance) sum[e] += earlier;
      }
    }
    if (lane >= 32 - Part::kOctets) write_shared(&total[warp_id()][part.column], sum);
    __syncthreads();
    for (int warp = 0; warp < warp_id(); ++warp) {
      float earlier[8];
      read_shared(earlier, &total[warp][part.column]);
#pragma unroll
      for (int e = 0; e < 8; ++e) others[e] += earlier[e];
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float earlier = from_lane(sum[e], (lane - Part::kOctets) & 31);
      float now = lane >= Part::kOctets ? others[e] + earlier : others[e];
#pragma unroll
      for (int i = 0; i < Part::kRows; ++i) {
        before[i][e] = now;
        now += x[i][e];
        upto[i][e] = now;
      }
    }
  }
  // After run(): the sum of all rows of a channel.
  __device__ __forceinline__ float all(int channel) const {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Part::kWarps; ++warp) {
      WKV_READS(&total[warp][channel], sizeof(float));
      sum += total[warp][channel];
    }
    return sum;
  }
};

// Zeros above the diagonal, and on it if `strictly`, in a block on the diagonal.
__device__ __forceinline__ void lower(Sum& sum, bool strictly = false) {
  sum.each([&](float& x, int row, int column) { x = column < row || (column == row && !strictly) ? x : 0.0f; });
}

// Sums of a Sum's columns: each lane's for its own four, `part` being what its rows give. Every lane gets the result.
__device__ __forceinline__ void sum_over_rows(float (&part)[4]) {
#pragma unroll
  for (int distance = 4; distance < 32; distance *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) part[i] += from_lane_xor(part[i], distance);
}
// The column of a Sum's value[i] among the lane's four.
__device__ __forceinline__ constexpr int column_of(int i) { return i % 2 + i / 4 * 2; }

// In each column of a slice of `blocks` blocks, from the last row to the first: every number becomes the sum of itself
// and all below it.
template <int blocks>
__device__ __forceinline__ void sum_from_below(Sum (&x)[blocks]) {
  float below[4] = {};
#pragma unroll
  for (int group = 2 * blocks - 1; group >= 0; --group)  // of eight rows
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& value = x[group / 2].value[i % 2 + group % 2 * 2 + i / 2 * 4];
      float sum = value;
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        const float other = from_lane(sum, (lane_id() + distance) & 31);
        if (lane_id() + distance < 32) sum += other;
      }
      value = sum + below[i];
      below[i] += from_lane(sum, lane_id() % 4);
    }
}

// The chunks of one head of one sequence, for a block that walks through them with rows of the state in registers:
// 16 for each warp. Several blocks may share a head.
template <int N, int L>
struct Walk {
  unsigned sequence;
  int head, chunks, threads, rows, row;  // this block's rows begin at `row`
  int64_t first, stride;                 // numbers: of its first chunk, and from one chunk to the next
  int64_t state;                         // sequence * H + head

  __device__ __forceinline__ explicit Walk(const Sequences& all)
      : threads(int(blockDim.x)), rows(threads / 2), stride(all.heads) {
    const unsigned splits = unsigned(N / rows), heads = unsigned(all.heads), block = blockIdx.x / splits;
    sequence = block / heads, head = int(block - sequence * heads);
    chunks = int((unsigned(all.length(sequence)) + L - 1) / L);
    first = all.offsets ? all.template first_segment<L>(sequence) * stride + head
                        : int64_t(sequence) * chunks * stride + head;
    row = int(blockIdx.x - block * splits) * rows;
    state = block;
  }
  __device__ __forceinline__ int64_t number(int chunk) const { return first + chunk * stride; }
  __device__ __forceinline__ int own_row() const { return row + warp_id() * 16; }
};

// 16 rows of an N x N float32 state, a Sum for every 16 columns, from and to those of all sequences and heads.
template <int N>
__device__ __forceinline__ void load_state(Sum (&state)[N / 16], const float* states, int64_t number, int row) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    state[j] = states ? load_rows(states + (number * N + row) * N + 16 * j, N, 16) : Sum{};
}
template <int N>
__device__ __forceinline__ void store_state(const Sum (&state)[N / 16], float* states, int64_t number, int row) {
  if (!states) return;
#pragma unroll
  for (int j = 0; j < N / 16; ++j) store_rows(states + (number * N + row) * N + 16 * j, N, 16, state[j]);
}

// How many blocks of so many threads a multiprocessor's registers hold if `all` threads fill it: 512 with 128 registers
// each, 384 with 168. Long chunks and operands in two parts, of which shared memory holds half as many, need more.
template <typename F, int L>
__device__ __forceinline__ constexpr int blocks(int all, int threads) {
  const int count = (L > 32 || F::kPlanes > 1 ? all / 2 : all) / threads;
  return count < 1 ? 1 : count;
}

}  // namespace wkv

// A kernel `symbol`. What follows is a type with its arguments, its threads at most, how many blocks of these a
// multiprocessor's registers shall hold, and what it does with an object in dynamic shared memory, whose size stands
// beside the kernel as `symbol`_shared.
#define WKV_CHUNKED_KERNEL(symbol, ...)                                                        \
  using symbol##_type = __VA_ARGS__;                                                           \
  WKV_BYTES(symbol, symbol##_type::Arguments)                                                  \
  extern "C" {                                                                                 \
  __device__ unsigned int symbol##_shared = sizeof(symbol##_type::Shared);                     \
  __global__ void __launch_bounds__(symbol##_type::kThreads, symbol##_type::kBlocks)           \
      symbol(symbol##_type::Arguments arguments) {                                             \
    WKV_DYNAMIC_SHARED(symbol##_type::Shared, shared);                                         \
    symbol##_type::run(arguments, shared);                                                     \
  }                                                                                            \
  }
