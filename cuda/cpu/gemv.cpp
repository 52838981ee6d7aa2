// A matrix times a vector on the processor, y = W x, as generation needs it for each token of one sequence. It takes as
// long as reading W takes; the general products of PyTorch's libraries need two to three times as long for one row.
// W [m, n], contiguous, x [n] and y [m] are all float or all bfloat16, sums are float. The rows of W are shared out among
// the threads, each made by one alone, so the number of threads changes nothing. The mathematics is in gemv_row.h.

#include <cstdint>
#include <cstdlib>

#include <omp.h>

namespace {

constexpr int64_t BLOCK = 16;          // rows of a thread at a time
constexpr int64_t PARALLEL = 1 << 17;  // numbers of a matrix from which on several threads pay

struct Product {
    int dtype;
    int64_t m, n;
    const void* matrix;
    void* y;
};

}  // namespace

#define KERNEL_HEADER "gemv_row.h"
#include "levels.h"

namespace {

enum { OK = 0, BAD_SHAPE = 1, BAD_TYPE = 2, OUT_OF_MEMORY = 3 };

struct Functions {
    decltype(&portable::prepare_vector) prepare;
    decltype(&portable::rows_product) rows;
};

Functions functions() {
#if defined(__x86_64__)
    if (chosen_level == AVX512) return {avx512::prepare_vector, avx512::rows_product};
    if (chosen_level == AVX2) return {avx2::prepare_vector, avx2::rows_product};
#endif
    return {portable::prepare_vector, portable::rows_product};
}

}  // namespace

extern "C" {

// Returns 0, or what gemv_error puts into words. threads 0: OpenMP's default.
int gemv(int dtype, int64_t m, int64_t n, const void* matrix, const void* x, void* y, int threads) {
    if (m < 1 || n < 1) return BAD_SHAPE;
    if (dtype != FLOAT32 && dtype != BFLOAT16) return BAD_TYPE;
    const Product p = {dtype, m, n, matrix, y};
    const Functions f = functions();
    float* prepared = static_cast<float*>(malloc(n * sizeof(float)));
    if (!prepared) return OUT_OF_MEMORY;
    f.prepare(dtype, x, n, prepared);
    if (threads < 1) threads = omp_get_max_threads();
    if (threads == 1 || m * n < PARALLEL) {
        f.rows(p, prepared, 0, m);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
        for (int64_t begin = 0; begin < m; begin += BLOCK)
            f.rows(p, prepared, begin, begin + BLOCK < m ? begin + BLOCK : m);
    }
    free(prepared);
    return OK;
}

const char* gemv_error(int code) {
    switch (code) {
        case OK: return "success";
        case BAD_SHAPE: return "every size must be at least 1";
        case BAD_TYPE: return "only float32 and bfloat16 are supported";
        case OUT_OF_MEMORY: return "out of memory";
        default: return "unknown error";
    }
}
}
