// One token of one sequence through a whole model on the processor: a list of operations, made once for a model by
// ops/step.py, each on vectors of float. Weights are read where they are: float, bfloat16, or in 8 or 4 bits, which are
// never dequantised in memory. What a small model spends in calls of single operators is saved, and a large one takes as
// long as reading its weights takes. The mathematics is in step_ops.h. Results do not depend on the number of threads.

#include <cstdint>
#include <cmath>

#include <omp.h>

namespace {

constexpr int64_t BLOCK = 16;           // rows of a thread at a time
constexpr int64_t COLUMNS = 64;         // and columns
constexpr int64_t PARALLEL = 1 << 17;   // numbers of a matrix from which on several threads pay
constexpr int64_t LARGEST_HEAD = 256;
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
    int64_t token;
    const float* before;  // the state
    float* next;          // and the new one
    int threads;
};

}  // namespace

#define KERNEL_HEADER "step_ops.h"
#include "levels.h"

extern "C" {

// state and next: the layers' parts at the places that the operations name. N: the head size, a multiple of 8.
int step_run(const Op* ops, int64_t count, int64_t N, int64_t token, const float* before, float* next, int threads) {
    if (count < 1) return 1;
    if (N < 8 || N % 8 || N > LARGEST_HEAD) return 2;
    const Step step = {token, before, next, threads < 1 ? omp_get_max_threads() : threads};
    const int level = level_for(N);
    auto run = &portable::run_op;
#if defined(__x86_64__)
    if (level == AVX2) run = &avx2::run_op;
    if (level == AVX512) run = &avx512::run_op;
#endif
    (void)level;
    for (int64_t i = 0; i < count; i++)
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
