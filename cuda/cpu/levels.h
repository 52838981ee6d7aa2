// Compiles KERNEL_HEADER once per instruction set, each in its own namespace, so that one binary runs everywhere and
// picks the fastest code the processor has. Define KERNEL_HEADER and include the headers it needs before this one.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32 = 0, BFLOAT16 = 1 };

#define LANES 4
namespace portable {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace portable
#undef LANES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
namespace avx2 {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace avx2
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define LANES 16
namespace avx512 {
#include "simd.h"
#include KERNEL_HEADER
}  // namespace avx512
#undef LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

enum Level { PORTABLE = 0, AVX2 = 1, AVX512 = 2 };

static int best_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (fma) return AVX2;
#endif
    return PORTABLE;
}

static int chosen_level = best_level();

extern "C" int wkv_get_level() { return chosen_level; }

// For tests: take this level (-1: the best) from now on. Returns the level in use, or -1 and changes nothing if the
// processor lacks it. Not for use while a kernel runs.
extern "C" int wkv_set_level(int level) {
    if (level > best_level()) return -1;
    chosen_level = level < 0 ? best_level() : level;
    return chosen_level;
}

// The chosen level, or the next one whose vectors divide a row of N.
static int level_for(int64_t N) { return chosen_level == AVX512 && N % 16 ? AVX2 : chosen_level; }

// `function` as compiled for that level, and for the usual head size: function<64>, or function<0> for any N.
#if defined(__x86_64__)
#define AT_LEVEL(function, N) \
    (level_for(N) == AVX512 ? OF_SIZE(avx512::function, N) \
     : level_for(N) == AVX2 ? OF_SIZE(avx2::function, N)   \
                            : OF_SIZE(portable::function, N))
#else
#define AT_LEVEL(function, N) OF_SIZE(portable::function, N)
#endif
#define OF_SIZE(function, N) (N == 64 ? function<64> : function<0>)
