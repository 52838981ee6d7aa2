// How a library runs over its heads: one thread per head of one sequence at a time. Include after levels.h, with
// scratch_floats(N) defined: the floats of working memory that one head needs.

#pragma once

#include <cstdlib>

#include <omp.h>

#include "sequences.h"

namespace {

enum { OK = 0, BAD_SHAPE = 1, BAD_TYPE = 2, OUT_OF_MEMORY = 3, BAD_DOCUMENTS = 4 };

const char* error_text(int code) {
    switch (code) {
        case OK: return "success";
        case BAD_SHAPE: return "every size must be at least 1 and the head size a multiple of 8";
        case BAD_TYPE: return "only float32 and bfloat16 are supported";
        case OUT_OF_MEMORY: return "out of memory";
        case BAD_DOCUMENTS: return "documents need a batch of 1 and offsets that rise from 0 to the number of tokens";
        default: return "unknown error";
    }
}

int check(const Sequences& p, int dtype) {
    if (p.B < 1 || p.T < 1 || p.H < 1 || p.N < 8 || p.N % 8) return BAD_SHAPE;
    if (!p.fit()) return BAD_DOCUMENTS;
    return dtype == FLOAT32 || dtype == BFLOAT16 ? OK : BAD_TYPE;
}

// Runs one_head(p, results, head, scratch) for every head of every sequence on at most `threads` threads (0: OpenMP's
// default). Returns what the functions of the interface return.
template <class Problem, class Results>
int for_each_head(const Problem& p, const Results& results, int threads,
                  void (*one_head)(const Problem&, const Results&, const Head&, float*)) {
    if (int code = check(p, p.dtype)) return code;
    const int64_t heads = p.count() * p.H, floats = scratch_floats(p.N);
    if (threads < 1) threads = omp_get_max_threads();
    if (threads > heads) threads = int(heads);
    float* scratch = static_cast<float*>(aligned_alloc(64, threads * floats * sizeof(float)));
    if (!scratch) return OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < heads; i++) one_head(p, results, Head(p, i), scratch + omp_get_thread_num() * floats);
    free(scratch);
    return OK;
}

}  // namespace
