// Rows of a matrix times a vector. Included once per instruction set: see levels.h.

#include "products.h"

// y[row] for rows from `begin` up to `end`.
static void rows_product(const Product& p, const float* x, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
        const float y = p.dtype == FLOAT32 ? product_float(static_cast<const float*>(p.matrix) + row * p.n, x, p.n)
                                           : product_bfloat16(static_cast<const uint16_t*>(p.matrix) + row * p.n, x, p.n);
        write_row(p.dtype, p.y, row, 1, &y);
    }
}
