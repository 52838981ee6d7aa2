// Weights to 8 or 4 bits and back, on the processor: the formats, and every bit, are those of
// src/rwkv_bone/quantization.py, which gives the tables of the 4-bit kinds. No bit depends on the number of threads.

#include <cstdint>
#include <cstring>

namespace {

constexpr int FLOAT16 = 2;                // beside the two of levels.h, for weights to be quantised
constexpr int64_t BLOCK = 64;             // values that share a scale in 4 bits
constexpr int64_t PIECE = 1024;           // values of a row worked on at once
constexpr int64_t WORK = 1 << 16;         // values that a thread takes at once
constexpr float SMALLEST = 1e-38f;        // lower bounds of what is divided by, in 4 bits
constexpr float SMALLEST_ROW = 1e-30f;    // and in 8

struct Quantize {
    int dtype;
    int64_t columns, values;
    const void* weight;
    const float* bounds;   // [15], between the table's values in order
    const uint8_t* order;  // [16], their codes
    void* codes;
    float* scales;
};

struct Dequantize {
    int dtype;
    int64_t columns, values;
    const void* codes;
    const float* scales;
    const float* table;  // [16]
    const float* pairs;  // [256][2]: the values of both codes in a byte
    void* out;
};

}  // namespace

#define KERNEL_HEADER "quantize_blocks.h"
#include "levels.h"

namespace {

enum { OK = 0, BAD_SHAPE = 1, BAD_TYPE = 2 };

// Runs some(p, first, last) over all units of `width` values.
template <class Problem>
void for_all(const Problem& p, int64_t units, int64_t width, int threads, void (*some)(const Problem&, int64_t, int64_t)) {
    const int64_t step = width < WORK ? WORK / width : 1, parts = (units + step - 1) / step;
    if (threads > parts) threads = int(parts);
    if (threads < 1) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < parts; i++) some(p, i * step, (i + 1) * step < units ? (i + 1) * step : units);
}

}  // namespace

extern "C" {

// weight [rows, columns]. bounds and order null: 8 bits, codes int8 [rows, columns], scales [rows]. Otherwise 4 bits,
// codes uint8 [values / 2] and scales [values / 64], both rounded up.
int quantize_weight(int dtype, int64_t rows, int64_t columns, const void* weight, const float* bounds,
                    const uint8_t* order, void* codes, float* scales, int threads) {
    if (rows < 1 || columns < 1) return BAD_SHAPE;
    if (dtype != FLOAT32 && dtype != BFLOAT16 && dtype != FLOAT16) return BAD_TYPE;
    const Quantize p = {dtype, columns, rows * columns, weight, bounds, order, codes, scales};
    if (bounds)
        for_all(p, (p.values + BLOCK - 1) / BLOCK, BLOCK, threads, AT_LEVEL(quantize_blocks, BLOCK));
    else
        for_all(p, rows, columns, threads, AT_LEVEL(quantize_rows, BLOCK));
    return OK;
}

// The reverse, to float32 or bfloat16. table null: 8 bits.
int quantize_inverse(int dtype, int64_t rows, int64_t columns, const void* codes, const float* scales,
                     const float* table, void* out, int threads) {
    if (rows < 1 || columns < 1) return BAD_SHAPE;
    if (dtype != FLOAT32 && dtype != BFLOAT16) return BAD_TYPE;
    float pairs[512];
    for (int i = 0; table && i < 256; i++) pairs[2 * i] = table[i >> 4], pairs[2 * i + 1] = table[i & 15];
    const Dequantize p = {dtype, columns, rows * columns, codes, scales, table, pairs, out};
    if (table)
        for_all(p, (p.values + BLOCK - 1) / BLOCK, BLOCK, threads, AT_LEVEL(dequantize_blocks, BLOCK));
    else
        for_all(p, rows, columns, threads, AT_LEVEL(dequantize_rows, BLOCK));
    return OK;
}

const char* quantize_error(int code) {
    return code == OK ? "success" : code == BAD_SHAPE ? "every size must be at least 1" : "no kernel for this dtype";
}
}
