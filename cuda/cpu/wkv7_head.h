// RWKV-7's recurrence for one head, forward and backward. Included once per instruction set: see levels.h.
//
//   decay = exp(-exp(-1/2) sigmoid(w))
//   sa_t = S_{t-1} a_t;  S_t = S_{t-1} diag(decay_t) + sa_t b_t^T + v_t k_t^T;  y_t = S_t r_t
//
// S has a row per value index and a column per key index. Time is cut into segments of SEGMENT steps. The forward pass
// keeps S transposed, so that a vector runs over value indices and nothing is summed across lanes; it leaves S at the
// start of each segment, and sa, for the backward pass. That one remakes the states of a segment from there, exactly,
// with a vector running over key indices, since most of its sums go over value indices.

// One step's rows as float, [N] each. Steps lie one after the other, each with all of its rows: arrays by name would
// start at the same cache sets and evict each other.
struct Step {
    float *r, *k, *v, *a, *b, *decay, *slope, *dy;
    Step(float* steps, int64_t t, int64_t N) {
        float* p = steps + t * STEP_ROWS * N;
        for (float** row : {&r, &k, &v, &a, &b, &decay, &slope, &dy}) {
            *row = p;
            p += N;
        }
    }
};

// The type of w and dw.
INLINE int decay_type(const Wkv7& p) { return p.w0 ? p.dtype : FLOAT32; }

// Reads a head's n steps from row `first` of the [B, T, H, N] tensors on, and leaves a step of zero a after them.
// slope = d decay / d w / decay.
INLINE void read_segment(const Wkv7& p, int64_t h, int64_t first, int64_t n, const void* dy, float* steps) {
    const int64_t N = p.N;
    for (int64_t t = 0; t < n; t++) {
        const int64_t row = first + t * p.H;
        const Step step(steps, t, N);
        read_row(p.dtype, p.r, row, N, step.r);
        read_row(p.dtype, p.k, row, N, step.k);
        read_row(p.dtype, p.v, row, N, step.v);
        read_row(p.dtype, p.a, row, N, step.a);
        read_row(p.dtype, p.b, row, N, step.b);
        if (dy) read_row(p.dtype, dy, row, N, step.dy);
        for (int64_t j = 0; j < N; j += LANES) {
            const vec w = load(decay_type(p), p.w, row * N + j);
            const vec e = exp(p.w0 ? -w - load(p.w0 + h * N + j) : -w);
            const vec sigmoid = 1.0f / (1.0f + e);
            store(step.decay + j, exp(sigmoid * -DECAY_SCALE));
            store(step.slope + j, sigmoid * (e * sigmoid) * -DECAY_SCALE);
        }
    }
    memset(Step(steps, n, N).a, 0, N * sizeof(float));
}

// n steps for the TILE vectors of value indices that start at x; S [key][value]. Each pass over S also gathers
// the next step's sa.
template <int TILE>
INLINE void forward_tile(float* steps, int64_t n, int64_t N, int64_t x, float* S, float* y, float* sa_out) {
    vec sa[TILE] = {};
    for (int64_t j = 0; j < N; j++)
        for (int i = 0; i < TILE; i++) sa[i] += load(S + j * N + x + i * LANES) * Step(steps, 0, N).a[j];
    for (int64_t t = 0; t < n; t++) {
        const Step step(steps, t, N);
        const float* a_next = Step(steps, t + 1, N).a;
        vec v[TILE], out[TILE] = {}, sa_next[TILE] = {};
        for (int i = 0; i < TILE; i++) v[i] = load(step.v + x + i * LANES);
        for (int64_t j = 0; j < N; j++)
            for (int i = 0; i < TILE; i++) {
                float* at = S + j * N + x + i * LANES;
                const vec s = load(at) * step.decay[j] + sa[i] * step.b[j] + v[i] * step.k[j];
                store(at, s);
                out[i] += s * step.r[j];
                sa_next[i] += s * a_next[j];
            }
        for (int i = 0; i < TILE; i++) {
            store(y + t * N + x + i * LANES, out[i]);
            store(sa_out + t * N + x + i * LANES, sa[i]);
            sa[i] = sa_next[i];
        }
    }
}

template <int64_t FIXED_N>
static void forward_head(const Wkv7& p, const Wkv7Forward& f, const Head& head, float* scratch) {
    const int64_t N = FIXED_N ? FIXED_N : p.N;
    float *S = scratch, *y = S + N * N, *sa = y + SEGMENT * N, *steps = sa + SEGMENT * N;
    if (p.s0)
        transpose(p.s0 + head.index * N * N, S, N);
    else
        memset(S, 0, N * N * sizeof(float));
    for (int64_t t0 = 0; t0 < head.tokens; t0 += SEGMENT) {
        const int64_t n = head.steps(t0), first = head.row(p, t0);
        read_segment(p, head.h, first, n, nullptr, steps);
        if (f.saved) transpose(S, f.saved + head.state(p, t0), N);
        int64_t x = 0;
        for (; x + TILE_FLOATS <= N; x += TILE_FLOATS) forward_tile<TILE_VECTORS>(steps, n, N, x, S, y, sa);
        for (; x < N; x += LANES) forward_tile<1>(steps, n, N, x, S, y, sa);
        for (int64_t t = 0; t < n; t++) write_row(p.dtype, f.y, first + t * p.H, N, y + t * N);
        if (f.saved) memcpy(saved_sa(p, f.saved, head) + t0 * N, sa, n * N * sizeof(float));
    }
    if (f.sT) transpose(S, f.sT + head.index * N * N, N);
}

// The states after each of n steps, from states[0]: [n + 1][value][key], for TILE vectors of key indices from x.
template <int TILE>
INLINE void remake_tile(float* steps, const float* sa, int64_t n, int64_t N, int64_t x, float* states) {
    for (int64_t t = 0; t < n; t++) {
        const Step step(steps, t, N);
        const float* before = states + t * N * N + x;
        float* after = states + (t + 1) * N * N + x;
        vec decay[TILE], b[TILE], k[TILE];
        for (int i = 0; i < TILE; i++) {
            decay[i] = load(step.decay + x + i * LANES);
            b[i] = load(step.b + x + i * LANES);
            k[i] = load(step.k + x + i * LANES);
        }
        for (int64_t row = 0; row < N; row++)
            for (int i = 0; i < TILE; i++)
                store(after + row * N + i * LANES, load(before + row * N + i * LANES) * decay[i] +
                                                       b[i] * sa[t * N + row] + k[i] * step.v[row]);
    }
}

// Adds y's part to dS, then dv = dS k and dsa = dS b.
INLINE void backward_values(const Step& step, int64_t N, float* dS, float* dv, float* dsa) {
    for (int64_t row = 0; row < N; row++) {
        vec with_k = {}, with_b = {};
        for (int64_t j = 0; j < N; j += LANES) {
            const vec d = load(dS + row * N + j) + load(step.r + j) * step.dy[row];
            store(dS + row * N + j, d);
            with_k += d * load(step.k + j);
            with_b += d * load(step.b + j);
        }
        dv[row] = sum(with_k);
        dsa[row] = sum(with_b);
    }
}

struct KeyGradients {
    float *dr, *dw, *dk, *da, *db;  // [N] each
};

// The gradients that sum over value indices, and dS moved one step back, for TILE vectors of key indices from x.
template <int TILE>
INLINE void backward_keys(const Step& step, int64_t N, int64_t x, const float* before, const float* after,
                          const float* sa, const float* dsa, float* dS, const KeyGradients& g) {
    vec dr[TILE] = {}, dlog[TILE] = {}, dk[TILE] = {}, da[TILE] = {}, db[TILE] = {};
    for (int64_t row = 0; row < N; row++)
        for (int i = 0; i < TILE; i++) {
            const int64_t j = x + i * LANES, at = row * N + j;
            const vec d = load(dS + at), s = load(before + at);
            dr[i] += load(after + at) * step.dy[row];
            dlog[i] += d * s;
            dk[i] += d * step.v[row];
            db[i] += d * sa[row];
            da[i] += s * dsa[row];
            store(dS + at, d * load(step.decay + j) + load(step.a + j) * dsa[row]);
        }
    for (int i = 0; i < TILE; i++) {
        const int64_t j = x + i * LANES;
        store(g.dr + j, dr[i]);
        store(g.dw + j, dlog[i] * load(step.decay + j) * load(step.slope + j));
        store(g.dk + j, dk[i]);
        store(g.da + j, da[i]);
        store(g.db + j, db[i]);
    }
}

template <int64_t FIXED_N>
static void backward_head(const Wkv7& p, const Wkv7Backward& g, const Head& head, float* scratch) {
    const int64_t N = FIXED_N ? FIXED_N : p.N;
    float *dS = scratch, *states = dS + N * N, *line = states + (SEGMENT + 1) * N * N;
    float *dv = line, *dsa = line + N, *steps = line + 7 * N;
    const KeyGradients keys = {line + 2 * N, line + 3 * N, line + 4 * N, line + 5 * N, line + 6 * N};
    if (g.dsT)
        memcpy(dS, g.dsT + head.index * N * N, N * N * sizeof(float));
    else
        memset(dS, 0, N * N * sizeof(float));
    for (int64_t t0 = head.last_segment(); t0 >= 0; t0 -= SEGMENT) {
        const int64_t n = head.steps(t0), first = head.row(p, t0);
        const float* segment_sa = saved_sa(p, g.saved, head) + t0 * N;
        read_segment(p, head.h, first, n, g.dy, steps);
        memcpy(states, g.saved + head.state(p, t0), N * N * sizeof(float));
        int64_t x = 0;
        for (; x + TILE_FLOATS <= N; x += TILE_FLOATS) remake_tile<TILE_VECTORS>(steps, segment_sa, n, N, x, states);
        for (; x < N; x += LANES) remake_tile<1>(steps, segment_sa, n, N, x, states);
        for (int64_t t = n - 1; t >= 0; t--) {
            const float *before = states + t * N * N, *after = before + N * N, *sa = segment_sa + t * N;
            const Step step(steps, t, N);
            backward_values(step, N, dS, dv, dsa);
            for (x = 0; x + TILE_FLOATS <= N; x += TILE_FLOATS)
                backward_keys<TILE_VECTORS>(step, N, x, before, after, sa, dsa, dS, keys);
            for (; x < N; x += LANES) backward_keys<1>(step, N, x, before, after, sa, dsa, dS, keys);
            const int64_t row = first + t * p.H;
            write_row(p.dtype, g.dr, row, N, keys.dr);
            write_row(decay_type(p), g.dw, row, N, keys.dw);
            write_row(p.dtype, g.dk, row, N, keys.dk);
            write_row(p.dtype, g.dv, row, N, dv);
            write_row(p.dtype, g.da, row, N, keys.da);
            write_row(p.dtype, g.db, row, N, keys.db);
        }
    }
    if (g.ds0) memcpy(g.ds0 + head.index * N * N, dS, N * N * sizeof(float));
}
