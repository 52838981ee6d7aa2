// Products of a row of a matrix and a vector. Included once per instruction set: see levels.h.
//
// Four sums side by side, so that none waits for the one before; a row is read from its beginning to its end, which is
// how memory is the fastest. bfloat16 numbers come in pairs: as 32 bits, the one that comes second is the upper half,
// and so a float already, and the first is one after a shift.

constexpr int SUMS = 4;
constexpr int64_t PAIRED = 2 * LANES;  // bfloat16 numbers of a vector

typedef int32_t loose_ivec __attribute__((vector_size(4 * LANES), aligned(2), may_alias));

// Of n numbers, in each whole vector the first of all pairs before the second.
INLINE void pair_up(float* x, int64_t n) {
    float first[LANES], second[LANES];
    for (int64_t begin = 0; begin + PAIRED <= n; begin += PAIRED) {
        float* at = x + begin;
        for (int lane = 0; lane < LANES; lane++) first[lane] = at[2 * lane], second[lane] = at[2 * lane + 1];
        memcpy(at, first, sizeof first);
        memcpy(at + LANES, second, sizeof second);
    }
}

// What the products of a row read: x as floats, of bfloat16 paired up.
static void prepare_vector(int dtype, const void* x, int64_t n, float* prepared) {
    read_row(dtype, x, 0, n, prepared);
    if (dtype == BFLOAT16) pair_up(prepared, n);
}

INLINE float product_float(const float* row, const float* x, int64_t n) {
    vec sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        for (int s = 0; s < SUMS; s++) sums[s] += load(row + i + s * LANES) * load(x + i + s * LANES);
    for (; i + LANES <= n; i += LANES) sums[0] += load(row + i) * load(x + i);
    float rest = 0;
    for (; i < n; i++) rest += row[i] * x[i];
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

INLINE void add_pairs(const uint16_t* row, const float* x, vec& first, vec& second) {
    const ivec bits = *reinterpret_cast<const loose_ivec*>(row);
    first += reinterpret_cast<vec>(bits << 16) * load(x);
    second += reinterpret_cast<vec>(bits & ~0xffff) * load(x + LANES);
}

INLINE float product_bfloat16(const uint16_t* row, const float* x, int64_t n) {
    vec sums[SUMS][2] = {};
    int64_t i = 0;
    for (; i + SUMS * PAIRED <= n; i += SUMS * PAIRED)
        for (int s = 0; s < SUMS; s++) add_pairs(row + i + s * PAIRED, x + i + s * PAIRED, sums[s][0], sums[s][1]);
    for (; i + PAIRED <= n; i += PAIRED) add_pairs(row + i, x + i, sums[0][0], sums[0][1]);
    float tail[PAIRED], rest = 0;
    read_row(BFLOAT16, row + i, 0, n - i, tail);
    for (int64_t j = 0; i + j < n; j++) rest += tail[j] * x[i + j];
    vec total = {};
    for (int s = 0; s < SUMS; s++) total += sums[s][0] + sums[s][1];
    return sum(total) + rest;
}
