// Blocks along another axis than the last, on the CPU: neighbouring columns are done side by side.
#pragma once

#include "elements.h"
#include "scales.h"

namespace mx::MX_ISA {
namespace {

// Replace the scales of columns for which the next power of two has the smaller sum of squared errors.
template <class Op, class Stored>
MX_NOINLINE void search_columns(const Op& op, const Stored* x, int64_t rows, int64_t lanes, int64_t stride, float* down,
                                float* up) {
    using T = typename Op::T;
    const Format f = op.format;
    float next_down[LANES], next_up[LANES], error[LANES] = {}, next_error[LANES] = {};
    for (int64_t i = 0; i < lanes; ++i) {
        const Scale next = exact::next_scale({down[i], up[i]}, f);
        next_down[i] = next.down;
        next_up[i] = next.up;
    }
    for (int64_t r = 0; r < rows; ++r, x += stride)
        for (int64_t i = 0; i < lanes; ++i) {
            const float v = T::load(x[i]);
            const float y = Op::element(v, {down[i], up[i]}, f, 0.0f);
            const float next_y = Op::element(v, {next_down[i], next_up[i]}, f, 0.0f);
            error[i] += exact::squared(v - Op::in_range(y));
            next_error[i] += exact::squared(v - Op::in_range(next_y));
        }
    for (int64_t i = 0; i < lanes; ++i) {
        down[i] = next_error[i] < error[i] ? next_down[i] : down[i];
        up[i] = next_error[i] < error[i] ? next_up[i] : up[i];
    }
}

// Quantize one block of `rows` elements in each of `lanes` neighbouring columns, rows being `stride` elements apart.
template <class Op, class Stored>
void columns(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t rows, int64_t lanes,
             int64_t stride) {
    using T = typename Op::T;
    u32 amax[LANES] = {};
    float down[LANES], up[LANES];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < lanes; ++i) {
            const int a = static_cast<int>(bits_of(T::load(x[r * stride + i])) & MAGNITUDE);
            amax[i] = static_cast<u32>(larger(a, static_cast<int>(amax[i])));
        }
    find_scales<Op>(op.format, amax, down, up, lanes);
    if constexpr (Op::SEARCHES) search_columns(op, x, rows, lanes, stride, down, up);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t skip = r * stride;
        elements(op, x + skip, out + skip, noise ? noise + skip : nullptr, lanes, &down[0], &up[0]);
    }
}

}  // namespace
}  // namespace mx::MX_ISA
