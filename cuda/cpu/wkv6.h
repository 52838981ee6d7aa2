// RWKV-6's and RWKV-5's recurrence on the processor: the C++ twin of cuda/wkv6.cuh behind a C
// interface, one thread per head of one sequence at a time. Arithmetic and states are float; r, k, v, y, dy and their
// gradients are float or bfloat16, w, u and theirs float. All tensors are contiguous: [B, T, H, N], u [H, N], states
// [B, H, N, N] (value, key), du [B, H, N]: a row per sequence, so with documents D rows instead of B. N: a multiple of
// 8. The mathematics is in wkv6_head.h.
//
// Define before including: WKV(name), what a function of the interface is called, and DECAY_PER_TOKEN: true if w and dw
// are [B, T, H, N] (RWKV-6), false if w is [H, N] and dw, a row per sequence, [B, H, N] (RWKV-5).

#include <cstdint>
#include <initializer_list>

#include "sequences.h"

namespace {

constexpr int64_t STEP_ROWS = 6;

struct Wkv6 : Sequences {
    int dtype;
    const void* r;
    const float* w;
    const void *k, *v;
    const float *u, *s0;
};

struct Wkv6Forward {
    void* y;
    float *sT, *saved;
};

struct Wkv6Backward {
    const float* saved;
    const void* dy;
    const float* dsT;
    void* dr;
    float* dw;
    void *dk, *dv;
    float *du, *ds0;
};

// Floats of working memory for one head: what the backward pass lays out; the forward pass needs less.
int64_t scratch_floats(int64_t N) {
    return ((SEGMENT + 1) * N * N + (5 + SEGMENT * STEP_ROWS) * N + 2 * SEGMENT + 15) / 16 * 16;
}

}  // namespace

#define KERNEL_HEADER "wkv6_head.h"
#include "levels.h"
#include "heads.h"

extern "C" {

// S at each segment's start, [segments of all sequences, H][value][key].
int64_t WKV(saved_floats)(int64_t B, int64_t T, int64_t H, int64_t N, int64_t D) {
    return all_segments(B, T, D) * H * N * N;
}

// There is no workspace and no stream.
int WKV(forward)(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, int64_t D, const int64_t* offsets,
                 const void* r, const float* w, const void* k, const void* v, const float* u, const float* s0, void* y,
                 float* sT, float* saved, int threads, void*) {
    const Wkv6 p = {{B, T, H, N, D, offsets}, dtype, r, w, k, v, u, s0};
    const Wkv6Forward f = {y, sT, saved};
    return for_each_head(p, f, threads, AT_LEVEL(forward_head, N));
}

int WKV(backward)(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, int64_t D, const int64_t* offsets,
                  const void* r, const float* w, const void* k, const void* v, const float* u, const float* s0,
                  const float* saved, const void* dy, const float* dsT, float*, void* dr, float* dw, void* dk,
                  void* dv, float* du, float* ds0, int threads, void*) {
    const Wkv6 p = {{B, T, H, N, D, offsets}, dtype, r, w, k, v, u, s0};
    const Wkv6Backward b = {saved, dy, dsT, dr, dw, dk, dv, du, ds0};
    return for_each_head(p, b, threads, AT_LEVEL(backward_head, N));
}

const char* WKV(error)(int code) { return error_text(code); }
}
