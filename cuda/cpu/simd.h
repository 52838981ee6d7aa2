// Vectors of LANES floats and the few functions the kernels need on them. No include guard: levels.h includes this
// file once per instruction set, each time inside another namespace and with another LANES.

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef float loose_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

// Vectors worked on at once: with more, the accumulators do not fit in 32 (AVX-512) or 16 registers.
constexpr int TILE_VECTORS = LANES == 16 ? 4 : 2;
constexpr int64_t TILE_FLOATS = TILE_VECTORS * LANES;

INLINE vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
INLINE void store(float* p, vec x) { *reinterpret_cast<loose_vec*>(p) = x; }
INLINE vec broadcast(float x) { return x - vec{}; }

// The vector from place `at` on of a tensor of either type, to and from float.
INLINE vec load(int dtype, const void* tensor, int64_t at) {
    if (dtype == FLOAT32) return load(static_cast<const float*>(tensor) + at);
    const loose_halves bits = *reinterpret_cast<const loose_halves*>(static_cast<const uint16_t*>(tensor) + at);
    return reinterpret_cast<vec>(__builtin_convertvector(bits, uvec) << 16);
}

INLINE void store(int dtype, void* tensor, int64_t at, vec x) {
    if (dtype == FLOAT32) return store(static_cast<float*>(tensor) + at, x);
    const uvec bits = reinterpret_cast<uvec>(x);
    const uvec nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uvec rounded = x == x ? nearest_even : 0x7fc0 + uvec{};  // NaN stays NaN
    *reinterpret_cast<loose_halves*>(static_cast<uint16_t*>(tensor) + at) =
        __builtin_convertvector(rounded, loose_halves);
}

INLINE float sum(vec x) {
#if LANES == 16
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(x));
#elif LANES == 8
    __m256 y = reinterpret_cast<__m256>(x);
    __m128 z = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_movehdup_ps(z)));
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// exp by x = n log 2 + f with |f| <= log(2)/2 and the series of exp(f), whose ninth term is below half an ulp.
// Arguments beyond +-87 count as +-87; NaN stays NaN.
INLINE vec exp(vec x) {
    const vec limit = broadcast(87.0f), magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    x = x > limit ? limit : x;
    x = x < -limit ? -limit : x;
    const vec shifted = x * 1.44269504f + magic;
    const vec n = shifted - magic;
    const vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = f * (1.0f / 5040) + 1.0f / 720;
    p = p * f + 1.0f / 120;
    p = p * f + 1.0f / 24;
    p = p * f + 1.0f / 6;
    p = p * f + 0.5f;
    p = p * f + 1.0f;
    p = p * f + 1.0f;
    const ivec exponent = reinterpret_cast<ivec>(shifted) - reinterpret_cast<ivec>(magic);
    return p * reinterpret_cast<vec>((exponent + 127) << 23);
}

// Row `row` of N values of a tensor of either type, to and from float.
INLINE void read_row(int dtype, const void* tensor, int64_t row, int64_t N, float* to) {
    if (dtype == FLOAT32) {
        memcpy(to, static_cast<const float*>(tensor) + row * N, N * sizeof(float));
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(tensor) + row * N;
    uint32_t* bits = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < N; i++) bits[i] = uint32_t(from[i]) << 16;
}

INLINE void write_row(int dtype, void* tensor, int64_t row, int64_t N, const float* from) {
    if (dtype == FLOAT32) {
        memcpy(static_cast<float*>(tensor) + row * N, from, N * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(tensor) + row * N;
    const uint32_t* bits = reinterpret_cast<const uint32_t*>(from);
    for (int64_t i = 0; i < N; i++) {
        const uint32_t nearest_even = (bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16;
        to[i] = uint16_t((bits[i] & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest_even);  // NaN stays NaN
    }
}

// to = from^T, N by N.
INLINE void transpose(const float* from, float* to, int64_t N) {
    for (int64_t i = 0; i < N; i += 4)
        for (int64_t j = 0; j < N; j += 4) {
#if defined(__x86_64__)
            __m128 line[4];
            for (int64_t n = 0; n < 4; n++) line[n] = _mm_loadu_ps(from + (j + n) * N + i);
            _MM_TRANSPOSE4_PS(line[0], line[1], line[2], line[3]);
            for (int64_t n = 0; n < 4; n++) _mm_storeu_ps(to + (i + n) * N + j, line[n]);
#else
            for (int64_t n = 0; n < 4; n++)
                for (int64_t m = 0; m < 4; m++) to[(i + n) * N + j + m] = from[(j + m) * N + i + n];
#endif
        }
}
