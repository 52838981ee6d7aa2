// What a block of RWKV computes between its projections, each region forward and backward in one pass over memory:
//     mix            token shift and M lerps: out_m = x + (previous - x) (share_m [+ change_m of the token])
//     relu_square    relu(h)^2
//     pre7           RWKV-7's decay, key, value and the two factors of its state's update, from the projections
//     post7          RWKV-7's GroupNorm, bonus and gate, from the recurrence's output
//     gated_norm     RWKV-5's and -6's GroupNorm and gate
// The formulas are those of src/rwkv_bone/ops/regions/twins.py. Arithmetic is fp32, rounded once at the results.
//
// A thread works on 16 bytes of channels and walks a strip of tokens, so that what all tokens share is loaded once. kLanes
// threads lie side by side over the channels, the others of a block over strips; a head's channels are within one warp,
// where shuffles sum over them. Nothing passes from block to block: gradients of what all tokens share are summed over
// the tokens of a block, written as one part per block, and `totals` adds the parts up. So results repeat bit for bit.
// Legend: B batch, T tokens, C channels, N head size, M mixed results. Tokens are numbered over the batch, 0 to B T.
#pragma once

#include "common.cuh"

namespace regions {

using namespace wkv;

constexpr int kThreads = 256;
constexpr int kMost = 6;  // mixed results, and parameters whose gradients one launch sums

template <typename T>
constexpr int kWidth = int(16 / sizeof(T));  // channels of a thread

template <int W>
struct Row {
  float value[W];

  __device__ __forceinline__ float& operator[](int e) { return value[e]; }
  __device__ __forceinline__ float operator[](int e) const { return value[e]; }
};

// {f(0), f(1), ...}
template <int W, typename F>
__device__ __forceinline__ Row<W> row_of(F f) {
  Row<W> row;
#pragma unroll
  for (int e = 0; e < W; ++e) row[e] = f(e);
  return row;
}

template <typename T>
struct alignas(16) Pack {
  T value[kWidth<T>];
};

template <int W, typename T>
__device__ __forceinline__ Row<W> load(const T* from) {
  static_assert(W % kWidth<T> == 0, "whole packs");
  Row<W> row;
#pragma unroll
  for (int first = 0; first < W; first += kWidth<T>) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + first);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) row[first + e] = to_float(pack.value[e]);
  }
  return row;
}

template <typename T, int W>
__device__ __forceinline__ void store(T* to, const Row<W>& row) {
#pragma unroll
  for (int first = 0; first < W; first += kWidth<T>) {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) assign(pack.value[e], row[first + e]);
    *reinterpret_cast<Pack<T>*>(to + first) = pack;
  }
}

// A tensor that comes as T or as float32.
template <typename T>
struct Either {
  const void* values;  // may be null: not there
  int64_t wide;        // float32

  __device__ __forceinline__ Row<kWidth<T>> at(int64_t element) const {
    return wide ? load<kWidth<T>>(static_cast<const float*>(values) + element)
                : load<kWidth<T>>(static_cast<const T*>(values) + element);
  }
};

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// What a launch covers: every `strip` tokens of kWidth channels have a thread.
struct Area {
  int64_t tokens, channels, strip;
};

// This thread's part of it.
template <typename T, int kLanes>
struct Place {
  static constexpr int kBlockChannels = kLanes * kWidth<T>;
  int64_t tokens, channels, strip;
  int64_t block;    // of tokens
  int64_t channel;  // the first of kWidth
  int64_t first;    // token of the strip

  __device__ __forceinline__ explicit Place(const Area& all)
      : tokens(all.tokens), channels(all.channels), strip(all.strip) {
    const int64_t across = (channels + kBlockChannels - 1) / kBlockChannels;
    block = blockIdx.x / across;
    channel = blockIdx.x % across * kBlockChannels + threadIdx.x % kLanes * kWidth<T>;
    first = (block * (kThreads / kLanes) + threadIdx.x / kLanes) * strip;
  }
  // Whether there is a token of that number in this thread's channels.
  __device__ __forceinline__ bool has(int64_t token) const { return token < tokens && channel < channels; }
  __device__ __forceinline__ int64_t element(int64_t token) const { return token * channels + channel; }
  // Of a [B, T, C] tensor; zeros where there is no such token, or no tensor.
  __device__ __forceinline__ Row<kWidth<T>> row(const T* tensor, int64_t token) const {
    return tensor && has(token) ? load<kWidth<T>>(tensor + element(token)) : Row<kWidth<T>>{};
  }
  __device__ __forceinline__ Row<kWidth<T>> row(const Either<T>& tensor, int64_t token) const {
    return has(token) ? tensor.at(element(token)) : Row<kWidth<T>>{};
  }
  // Of a [C] tensor.
  __device__ __forceinline__ Row<kWidth<T>> shared(const Either<T>& tensor) const {
    return tensor.values && channel < channels ? tensor.at(channel) : Row<kWidth<T>>{};
  }
  template <typename U>
  __device__ __forceinline__ void put(U* tensor, int64_t token, const Row<kWidth<T>>& row) const {
    if (has(token)) store(tensor + element(token), row);
  }
};

// Sums over the tokens of a block.
template <typename T>
struct BlockSums {
  float value[kThreads * kWidth<T>];

  // Writes the sums of `part` over the block's strips, always in the same order, to parts [blocks, count, C]; all threads
  // of the block call it.
  template <int kLanes>
  __device__ __forceinline__ void save(const Place<T, kLanes>& place, const Row<kWidth<T>>& part, float* parts,
                                       int count, int number) {
    constexpr int kBlock = Place<T, kLanes>::kBlockChannels;
    static_assert(kBlock <= kThreads, "a thread for each channel");
    store(value + threadIdx.x * kWidth<T>, part);
    __syncthreads();
    const int64_t channel = place.channel - threadIdx.x % kLanes * kWidth<T> + threadIdx.x;
    if (threadIdx.x < kBlock && channel < place.channels) {
      float sum = 0.0f;
      for (int strip = 0; strip < kThreads / kLanes; ++strip) sum += value[strip * kBlock + threadIdx.x];
      parts[(place.block * count + number) * place.channels + channel] = sum;
    }
    __syncthreads();
  }
};

struct Totals {
  const float* parts;  // [blocks, columns]
  int64_t blocks, columns, each;
  float* out[kMost];  // column c is out[c / each][c % each]; null: not wanted
};

constexpr int kColumns = 32;  // of a block; the others of its threads take every so-many-th part

struct TotalsShared {
  float value[kThreads / kColumns][kColumns];
};

__device__ __forceinline__ void totals(const Totals& p) {
  WKV_SHARED(TotalsShared, shared);
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  float sum = 0.0f;
  if (column < p.columns)
    for (int64_t block = slice; block < p.blocks; block += kThreads / kColumns)
      sum += p.parts[block * p.columns + column];
  shared.value[slice][lane] = sum;
  __syncthreads();
  if (slice || column >= p.columns) return;
  for (int other = 1; other < kThreads / kColumns; ++other) sum += shared.value[other][lane];
#pragma unroll
  for (int i = 0; i < kMost; ++i)  // a list among a kernel's arguments takes no index that is not known beforehand
    if (column / p.each == i && p.out[i]) p.out[i][column % p.each] = sum;
}

// ---------------------------------------------------------------------------------------------------------------- mix

// The sequence that holds a token.
struct Walk {
  int64_t sequence, begin, end;

  __device__ __forceinline__ Walk(const Sequences& all, int64_t token) {
    int64_t low = 0, high = all.count;
    if (!all.offsets) low = token / all.tokens;
    while (all.offsets && high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (all.offsets[middle] <= token ? low : high) = middle;
    }
    sequence = low, begin = all.begin(low), end = all.begin(low + 1);
  }
  __device__ __forceinline__ void forward_to(const Sequences& all, int64_t token) {
    while (token >= end) ++sequence, begin = end, end = all.begin(sequence + 1);
  }
  __device__ __forceinline__ void back_to(const Sequences& all, int64_t token) {
    while (token < begin) --sequence, end = begin, begin = all.begin(sequence);
  }
};

template <typename T>
struct MixInputs {
  Sequences sequences;
  Area area;
  const T* x;
  const T* last;      // [last_rows, C], the rows before the first sequences; zeros before the others
  int64_t last_rows;
  Either<T> shares;  // [M, C]
  const T* changes;  // [M, B, T, C]; null for kernels without
};

template <typename T>
struct MixForward {
  MixInputs<T> in;
  T* out[kMost];
};

template <typename T>
struct MixBackward {
  MixInputs<T> in;  // x and last may be null where no parts are wanted
  const T* grads[kMost];
  T* dx;
  float* dlast;  // [carried, C]
  int64_t carried;
  T* dchanges;   // null for kernels without
  float* parts;  // [blocks, M, C]; null for kernels without
};

constexpr int kMixLanes = 8;

template <typename T>
using MixPlace = Place<T, kMixLanes>;

// The row before a token that there is, in its sequence.
template <typename T>
__device__ __forceinline__ Row<kWidth<T>> row_before(const MixInputs<T>& in, const MixPlace<T>& place, const Walk& at,
                                                     int64_t token) {
  if (token > at.begin) return place.row(in.x, token - 1);
  if (at.sequence >= in.last_rows) return {};
  return load<kWidth<T>>(in.last + place.element(at.sequence));
}

template <typename T, int M>
struct Shares {
  Row<kWidth<T>> value[M];

  __device__ __forceinline__ Shares(const MixInputs<T>& in, const MixPlace<T>& place) {
#pragma unroll
    for (int m = 0; m < M; ++m) value[m] = in.shares.at(m * place.channels + place.channel);
  }
  // Of one token.
  template <bool kChanging>
  __device__ __forceinline__ Row<kWidth<T>> at(const MixInputs<T>& in, const MixPlace<T>& place, int m,
                                               int64_t token) const {
    if (!kChanging) return value[m];
    const Row<kWidth<T>> change = load<kWidth<T>>(in.changes + place.element(m * place.tokens + token));
    return row_of<kWidth<T>>([&](int e) { return value[m][e] + change[e]; });
  }
};

template <typename T, int M, bool kChanging>
__device__ __forceinline__ void mix_forward(const MixForward<T>& p) {
  constexpr int W = kWidth<T>;
  const MixPlace<T> place(p.in.area);
  if (!place.has(place.first)) return;
  const Shares<T, M> shares(p.in, place);
  Walk at(p.in.sequences, place.first);
  Row<W> before = row_before(p.in, place, at, place.first);
  for (int64_t token = place.first; token < place.first + place.strip && token < place.tokens; ++token) {
    at.forward_to(p.in.sequences, token);
    if (token == at.begin) before = row_before(p.in, place, at, token);
    const Row<W> x = place.row(p.in.x, token);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const Row<W> share = shares.template at<kChanging>(p.in, place, m, token);
      place.put(p.out[m], token, row_of<W>([&](int e) { return x[e] + (before[e] - x[e]) * share[e]; }));
    }
    before = x;
  }
}

// Backward in time. `next` is what a token gets from the one after it in its sequence.
template <typename T, int M, bool kChanging, bool kTrained>
__device__ __forceinline__ void mix_backward(const MixBackward<T>& p) {
  constexpr int W = kWidth<T>;
  const MixPlace<T> place(p.in.area);
  Row<W> sums[M] = {};
  if (place.has(place.first)) {
    const Shares<T, M> shares(p.in, place);
    const int64_t whole = place.first + place.strip, end = whole < place.tokens ? whole : place.tokens;
    Row<W> next = {};
    Walk at(p.in.sequences, end - 1);
    if (end < at.end) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Row<W> g = place.row(p.grads[m], end), share = shares.template at<kChanging>(p.in, place, m, end);
        next = row_of<W>([&](int e) { return next[e] + g[e] * share[e]; });
      }
    }
    for (int64_t token = end - 1; token >= place.first; --token) {
      at.back_to(p.in.sequences, token);
      Row<W> delta = {}, own = {}, passed = {};
      if (kTrained || kChanging) {
        const Row<W> x = place.row(p.in.x, token), before = row_before(p.in, place, at, token);
        delta = row_of<W>([&](int e) { return before[e] - x[e]; });
      }
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const Row<W> g = place.row(p.grads[m], token), share = shares.template at<kChanging>(p.in, place, m, token);
#pragma unroll
        for (int e = 0; e < W; ++e) {
          own[e] += g[e] * (1.0f - share[e]);
          passed[e] += g[e] * share[e];
        }
        const Row<W> change = row_of<W>([&](int e) { return g[e] * delta[e]; });
        if (kChanging) store(p.dchanges + place.element(m * place.tokens + token), change);
        if (kTrained) sums[m] = row_of<W>([&](int e) { return sums[m][e] + change[e]; });
      }
      place.put(p.dx, token, row_of<W>([&](int e) { return own[e] + next[e]; }));
      const bool begins = token == at.begin;
      if (begins && at.sequence < p.carried) store(p.dlast + place.element(at.sequence), passed);
      next = begins ? Row<W>{} : passed;
    }
  }
  if constexpr (kTrained) {
    WKV_SHARED(BlockSums<T>, shared);
#pragma unroll
    for (int m = 0; m < M; ++m) shared.save(place, sums[m], p.parts, M, m);
  }
}

// -------------------------------------------------------------------------------------------------------- relu_square

template <typename T>
struct ReluSquare {
  int64_t numbers;
  const T* h;
  const T* g;  // backward alone
  T* out;
};

template <typename T>
__device__ __forceinline__ float relu_square(float h, float g, bool backward) {
  const float positive = h < 0.0f ? 0.0f : h;  // NaN stays
  return backward ? 2.0f * positive * g : positive * positive;
}

template <typename T, bool kBackward>
__device__ __forceinline__ void relu_square(const ReluSquare<T>& p) {
  constexpr int W = kWidth<T>;
  const int64_t first = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * W;
  if (first + W <= p.numbers) {
    const Row<W> h = load<W>(p.h + first), g = kBackward ? load<W>(p.g + first) : Row<W>{};
    store(p.out + first, row_of<W>([&](int e) { return relu_square<T>(h[e], g[e], kBackward); }));
    return;
  }
  for (int64_t i = first; i < p.numbers; ++i)
    assign(p.out[i], relu_square<T>(to_float(p.h[i]), kBackward ? to_float(p.g[i]) : 0.0f, kBackward));
}

// -------------------------------------------------------------------------------------------------------------- heads

// Threads side by side: whole heads, and at least 128 bytes.
template <typename T, int N>
constexpr int kHeadLanes = N / kWidth<T> > 8 ? N / kWidth<T> : 8;

template <typename T, int N>
using HeadPlace = Place<T, kHeadLanes<T, N>>;

// The sum of x over a head; every thread of the warp calls it, and those of the head get the result.
template <typename T, int N>
__device__ __forceinline__ float head_sum(const Row<kWidth<T>>& x) {
  constexpr int W = kWidth<T>;
  static_assert(N % W == 0 && N / W <= 32, "a head's channels are within a warp");
  float sum = 0.0f;
#pragma unroll
  for (int e = 0; e < W; ++e) sum += x[e];
#pragma unroll
  for (int other = 1; other < N / W; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  return sum;
}

template <typename T>
struct Pre7Forward {
  Area area;
  const T *pw, *pa, *pv, *k0, *v0, *v_first;            // pv, v_first, v0_bias and v may be null: the first layer
  Either<T> w0, a0, v0_bias, k_k, k_a;
  float* w;  // may be null: not wanted
  T *k, *v, *a, *b;
};

template <typename T>
struct Pre7Backward {
  Area area;
  const T *pa, *pv, *k0, *v0, *v_first;
  Either<T> a0, v0_bias, k_k, k_a;
  Either<T> dw;
  const T *dk, *dv, *da, *db, *dk_bonus, *dv_bonus;
  T *dpw, *dpa, *dpv, *dk0, *dv0, *dv_first;
  float* parts;  // [blocks, 5, C]: of w0, a0, v0_bias, k_k, k_a; null for kernels without
};

// The direction of k0 k_k in each head, and one over its length; PyTorch's F.normalize.
template <typename T, int N>
struct Direction {
  Row<kWidth<T>> value;
  float scale;
  bool zero;  // too short to be scaled to length 1

  __device__ __forceinline__ Direction(const Row<kWidth<T>>& k0, const Row<kWidth<T>>& k_k) {
    constexpr float kShortest = 1e-12f;
    value = row_of<kWidth<T>>([&](int e) { return k0[e] * k_k[e]; });
    const float length =
        sqrtf(head_sum<T, N>(row_of<kWidth<T>>([&](int e) { return value[e] * value[e]; })));
    zero = length < kShortest;
    scale = 1.0f / (zero ? kShortest : length);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) value[e] *= scale;
  }
};

template <typename T, int N>
__device__ __forceinline__ void pre7_forward(const Pre7Forward<T>& p) {
  constexpr int W = kWidth<T>;
  const HeadPlace<T, N> place(p.area);
  const Row<W> w0 = place.shared(p.w0), a0 = place.shared(p.a0), v0_bias = place.shared(p.v0_bias);
  const Row<W> k_k = place.shared(p.k_k), k_a = place.shared(p.k_a);
  // Every thread goes through the whole strip, since the warp sums together.
  for (int64_t token = place.first; token < place.first + place.strip; ++token) {
    const Row<W> k0 = place.row(p.k0, token), pa = place.row(p.pa, token);
    const Direction<T, N> kk(k0, k_k);
    const Row<W> a = row_of<W>([&](int e) { return sigmoid(a0[e] + pa[e]); });
    if (p.w) {
      const Row<W> pw = place.row(p.pw, token);
      place.put(p.w, token, row_of<W>([&](int e) { return w0[e] + pw[e]; }));
    }
    if (p.pv) {
      const Row<W> pv = place.row(p.pv, token), v0 = place.row(p.v0, token), first = place.row(p.v_first, token);
      place.put(p.v, token, row_of<W>([&](int e) {
                  return v0[e] + (first[e] - v0[e]) * sigmoid(v0_bias[e] + pv[e]);
                }));
    }
    place.put(p.k, token, row_of<W>([&](int e) { return k0[e] * (1.0f + (a[e] - 1.0f) * k_a[e]); }));
    place.put(p.a, token, row_of<W>([&](int e) { return -kk.value[e]; }));
    place.put(p.b, token, row_of<W>([&](int e) { return kk.value[e] * a[e]; }));
  }
}

template <typename T, int N, bool kTrained>
__device__ __forceinline__ void pre7_backward(const Pre7Backward<T>& p) {
  constexpr int W = kWidth<T>;
  const HeadPlace<T, N> place(p.area);
  const Row<W> a0 = place.shared(p.a0), v0_bias = place.shared(p.v0_bias);
  const Row<W> k_k = place.shared(p.k_k), k_a = place.shared(p.k_a);
  Row<W> sums[5] = {};
  const auto sum = [&](int number, const Row<W>& x) {
    if (kTrained) sums[number] = row_of<W>([&](int e) { return sums[number][e] + x[e]; });
  };
  for (int64_t token = place.first; token < place.first + place.strip; ++token) {
    const Row<W> k0 = place.row(p.k0, token), pa = place.row(p.pa, token);
    const Direction<T, N> kk(k0, k_k);
    const Row<W> a = row_of<W>([&](int e) { return sigmoid(a0[e] + pa[e]); });
    const Row<W> db = place.row(p.db, token), da = place.row(p.da, token);
    // The gradient of kk, then of k0 k_k: across kk alone, since its length is always 1.
    const Row<W> dkk = row_of<W>([&](int e) { return db[e] * a[e] - da[e]; });
    const float along = head_sum<T, N>(row_of<W>([&](int e) { return dkk[e] * kk.value[e]; }));
    const Row<W> dn =
        row_of<W>([&](int e) { return (dkk[e] - (kk.zero ? 0.0f : kk.value[e] * along)) * kk.scale; });
    const Row<W> dk_wkv = place.row(p.dk, token), dk_bonus = place.row(p.dk_bonus, token);
    const Row<W> dk = row_of<W>([&](int e) { return dk_wkv[e] + dk_bonus[e]; });
    place.put(p.dk0, token, row_of<W>([&](int e) {
                return dk[e] * (1.0f + (a[e] - 1.0f) * k_a[e]) + dn[e] * k_k[e];
              }));
    const Row<W> dpa = row_of<W>([&](int e) {
      return (db[e] * kk.value[e] + dk[e] * k0[e] * k_a[e]) * a[e] * (1.0f - a[e]);
    });
    place.put(p.dpa, token, dpa);
    const Row<W> dw = place.row(p.dw, token);
    place.put(p.dpw, token, dw);
    sum(0, dw), sum(1, dpa);
    sum(3, row_of<W>([&](int e) { return dn[e] * k0[e]; }));
    sum(4, row_of<W>([&](int e) { return dk[e] * k0[e] * (a[e] - 1.0f); }));

    const Row<W> dv_wkv = place.row(p.dv, token), dv_bonus = place.row(p.dv_bonus, token);
    const Row<W> dv = row_of<W>([&](int e) { return dv_wkv[e] + dv_bonus[e]; });
    if (!p.pv) {
      place.put(p.dv0, token, dv);
      continue;
    }
    const Row<W> pv = place.row(p.pv, token), v0 = place.row(p.v0, token), first = place.row(p.v_first, token);
    const Row<W> gate = row_of<W>([&](int e) { return sigmoid(v0_bias[e] + pv[e]); });
    const Row<W> dpv =
        row_of<W>([&](int e) { return dv[e] * (first[e] - v0[e]) * gate[e] * (1.0f - gate[e]); });
    place.put(p.dpv, token, dpv);
    place.put(p.dv0, token, row_of<W>([&](int e) { return dv[e] * (1.0f - gate[e]); }));
    place.put(p.dv_first, token, row_of<W>([&](int e) { return dv[e] * gate[e]; }));
    sum(2, dpv);
  }
  if constexpr (kTrained) {
    WKV_SHARED(BlockSums<T>, shared);
#pragma unroll
    for (int number = 0; number < 5; ++number) shared.save(place, sums[number], p.parts, 5, number);
  }
}

// y of each head with mean 0 and variance 1.
template <typename T, int N>
struct Normal {
  Row<kWidth<T>> value;
  float scale;

  __device__ __forceinline__ Normal(const Row<kWidth<T>>& y, float eps) {
    const float mean = head_sum<T, N>(y) * (1.0f / N);
    value = row_of<kWidth<T>>([&](int e) { return y[e] - mean; });
    const Row<kWidth<T>> squares = row_of<kWidth<T>>([&](int e) { return value[e] * value[e]; });
    scale = 1.0f / sqrtf(head_sum<T, N>(squares) * (1.0f / N) + eps);
#pragma unroll
    for (int e = 0; e < kWidth<T>; ++e) value[e] *= scale;
  }
  // The gradient of y, from that of `value`.
  __device__ __forceinline__ Row<kWidth<T>> gradient(const Row<kWidth<T>>& d) const {
    const float mean = head_sum<T, N>(d) * (1.0f / N);
    const Row<kWidth<T>> products = row_of<kWidth<T>>([&](int e) { return d[e] * value[e]; });
    const float along = head_sum<T, N>(products) * (1.0f / N);
    return row_of<kWidth<T>>([&](int e) { return (d[e] - mean - value[e] * along) * scale; });
  }
};

template <typename T>
struct Post7Forward {
  Area area;
  int64_t eps;  // the bits of a float32
  const T *y, *r, *k, *v, *g;
  Either<T> r_k, weight, bias;
  T* z;
};

template <typename T>
struct Post7Backward {
  Area area;
  int64_t eps;
  const T *y, *r, *k, *v, *g;
  Either<T> r_k, weight, bias;
  const T* dz;
  T *dy, *dr, *dk, *dv, *dg;
  float* parts;  // [blocks, 3, C]: of r_k, weight, bias; null for kernels without
};

template <typename T, int N>
__device__ __forceinline__ void post7_forward(const Post7Forward<T>& p) {
  constexpr int W = kWidth<T>;
  const HeadPlace<T, N> place(p.area);
  const Row<W> r_k = place.shared(p.r_k), weight = place.shared(p.weight), bias = place.shared(p.bias);
  for (int64_t token = place.first; token < place.first + place.strip; ++token) {
    const Normal<T, N> y(place.row(p.y, token), __uint_as_float(uint32_t(p.eps)));
    const Row<W> r = place.row(p.r, token), k = place.row(p.k, token);
    const float bonus = head_sum<T, N>(row_of<W>([&](int e) { return r[e] * k[e] * r_k[e]; }));
    const Row<W> v = place.row(p.v, token), g = place.row(p.g, token);
    place.put(p.z, token, row_of<W>([&](int e) {
                return (y.value[e] * weight[e] + bias[e] + bonus * v[e]) * g[e];
              }));
  }
}

template <typename T, int N, bool kTrained>
__device__ __forceinline__ void post7_backward(const Post7Backward<T>& p) {
  constexpr int W = kWidth<T>;
  const HeadPlace<T, N> place(p.area);
  const Row<W> r_k = place.shared(p.r_k), weight = place.shared(p.weight), bias = place.shared(p.bias);
  Row<W> sums[3] = {};
  const auto sum = [&](int number, const Row<W>& x) {
    if (kTrained) sums[number] = row_of<W>([&](int e) { return sums[number][e] + x[e]; });
  };
  for (int64_t token = place.first; token < place.first + place.strip; ++token) {
    const Normal<T, N> y(place.row(p.y, token), __uint_as_float(uint32_t(p.eps)));
    const Row<W> r = place.row(p.r, token), k = place.row(p.k, token), v = place.row(p.v, token);
    const float bonus = head_sum<T, N>(row_of<W>([&](int e) { return r[e] * k[e] * r_k[e]; }));
    const Row<W> g = place.row(p.g, token), dz = place.row(p.dz, token);
    place.put(p.dg, token, row_of<W>([&](int e) {
                return dz[e] * (y.value[e] * weight[e] + bias[e] + bonus * v[e]);
              }));
    const Row<W> du = row_of<W>([&](int e) { return dz[e] * g[e]; });
    const float dbonus = head_sum<T, N>(row_of<W>([&](int e) { return du[e] * v[e]; }));
    place.put(p.dv, token, row_of<W>([&](int e) { return du[e] * bonus; }));
    place.put(p.dr, token, row_of<W>([&](int e) { return dbonus * k[e] * r_k[e]; }));
    place.put(p.dk, token, row_of<W>([&](int e) { return dbonus * r[e] * r_k[e]; }));
    place.put(p.dy, token, y.gradient(row_of<W>([&](int e) { return du[e] * weight[e]; })));
    sum(0, row_of<W>([&](int e) { return dbonus * r[e] * k[e]; }));
    sum(1, row_of<W>([&](int e) { return du[e] * y.value[e]; }));
    sum(2, du);
  }
  if constexpr (kTrained) {
    WKV_SHARED(BlockSums<T>, shared);
#pragma unroll
    for (int number = 0; number < 3; ++number) shared.save(place, sums[number], p.parts, 3, number);
  }
}

template <typename T>
struct GatedNormForward {
  Area area;
  int64_t eps;
  const T *y, *gate;
  Either<T> weight, bias;
  T* z;
};

template <typename T>
struct GatedNormBackward {
  Area area;
  int64_t eps;
  const T *y, *gate;
  Either<T> weight, bias;
  const T* dz;
  T *dy, *dgate;
  float* parts;  // [blocks, 2, C]: of weight, bias; null for kernels without
};

template <typename T, int N>
__device__ __forceinline__ void gated_norm_forward(const GatedNormForward<T>& p) {
  constexpr int W = kWidth<T>;
  const HeadPlace<T, N> place(p.area);
  const Row<W> weight = place.shared(p.weight), bias = place.shared(p.bias);
  for (int64_t token = place.first; token < place.first + place.strip; ++token) {
    const Normal<T, N> y(place.row(p.y, token), __uint_as_float(uint32_t(p.eps)));
    const Row<W> gate = place.row(p.gate, token);
    place.put(p.z, token, row_of<W>([&](int e) {
                return (y.value[e] * weight[e] + bias[e]) * (gate[e] * sigmoid(gate[e]));
              }));
  }
}

template <typename T, int N, bool kTrained>
__device__ __forceinline__ void gated_norm_backward(const GatedNormBackward<T>& p) {
  constexpr int W = kWidth<T>;
  const HeadPlace<T, N> place(p.area);
  const Row<W> weight = place.shared(p.weight), bias = place.shared(p.bias);
  Row<W> sums[2] = {};
  const auto sum = [&](int number, const Row<W>& x) {
    if (kTrained) sums[number] = row_of<W>([&](int e) { return sums[number][e] + x[e]; });
  };
  for (int64_t token = place.first; token < place.first + place.strip; ++token) {
    const Normal<T, N> y(place.row(p.y, token), __uint_as_float(uint32_t(p.eps)));
    const Row<W> gate = place.row(p.gate, token), dz = place.row(p.dz, token);
    const Row<W> opened = row_of<W>([&](int e) { return sigmoid(gate[e]); });
    place.put(p.dgate, token, row_of<W>([&](int e) {
                const float slope = opened[e] * (1.0f + gate[e] * (1.0f - opened[e]));
                return dz[e] * (y.value[e] * weight[e] + bias[e]) * slope;
              }));
    const Row<W> du = row_of<W>([&](int e) { return dz[e] * gate[e] * opened[e]; });
    place.put(p.dy, token, y.gradient(row_of<W>([&](int e) { return du[e] * weight[e]; })));
    sum(0, row_of<W>([&](int e) { return du[e] * y.value[e]; }));
    sum(1, du);
  }
  if constexpr (kTrained) {
    WKV_SHARED(BlockSums<T>, shared);
#pragma unroll
    for (int number = 0; number < 2; ++number) shared.save(place, sums[number], p.parts, 2, number);
  }
}

}  // namespace regions

#define REGION_KERNEL(symbol, body, Arguments)                                                      \
  WKV_BYTES(symbol, Arguments)                                                                      \
  extern "C" __global__ void __launch_bounds__(regions::kThreads) symbol(Arguments arguments) {     \
    body(arguments);                                                                                \
  }

// The kernels of one number format (its `label` is part of their names), and of one M or one N.
#define MIX_KERNELS(T, label, M)                                                                                      \
  REGION_KERNEL(mix_forward_##label##_##M, (regions::mix_forward<T, M, false>), regions::MixForward<T>)               \
  REGION_KERNEL(mix_backward_##label##_##M, (regions::mix_backward<T, M, false, false>), regions::MixBackward<T>)     \
  REGION_KERNEL(mix_trained_##label##_##M, (regions::mix_backward<T, M, false, true>), regions::MixBackward<T>)       \
  REGION_KERNEL(mix_totals_##label##_##M, regions::totals, regions::Totals)
#define MIX6_KERNELS(T, label, M)                                                                                     \
  REGION_KERNEL(mix6_forward_##label##_##M, (regions::mix_forward<T, M, true>), regions::MixForward<T>)               \
  REGION_KERNEL(mix6_backward_##label##_##M, (regions::mix_backward<T, M, true, false>), regions::MixBackward<T>)     \
  REGION_KERNEL(mix6_trained_##label##_##M, (regions::mix_backward<T, M, true, true>), regions::MixBackward<T>)       \
  REGION_KERNEL(mix6_totals_##label##_##M, regions::totals, regions::Totals)
#define RELU_SQUARE_KERNELS(T, label, one)                                                                            \
  REGION_KERNEL(relu_square_forward_##label##_##one, (regions::relu_square<T, false>), regions::ReluSquare<T>)        \
  REGION_KERNEL(relu_square_backward_##label##_##one, (regions::relu_square<T, true>), regions::ReluSquare<T>)
#define HEAD_KERNELS(region, Region, T, label, N)                                                                     \
  REGION_KERNEL(region##_forward_##label##_##N, (regions::region##_forward<T, N>), regions::Region##Forward<T>)       \
  REGION_KERNEL(region##_backward_##label##_##N, (regions::region##_backward<T, N, false>),                           \
                regions::Region##Backward<T>)                                                                         \
  REGION_KERNEL(region##_trained_##label##_##N, (regions::region##_backward<T, N, true>),                             \
                regions::Region##Backward<T>)                                                                         \
  REGION_KERNEL(region##_totals_##label##_##N, regions::totals, regions::Totals)
#define PRE7_KERNELS(T, label, N) HEAD_KERNELS(pre7, Pre7, T, label, N)
#define POST7_KERNELS(T, label, N) HEAD_KERNELS(post7, Post7, T, label, N)
#define GATED_NORM_KERNELS(T, label, N) HEAD_KERNELS(gated_norm, GatedNorm, T, label, N)
