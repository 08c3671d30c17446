// The loop of GPTQ over the inputs of a weight, on the CPU: mxlab/ptq/gptq.py computes the same in torch.
#pragma once

#include "lanes.h"

namespace mx::MX_ISA {
namespace {

constexpr int64_t OUTPUTS = 64;  // done side by side; none depends on another

// Round a multiple of the scale to the element's grid. Negative ones are limited to -lowest. What is NaN or infinite
// becomes NaN.
template <Rounding R>
MX_INLINE float on_grid(float y, const Element& el, float lowest) {
    const u32 bits = bits_of(y);
    const u32 limit = bits & SIGN ? bits_of(lowest) : bits_of(el.max);
    const int limited = smaller(static_cast<int>(bits & MAGNITUDE), static_cast<int>(limit));
    const exact::Rounded r = exact::round_magnitude<R>(float_of(static_cast<u32>(limited)), el, 0.0f);
    const float rounded = with_sign_of(r.integer * power_of_two(-el.mantissa_bits) * r.binade, y);
    return (bits & MAGNITUDE) < EXPONENT ? rounded : float_of(QUIET_NAN);
}

// Subtract from a row the errors of the `n` rows before it, one after the other, each times its factor. No product is
// fused with the difference: torch's loop rounds both.
MX_NOINLINE void carry(float* row, const float (*errors)[OUTPUTS], const float* factors, int64_t n) {
    constexpr int VECTORS = OUTPUTS / WIDTH;
    Vector sums[VECTORS];
    for (int k = 0; k < VECTORS; ++k) sums[k] = vector_at(row + k * WIDTH);
    for (int64_t j = 0; j < n; ++j)
#pragma GCC unroll 16
        for (int k = 0; k < VECTORS; ++k) sums[k] -= factors[j] * vector_at(errors[j] + k * WIDTH);
    for (int k = 0; k < VECTORS; ++k) put(row + k * WIDTH, sums[k]);
}

// Replace a row by what is on the grid, and set the error that its later rows make up for.
template <Rounding R>
MX_NOINLINE void settle(float* __restrict row, const float* __restrict scales, float* __restrict errors, float diagonal,
                        const Element& given, float lowest) {
    const Element el = given;
    for (int64_t k = 0; k < OUTPUTS; ++k) {
        const float found = on_grid<R>(row[k] / scales[k], el, lowest) * scales[k];
        errors[k] = (row[k] - found) / diagonal;
        row[k] = found;
    }
}

// Quantize the columns [lane, lane + lanes) of the weight.
template <Rounding R>
void settle_columns(const Settling& s, const Element& el, int64_t lane, int64_t lanes) {
    const int64_t bytes = lanes * static_cast<int64_t>(sizeof(float));
    float errors[MOST_INPUTS][OUTPUTS], row[OUTPUTS] = {}, scales[OUTPUTS];
    for (float& scale : scales) scale = 1.0f;
    for (int64_t i = 0; i < s.inputs; ++i) {
        const int64_t offset = i * s.outputs + lane;
        const float* const factors = s.factors + i * s.inputs;
        __builtin_memcpy(row, s.weight + offset, bytes);
        __builtin_memcpy(scales, s.scales + offset, bytes);
        carry(row, errors, factors, i);
        settle<R>(row, scales, errors[i], factors[i], el, s.lowest);
        __builtin_memcpy(s.weight + offset, row, bytes);
        __builtin_memcpy(s.errors + offset, errors[i], bytes);
    }
}

int64_t settle_units(const Settling& s) { return (s.outputs + OUTPUTS - 1) / OUTPUTS; }

// Quantize units [first, last), of OUTPUTS columns each.
void settle(const Settling& s, const Element& el, Rounding rounding, int64_t first, int64_t last) {
    with_rounding(rounding, [&](auto r) {
        constexpr Rounding R = decltype(r)::value;
        if constexpr (R != Rounding::dither)
            for (int64_t lane = first * OUTPUTS; lane < last * OUTPUTS && lane < s.outputs; lane += OUTPUTS)
                settle_columns<R>(s, el, lane, s.outputs - lane < OUTPUTS ? s.outputs - lane : OUTPUTS);
    });
}

}  // namespace
}  // namespace mx::MX_ISA
