// Blocks of rows times matrices, on the CPU: the transform that comes before quantizing.
#pragma once

#include "lanes.h"

namespace mx::MX_ISA {
namespace {

constexpr int64_t ROWS = 4, COLUMNS = 2 * WIDTH;  // whose sums fit the registers

using Rows = float[ROWS][MOST_TRANSFORMED];

// Multiply rows by COLUMNS columns of a matrix. Each sum is added up in the order of the index, and no product is fused
// with it: the bits are those of any width.
MX_NOINLINE void multiply(const Rows& x, const float* matrix, int64_t size, float (*out)[COLUMNS]) {
    Vector left[ROWS] = {}, right[ROWS] = {};
    for (int64_t j = 0; j < size; ++j) {
        const Vector a = vector_at(matrix + j * size), b = vector_at(matrix + j * size + WIDTH);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            left[r] += x[r][j] * a;
            right[r] += x[r][j] * b;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        put(out[r], left[r]);
        put(out[r] + WIDTH, right[r]);
    }
}

// The same for the `n` last columns, fewer than COLUMNS.
MX_NOINLINE void multiply_last(const Rows& x, const float* matrix, int64_t size, int64_t n, float (*out)[COLUMNS]) {
    for (int r = 0; r < ROWS; ++r) {
        for (int64_t k = 0; k < n; ++k) out[r][k] = 0.0f;
        for (int64_t j = 0; j < size; ++j)
            for (int64_t k = 0; k < n; ++k) out[r][k] += x[r][j] * matrix[j * size + k];
    }
}

// Copy `rows` rows of `n` elements, of which the compiler may know the number.
template <class T>
MX_INLINE void load_rows(const typename T::Stored* x, Rows& out, int64_t rows, int64_t stride, int64_t n) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < n; ++j) out[r][j] = T::load(x[r * stride + j]);
}

template <class T>
MX_INLINE void store_rows(const float (*x)[COLUMNS], typename T::Stored* out, int64_t rows, int64_t stride, int64_t n) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < n; ++k) out[r * stride + k] = T::store(x[r][k]);
}

// Transform a block of up to ROWS rows that are `stride` elements apart. `out` may be `x`.
template <class T>
MX_INLINE void transform_block(const typename T::Stored* x, typename T::Stored* out, const float* matrix, int64_t rows,
                               int64_t stride, int64_t size) {
    Rows loaded;
    float made[ROWS][COLUMNS];
    if (rows < ROWS)
        for (float (&row)[MOST_TRANSFORMED] : loaded)
            for (int64_t j = 0; j < size; ++j) row[j] = 0.0f;
    load_rows<T>(x, loaded, rows, stride, size);
    for (int64_t column = 0; column < size; column += COLUMNS) {
        const int64_t n = size - column < COLUMNS ? size - column : COLUMNS;
        if (n < COLUMNS) {
            multiply_last(loaded, matrix + column, size, n, made);
            store_rows<T>(made, out + column, rows, stride, n);
        } else {
            multiply(loaded, matrix + column, size, made);
            store_rows<T>(made, out + column, rows, stride, COLUMNS);
        }
    }
}

// Transform blocks of one size, which the compiler may know.
template <class T>
MX_INLINE void transform_rows(const typename T::Stored* x, typename T::Stored* out, const float* matrix, int64_t rows,
                              int64_t stride, int64_t size) {
    int64_t row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        transform_block<T>(x + row * stride, out + row * stride, matrix, ROWS, stride, size);
    if (row < rows) transform_block<T>(x + row * stride, out + row * stride, matrix, rows - row, stride, size);
}

// Transform rows [first, last).
void transform(const Buffers& b, const Transform& t, int64_t first, int64_t last) {
    with_dtype(b.dtype, [&](auto type) {
        using T = decltype(type);
        const auto* const x = static_cast<const typename T::Stored*>(b.source);
        auto* const out = static_cast<typename T::Stored*>(b.target);
        for (int64_t start = 0; start < t.axis; start += t.size) {
            const float* const matrix = t.matrices + (t.is_shared ? 0 : start * t.size);
            const int64_t offset = first * t.axis + start;
            if (t.size == 32)
                transform_rows<T>(x + offset, out + offset, matrix, last - first, t.axis, 32);
            else
                transform_rows<T>(x + offset, out + offset, matrix, last - first, t.axis, t.size);
        }
    });
}

}  // namespace
}  // namespace mx::MX_ISA
