// RWKV-6's and RWKV-5's recurrence for one head, forward and backward. Included once per instruction set: see levels.h.
//
//   decay = exp(-exp(w))
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t;  S_t = S_{t-1} diag(decay_t) + v_t k_t^T
//
// S has a row per value index and a column per key index. Time is cut into segments of SEGMENT steps. The forward pass
// keeps S transposed, so that a vector runs over value indices and nothing is summed across lanes; it leaves S at the
// start of each segment for the backward pass. That one remakes the states of a segment from there, exactly, with a
// vector running over key indices, since most of its sums go over value indices. Nothing is divided by a decay, which
// may well be 0.

// One step's rows as float, [N] each. slope = d decay / d w. Steps lie one after the other, each with all of its rows:
// arrays by name would start at the same cache sets and evict each other.
struct Step {
    float *r, *k, *v, *decay, *slope, *dy;
    Step(float* steps, int64_t t, int64_t N) {
        float* p = steps + t * STEP_ROWS * N;
        for (float** row : {&r, &k, &v, &decay, &slope, &dy}) {
            *row = p;
            p += N;
        }
    }
};

// Parts of one segment. bonus = sum(r * u * k) and vdy = sum(v * dy), a number per step.
struct Segment {
    float *steps, *bonus, *vdy;
    Segment(float* memory, int64_t N) {
        steps = memory;
        bonus = steps + SEGMENT * STEP_ROWS * N;
        vdy = bonus + SEGMENT;
    }
};

INLINE void read_decay(const float* w, int64_t N, const Step& step) {
    for (int64_t j = 0; j < N; j += LANES) {
        const vec e = exp(load(w + j));
        const vec decay = e > broadcast(87.0f) ? vec{} : exp(-e);  // exp stops at -87
        store(step.decay + j, decay);
        store(step.slope + j, -e * decay);
    }
}

// Reads n steps from row `first` of the [B, T, H, N] tensors on.
INLINE void read_segment(const Wkv6& p, int64_t first, int64_t n, const void* dy, const Segment& to) {
    const int64_t N = p.N, h = first % p.H;
    for (int64_t t = 0; t < n; t++) {
        const int64_t row = first + t * p.H;
        const Step step(to.steps, t, N);
        read_row(p.dtype, p.r, row, N, step.r);
        read_row(p.dtype, p.k, row, N, step.k);
        read_row(p.dtype, p.v, row, N, step.v);
        if (DECAY_PER_TOKEN) {
            read_decay(p.w + row * N, N, step);
        } else if (t == 0) {
            read_decay(p.w + h * N, N, step);
        } else {
            memcpy(step.decay, Step(to.steps, 0, N).decay, N * sizeof(float));
            memcpy(step.slope, Step(to.steps, 0, N).slope, N * sizeof(float));
        }
        vec bonus = {}, vdy = {};
        for (int64_t j = 0; j < N; j += LANES) bonus += load(step.r + j) * load(p.u + h * N + j) * load(step.k + j);
        to.bonus[t] = sum(bonus);
        if (!dy) continue;
        read_row(p.dtype, dy, row, N, step.dy);
        for (int64_t j = 0; j < N; j += LANES) vdy += load(step.v + j) * load(step.dy + j);
        to.vdy[t] = sum(vdy);
    }
}

// n steps for the TILE vectors of value indices that start at x; S [key][value].
template <int TILE>
INLINE void forward_tile(const Segment& segment, int64_t n, int64_t N, int64_t x, float* S, float* y) {
    for (int64_t t = 0; t < n; t++) {
        const Step step(segment.steps, t, N);
        vec v[TILE], out[TILE];
        for (int i = 0; i < TILE; i++) {
            v[i] = load(step.v + x + i * LANES);
            out[i] = v[i] * segment.bonus[t];
        }
        for (int64_t j = 0; j < N; j++)
            for (int i = 0; i < TILE; i++) {
                float* at = S + j * N + x + i * LANES;
                const vec s = load(at);
                out[i] += s * step.r[j];
                store(at, s * step.decay[j] + v[i] * step.k[j]);
            }
        for (int i = 0; i < TILE; i++) store(y + t * N + x + i * LANES, out[i]);
    }
}

template <int64_t FIXED_N>
static void forward_head(const Wkv6& p, const Wkv6Forward& f, const Head& head, float* scratch) {
    const int64_t N = FIXED_N ? FIXED_N : p.N;
    float *S = scratch, *y = S + N * N;
    const Segment segment(y + SEGMENT * N, N);
    if (p.s0)
        transpose(p.s0 + head.index * N * N, S, N);
    else
        memset(S, 0, N * N * sizeof(float));
    for (int64_t t0 = 0; t0 < head.tokens; t0 += SEGMENT) {
        const int64_t n = head.steps(t0), first = head.row(p, t0);
        read_segment(p, first, n, nullptr, segment);
        if (f.saved) transpose(S, f.saved + head.state(p, t0), N);
        int64_t x = 0;
        for (; x + TILE_FLOATS <= N; x += TILE_FLOATS) forward_tile<TILE_VECTORS>(segment, n, N, x, S, y);
        for (; x < N; x += LANES) forward_tile<1>(segment, n, N, x, S, y);
        for (int64_t t = 0; t < n; t++) write_row(p.dtype, f.y, first + t * p.H, N, y + t * N);
    }
    if (f.sT) transpose(S, f.sT + head.index * N * N, N);
}

// The states after each of n steps, from states[0]: [n + 1][value][key], for TILE vectors of key indices from x.
template <int TILE>
INLINE void remake_tile(float* steps, int64_t n, int64_t N, int64_t x, float* states) {
    for (int64_t t = 0; t < n; t++) {
        const Step step(steps, t, N);
        const float* before = states + t * N * N + x;
        float* after = states + (t + 1) * N * N + x;
        vec decay[TILE], k[TILE];
        for (int i = 0; i < TILE; i++) {
            decay[i] = load(step.decay + x + i * LANES);
            k[i] = load(step.k + x + i * LANES);
        }
        for (int64_t row = 0; row < N; row++)
            for (int i = 0; i < TILE; i++)
                store(after + row * N + i * LANES, load(before + row * N + i * LANES) * decay[i] + k[i] * step.v[row]);
    }
}

struct Gradients {
    float *dr, *dw, *dk, *dv, *du;  // [N] each; du, and dw unless DECAY_PER_TOKEN, are added to
};

// One step back for TILE vectors of key indices from x: their gradients, their part of dv, and dS moved to before the
// step. `state` is the one before the step.
template <int TILE>
INLINE void backward_tile(const Step& step, const float* u, float vdy, int64_t N, int64_t x, const float* state,
                          float* dS, const Gradients& g) {
    vec r[TILE], k[TILE], decay[TILE], dr[TILE] = {}, dk[TILE] = {}, d_decay[TILE] = {};
    for (int i = 0; i < TILE; i++) {
        r[i] = load(step.r + x + i * LANES);
        k[i] = load(step.k + x + i * LANES);
        decay[i] = load(step.decay + x + i * LANES);
    }
    for (int64_t row = 0; row < N; row++) {
        vec with_k = {};
        for (int i = 0; i < TILE; i++) {
            const int64_t at = row * N + x + i * LANES;
            const vec d = load(dS + at), s = load(state + at);
            dr[i] += s * step.dy[row];
            dk[i] += d * step.v[row];
            d_decay[i] += d * s;
            with_k += d * k[i];
            store(dS + at, d * decay[i] + r[i] * step.dy[row]);
        }
        g.dv[row] += sum(with_k);
    }
    for (int i = 0; i < TILE; i++) {
        const int64_t j = x + i * LANES;
        const vec own = load(u + j) * vdy, dw = d_decay[i] * load(step.slope + j);
        store(g.dr + j, dr[i] + own * k[i]);
        store(g.dk + j, dk[i] + own * r[i]);
        store(g.du + j, load(g.du + j) + r[i] * k[i] * vdy);
        store(g.dw + j, DECAY_PER_TOKEN ? dw : load(g.dw + j) + dw);
    }
}

// Moves what a segment has summed up to the sum over all of them: long sums in small parts lose less.
INLINE void add_up(int64_t N, float* part, float* total) {
    for (int64_t j = 0; j < N; j += LANES) {
        store(total + j, load(total + j) + load(part + j));
        store(part + j, vec{});
    }
}

template <int64_t FIXED_N>
static void backward_head(const Wkv6& p, const Wkv6Backward& b, const Head& head, float* scratch) {
    const int64_t N = FIXED_N ? FIXED_N : p.N;
    float *dS = scratch, *states = dS + N * N, *line = states + SEGMENT * N * N;
    const Gradients g = {line, line + N, line + 2 * N, line + 3 * N, line + 4 * N};
    const Segment segment(line + 5 * N, N);
    float *du = b.du + head.index * N, *dw = DECAY_PER_TOKEN ? nullptr : b.dw + head.index * N;
    for (float* sum : {g.du, g.dw, du, dw})
        if (sum) memset(sum, 0, N * sizeof(float));
    if (b.dsT)
        memcpy(dS, b.dsT + head.index * N * N, N * N * sizeof(float));
    else
        memset(dS, 0, N * N * sizeof(float));
    for (int64_t t0 = head.last_segment(); t0 >= 0; t0 -= SEGMENT) {
        const int64_t n = head.steps(t0), first = head.row(p, t0);
        read_segment(p, first, n, b.dy, segment);
        memcpy(states, b.saved + head.state(p, t0), N * N * sizeof(float));
        // The last step needs only the state before it.
        int64_t x = 0;
        for (; x + TILE_FLOATS <= N; x += TILE_FLOATS) remake_tile<TILE_VECTORS>(segment.steps, n - 1, N, x, states);
        for (; x < N; x += LANES) remake_tile<1>(segment.steps, n - 1, N, x, states);
        for (int64_t t = n - 1; t >= 0; t--) {
            const Step step(segment.steps, t, N);
            const float *u = p.u + head.h * N, *state = states + t * N * N, vdy = segment.vdy[t];
            for (int64_t j = 0; j < N; j += LANES) store(g.dv + j, load(step.dy + j) * segment.bonus[t]);
            for (x = 0; x + TILE_FLOATS <= N; x += TILE_FLOATS)
                backward_tile<TILE_VECTORS>(step, u, vdy, N, x, state, dS, g);
            for (; x < N; x += LANES) backward_tile<1>(step, u, vdy, N, x, state, dS, g);
            const int64_t row = first + t * p.H;
            write_row(p.dtype, b.dr, row, N, g.dr);
            write_row(p.dtype, b.dk, row, N, g.dk);
            write_row(p.dtype, b.dv, row, N, g.dv);
            if (DECAY_PER_TOKEN) write_row(FLOAT32, b.dw, row, N, g.dw);
        }
        add_up(N, g.du, du);
        if (!DECAY_PER_TOKEN) add_up(N, g.dw, dw);
    }
    if (b.ds0) memcpy(b.ds0 + head.index * N * N, dS, N * N * sizeof(float));
}
