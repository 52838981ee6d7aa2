// RWKV-7's recurrence on the processor: the C++ twin of cuda/wkv7.cu behind the same C interface, one thread per head
// of one batch row at a time. Arithmetic and states are float; r, k, v, a, b, y, dy and their gradients are float or
// bfloat16, w and dw float. All tensors are contiguous [B, T, H, N], states [B, H, N, N] (value, key). N: a multiple
// of 8. The mathematics is in wkv7_head.h.

#include <cstdint>
#include <cstdlib>
#include <initializer_list>

#include <omp.h>

namespace {

enum { FLOAT32 = 0, BFLOAT16 = 1 };
enum { OK = 0, BAD_SHAPE = 1, BAD_TYPE = 2, OUT_OF_MEMORY = 3 };

constexpr int64_t SEGMENT = 32;
constexpr int64_t STEP_ROWS = 8;
constexpr float DECAY_SCALE = 0.60653066f;  // exp(-1/2)

struct Wkv7 {
    int dtype;
    int64_t B, T, H, N;
    const void* r;
    const float* w;
    const void *k, *v, *a, *b;
    const float* s0;
};

struct Wkv7Forward {
    void* y;
    float *sT, *saved;
};

struct Wkv7Backward {
    const float* saved;
    const void* dy;
    const float* dsT;
    void* dr;
    float* dw;
    void *dk, *dv, *da, *db;
    float* ds0;
};

int64_t saved_floats_per_head(int64_t T, int64_t N) { return (T + SEGMENT - 1) / SEGMENT * N * N + T * N; }

// One head's part of what the forward pass leaves: S at each segment's start [segments][value][key], then sa [T][N].
struct Saved {
    float *states, *sa;
    Saved(const Wkv7& p, float* saved, int64_t head) {
        states = saved ? saved + head * saved_floats_per_head(p.T, p.N) : nullptr;
        sa = saved ? states + (p.T + SEGMENT - 1) / SEGMENT * p.N * p.N : nullptr;
    }
};

// Floats of working memory for one head: what the backward pass lays out; the forward pass needs less.
int64_t scratch_floats(int64_t N) {
    const int64_t states = SEGMENT + 2, lines = 7 + (SEGMENT + 1) * STEP_ROWS;
    return (states * N * N + lines * N + 15) / 16 * 16;
}

}  // namespace

#define KERNEL_HEADER "wkv7_head.h"
#include "levels.h"

namespace {

int check(const Wkv7& p) {
    if (p.B < 1 || p.T < 1 || p.H < 1 || p.N < 8 || p.N % 8) return BAD_SHAPE;
    return p.dtype == FLOAT32 || p.dtype == BFLOAT16 ? OK : BAD_TYPE;
}

// Runs one_head(head, scratch) for every head on at most `threads` threads (0: OpenMP's default).
template <class OneHead>
int for_each_head(const Wkv7& p, int threads, OneHead one_head) {
    const int64_t heads = p.B * p.H, floats = scratch_floats(p.N);
    if (threads < 1) threads = omp_get_max_threads();
    if (threads > heads) threads = int(heads);
    float* scratch = static_cast<float*>(aligned_alloc(64, threads * floats * sizeof(float)));
    if (!scratch) return OUT_OF_MEMORY;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t head = 0; head < heads; head++) one_head(head, scratch + omp_get_thread_num() * floats);
    free(scratch);
    return OK;
}

// The chosen level, or the next one whose vectors divide a row.
int level_for(int64_t N) { return chosen_level == AVX512 && N % 16 ? AVX2 : chosen_level; }

}  // namespace

extern "C" {

int64_t wkv7_saved_floats(int64_t B, int64_t T, int64_t H, int64_t N) { return B * H * saved_floats_per_head(T, N); }

int64_t wkv7_workspace_floats(int64_t, int64_t, int64_t, int64_t) { return 0; }

// `device` is the number of threads; there is no stream.
int wkv7_forward(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r, const float* w, const void* k,
                 const void* v, const void* a, const void* b, const float* s0, void* y, float* sT, float* saved,
                 int device, void*) {
    const Wkv7 p = {dtype, B, T, H, N, r, w, k, v, a, b, s0};
    const Wkv7Forward f = {y, sT, saved};
    if (int code = check(p)) return code;
    auto run = portable::forward_head;
#if defined(__x86_64__)
    if (level_for(N) == AVX2) run = avx2::forward_head;
    if (level_for(N) == AVX512) run = avx512::forward_head;
#endif
    return for_each_head(p, device, [&](int64_t head, float* scratch) { run(p, f, head, scratch); });
}

int wkv7_backward(int dtype, int64_t B, int64_t T, int64_t H, int64_t N, const void* r, const float* w, const void* k,
                  const void* v, const void* a, const void* b, const float* s0, const float* saved, const void* dy,
                  const float* dsT, float*, void* dr, float* dw, void* dk, void* dv, void* da, void* db, float* ds0,
                  int device, void*) {
    const Wkv7 p = {dtype, B, T, H, N, r, w, k, v, a, b, s0};
    const Wkv7Backward g = {saved, dy, dsT, dr, dw, dk, dv, da, db, ds0};
    if (int code = check(p)) return code;
    auto run = portable::backward_head;
#if defined(__x86_64__)
    if (level_for(N) == AVX2) run = avx2::backward_head;
    if (level_for(N) == AVX512) run = avx512::backward_head;
#endif
    return for_each_head(p, device, [&](int64_t head, float* scratch) { run(p, g, head, scratch); });
}

const char* wkv7_error(int code) {
    switch (code) {
        case OK: return "success";
        case BAD_SHAPE: return "every size must be at least 1 and the head size a multiple of 8";
        case BAD_TYPE: return "only float32 and bfloat16 are supported";
        case OUT_OF_MEMORY: return "out of memory";
        default: return "unknown error";
    }
}
}
