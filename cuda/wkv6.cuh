// WKV-5 and WKV-6, sequential in time: forward and every gradient. WKV-5 is WKV-6 with a decay that does not change
// along time; only where the decay is read and how its gradient is summed differ.
//
// Per head, with rows of S = value index i, columns = key index j, decay w = exp(-exp(x)) and bonus u:
//     y_t = (S_{t-1} + v_t (u o k_t)^T) r_t ;   S_t = S_{t-1} diag(w_t) + v_t k_t^T
// Backward, dS_t being the gradient of S_t that comes from later tokens:
//     dv = dS_t k + dy (r . (u o k)) ;   dk = dS_t^T v + u o r (v . dy) ;   dS_{t-1} = dS_t diag(w_t) + dy_t r_t^T
//     dr = S_{t-1}^T dy + u o k (v . dy) ;   du = sum over t of r o k (v . dy) ;   dw = colsum(dS_t o S_{t-1})
//
// Two kernels walk all of a (sequence, head) and leave S at every segment's start and dS at its end; the other three
// take the segments side by side. Sums over j need rows, sums over i need columns:
//     forward              time forward,  rows of S      y, S at segment starts (kept for backward)
//     backward_values      time backward, rows of dS     dv, du, ds0, dS at segment ends (workspace)
//     backward_keys        time backward, columns of dS  dk
//     backward_receptance  time forward,  columns of S   dr
//     backward_decay       both, tile by tile            dx
// x has no bound and w takes any value from 1 down to 0, so nothing is divided by w and no state is undone. dw is the
// sum above, over S and dS themselves. w o dw also follows from running sums of r o dr and k o dk, but as a difference
// of numbers that do not shrink with w: at x = 3 it is 1e-9 of them, far below their rounding. Sums run in one order,
// so results repeat bit for bit.
#pragma once

#include "common.cuh"

namespace wkv6 {

using namespace wkv;

enum class Decay { kPerHead, kPerToken };  // x is [H, N] (WKV-5) or [B, T, H, N] (WKV-6)

// w - 1. A state is multiplied by w as S + S (w - 1): a float next to 1 is off by 3e-8, and a slow decay repeats that
// for 1 / (1 - w) tokens.
__device__ __forceinline__ float growth(float x) { return expm1f(-expf(x)); }

// dw / dx, as one exponential: exp(x) alone may be infinite where the product has long been zero.
__device__ __forceinline__ float decay_slope(float x) { return -expf(x - expf(x)); }

template <typename T>
struct Inputs {
  Sequences sequences;
  const T* r;
  const float* w;  // x, the raw decay
  const T *k, *v;
  const float *u, *s0;  // s0 may be null: zeros
};

template <typename T>
struct Forward {
  Inputs<T> in;
  T* y;
  float *sT, *starts;  // each may be null: not wanted. starts: SegmentStates
};

template <typename T>
struct Backward {
  Inputs<T> in;
  const float* starts;
  const T* dy;
  const float* dsT;  // may be null: zeros
  float* ends;       // SegmentStates
  T* dr;
  float* dx;
  T *dk, *dv;
  float *du, *ds0;  // ds0 may be null: not wanted
};

// What this thread reads of x at token t0 + place.step: `shift` columns after the quad it reads of other tensors.
template <Decay D, int N>
__device__ __forceinline__ int64_t decay_offset(const Place<N>& place, int64_t heads, int t0, int shift = 0) {
  return shift + (D == Decay::kPerToken ? place.offset(t0) : place.head % heads * N + 4 * place.quad);
}

// Sum of x over the threads that share place.step; each of them gets it.
template <int N>
__device__ __forceinline__ float sum_over_quads(float x) {
#pragma unroll
  for (int other = 1; other < N / 4; other *= 2) x += __shfl_xor_sync(Layout<N>::kWarpMask, x, other);
  return x;
}

// One number for every step of a tile.
struct PerStep {
  float value[kSteps];

  template <int N>
  __device__ __forceinline__ void commit(float x, const Place<N>& place) {
    if (place.quad == 0) value[place.step] = x;
  }
  __device__ __forceinline__ float operator[](int step) const { return value[step]; }
};

// r . (u o k) at this thread's step.
template <int N, typename T>
__device__ __forceinline__ float bonus(const Prefetch<T>& r, const Quad<float>& u, const Prefetch<T>& k) {
  float part = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; ++e) part += to_float(r.held.value[e]) * u.value[e] * to_float(k.held.value[e]);
  return sum_over_quads<N>(part);
}

// v . dy at this thread's step.
template <int N, typename T>
__device__ __forceinline__ float dot(const Prefetch<T>& v, const Prefetch<T>& dy) {
  float part = 0.0f;
#pragma unroll
  for (int e = 0; e < 4; ++e) part += to_float(v.held.value[e]) * to_float(dy.held.value[e]);
  return sum_over_quads<N>(part);
}

template <int N>
__device__ __forceinline__ Quad<float> quad_of_u(const float* u, const Place<N>& place, int64_t heads) {
  return *reinterpret_cast<const Quad<float>*>(u + place.head % heads * N + 4 * place.quad);
}

template <int N>
__device__ __forceinline__ PerLine<N> lines_of_u(const float* u, const Place<N>& place, int64_t heads) {
  PerLine<N> out;
#pragma unroll
  for (int l = 0; l < Layout<N>::kLines; ++l) out[l] = u[place.head % heads * N + place.line + l];
  return out;
}

template <int N>
struct ForwardTiles {
  Tile<N> r, growth, k, v, y;
  PerStep bonus;
};

template <typename T, int N, Decay D>
__device__ __forceinline__ void forward(const Forward<T>& p) {
  WKV_SHARED(ForwardTiles<N>, tile);
  const Place<N> place(p.in.sequences, blockIdx.x);
  const SegmentStates<N> states(p.in.sequences, place);
  const int tokens = place.tokens;
  const int64_t heads = p.in.sequences.heads;
  const Quad<float> u = quad_of_u(p.in.u, place, heads);
  Prefetch<T> r(p.in.r), k(p.in.k), v(p.in.v);
  Prefetch<float> w(p.in.w);
  const auto fetch = [&](int t0) {
    place.fetch(t0, r, k, v);
    w.fetch(decay_offset<D>(place, heads, t0), t0 + place.step < tokens);
  };
  const auto commit = [&] {
    r.commit(tile.r, place), w.commit(tile.growth, place, growth), k.commit(tile.k, place), v.commit(tile.v, place);
    tile.bonus.commit(bonus<N>(r, u, k), place);
  };

  Lines<N> S(place, p.in.s0, false);
  fetch(0);
  commit();
  __syncthreads();
  for (int t0 = 0; t0 < tokens; t0 += kSteps) {
    if (p.starts && t0 % kSegment == 0) S.save(p.starts + states.offset(t0));
    if (t0 + kSteps < tokens) fetch(t0 + kSteps);
    const int steps = steps_in_tile(tokens, t0);
    for (int s = 0; s < steps; ++s) {
      const PerLine<N> v_t = read(tile.v, place, s);
      PerLine<N> y = S.dot(tile.r, s);
#pragma unroll
      for (int l = 0; l < Layout<N>::kLines; ++l) y[l] += v_t[l] * tile.bonus[s];
      write(tile.y, place, s, y);
      S.grow(tile.growth, s);
      S.add(v_t, tile.k, s);
    }
    __syncthreads();
    if (place.step < steps) store(p.y, tile.y, place, place.offset(t0));
    commit();
    __syncthreads();
  }
  if (p.sT) S.save(p.sT + place.head * N * N);
}

template <int N>
struct ValuesTiles {
  Tile<N> r, growth, k, dy, dv;
  PerStep bonus;
};

template <typename T, int N, Decay D>
__device__ __forceinline__ void backward_values(const Backward<T>& p) {
  WKV_SHARED(ValuesTiles<N>, tile);
  const Place<N> place(p.in.sequences, blockIdx.x);
  const SegmentStates<N> states(p.in.sequences, place);
  const int tokens = place.tokens;
  const int64_t heads = p.in.sequences.heads;
  const Quad<float> u = quad_of_u(p.in.u, place, heads);
  Quad<float> du{};  // of this thread's step of every tile
  Prefetch<T> r(p.in.r), k(p.in.k), v(p.in.v), dy(p.dy);
  Prefetch<float> w(p.in.w);
  const auto fetch = [&](int t0) {
    place.fetch(t0, r, k, v, dy);
    w.fetch(decay_offset<D>(place, heads, t0), t0 + place.step < tokens);
  };
  const auto commit = [&] {
    r.commit(tile.r, place), w.commit(tile.growth, place, growth), k.commit(tile.k, place), dy.commit(tile.dy, place);
    tile.bonus.commit(bonus<N>(r, u, k), place);
    const float v_dy = dot<N>(v, dy);
#pragma unroll
    for (int e = 0; e < 4; ++e) du.value[e] += to_float(r.held.value[e]) * to_float(k.held.value[e]) * v_dy;
  };

  Lines<N> dS(place, p.dsT, false);
  fetch(last_tile(tokens));
  commit();
  __syncthreads();
  for (int t0 = last_tile(tokens); t0 >= 0; t0 -= kSteps) {
    if (t0 == last_tile(tokens) || (t0 + kSteps) % kSegment == 0) dS.save(p.ends + states.offset(t0));
    if (t0 > 0) fetch(t0 - kSteps);
    const int steps = steps_in_tile(tokens, t0);
    for (int s = steps - 1; s >= 0; --s) {
      const PerLine<N> dy_t = read(tile.dy, place, s);
      PerLine<N> dv = dS.dot(tile.k, s);
#pragma unroll
      for (int l = 0; l < Layout<N>::kLines; ++l) dv[l] += dy_t[l] * tile.bonus[s];
      write(tile.dv, place, s, dv);
      dS.grow(tile.growth, s);
      dS.add(dy_t, tile.r, s);
    }
    __syncthreads();
    if (place.step < steps) store(p.dv, tile.dv, place, place.offset(t0));
    if (t0 > 0) commit();
    __syncthreads();
  }
  if (p.ds0) dS.save(p.ds0 + place.head * N * N);

  tile.dv.quad(place.step, place.quad) = du;
  __syncthreads();
  if (place.step == 0) {
#pragma unroll
    for (int s = 1; s < kSteps; ++s)
#pragma unroll
      for (int e = 0; e < 4; ++e) du.value[e] += tile.dv.quad(s, place.quad).value[e];
    *reinterpret_cast<Quad<float>*>(p.du + place.head * N + 4 * place.quad) = du;
  }
}

__device__ __forceinline__ int segment_end(int begin, int tokens) {
  return tokens - begin < kSegment ? tokens : begin + kSegment;
}

// What block `block` of [segments of all sequences, H] works on: tokens [begin, end) of one head of a sequence; none if
// the segment's number is one that was left unused.
struct Segment {
  int64_t head;
  int begin, end;

  __device__ __forceinline__ Segment(const Sequences& all, int64_t block) {
    const int64_t number = block / all.heads, sequence = all.sequence_of(number);
    head = sequence * all.heads + block % all.heads;
    begin = int(number - all.first_segment(sequence)) * kSegment;
    end = segment_end(begin, int(all.length(sequence)));
  }
};

template <int N>
struct KeysTiles {
  Tile<N> r, growth, v, dy, dk;
  PerStep v_dy;
};

template <typename T, int N, Decay D>
__device__ __forceinline__ void backward_keys(const Backward<T>& p) {
  WKV_SHARED(KeysTiles<N>, tile);
  const Segment segment(p.in.sequences, blockIdx.x);
  if (segment.begin >= segment.end) return;
  const Place<N> place(p.in.sequences, segment.head);
  const int64_t heads = p.in.sequences.heads;
  const PerLine<N> u = lines_of_u(p.in.u, place, heads);
  Prefetch<T> r(p.in.r), v(p.in.v), dy(p.dy);
  Prefetch<float> w(p.in.w);
  const auto fetch = [&](int t0) {
    place.fetch(t0, r, v, dy);
    w.fetch(decay_offset<D>(place, heads, t0), t0 + place.step < place.tokens);
  };
  const auto commit = [&] {
    r.commit(tile.r, place), w.commit(tile.growth, place, growth), v.commit(tile.v, place), dy.commit(tile.dy, place);
    tile.v_dy.commit(dot<N>(v, dy), place);
  };

  Lines<N> dS(place);
  dS.load(p.ends + int64_t(blockIdx.x) * N * N, true);
  fetch(last_tile(segment.end));
  commit();
  __syncthreads();
  for (int t0 = last_tile(segment.end); t0 >= segment.begin; t0 -= kSteps) {
    if (t0 > segment.begin) fetch(t0 - kSteps);
    const int steps = steps_in_tile(segment.end, t0);
    for (int s = steps - 1; s >= 0; --s) {
      const PerLine<N> r_t = read(tile.r, place, s);
      PerLine<N> dk = dS.dot(tile.v, s);
#pragma unroll
      for (int l = 0; l < Layout<N>::kLines; ++l) dk[l] += u[l] * r_t[l] * tile.v_dy[s];
      write(tile.dk, place, s, dk);
      dS.grow(read(tile.growth, place, s));
      dS.add(r_t, tile.dy, s);
    }
    __syncthreads();
    if (place.step < steps) store(p.dk, tile.dk, place, place.offset(t0));
    commit();
    __syncthreads();
  }
}

template <int N>
struct ReceptanceTiles {
  Tile<N> growth, k, v, dy, dr;
  PerStep v_dy;
};

template <typename T, int N, Decay D>
__device__ __forceinline__ void backward_receptance(const Backward<T>& p) {
  WKV_SHARED(ReceptanceTiles<N>, tile);
  const Segment segment(p.in.sequences, blockIdx.x);
  if (segment.begin >= segment.end) return;
  const Place<N> place(p.in.sequences, segment.head);
  const int64_t heads = p.in.sequences.heads;
  const PerLine<N> u = lines_of_u(p.in.u, place, heads);
  Prefetch<T> k(p.in.k), v(p.in.v), dy(p.dy);
  Prefetch<float> w(p.in.w);
  const auto fetch = [&](int t0) {
    place.fetch(t0, k, v, dy);
    w.fetch(decay_offset<D>(place, heads, t0), t0 + place.step < place.tokens);
  };
  const auto commit = [&] {
    w.commit(tile.growth, place, growth), k.commit(tile.k, place), v.commit(tile.v, place), dy.commit(tile.dy, place);
    tile.v_dy.commit(dot<N>(v, dy), place);
  };

  Lines<N> S(place);
  S.load(p.starts + int64_t(blockIdx.x) * N * N, true);
  fetch(segment.begin);
  commit();
  __syncthreads();
  for (int t0 = segment.begin; t0 < segment.end; t0 += kSteps) {
    if (t0 + kSteps < segment.end) fetch(t0 + kSteps);
    const int steps = steps_in_tile(segment.end, t0);
    for (int s = 0; s < steps; ++s) {
      const PerLine<N> k_t = read(tile.k, place, s);
      PerLine<N> dr = S.dot(tile.dy, s);
#pragma unroll
      for (int l = 0; l < Layout<N>::kLines; ++l) dr[l] += u[l] * k_t[l] * tile.v_dy[s];
      write(tile.dr, place, s, dr);
      S.grow(read(tile.growth, place, s));
      S.add(k_t, tile.v, s);
    }
    __syncthreads();
    if (place.step < steps) store(p.dr, tile.dr, place, place.offset(t0));
    commit();
    __syncthreads();
  }
}

// S and dS meet here. A block takes kColumns columns, a thread four rows of one of them: so little that the thread
// holds S before every step of a tile while it walks dS back through that tile.
constexpr int kColumns = kSteps;  // thread (step, quad) of a tile is thread (column, rows) of the states

template <int N>
struct DecayTiles {
  Tile<N> v, dy;
  Tile<kColumns> r, growth, k, slope, dx;
  Quad<float> starts[kSegment / kSteps][Layout<N>::kThreads];  // each thread's S at the start of every tile
};

template <typename T, int N, Decay D>
__device__ __forceinline__ void backward_decay(const Backward<T>& p) {
  WKV_SHARED(DecayTiles<N>, tile);
  constexpr int kBlocks = N / kColumns;
  int64_t head = blockIdx.x / kBlocks;
  int first = 0, last = 0;
  if constexpr (D == Decay::kPerToken) {
    const Segment segment(p.in.sequences, head);
    head = segment.head, first = segment.begin, last = segment.end;
  }
  const Place<N> place(p.in.sequences, head);
  // With one decay per head the block takes all segments, one after another, and sums.
  if constexpr (D == Decay::kPerHead) last = place.tokens;
  const SegmentStates<N> states(p.in.sequences, place);
  const int tokens = place.tokens;
  const int64_t heads = p.in.sequences.heads;
  const int columns = blockIdx.x % kBlocks * kColumns;
  const bool loads_columns = place.quad < kColumns / 4;

  Prefetch<T> r(p.in.r), k(p.in.k), v(p.in.v), dy(p.dy);
  Prefetch<float> w(p.in.w);
  const auto load = [&](int t0, bool gradients) {
    const int64_t offset = place.offset(t0);
    const bool inside = t0 + place.step < tokens;
    v.fetch(offset, inside), k.fetch(offset + columns, inside && loads_columns);
    w.fetch(decay_offset<D>(place, heads, t0, columns), inside && loads_columns);
    if (gradients) dy.fetch(offset, inside), r.fetch(offset + columns, inside && loads_columns);
    __syncthreads();
    v.commit(tile.v, place);
    if (loads_columns) k.commit(tile.k, place), w.commit(tile.growth, place, growth);
    if (gradients) dy.commit(tile.dy, place);
    if (gradients && loads_columns) r.commit(tile.r, place), w.commit(tile.slope, place, decay_slope);
    __syncthreads();
  };
  const auto read_state = [&](const float* matrices, int t0) {
    const float* from = matrices + states.offset(t0) + 4 * place.quad * N + columns + place.step;
    return Quad<float>{from[0], from[N], from[2 * N], from[3 * N]};
  };
  Quad<float> S;
  const auto step_forward = [&](int s) {
    const float growth = tile.growth.at(s, place.step), k_t = tile.k.at(s, place.step);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      S.value[e] += S.value[e] * growth;
      S.value[e] += tile.v.quad(s, place.quad).value[e] * k_t;
    }
  };

  float total = 0.0f;  // of dw
  for (int begin = first; begin < last; begin += kSegment) {
    const int end = segment_end(begin, last);
    S = read_state(p.starts, begin);
    for (int t0 = begin; t0 < end; t0 += kSteps) {
      tile.starts[(t0 - begin) / kSteps][threadIdx.x] = S;
      if (t0 + kSteps >= end) break;
      load(t0, false);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) step_forward(s);
    }
    Quad<float> dS = read_state(p.ends, begin);
    for (int t0 = last_tile(end); t0 >= begin; t0 -= kSteps) {
      load(t0, true);
      const int steps = steps_in_tile(end, t0);
      Quad<float> before[kSteps];
      S = tile.starts[(t0 - begin) / kSteps][threadIdx.x];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        before[s] = S;
        step_forward(s);
      }
      float dw[kSteps] = {};
#pragma unroll
      for (int s = kSteps - 1; s >= 0; --s) {
        if (s >= steps) continue;
        const float growth = tile.growth.at(s, place.step), r_t = tile.r.at(s, place.step);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          dw[s] += dS.value[e] * before[s].value[e];
          dS.value[e] += dS.value[e] * growth;
          dS.value[e] += tile.dy.quad(s, place.quad).value[e] * r_t;
        }
      }
      if constexpr (D == Decay::kPerHead) {
        float sum = 0.0f;  // of the tile first: long sums lose digits
#pragma unroll
        for (int s = 0; s < kSteps; ++s) sum += dw[s];
        total += sum;
      } else {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const float sum = sum_over_quads<N>(dw[s]);
          if (place.quad == 0) tile.dx.at(s, place.step) = sum * tile.slope.at(s, place.step);
        }
        __syncthreads();
        if (loads_columns && place.step < steps) store(p.dx, tile.dx, place, place.offset(t0) + columns);
      }
    }
  }
  if constexpr (D == Decay::kPerHead) {
    total = sum_over_quads<N>(total);
    const int column = columns + place.step;
    if (place.quad == 0) p.dx[place.head * N + column] = total * decay_slope(p.in.w[place.head % heads * N + column]);
  }
}

}  // namespace wkv6

// The kernels of one number format (its `label` is part of their names) and head size.
#define WKV6_KERNELS(T, label, N) WKV6_EACH_KERNEL(wkv6, kPerToken, T, label, N)
#define WKV5_KERNELS(T, label, N) WKV6_EACH_KERNEL(wkv5, kPerHead, T, label, N)

#define WKV6_EACH_KERNEL(operator_, decay, T, label, N)                          \
  WKV6_KERNEL(operator_, decay, forward, Forward, T, label, N)                   \
  WKV6_KERNEL(operator_, decay, backward_values, Backward, T, label, N)          \
  WKV6_KERNEL(operator_, decay, backward_keys, Backward, T, label, N)            \
  WKV6_KERNEL(operator_, decay, backward_receptance, Backward, T, label, N)      \
  WKV6_KERNEL(operator_, decay, backward_decay, Backward, T, label, N)

#define WKV6_KERNEL(operator_, decay, name, Arguments, T, label, N)                                        \
  WKV_KERNEL(operator_##_##name##_##label##_##N, (wkv6::name<T, N, wkv6::Decay::decay>), wkv6::Arguments<T>, N)
