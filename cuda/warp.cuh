// What the threads of a warp do together: products of 16 x 16 blocks on tensor cores, and how blocks move between
// registers, shared memory and global memory. This is all of the hardware that the chunked kernels know, in two forms:
// PTX below, and a simulation in shim/warp.h, so that the kernels themselves are tested without a GPU.
//
// A *block* is a 16 x 16 piece of an operand in the registers of a warp. The one product is
//     multiply(C, X, Y):  C += X Y^T
// since then both operands hold their blocks in the same way: lane 4 g + c has the elements (g, 2c), (g, 2c + 1) of
// each quarter, a pair per register; quarters in the order (top left), (bottom left), (top right), (bottom right).
// An accumulator has its 8 numbers in that order, too, so it becomes an operand without a move (block_of), both as X
// and, being Y^T's transpose, as Y. A block of the transposed matrix comes out of shared memory in the same time.
//
// A *format* says what an operand's numbers are. Accumulators are float32 always.
//     Bf16     bfloat16
//     Bf16x3   a number as the sum of two bfloat16, high and low: three products, without low x low; 16 bits
//     Exact32  float32, in the simulation only: to tell a wrong index from rounding
#pragma once

#include "common.cuh"

namespace wkv {

// ------------------------------------------------------------------------------------------------ the hardware
#ifdef WKV_HOST_SHIM
}  // namespace wkv
#include "shim/warp.h"
namespace wkv {
#else
#define WKV_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(128) unsigned char wkv_dynamic[]; \
  type& name = *reinterpret_cast<type*>(wkv_dynamic)
#define WKV_READS(pointer, bytes)   // shared memory, for the simulation to watch
#define WKV_WRITES(pointer, bytes)
#define WKV_MOVES_IN(bytes)   // from global memory, for the simulation to count
#define WKV_MOVES_OUT(bytes)

// Two neighbours in a row of an operand, the first in the low half.
template <typename E>
struct PairOf;
template <>
struct PairOf<BFloat16> {
  using type = uint32_t;
};
template <typename E>
using Pair = typename PairOf<E>::type;

__device__ __forceinline__ uint32_t pair_of(BFloat16, float first, float second) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}
__device__ __forceinline__ float first(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float second(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// c += x y^T for 16 x 16 blocks: two products of the hardware's size.
__device__ __forceinline__ void multiply_pairs(float (&c)[8], const uint32_t (&x)[4], const uint32_t (&y)[4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float* d = c + 4 * half;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[half]), "r"(y[half + 2]));
  }
}

// Four 8 x 8 matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
template <bool transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const BFloat16* row) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// An 8 x 8 matrix that a warp holds, transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(matrix));
  return out;
}

// 16 bytes from global to shared memory, zeros if not `inside`; there after wait_async and a barrier.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's groups but the last `groups` have arrived.
template <int groups>
__device__ __forceinline__ void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// 2^x and a / b, an instruction or two each: off by at most 2^-22 of the result. Numbers below 2^-126 count as 0, and
// a / b is 0 where |b| is above 2^126.
__device__ __forceinline__ float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ __forceinline__ float divide(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}

// The data do not need it: it keeps the compiler from moving later loads ahead of it, for which there are no registers.
__device__ __forceinline__ void keep_apart() { __syncwarp(); }

template <typename X>
__device__ __forceinline__ X from_lane_xor(X x, int other) {
  return __shfl_xor_sync(0xffffffffu, x, other);
}
template <typename X>
__device__ __forceinline__ X from_lane(X x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}
#endif

// ------------------------------------------------------------------------------------------------ blocks
struct Bf16 {
  using Element = BFloat16;
  static constexpr int kPlanes = 1;
};
struct Bf16x3 {
  using Element = BFloat16;
  static constexpr int kPlanes = 2;
};

// Unsigned, as is all arithmetic on places below: a signed division by a power of two takes four instructions.
__device__ __forceinline__ int lane_id() { return int(threadIdx.x % 32u); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x / 32u); }
// Of this lane's elements in a quarter: the row, and the first of the two columns.
__device__ __forceinline__ int lane_row() { return int(threadIdx.x % 32u / 4u); }
__device__ __forceinline__ int lane_column() { return int(threadIdx.x % 4u * 2u); }

// A 16 x 16 accumulator.
struct Sum {
  float value[8] = {};

  // f(number, row, column) for each of this lane's numbers, by their place in the block
  template <typename F>
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (int q = 0; q < 4; ++q)
#pragma unroll
      for (int e = 0; e < 2; ++e) f(value[2 * q + e], lane_row() + q % 2 * 8, lane_column() + e + q / 2 * 8);
  }
};

template <typename F>
struct Block {
  Pair<typename F::Element> pair[F::kPlanes][4];

  // The number at the place of a Sum's value[i].
  __device__ __forceinline__ float operator[](int i) const {
    const auto part = [&](int plane) { return i % 2 ? second(pair[plane][i / 2]) : first(pair[plane][i / 2]); };
    return F::kPlanes == 1 ? part(0) : part(0) + part(F::kPlanes - 1);
  }
};

// Two neighbours in format F: plane p is what the planes before it left over.
template <typename F>
__device__ __forceinline__ void split(Pair<typename F::Element> (&out)[F::kPlanes], float x, float y) {
#pragma unroll
  for (int plane = 0; plane < F::kPlanes; ++plane) {
    out[plane] = pair_of(typename F::Element{}, x, y);
    x -= first(out[plane]), y -= second(out[plane]);
  }
}

template <typename F>
__device__ __forceinline__ Block<F> block_of(const Sum& sum) {
  Block<F> block;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    Pair<typename F::Element> pairs[F::kPlanes];
    split<F>(pairs, sum.value[2 * q], sum.value[2 * q + 1]);
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane) block.pair[plane][q] = pairs[plane];
  }
  return block;
}

template <typename F>
__device__ __forceinline__ Sum sum_of(const Block<F>& block) {
  Sum sum;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.value[i] = block[i];
  return sum;
}

template <typename F>
__device__ __forceinline__ Block<F> transposed(const Block<F>& block) {
  Block<F> out;
#pragma unroll
  for (int plane = 0; plane < F::kPlanes; ++plane)
#pragma unroll
    for (int q = 0; q < 4; ++q) out.pair[plane][q % 2 * 2 + q / 2] = transpose_matrix(block.pair[plane][q]);
  return out;
}

// sum += x y^T
template <typename F>
__device__ __forceinline__ void multiply(Sum& sum, const Block<F>& x, const Block<F>& y) {
  if constexpr (F::kPlanes == 2) {
    multiply_pairs(sum.value, x.pair[1], y.pair[0]);
    multiply_pairs(sum.value, x.pair[0], y.pair[1]);
  }
  multiply_pairs(sum.value, x.pair[0], y.pair[0]);
}

template <typename T>
struct alignas(16) Octet {  // eight neighbours
  T value[8];
};

template <typename T>
__device__ __forceinline__ Octet<T> load_octet(const T* from, bool inside) {
  if (!inside) return Octet<T>{};
  WKV_MOVES_IN(sizeof(Octet<T>));
  return *reinterpret_cast<const Octet<T>*>(from);
}

// Eight neighbours in format F to a hand-over whose planes have `plane_elements` each.
template <typename F>
__device__ __forceinline__ void store_octet(
    typename F::Element* to, int64_t plane_elements, const float (&x)[8]) {
  struct alignas(16) Row {
    Pair<typename F::Element> pair[4];
  };
  Pair<typename F::Element> pairs[4][F::kPlanes];
#pragma unroll
  for (int p = 0; p < 4; ++p) split<F>(pairs[p], x[2 * p], x[2 * p + 1]);
#pragma unroll
  for (int plane = 0; plane < F::kPlanes; ++plane) {
    WKV_MOVES_OUT(sizeof(Row));
    *reinterpret_cast<Row*>(to + plane * plane_elements) =
        Row{{pairs[0][plane], pairs[1][plane], pairs[2][plane], pairs[3][plane]}};
  }
}

// ------------------------------------------------------------------------------------------------ operands
// How an R x C operand lies in memory: 8 x 8 matrices one after another, row of matrices by row. In shared memory there
// are eight elements (a row of a matrix, 16 bytes of bfloat16) more from one to the next, so that neither reading a
// matrix nor writing a row of the operand meets a bank twice; in global memory nothing is between them.
template <int R, int C>
struct Arrangement {
  static_assert(R % 16 == 0 && C % 16 == 0, "made of blocks");
  static constexpr int kElements = R * C, kShared = R * C / 64 * 72;

  __device__ static __forceinline__ int in_shared(unsigned row, unsigned column) { return of<72>(row, column); }
  // Of the block at (row, column) the element (y, x). What belongs to the block and what belongs to the lane are added,
  // so that the first is a constant of the instruction wherever it is known.
  __device__ static __forceinline__ int in_shared(int row, int column, unsigned y, unsigned x) {
    return block<72>(row, column) + of<72>(y, x);
  }
  __device__ static __forceinline__ int in_global(int row, int column, unsigned y, unsigned x) {
    return block<64>(row, column) + of<64>(y, x);
  }
  // Where the element at a place in global memory is in shared memory, its row and its column.
  __device__ static __forceinline__ int shared_place(unsigned place) { return int(place + place / 64 * 8); }
  __device__ static __forceinline__ int row(unsigned place) { return int(place / 64 / (C / 8) * 8 + place / 8 % 8); }
  __device__ static __forceinline__ int column(unsigned place) { return int(place / 64 % (C / 8) * 8 + place % 8); }

 private:
  template <int kMatrix>
  __device__ static __forceinline__ int of(unsigned row, unsigned column) {
    WKV_ASSERT(row < R && column < C);
    return int((row / 8 * (C / 8) + column / 8) * kMatrix + row % 8 * 8 + column % 8);
  }
  // Both are multiples of 16, so nothing is divided.
  template <int kMatrix>
  __device__ static __forceinline__ int block(int row, int column) {
    WKV_ASSERT(row >= 0 && row % 16 == 0 && row < R && column >= 0 && column % 16 == 0 && column < C);
    return (row * (C / 8) + column) * (kMatrix / 8);
  }
};

// An R x C matrix in shared memory, to be read by blocks. What one kernel leaves for another is the same bytes in
// global memory, a *hand-over*.
template <typename F, int R, int C>
struct alignas(128) Operand {
  using Element = typename F::Element;
  using Place = Arrangement<R, C>;
  static constexpr int kElements = R * C;             // of a plane of a hand-over
  static constexpr int kEach = 16 / sizeof(Element);  // in 16 bytes
  Element value[F::kPlanes][Place::kShared];

  // Rows row.. and columns column.. of the matrix.
  __device__ __forceinline__ Block<F> block(int row, int column) const {
    return load<false>(Place::in_shared(row, column, threadIdx.x % 16u, threadIdx.x % 32u / 16u * 8u));
  }
  // Element (x, y) of the block is that at (row + y, column + x) of the matrix.
  __device__ __forceinline__ Block<F> transposed(int row, int column) const {
    const unsigned lane = threadIdx.x % 32u;
    return load<true>(Place::in_shared(row, column, lane % 8u + lane / 16u * 8u, lane / 8u % 2u * 8u));
  }

  __device__ __forceinline__ void put(int row, int column, const Block<F>& block) {
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        Pair<Element>* to = reinterpret_cast<Pair<Element>*>(
            value[plane] + Place::in_shared(row, column, q % 2 * 8 + lane_row(), q / 2 * 8 + lane_column()));
        WKV_WRITES(to, sizeof *to);
        *to = block.pair[plane][q];
      }
  }

  // Eight neighbours in a row.
  __device__ __forceinline__ void put(int row, int column, const float (&x)[8]) {
    put(Place::in_shared(row, column), x);
  }
  __device__ __forceinline__ void put(int place, const float (&x)[8]) {
    Pair<Element> pairs[4][F::kPlanes];
#pragma unroll
    for (int p = 0; p < 4; ++p) split<F>(pairs[p], x[2 * p], x[2 * p + 1]);
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane) {
      struct alignas(16) Row {
        Pair<Element> pair[4];
      };
      WKV_WRITES(value[plane] + place, sizeof(Row));
      *reinterpret_cast<Row*>(value[plane] + place) =
          Row{{pairs[0][plane], pairs[1][plane], pairs[2][plane], pairs[3][plane]}};
    }
  }

  // One element.
  __device__ __forceinline__ void put_one(int row, int column, float x) {
    Pair<Element> pairs[F::kPlanes];
    split<F>(pairs, x, 0.0f);
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane) {
      Element* to = value[plane] + Place::in_shared(row, column);
      WKV_WRITES(to, sizeof *to);
      assign(*to, first(pairs[plane]));
    }
  }
  // Eight neighbours in a row of a tensor on their way in, zeros if not `inside`.
  template <typename T>
  __device__ __forceinline__ void fetch_octet(int row, int column, const T* from, bool inside) {
    if constexpr (F::kPlanes == 1 && sizeof(T) == sizeof(Element)) {
#pragma unroll
      for (int i = 0; i < 8; i += kEach) copy_async(value[0] + Place::in_shared(row, column) + i, from + i, inside);
    } else {  // into another format, so through registers
      const Octet<T> in = load_octet(from, inside);
      float x[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = to_float(in.value[e]);
      put(row, column, x);
    }
  }
  // A hand-over whose columns are scaled on the way.
  __device__ __forceinline__ void fill_scaled(const Element* from, const float (&factor)[C], int threads) {
    for (int place = int(threadIdx.x) * 8; place < kElements; place += threads * 8) {
      float x[8];
#pragma unroll
      for (int plane = F::kPlanes - 1; plane >= 0; --plane) {
        const Octet<Element> in = load_octet(from + plane * kElements + place, true);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = to_float(in.value[e]) + (plane < F::kPlanes - 1 ? x[e] : 0.0f);
      }
      WKV_READS(factor + Place::column(place), sizeof x);
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] *= factor[Place::column(place) + e];
      put(Place::shared_place(place), x);
    }
  }
  // Of a hand-over at `from`, the rows first.. up to end.. (multiples of 8) on their way in, by `threads` threads.
  __device__ __forceinline__ void fetch(const Element* from, int first, int end, int threads) {
    const int begin = first * C / kEach, count = (end - first) * C / kEach;
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane)
      for (int i = int(threadIdx.x); i < count; i += threads) {
        const int place = (begin + i) * kEach;
        copy_async(value[plane] + Place::shared_place(place), from + plane * kElements + place, true);
      }
  }
  // All of it to a hand-over.
  __device__ __forceinline__ void hand_over(Element* to, int threads) const {
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane)
      for (int place = int(threadIdx.x) * kEach; place < kElements; place += threads * kEach) {
        const Element* from = value[plane] + Place::shared_place(place);
        WKV_READS(from, 16);
        WKV_MOVES_OUT(16);
        *reinterpret_cast<uint4*>(to + plane * kElements + place) = *reinterpret_cast<const uint4*>(from);
      }
  }
  // A block of a hand-over, straight from registers: 128 bytes at a time.
  __device__ static __forceinline__ void hand_over(Element* to, int row, int column, const Block<F>& block) {
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        WKV_MOVES_OUT(sizeof(Pair<Element>));
        const int place = Place::in_global(row, column, q % 2 * 8 + lane_row(), q / 2 * 8 + lane_column());
        *reinterpret_cast<Pair<Element>*>(to + plane * kElements + place) = block.pair[plane][q];
      }
  }

 private:
  template <bool trans>
  __device__ __forceinline__ Block<F> load(int place) const {
    Block<F> block;
#pragma unroll
    for (int plane = 0; plane < F::kPlanes; ++plane)
      load_matrices<trans>(block.pair[plane], value[plane] + place);
    return block;
  }
};

// ------------------------------------------------------------------------------------------------ rows in global memory
// Four lanes that share a row of a block have four registers each: lane c's register i and lane i's register c change
// places.
__device__ __forceinline__ void transpose_four_lanes(uint32_t (&x)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool high = lane_id() & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t got = from_lane_xor(high ? x[i] : x[i + step], step);
      x[i] = high ? got : x[i];
      x[i + step] = high ? x[i + step] : got;
    }
  }
}

struct alignas(8) TwoFloats {
  float value[2];
};

// A block of rows of a [tokens, .., N] tensor: row i at at + i * stride, `rows` of them exist.
__device__ __forceinline__ void store_rows(BFloat16* at, int64_t stride, int rows, const Sum& sum) {
  uint32_t x[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) x[q] = pair_of(BFloat16{}, sum.value[2 * q], sum.value[2 * q + 1]);
  transpose_four_lanes(x);
  const int quarter = int(threadIdx.x % 4u), row = lane_row() + (quarter & 1) * 8;
  if (row >= rows) return;
  WKV_MOVES_OUT(16);
  *reinterpret_cast<uint4*>(at + row * stride + (quarter & 2) * 4) = make_uint4(x[0], x[1], x[2], x[3]);
}
__device__ __forceinline__ void store_rows(float* at, int64_t stride, int rows, const Sum& sum) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int row = lane_row() + q % 2 * 8;
    if (row >= rows) continue;
    WKV_MOVES_OUT(8);
    *reinterpret_cast<TwoFloats*>(at + row * stride + lane_column() + q / 2 * 8) =
        TwoFloats{{sum.value[2 * q], sum.value[2 * q + 1]}};
  }
}

__device__ __forceinline__ Sum load_rows(const BFloat16* at, int64_t stride, int rows) {
  const int quarter = int(threadIdx.x % 4u), row = lane_row() + (quarter & 1) * 8;
  uint32_t got[4] = {};
  if (row < rows) {
    WKV_MOVES_IN(16);
    const uint4 all = *reinterpret_cast<const uint4*>(at + row * stride + (quarter & 2) * 4);
    got[0] = all.x, got[1] = all.y, got[2] = all.z, got[3] = all.w;
  }
  transpose_four_lanes(got);
  Sum sum;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    sum.value[2 * q] = __uint_as_float(got[q] << 16);
    sum.value[2 * q + 1] = __uint_as_float(got[q] & 0xffff0000u);
  }
  return sum;
}
__device__ __forceinline__ Sum load_rows(const float* at, int64_t stride, int rows) {
  Sum sum;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const int row = lane_row() + q % 2 * 8;
    if (row >= rows) continue;
    WKV_MOVES_IN(8);
    const TwoFloats got = *reinterpret_cast<const TwoFloats*>(at + row * stride + lane_column() + q / 2 * 8);
    sum.value[2 * q] = got.value[0], sum.value[2 * q + 1] = got.value[1];
  }
  return sum;
}

}  // namespace wkv
