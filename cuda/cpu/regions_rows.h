// The regions' arithmetic on a tile of rows. Included once per instruction set: see levels.h. What the problems hold is
// in regions.cpp; what the formulas are is in src/rwkv_bone/ops/regions/twins.py, in PyTorch.
//
// DTYPE is the activations' type. FIXED is the head size, or the number of lerps, if the code knows it as a constant;
// otherwise it is 0.

// Makes name of name_tile<DTYPE, FIXED>: FIXED is p.size if that is the usual one.
#define KERNEL(name, Problem, size, usual)                                                     \
    template <int DTYPE>                                                                       \
    INLINE void name##_typed(const Problem& p, int64_t begin, int64_t end, const Room& room) { \
        if (p.size == usual)                                                                   \
            name##_tile<DTYPE, usual>(p, begin, end, room);                                    \
        else                                                                                   \
            name##_tile<DTYPE, 0>(p, begin, end, room);                                        \
    }                                                                                          \
    static void name(const Problem& p, int64_t begin, int64_t end, const Room& room) {         \
        if (p.dtype == FLOAT32)                                                                \
            name##_typed<FLOAT32>(p, begin, end, room);                                        \
        else                                                                                   \
            name##_typed<BFLOAT16>(p, begin, end, room);                                       \
    }

// The same of name_head<DTYPE, FIXED>, which does one head of one row: `at` is the head's place in the activations, `c`
// its place in the parameters and in the sums.
#define HEAD_KERNEL(name, Problem)                                                                       \
    template <int DTYPE, int64_t FIXED>                                                                  \
    INLINE void name##_tile(const Problem& all, int64_t begin, int64_t end, const Room& room) {          \
        const Problem p = all;                                                                           \
        const int64_t N = FIXED ? FIXED : p.N;                                                           \
        for (int64_t t = begin; t < end; t++)                                                            \
            for (int64_t h = 0; h < p.H; h++)                                                            \
                name##_head<DTYPE, FIXED>(p, N, (t * p.H + h) * N, h * N, room.sums);                    \
    }                                                                                                    \
    KERNEL(name, Problem, N, 64)

// Room for the vectors of a head.
#define HEAD_VECTORS ((FIXED ? FIXED : LARGEST_N) / LANES)

INLINE vec sigmoid(vec x) { return 1.0f / (1.0f + exp(-x)); }

INLINE void add(float* sums, vec x) { store(sums, load(sums) + x); }

// Reads and writes LANES numbers, or the first `count` of them at the end of a row.
struct Whole {
    int64_t count = LANES;
};
struct Part {
    int64_t count;
};

INLINE vec read(Whole, int dtype, const void* tensor, int64_t at) { return load(dtype, tensor, at); }
INLINE void write(Whole, int dtype, void* tensor, int64_t at, vec x) { store(dtype, tensor, at, x); }

INLINE vec read(Part part, int dtype, const void* tensor, int64_t at) {
    float numbers[LANES] = {};
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    memcpy(numbers, static_cast<const char*>(tensor) + at * size, part.count * size);
    return load(dtype, numbers, 0);
}

INLINE void write(Part part, int dtype, void* tensor, int64_t at, vec x) {
    float numbers[LANES];
    const int64_t size = dtype == FLOAT32 ? 4 : 2;
    store(dtype, numbers, 0, x);
    memcpy(static_cast<char*>(tensor) + at * size, numbers, part.count * size);
}

// ---- Token shift and lerps: out_m = x + (previous - x) share_m

template <int DTYPE, class Lanes>
INLINE vec share_of(const Mix& p, int64_t m, int64_t at, int64_t c, Lanes lanes) {
    const vec share = read(lanes, FLOAT32, p.shares, m * p.C + c);
    return p.changes ? share + read(lanes, DTYPE, p.changes, m * p.B * p.T * p.C + at + c) : share;
}

// previous - x for the row at `at`. start: which sequence begins there, or -1.
template <int DTYPE, class Lanes>
INLINE vec delta_of(const Mix& p, int64_t start, int64_t at, int64_t c, vec x, Lanes lanes) {
    if (start < 0) return read(lanes, DTYPE, p.x, at - p.C + c) - x;
    return start < p.carried ? read(lanes, DTYPE, p.last, start * p.C + c) - x : -x;
}

template <int DTYPE, int64_t FIXED, class Lanes>
INLINE void mix_forward_lanes(const MixForward& p, int64_t start, int64_t at, int64_t c, Lanes lanes) {
    const vec x = read(lanes, DTYPE, p.x, at + c), delta = delta_of<DTYPE>(p, start, at, c, x, lanes);
    for (int64_t m = 0; m < (FIXED ? FIXED : p.M); m++)
        write(lanes, DTYPE, p.out[m], at + c, x + delta * share_of<DTYPE>(p, m, at, c, lanes));
}

template <int DTYPE, int64_t FIXED>
INLINE void mix_forward_tile(const MixForward& all, int64_t begin, int64_t end, const Room&) {
    const MixForward p = all;
    int64_t starts[TILE + 1];
    find_starts(p, begin, end, starts);
    for (int64_t t = begin; t < end; t++) {
        int64_t c = 0;
        for (; c + LANES <= p.C; c += LANES)
            mix_forward_lanes<DTYPE, FIXED>(p, starts[t - begin], t * p.C, c, Whole{});
        if (c < p.C) mix_forward_lanes<DTYPE, FIXED>(p, starts[t - begin], t * p.C, c, Part{p.C - c});
    }
}

KERNEL(mix_forward, MixForward, M, 6)

// What the row at `at` passes on to the row before it.
template <int DTYPE, int64_t FIXED, class Lanes>
INLINE vec passed_on(const MixBackward& p, int64_t at, int64_t c, Lanes lanes) {
    vec sum = {};
    for (int64_t m = 0; m < (FIXED ? FIXED : p.M); m++)
        sum += read(lanes, DTYPE, p.grads[m], at + c) * share_of<DTYPE>(p, m, at, c, lanes);
    return sum;
}

// One row, after the one behind it has left in `passed` what it passes on.
template <int DTYPE, int64_t FIXED, class Lanes>
INLINE void mix_backward_lanes(const MixBackward& p, int64_t start, int64_t at, int64_t c, float* sums, float* passed,
                               Lanes lanes) {
    vec x = {}, delta = {}, kept = {}, passes = {};
    const bool with_delta = sums || p.dchanges;
    if (with_delta) {
        x = read(lanes, DTYPE, p.x, at + c);
        delta = delta_of<DTYPE>(p, start, at, c, x, lanes);
    }
    for (int64_t m = 0; m < (FIXED ? FIXED : p.M); m++) {
        const vec g = read(lanes, DTYPE, p.grads[m], at + c), share = share_of<DTYPE>(p, m, at, c, lanes);
        kept += g - g * share;
        passes += g * share;
        if (sums) {
            const int64_t place = m * p.C + c;
            write(lanes, FLOAT32, sums, place, read(lanes, FLOAT32, sums, place) + g * delta);
        }
        if (p.dchanges) write(lanes, DTYPE, p.dchanges, m * p.B * p.T * p.C + at + c, g * delta);
    }
    write(lanes, DTYPE, p.dx, at + c, kept + read(lanes, FLOAT32, passed, c));
    if (start >= 0 && start < p.dlast_rows) write(lanes, FLOAT32, p.dlast, start * p.C + c, passes);
    write(lanes, FLOAT32, passed, c, start < 0 ? passes : vec{});
}

template <int DTYPE, int64_t FIXED>
INLINE void mix_backward_tile(const MixBackward& all, int64_t begin, int64_t end, const Room& room) {
    const MixBackward p = all;
    int64_t starts[TILE + 1], c = 0;
    find_starts(p, begin, end, starts);
    if (end == p.B * p.T || starts[end - begin] >= 0) {
        memset(room.line, 0, p.C * sizeof(float));
    } else {
        for (; c + LANES <= p.C; c += LANES) store(room.line + c, passed_on<DTYPE, FIXED>(p, end * p.C, c, Whole{}));
        const Part rest = {p.C - c};
        if (c < p.C) write(rest, FLOAT32, room.line, c, passed_on<DTYPE, FIXED>(p, end * p.C, c, rest));
    }
    for (int64_t t = end - 1; t >= begin; t--) {
        const int64_t start = starts[t - begin], at = t * p.C;
        for (c = 0; c + LANES <= p.C; c += LANES)
            mix_backward_lanes<DTYPE, FIXED>(p, start, at, c, room.sums, room.line, Whole{});
        if (c < p.C) mix_backward_lanes<DTYPE, FIXED>(p, start, at, c, room.sums, room.line, Part{p.C - c});
    }
}

KERNEL(mix_backward, MixBackward, M, 6)

// ---- relu(h)^2. A NaN stays one.

INLINE vec relu(vec x) { return x < 0.0f ? vec{} : x; }

template <int DTYPE, bool BACKWARD, class Lanes>
INLINE void relu_square_lanes(const ReluSquare& p, int64_t at, Lanes lanes) {
    const vec positive = relu(read(lanes, DTYPE, p.h, at));
    write(lanes, DTYPE, p.out, at, positive * (BACKWARD ? 2.0f * read(lanes, DTYPE, p.g, at) : positive));
}

template <int DTYPE, bool BACKWARD>
INLINE void relu_square_tile(const ReluSquare& all, int64_t begin, int64_t end) {
    const ReluSquare p = all;
    const int64_t stop = end * LINE < p.count ? end * LINE : p.count;
    int64_t at = begin * LINE;
    for (; at + LANES <= stop; at += LANES) relu_square_lanes<DTYPE, BACKWARD>(p, at, Whole{});
    if (at < stop) relu_square_lanes<DTYPE, BACKWARD>(p, at, Part{stop - at});
}

template <bool BACKWARD>
static void relu_square(const ReluSquare& p, int64_t begin, int64_t end, const Room&) {
    p.dtype == FLOAT32 ? relu_square_tile<FLOAT32, BACKWARD>(p, begin, end)
                       : relu_square_tile<BFLOAT16, BACKWARD>(p, begin, end);
}

// ---- RWKV-7, before the operator

// The removal key before it has length 1, and the in-context learning rate. Returns the key's length.
template <int DTYPE>
INLINE float keys_and_rates(const Pre7& p, int64_t N, int64_t at, int64_t c, vec* keys, vec* rates) {
    vec squares = {};
    for (int64_t i = 0; i < N; i += LANES) {
        const vec key = load(DTYPE, p.k0, at + i) * load(p.k_k + c + i);
        squares += key * key;
        keys[i / LANES] = key;
        rates[i / LANES] = sigmoid(load(p.a0 + c + i) + load(DTYPE, p.pa, at + i));
    }
    return __builtin_sqrtf(sum(squares));
}

INLINE float inverse_length(float length) { return 1.0f / (length < SHORTEST ? SHORTEST : length); }

// How much of the first layer's value is mixed in.
template <int DTYPE>
INLINE vec value_gate(const Pre7& p, int64_t at, int64_t c) {
    return sigmoid(load(p.v0_bias + c) + load(DTYPE, p.pv, at));
}

template <int DTYPE, int64_t FIXED>
INLINE void pre7_forward_head(const Pre7Forward& p, int64_t N, int64_t at, int64_t c, float*) {
    vec keys[HEAD_VECTORS], rates[HEAD_VECTORS];
    const float scale = inverse_length(keys_and_rates<DTYPE>(p, N, at, c, keys, rates));
    for (int64_t i = 0; i < N; i += LANES) {
        const vec kk = keys[i / LANES] * scale, rate = rates[i / LANES], k0 = load(DTYPE, p.k0, at + i);
        store(DTYPE, p.a, at + i, -kk);
        store(DTYPE, p.b, at + i, kk * rate);
        store(DTYPE, p.k, at + i, k0 * (1.0f + (rate - 1.0f) * load(p.k_a + c + i)));
    }
    if (p.w)
        for (int64_t i = 0; i < N; i += LANES)
            store(p.w + at + i, load(p.w0 + c + i) + load(DTYPE, p.pw, at + i));
    if (p.pv)
        for (int64_t i = 0; i < N; i += LANES) {
            const vec v0 = load(DTYPE, p.v0, at + i), first = load(DTYPE, p.v_first, at + i);
            store(DTYPE, p.v, at + i, v0 + (first - v0) * value_gate<DTYPE>(p, at + i, c + i));
        }
}

HEAD_KERNEL(pre7_forward, Pre7Forward)

// Key, removal key and learning rate. sums: of k_k, k_a and a0.
template <int DTYPE, int64_t FIXED>
INLINE void pre7_backward_keys(const Pre7Backward& p, int64_t N, int64_t at, int64_t c, float* d_k_k, float* d_k_a,
                               float* d_a0) {
    vec keys[HEAD_VECTORS], rates[HEAD_VECTORS], dkks[HEAD_VECTORS], along = {};
    const float length = keys_and_rates<DTYPE>(p, N, at, c, keys, rates), scale = inverse_length(length);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec kk = keys[i / LANES] * scale;
        const vec dkk = load(DTYPE, p.db, at + i) * rates[i / LANES] - load(DTYPE, p.da, at + i);
        along += dkk * kk;
        keys[i / LANES] = kk;
        dkks[i / LANES] = dkk;
    }
    // A key below the shortest length is divided by a constant.
    const float projection = length < SHORTEST ? 0.0f : sum(along);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec kk = keys[i / LANES], rate = rates[i / LANES];
        const vec k0 = load(DTYPE, p.k0, at + i), k_a = load(p.k_a + c + i);
        const vec dk = load(DTYPE, p.dk, at + i) + load(DTYPE, p.dk_bonus, at + i);
        const vec dkey = (dkks[i / LANES] - kk * projection) * scale;
        const vec drate = load(DTYPE, p.db, at + i) * kk + dk * k0 * k_a;
        const vec dpa = drate * rate * (1.0f - rate);
        store(DTYPE, p.dpa, at + i, dpa);
        store(DTYPE, p.dk0, at + i, dk * (1.0f + (rate - 1.0f) * k_a) + dkey * load(p.k_k + c + i));
        if (d_k_k) {
            add(d_k_k + c + i, dkey * k0);
            add(d_k_a + c + i, dk * k0 * (rate - 1.0f));
            add(d_a0 + c + i, dpa);
        }
    }
}

// The mix with the first layer's value.
template <int DTYPE>
INLINE void pre7_backward_values(const Pre7Backward& p, int64_t N, int64_t at, int64_t c, float* d_v0_bias) {
    for (int64_t i = 0; i < N; i += LANES) {
        const vec dv = load(DTYPE, p.dv, at + i) + load(DTYPE, p.dv_bonus, at + i);
        if (!p.pv) {
            store(DTYPE, p.dv0, at + i, dv);
            continue;
        }
        const vec gate = value_gate<DTYPE>(p, at + i, c + i), dfirst = dv * gate;
        const vec dpv = dfirst * (1.0f - gate) * (load(DTYPE, p.v_first, at + i) - load(DTYPE, p.v0, at + i));
        store(DTYPE, p.dv_first, at + i, dfirst);
        store(DTYPE, p.dv0, at + i, dv - dfirst);
        store(DTYPE, p.dpv, at + i, dpv);
        if (d_v0_bias) add(d_v0_bias + c + i, dpv);
    }
}

// Sums: w0, a0, v0_bias, k_k, k_a.
template <int DTYPE, int64_t FIXED>
INLINE void pre7_backward_head(const Pre7Backward& p, int64_t N, int64_t at, int64_t c, float* sums) {
    const int64_t C = p.H * N;
    const int dw_type = p.wide_dw ? FLOAT32 : DTYPE;
    for (int64_t i = 0; i < N; i += LANES) {
        const vec dw = load(dw_type, p.dw, at + i);
        store(DTYPE, p.dpw, at + i, dw);
        if (sums) add(sums + c + i, dw);
    }
    pre7_backward_keys<DTYPE, FIXED>(p, N, at, c, sums ? sums + 3 * C : nullptr, sums + 4 * C, sums + C);
    pre7_backward_values<DTYPE>(p, N, at, c, sums ? sums + 2 * C : nullptr);
}

HEAD_KERNEL(pre7_backward, Pre7Backward)

// ---- GroupNorm over a head, and what follows it

// y with mean 0 and variance 1. Returns the factor that made it so.
template <int DTYPE>
INLINE float normalize(const Norm& p, int64_t N, int64_t at, vec* y) {
    vec total = {}, squares = {};
    for (int64_t i = 0; i < N; i += LANES) {
        y[i / LANES] = load(DTYPE, p.y, at + i);
        total += y[i / LANES];
    }
    const float mean = sum(total) / N;
    for (int64_t i = 0; i < N; i += LANES) {
        y[i / LANES] -= mean;
        squares += y[i / LANES] * y[i / LANES];
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / N + p.eps);
    for (int64_t i = 0; i < N; i += LANES) y[i / LANES] *= scale;
    return scale;
}

// dy, from the normalised y and what reaches it.
template <int DTYPE>
INLINE void normalize_backward(int64_t N, int64_t at, const vec* y, const vec* d, float scale, void* dy) {
    vec total = {}, along = {};
    for (int64_t i = 0; i < N; i += LANES) {
        total += d[i / LANES];
        along += d[i / LANES] * y[i / LANES];
    }
    const float mean = sum(total) / N, slope = sum(along) / N;
    for (int64_t i = 0; i < N; i += LANES)
        store(DTYPE, dy, at + i, (d[i / LANES] - mean - y[i / LANES] * slope) * scale);
}

// How much r, k and r_k agree: the share of the current token's own value.
template <int DTYPE>
INLINE float bonus_share(const Post7& p, int64_t N, int64_t at, int64_t c) {
    vec total = {};
    for (int64_t i = 0; i < N; i += LANES)
        total += load(DTYPE, p.r, at + i) * load(DTYPE, p.k, at + i) * load(p.r_k + c + i);
    return sum(total);
}

template <int DTYPE, int64_t FIXED>
INLINE void post7_forward_head(const Post7Forward& p, int64_t N, int64_t at, int64_t c, float*) {
    vec y[HEAD_VECTORS];
    normalize<DTYPE>(p, N, at, y);
    const float share = bonus_share<DTYPE>(p, N, at, c);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec normed = y[i / LANES] * load(p.weight + c + i) + load(p.bias + c + i);
        store(DTYPE, p.z, at + i, (normed + load(DTYPE, p.v, at + i) * share) * load(DTYPE, p.g, at + i));
    }
}

HEAD_KERNEL(post7_forward, Post7Forward)

// Sums: r_k, weight, bias.
template <int DTYPE, int64_t FIXED>
INLINE void post7_backward_head(const Post7Backward& p, int64_t N, int64_t at, int64_t c, float* sums) {
    const int64_t C = p.H * N;
    vec y[HEAD_VECTORS], d[HEAD_VECTORS], shares = {};
    const float scale = normalize<DTYPE>(p, N, at, y), share = bonus_share<DTYPE>(p, N, at, c);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec dz = load(DTYPE, p.dz, at + i), v = load(DTYPE, p.v, at + i), weight = load(p.weight + c + i);
        const vec normed = y[i / LANES] * weight + load(p.bias + c + i);
        const vec dsum = dz * load(DTYPE, p.g, at + i);  // of norm and bonus
        store(DTYPE, p.dg, at + i, dz * (normed + v * share));
        store(DTYPE, p.dv, at + i, dsum * share);
        shares += dsum * v;
        d[i / LANES] = dsum * weight;
        if (sums) {
            add(sums + C + c + i, dsum * y[i / LANES]);
            add(sums + 2 * C + c + i, dsum);
        }
    }
    const float dshare = sum(shares);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec r = load(DTYPE, p.r, at + i), k = load(DTYPE, p.k, at + i), r_k = load(p.r_k + c + i) * dshare;
        store(DTYPE, p.dr, at + i, k * r_k);
        store(DTYPE, p.dk, at + i, r * r_k);
        if (sums) add(sums + c + i, r * k * dshare);
    }
    normalize_backward<DTYPE>(N, at, y, d, scale, p.dy);
}

HEAD_KERNEL(post7_backward, Post7Backward)

template <int DTYPE, int64_t FIXED>
INLINE void gated_norm_forward_head(const GatedNormForward& p, int64_t N, int64_t at, int64_t c, float*) {
    vec y[HEAD_VECTORS];
    normalize<DTYPE>(p, N, at, y);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec gate = load(DTYPE, p.gate, at + i);
        const vec normed = y[i / LANES] * load(p.weight + c + i) + load(p.bias + c + i);
        store(DTYPE, p.z, at + i, normed * gate * sigmoid(gate));
    }
}

HEAD_KERNEL(gated_norm_forward, GatedNormForward)

// Sums: weight, bias.
template <int DTYPE, int64_t FIXED>
INLINE void gated_norm_backward_head(const GatedNormBackward& p, int64_t N, int64_t at, int64_t c, float* sums) {
    const int64_t C = p.H * N;
    vec y[HEAD_VECTORS], d[HEAD_VECTORS];
    const float scale = normalize<DTYPE>(p, N, at, y);
    for (int64_t i = 0; i < N; i += LANES) {
        const vec gate = load(DTYPE, p.gate, at + i), dz = load(DTYPE, p.dz, at + i), open = sigmoid(gate);
        const vec weight = load(p.weight + c + i), dnormed = dz * gate * open;
        const vec normed = y[i / LANES] * weight + load(p.bias + c + i);
        store(DTYPE, p.dgate, at + i, dz * normed * open * (1.0f + gate * (1.0f - open)));
        d[i / LANES] = dnormed * weight;
        if (sums) {
            add(sums + c + i, dnormed * y[i / LANES]);
            add(sums + C + c + i, dnormed);
        }
    }
    normalize_backward<DTYPE>(N, at, y, d, scale, p.dy);
}

HEAD_KERNEL(gated_norm_backward, GatedNormBackward)
