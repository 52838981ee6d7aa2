// Softmax, loss and gradient of one row of logits. Included once per instruction set: see levels.h.
//
//   loss = (max - x_target) + log sum exp(x - max);  x <- exp(x - max) / sum - [target] + l2wrap max [first max]
//
// The row is read once into `line`, as floats, and written once from there; in between `line` stays in the cache.

// The largest number of `line`: `size` floats, whole vectors. NaN is passed over: it comes out of the sum.
INLINE float largest_of(const float* line, int64_t size) {
    vec most = broadcast(-INFINITY);
    for (int64_t i = 0; i < size; i += LANES) {
        const vec x = load(line + i);
        most = x > most ? x : most;
    }
    float result = most[0];
    for (int lane = 1; lane < LANES; lane++) result = most[lane] > result ? most[lane] : result;
    return result;
}

// Makes exp(x - largest) of `line` and returns the sum. Of a block it is a float, of the blocks a double: 65,536 terms
// in one float would lose its last digits.
INLINE double exponentials(float* line, int64_t size, float largest) {
    double total = 0;
    for (int64_t begin = 0; begin < size; begin += SUMMED) {
        const int64_t end = begin + SUMMED < size ? begin + SUMMED : size;
        vec sums = {};
        for (int64_t i = begin; i < end; i += LANES) {
            const vec e = exp(load(line + i) - largest);
            store(line + i, e);
            sums += e;
        }
        total += sum(sums);
    }
    return total;
}

static void one_row(const Rows& p, int64_t row, float* line) {
    const int64_t V = p.V, size = padded(V), target = p.targets[row];
    read_row(p.dtype, p.logits, row, V, line);
    for (int64_t i = V; i < size; i++) line[i] = -INFINITY;
    const float largest = largest_of(line, size), aimed = line[target];
    int64_t first = 0;
    if (p.l2wrap != 0)
        while (first < V - 1 && line[first] != largest) first++;

    const double total = exponentials(line, size, largest);
    p.losses[row] = (largest - aimed) + float(std::log(total));
    if (!p.gradient) return;

    // What is hardly a normal number becomes 0: `exp` ends there, and products with such numbers are slow.
    const vec smallest = broadcast(1e-37f);
    const float share = float(1 / total);
    for (int64_t i = 0; i < size; i += LANES) {
        const vec softmax = load(line + i) * share;
        store(line + i, softmax < smallest ? vec{} : softmax);
    }
    line[target] -= 1.0f;
    if (p.l2wrap != 0) line[first] += largest * p.l2wrap;
    write_row(p.dtype, p.logits, row, V, line);
}
