// One token of each of some sequences through a whole model on the processor: a list of operations, made once for a model
// by ops/step.py, each on a vector of float of every sequence. Weights are read where they are: float, bfloat16, or in 8
// or 4 bits, which are never dequantised in memory; they are read once for all sequences. What a small model spends in
// calls of single operators is saved, and a large one takes as long as reading its weights, or multiplying them, takes.
// The mathematics is in step_ops.h. Results of a sequence depend neither on the others nor on the number of threads.

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <omp.h>

namespace {

constexpr int64_t BLOCK = 16;           // rows of a thread at a time
constexpr int64_t COLUMNS = 64;         // and columns
constexpr int64_t PARALLEL = 1 << 17;   // numbers of a matrix from which on several threads pay
constexpr int64_t LARGEST_HEAD = 256;
constexpr int64_t PADDED = 64;  // prepared vectors are padded to a multiple of it
constexpr float DECAY_SCALE = 0.60653066f;  // exp(-1/2)

enum Code { EMBED = 0, NORM = 1, MIX = 2, ROWS = 3, COLUMN_SUMS = 4, FOLD = 5, TIME7 = 6, TIME6 = 7, GATE = 8 };
enum Kind { INT8 = 2, FOUR_BITS = 3 };  // beside the two of levels.h
enum After { NOTHING = 0, TANH = 1, SIGMOID = 2, RELU_SQUARE = 3 };

constexpr int POINTERS = 18;

// As in ops/step.py. What each operation takes in p is said at its function in step_ops.h.
struct Op {
    int32_t code, kind, after, add;  // add: to what is there
    int64_t m, n;
    int64_t state;  // where its part of the state begins
    double eps;
    void* p[POINTERS];
};

struct Step {
    int64_t count;  // sequences
    const int64_t* tokens;
    const float* const* before;  // the states
    float* const* next;          // and the new ones, which may be the same
    int64_t stride;              // floats from a vector of a sequence to that of the next
    float* prepared;             // room for the vectors that a matrix is multiplied by
    int threads;

    // Floats from one prepared vector to the next.
    int64_t width(const Op& op) const { return (op.n + PADDED - 1) / PADDED * PADDED; }
};

// Calls what(sequence) for each, on several threads where that pays. size: numbers that a call works on.
template <class What>
void each(const Step& step, int64_t size, const What& what) {
    const bool parallel = step.threads > 1 && step.count > 1 && size * step.count >= PARALLEL / 4;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t one = 0; one < step.count; one++) what(one);
}

}  // namespace

#define DOTS 0
#define KERNEL_HEADER "step_ops.h"
#include "levels.h"
#undef DOTS

// The fastest level once more, with products of bfloat16 by bfloat16.
#if defined(__x86_64__)
#define DOTS 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,prefer-vector-width=512")
#endif
#define LANES 16
namespace avx512_dots {
#include "simd.h"
#include "step_ops.h"
}  // namespace avx512_dots
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

extern "C" {

// before and next: the states of `count` sequences, the layers' parts at the places that the operations name. N: the
// head size, a multiple of 8. prepared: room for `count` of the longest vectors that a matrix is multiplied by, each
// padded to a multiple of PADDED. rounded: matrices of bfloat16 may take these vectors as bfloat16, which is twice as
// fast where the processor has such products.
int step_run(const Op* ops, int64_t operations, int64_t N, int64_t count, const int64_t* tokens,
             const float* const* before, float* const* next, int64_t stride, float* prepared, int rounded, int threads) {
    if (operations < 1 || count < 1) return 1;
    if (N < 8 || N % 8 || N > LARGEST_HEAD) return 2;
    if (threads < 1) threads = omp_get_max_threads();
    const Step step = {count, tokens, before, next, stride, prepared, threads};
    const int level = level_for(N);
    auto run = &portable::run_op;
#if defined(__x86_64__)
    if (level == AVX2) run = &avx2::run_op;
    if (level == AVX512) run = rounded && __builtin_cpu_supports("avx512bf16") ? &avx512_dots::run_op : &avx512::run_op;
#endif
    (void)level;
    for (int64_t i = 0; i < operations; i++)
        if (!run(ops[i], step)) return 3;
    return 0;
}

const char* step_error(int code) {
    switch (code) {
        case 0: return "success";
        case 1: return "no operation";
        case 2: return "the head size must be a multiple of 8, up to 256";
        default: return "an operation is unknown";
    }
}
}
