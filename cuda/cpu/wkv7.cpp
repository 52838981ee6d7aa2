// RWKV-7's recurrence on the processor: the C++ twin of cuda/wkv7.cuh behind a C interface, one thread per head
// of one sequence at a time. Arithmetic and states are float; r, k, v, a, b, y, dy and their gradients are float or
// bfloat16, w and dw float; or, with w0 [H, N], of r's type, and the raw decay is w + w0. All tensors are contiguous [B, T, H, N], states [B, H, N, N] (value, key), with documents
// [D, H, N, N]. N: a multiple of 8. The mathematics is in wkv7_head.h.

#include <cstdint>
#include <initializer_list>

#include "sequences.h"

namespace {

constexpr int64_t STEP_ROWS = 8;
constexpr float DECAY_SCALE = 0.60653066f;  // exp(-1/2)

struct Wkv7 : Sequences {
    int dtype;
    const void *r, *w, *k, *v, *a, *b;
    const float *s0, *w0;
};

struct Wkv7Forward {
    void* y;
    float *sT, *saved;
};

struct Wkv7Backward {
    const float* saved;
    const void* dy;
    const float* dsT;
    void *dr, *dw, *dk, *dv, *da, *db;
    float* ds0;
};

// What the forward pass leaves: S at each segment's start, [segments of all sequences, H][value][key], then each head's
// sa [tokens][N].
template <class Float>
Float* saved_sa(const Wkv7& p, Float* saved, const Head& head) {
    Float* all = saved + all_segments(p.B, p.T, p.D) * p.H * p.N * p.N;
    return all + (head.begin * p.H + head.h * head.tokens) * p.N;
}

// Floats of working memory for one head: what the backward pass lays out; the forward pass needs less.
int64_t scratch_floats(int64_t N) {
    const int64_t states = SEGMENT + 2, lines = 7 + (SEGMENT + 1) * STEP_ROWS;
    return (states * N * N + lines * N + 15) / 16 * 16;
}

}  // namespace

#define KERNEL_HEADER "wkv7_head.h"
#include "levels.h"
#include "heads.h"

extern "C" {

int64_t wkv7_saved_floats(int64_t B, int64_t T, int64_t H, int64_t N, int64_t D) {
    return all_segments(B, T, D) * H * N * N + B * T * H * N;
}

// There is no workspace and no stream.
int wkv7_forward(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, int64_t D, const int64_t* offsets,
                 const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
                 const float* s0, void* y, float* sT, float* saved, const float* w0, int threads, void*) {
    const Wkv7 p = {{B, T, H, N, D, offsets}, dtype, r, w, k, v, a, b, s0, w0};
    const Wkv7Forward f = {y, sT, saved};
    return for_each_head(p, f, threads, AT_LEVEL(forward_head, N));
}

int wkv7_backward(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, int64_t D, const int64_t* offsets,
                  const void* r, const void* w, const void* k, const void* v, const void* a, const void* b,
                  const float* s0, const float* saved, const void* dy, const float* dsT, const float* w0, float*,
                  void* dr, void* dw, void* dk, void* dv, void* da, void* db, float* ds0, int threads, void*) {
    const Wkv7 p = {{B, T, H, N, D, offsets}, dtype, r, w, k, v, a, b, s0, w0};
    const Wkv7Backward g = {saved, dy, dsT, dr, dw, dk, dv, da, db, ds0};
    return for_each_head(p, g, threads, AT_LEVEL(backward_head, N));
}

const char* wkv7_error(int code) { return error_text(code); }
}
