// Cross-entropy of rows of logits on the processor, whose gradient takes the place of the logits: the C++ twin of
// cuda/cross_entropy.cuh behind a C interface. Logits are float or bfloat16, arithmetic is float. Each row is worked on
// by one thread alone, so the number of threads changes nothing. The mathematics is in cross_entropy_rows.h.

#include <cmath>
#include <cstdint>
#include <cstdlib>

#include <omp.h>

namespace {

constexpr int64_t SUMMED = 1024;  // terms of a sum in float
constexpr int64_t WIDEST = 16;    // lanes of the widest vectors

struct Rows {
    int dtype;
    int64_t R, V;
    void* logits;            // [R, V]
    const int64_t* targets;  // [R]
    float l2wrap;
    bool gradient;  // whether it is wanted; else the logits stay as they are
    float* losses;  // [R]
};

int64_t padded(int64_t V) { return (V + WIDEST - 1) / WIDEST * WIDEST; }

}  // namespace

#define KERNEL_HEADER "cross_entropy_rows.h"
#include "levels.h"

namespace {

enum { OK = 0, BAD_SHAPE = 1, BAD_TYPE = 2, OUT_OF_MEMORY = 3, BAD_TARGET = 4 };

int check(const Rows& p) {
    if (p.R < 0 || p.V < 1) return BAD_SHAPE;
    if (p.dtype != FLOAT32 && p.dtype != BFLOAT16) return BAD_TYPE;
    for (int64_t row = 0; row < p.R; row++)
        if (p.targets[row] < 0 || p.targets[row] >= p.V) return BAD_TARGET;
    return OK;
}

auto row_function() {
#if defined(__x86_64__)
    if (chosen_level == AVX512) return avx512::one_row;
    if (chosen_level == AVX2) return avx2::one_row;
#endif
    return portable::one_row;
}

}  // namespace

extern "C" {

// Returns 0, or what cross_entropy_error puts into words. threads 0: OpenMP's default.
int cross_entropy_rows(int dtype, int64_t R, int64_t V, void* logits, const int64_t* targets, float l2wrap,
                       int gradient, float* losses, int threads) {
    const Rows p = {dtype, R, V, logits, targets, l2wrap, gradient != 0, losses};
    if (int code = check(p)) return code;
    if (!R) return OK;
    if (threads < 1) threads = omp_get_max_threads();
    if (threads > R) threads = int(R);
    float* lines = static_cast<float*>(aligned_alloc(64, threads * padded(V) * sizeof(float)));
    if (!lines) return OUT_OF_MEMORY;
    const auto one_row = row_function();
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < R; row++) one_row(p, row, lines + omp_get_thread_num() * padded(V));
    free(lines);
    return OK;
}

const char* cross_entropy_error(int code) {
    switch (code) {
        case OK: return "success";
        case BAD_SHAPE: return "the vocabulary must have at least one token";
        case BAD_TYPE: return "only float32 and bfloat16 are supported";
        case OUT_OF_MEMORY: return "out of memory";
        case BAD_TARGET: return "a label is no token of the vocabulary";
        default: return "unknown error";
    }
}
}
