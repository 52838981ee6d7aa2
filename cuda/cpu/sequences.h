// Which tokens belong together: B sequences of T tokens, or D documents that lie one after another in a single row of T
// tokens, document d from offsets[d] up to offsets[d + 1]. Every sequence has a state of its own.

#pragma once

#include <cstdint>

namespace {

// Steps between the states that the forward pass leaves. Fewer steps leave more behind. Backward makes all states of a
// segment again: those of 128 steps are 2 MB for a head of 64, which is as much as a second-level cache holds.
constexpr int64_t SEGMENT = 128;

int64_t segments(int64_t T) { return (T + SEGMENT - 1) / SEGMENT; }

// Room for the segments of all sequences. Documents are numbered by rounding down (see Head), which may leave gaps.
int64_t all_segments(int64_t B, int64_t T, int64_t D) { return D ? T / SEGMENT + D : B * segments(T); }

struct Sequences {
    int64_t B, T, H, N, D;
    const int64_t* offsets;  // null, and D 0: not packed

    int64_t count() const { return D ? D : B; }

    bool fit() const {
        if (!D) return !offsets;
        if (D < 0 || B != 1 || !offsets || offsets[0] != 0 || offsets[D] != T) return false;
        for (int64_t d = 0; d < D; d++)
            if (offsets[d] >= offsets[d + 1]) return false;
        return true;
    }
};

// One head of one sequence. `index` counts heads over all sequences and places states; `h` is the head in the model.
struct Head {
    int64_t index, h, begin, tokens, segment;  // begin: the sequence's first token in all of them; segment: likewise

    Head(const Sequences& all, int64_t index) : index(index), h(index % all.H) {
        const int64_t sequence = index / all.H;
        begin = all.D ? all.offsets[sequence] : sequence * all.T;
        tokens = all.D ? all.offsets[sequence + 1] - begin : all.T;
        segment = all.D ? begin / SEGMENT + sequence : sequence * segments(all.T);
    }

    // Time is cut into segments that begin at multiples of SEGMENT: the last one's begin, and the steps of the one at t0.
    int64_t last_segment() const { return (tokens - 1) / SEGMENT * SEGMENT; }
    int64_t steps(int64_t t0) const { return t0 + SEGMENT < tokens ? SEGMENT : tokens - t0; }

    // The row of token t in a [B, T, H, N] tensor.
    int64_t row(const Sequences& all, int64_t t) const { return (begin + t) * all.H + h; }

    // The state saved at time t0 among [segments of all sequences, H, N, N].
    int64_t state(const Sequences& all, int64_t t0) const {
        return ((segment + t0 / SEGMENT) * all.H + h) * all.N * all.N;
    }
};

}  // namespace
