// WKV-7 in chunks, on tensor cores: the recurrence of wkv7.cuh as products of matrices. cuda/chunked.md derives it.
//
// Per chunk of L tokens, G_t = sum of log decay up to token t, with tokens as rows (r, k, v, a, b, dy: L x N):
//     r~ = r e^G,  a~ = a e^(G of the token before),  k~ = k e^-G,  b~ = b e^-G,  whole = e^(G of the last token)
//     ab = strictly lower a~ b~^T,  ak = strictly lower a~ k~^T,  rk = lower r~ k~^T,  rb = lower r~ b~^T  (L x L)
//     T = (1 - ab)^-1,  W = T a~,  U0 = T ak v,  Q = r~ + rb W,  Y0 = rk v + rb U0,  KV = (v^T k~ + U0^T b~) whole
// and with S the state at the chunk's start, dS the gradient of that at its end, dS~ = dS whole:
//     forward   prepare           for each chunk    W, b~, Q, whole, KV, Y0
//               scan              over the chunks   S <- (S + S W^T b~) whole + KV
//               outputs           for each chunk    y = Y0 + Q S^T
//     backward  prepare_backward  for each chunk    W, b~, Q, whole, made anew
//               scan_backward     over the chunks   dS <- dS~ + dS~ b~^T W + dy^T Q
//               gradients         for each chunk    all gradients, from the inputs, dy, S and dS
// Only the scans are serial, with two small products a step and the state in fp32 registers. W and b~ stay two factors:
// rounded as one matrix they would write a little outside the keys' span, the same in every chunk, and nothing would
// erase that. Every sum has a fixed order, so results repeat bit for bit.
//
// A block of threads works on one chunk; its warps share out *slices* of 16 value or key channels, for which they keep
// the transpose (16 x L) in registers: a solved X^T is the next product's operand, as X^T and as X.
#pragma once

#include "chunked.cuh"
#include "wkv7.cuh"

namespace wkv7 {

// One struct a direction, for its three kernels. Hand-overs have one place for every slot and head.
template <typename T, typename W, typename F>
struct ChunkedForward {
  using Input = T;
  using Decay = W;
  using Element = typename F::Element;
  Sequences sequences;
  const T* r;
  const W* w;  // the raw decay; with w0 what is added to that
  const T *k, *v, *a, *b;
  const float* s0;  // may be null: zeros
  T* y;             // Y0 at first
  float* sT;        // may be null: not wanted
  Element* states;  // KV at first; then S at the start of each chunk, which backward needs
  const float* w0;  // [H, N], may be null
  Element *W_, *b_, *Q;
  float* whole;
};

template <typename T, typename W, typename F>
struct ChunkedBackward {
  using Input = T;
  using Decay = W;
  using Element = typename F::Element;
  Sequences sequences;
  const T* r;
  const W* w;
  const T *k, *v, *a, *b;
  const float* s0;
  const Element* states;
  const T* dy;
  const float* dsT;  // may be null: zeros
  const float* w0;
  Element *W_, *b_, *Q;
  float* whole;
  Element* dstates;
  T* dr;
  W* dw;
  T *dk, *dv, *da, *db;
  float* ds0;  // may be null: not wanted
};

constexpr float kLog2E = 1.44269504f;

// The logarithm to base 2 of the decay.
__device__ __forceinline__ float log2_decay(float raw) {
  return divide(-kScale * kLog2E, 1.0f + power_of_two(-kLog2E * raw));
}
// As decay_slope in wkv7.cuh.
__device__ __forceinline__ float log_decay_slope(float raw) {
  const float e = power_of_two(-kLog2E * fabsf(raw));
  return divide(-kScale * e, (1.0f + e) * (1.0f + e));
}

// The raw decay of eight channels.
template <typename W>
__device__ __forceinline__ void raw_decay(float (&out)[8], const Octet<W>& w, const float* w0, int channel) {
#pragma unroll
  for (int e = 0; e < 8; ++e) out[e] = to_float(w.value[e]) + (w0 ? w0[channel + e] : 0.0f);
}

// ------------------------------------------------------------------------------------------------ the decayed inputs
// r~, k~, a~, b~ and what belongs to the decay alone.
template <typename F, int N, int L>
struct Decayed {
  Operand<F, L, N> r, k, a, b;
  TokenSums<N, L> sums;
  float whole[N];

  // `grown` gets e^G of this thread's rows. Unless `keys`, nothing needs k~, and k is not loaded. Ends with a barrier.
  template <bool keys = true, typename In>
  __device__ __forceinline__ void fill(
      const In& in, const Chunk<N, L>& chunk, const Share<N, L>& part, float (&grown)[Share<N, L>::kRows][8]) {
    constexpr int kRows = Share<N, L>::kRows;
    Octet<typename In::Input> r_in[kRows], k_in[kRows], a_in[kRows], b_in[kRows];
    Octet<typename In::Decay> w_in[kRows];
    part.load(w_in, in.w, chunk), part.load(r_in, in.r, chunk);
    part.load(a_in, in.a, chunk), part.load(b_in, in.b, chunk);
    if constexpr (keys) part.load(k_in, in.k, chunk);

    float log[kRows][8], before[kRows][8], upto[kRows][8];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float raw[8];
      raw_decay(raw, w_in[i], in.w0, chunk.head * N + part.column);
#pragma unroll
      for (int e = 0; e < 8; ++e) log[i][e] = part.row + i < chunk.tokens ? log2_decay(raw[e]) : 0.0f;
    }
    sums.run(part, log, before, upto);
    if (threadIdx.x < N) {
      WKV_WRITES(&whole[threadIdx.x], sizeof(float));
      whole[threadIdx.x] = power_of_two(sums.all(int(threadIdx.x)));
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float r_out[8], k_out[8], a_out[8], b_out[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        grown[i][e] = power_of_two(upto[i][e]);
        const float down = divide(1.0f, grown[i][e]);
        r_out[e] = to_float(r_in[i].value[e]) * grown[i][e];
        a_out[e] = to_float(a_in[i].value[e]) * power_of_two(before[i][e]);
        b_out[e] = to_float(b_in[i].value[e]) * down;
        if constexpr (keys) k_out[e] = to_float(k_in[i].value[e]) * down;
      }
      r.put(part.row + i, part.column, r_out), a.put(part.row + i, part.column, a_out);
      b.put(part.row + i, part.column, b_out);
      if constexpr (keys) k.put(part.row + i, part.column, k_out);
    }
    __syncthreads();
  }
};

// ------------------------------------------------------------------------------------------------ the four triangles
enum Triangle { kAB, kAK, kRK, kRB };

// Which triangles exclude their diagonal: a reads the state before its token's edit, r after it.
__device__ __forceinline__ constexpr bool strict(int triangle) { return triangle == kAB || triangle == kAK; }

// T = (1 - A)^-1 for a strictly lower A = ab of L x L, by blocks of 16: only the inverses of the blocks on the diagonal
// are made, by substitution in fp32. Powers of A (a Neumann series) would reach 1e6 where keys repeat, though T itself
// stays near 1.
template <typename F, int L>
struct Solver {
  struct alignas(16) Diagonal {
    float value[16 * 16 + 16];  // longer, so that two of them do not meet in the same banks
  };
  Diagonal diagonal[L / 16];     // of A
  Operand<F, 16, 16> inverse[L / 16];  // of 1 - diagonal, less 1

  __device__ __forceinline__ void put_diagonal(int block, const Sum& sum) {
    Sum copy = sum;
    copy.each([&](float& x, int row, int column) {
      float* to = &diagonal[block].value[16 * row + column];
      WKV_WRITES(to, sizeof *to);
      *to = x;
    });
  }
  // By the first threads of the block, 16 for a block of the diagonal: each makes a column.
  __device__ __forceinline__ void invert() {
    const int block = int(threadIdx.x / 16u), column = int(threadIdx.x % 16u);
    if (block >= L / 16) return;
    const float* A = diagonal[block].value;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum[2] = {i == column ? 1.0f : 0.0f, 0.0f};
      WKV_READS(A + 16 * i, i * sizeof(float));
#pragma unroll
      for (int m = 0; m < i; ++m) sum[m % 2] += A[16 * i + m] * x[m];
      x[i] = sum[0] + sum[1];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) inverse[block].put_one(i, column, i == column ? 0.0f : x[i]);
  }
  // X = T R, both a slice of the transposed matrix (16 x L); A is ab. `right` is used up.
  __device__ __forceinline__ void solve(Block<F> (&x)[L / 16], Sum (&right)[L / 16], const Operand<F, L, L>& A) const {
#pragma unroll
    for (int b = 0; b < L / 16; ++b) {
#pragma unroll
      for (int m = 0; m < b; ++m) multiply(right[b], x[m], A.block(16 * b, 16 * m));
      // R + (T - 1) R: what is rounded is small.
      multiply(right[b], block_of<F>(right[b]), inverse[b].block(0, 0));
      x[b] = block_of<F>(right[b]);
    }
  }
  // Likewise X = T^T R.
  __device__ __forceinline__ void solve_transposed(
      Block<F> (&x)[L / 16], Sum (&right)[L / 16], const Operand<F, L, L>& A) const {
#pragma unroll
    for (int b = L / 16 - 1; b >= 0; --b) {
#pragma unroll
      for (int m = b + 1; m < L / 16; ++m) multiply(right[b], x[m], A.transposed(16 * m, 16 * b));
      multiply(right[b], block_of<F>(right[b]), inverse[b].transposed(0, 0));
      x[b] = block_of<F>(right[b]);
    }
  }
};

template <typename F, int N, int L>
struct Triangles {
  Operand<F, L, L> of[4];

  // Those of `which` (bits), and the diagonal blocks of ab for the solver. No barrier.
  template <int warps>
  __device__ __forceinline__ void fill(const Decayed<F, N, L>& in, Solver<F, L>& solver, int which) {
    for (int task = warp_id(); task < 4 * (L / 16); task += warps) {
      const int triangle = task % 4, m = task / 4;
      if (!(which >> triangle & 1)) continue;
      const Operand<F, L, N>& reader = triangle == kAB || triangle == kAK ? in.a : in.r;
      const Operand<F, L, N>& writer = triangle == kAB || triangle == kRB ? in.b : in.k;
      for (int n = 0; n <= m; ++n) {
        Sum sum;
#pragma unroll
        for (int j = 0; j < N; j += 16) multiply(sum, reader.block(16 * m, j), writer.block(16 * n, j));
        if (n == m) lower(sum, strict(triangle));
        if (n == m && triangle == kAB) solver.put_diagonal(m, sum);
        of[triangle].put(16 * m, 16 * n, block_of<F>(sum));
      }
    }
  }
};

// ------------------------------------------------------------------------------------------------ prepare
template <typename F, int N, int L>
struct PrepareShared {
  Decayed<F, N, L> in;
  Operand<F, L, N> v;
  Triangles<F, N, L> triangles;
  Solver<F, L> solver;
};

// A slice of key channels: W and Q.
template <typename F, int N, int L, typename Out>
__device__ __forceinline__ void prepare_keys(const Out& out, int64_t number, int j, const PrepareShared<F, N, L>& s) {
  using Keys = Operand<F, N, L>;
  using Tokens = Operand<F, L, N>;
  Sum right[L / 16];
  Block<F> W[L / 16];  // W^T
#pragma unroll
  for (int b = 0; b < L / 16; ++b) right[b] = sum_of(s.in.a.transposed(16 * b, j));
  s.solver.solve(W, right, s.triangles.of[kAB]);
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    Keys::hand_over(out.W_ + number * (L * N * F::kPlanes), j, 16 * b, W[b]);
    Sum q = sum_of(s.in.r.block(16 * b, j));
#pragma unroll
    for (int m = 0; m <= b; ++m) multiply(q, s.triangles.of[kRB].block(16 * b, 16 * m), W[m]);
    Tokens::hand_over(out.Q + number * (L * N * F::kPlanes), 16 * b, j, block_of<F>(q));
  }
}

// A slice of value channels: KV and Y0.
template <typename F, int N, int L, typename Out>
__device__ __forceinline__ void prepare_values(
    const Out& out, const Chunk<N, L>& chunk, int i, const PrepareShared<F, N, L>& s) {
  using State = Operand<F, N, N>;
  Sum right[L / 16];
  Block<F> v[L / 16], U[L / 16];  // v^T, U0^T
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    v[b] = s.v.transposed(16 * b, i);
#pragma unroll
    for (int m = 0; m <= b; ++m) multiply(right[b], v[m], s.triangles.of[kAK].block(16 * b, 16 * m));
  }
  s.solver.solve(U, right, s.triangles.of[kAB]);
#pragma unroll 2
  for (int j = 0; j < N; j += 16) {
    Sum sum;
#pragma unroll
    for (int b = 0; b < L / 16; ++b) {
      multiply(sum, v[b], s.in.k.transposed(16 * b, j));
      multiply(sum, U[b], s.in.b.transposed(16 * b, j));
    }
    sum.each([&](float& x, int, int column) {
      WKV_READS(&s.in.whole[j + column], sizeof(float));
      x *= s.in.whole[j + column];
    });
    State::hand_over(out.states + chunk.number * (N * N * F::kPlanes), i, j, block_of<F>(sum));
  }
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    Sum y;
#pragma unroll
    for (int m = 0; m <= b; ++m) {
      multiply(y, s.triangles.of[kRK].block(16 * b, 16 * m), v[m]);
      multiply(y, s.triangles.of[kRB].block(16 * b, 16 * m), U[m]);
    }
    store_rows(out.y + chunk.base + 16 * b * chunk.stride + i, chunk.stride, chunk.tokens - 16 * b, y);
  }
}

template <typename F, int N, int L, bool backward, typename Arguments>
__device__ __forceinline__ void prepare(const Arguments& p, PrepareShared<F, N, L>& s) {
  constexpr int warps = Share<N, L>::kWarps;
  const Chunk<N, L> chunk(p.sequences);
  if (chunk.tokens == 0) return;
  const Share<N, L> part;
  float grown[Share<N, L>::kRows][8];
  if constexpr (!backward) fetch(s.v, p.v, chunk);
  commit_async();
  s.in.template fill<!backward>(p, chunk, part, grown);
  s.triangles.template fill<warps>(s.in, s.solver, backward ? 1 << kAB | 1 << kRB : 15);
  s.in.b.hand_over(p.b_ + chunk.number * (L * N * F::kPlanes), Share<N, L>::kThreads);
  if (threadIdx.x < N) {
    WKV_MOVES_OUT(4);
    WKV_READS(&s.in.whole[threadIdx.x], sizeof(float));
    p.whole[chunk.number * N + threadIdx.x] = s.in.whole[threadIdx.x];
  }
  wait_async<0>();
  __syncthreads();
  s.solver.invert();
  __syncthreads();
  for (int slice = warp_id(); slice < (backward ? 1 : 2) * (N / 16); slice += warps) {
    if (slice < N / 16)
      prepare_keys(p, chunk.number, 16 * slice, s);
    else if constexpr (!backward)
      prepare_values(p, chunk, 16 * slice - N, s);
  }
}

// ------------------------------------------------------------------------------------------------ scan
// One chunk on its way to the scan.
template <typename F, int N, int L>
struct ScanStage {
  Operand<F, N, L> W;  // W^T
  Operand<F, L, N> b;
  Operand<F, N, N> KV;
  alignas(16) float whole[N];
};
// Loads are under way for this many chunks at a time.
template <int N>
constexpr int kStages = N <= 64 ? 3 : 2;

template <typename F, int N, int L>
struct ScanShared {
  ScanStage<F, N, L> stage[kStages<N>];
};

template <int N>
__device__ __forceinline__ void fetch_floats(float (&to)[N], const float* from, int threads) {
  for (int i = int(threadIdx.x); i < N / 4; i += threads) copy_async(to + 4 * i, from + 4 * i, true);
}

// rows *= a factor for each column
template <int N>
__device__ __forceinline__ void scale_columns(Sum (&rows)[N / 16], const float (&factor)[N]) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
    rows[j].each([&](float& x, int, int column) {
      WKV_READS(&factor[16 * j + column], sizeof(float));
      x *= factor[16 * j + column];
    });
}

template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void scan(const Arguments& p, ScanShared<F, N, L>& shared) {
  using State = Operand<F, N, N>;
  constexpr int stages = kStages<N>;
  const Walk<N, L> walk(p.sequences);
  const int row = walk.own_row();
  const auto fetch = [&](int chunk) {
    if (chunk < walk.chunks) {
      const int64_t number = walk.number(chunk);
      ScanStage<F, N, L>& to = shared.stage[chunk % stages];
      to.W.fetch(p.W_ + number * (L * N * F::kPlanes), 0, N, walk.threads);
      to.b.fetch(p.b_ + number * (L * N * F::kPlanes), 0, L, walk.threads);
      to.KV.fetch(p.states + number * (N * N * F::kPlanes), walk.row, walk.row + walk.rows, walk.threads);
      fetch_floats(to.whole, p.whole + number * N, walk.threads);
    }
    commit_async();
  };
  Sum S[N / 16];
  load_state<N>(S, p.s0, walk.state, row);
#pragma unroll
  for (int chunk = 0; chunk < stages - 1; ++chunk) fetch(chunk);
  for (int chunk = 0; chunk < walk.chunks; ++chunk) {
    wait_async<stages - 2>();
    __syncthreads();
    fetch(chunk + stages - 1);
    const ScanStage<F, N, L>& now = shared.stage[chunk % stages];
    Block<F> start[N / 16];
    Sum removed[L / 16];  // S W^T
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      start[j] = block_of<F>(S[j]);
      // In the place of KV, of which this block has loaded its rows.
      State::hand_over(p.states + walk.number(chunk) * (N * N * F::kPlanes), row, 16 * j, start[j]);
#pragma unroll
      for (int t = 0; t < L / 16; ++t) multiply(removed[t], start[j], now.W.transposed(16 * j, 16 * t));
    }
#pragma unroll
    for (int t = 0; t < L / 16; ++t) {
      const Block<F> values = block_of<F>(removed[t]);
#pragma unroll
      for (int j = 0; j < N / 16; ++j) multiply(S[j], values, now.b.transposed(16 * t, 16 * j));
    }
    scale_columns<N>(S, now.whole);
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      const Block<F> added = now.KV.block(row, 16 * j);
#pragma unroll
      for (int i = 0; i < 8; ++i) S[j].value[i] += added[i];
    }
  }
  store_state<N>(S, p.sT, walk.state, row);
}

// ------------------------------------------------------------------------------------------------ outputs
template <typename F, int N, int L>
struct OutputsShared {
  Operand<F, L, N> Q;
  Operand<F, N, N> S;
};

template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void outputs(const Arguments& p, OutputsShared<F, N, L>& s) {
  constexpr int threads = Share<N, L>::kThreads;
  const Chunk<N, L> chunk(p.sequences);
  if (chunk.tokens == 0) return;
  s.Q.fetch(p.Q + chunk.number * (L * N * F::kPlanes), 0, L, threads);
  s.S.fetch(p.states + chunk.number * (N * N * F::kPlanes), 0, N, threads);
  commit_async();
  wait_async<0>();
  __syncthreads();
  for (int task = warp_id(); task < L / 16 * (N / 16); task += threads / 32) {
    const int t = task / (N / 16) * 16, i = task % (N / 16) * 16;
    auto* at = p.y + chunk.base + t * chunk.stride + i;
    Sum y = load_rows(at, chunk.stride, chunk.tokens - t);
#pragma unroll
    for (int j = 0; j < N; j += 16) multiply(y, s.Q.block(t, j), s.S.block(i, j));
    store_rows(at, chunk.stride, chunk.tokens - t, y);
  }
}

// ------------------------------------------------------------------------------------------------ scan, backwards
template <typename F, int N, int L>
struct ScanBackwardStage {
  Operand<F, N, L> W;  // W^T
  Operand<F, L, N> b, Q, dy;
  alignas(16) float whole[N];
};
template <typename F, int N, int L>
struct ScanBackwardShared {
  ScanBackwardStage<F, N, L> stage[kStages<N>];
};

template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void scan_backward(const Arguments& p, ScanBackwardShared<F, N, L>& shared) {
  using State = Operand<F, N, N>;
  constexpr int stages = kStages<N>;
  const Walk<N, L> walk(p.sequences);
  const int row = walk.own_row(), octets = walk.rows / 8;
  const auto fetch = [&](int chunk) {
    if (chunk >= 0) {
      const int64_t number = walk.number(chunk);
      ScanBackwardStage<F, N, L>& to = shared.stage[chunk % stages];
      to.W.fetch(p.W_ + number * (L * N * F::kPlanes), 0, N, walk.threads);
      to.b.fetch(p.b_ + number * (L * N * F::kPlanes), 0, L, walk.threads);
      to.Q.fetch(p.Q + number * (L * N * F::kPlanes), 0, L, walk.threads);
      fetch_floats(to.whole, p.whole + number * N, walk.threads);
      // dy: this block's columns.
      const Chunk<N, L> at(p.sequences, number, walk.sequence, walk.head, chunk * L);
      for (int i = int(threadIdx.x); i < L * octets; i += walk.threads) {
        const int t = i / octets, column = walk.row + i % octets * 8;
        to.dy.fetch_octet(t, column, p.dy + at.base + t * at.stride + column, t < at.tokens);
      }
    }
    commit_async();
  };
  Sum dS[N / 16];
  load_state<N>(dS, p.dsT, walk.state, row);
#pragma unroll
  for (int i = 1; i < stages; ++i) fetch(walk.chunks - i);
  for (int chunk = walk.chunks - 1; chunk >= 0; --chunk) {
    wait_async<stages - 2>();
    __syncthreads();
    fetch(chunk - stages + 1);
    const ScanBackwardStage<F, N, L>& now = shared.stage[chunk % stages];
#pragma unroll
    for (int j = 0; j < N / 16; ++j)
      State::hand_over(
          p.dstates + walk.number(chunk) * (N * N * F::kPlanes), row, 16 * j, block_of<F>(dS[j]));
    scale_columns<N>(dS, now.whole);
    Sum written[L / 16];  // dS~ b~^T
#pragma unroll
    for (int j = 0; j < N / 16; ++j) {
      const Block<F> end = block_of<F>(dS[j]);
#pragma unroll
      for (int t = 0; t < L / 16; ++t) multiply(written[t], end, now.b.block(16 * t, 16 * j));
    }
#pragma unroll
    for (int t = 0; t < L / 16; ++t) {
      keep_apart();
      const Block<F> values = block_of<F>(written[t]), dy = now.dy.transposed(16 * t, row);
#pragma unroll
      for (int j = 0; j < N / 16; ++j) {
        multiply(dS[j], values, now.W.block(16 * j, 16 * t));
        multiply(dS[j], dy, now.Q.transposed(16 * t, 16 * j));
      }
    }
  }
  store_state<N>(dS, p.ds0, walk.state, row);
}

// ------------------------------------------------------------------------------------------------ gradients
template <typename F, int N, int L>
struct GradientsShared {
  Decayed<F, N, L> in;
  Operand<F, L, N> v, dy;
  Operand<F, N, L> U, dX;  // transposed
  Triangles<F, N, L> triangles;  // later their gradients
  Solver<F, L> solver;
  Operand<F, N, N> S, dS;  // dS~
  // e^G; later what the keys' warps have for dlogw. Longer rows, so that eight of them do not meet in a bank.
  alignas(16) float grown[L][N + 8];
  float base[N];  // sums over tokens that every token's dlogw has
};

// A slice of value channels: U = T (ak v + a~ S^T).
template <typename F, int N, int L>
__device__ __forceinline__ void make_U(GradientsShared<F, N, L>& s, int i) {
  Sum right[L / 16];
  Block<F> U[L / 16];
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
#pragma unroll
    for (int m = 0; m <= b; ++m)
      multiply(right[b], s.v.transposed(16 * m, i), s.triangles.of[kAK].block(16 * b, 16 * m));
#pragma unroll
    for (int j = 0; j < N; j += 16) multiply(right[b], s.S.block(i, j), s.in.a.block(16 * b, j));
  }
  s.solver.solve(U, right, s.triangles.of[kAB]);
#pragma unroll
  for (int b = 0; b < L / 16; ++b) s.U.put(i, 16 * b, U[b]);
}

// A slice of value channels: dX = T^T (rb^T dy + b~ dS~^T) and dv = rk^T dy + k~ dS~^T + ak^T dX.
template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void make_dX(
    const Arguments& p, const Chunk<N, L>& chunk, GradientsShared<F, N, L>& s, int i) {
  Sum right[L / 16];
  Block<F> dX[L / 16], dy[L / 16];
#pragma unroll
  for (int b = 0; b < L / 16; ++b) dy[b] = s.dy.transposed(16 * b, i);
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
#pragma unroll
    for (int m = b; m < L / 16; ++m) multiply(right[b], dy[m], s.triangles.of[kRB].transposed(16 * m, 16 * b));
#pragma unroll
    for (int j = 0; j < N; j += 16) multiply(right[b], s.dS.block(i, j), s.in.b.block(16 * b, j));
  }
  s.solver.solve_transposed(dX, right, s.triangles.of[kAB]);
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    s.dX.put(i, 16 * b, dX[b]);
    Sum dv;
#pragma unroll
    for (int m = b; m < L / 16; ++m) {
      multiply(dv, s.triangles.of[kRK].transposed(16 * m, 16 * b), dy[m]);
      multiply(dv, s.triangles.of[kAK].transposed(16 * m, 16 * b), dX[m]);
    }
#pragma unroll
    for (int j = 0; j < N; j += 16) multiply(dv, s.in.k.block(16 * b, j), s.dS.block(i, j));
    store_rows(p.dv + chunk.base + 16 * b * chunk.stride + i, chunk.stride, chunk.tokens - 16 * b, dv);
  }
}

// The gradients of the triangles, in their places: dab = dX U^T, dak = dX v^T, drk = dy v^T, drb = dy U^T.
template <typename F, int N, int L>
__device__ __forceinline__ void make_triangle_gradients(GradientsShared<F, N, L>& s) {
  for (int task = warp_id(); task < 4 * (L / 16); task += Share<N, L>::kWarps) {
    const int triangle = task % 4, m = task / 4;
    for (int n = 0; n <= m; ++n) {
      Sum sum;
#pragma unroll
      for (int i = 0; i < N; i += 16) {
        const bool of_a = triangle == kAB || triangle == kAK, of_b = triangle == kAB || triangle == kRB;
        const Block<F> reader = of_a ? s.dX.transposed(i, 16 * m) : s.dy.block(16 * m, i);
        const Block<F> writer = of_b ? s.U.transposed(i, 16 * n) : s.v.block(16 * n, i);
        multiply(sum, reader, writer);
      }
      if (n == m) lower(sum, strict(triangle));
      s.triangles.of[triangle].put(16 * m, 16 * n, block_of<F>(sum));
    }
  }
}

// A slice of key channels. g: the gradient of the decayed k~ or b~, in two parts: that which comes through the chunk's
// end is in g already, the other from two triangles' gradients and what read through them. Then k~ g (or b~ g) goes to
// `products`, and the first part of that, summed over tokens, to `late`.
template <typename F, int N, int L, typename T>
__device__ __forceinline__ void finish_writer(
    const GradientsShared<F, N, L>& s, const Chunk<N, L>& chunk, int j, Sum (&g)[L / 16], const Operand<F, L, N>& decayed,
    Triangle by_a, Triangle by_r, T* out, Sum (&products)[L / 16], float (&late)[4]) {
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    keep_apart();
    const Block<F> own = decayed.block(16 * b, j);
#pragma unroll
    for (int i = 0; i < 8; ++i) late[column_of(i)] += own[i] * g[b].value[i];
#pragma unroll
    for (int m = b; m < L / 16; ++m) {
      multiply(g[b], s.triangles.of[by_a].transposed(16 * m, 16 * b), s.in.a.transposed(16 * m, j));
      multiply(g[b], s.triangles.of[by_r].transposed(16 * m, 16 * b), s.in.r.transposed(16 * m, j));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) products[b].value[i] += own[i] * g[b].value[i];
    g[b].each([&](float& x, int row, int column) {
      WKV_READS(&s.grown[16 * b + row][j + column], sizeof(float));
      x = divide(x, s.grown[16 * b + row][j + column]);
    });
    store_rows(out + chunk.base + 16 * b * chunk.stride + j, chunk.stride, chunk.tokens - 16 * b, g[b]);
  }
}

// A slice of key channels: dk and db. `products` becomes k~ dk~ + b~ db~.
template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void writer_gradients(
    const Arguments& p, const Chunk<N, L>& chunk, const GradientsShared<F, N, L>& s, int j, Sum (&products)[L / 16],
    float (&late)[4]) {
#pragma unroll
  for (int i = 0; i < N; i += 16) {
    const Block<F> S = s.S.block(i, j), dS = s.dS.block(i, j);
#pragma unroll
    for (int e = 0; e < 8; ++e) late[column_of(e)] += S[e] * dS[e];
  }
  Sum g[L / 16];
#pragma unroll
  for (int b = 0; b < L / 16; ++b)
#pragma unroll
    for (int i = 0; i < N; i += 16) multiply(g[b], s.v.block(16 * b, i), s.dS.transposed(i, j));
  finish_writer(s, chunk, j, g, s.in.k, kAK, kRK, p.dk, products, late);
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    g[b] = Sum{};
#pragma unroll
    for (int i = 0; i < N; i += 16) multiply(g[b], s.U.transposed(i, 16 * b), s.dS.transposed(i, j));
  }
  finish_writer(s, chunk, j, g, s.in.b, kAB, kRB, p.db, products, late);
  sum_over_rows(late);
}

// A slice of key channels: dr and da. `r_products` becomes r~ dr~, `a_products` a~ da~.
template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void reader_gradients(
    const Arguments& p, const Chunk<N, L>& chunk, const GradientsShared<F, N, L>& s, int j, Sum (&r_products)[L / 16],
    Sum (&a_products)[L / 16]) {
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    keep_apart();
    Sum dr, da;
#pragma unroll
    for (int i = 0; i < N; i += 16) {
      const Block<F> S = s.S.transposed(i, j);
      multiply(dr, s.dy.block(16 * b, i), S);
      multiply(da, s.dX.transposed(i, 16 * b), S);
    }
#pragma unroll
    for (int m = 0; m <= b; ++m) {
      const Block<F> k = s.in.k.transposed(16 * m, j), written = s.in.b.transposed(16 * m, j);
      multiply(dr, s.triangles.of[kRK].block(16 * b, 16 * m), k);
      multiply(dr, s.triangles.of[kRB].block(16 * b, 16 * m), written);
      multiply(da, s.triangles.of[kAK].block(16 * b, 16 * m), k);
      multiply(da, s.triangles.of[kAB].block(16 * b, 16 * m), written);
    }
    const Block<F> r = s.in.r.block(16 * b, j), a = s.in.a.block(16 * b, j);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      r_products[b].value[i] = r[i] * dr.value[i];
      a_products[b].value[i] = a[i] * da.value[i];
    }
    dr.each([&](float& x, int row, int column) {
      WKV_READS(&s.grown[16 * b + row][j + column], sizeof(float));
      x *= s.grown[16 * b + row][j + column];
    });
    da.each([&](float& x, int row, int column) {
      const int t = 16 * b + row;
      if (t > 0) {
        WKV_READS(&s.grown[t - 1][j + column], sizeof(float));
        x *= s.grown[t - 1][j + column];
      }
    });
    const int64_t at = chunk.base + 16 * b * chunk.stride + j;
    store_rows(p.dr + at, chunk.stride, chunk.tokens - 16 * b, dr);
    store_rows(p.da + at, chunk.stride, chunk.tokens - 16 * b, da);
  }
}

// A log decay scales all that passes over its token: what is read later, less what is only written later, and what
// reaches the chunk's end. With x = r~ dr~ - k~ dk~ - b~ db~ + a~ da~ that is, for token t,
//     sum of x over t and all later tokens - a~ da~ of t + base
// The pairs of a write and a read that are both later must cancel in there. They do so to fp32's last digits because
// each factor is the very number, rounded to the format, that the product used; so `base`, colsum(S_end o dS), is made
// of such products, too: colsum(S o dS~) + sum over tokens of k~ (v dS~) + b~ (U dS~).
template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void decay_gradients(
    const Arguments& p, const Chunk<N, L>& chunk, const GradientsShared<F, N, L>& s, int j, Sum (&x)[L / 16],
    const Sum (&a_products)[L / 16]) {
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    Sum written;
    written.each([&](float& y, int row, int column) {
      WKV_READS(&s.grown[16 * b + row][j + column], sizeof(float));
      y = s.grown[16 * b + row][j + column];
    });
#pragma unroll
    for (int i = 0; i < 8; ++i) x[b].value[i] += a_products[b].value[i] - written.value[i];
  }
  sum_from_below(x);
#pragma unroll
  for (int b = 0; b < L / 16; ++b) {
    const int64_t at = chunk.base + 16 * b * chunk.stride + j;
    Sum raw = load_rows(p.w + at, chunk.stride, chunk.tokens - 16 * b);
    raw.each([&](float& y, int, int column) {
      if (p.w0) y += p.w0[chunk.head * N + j + column];
      y = log_decay_slope(y);
    });
    Sum base;
    base.each([&](float& y, int, int column) {
      WKV_READS(&s.base[j + column], sizeof(float));
      y = s.base[j + column];
    });
#pragma unroll
    for (int i = 0; i < 8; ++i)
      x[b].value[i] = (x[b].value[i] - a_products[b].value[i] + base.value[i]) * raw.value[i];
    store_rows(p.dw + at, chunk.stride, chunk.tokens - 16 * b, x[b]);
  }
}

template <typename F, int N, int L, typename Arguments>
__device__ __forceinline__ void gradients(const Arguments& p, GradientsShared<F, N, L>& s) {
  using Part = Share<N, L>;
  constexpr int warps = Part::kWarps, slices = N / 16;
  const Chunk<N, L> chunk(p.sequences);
  if (chunk.tokens == 0) return;
  const Part part;
  s.S.fetch(p.states + chunk.number * (N * N * F::kPlanes), 0, N, Part::kThreads);
  fetch(s.v, p.v, chunk);
  fetch(s.dy, p.dy, chunk);
  commit_async();
  float grown[Part::kRows][8];
  s.in.fill(p, chunk, part, grown);
#pragma unroll
  for (int i = 0; i < Part::kRows; ++i) write_shared(&s.grown[part.row + i][part.column], grown[i]);
  s.dS.fill_scaled(p.dstates + chunk.number * (N * N * F::kPlanes), s.in.whole, Part::kThreads);
  s.triangles.template fill<warps>(s.in, s.solver, 15);
  wait_async<0>();
  __syncthreads();
  s.solver.invert();
  __syncthreads();
  for (int task = warp_id(); task < 2 * slices; task += warps) {
    if (task < slices)
      make_U(s, 16 * task);
    else
      make_dX(p, chunk, s, 16 * (task - slices));
  }
  __syncthreads();
  make_triangle_gradients(s);
  __syncthreads();
  // Half of the warps take what is written, k and b, the others what is read, r and a: a slice each.
  static_assert(warps == 2 * slices || warps == slices);
  constexpr int turns = 2 * slices / warps;
  Sum products[turns][L / 16], a_products[L / 16];
  float late[4] = {};
#pragma unroll
  for (int turn = 0; turn < turns; ++turn) {
    const int task = turn * warps + warp_id();
    if (task < slices)
      writer_gradients(p, chunk, s, 16 * task, products[turn], late);
    else
      reader_gradients(p, chunk, s, 16 * (task - slices), products[turn], a_products);
  }
  __syncthreads();
  if (warp_id() < slices) {
    const int j = 16 * warp_id();
#pragma unroll
    for (int b = 0; b < L / 16; ++b)
      products[0][b].each([&](float& x, int row, int column) {
        WKV_WRITES(&s.grown[16 * b + row][j + column], sizeof(float));
        s.grown[16 * b + row][j + column] = x;
      });
    if (lane_row() == 0)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* to = &s.base[j + lane_column() + i % 2 + i / 2 * 8];
        WKV_WRITES(to, sizeof *to);
        *to = late[i];
      }
  }
  __syncthreads();
  const int reader = (turns - 1) * warps + warp_id() - slices;
  if (reader >= 0) decay_gradients(p, chunk, s, 16 * reader, products[turns - 1], a_products);
}

// ------------------------------------------------------------------------------------------------ kernels
// T: element of r, k, v, a, b, dy, y and their gradients. W: of w and dw. F: the operands' format.
template <typename T, typename W, typename F, int N, int L>
struct Prepare {
  using Arguments = ChunkedForward<T, W, F>;
  using Shared = PrepareShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { prepare<F, N, L, false>(p, s); }
};
template <typename T, typename W, typename F, int N, int L>
struct Scan {
  using Arguments = ChunkedForward<T, W, F>;
  using Shared = ScanShared<F, N, L>;
  static constexpr int kThreads = 2 * N, kBlocks = blocks<F, L>(384, kThreads);  // fewer threads if blocks split a state
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { scan<F, N, L>(p, s); }
};
template <typename T, typename W, typename F, int N, int L>
struct Outputs {
  using Arguments = ChunkedForward<T, W, F>;
  using Shared = OutputsShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { outputs<F, N, L>(p, s); }
};
template <typename T, typename W, typename F, int N, int L>
struct PrepareBackward {
  using Arguments = ChunkedBackward<T, W, F>;
  using Shared = PrepareShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { prepare<F, N, L, true>(p, s); }
};
template <typename T, typename W, typename F, int N, int L>
struct ScanBackward {
  using Arguments = ChunkedBackward<T, W, F>;
  using Shared = ScanBackwardShared<F, N, L>;
  static constexpr int kThreads = 2 * N, kBlocks = blocks<F, L>(384, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { scan_backward<F, N, L>(p, s); }
};
template <typename T, typename W, typename F, int N, int L>
struct Gradients {
  using Arguments = ChunkedBackward<T, W, F>;
  using Shared = GradientsShared<F, N, L>;
  static constexpr int kThreads = Share<N, L>::kThreads, kBlocks = blocks<F, L>(512, kThreads);
  __device__ static __forceinline__ void run(const Arguments& p, Shared& s) { gradients<F, N, L>(p, s); }
};

}  // namespace wkv7

// The kernels of one mode ("chunked32": its label is part of their names), number formats and head size.
#define WKV7_CHUNKED_KERNELS(T, W, F, mode, label, N, L)                                                       \
  WKV_CHUNKED_KERNEL(wkv7_##mode##_prepare_##label##_##N, wkv7::Prepare<T, W, F, N, L>)                         \
  WKV_CHUNKED_KERNEL(wkv7_##mode##_scan_##label##_##N, wkv7::Scan<T, W, F, N, L>)                               \
  WKV_CHUNKED_KERNEL(wkv7_##mode##_outputs_##label##_##N, wkv7::Outputs<T, W, F, N, L>)                         \
  WKV_CHUNKED_KERNEL(wkv7_##mode##_prepare_backward_##label##_##N, wkv7::PrepareBackward<T, W, F, N, L>)        \
  WKV_CHUNKED_KERNEL(wkv7_##mode##_scan_backward_##label##_##N, wkv7::ScanBackward<T, W, F, N, L>)              \
  WKV_CHUNKED_KERNEL(wkv7_##mode##_gradients_##label##_##N, wkv7::Gradients<T, W, F, N, L>)
