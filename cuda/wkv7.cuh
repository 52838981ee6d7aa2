// WKV-7, sequential in time, one block per (sequence, head): forward and every gradient.
//
// Per head, with rows of S = value index i, columns = key index j, and decay w = exp(-e^-0.5 sigmoid(x)):
//     sa_t = S_{t-1} a_t ;   S_t = S_{t-1} diag(w_t) + sa_t b_t^T + v_t k_t^T ;   y_t = S_t r_t
// Backward, dS being the gradient of S_t that comes from later tokens:
//     dS += dy_t r_t^T ;  dv = dS k ;  dsa = dS b ;  dk = dS^T v ;  db = dS^T sa ;  dS <- dS diag(w) + dsa a^T
//     dr = S_t^T dy ;  da = S_{t-1}^T dsa ;  dlog w = colsum(dS o S_{t-1}) o w
//
// Sums over j need rows, sums over i need columns, so there are four kernels and each holds one matrix by lines:
//     forward        time forward,   rows of S      y, sa (kept for backward)
//     backward_rows  time backward,  rows of dS     dv, ds0, dsa (workspace)
//     backward_keys  time backward,  columns of dS  dk, db, k dk + b db and dS at segment starts (workspace)
//     backward_decay time forward,   columns of S   dr, da, dx
// The two matrices never meet in registers. dlog w follows from X_t = colsum(S_t o gradient of S_t), the sum over a
// column of state times its gradient, which changes along time only by products that are at hand:
//     dlog w_t = X_{t-1} - a da_t ;   X_t = dlog w_t + (k dk + b db)_t - r dr_t
// X is taken afresh at every segment start, so rounding does not build up along T. Nothing is divided by the decay and
// no state is undone; every step is recomputed from s0 in the same order, so results repeat bit for bit.

#pragma once

#include "common.cuh"

namespace wkv7 {

using namespace wkv;

constexpr float kScale = 0.60653065971263342f;  // e^-0.5

__device__ __forceinline__ float decay(float x) { return expf(-kScale / (1.0f + expf(-x))); }

// d log(decay) / dx. Written with exp(-|x|): 1 - sigmoid(x) would lose all digits for large x.
__device__ __forceinline__ float decay_slope(float x) {
  const float e = expf(-fabsf(x));
  return -kScale * e / ((1.0f + e) * (1.0f + e));
}

template <typename T>
struct Inputs {
  Sequences sequences;
  const T* r;
  const float* w;  // x, the raw decay
  const T *k, *v, *a, *b;
  const float* s0;  // may be null: zeros
};

template <typename T>
struct Forward {
  Inputs<T> in;
  T* y;
  float *sT, *sa;  // each may be null: not wanted
};

template <typename T>
struct Backward {
  Inputs<T> in;
  const float* sa;
  const T* dy;
  const float* dsT;  // may be null: zeros
  float *dsa, *key_products, *boundaries;  // [B, T, H, N] twice, SegmentStates with columns first
  T* dr;
  float* dx;
  T *dk, *dv, *da, *db;
  float* ds0;  // may be null: not wanted
};

template <int N>
struct ForwardTiles {
  Tile<N> r, w, k, v, a, b, y, sa;
};

template <typename T, int N>
__device__ __forceinline__ void forward(const Forward<T>& p) {
  WKV_SHARED(ForwardTiles<N>, tile);
  const Place<N> place(p.in.sequences, blockIdx.x);
  const int tokens = place.tokens;
  Prefetch<T> r(p.in.r), k(p.in.k), v(p.in.v), a(p.in.a), b(p.in.b);
  Prefetch<float> w(p.in.w);
  const auto fetch = [&](int t0) { place.fetch(t0, r, w, k, v, a, b); };
  const auto commit = [&] {
    r.commit(tile.r, place), w.commit(tile.w, place, decay), k.commit(tile.k, place);
    v.commit(tile.v, place), a.commit(tile.a, place), b.commit(tile.b, place);
  };

  Lines<N> S(place, p.in.s0, false);
  fetch(0);
  commit();
  __syncthreads();
  for (int t0 = 0; t0 < tokens; t0 += kSteps) {
    if (t0 + kSteps < tokens) fetch(t0 + kSteps);
    const int steps = steps_in_tile(tokens, t0);
    for (int s = 0; s < steps; ++s) {
      const PerLine<N> sa = S.dot(tile.a, s);
      S.scale(tile.w, s);
      S.add(sa, tile.b, s);
      S.add(read(tile.v, place, s), tile.k, s);
      write(tile.y, place, s, S.dot(tile.r, s));
      write(tile.sa, place, s, sa);
    }
    __syncthreads();
    if (place.step < steps) {
      store(p.y, tile.y, place, place.offset(t0));
      if (p.sa) store(p.sa, tile.sa, place, place.offset(t0));
    }
    commit();
    __syncthreads();
  }
  if (p.sT) S.save(p.sT + place.head * N * N);
}

template <int N>
struct RowsTiles {
  Tile<N> r, w, k, a, b, dy, dv, dsa;
};

template <typename T, int N>
__device__ __forceinline__ void backward_rows(const Backward<T>& p) {
  WKV_SHARED(RowsTiles<N>, tile);
  const Place<N> place(p.in.sequences, blockIdx.x);
  const int tokens = place.tokens;
  Prefetch<T> r(p.in.r), k(p.in.k), a(p.in.a), b(p.in.b), dy(p.dy);
  Prefetch<float> w(p.in.w);
  const auto fetch = [&](int t0) { place.fetch(t0, r, w, k, a, b, dy); };
  const auto commit = [&] {
    r.commit(tile.r, place), w.commit(tile.w, place, decay), k.commit(tile.k, place);
    a.commit(tile.a, place), b.commit(tile.b, place), dy.commit(tile.dy, place);
  };

  Lines<N> dS(place, p.dsT, false);
  fetch(last_tile(tokens));
  commit();
  __syncthreads();
  for (int t0 = last_tile(tokens); t0 >= 0; t0 -= kSteps) {
    if (t0 > 0) fetch(t0 - kSteps);
    const int steps = steps_in_tile(tokens, t0);
    for (int s = steps - 1; s >= 0; --s) {
      dS.add(read(tile.dy, place, s), tile.r, s);
      const PerLine<N> dsa = dS.dot(tile.b, s);
      write(tile.dsa, place, s, dsa);
      write(tile.dv, place, s, dS.dot(tile.k, s));
      dS.scale(tile.w, s);
      dS.add(dsa, tile.a, s);
    }
    __syncthreads();
    if (place.step < steps) {
      store(p.dv, tile.dv, place, place.offset(t0));
      store(p.dsa, tile.dsa, place, place.offset(t0));
    }
    commit();
    __syncthreads();
  }
  if (p.ds0) dS.save(p.ds0 + place.head * N * N);
}

// k and b are read by the writing lane only, which then puts dk and db in their place.
template <int N>
struct KeysTiles {
  Tile<N> r, w, v, a, sa, dy, dsa, k_dk, b_db, products;
};

template <typename T, int N>
__device__ __forceinline__ void backward_keys(const Backward<T>& p) {
  WKV_SHARED(KeysTiles<N>, tile);
  const Place<N> place(p.in.sequences, blockIdx.x);
  const int tokens = place.tokens;
  Prefetch<T> r(p.in.r), k(p.in.k), v(p.in.v), a(p.in.a), b(p.in.b), dy(p.dy);
  Prefetch<float> w(p.in.w), sa(p.sa), dsa(p.dsa);
  const auto fetch = [&](int t0) { place.fetch(t0, r, w, k, v, a, b, dy, sa, dsa); };
  const auto commit = [&] {
    r.commit(tile.r, place), w.commit(tile.w, place, decay), k.commit(tile.k_dk, place);
    v.commit(tile.v, place), a.commit(tile.a, place), b.commit(tile.b_db, place);
    dy.commit(tile.dy, place), sa.commit(tile.sa, place), dsa.commit(tile.dsa, place);
  };

  Lines<N> dS(place, p.dsT, true);
  const SegmentStates<N> boundaries(p.in.sequences, place);
  fetch(last_tile(tokens));
  commit();
  __syncthreads();
  for (int t0 = last_tile(tokens); t0 >= 0; t0 -= kSteps) {
    if (t0 > 0) fetch(t0 - kSteps);
    const int steps = steps_in_tile(tokens, t0);
    for (int s = steps - 1; s >= 0; --s) {
      dS.add(read(tile.r, place, s), tile.dy, s);
      const PerLine<N> dk = dS.dot(tile.v, s);
      const PerLine<N> db = dS.dot(tile.sa, s);
      if (place.lane == 0) {
        const PerLine<N> k_t = read(tile.k_dk, place, s);
        const PerLine<N> b_t = read(tile.b_db, place, s);
        PerLine<N> products;
#pragma unroll
        for (int l = 0; l < Layout<N>::kLines; ++l) products[l] = k_t[l] * dk[l] + b_t[l] * db[l];
        write(tile.products, place, s, products);
        write(tile.k_dk, place, s, dk);
        write(tile.b_db, place, s, db);
      }
      dS.scale(read(tile.w, place, s));
      dS.add(read(tile.a, place, s), tile.dsa, s);
    }
    if (t0 % kSegment == 0) dS.save(p.boundaries + boundaries.offset(t0));
    __syncthreads();
    if (place.step < steps) {
      store(p.dk, tile.k_dk, place, place.offset(t0));
      store(p.db, tile.b_db, place, place.offset(t0));
      store(p.key_products, tile.products, place, place.offset(t0));
    }
    commit();
    __syncthreads();
  }
}

// As above, dr, da and dx take the places of r, a and the key products.
template <int N>
struct DecayTiles {
  Tile<N> w, k, v, b, sa, dy, dsa, slope, r_dr, a_da, products_dx;
};

template <typename T, int N>
__device__ __forceinline__ void backward_decay(const Backward<T>& p) {
  WKV_SHARED(DecayTiles<N>, tile);
  const Place<N> place(p.in.sequences, blockIdx.x);
  const int tokens = place.tokens;
  Prefetch<T> r(p.in.r), k(p.in.k), v(p.in.v), a(p.in.a), b(p.in.b), dy(p.dy);
  Prefetch<float> w(p.in.w), sa(p.sa), dsa(p.dsa), products(p.key_products);
  const auto fetch = [&](int t0) { place.fetch(t0, r, w, k, v, a, b, dy, sa, dsa, products); };
  const auto commit = [&] {
    r.commit(tile.r_dr, place), w.commit(tile.w, place, decay), k.commit(tile.k, place);
    v.commit(tile.v, place), a.commit(tile.a_da, place), b.commit(tile.b, place);
    dy.commit(tile.dy, place), sa.commit(tile.sa, place), dsa.commit(tile.dsa, place);
    products.commit(tile.products_dx, place), w.commit(tile.slope, place, decay_slope);
  };

  Lines<N> S(place, p.in.s0, true);
  const SegmentStates<N> boundaries(p.in.sequences, place);
  PerLine<N> X;
  fetch(0);
  commit();
  __syncthreads();
  for (int t0 = 0; t0 < tokens; t0 += kSteps) {
    if (t0 % kSegment == 0) X = S.dot(p.boundaries + boundaries.offset(t0));
    if (t0 + kSteps < tokens) fetch(t0 + kSteps);
    const int steps = steps_in_tile(tokens, t0);
    for (int s = 0; s < steps; ++s) {
      const PerLine<N> da = S.dot(tile.dsa, s);
      S.scale(read(tile.w, place, s));
      S.add(read(tile.b, place, s), tile.sa, s);
      S.add(read(tile.k, place, s), tile.v, s);
      const PerLine<N> dr = S.dot(tile.dy, s);
      if (place.lane == 0) {
        const PerLine<N> r_t = read(tile.r_dr, place, s);
        const PerLine<N> a_t = read(tile.a_da, place, s);
        const PerLine<N> products_t = read(tile.products_dx, place, s);
        const PerLine<N> slope = read(tile.slope, place, s);
        PerLine<N> dx;
#pragma unroll
        for (int l = 0; l < Layout<N>::kLines; ++l) {
          const float dlogw = X[l] - a_t[l] * da[l];
          dx[l] = dlogw * slope[l];
          X[l] = dlogw + products_t[l] - r_t[l] * dr[l];
        }
        write(tile.r_dr, place, s, dr);
        write(tile.a_da, place, s, da);
        write(tile.products_dx, place, s, dx);
      }
    }
    __syncthreads();
    if (place.step < steps) {
      store(p.dr, tile.r_dr, place, place.offset(t0));
      store(p.da, tile.a_da, place, place.offset(t0));
      store(p.dx, tile.products_dx, place, place.offset(t0));
    }
    commit();
    __syncthreads();
  }
}

}  // namespace wkv7

// The kernels of one number format (its `label` is part of their names) and head size.
#define WKV7_KERNELS(T, label, N)                                                                    \
  WKV_KERNEL(wkv7_forward_##label##_##N, (wkv7::forward<T, N>), wkv7::Forward<T>, N)                 \
  WKV_KERNEL(wkv7_backward_rows_##label##_##N, (wkv7::backward_rows<T, N>), wkv7::Backward<T>, N)    \
  WKV_KERNEL(wkv7_backward_keys_##label##_##N, (wkv7::backward_keys<T, N>), wkv7::Backward<T>, N)    \
  WKV_KERNEL(wkv7_backward_decay_##label##_##N, (wkv7::backward_decay<T, N>), wkv7::Backward<T>, N)
