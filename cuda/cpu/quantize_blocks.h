// The arithmetic of quantize.cpp, for blocks first to last - 1, or rows. Included once per instruction set.

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE void read_values(int dtype, const void* tensor, int64_t start, int64_t count, float* to) {
    if (dtype == FLOAT32) {
        memcpy(to, static_cast<const float*>(tensor) + start, count * sizeof(float));
        return;
    }
    const uint16_t* half = static_cast<const uint16_t*>(tensor) + start;
    if (dtype == BFLOAT16) {
        for (int64_t i = 0; i < count; i++) to[i] = float_of(uint32_t(half[i]) << 16);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        // The exponent's bias is 15 there and 127 here: 2^112 makes it good, for subnormal numbers too.
        const uint32_t size = bits_of(float_of(uint32_t(half[i] & 0x7fff) << 13) * 0x1p112f);
        const uint32_t beyond = (half[i] & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
        to[i] = float_of(size | beyond | uint32_t(half[i] & 0x8000) << 16);
    }
}

INLINE void write_values(int dtype, void* tensor, int64_t start, int64_t count, const float* from) {
    if (dtype == FLOAT32) {
        memcpy(static_cast<float*>(tensor) + start, from, count * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(tensor) + start;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = bits_of(from[i]);
        const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest_even);  // NaN stays NaN
    }
}

// The largest |x|; NaN if there is one.
INLINE float largest_of(const float* x, int64_t count, float before) {
    uint32_t largest = bits_of(before);
    for (int64_t i = 0; i < count; i++) {
        const uint32_t size = bits_of(x[i]) & 0x7fffffff;
        largest = size > largest ? size : largest;
    }
    return float_of(largest);
}

template <int>
void quantize_blocks(const Quantize& p, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * BLOCK, size = p.values - start < BLOCK ? p.values - start : BLOCK;
        alignas(64) float x[BLOCK] = {};
        alignas(64) int32_t rank[BLOCK] = {};
        read_values(p.dtype, p.weight, start, size, x);
        float scale = largest_of(x, BLOCK, 0.0f);
        if (size == BLOCK) {
            const float inverse = 1.0f / (scale < SMALLEST ? SMALLEST : scale);
            for (int64_t i = 0; i < BLOCK; i++) x[i] *= inverse;
        } else {
            // bitsandbytes divides in a last, shorter block; a product rounds differently.
            scale = scale < SMALLEST ? SMALLEST : scale;
            for (int64_t i = 0; i < BLOCK; i++) x[i] /= scale;
        }
        for (int64_t i = 0; i < BLOCK; i++) x[i] = x[i] < -1.0f ? -1.0f : x[i] > 1.0f ? 1.0f : x[i];
        for (int64_t b = 0; b < 15; b++)
            for (int64_t i = 0; i < BLOCK; i++) rank[i] += !(p.bounds[b] >= x[i]);
        uint8_t* codes = static_cast<uint8_t*>(p.codes) + start / 2;
        for (int64_t i = 0; i < (size + 1) / 2; i++)
            codes[i] = uint8_t(p.order[rank[2 * i]] << 4 | p.order[rank[2 * i + 1]]);
        p.scales[block] = scale;
    }
}

template <int>
void quantize_rows(const Quantize& p, int64_t first, int64_t last) {
    float x[PIECE];
    for (int64_t row = first; row < last; row++) {
        float largest = 0.0f;
        for (int64_t i = 0; i < p.columns; i += PIECE) {
            const int64_t size = p.columns - i < PIECE ? p.columns - i : PIECE;
            read_values(p.dtype, p.weight, row * p.columns + i, size, x);
            largest = largest_of(x, size, largest);
        }
        const float inverse = 1.0f / (largest < SMALLEST_ROW ? SMALLEST_ROW : largest) * 127.0f;
        int8_t* codes = static_cast<int8_t*>(p.codes) + row * p.columns;
        for (int64_t i = 0; i < p.columns; i += PIECE) {
            const int64_t size = p.columns - i < PIECE ? p.columns - i : PIECE;
            read_values(p.dtype, p.weight, row * p.columns + i, size, x);
            for (int64_t j = 0; j < size; j++) codes[i + j] = int8_t(int32_t(__builtin_rintf(x[j] * inverse)));
        }
        p.scales[row] = largest / 127.0f;
    }
}

template <int>
void dequantize_blocks(const Dequantize& p, int64_t first, int64_t last) {
    const uint8_t* codes = static_cast<const uint8_t*>(p.codes);
    for (int64_t block = first; block < last; block++) {
        const int64_t start = block * BLOCK, size = p.values - start < BLOCK ? p.values - start : BLOCK;
        alignas(64) float x[BLOCK];
        const uint8_t* from = codes + start / 2;
#if LANES == 16
        if (size == BLOCK) {
            // Eight bytes are sixteen codes, each of which selects one of the table's sixteen values.
            const __m512 table = _mm512_loadu_ps(p.table), scale = _mm512_set1_ps(p.scales[block]);
            for (int64_t i = 0; i < BLOCK; i += 16) {
                const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i / 2));
                const __m128i low = _mm_set1_epi8(15);
                const __m128i high = _mm_and_si128(_mm_srli_epi16(both, 4), low);
                const __m512i code = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, _mm_and_si128(both, low)));
                _mm512_store_ps(x + i, _mm512_mul_ps(_mm512_permutexvar_ps(code, table), scale));
            }
            write_values(p.dtype, p.out, start, BLOCK, x);
            continue;
        }
#endif
        for (int64_t i = 0; i < (size + 1) / 2; i++) memcpy(x + 2 * i, p.pairs + 2 * from[i], 2 * sizeof(float));
        for (int64_t i = 0; i < size; i++) x[i] *= p.scales[block];
        write_values(p.dtype, p.out, start, size, x);
    }
}

template <int>
void dequantize_rows(const Dequantize& p, int64_t first, int64_t last) {
    float x[PIECE];
    for (int64_t row = first; row < last; row++) {
        const int8_t* codes = static_cast<const int8_t*>(p.codes) + row * p.columns;
        for (int64_t i = 0; i < p.columns; i += PIECE) {
            const int64_t size = p.columns - i < PIECE ? p.columns - i : PIECE;
            for (int64_t j = 0; j < size; j++) x[j] = float(codes[i + j]) * p.scales[row];
            write_values(p.dtype, p.out, row * p.columns + i, size, x);
        }
    }
}
