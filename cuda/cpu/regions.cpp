// The regions of the step between its projections, on the processor: one pass over memory each, forward and backward.
// Included once per instruction set: the arithmetic, in regions_rows.h. Here: what a region reads and writes, how work
// is shared out, and the C interface.
//
// Activations are float or bfloat16, [rows, C] with C = H N, N a multiple of 8; rows are tokens. Parameters [C] are float
// or bfloat16. Arithmetic is float and rounded once, at the results. Rows are cut into tiles and blocks by their number
// alone, and so are sums over rows: no bit depends on the number of threads.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <new>
#include <vector>

#include "sequences.h"

namespace {

constexpr int64_t LARGEST_N = 1024;  // of a head
constexpr int64_t LARGEST_M = 6;     // lerps at a time
constexpr int64_t TILE = 32;         // rows that one call of a kernel takes, and whose sums are added one by one
constexpr int64_t BLOCKS = 128;      // at most so many parts of the work, with sums of their own
constexpr int64_t LINE = 1024;       // numbers that count as a row where there are none
constexpr int64_t ANY_N = 64;        // for regions without heads
constexpr float SHORTEST = 1e-12f;   // F.normalize's eps

// What a kernel works in besides its results.
struct Room {
    float* sums;  // [sums of the problem, C], to be added to; null if they are not wanted
    float* line;  // [C]
};

struct Mix : Sequences {
    int dtype;
    int64_t C, M, carried;  // carried: rows of last
    const void *x, *last;
    const float* shares;
    const void* changes;  // null: shares are the same for all tokens
};

struct MixForward : Mix {
    void* out[LARGEST_M];
};

struct MixBackward : Mix {
    int64_t dlast_rows;
    void* dx;
    float* dlast;
    void* dchanges;
    const void* grads[LARGEST_M];
};

struct ReluSquare {
    int dtype;
    int64_t count;
    const void *h, *g;
    void* out;
};

struct Heads {
    int dtype;
    int64_t rows, H, N;
};

struct Pre7 : Heads {
    const void *pw, *pa, *pv, *k0, *v0, *v_first;
    const float *w0, *a0, *v0_bias, *k_k, *k_a;
};

struct Pre7Forward : Pre7 {
    float* w;
    void *k, *v, *a, *b;
};

struct Pre7Backward : Pre7 {
    const void *dw, *dk, *dv, *da, *db, *dk_bonus, *dv_bonus;
    void *dpw, *dpa, *dpv, *dk0, *dv0, *dv_first;
    bool wide_dw;  // dw is float though the activations are not
};

struct Norm : Heads {
    float eps;
    const void* y;
    const float *weight, *bias;
};

struct Post7 : Norm {
    const void *r, *k, *v, *g;
    const float* r_k;
};

struct Post7Forward : Post7 {
    void* z;
};

struct Post7Backward : Post7 {
    const void* dz;
    void *dy, *dr, *dk, *dv, *dg;
};

struct GatedNorm : Norm {
    const void* gate;
};

struct GatedNormForward : GatedNorm {
    void* z;
};

struct GatedNormBackward : GatedNorm {
    const void* dz;
    void *dy, *dgate;
};

// starts[i] for the rows from begin to end, end included: which sequence begins there; -1 if none does.
void find_starts(const Sequences& all, int64_t begin, int64_t end, int64_t* starts) {
    std::fill(starts, starts + (end - begin + 1), -1);
    if (all.D) {
        const int64_t* first = std::lower_bound(all.offsets, all.offsets + all.D, begin);
        for (; first < all.offsets + all.D && *first <= end; first++) starts[*first - begin] = first - all.offsets;
    } else {
        for (int64_t b = (begin + all.T - 1) / all.T; b < all.B && b * all.T <= end; b++) starts[b * all.T - begin] = b;
    }
}

}  // namespace

#define KERNEL_HEADER "regions_rows.h"
#include "levels.h"
#include "heads.h"

// regions_rows.h looks at the sizes itself.
#undef OF_SIZE
#define OF_SIZE(function, N) function

namespace {

// A parameter as float: itself, or a copy that lives as long as this.
class Widened {
public:
    Widened(int dtype, int64_t count) : dtype(dtype), count(count) {}

    const float* operator()(const void* parameter) {
        if (!parameter || dtype == FLOAT32) return static_cast<const float*>(parameter);
        copies.emplace_back(count);
        portable::read_row(dtype, parameter, 0, count, copies.back().data());
        return copies.back().data();
    }

private:
    int dtype;
    int64_t count;
    std::vector<std::vector<float>> copies;
};

// Hands out the tensors of a call in their order.
class Tensors {
public:
    explicit Tensors(void* const* all) : all(all) {}
    void* next() { return *all++; }
    float* next_float() { return static_cast<float*>(next()); }

private:
    void* const* all;
};

// Runs kernel(problem, begin, end, room) for all tiles of `rows`, on at most `threads` threads (0: OpenMP's default).
// Sums over rows, [totals, C], are those of a tile, added up within a block of tiles, added up over the blocks.
template <class Problem>
int for_each_tile(const Problem& p, int64_t rows, int64_t C, const std::vector<float*>& totals, int threads,
                  void (*kernel)(const Problem&, int64_t, int64_t, const Room&)) {
    const int64_t tiles = (rows + TILE - 1) / TILE, each = (tiles + BLOCKS - 1) / BLOCKS;
    const int64_t blocks = (tiles + each - 1) / each;
    const int64_t sums = totals.size() * C;
    if (threads < 1) threads = omp_get_max_threads();
    if (threads > blocks) threads = int(blocks);
    std::vector<float> of_blocks(blocks * sums), of_tiles(threads * sums), lines(threads * C);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int thread = omp_get_thread_num();
        float *sum = of_blocks.data() + block * sums, *tile_sum = of_tiles.data() + thread * sums;
        const Room room = {sums ? tile_sum : nullptr, lines.data() + thread * C};
        for (int64_t tile = block * each; tile < std::min(tiles, (block + 1) * each); tile++) {
            std::fill(tile_sum, tile_sum + sums, 0.0f);
            kernel(p, tile * TILE, std::min(rows, (tile + 1) * TILE), room);
            for (int64_t i = 0; i < sums; i++) sum[i] += tile_sum[i];
        }
    }
    for (size_t i = 0; i < totals.size(); i++) {
        if (!totals[i]) continue;
        std::fill(totals[i], totals[i] + C, 0.0f);
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t c = 0; c < C; c++) totals[i][c] += of_blocks[block * sums + i * C + c];
    }
    return OK;
}

// The totals if one of them is wanted, otherwise none.
std::vector<float*> wanted(std::initializer_list<float*> totals) {
    for (float* total : totals)
        if (total) return totals;
    return {};
}

bool are_types(int dtype, int parameters) {
    return (dtype == FLOAT32 || dtype == BFLOAT16) && (parameters == FLOAT32 || parameters == BFLOAT16);
}

int check(const Heads& p, int parameters) {
    if (p.rows < 1 || p.H < 1 || p.N < 8 || p.N % 8 || p.N > LARGEST_N) return BAD_SHAPE;
    return are_types(p.dtype, parameters) ? OK : BAD_TYPE;
}

int check(const Mix& p, int64_t dlast_rows, int parameters) {
    if (p.B < 1 || p.T < 1 || p.C < 1 || p.M < 1 || p.M > LARGEST_M) return BAD_SHAPE;
    if (!p.fit() || p.carried > p.count() || dlast_rows > p.count()) return BAD_DOCUMENTS;
    return are_types(p.dtype, parameters) ? OK : BAD_TYPE;
}

// sizes: B, T, C, D, M, rows of last, rows of dlast.
void read_mix(Mix& p, int dtype, const int64_t* sizes, Tensors& in, Widened& widened) {
    p.dtype = dtype;
    for (int64_t* size : {&p.B, &p.T, &p.C, &p.D, &p.M, &p.carried}) *size = *sizes++;
    p.offsets = static_cast<const int64_t*>(in.next());
    p.x = in.next();
    p.last = in.next();
    p.shares = widened(in.next());
    p.changes = in.next();
}

void read_post7(Post7& p, float eps, Tensors& in, Widened& widened) {
    p.eps = eps;
    for (const void** x : {&p.y, &p.r, &p.k, &p.v, &p.g}) *x = in.next();
    for (const float** x : {&p.r_k, &p.weight, &p.bias}) *x = widened(in.next());
}

void read_gated_norm(GatedNorm& p, float eps, Tensors& in, Widened& widened) {
    p.eps = eps;
    for (const void** x : {&p.y, &p.gate}) *x = in.next();
    for (const float** x : {&p.weight, &p.bias}) *x = widened(in.next());
}

// sizes: rows, H, N.
void read_heads(Heads& p, int dtype, const int64_t* sizes) {
    p.dtype = dtype;
    for (int64_t* size : {&p.rows, &p.H, &p.N}) *size = *sizes++;
}

}  // namespace

extern "C" {

// Every function takes the types of the activations and of the parameters; the sizes, and the tensors in the order in
// which they are read here; the norm's eps; and the number of threads.
#define REGION(name)                                                                           \
    int region_##name(int dtype, int parameters, const int64_t* sizes, void* const* tensors, \
                      [[maybe_unused]] float eps, int threads) try

#define END_REGION \
    catch (const std::bad_alloc&) { return OUT_OF_MEMORY; }

REGION(mix_forward) {
    Tensors in(tensors);
    Widened widened(parameters, sizes[2] * sizes[4]);
    MixForward p = {};
    read_mix(p, dtype, sizes, in, widened);
    if (int code = check(p, 0, parameters)) return code;
    for (int64_t m = 0; m < p.M; m++) p.out[m] = in.next();
    return for_each_tile(p, p.B * p.T, p.C, {}, threads, AT_LEVEL(mix_forward, ANY_N));
}
END_REGION

REGION(mix_backward) {
    Tensors in(tensors);
    Widened widened(parameters, sizes[2] * sizes[4]);
    MixBackward p = {};
    read_mix(p, dtype, sizes, in, widened);
    p.dlast_rows = sizes[6];
    if (int code = check(p, p.dlast_rows, parameters)) return code;
    p.dx = in.next();
    p.dlast = in.next_float();
    float* dshares = in.next_float();
    p.dchanges = in.next();
    for (int64_t m = 0; m < p.M; m++) p.grads[m] = in.next();
    std::vector<float*> totals;
    for (int64_t m = 0; dshares && m < p.M; m++) totals.push_back(dshares + m * p.C);
    return for_each_tile(p, p.B * p.T, p.C, totals, threads, AT_LEVEL(mix_backward, ANY_N));
}
END_REGION

// sizes: how many numbers.
REGION(relu_square_forward) {
    const ReluSquare p = {dtype, sizes[0], tensors[0], nullptr, tensors[1]};
    if (!are_types(dtype, parameters)) return BAD_TYPE;
    return for_each_tile(p, (p.count + LINE - 1) / LINE, LINE, {}, threads, AT_LEVEL(relu_square<false>, ANY_N));
}
END_REGION

REGION(relu_square_backward) {
    const ReluSquare p = {dtype, sizes[0], tensors[0], tensors[1], tensors[2]};
    if (!are_types(dtype, parameters)) return BAD_TYPE;
    return for_each_tile(p, (p.count + LINE - 1) / LINE, LINE, {}, threads, AT_LEVEL(relu_square<true>, ANY_N));
}
END_REGION

REGION(pre7_forward) {
    Pre7Forward p = {};
    read_heads(p, dtype, sizes);
    if (int code = check(p, parameters)) return code;
    Tensors in(tensors);
    Widened widened(parameters, p.H * p.N);
    for (const void** x : {&p.pw, &p.pa, &p.pv, &p.k0, &p.v0, &p.v_first}) *x = in.next();
    for (const float** x : {&p.w0, &p.a0, &p.v0_bias, &p.k_k, &p.k_a}) *x = widened(in.next());
    p.w = in.next_float();
    for (void** x : {&p.k, &p.v, &p.a, &p.b}) *x = in.next();
    return for_each_tile(p, p.rows, p.H * p.N, {}, threads, AT_LEVEL(pre7_forward, p.N));
}
END_REGION

// sizes: also the type of dw.
REGION(pre7_backward) {
    Pre7Backward p = {};
    read_heads(p, dtype, sizes);
    if (int code = check(p, parameters)) return code;
    Tensors in(tensors);
    Widened widened(parameters, p.H * p.N);
    p.wide_dw = sizes[3] == FLOAT32;
    for (const void** x : {&p.pa, &p.pv, &p.k0, &p.v0, &p.v_first}) *x = in.next();
    for (const float** x : {&p.a0, &p.v0_bias, &p.k_k, &p.k_a}) *x = widened(in.next());
    for (const void** x : {&p.dw, &p.dk, &p.dv, &p.da, &p.db, &p.dk_bonus, &p.dv_bonus}) *x = in.next();
    for (void** x : {&p.dpw, &p.dpa, &p.dpv, &p.dk0, &p.dv0, &p.dv_first}) *x = in.next();
    float* totals[5];
    for (float*& total : totals) total = in.next_float();
    const auto sums = wanted({totals[0], totals[1], totals[2], totals[3], totals[4]});
    return for_each_tile(p, p.rows, p.H * p.N, sums, threads, AT_LEVEL(pre7_backward, p.N));
}
END_REGION

REGION(post7_forward) {
    Post7Forward p = {};
    read_heads(p, dtype, sizes);
    if (int code = check(p, parameters)) return code;
    Tensors in(tensors);
    Widened widened(parameters, p.H * p.N);
    read_post7(p, eps, in, widened);
    p.z = in.next();
    return for_each_tile(p, p.rows, p.H * p.N, {}, threads, AT_LEVEL(post7_forward, p.N));
}
END_REGION

REGION(post7_backward) {
    Post7Backward p = {};
    read_heads(p, dtype, sizes);
    if (int code = check(p, parameters)) return code;
    Tensors in(tensors);
    Widened widened(parameters, p.H * p.N);
    read_post7(p, eps, in, widened);
    p.dz = in.next();
    for (void** x : {&p.dy, &p.dr, &p.dk, &p.dv, &p.dg}) *x = in.next();
    float* totals[3];
    for (float*& total : totals) total = in.next_float();
    const auto sums = wanted({totals[0], totals[1], totals[2]});
    return for_each_tile(p, p.rows, p.H * p.N, sums, threads, AT_LEVEL(post7_backward, p.N));
}
END_REGION

REGION(gated_norm_forward) {
    GatedNormForward p = {};
    read_heads(p, dtype, sizes);
    if (int code = check(p, parameters)) return code;
    Tensors in(tensors);
    Widened widened(parameters, p.H * p.N);
    read_gated_norm(p, eps, in, widened);
    p.z = in.next();
    return for_each_tile(p, p.rows, p.H * p.N, {}, threads, AT_LEVEL(gated_norm_forward, p.N));
}
END_REGION

REGION(gated_norm_backward) {
    GatedNormBackward p = {};
    read_heads(p, dtype, sizes);
    if (int code = check(p, parameters)) return code;
    Tensors in(tensors);
    Widened widened(parameters, p.H * p.N);
    read_gated_norm(p, eps, in, widened);
    p.dz = in.next();
    for (void** x : {&p.dy, &p.dgate}) *x = in.next();
    float *d_weight = in.next_float(), *d_bias = in.next_float();
    const auto sums = wanted({d_weight, d_bias});
    return for_each_tile(p, p.rows, p.H * p.N, sums, threads, AT_LEVEL(gated_norm_backward, p.N));
}
END_REGION

const char* regions_error(int code) { return error_text(code); }
}
