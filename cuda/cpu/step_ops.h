// The operations of step.cpp. Included once per instruction set: see levels.h.
//
// Vectors of the width C and of a head are whole numbers of LANES; others have a rest.

#include "products.h"

// A tile of a matrix product: rows of the matrix by sequences, whose sums all stay in registers.
constexpr int TALL = 4, WIDE = LANES == 16 ? 4 : 2;
constexpr int ALONE = 8;        // rows of a tile where there is one sequence
constexpr int64_t DEEP = 1024;  // numbers of a row at a time: those of a tile's rows stay in the first-level cache
constexpr int64_t MOST = 64;    // sequences at a time

// A tensor of parameters; a vector of one of the sequences.
INLINE const float* floats(const Op& op, int i) { return static_cast<const float*>(op.p[i]); }
INLINE float* vector(const Op& op, const Step& step, int64_t sequence, int i) {
    return static_cast<float*>(op.p[i]) + sequence * step.stride;
}
INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }
INLINE vec tanh(vec x) { return 1.0f - 2.0f / (exp(2.0f * x) + 1.0f); }

INLINE vec after(int which, vec x) {
    if (which == TANH) return tanh(x);
    if (which == SIGMOID) return sigmoid(x);
    if (which == RELU_SQUARE) {
        x = x > 0 ? x : vec{};
        return x * x;
    }
    return x;
}

static void activate(int which, float* y, int64_t n) {
    if (which == NOTHING) return;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(y + i, after(which, load(y + i)));
    float rest[LANES] = {};
    for (int64_t j = 0; i + j < n; j++) rest[j] = y[i + j];
    store(rest, after(which, load(rest)));
    for (int64_t j = 0; i + j < n; j++) y[i + j] = rest[j];
}

// The mean of n numbers becomes 0 and their variance 1: y may be x.
INLINE void normalize(const float* x, float* y, int64_t n, float eps) {
    vec total = {}, squares = {};
    for (int64_t i = 0; i < n; i += LANES) total += load(x + i);
    const float mean = sum(total) / n;
    for (int64_t i = 0; i < n; i += LANES) {
        const vec centred = load(x + i) - mean;
        squares += centred * centred;
    }
    const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
    for (int64_t i = 0; i < n; i += LANES) store(y + i, (load(x + i) - mean) * scale);
}

// p: table [V, m], y. Row `token` of the table.
static void embed(const Op& op, const Step& step, int64_t one) {
    read_row(op.kind, op.p[0], step.tokens[one], op.m, vector(op, step, one, 1));
}

// p: x, weight, bias, y. LayerNorm of m numbers.
static void norm(const Op& op, const Step& step, int64_t one) {
    float* y = vector(op, step, one, 3);
    normalize(vector(op, step, one, 0), y, op.m, float(op.eps));
    for (int64_t i = 0; i < op.m; i += LANES)
        store(y + i, load(y + i) * load(floats(op, 1) + i) + load(floats(op, 2) + i));
}

// p: x, shares [n, m], changes [n, m] or null, y [n, m]. Token shift: y = x + (previous - x) (share + change). With
// `add` x becomes the previous token of the next.
static void mix(const Op& op, const Step& step, int64_t one) {
    const float *x = vector(op, step, one, 0), *previous = step.before[one] + op.state;
    const float* changes = op.p[2] ? vector(op, step, one, 2) : nullptr;
    float *y = vector(op, step, one, 3), *next = step.next[one] + op.state;
    for (int64_t i = 0; i < op.m; i += LANES) {
        const vec own = load(x + i), delta = load(previous + i) - own;
        for (int64_t at = i; at < op.n * op.m; at += op.m) {
            vec share = load(floats(op, 1) + at);
            if (changes) share += load(changes + at);
            store(y + at, own + delta * share);
        }
        if (op.add) store(next + i, own);
    }
}

INLINE vec from_int8(const int8_t* p) {
#if LANES == 16
    const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<vec>(_mm512_cvtepi32_ps(wide));
#elif LANES == 8
    const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return reinterpret_cast<vec>(_mm256_cvtepi32_ps(wide));
#else
    return vec{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
#endif
}

typedef float four __attribute__((vector_size(16)));
typedef float loose_four __attribute__((vector_size(16), aligned(4), may_alias));

// The sums of four vectors.
INLINE four four_sums(vec a, vec b, vec c, vec d) {
#if LANES == 16
    const __m512 A = reinterpret_cast<__m512>(a), B = reinterpret_cast<__m512>(b);
    const __m512 C = reinterpret_cast<__m512>(c), D = reinterpret_cast<__m512>(d);
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(A, B, 0x44), _mm512_shuffle_f32x4(A, B, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(C, D, 0x44), _mm512_shuffle_f32x4(C, D, 0xee));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4e));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xb1));
    return reinterpret_cast<four>(_mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
#else
    return four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// With bfloat16's own products, x is bfloat16 too where the matrix is.
INLINE bool dots(int kind) { return DOTS && kind == BFLOAT16; }
INLINE bool paired(int kind) { return (kind == BFLOAT16 && !DOTS) || (kind == FOUR_BITS && LANES == 16); }

// Rows of a matrix of a kind; scales: of blocks of 64 numbers of four bits, whose values `table` begins with.
struct Rows {
    const uint8_t* first;
    int64_t pitch, n;  // bytes from row to row, and their numbers
    const float *scales, *table;
};

template <int KIND>
struct Weights {
    static constexpr int VECTORS = KIND == BFLOAT16 || KIND == FOUR_BITS ? 2 : 1;
    static constexpr int64_t STEP = VECTORS * LANES;  // numbers that are read at a time
    static constexpr int BITS = KIND == FLOAT32 ? 32 : KIND == BFLOAT16 ? 16 : KIND == INT8 ? 8 : 4;

    INLINE void read(const uint8_t* from, const float* table, float scale, vec* w) {
        if constexpr (KIND == FLOAT32) {
            w[0] = load(reinterpret_cast<const float*>(from));
        } else if constexpr (KIND == BFLOAT16) {
            const ivec bits = *reinterpret_cast<const loose_ivec*>(from);
            w[0] = reinterpret_cast<vec>(bits << 16);
            w[1] = reinterpret_cast<vec>(bits & ~0xffff);
        } else if constexpr (KIND == INT8) {
            w[0] = from_int8(reinterpret_cast<const int8_t*>(from));
        } else {
            // A byte holds two codes, the first in its high half. table: the values of the 16 codes, and then those of
            // all 256 bytes, in pairs.
#if LANES == 16
            // In the order of bfloat16: first the numbers of high halves. A code selects one of 16 values.
            const __m512 values = _mm512_loadu_ps(table);
            const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            w[0] = reinterpret_cast<vec>(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values)) * scale;
            w[1] = reinterpret_cast<vec>(_mm512_permutexvar_ps(codes, values)) * scale;
#else
            float values[2 * LANES];
            for (int i = 0; i < LANES; i++) memcpy(values + 2 * i, table + 16 + 2 * from[i], 2 * sizeof(float));
            w[0] = load(values) * scale, w[1] = load(values + LANES) * scale;
#endif
        }
    }

    // The numbers from `at` on of row i; zeros beyond its end.
    template <bool CUT = false>
    INLINE void read(const Rows& rows, int64_t i, int64_t at, vec* w) {
        const uint8_t* from = rows.first + i * rows.pitch + at * BITS / 8;
        uint8_t rest[STEP * 4] = {};
        if (CUT) from = static_cast<const uint8_t*>(memcpy(rest, from, (rows.n - at) * BITS / 8));
        read(from, rows.table, KIND == FOUR_BITS ? rows.scales[(i * rows.n + at) / 64] : 1.0f, w);
    }
};

// sums[i][j] += numbers `at` to `at` + STEP of row i, times those of vector j of x; vectors are `width` floats apart.
template <int KIND, int M, int K, bool CUT>
INLINE void add_step(const Rows& rows, int64_t at, const float* x, int64_t width, vec (&sums)[M][K]) {
    using W = Weights<KIND>;
#if DOTS
    if constexpr (KIND == BFLOAT16) {
        for (int i = 0; i < M; i++) {
            uint16_t rest[2 * LANES] = {};
            const uint8_t* from = rows.first + i * rows.pitch + at * 2;
            if (CUT) from = static_cast<const uint8_t*>(memcpy(rest, from, (rows.n - at) * 2));
            const __m512bh w = reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
            for (int j = 0; j < K; j++) {
                const __m512bh own = reinterpret_cast<__m512bh>(_mm512_loadu_si512(x + j * width + at / 2));
                sums[i][j] = reinterpret_cast<vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums[i][j]), w, own));
            }
        }
        return;
    }
#endif
    for (int i = 0; i < M; i++) {
        vec w[W::VECTORS];
        W::template read<CUT>(rows, i, at, w);
        for (int v = 0; v < W::VECTORS; v++)
            for (int j = 0; j < K; j++) sums[i][j] += w[v] * load(x + j * width + at + v * LANES);
    }
}

// The same of numbers `begin` to `end`.
template <int KIND, int M, int K>
INLINE void add_products(
    const Rows& rows, int64_t begin, int64_t end, const float* x, int64_t width, vec (&sums)[M][K]) {
    constexpr int64_t STEP = Weights<KIND>::STEP;
    for (; begin + STEP <= end; begin += STEP) add_step<KIND, M, K, false>(rows, begin, x, width, sums);
    if (begin < end) add_step<KIND, M, K, true>(rows, begin, x, width, sums);
}

INLINE Rows rows_from(const Op& op, int64_t row) {
    const int bits = op.kind == FLOAT32 ? 32 : op.kind == BFLOAT16 ? 16 : op.kind == INT8 ? 8 : 4;
    const int64_t pitch = op.n * bits / 8;
    return {static_cast<const uint8_t*>(op.p[0]) + row * pitch, pitch, op.n,
            op.kind == FOUR_BITS ? floats(op, 3) + row * op.n / 64 : nullptr, floats(op, 4)};
}

// y = product, or y += product, of `count` rows from `row` on.
INLINE void put(const Op& op, int64_t row, float* y, four products, int count) {
    loose_four* to = reinterpret_cast<loose_four*>(y + row);
    if (count == 4 && op.kind != INT8) {
        *to = op.add ? *to + products : products;
        return;
    }
    for (int i = 0; i < count; i++) {
        const float before = op.add ? y[row + i] : 0.0f;
        y[row + i] = op.kind == INT8 ? std::fma(products[i], floats(op, 3)[row + i], before) : before + products[i];
    }
}

template <int M, int K>
INLINE void put_all(const Op& op, const Step& step, int64_t row, int64_t one, vec (&sums)[M][K]) {
    for (int j = 0; j < K; j++) {
        float* y = vector(op, step, one + j, 2);
        if constexpr (M == 1)
            put(op, row, y, four_sums(sums[0][j], vec{}, vec{}, vec{}), 1);
        else
            for (int i = 0; i < M; i += 4)
                put(op, row + i, y, four_sums(sums[i][j], sums[i + 1][j], sums[i + 2][j], sums[i + 3][j]), 4);
    }
}

// M rows of the matrix times x of some sequences, from `first` on, in pieces of a row that stay in the cache.
template <int KIND, int M>
INLINE void product_of_rows(const Op& op, const Step& step, int64_t row, int64_t first, int64_t end) {
    using W = Weights<KIND>;
    constexpr bool UNPACKED = KIND != FLOAT32 && !(DOTS && KIND == BFLOAT16);
    const int64_t width = step.width(op);
    const Rows rows = rows_from(op, row);
    vec kept[MOST][M];
    float unpacked[UNPACKED ? M * DEEP : 1];
    for (int64_t from = 0; from < op.n; from += DEEP) {
        const int64_t to = from + DEEP < op.n ? from + DEEP : op.n;
        const bool last = to == op.n;
        // Of many sequences the numbers are unpacked once for all.
        const bool unpack = UNPACKED && end - first > WIDE;
        if (unpack) {
            for (int i = 0; i < M; i++) {
                float* own = unpacked + i * DEEP;
                vec w[W::VECTORS];
                for (int64_t at = from; at < to; at += W::STEP) {
                    at + W::STEP <= to ? W::template read<false>(rows, i, at, w) : W::template read<true>(rows, i, at, w);
                    for (int v = 0; v < W::VECTORS; v++) store(own + at - from + v * LANES, w[v]);
                }
            }
        }
        const int64_t whole = (to - from + W::STEP - 1) / W::STEP * W::STEP;
        const Rows floats_of = {reinterpret_cast<const uint8_t*>(unpacked), DEEP * 4, whole, nullptr, nullptr};
        const auto tile = [&](int64_t one, auto wide) {
            constexpr int K = decltype(wide)::value;
            vec sums[M][K] = {};
            if (from)
                for (int j = 0; j < K; j++)
                    for (int i = 0; i < M; i++) sums[i][j] = kept[one - first + j][i];
            const float* x = step.prepared + one * width;
            if (unpack)
                add_products<FLOAT32, M, K>(floats_of, 0, whole, x + from, width, sums);
            else
                add_products<KIND, M, K>(rows, from, to, x, width, sums);
            if (last) return put_all<M, K>(op, step, row, one, sums);
            for (int j = 0; j < K; j++)
                for (int i = 0; i < M; i++) kept[one - first + j][i] = sums[i][j];
        };
        int64_t one = first;
        if constexpr (M == TALL)
            for (; one + WIDE <= end; one += WIDE) {
                tile(one, std::integral_constant<int, WIDE>());
                // Meanwhile the numbers that come next are fetched from memory.
                const uint8_t* ahead = rows.first + (last ? M * rows.pitch : to * W::BITS / 8);
                const int64_t bytes = (op.n < DEEP ? op.n : DEEP) * W::BITS / 8, tiles = end - first;
                for (int64_t at = (one - first) * bytes / tiles; at < (one + WIDE - first) * bytes / tiles; at += 64)
                    for (int i = 0; i < M; i++) __builtin_prefetch(ahead + i * rows.pitch + at, 0, 2);
            }
        for (; one < end; one++) tile(one, std::integral_constant<int, 1>());
    }
}

template <int KIND>
static void rows_of_kind(const Op& op, const Step& step, int64_t row, int64_t end) {
    for (int64_t first = 0; first < step.count; first += MOST) {
        const int64_t last = first + MOST < step.count ? first + MOST : step.count;
        int64_t at = row;
        if (last - first == 1)
            for (; at + ALONE <= end; at += ALONE) product_of_rows<KIND, ALONE>(op, step, at, first, last);
        else
            for (; at + TALL <= end; at += TALL) product_of_rows<KIND, TALL>(op, step, at, first, last);
        for (; at < end; at++) product_of_rows<KIND, 1>(op, step, at, first, last);
    }
}

// x as the products read it: in one piece, padded with zeros, and in the order or the type of the matrix.
static void prepare(const Op& op, const Step& step, int64_t one) {
    const float* x = vector(op, step, one, 1);
    const int64_t width = step.width(op), n = (op.n + PADDED - 1) / PADDED * PADDED;
    float* to = step.prepared + one * width;
#if DOTS
    if (op.kind == BFLOAT16) {
        for (int64_t i = 0; i < n; i += LANES) {
            float own[LANES] = {};
            memcpy(own, x + i, (i + LANES < op.n ? LANES : op.n > i ? op.n - i : 0) * sizeof(float));
            const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(own)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), rounded);
        }
        return;
    }
#endif
    memcpy(to, x, op.n * sizeof(float));
    memset(to + op.n, 0, (n - op.n) * sizeof(float));
    if (paired(op.kind)) pair_up(to, n);
}

// p: W [m, n], x, y, scales, table. y = W x. Its sums are the same for any number of sequences.
static void rows(const Op& op, const Step& step) {
    each(step, op.n, [&](int64_t one) { prepare(op, step, one); });
    const bool parallel = step.threads > 1 && op.m * op.n * step.count >= PARALLEL;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t begin = 0; begin < op.m; begin += BLOCK) {
        const int64_t end = begin + BLOCK < op.m ? begin + BLOCK : op.m;
        switch (op.kind) {
            case FLOAT32: rows_of_kind<FLOAT32>(op, step, begin, end); break;
            case BFLOAT16: rows_of_kind<BFLOAT16>(op, step, begin, end); break;
            case INT8: rows_of_kind<INT8>(op, step, begin, end); break;
            default: rows_of_kind<FOUR_BITS>(op, step, begin, end);
        }
    }
    if (op.after != NOTHING) each(step, op.m, [&](int64_t one) { activate(op.after, vector(op, step, one, 2), op.m); });
}

// V vectors of columns of x^T W, from `column` on, of K sequences.
template <int V, int K>
INLINE void tile_of_columns(const Op& op, const Step& step, int64_t column, int64_t one) {
    const float* x = vector(op, step, one, 1);
    vec sums[K][V] = {};
    for (int64_t i = 0; i < op.n; i++) {
        vec w[V];
        for (int v = 0; v < V; v++) w[v] = load(op.kind, op.p[0], i * op.m + column + v * LANES);
        for (int j = 0; j < K; j++)
            for (int v = 0; v < V; v++) sums[j][v] += w[v] * x[j * step.stride + i];
    }
    for (int j = 0; j < K; j++)
        for (int v = 0; v < V; v++) {
            float* at = vector(op, step, one + j, 2) + column + v * LANES;
            store(at, op.add ? load(at) + sums[j][v] : sums[j][v]);
        }
}

template <int K>
INLINE void some_columns(const Op& op, const Step& step, int64_t begin, int64_t end, int64_t one) {
    constexpr int V = K == 1 ? COLUMNS / LANES : TILE_VECTORS;
    int64_t column = begin;
    for (; column + V * LANES <= end; column += V * LANES) tile_of_columns<V, K>(op, step, column, one);
    for (; column + LANES <= end; column += LANES) tile_of_columns<1, K>(op, step, column, one);
    for (; column < end; column++)
        for (int j = 0; j < K; j++) {
            const float* x = vector(op, step, one + j, 1);
            float total = 0, number, &y = vector(op, step, one + j, 2)[column];
            for (int64_t i = 0; i < op.n; i++) {
                read_row(op.kind, op.p[0], i * op.m + column, 1, &number);
                total += number * x[i];
            }
            y = op.add ? y + total : total;
        }
}

// p: W [n, m], x, y. y = x^T W.
static void column_sums(const Op& op, const Step& step) {
    const bool parallel = step.threads > 1 && op.m * op.n * step.count >= PARALLEL;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t begin = 0; begin < op.m; begin += COLUMNS) {
        const int64_t end = begin + COLUMNS < op.m ? begin + COLUMNS : op.m;
        int64_t one = 0;
        for (; one + WIDE <= step.count; one += WIDE) some_columns<WIDE>(op, step, begin, end, one);
        for (; one < step.count; one++) some_columns<1>(op, step, begin, end, one);
    }
    if (op.after != NOTHING) each(step, op.m, [&](int64_t one) { activate(op.after, vector(op, step, one, 2), op.m); });
}

// p: x, y. The sum of the blocks of m of x's n numbers; the last may be shorter.
static void fold(const Op& op, const Step& step, int64_t one) {
    const float* x = vector(op, step, one, 0);
    float* y = vector(op, step, one, 1);
    for (int64_t i = 0; i < op.m; i++) y[i] = 0;
    for (int64_t begin = 0; begin < op.n; begin += op.m)
        for (int64_t i = 0; i < op.m && begin + i < op.n; i++) y[i] += x[begin + i];
}

// p: r, k, v, pw, pa, pv, g, v_first, w0, a0, v0, k_k, k_a, r_k, ln weight, ln bias, z; m heads of n channels. RWKV-7's
// time mix between its projections, as in regions/twins.py (pre7, post7) and wkv7_head.h. pv null: the first layer,
// which leaves its v in v_first.
static void time7_head(const Op& op, const Step& step, int64_t one, int64_t h) {
    const int64_t N = op.n, at = h * N;
    const auto own = [&](int i) { return vector(op, step, one, i) + at; };
    const auto of = [&](int i, int64_t j) { return load(floats(op, i) + at + j); };
    const float *r = own(0), *k0 = own(1), *v0 = own(2), *pw = own(3), *pa = own(4), *pv = own(5), *g = own(6);
    float k[LARGEST_HEAD], v[LARGEST_HEAD], a[LARGEST_HEAD], b[LARGEST_HEAD], decay[LARGEST_HEAD], y[LARGEST_HEAD];
    float *v_first = own(7), *z = own(16);
    vec length = {}, agreement = {};
    for (int64_t j = 0; j < N; j += LANES) {
        const vec key = load(k0 + j), rate = sigmoid(of(9, j) + load(pa + j));
        const vec scaled = key * of(11, j);
        length += scaled * scaled;
        store(a + j, scaled);
        store(b + j, rate);
        const vec weaker = key * (1.0f + (rate - 1.0f) * of(12, j));
        store(k + j, weaker);
        agreement += load(r + j) * weaker * of(13, j);
        store(decay + j, exp(sigmoid(of(8, j) + load(pw + j)) * -DECAY_SCALE));
        const vec value = load(v0 + j);
        if (op.p[5]) {
            const vec open = sigmoid(of(10, j) + load(pv + j));
            store(v + j, value + (load(v_first + j) - value) * open);
        } else {
            store(v + j, value);
            store(v_first + j, value);
        }
    }
    const float norm = std::sqrt(sum(length)), inverse = 1.0f / (norm < 1e-12f ? 1e-12f : norm);
    for (int64_t j = 0; j < N; j += LANES) {
        const vec removal = load(a + j) * inverse;
        store(b + j, load(b + j) * removal);
        store(a + j, -removal);
    }
    const float* S = step.before[one] + op.state + at * N;
    float* next = step.next[one] + op.state + at * N;
    for (int64_t i = 0; i < N; i++, S += N, next += N) {
        vec seen = {}, out = {};
        for (int64_t j = 0; j < N; j += LANES) seen += load(S + j) * load(a + j);
        const float sa = sum(seen), value = v[i];
        for (int64_t j = 0; j < N; j += LANES) {
            const vec state = load(S + j) * load(decay + j) + sa * load(b + j) + value * load(k + j);
            store(next + j, state);
            out += state * load(r + j);
        }
        y[i] = sum(out);
    }
    normalize(y, y, N, float(op.eps));
    const float bonus = sum(agreement);
    for (int64_t j = 0; j < N; j += LANES) {
        const vec normal = load(y + j) * of(14, j) + of(15, j);
        store(z + j, (normal + bonus * load(v + j)) * load(g + j));
    }
}

// p: r, k, v, gate, pw or null, time_decay, u, ln weight, ln bias, z; m heads of n channels. The same of RWKV-5 and 6.
static void time6_head(const Op& op, const Step& step, int64_t one, int64_t h) {
    const int64_t N = op.n, at = h * N;
    const auto own = [&](int i) { return vector(op, step, one, i) + at; };
    const auto of = [&](int i, int64_t j) { return load(floats(op, i) + at + j); };
    const float *r = own(0), *k = own(1), *v = own(2), *gate = own(3), *pw = own(4);
    float* z = own(9);
    float decay[LARGEST_HEAD], y[LARGEST_HEAD];
    vec agreement = {};
    for (int64_t j = 0; j < N; j += LANES) {
        vec w = of(5, j);
        if (op.p[4]) w += load(pw + j);
        store(decay + j, exp(-exp(w)));
        agreement += load(r + j) * load(k + j) * of(6, j);
    }
    const float bonus = sum(agreement);
    const float* S = step.before[one] + op.state + at * N;
    float* next = step.next[one] + op.state + at * N;
    for (int64_t i = 0; i < N; i++, S += N, next += N) {
        vec out = {};
        for (int64_t j = 0; j < N; j += LANES) {
            const vec state = load(S + j);
            out += state * load(r + j);
            store(next + j, state * load(decay + j) + v[i] * load(k + j));
        }
        y[i] = sum(out) + v[i] * bonus;
    }
    normalize(y, y, N, float(op.eps));
    for (int64_t j = 0; j < N; j += LANES) {
        const vec open = load(gate + j);
        const vec normal = load(y + j) * of(7, j) + of(8, j);
        store(z + j, normal * open * sigmoid(open));
    }
}

static void heads(const Op& op, const Step& step) {
    const bool parallel = step.threads > 1 && op.m * op.n * op.n * step.count >= PARALLEL;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t i = 0; i < step.count * op.m; i++)
        if (op.code == TIME7)
            time7_head(op, step, i / op.m, i % op.m);
        else
            time6_head(op, step, i / op.m, i % op.m);
}

// p: gate, value, y. y += sigmoid(gate) value.
static void gate(const Op& op, const Step& step, int64_t one) {
    const float *gate = vector(op, step, one, 0), *value = vector(op, step, one, 1);
    float* y = vector(op, step, one, 2);
    for (int64_t i = 0; i < op.m; i += LANES) store(y + i, load(y + i) + sigmoid(load(gate + i)) * load(value + i));
}

static bool run_op(const Op& op, const Step& step) {
    switch (op.code) {
        case EMBED: each(step, op.m, [&](int64_t one) { embed(op, step, one); }); return true;
        case NORM: each(step, op.m, [&](int64_t one) { norm(op, step, one); }); return true;
        case MIX: each(step, op.n * op.m, [&](int64_t one) { mix(op, step, one); }); return true;
        case ROWS: rows(op, step); return true;
        case COLUMN_SUMS: column_sums(op, step); return true;
        case FOLD: each(step, op.n, [&](int64_t one) { fold(op, step, one); }); return true;
        case TIME7:
        case TIME6: heads(op, step); return true;
        case GATE: each(step, op.m, [&](int64_t one) { gate(op, step, one); }); return true;
        default: return false;
    }
}
