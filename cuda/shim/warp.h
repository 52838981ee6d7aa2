// What warp.cuh needs of the hardware, simulated: products of tensor cores, matrix loads, asynchronous copies. Where
// warp.cuh has one instruction of a warp, this has one operation of all its fibers (by_the_warp), so that the layout of
// fragments over lanes is taken from the same tables as on a card (PTX ISA, "Matrix fragments for mma.m16n8k16" and
// "ldmatrix"). Included by warp.cuh only.
#pragma once

#define WKV_DYNAMIC_SHARED(type, name) type& name = shim::dynamic_shared<type>()
#define WKV_READS(pointer, bytes) shim::reads(pointer, bytes)
#define WKV_WRITES(pointer, bytes) shim::writes(pointer, bytes)
#define WKV_MOVES_IN(bytes) (shim::machine.bytes_in += int64_t(bytes))
#define WKV_MOVES_OUT(bytes) (shim::machine.bytes_out += int64_t(bytes))

namespace wkv {

struct FloatPair {
  float first, second;
};
template <typename E>
struct PairOf;
template <>
struct PairOf<BFloat16> {
  using type = uint32_t;
};
template <>
struct PairOf<float> {
  using type = FloatPair;
};
template <typename E>
using Pair = typename PairOf<E>::type;

// float32 operands: no card has them. Everything but rounding is as with Bf16.
struct Exact32 {
  using Element = float;
  static constexpr int kPlanes = 1;
};

inline uint32_t pair_of(BFloat16, float first, float second) {
  BFloat16 low, high;
  assign(low, first), assign(high, second);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}
inline FloatPair pair_of(float, float first, float second) { return {first, second}; }
inline BFloat16 element_of(uint32_t);
inline float element_of(FloatPair);
inline float first(uint32_t pair) { return __uint_as_float(pair << 16); }
inline float second(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float first(FloatPair pair) { return pair.first; }
inline float second(FloatPair pair) { return pair.second; }

inline void keep_apart() {}
inline float power_of_two(float x) { return exp2f(x); }
inline float divide(float a, float b) { return a / b; }

// The product of an m16n8k16 instruction for each half of y's rows; registers hold the elements as PTX says.
template <typename P>
void multiply_pairs(float (&c)[8], const P (&x)[4], const P (&y)[4]) {
  struct Operands {
    P a[4], b[2];
  };
  for (int half = 0; half < 2; ++half) {
    struct Result {
      float d[4];
    };
    const Operands mine{{x[0], x[1], x[2], x[3]}, {y[half], y[half + 2]}};
    const Result product = shim::by_the_warp<Result>("mma", mine, [](const Operands* lanes, Result* results) {
      float A[16][16], B[8][16];  // B by columns
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) {
          A[g + i % 2 * 8][t + i / 2 * 8] = first(lanes[lane].a[i]);
          A[g + i % 2 * 8][t + i / 2 * 8 + 1] = second(lanes[lane].a[i]);
        }
        for (int i = 0; i < 2; ++i) {
          B[g][t + i * 8] = first(lanes[lane].b[i]);
          B[g][t + i * 8 + 1] = second(lanes[lane].b[i]);
        }
      }
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i) {
          const float *row = A[lane / 4 + i / 2 * 8], *column = B[lane % 4 * 2 + i % 2];
          float sum = 0.0f;
          for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
          results[lane].d[i] = sum;
        }
    });
    for (int i = 0; i < 4; ++i) c[4 * half + i] += product.d[i];
  }
}

template <bool transposed, typename P, typename E>
void load_matrices(P (&out)[4], const E* row) {
  struct Taken {
    P pair[4];
  };
  shim::reads(row, 8 * sizeof(E));
  const Taken taken = shim::by_the_warp<Taken>("ldmatrix", row, [](const E* const* rows, Taken* results) {
    for (int lane = 0; lane < 32; ++lane)
      for (int q = 0; q < 4; ++q) {
        const int g = lane / 4, t = lane % 4 * 2;
        E two[2];
        for (int e = 0; e < 2; ++e)
          two[e] = transposed ? rows[8 * q + t + e][g] : rows[8 * q + g][t + e];
        std::memcpy(&results[lane].pair[q], two, sizeof two);
      }
  });
  for (int q = 0; q < 4; ++q) out[q] = taken.pair[q];
}

template <typename P>
P transpose_matrix(P matrix) {
  return shim::by_the_warp<P>("movmatrix", matrix, [](const P* lanes, P* results) {
    const auto element = [&](int row, int column) {
      const P& pair = lanes[4 * row + column / 2];
      return column % 2 ? second(pair) : first(pair);
    };
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      results[lane] = pair_of(decltype(element_of(P{})){}, element(column, row), element(column + 1, row));
    }
  });
}

// A copy happens as late as it may, when it is waited for; until then its place holds NaN.
struct Copy {
  void* to;
  const void* from;
  bool inside;
};
struct Copies {
  static constexpr int kMost = 1024;
  unsigned block = 0;  // that they belong to
  Copy copy[kMost];
  int group[kMost];  // number of the group that a copy belongs to
  int count = 0, groups = 0;
};
inline Copies& copies() {
  static Copies all[shim::kMaxThreads];
  Copies& mine = all[shim::machine.current];
  if (mine.block != shim::machine.blocks_begun) mine.block = shim::machine.blocks_begun, mine.count = mine.groups = 0;
  return mine;
}
inline void copy_async(void* shared, const void* global, bool inside) {
  Copies& mine = copies();
  shim::require(mine.count < Copies::kMost, "too many copies under way");
  shim::require(uintptr_t(global) % 16 == 0 && uintptr_t(shared) % 16 == 0, "a copy of 16 bytes is not aligned");
  shim::writes(shared, 16);
  std::memset(shared, 0xff, 16);
  if (inside) shim::machine.bytes_in += 16;
  mine.copy[mine.count] = {shared, global, inside};
  mine.group[mine.count++] = mine.groups;
}
inline void commit_async() { ++copies().groups; }
template <int groups>
void wait_async() {
  Copies& mine = copies();
  int kept = 0;
  for (int i = 0; i < mine.count; ++i) {
    if (mine.group[i] >= mine.groups - groups) {
      mine.copy[kept] = mine.copy[i], mine.group[kept++] = mine.group[i];
      continue;
    }
    const Copy& copy = mine.copy[i];
    shim::writes(copy.to, 16);
    if (copy.inside)
      std::memcpy(copy.to, copy.from, 16);
    else
      std::memset(copy.to, 0, 16);
  }
  mine.count = kept;
}

template <typename X>
X from_lane_xor(X x, int other) {
  return __shfl_xor_sync(0xffffffffu, x, other);
}
template <typename X>
X from_lane(X x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

}  // namespace wkv
