// Building blocks of the sequential WKV kernels: number formats, the way a state is spread over a block's threads, and
// tiles of inputs in shared memory. Legend: B batch, T tokens, H heads, N head size, D documents.
//
// One block walks one head of one sequence through time with the N x N state in registers. What a kernel calls a *line*
// is a row of the state (fixed value index, running key index) or a column (fixed key index, running value index),
// whichever makes its sums local. A thread holds a part of kLines lines, kLanes threads share each line, and a sum
// along a line is finished by shuffles among those threads. Numbers are chosen for shared memory, which limits such
// kernels: two lines per thread use each loaded vector twice, and lanes eight apart share a line, so that neighbouring
// lanes read the same address. Lines do not depend on one another, hence no other communication.
#pragma once

// Three compilers take this file: NVRTC for every run on a GPU, nvcc and g++ (with shim/cuda_runtime.h) in tests.
#ifdef __CUDACC_RTC__
using int64_t = long long;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
#else
#include <cuda_runtime.h>

#include <cstdint>
#endif

#ifdef WKV_HOST_SHIM
#define WKV_SHARED(type, name) type& name = shim::shared_memory<type>()
#define WKV_ASSERT(condition) shim::require(condition, #condition)
#define WKV_BYTES(symbol, Arguments) extern "C" const size_t symbol##_bytes = sizeof(Arguments);
#else
#define WKV_SHARED(type, name) __shared__ type name
#define WKV_ASSERT(condition)
#define WKV_BYTES(symbol, Arguments)
#endif

namespace wkv {

// Bit operations rather than cuda_bf16.h, so that the file is also plain C++.
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

__device__ __forceinline__ void assign(float& out, float x) { out = x; }
__device__ __forceinline__ void assign(BFloat16& out, float x) {  // to nearest, ties to even
  const uint32_t bits = __float_as_uint(x);
  out.bits = x != x ? 0x7fff : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename T>
struct alignas(4 * sizeof(T)) Quad {
  T value[4];
};

constexpr int kSteps = 8;     // tokens per tile: 2N threads load one quad each per tensor
constexpr int kSegment = 64;  // tokens between states kept in memory; a multiple of kSteps

__device__ __forceinline__ int steps_in_tile(int T, int t0) { return T - t0 < kSteps ? T - t0 : kSteps; }

__device__ __forceinline__ int last_tile(int T) { return (T - 1) / kSteps * kSteps; }

// How many segments of `length` tokens T tokens are.
__device__ __forceinline__ int64_t segments(int64_t T, int length) { return (T + length - 1) / length; }

template <int N>
struct Layout {
  static_assert(N == 8 || N % 16 == 0, "lines are split into quads over the lanes");
  static constexpr int kLanes = N == 8 ? 2 : 4;
  static constexpr int kLines = kLanes / 2;
  static constexpr int kThreads = N / kLines * kLanes;
  static constexpr int kQuads = N / 4 / kLanes;
  static constexpr unsigned kWarpMask = kThreads < 32 ? (1u << kThreads) - 1 : 0xffffffffu;
  static_assert(kThreads * 4 == kSteps * N, "one quad per thread and tile");
};

template <int N>
struct Tile {  // fp32 [kSteps, N]
  Quad<float> value[kSteps][N / 4];

  __device__ __forceinline__ Quad<float>& quad(int step, int q) {
    WKV_ASSERT(step >= 0 && step < kSteps && q >= 0 && q < N / 4);
    return value[step][q];
  }
  __device__ __forceinline__ const Quad<float>& quad(int step, int q) const {
    WKV_ASSERT(step >= 0 && step < kSteps && q >= 0 && q < N / 4);
    return value[step][q];
  }
  __device__ __forceinline__ float at(int step, int i) const { return quad(step, i / 4).value[i % 4]; }
  __device__ __forceinline__ float& at(int step, int i) { return quad(step, i / 4).value[i % 4]; }
};

// Which tokens belong together: `count` = B sequences of T tokens each, or, if there are offsets, `count` = D documents
// that lie one after another in a single row of T tokens, document d from offsets[d] up to offsets[d + 1]. Every
// sequence has a state of its own. The segments of all sequences are numbered on from one sequence to the next. A
// document's first number follows from its offset rounded down, so that nobody has to wait for a sum over the offsets;
// that may leave numbers unused.
struct Sequences {
  int64_t count, tokens, heads;
  const int64_t* offsets;  // on the device; null: not packed

  __device__ __forceinline__ int64_t begin(int64_t sequence) const {
    return offsets ? offsets[sequence] : sequence * tokens;
  }
  __device__ __forceinline__ int64_t length(int64_t sequence) const {
    return offsets ? offsets[sequence + 1] - offsets[sequence] : tokens;
  }
  template <int kLength = kSegment>
  __device__ __forceinline__ int64_t first_segment(int64_t sequence) const {
    return offsets ? offsets[sequence] / kLength + sequence : sequence * segments(tokens, kLength);
  }
  // The sequence to which the segment of that number belongs.
  template <int kLength = kSegment>
  __device__ __forceinline__ int64_t sequence_of(int64_t number) const {
    if (!offsets) return number / segments(tokens, kLength);
    int64_t low = 0, high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_segment<kLength>(middle) <= number ? low : high) = middle;
    }
    return low;
  }
};

// Where this thread works: on one head of one sequence, there on `lane`'s share of the lines from `line` on, and on one
// quad of every tile.
template <int N>
struct Place {
  int lane, line, step, quad;
  int64_t head;    // sequence * H + h
  int tokens;      // of the sequence; like all times, 32 bits: registers are scarce
  int64_t base;    // element (its first token, h, 0) of a [B, T, H, N] tensor
  int64_t stride;  // from one token to the next

  __device__ __forceinline__ Place(const Sequences& all, int64_t head)
      : lane(threadIdx.x % 32 / 8),
        line((threadIdx.x / 32 * 8 + threadIdx.x % 8) * Layout<N>::kLines),
        step(threadIdx.x / (N / 4)),
        quad(threadIdx.x % (N / 4)),
        head(head),
        tokens(int(all.length(head / all.heads))),
        base((all.begin(head / all.heads) * all.heads + head % all.heads) * N),
        stride(all.heads * N) {}

  // This thread's quad of the tile that starts at token t0.
  __device__ __forceinline__ int64_t offset(int t0) const { return base + (t0 + step) * stride + 4 * quad; }

  // Starts the loads of that quad of every tensor, each a Prefetch.
  template <typename... Tensors>
  __device__ __forceinline__ void fetch(int t0, Tensors&... tensors) const {
    const int64_t from = offset(t0);
    const bool inside = t0 + step < tokens;
    (tensors.fetch(from, inside), ...);
  }
};

// A matrix for every segment and head: [segments of all sequences, H, N, N]. Here, those of one place.
template <int N>
struct SegmentStates {
  int64_t first, stride;

  __device__ __forceinline__ SegmentStates(const Sequences& all, const Place<N>& place)
      : first((all.first_segment(place.head / all.heads) * all.heads + place.head % all.heads) * N * N),
        stride(all.heads * N * N) {}

  // Of the segment that holds token t0 of the sequence.
  __device__ __forceinline__ int64_t offset(int t0) const { return first + t0 / kSegment * stride; }
};

// One tensor on its way in: fetch() starts the global load early, commit() puts it into shared memory later.
template <typename T>
struct Prefetch {
  const T* source;
  Quad<T> held;

  __device__ __forceinline__ explicit Prefetch(const T* pointer) : source(pointer), held{} {}
  __device__ __forceinline__ void fetch(int64_t offset, bool inside) {
    held = inside ? *reinterpret_cast<const Quad<T>*>(source + offset) : Quad<T>{};
  }
  template <int M, int N>
  __device__ __forceinline__ void commit(Tile<M>& tile, const Place<N>& place) const {
    commit(tile, place, [](float x) { return x; });
  }
  // f(x) in place of each number x
  template <int M, int N, typename F>
  __device__ __forceinline__ void commit(Tile<M>& tile, const Place<N>& place, F f) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) tile.quad(place.step, place.quad).value[e] = f(to_float(held.value[e]));
  }
};

template <typename T, int M, int N>
__device__ __forceinline__ void store(T* target, const Tile<M>& tile, const Place<N>& place, int64_t offset) {
  Quad<T> out;
#pragma unroll
  for (int e = 0; e < 4; ++e) assign(out.value[e], tile.quad(place.step, place.quad).value[e]);
  *reinterpret_cast<Quad<T>*>(target + offset) = out;
}

// One number for each of this thread's lines.
template <int N>
struct PerLine {
  float value[Layout<N>::kLines];

  __device__ __forceinline__ float& operator[](int l) { return value[l]; }
  __device__ __forceinline__ float operator[](int l) const { return value[l]; }
};

template <int N>
__device__ __forceinline__ PerLine<N> read(const Tile<N>& tile, const Place<N>& place, int step) {
  PerLine<N> out;
#pragma unroll
  for (int l = 0; l < Layout<N>::kLines; ++l) out[l] = tile.at(step, place.line + l);
  return out;
}

template <int N>
__device__ __forceinline__ void write(Tile<N>& tile, const Place<N>& place, int step, const PerLine<N>& x) {
  if (place.lane == 0) {
#pragma unroll
    for (int l = 0; l < Layout<N>::kLines; ++l) tile.at(step, place.line + l) = x[l];
  }
}

// This thread's part of the state. Vectors come from tiles and run along the lines.
template <int N>
struct Lines {
  static constexpr int kLines = Layout<N>::kLines;
  static constexpr int kLanes = Layout<N>::kLanes;
  static constexpr int kQuads = Layout<N>::kQuads;
  float value[kLines][kQuads][4];
  int lane, line;

  // Zeros.
  __device__ __forceinline__ explicit Lines(const Place<N>& place) : value{}, lane(place.lane), line(place.line) {}

  // The place's state out of those of all sequences [count, H, N, N], as load() takes it; zeros if null.
  __device__ __forceinline__ Lines(const Place<N>& place, const float* states, bool transposed) : Lines(place) {
    if (states) load(states + place.head * N * N, transposed);
  }

  // f(element, l, q, e): element e of quad q of line l.
  template <typename F>
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
#pragma unroll
      for (int l = 0; l < kLines; ++l)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(value[l][q][e], l, q, e);
  }
  __device__ __forceinline__ int index(int q) const { return q * kLanes + lane; }  // of quad q within the whole line

  // matrix: fp32 [N, N]. Element i of line l is matrix[l, i], or matrix[i, l] if `transposed`.
  __device__ __forceinline__ void load(const float* matrix, bool transposed) {
    each([&](float& s, int l, int q, int e) {
      const int i = 4 * index(q) + e;
      s = transposed ? matrix[i * N + line + l] : matrix[(line + l) * N + i];
    });
  }
  __device__ __forceinline__ void save(float* matrix) {
    each([&](float& s, int l, int q, int e) { matrix[(line + l) * N + 4 * index(q) + e] = s; });
  }

  // lines *= vector, element by element
  __device__ __forceinline__ void scale(const Tile<N>& vector, int step) {
    each([&](float& s, int, int q, int e) { s *= vector.quad(step, index(q)).value[e]; });
  }
  // line l *= x[l]
  __device__ __forceinline__ void scale(const PerLine<N>& x) {
    each([&](float& s, int l, int, int) { s *= x[l]; });
  }
  // lines += lines * vector, element by element
  __device__ __forceinline__ void grow(const Tile<N>& vector, int step) {
    each([&](float& s, int, int q, int e) { s += s * vector.quad(step, index(q)).value[e]; });
  }
  // line l += line l * x[l]
  __device__ __forceinline__ void grow(const PerLine<N>& x) {
    each([&](float& s, int l, int, int) { s += s * x[l]; });
  }
  // line l += x[l] * vector
  __device__ __forceinline__ void add(const PerLine<N>& x, const Tile<N>& vector, int step) {
    each([&](float& s, int l, int q, int e) { s += x[l] * vector.quad(step, index(q)).value[e]; });
  }
  // sum over each line of line * f(l, q, e); every lane gets the result
  template <typename F>
  __device__ __forceinline__ PerLine<N> sum(F f) {
    float part[kLines][4] = {};
    each([&](float& s, int l, int q, int e) { part[l][e] += s * f(l, q, e); });
    PerLine<N> total;
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      total[l] = (part[l][0] + part[l][1]) + (part[l][2] + part[l][3]);
#pragma unroll
      for (int other = 8; other < 8 * kLanes; other *= 2)
        total[l] += __shfl_xor_sync(Layout<N>::kWarpMask, total[l], other);
    }
    return total;
  }
  __device__ __forceinline__ PerLine<N> dot(const Tile<N>& vector, int step) {
    return sum([&](int, int q, int e) { return vector.quad(step, index(q)).value[e]; });
  }
  // matrix as in load(), not transposed
  __device__ __forceinline__ PerLine<N> dot(const float* matrix) {
    return sum([&](int l, int q, int e) { return matrix[(line + l) * N + 4 * index(q) + e]; });
  }
};

}  // namespace wkv

// A kernel `symbol`, by whose plain name it is found after compilation: `body` on one struct of arguments, by value.
// Every member of such a struct is 8 bytes wide; src/rwkv_bone/ops/launches.py packs them.
#define WKV_KERNEL(symbol, body, Arguments, N)                                                                \
  WKV_BYTES(symbol, Arguments)                                                                                \
  extern "C" __global__ void __launch_bounds__(wkv::Layout<N>::kThreads, 1) symbol(Arguments arguments) {     \
    body(arguments);                                                                                          \
  }
