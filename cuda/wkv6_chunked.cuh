// WKV-6 and WKV-5 in chunks, on tensor cores: the recurrence of wkv6.cuh as products of matrices. WKV-5 is WKV-6 with a
// decay that does not change along time.
//
// Per chunk of L tokens, rows of matrices being tokens (r, k, v, dy: L x N), and with
//     before, after   for each token, the decay of all tokens of the chunk before it, and of all after it
//     whole           the decay of all its tokens
//     A               strictly lower: r_t . (k_s o decay of the tokens between s and t); diagonal: r_t . (u o k_t)
// and S being the state at the chunk's start, dS the gradient of that at its end:
//     forward   prepare           for each chunk    v^T (k after), whole
//               scan              over the chunks   S <- S whole + v^T (k after)
//               outputs           for each chunk    y = A v + (r before) S^T
//     backward  prepare_backward  for each chunk    dy^T (r before), whole
//               scan_backward     over the chunks   dS <- dS whole + dy^T (r before)
//               gradients         for each chunk    all gradients, from the inputs, dy, S and dS
//               sums              for each head     du, and WKV-5's dw, over the chunks
// The scans are elementwise.
//
// The decay has no lower bound, so A is no product of two matrices r e^G and k e^-G: the second may overflow. But take
// the pairs of tokens t > s whose highest different bit is h. A boundary b lies between the two, a multiple of h, and
// r_t times the decay of b .. t - 1 and k_s times that of s + 1 .. b - 1 are both at most what they were. So there is a
// *level* for h = 1, 2, 4 .. L / 2. Groups of 2h tokens have an even half (bit h is 0) and an odd one. A matrix z holds
//     of a token in the odd half   r times the decay of the tokens of its half before it
//     of a token in the even half  k times the decay of the tokens of its half after it
// and A is z z^T at that level's pairs. The gradients of r and k come from z, and that of the decay from sums of
// r o dr and k o dk within halves. Nothing cancels and nothing is divided by a decay. Every sum has a fixed order, so
// results repeat bit for bit.
//
// A warp works on a *patch*, 16 tokens by 16 channels, whose numbers it holds as a Sum does. Levels up to h = 8 stay in
// the registers of a warp; beyond, patches of the same channels meet in shared memory.
#pragma once

#include "chunked.cuh"
#include "wkv6.cuh"

namespace wkv6 {

// One struct a direction, for its kernels. Hand-overs have one place for every slot and head.
template <typename T, typename F>
struct ChunkedForward {
  using Input = T;
  using Element = typename F::Element;
  Sequences sequences;
  const T* r;
  const float* w;  // the raw decay
  const T *k, *v;
  const float *u, *s0;  // s0 may be null: zeros
  T* y;
  float* sT;        // may be null: not wanted
  Element* states;  // v^T (k after) at first; S of backward
  float* growth;    // whole - 1
};

template <typename T, typename F>
struct ChunkedBackward {
  using Input = T;
  using Element = typename F::Element;
  Sequences sequences;
  const T* r;
  const float* w;
  const T *k, *v;
  const float *u, *s0;
  const Element* states;
  const T* dy;
  const float* dsT;  // may be null: zeros
  float* growth;
  Element* dstates;  // dy^T (r before) at first
  float* sums;       // 2 N: du and, of WKV-5, dw
  T* dr;
  float* dw;
  T *dk, *dv;
  float *du, *ds0;  // ds0 may be null: not wanted
};

// How far long products are unrolled: not all of it, since what is loaded early for them takes registers.
template <typename F>
constexpr int kUnroll = 4 / F::kPlanes;

// ------------------------------------------------------------------------------------------------ patches
struct Patch {
  int token, channel;  // where in the chunk it begins

  // Of a Sum's value[i].
  __device__ __forceinline__ int token_of(int i) const { return token + lane_row() + i / 2 % 2 * 8; }
  __device__ __forceinline__ bool odd(int h, int i) const { return token_of(i) & h; }
};

template <int N, int L>
constexpr int kPatches = L / 16 * (N / 16) / Share<N, L>::kWarps;  // of each warp

template <int N, int L>
__device__ __forceinline__ Patch patch(int n) {
  const int number = warp_id() + n * Share<N, L>::kWarps;
  return {number / (N / 16) * 16, number % (N / 16) * 16};
}

// A number for each column of a patch: four in each lane, the same in all lanes of a column.
struct Columns {
  float value[4] = {};
};
// Which of the patch's columns these are: see column_of().
__device__ __forceinline__ int column_at(int c) { return lane_column() + c % 2 + c / 2 * 8; }

__device__ __forceinline__ Columns first_row(const Sum& x) {
  return {{x.value[0], x.value[1], x.value[4], x.value[5]}};
}
// Sums over a patch's tokens.
__device__ __forceinline__ Columns sum_over_tokens(const Sum& x) {
  Columns out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.value[column_of(i)] += x.value[i];
  sum_over_rows(out.value);
  return out;
}

// Numbers for all channels, from each 16 tokens of a chunk.
template <int N, int L>
struct ByTokens {
  float value[L / 16][N];

  __device__ __forceinline__ void put(const Patch& at, const Columns& x) {
    if (lane_row() != 0) return;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float* to = &value[at.token / 16][at.channel + column_at(c)];
      WKV_WRITES(to, sizeof *to);
      *to = x.value[c];
    }
  }
  // Those of the 16 tokens of that number.
  __device__ __forceinline__ Columns of(int number, const Patch& at) const {
    Columns out;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float* from = &value[number][at.channel + column_at(c)];
      WKV_READS(from, sizeof *from);
      out.value[c] = *from;
    }
    return out;
  }
  // sum += those of all tokens of the chunk that `which` says, by the number of their 16
  template <typename Which>
  __device__ __forceinline__ void add_to(Columns& sum, const Patch& at, Which which) const {
#pragma unroll
    for (int number = 0; number < L / 16; ++number) {
      if (!which(number)) continue;
      const Columns x = of(number, at);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum.value[c] += x.value[c];
    }
  }
  // Of one channel, all tokens.
  __device__ __forceinline__ float all(int channel) const {
    float sum = 0.0f;
#pragma unroll
    for (int number = 0; number < L / 16; ++number) {
      WKV_READS(&value[number][channel], sizeof(float));
      sum += value[number][channel];
    }
    return sum;
  }
};

// ------------------------------------------------------------------------------------------------ decays
// h up to 8: from the token in the other half of the group, whose number differs in bit h.
__device__ __forceinline__ Sum of_other_half(const Sum& x, int h) {
  Sum other;
#pragma unroll
  for (int i = 0; i < 8; ++i) other.value[i] = h == 8 ? x.value[i ^ 2] : from_lane_xor(x.value[i], 4 * h);
  return other;
}

__device__ __forceinline__ Sum exp_of(const Sum& x) {
  Sum out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.value[i] = expf(x.value[i]);
  return out;
}
__device__ __forceinline__ Sum product(const Sum& x, const Sum& y) {
  Sum out;
#pragma unroll
  for (int i = 0; i < 8; ++i) out.value[i] = x.value[i] * y.value[i];
  return out;
}
__device__ __forceinline__ void add(Sum& sum, const Sum& x) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.value[i] += x.value[i];
}

// Of each token's group, the decay of the tokens before it, of those after it, and of all. A group is one token first.
struct Decays {
  Sum before, after, all;

  Decays() = default;
  __device__ __forceinline__ explicit Decays(const Sum& log) : all(exp_of(log)) {
#pragma unroll
    for (int i = 0; i < 8; ++i) before.value[i] = after.value[i] = 1.0f;
  }

  // Groups of h tokens become groups of 2h.
  __device__ __forceinline__ void join(const Patch& at, int h) {
    const Sum other = of_other_half(all, h);
#pragma unroll
    for (int i = 0; i < 8; ++i) join(i, at.odd(h, i), other.value[i]);
  }
  // Likewise from 16 tokens on; `parts` has `all` of each 16.
  template <int N, int L>
  __device__ __forceinline__ void join(const Patch& at, int h, const ByTokens<N, L>& parts) {
    const int other = (at.token / h ^ 1) * (h / 16);
    Columns decay = parts.of(other, at);
#pragma unroll
    for (int n = 1; n < h / 16; ++n) {
      const Columns next = parts.of(other + n, at);
#pragma unroll
      for (int c = 0; c < 4; ++c) decay.value[c] *= next.value[c];
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) join(i, at.token & h, decay.value[column_of(i)]);
  }
  // z is the odd half's r and the even half's k times this, groups being halves.
  __device__ __forceinline__ Sum scale(const Patch& at, int h) const {
    Sum out;
#pragma unroll
    for (int i = 0; i < 8; ++i) out.value[i] = at.odd(h, i) ? before.value[i] : after.value[i];
    return out;
  }

 private:
  __device__ __forceinline__ void join(int i, bool odd, float other) {
    before.value[i] = odd ? before.value[i] * other : before.value[i];
    after.value[i] = odd ? after.value[i] : after.value[i] * other;
    all.value[i] *= other;
  }
};

// The log decay of a token whose raw decay is this. Nothing is left of a state long before the bound, which keeps
// infinity out of the gradient: there it would meet a zero.
__device__ __forceinline__ float log_decay(float raw) { return -expf(raw > 80.0f ? 80.0f : raw); }

// Log decays; 0 behind the chunk's last token.
template <Decay D, int N, int L>
__device__ __forceinline__ Sum log_decays(const float* w, const Chunk<N, L>& chunk, const Patch& at) {
  Sum x;
  if constexpr (D == Decay::kPerToken)
    x = load_rows(w + chunk.base + at.token * chunk.stride + at.channel, chunk.stride, chunk.tokens - at.token);
  else
    x.each([&](float& y, int, int column) { y = w[chunk.head * N + at.channel + column]; });
#pragma unroll
  for (int i = 0; i < 8; ++i) x.value[i] = at.token_of(i) < chunk.tokens ? log_decay(x.value[i]) : 0.0f;
  return x;
}

// A patch of a [B, T, H, N] tensor; zeros behind the chunk's last token.
template <typename T, int N, int L>
__device__ __forceinline__ Sum load(const T* tensor, const Chunk<N, L>& chunk, const Patch& at) {
  return load_rows(tensor + chunk.base + at.token * chunk.stride + at.channel, chunk.stride, chunk.tokens - at.token);
}
template <typename T, int N, int L>
__device__ __forceinline__ void store(T* tensor, const Chunk<N, L>& chunk, const Patch& at, const Sum& x) {
  store_rows(tensor + chunk.base + at.token * chunk.stride + at.channel, chunk.stride, chunk.tokens - at.token, x);
}

// ------------------------------------------------------------------------------------------------ prepare
template <typename F, int N, int L>
struct PrepareShared {
  Operand<F, L, N> values, keys;
  ByTokens<N, L> decays, logs;
};

// out = values^T (keys times `after`, or `before`), and growth.
template <typename F, Decay D, int N, int L, bool after, typename T>
__device__ __forceinline__ void prepare(
    const Sequences& sequences, const T* values, const T* keys, const float* w, typename F::Element* out, float* growth,
    PrepareShared<F, N, L>& s) {
  constexpr int warps = Share<N, L>::kWarps, patches = kPatches<N, L>;
  const Chunk<N, L> chunk(sequences);
  if (chunk.tokens == 0) return;
  fetch(s.values, values, chunk);
  commit_async();
  Sum in[patches];
  Decays x[patches];
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    in[n] = load(keys, chunk, at);
    const Sum log = log_decays<D>(w, chunk, at);
    s.logs.put(at, sum_over_tokens(log));
    x[n] = Decays(log);
#pragma unroll
    for (int h = 1; h < 16; h *= 2) x[n].join(at, h);
    if (L > 16) s.decays.put(at, first_row(x[n].all));
  }
  if (L > 16) __syncthreads();
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
#pragma unroll
    for (int h = 16; h < L; h *= 2) x[n].join(at, h, s.decays);
    s.keys.put(at.token, at.channel, block_of<F>(product(in[n], after ? x[n].after : x[n].before)));
  }
  wait_async<0>();
  __syncthreads();
  if (threadIdx.x < N) {
    WKV_MOVES_OUT(4);
    growth[chunk.number * N + threadIdx.x] = expm1f(s.logs.all(int(threadIdx.x)));
  }
  for (int task = warp_id(); task < (N / 16) * (N / 16); task += warps) {
    const int i = task / (N / 16) * 16, j = task % (N / 16) * 16;
    Sum sum;
#pragma unroll
    for (int t = 0; t < L; t += 16) multiply(sum, s.values.transposed(t, i), s.keys.transposed(t, j));
    Operand<F, N, N>::hand_over(out + chunk.number * (N * N * F::kPlanes), i, j, block_of<F>(sum));
  }
}

// ------------------------------------------------------------------------------------------------ scan
// A block carries a piece of one head's state in registers, eight neighbours in each thread, and has loads under way
// for many chunks: nothing but memory limits it.
template <typename F, int N>
struct Piece {
  static constexpr int kThreads = 128;
  static constexpr int kElements = 8 * kThreads;
  static constexpr int kStages = 8;
  static constexpr int kBlocks = N * N / kElements;  // of a state
  struct Stage {
    alignas(16) typename F::Element value[F::kPlanes][kElements];
    alignas(16) float growth[N];
  };
  struct Shared {
    Stage stage[kStages];
  };
};

// state <- state (1 + growth) + what `handed` has, which gets the state before that. A state is multiplied by its
// growth, not by `whole`: a float next to 1 is off by 3e-8, and a slow decay repeats that for many chunks.
template <typename F, int N, int L, bool backward>
__device__ __forceinline__ void scan(
    const Sequences& sequences, typename F::Element* handed, const float* growth, const float* from, float* to,
    typename Piece<F, N>::Shared& shared) {
  using Element = typename F::Element;
  using P = Piece<F, N>;
  using Place = Arrangement<N, N>;
  constexpr int kEach = 16 / sizeof(Element), kPlane = N * N;
  const int64_t number = int64_t(blockIdx.x) / P::kBlocks;
  const int64_t sequence = number / sequences.heads, head = number % sequences.heads;
  const int64_t first = sequences.template first_segment<L>(sequence);
  const int chunks = int(segments(sequences.length(sequence), L));
  const int own = int(threadIdx.x) * 8, place = int(blockIdx.x) % P::kBlocks * P::kElements + own;
  const int column = Place::column(place);
  const int64_t at = (number * N + Place::row(place)) * N + column;
  // Of step i.
  const auto chunk = [&](int i) { return (first + (backward ? chunks - 1 - i : i)) * sequences.heads + head; };
  const auto fetch = [&](int i) {
    if (i < chunks) {
      typename P::Stage& stage = shared.stage[i % P::kStages];
      const Element* source = handed + chunk(i) * (kPlane * F::kPlanes) + place;
#pragma unroll
      for (int plane = 0; plane < F::kPlanes; ++plane)
#pragma unroll
        for (int e = 0; e < 8; e += kEach) copy_async(stage.value[plane] + own + e, source + plane * kPlane + e, true);
      if (threadIdx.x < N / 4)
        copy_async(stage.growth + 4 * threadIdx.x, growth + chunk(i) * N + 4 * threadIdx.x, true);
    }
    commit_async();
  };
  Octet<float> state{};
  if (from) state = load_octet(from + at, true);
#pragma unroll
  for (int i = 0; i < P::kStages - 1; ++i) fetch(i);
  for (int i = 0; i < chunks; ++i) {
    wait_async<P::kStages - 2>();
    __syncthreads();
    fetch(i + P::kStages - 1);
    const typename P::Stage& stage = shared.stage[i % P::kStages];
    store_octet<F>(handed + chunk(i) * (kPlane * F::kPlanes) + place, kPlane, state.value);
    float grown[8], added[8] = {};
    read_shared(grown, stage.growth + column);
#pragma unroll
    for (int plane = F::kPlanes - 1; plane >= 0; --plane) {
      WKV_READS(stage.value[plane] + own, sizeof(Octet<Element>));
      const Octet<Element> in = *reinterpret_cast<const Octet<Element>*>(stage.value[plane] + own);
#pragma unroll
      for (int e = 0; e < 8; ++e) added[e] += to_float(in.value[e]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) state.value[e] += state.value[e] * grown[e] + added[e];
  }
  if (!to) return;
  WKV_MOVES_OUT(sizeof state);
  *reinterpret_cast<Octet<float>*>(to + at) = state;
}

// ------------------------------------------------------------------------------------------------ A
// A level of h >= 16 tokens pairs whole blocks of A; those below lie in the blocks on its diagonal. There, a pair of
// tokens belongs to the level of its highest different bit. Whether value[i] of a Sum is for such a pair:
__device__ __forceinline__ bool at_level(int i, int h) {
  const bool halves_differ = i / 2 % 2 != i / 4;
  const int different = lane_row() ^ (lane_column() + i % 2);
  return h == 8 ? halves_differ : !halves_differ && different >= h && different < 2 * h;
}
// Zeros but for the pairs of a level. The diagonal counts as one of h = 1, since registers hold it with those.
template <typename F>
__device__ __forceinline__ Block<F> of_level(const Block<F>& block, int h) {
  Block<F> out{};
#pragma unroll
  for (int plane = 0; plane < F::kPlanes; ++plane)
#pragma unroll
    for (int q = 0; q < 4; ++q)
      if (at_level(2 * q, h) || at_level(2 * q + 1, h)) out.pair[plane][q] = block.pair[plane][q];
  return out;
}

template <typename F, int N, int L>
struct Triangle {
  static constexpr int kFar = L / 32;  // levels from 16 tokens on, or more, for L up to 64
  static_assert(L == 16 || L == 32 || L == 64);
  ByTokens<N, L> decays;
  // What each patch adds to the block of A on the diagonal, as its lanes hold it.
  Quad<float> near[N / 16][L / 16][2][32];
  using Far = Operand<F, L, kFar ? N : 16>;  // z; if there is none, a small one in its place
  Far far[kFar ? kFar : 1];
  Operand<F, L, L> A;

  // z of the level of h tokens.
  __device__ __forceinline__ const Far& z(int h) const { return far[h / 32]; }

  // First half: z and what patches add to A. `x` becomes the decays within the chunk. One barrier if L > 16; the caller
  // puts another one behind it.
  __device__ __forceinline__ void fill(
      const Sum (&r)[kPatches<N, L>], const Sum (&k)[kPatches<N, L>], const Sum (&log)[kPatches<N, L>],
      const float* u, Decays (&x)[kPatches<N, L>]) {
    constexpr int patches = kPatches<N, L>;
#pragma unroll
    for (int n = 0; n < patches; ++n) {
      const Patch at = patch<N, L>(n);
      Sum diagonal = bonus(r[n], k[n], u + at.channel);
      x[n] = Decays(log[n]);
#pragma unroll 1  // registers are scarce
      for (int h = 1; h < 16; h *= 2) {
        const Block<F> z = block_of<F>(level(at, h, r[n], k[n], x[n].scale(at, h)));
        Sum square;
        multiply(square, z, z);
#pragma unroll
        for (int i = 0; i < 8; ++i) diagonal.value[i] = at_level(i, h) ? square.value[i] : diagonal.value[i];
        x[n].join(at, h);
      }
      put(at, diagonal);
      if (L > 16) decays.put(at, first_row(x[n].all));
    }
    if (L > 16) __syncthreads();
#pragma unroll
    for (int n = 0; n < patches; ++n) {
      const Patch at = patch<N, L>(n);
#pragma unroll
      for (int h = 16; h < L; h *= 2) {
        far[h / 32].put(at.token, at.channel, block_of<F>(level(at, h, r[n], k[n], x[n].scale(at, h))));
        x[n].join(at, h, decays);
      }
    }
  }
  // Second half: the block of A at (m, n), blocks counted.
  __device__ __forceinline__ void make(int m, int n) {
    Sum sum;
    if (m == n) {
#pragma unroll 2
      for (int slice = 0; slice < N / 16; ++slice) add(sum, get({16 * m, 16 * slice}));
      lower(sum);
    } else {
      const Far& level = z((m ^ n) / 2 ? 32 : 16);
#pragma unroll
      for (int j = 0; j < N; j += 16) multiply(sum, level.block(16 * m, j), level.block(16 * n, j));
    }
    A.put(16 * m, 16 * n, block_of<F>(sum));
  }

  // A patch's place in `near`, which is free for other uses when A is made.
  __device__ __forceinline__ void put(const Patch& at, const Sum& x) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad<float>& to = near[at.channel / 16][at.token / 16][half][lane_id()];
      WKV_WRITES(&to, sizeof to);
      to = {x.value[4 * half], x.value[4 * half + 1], x.value[4 * half + 2], x.value[4 * half + 3]};
    }
  }
  __device__ __forceinline__ Sum get(const Patch& at) const {
    Sum x;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Quad<float>& from = near[at.channel / 16][at.token / 16][half][lane_id()];
      WKV_READS(&from, sizeof from);
#pragma unroll
      for (int e = 0; e < 4; ++e) x.value[4 * half + e] = from.value[e];
    }
    return x;
  }

  __device__ static __forceinline__ Sum level(const Patch& at, int h, const Sum& r, const Sum& k, const Sum& scale) {
    Sum z;
#pragma unroll
    for (int i = 0; i < 8; ++i) z.value[i] = (at.odd(h, i) ? r.value[i] : k.value[i]) * scale.value[i];
    return z;
  }

 private:
  // r . (u o k) over the patch's channels, on the diagonal.
  __device__ static __forceinline__ Sum bonus(const Sum& r, const Sum& k, const float* u) {
    float row[2] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) row[i / 2 % 2] += r.value[i] * u[column_at(column_of(i))] * k.value[i];
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) row[half] += from_lane_xor(row[half], distance);
    Sum out;
    out.each([&](float& x, int at, int column) { x = at != column ? 0.0f : at < 8 ? row[0] : row[1]; });
    return out;
  }
};

// Block `task` of the lower triangle, rows after one another.
__device__ __forceinline__ void triangle_block(int task, int& m, int& n) {
  m = 0;
  while (task > m) task -= ++m;
  n = task;
}
template <int L>
constexpr int kTriangle = (L / 16) * (L / 16 + 1) / 2;

// ------------------------------------------------------------------------------------------------ outputs
template <typename F, int N, int L>
struct OutputsShared {
  Triangle<F, N, L> triangle;
  Operand<F, L, N> r, v;  // r before
  Operand<F, N, N> S;
};

template <typename F, Decay D, int N, int L, typename Arguments>
__device__ __forceinline__ void outputs(const Arguments& p, OutputsShared<F, N, L>& s) {
  constexpr int warps = Share<N, L>::kWarps, patches = kPatches<N, L>;
  const Chunk<N, L> chunk(p.sequences);
  if (chunk.tokens == 0) return;
  s.S.fetch(p.states + chunk.number * (N * N * F::kPlanes), 0, N, Share<N, L>::kThreads);
  fetch(s.v, p.v, chunk);
  commit_async();
  Sum r[patches], k[patches], log[patches];
  Decays x[patches];
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    r[n] = load(p.r, chunk, at), k[n] = load(p.k, chunk, at), log[n] = log_decays<D>(p.w, chunk, at);
  }
  s.triangle.fill(r, k, log, p.u + chunk.head * N, x);
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    s.r.put(at.token, at.channel, block_of<F>(product(r[n], x[n].before)));
  }
  wait_async<0>();
  __syncthreads();
  for (int task = warp_id(); task < kTriangle<L>; task += warps) {
    int m, n;
    triangle_block(task, m, n);
    s.triangle.make(m, n);
  }
  Sum y[patches];
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
#pragma unroll(kUnroll<F>)
    for (int j = 0; j < N; j += 16) multiply(y[n], s.r.block(at.token, j), s.S.block(at.channel, j));
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    for (int t = 0; t <= at.token; t += 16)
      multiply(y[n], s.triangle.A.block(at.token, t), s.v.transposed(t, at.channel));
    store(p.y, chunk, at, y[n]);
  }
}

// ------------------------------------------------------------------------------------------------ gradients
// Sums over tokens of a patch on one side of each token are products with matrices of 0 and 1: row t has a 1 where that
// token counts for t.
template <typename F>
struct Sides {
  Operand<F, 16, 16> of[5];

  // Which of them: within halves of h = 2, 4, 8 tokens, those after t if t is in an odd half, else those before t.
  // From h = 16 on all tokens of the patch after t, or before it.
  __device__ static __forceinline__ int number(int h, bool odd) { return h < 16 ? h / 4 : odd ? 3 : 4; }

  __device__ __forceinline__ void fill(int warps) {
    for (int n = warp_id(); n < 5; n += warps) {
      Sum sum;
      sum.each([&](float& x, int row, int column) {
        const int h = 2 << n;
        const bool after = n < 3 ? row & h : n == 3;
        x = (row ^ column) < h && (after ? column > row : column < row) ? 1.0f : 0.0f;
      });
      of[n].put(0, 0, block_of<F>(sum));
    }
  }
  // sum += those sums over x
  __device__ __forceinline__ void add(Sum& sum, const Sum& x, int number) const {
    multiply(sum, of[number].block(0, 0), transposed(block_of<F>(x)));
  }
};

template <typename F, int N, int L>
struct GradientsShared {
  Triangle<F, N, L> triangle;
  Operand<F, L, N> k, v, dy;  // k after
  Operand<F, L, L> dA;        // dy v^T
  Operand<F, N, N> S, dS;
  Sides<F> sides;
  float v_dy[L];
  // Sums over 16 tokens of r o dr and k o dk, as far as these are due to S and dS; parts of colsum(S o dS); of du; and
  // of WKV-5's dw.
  ByTokens<N, L> read, written, state, du, dw;
  ByTokens<N, L> far;  // likewise of the level of 32 tokens
};

// The block of dA at (m, n). On the diagonal, what is below it and the transpose of that above: the gradient of z z^T.
template <typename F, int N, int L>
__device__ __forceinline__ void make_dA(GradientsShared<F, N, L>& s, int m, int n) {
  Sum sum;
#pragma unroll(kUnroll<F>)
  for (int i = 0; i < N; i += 16) multiply(sum, s.dy.block(16 * m, i), s.v.block(16 * n, i));
  if (m == n) {
    sum.each([&](float& x, int row, int column) {
      if (row != column) return;
      WKV_WRITES(&s.v_dy[16 * m + row], sizeof(float));
      s.v_dy[16 * m + row] = x;
    });
    lower(sum, true);
    add(sum, sum_of(transposed(block_of<F>(sum))));
  }
  s.dA.put(16 * m, 16 * n, block_of<F>(sum));
}

// dv = A^T dy + (k after) dS^T
template <typename F, int N, int L, typename T>
__device__ __forceinline__ void make_dv(
    T* out, const Chunk<N, L>& chunk, const Patch& at, const GradientsShared<F, N, L>& s) {
  Sum dv;
#pragma unroll(kUnroll<F>)
  for (int j = 0; j < N; j += 16) multiply(dv, s.k.block(at.token, j), s.dS.block(at.channel, j));
  for (int t = at.token; t < L; t += 16)
    multiply(dv, s.triangle.A.transposed(t, at.token), s.dy.transposed(t, at.channel));
  store(out, chunk, at, dv);
}

// A patch's dr as far as S gives it, (dy S) o before, or dk from dS, (v dS) o after; in_or_out is r or k. The product
// with that goes, summed over tokens, to `sums` for other patches and to `passing` for this one's tokens.
template <typename F, int N, int L>
__device__ __forceinline__ Sum state_gradient(
    const Operand<F, L, N>& values, const Operand<F, N, N>& state, const Sum& decay, const Sum& in_or_out,
    const Patch& at, ByTokens<N, L>& sums, const Sides<F>& sides, bool after, Sum& passing) {
  Sum out;
#pragma unroll(kUnroll<F>)
  for (int i = 0; i < N; i += 16) multiply(out, values.block(at.token, i), state.transposed(i, at.channel));
  out = product(out, decay);
  const Sum both = product(out, in_or_out);
  sums.put(at, sum_over_tokens(both));
  sides.add(passing, both, Sides<F>::number(16, after));
  return out;
}

// Adds what the levels give to a patch's dr and dk. `passing` is the gradient of log decay as far as the patch itself
// has it: what passes over each token from an earlier one to a later. Returns the decay of the whole chunk.
template <typename F, int N, int L>
__device__ __forceinline__ Columns add_levels(
    GradientsShared<F, N, L>& s, const Patch& at, const Sum& r, const Sum& k, const Sum& log, Sum& dr, Sum& dk,
    Sum& passing) {
  Decays x(log);
  // g: the gradient of z.
  const auto add_level = [&](Sum& g, const Sum& scale, int h) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const bool odd = at.odd(h, i);
      g.value[i] *= scale.value[i];
      dr.value[i] += odd ? g.value[i] : 0.0f;
      dk.value[i] += odd ? 0.0f : g.value[i];
      g.value[i] *= odd ? r.value[i] : k.value[i];
    }
    if (h == 32) s.far.put(at, sum_over_tokens(g));
    if (h > 1) s.sides.add(passing, g, Sides<F>::number(h, at.token & h));
  };
  const Block<F> pairs = s.dA.block(at.token, at.token);
#pragma unroll 1  // registers are scarce
  for (int h = 1; h < 16; h *= 2) {
    Sum g;
    const Sum scale = x.scale(at, h);
    multiply(g, of_level(pairs, h), transposed(block_of<F>(Triangle<F, N, L>::level(at, h, r, k, scale))));
    add_level(g, scale, h);
    x.join(at, h);
  }
#pragma unroll
  for (int h = 16; h < L; h *= 2) {
    const auto& z = s.triangle.z(h);
    const bool odd = at.token & h;
    const int other = (at.token / h ^ 1) * h;
    Sum g;
#pragma unroll
    for (int t = 0; t < h; t += 16)
      multiply(
          g, odd ? s.dA.block(at.token, other + t) : s.dA.transposed(other + t, at.token),
          z.transposed(other + t, at.channel));
    add_level(g, x.scale(at, h), h);
    x.join(at, h, s.triangle.decays);
  }
  return first_row(x.all);
}

template <typename F, Decay D, int N, int L, typename Arguments>
__device__ __forceinline__ void gradients(const Arguments& p, GradientsShared<F, N, L>& s) {
  constexpr int warps = Share<N, L>::kWarps, patches = kPatches<N, L>;
  const Chunk<N, L> chunk(p.sequences);
  if (chunk.tokens == 0) return;
  const float* u = p.u + chunk.head * N;
  s.S.fetch(p.states + chunk.number * (N * N * F::kPlanes), 0, N, Share<N, L>::kThreads);
  s.dS.fetch(p.dstates + chunk.number * (N * N * F::kPlanes), 0, N, Share<N, L>::kThreads);
  fetch(s.v, p.v, chunk), fetch(s.dy, p.dy, chunk);
  commit_async();
  s.sides.fill(warps);
  Sum r[patches], k[patches], log[patches], dr[patches], dk[patches], passing[patches];
  Decays x[patches];
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    r[n] = load(p.r, chunk, at), k[n] = load(p.k, chunk, at), log[n] = log_decays<D>(p.w, chunk, at);
  }
  s.triangle.fill(r, k, log, u, x);
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    s.k.put(at.token, at.channel, block_of<F>(product(k[n], x[n].after)));
  }
  wait_async<0>();
  __syncthreads();
  for (int task = warp_id(); task < 2 * kTriangle<L>; task += warps) {
    int m, n;
    triangle_block(task / 2, m, n);
    if (task % 2)
      make_dA(s, m, n);
    else
      s.triangle.make(m, n);
  }
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    // Patches of the same channels share out the values.
    Sum both;
    for (int i = at.token; i < N; i += L)
      add(both, product(sum_of(s.S.block(i, at.channel)), sum_of(s.dS.block(i, at.channel))));
    s.state.put(at, sum_over_tokens(both));
    dr[n] = state_gradient(s.dy, s.S, x[n].before, r[n], at, s.read, s.sides, true, passing[n]);
    dk[n] = state_gradient(s.v, s.dS, x[n].after, k[n], at, s.written, s.sides, false, passing[n]);
  }
  __syncthreads();
  Columns whole[patches];
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    make_dv(p.dv, chunk, at, s);
    // Anew, and put by: registers are scarce.
    const Sum log = log_decays<D>(p.w, chunk, at);
    s.triangle.put(at, log);
    whole[n] = add_levels(s, at, r[n], k[n], log, dr[n], dk[n], passing[n]);
    Sum du;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      WKV_READS(&s.v_dy[at.token_of(i)], sizeof(float));
      const float v_dy = s.v_dy[at.token_of(i)], own = u[at.channel + column_at(column_of(i))] * v_dy;
      dr[n].value[i] += own * k[n].value[i];
      dk[n].value[i] += own * r[n].value[i];
      du.value[i] = r[n].value[i] * k[n].value[i] * v_dy;
    }
    store(p.dr, chunk, at, dr[n]), store(p.dk, chunk, at, dk[n]);
    s.du.put(at, sum_over_tokens(du));
  }
  __syncthreads();
  // A log decay scales all that passes over its token.
#pragma unroll
  for (int n = 0; n < patches; ++n) {
    const Patch at = patch<N, L>(n);
    const int number = at.token / 16;
    Columns others;
    s.state.add_to(others, at, [](int) { return true; });
#pragma unroll
    for (int c = 0; c < 4; ++c) others.value[c] *= whole[n].value[c];
    s.read.add_to(others, at, [=](int other) { return other > number; });
    s.written.add_to(others, at, [=](int other) { return other < number; });
    if (L > 32)
      s.far.add_to(others, at, [=](int other) {
        return other / 2 == number / 2 && (number & 2 ? other > number : other < number);
      });
    const Sum slope = s.triangle.get(at);  // log decay
#pragma unroll
    for (int i = 0; i < 8; ++i)
      passing[n].value[i] = (passing[n].value[i] + others.value[column_of(i)]) * slope.value[i];
    if constexpr (D == Decay::kPerToken)
      store(p.dw, chunk, at, passing[n]);
    else
      s.dw.put(at, sum_over_tokens(passing[n]));
  }
  if constexpr (D == Decay::kPerHead) __syncthreads();
  for (int j = int(threadIdx.x); j < (D == Decay::kPerHead ? 2 * N : N); j += Share<N, L>::kThreads) {
    WKV_MOVES_OUT(4);
    p.sums[chunk.number * 2 * N + j] = j < N ? s.du.all(j) : s.dw.all(j - N);
  }
}

// ------------------------------------------------------------------------------------------------ sums
// Threads that share a channel take turns at the chunks: long sums in small parts lose less.
template <int N, int L>
struct SumsShared {
  static constexpr int kGroups = Share<N, L>::kThreads / N;
  float part[2][kGroups][N];
};

template <Decay D, int N, int L, typename Arguments>
__device__ __forceinline__ void sums(const Arguments& p, SumsShared<N, L>& s) {
  constexpr int groups = SumsShared<N, L>::kGroups, wanted = D == Decay::kPerHead ? 2 : 1;
  const int64_t sequence = int64_t(blockIdx.x) / p.sequences.heads, head = int64_t(blockIdx.x) % p.sequences.heads;
  const int64_t first = p.sequences.template first_segment<L>(sequence);
  const int chunks = int(segments(p.sequences.length(sequence), L));
  const int channel = int(threadIdx.x) % N, group = int(threadIdx.x) / N;
  float sum[wanted] = {};
#pragma unroll 4
  for (int chunk = group; chunk < chunks; chunk += groups)
#pragma unroll
    for (int i = 0; i < wanted; ++i) {
      WKV_MOVES_IN(4);
      sum[i] += p.sums[(((first + chunk) * p.sequences.heads + head) * 2 + i) * N + channel];
    }
#pragma unroll
  for (int i = 0; i < wanted; ++i) {
    WKV_WRITES(&s.part[i][group][channel], sizeof(float));
    s.part[i][group][channel] = sum[i];
  }
  __syncthreads();
  if (group >= wanted) return;
  float all = 0.0f;
#pragma unroll
  for (int other = 0; other < groups; ++other) {
    WKV_READS(&s.part[group][other][channel], sizeof(float));
    all += s.part[group][other][channel];
  }
  WKV_MOVES_OUT(4);
  (group == 0 ? p.du : p.dw)[int64_t(blockIdx.x) * N + channel] = all;
}

// ------------------------------------------------------------------------------------------------ kernels
// T: element of r, k, v, dy, y and their gradients. F: the operands' format.
template <typename T, typename F, Decay D, int N, int L>
struct Prepare {
  using Arguments = ChunkedForward<T, F>;
  using Shared = PrepareShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) {
    prepare<F, D, N, L, true>(p.sequences, p.v, p.k, p.w, p.states, p.growth, s);
  }
};
template <typename T, typename F, Decay D, int N, int L>
struct Scan {
  using Arguments = ChunkedForward<T, F>;
  using Shared = typename Piece<F, N>::Shared;
  static constexpr int kThreads = Piece<F, N>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) {
    scan<F, N, L, false>(p.sequences, p.states, p.growth, p.s0, p.sT, s);
  }
};
template <typename T, typename F, Decay D, int N, int L>
struct Outputs {
  using Arguments = ChunkedForward<T, F>;
  using Shared = OutputsShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { outputs<F, D, N, L>(p, s); }
};
template <typename T, typename F, Decay D, int N, int L>
struct PrepareBackward {
  using Arguments = ChunkedBackward<T, F>;
  using Shared = PrepareShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) {
    prepare<F, D, N, L, false>(p.sequences, p.dy, p.r, p.w, p.dstates, p.growth, s);
  }
};
template <typename T, typename F, Decay D, int N, int L>
struct ScanBackward {
  using Arguments = ChunkedBackward<T, F>;
  using Shared = typename Piece<F, N>::Shared;
  static constexpr int kThreads = Piece<F, N>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) {
    scan<F, N, L, true>(p.sequences, p.dstates, p.growth, p.dsT, p.ds0, s);
  }
};
template <typename T, typename F, Decay D, int N, int L>
struct Gradients {
  using Arguments = ChunkedBackward<T, F>;
  using Shared = GradientsShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { gradients<F, D, N, L>(p, s); }
};
template <typename T, typename F, Decay D, int N, int L>
struct Sums {
  using Arguments = ChunkedBackward<T, F>;
  using Shared = SumsShared<N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { sums<D, N, L>(p, s); }
};

}  // namespace wkv6

// The kernels of one mode ("chunked32": its label is part of their names), number format and head size. The scans have
// 128 threads and N * N / 1024 blocks for each head of a sequence, `sums` has one block for it, the others one for each
// slot and head.
#define WKV6_CHUNKED_KERNELS(T, F, mode, label, N, L) WKV6_CHUNKED(wkv6, kPerToken, T, F, mode, label, N, L)
#define WKV5_CHUNKED_KERNELS(T, F, mode, label, N, L) WKV6_CHUNKED(wkv5, kPerHead, T, F, mode, label, N, L)

#define WKV6_CHUNKED(operator_, decay, T, F, mode, label, N, L)                                 \
  WKV6_CHUNKED_EACH(operator_, decay, prepare, Prepare, T, F, mode, label, N, L)                \
  WKV6_CHUNKED_EACH(operator_, decay, scan, Scan, T, F, mode, label, N, L)                      \
  WKV6_CHUNKED_EACH(operator_, decay, outputs, Outputs, T, F, mode, label, N, L)                \
  WKV6_CHUNKED_EACH(operator_, decay, prepare_backward, PrepareBackward, T, F, mode, label, N, L) \
  WKV6_CHUNKED_EACH(operator_, decay, scan_backward, ScanBackward, T, F, mode, label, N, L)     \
  WKV6_CHUNKED_EACH(operator_, decay, gradients, Gradients, T, F, mode, label, N, L)            \
  WKV6_CHUNKED_EACH(operator_, decay, sums, Sums, T, F, mode, label, N, L)

#define WKV6_CHUNKED_EACH(operator_, decay, part, Type, T, F, mode, label, N, L) \
  WKV_CHUNKED_KERNEL(operator_##_##mode##_##part##_##label##_##N, wkv6::Type<T, F, wkv6::Decay::decay, N, L>)
