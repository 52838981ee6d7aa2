// The operations of step.cpp. Included once per instruction set: see levels.h.
//
// Vectors of the width C and of a head are whole numbers of LANES; others have a rest.

#include "products.h"

INLINE const float* floats(const Op& op, int i) { return static_cast<const float*>(op.p[i]); }
INLINE float* result(const Op& op, int i) { return static_cast<float*>(op.p[i]); }
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
static void embed(const Op& op, const Step& step) {
    read_row(op.kind, op.p[0], step.token, op.m, result(op, 1));
}

// p: x, weight, bias, y. LayerNorm of m numbers.
static void norm(const Op& op) {
    float* y = result(op, 3);
    normalize(floats(op, 0), y, op.m, float(op.eps));
    for (int64_t i = 0; i < op.m; i += LANES)
        store(y + i, load(y + i) * load(floats(op, 1) + i) + load(floats(op, 2) + i));
}

// p: x, shares [n, m], changes [n, m] or null, y [n, m]. Token shift: y = x + (previous - x) (share + change), and x is
// the previous token of the next.
static void mix(const Op& op, const Step& step) {
    const float *x = floats(op, 0), *changes = floats(op, 2), *previous = step.before + op.state;
    for (int64_t i = 0; i < op.m; i += LANES) {
        const vec own = load(x + i), delta = load(previous + i) - own;
        for (int64_t at = i; at < op.n * op.m; at += op.m) {
            vec share = load(floats(op, 1) + at);
            if (changes) share += load(changes + at);
            store(result(op, 3) + at, own + delta * share);
        }
        store(step.next + op.state + i, own);
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

INLINE float product_int8(const int8_t* row, const float* x, int64_t n) {
    vec sums[SUMS] = {};
    int64_t i = 0;
    for (; i + SUMS * LANES <= n; i += SUMS * LANES)
        for (int s = 0; s < SUMS; s++) sums[s] += from_int8(row + i + s * LANES) * load(x + i + s * LANES);
    float rest = 0;
    for (; i < n; i++) rest += row[i] * x[i];
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// n a multiple of 64, of which each has a scale; a byte holds two codes, the first in its high half. table: the values
// of the 16 codes, and then those of all 256 bytes, in pairs.
INLINE float product_4bits(const uint8_t* row, const float* scales, const float* table, const float* x, int64_t n) {
    vec total = {};
    for (int64_t block = 0; block < n / 64; block++, row += 32, x += 64) {
        vec sums[2] = {};
#if LANES == 16
        // x comes as of bfloat16: of 32 numbers first those of high halves. A code selects one of 16 values.
        const __m512 values = _mm512_loadu_ps(table);
        for (int half = 0; half < 2; half++) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + 16 * half));
            const __m512i codes = _mm512_cvtepu8_epi32(bytes);  // of which only the last four bits select
            const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
            const __m512 low = _mm512_permutexvar_ps(codes, values);
            sums[0] += reinterpret_cast<vec>(high) * load(x + 32 * half);
            sums[1] += reinterpret_cast<vec>(low) * load(x + 32 * half + 16);
        }
#else
        float values[64];
        for (int64_t i = 0; i < 32; i++) memcpy(values + 2 * i, table + 16 + 2 * row[i], 2 * sizeof(float));
        for (int64_t i = 0; i < 64; i += 2 * LANES)
            for (int s = 0; s < 2; s++) sums[s] += load(values + i + s * LANES) * load(x + i + s * LANES);
#endif
        total += (sums[0] + sums[1]) * scales[block];
    }
    return sum(total);
}

INLINE bool paired(int kind) { return kind == BFLOAT16 || (kind == FOUR_BITS && LANES == 16); }

INLINE float row_product(const Op& op, int64_t row, const float* x) {
    const int64_t at = row * op.n;
    const float* scales = floats(op, 3);
    switch (op.kind) {
        case FLOAT32: return product_float(static_cast<const float*>(op.p[0]) + at, x, op.n);
        case BFLOAT16: return product_bfloat16(static_cast<const uint16_t*>(op.p[0]) + at, x, op.n);
        case INT8: return product_int8(static_cast<const int8_t*>(op.p[0]) + at, x, op.n) * scales[row];
        default:
            return product_4bits(static_cast<const uint8_t*>(op.p[0]) + at / 2, scales + at / 64, floats(op, 4), x, op.n);
    }
}

// p: W [m, n], x, y, scales, table, room for n numbers. y = W x.
static void rows(const Op& op, const Step& step) {
    const float* x = floats(op, 1);
    if (paired(op.kind)) {
        // Of float, with which bfloat16's preparation begins too.
        float* room = result(op, 5);
        for (int64_t i = 0; i < op.n; i++) room[i] = x[i];
        pair_up(room, op.n);
        x = room;
    }
    float* y = result(op, 2);
    const bool parallel = step.threads > 1 && op.m * op.n >= PARALLEL;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t begin = 0; begin < op.m; begin += BLOCK)
        for (int64_t row = begin; row < begin + BLOCK && row < op.m; row++) {
            const float product = row_product(op, row, x);
            y[row] = op.add ? y[row] + product : product;
        }
    activate(op.after, y, op.m);
}

// Columns begin to end of x^T W.
static void some_columns(const Op& op, int64_t begin, int64_t end) {
    const float* x = floats(op, 1);
    float* y = result(op, 2);
    constexpr int VECTORS = COLUMNS / LANES;
    int64_t column = begin;
    if (end - begin == COLUMNS) {
        vec sums[VECTORS] = {};
        for (int64_t i = 0; i < op.n; i++)
            for (int v = 0; v < VECTORS; v++) sums[v] += load(op.kind, op.p[0], i * op.m + column + v * LANES) * x[i];
        for (int v = 0; v < VECTORS; v++) {
            float* at = y + column + v * LANES;
            store(at, op.add ? load(at) + sums[v] : sums[v]);
        }
        return;
    }
    for (; column + LANES <= end; column += LANES) {
        vec total = {};
        for (int64_t i = 0; i < op.n; i++) total += load(op.kind, op.p[0], i * op.m + column) * x[i];
        store(y + column, op.add ? load(y + column) + total : total);
    }
    for (; column < end; column++) {
        float total = 0, one;
        for (int64_t i = 0; i < op.n; i++) {
            read_row(op.kind, op.p[0], i * op.m + column, 1, &one);
            total += one * x[i];
        }
        y[column] = op.add ? y[column] + total : total;
    }
}

// p: W [n, m], x, y. y = x^T W.
static void column_sums(const Op& op, const Step& step) {
    const bool parallel = step.threads > 1 && op.m * op.n >= PARALLEL;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t begin = 0; begin < op.m; begin += COLUMNS)
        some_columns(op, begin, begin + COLUMNS < op.m ? begin + COLUMNS : op.m);
    activate(op.after, result(op, 2), op.m);
}

// p: x, y. The sum of the blocks of m of x's n numbers; the last may be shorter.
static void fold(const Op& op) {
    float* y = result(op, 1);
    for (int64_t i = 0; i < op.m; i++) y[i] = 0;
    for (int64_t begin = 0; begin < op.n; begin += op.m)
        for (int64_t i = 0; i < op.m && begin + i < op.n; i++) y[i] += floats(op, 0)[begin + i];
}

// p: r, k, v, pw, pa, pv, g, v_first, w0, a0, v0, k_k, k_a, r_k, ln weight, ln bias, z; m heads of n channels. RWKV-7's
// time mix between its projections, as in regions/twins.py (pre7, post7) and wkv7_head.h. pv null: the first layer,
// which leaves its v in v_first.
static void time7_head(const Op& op, const Step& step, int64_t h) {
    const int64_t N = op.n, at = h * N;
    const float *r = floats(op, 0) + at, *k0 = floats(op, 1) + at, *v0 = floats(op, 2) + at;
    float k[LARGEST_HEAD], v[LARGEST_HEAD], a[LARGEST_HEAD], b[LARGEST_HEAD], decay[LARGEST_HEAD], y[LARGEST_HEAD];
    float* v_first = result(op, 7) + at;
    vec length = {}, agreement = {};
    for (int64_t j = 0; j < N; j += LANES) {
        const vec key = load(k0 + j), rate = sigmoid(load(floats(op, 9) + at + j) + load(floats(op, 4) + at + j));
        const vec scaled = key * load(floats(op, 11) + at + j);
        length += scaled * scaled;
        store(a + j, scaled);
        store(b + j, rate);
        const vec weaker = key * (1.0f + (rate - 1.0f) * load(floats(op, 12) + at + j));
        store(k + j, weaker);
        agreement += load(r + j) * weaker * load(floats(op, 13) + at + j);
        store(decay + j, exp(sigmoid(load(floats(op, 8) + at + j) + load(floats(op, 3) + at + j)) * -DECAY_SCALE));
        const vec value = load(v0 + j);
        if (op.p[5]) {
            const vec open = sigmoid(load(floats(op, 10) + at + j) + load(floats(op, 5) + at + j));
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
    const float* S = step.before + op.state + at * N;
    float* next = step.next + op.state + at * N;
    for (int64_t i = 0; i < N; i++, S += N, next += N) {
        vec seen = {}, out = {};
        for (int64_t j = 0; j < N; j += LANES) seen += load(S + j) * load(a + j);
        const float sa = sum(seen), value = v[i];
        for (int64_t j = 0; j < N; j += LANES) {
            const vec s = load(S + j) * load(decay + j) + sa * load(b + j) + value * load(k + j);
            store(next + j, s);
            out += s * load(r + j);
        }
        y[i] = sum(out);
    }
    normalize(y, y, N, float(op.eps));
    const float bonus = sum(agreement);
    for (int64_t j = 0; j < N; j += LANES) {
        const vec normal = load(y + j) * load(floats(op, 14) + at + j) + load(floats(op, 15) + at + j);
        store(result(op, 16) + at + j, (normal + bonus * load(v + j)) * load(floats(op, 6) + at + j));
    }
}

// p: r, k, v, gate, pw or null, time_decay, u, ln weight, ln bias, z; m heads of n channels. The same of RWKV-5 and 6.
static void time6_head(const Op& op, const Step& step, int64_t h) {
    const int64_t N = op.n, at = h * N;
    const float *r = floats(op, 0) + at, *k = floats(op, 1) + at, *v = floats(op, 2) + at;
    float decay[LARGEST_HEAD], y[LARGEST_HEAD];
    vec own = {};
    for (int64_t j = 0; j < N; j += LANES) {
        vec w = load(floats(op, 5) + at + j);
        if (op.p[4]) w += load(floats(op, 4) + at + j);
        store(decay + j, exp(-exp(w)));
        own += load(r + j) * load(k + j) * load(floats(op, 6) + at + j);
    }
    const float bonus = sum(own);
    const float* S = step.before + op.state + at * N;
    float* next = step.next + op.state + at * N;
    for (int64_t i = 0; i < N; i++, S += N, next += N) {
        vec out = {};
        for (int64_t j = 0; j < N; j += LANES) {
            const vec s = load(S + j);
            out += s * load(r + j);
            store(next + j, s * load(decay + j) + v[i] * load(k + j));
        }
        y[i] = sum(out) + v[i] * bonus;
    }
    normalize(y, y, N, float(op.eps));
    for (int64_t j = 0; j < N; j += LANES) {
        const vec gate = load(floats(op, 3) + at + j);
        const vec normal = load(y + j) * load(floats(op, 7) + at + j) + load(floats(op, 8) + at + j);
        store(result(op, 9) + at + j, normal * gate * sigmoid(gate));
    }
}

static void heads(const Op& op, const Step& step) {
    const bool parallel = step.threads > 1 && op.m * op.n * op.n >= PARALLEL;
#pragma omp parallel for num_threads(step.threads) schedule(static) if (parallel)
    for (int64_t h = 0; h < op.m; h++)
        if (op.code == TIME7)
            time7_head(op, step, h);
        else
            time6_head(op, step, h);
}

// p: gate, value, y. y += sigmoid(gate) value.
static void gate(const Op& op) {
    for (int64_t i = 0; i < op.m; i += LANES)
        store(result(op, 2) + i, load(result(op, 2) + i) + sigmoid(load(floats(op, 0) + i)) * load(floats(op, 1) + i));
}

static bool run_op(const Op& op, const Step& step) {
    switch (op.code) {
        case EMBED: embed(op, step); return true;
        case NORM: norm(op); return true;
        case MIX: mix(op, step); return true;
        case ROWS: rows(op, step); return true;
        case COLUMN_SUMS: column_sums(op, step); return true;
        case FOLD: fold(op); return true;
        case TIME7:
        case TIME6: heads(op, step); return true;
        case GATE: gate(op); return true;
        default: return false;
    }
}
