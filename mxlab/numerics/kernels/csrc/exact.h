// The `exact` numerics of one block and one element: OCP Microscaling Formats (MX) v1.0, section 6.3, and the other
// rules of mxlab/formats/scales.py. mxlab/numerics/reference.py computes the same in torch; the tests require the same
// bits.
#pragma once

#include "mx.h"

namespace mx::MX_ISA::exact {

// Return the power-of-two scale of a block, given the float32 bits of its largest magnitude (infinities and NaN are
// larger than all others). For the shared exponent s, `down` is 2^-s. Elements come back as integers, in units of
// 2^-mantissa_bits of their binade, so that `up` is 2^(s - mantissa_bits).
MX_INLINE Scale scale(u32 amax, const Format& f) {
    const Binary b = binary(amax);
    const int e = amax == 0 ? -126 : b.exponent;
    const int wanted = e + static_cast<int>((b.fraction + f.carry) >> 23) - f.element.emax;
    const int s = smaller(larger(wanted, -f.scale_emax), f.scale_emax);
    const float kept = e < f.flushed_below ? 0.0f : power_of_two(-f.element.mantissa_bits);
    const bool has_none = wanted > f.scale_emax || amax >= EXPONENT;
    return {power_of_two(-s), (has_none ? float_of(QUIET_NAN) : power_of_two(s)) * kept};  // exact, also if subnormal
}

// Round a * steps to an integer, where 0 <= a * steps < 2^24. Ties away from zero would be truncated(v + 0.5), but that
// sum rounds 0.49999997 up to 1: the constant is the largest float below 0.5.
template <Rounding R>
MX_INLINE float to_integer(float a, float steps, float noise) {
    if constexpr (R == Rounding::nearest) return truncated(multiply_add(a, steps, 0x0.ffffffp-1f));
    const float v = a * steps;
    if constexpr (R == Rounding::even) return round_to_even(v);
    if constexpr (R == Rounding::nearest_zero) {
        const float rounded = round_to_even(v);
        return rounded - (rounded - v == 0.5f ? 1.0f : 0.0f);  // a tie that went up
    }
    const float whole = truncated(v);
    if constexpr (R == Rounding::floor) return whole;
    // floor(v + noise), computed without rounding the sum.
    return whole + (v - whole >= 1.0f - noise ? 1.0f : 0.0f);
}

// A magnitude on the element's grid: `integer` units of 2^-mantissa_bits of `binade`.
struct Rounded {
    float integer, binade;
};

// Round a finite magnitude to the element's grid, without limiting it to the largest element. An integer format is the
// case emin = emax = 0.
template <Rounding R>
MX_INLINE Rounded round_magnitude(float a, const Element& el, float noise) {
    const int field = larger(static_cast<int>(bits_of(a) & EXPONENT), static_cast<int>(bits_of(el.min_normal)));
    const float twice_inverse = float_of(EXPONENT - static_cast<u32>(field));  // 2 / binade: never subnormal
    const float integer = to_integer<R>(a * twice_inverse, power_of_two(el.mantissa_bits - 1), noise);
    return {integer, float_of(static_cast<u32>(field))};
}

// Round an element of a block to the element's grid. Its magnitude is limited first, which is safe: the largest element
// is on the grid, and where NaN becomes a number the scale of the block is NaN.
template <Rounding R>
MX_INLINE Rounded round_limited(float x, const Scale& s, const Element& el, float noise) {
    const int y = static_cast<int>(bits_of(x * s.down) & MAGNITUDE);
    const float limited = float_of(static_cast<u32>(smaller(y, static_cast<int>(bits_of(el.max)))));
    return round_magnitude<R>(limited, el, noise);
}

// Quantize it. Only the last product can round.
template <Rounding R>
MX_INLINE float quantize(float x, const Scale& s, const Element& el, float noise) {
    const Rounded r = round_limited<R>(x, s, el, noise);
    return multiply_add(r.integer * with_sign_of(s.up, x), r.binade, 0.0f);  // + 0: a zero result is +0
}

// Round an element of a format whose elements lie in [-1, 1), under a scale no smaller than the largest magnitude: only
// positive values need a limit. As signed integers, the bits of negative numbers are below those of all others.
template <Rounding R>
MX_INLINE Rounded round_asymmetric(float x, const Scale& s, const Element& el, float noise) {
    const int y = smaller(static_cast<int>(bits_of(x * s.down)), static_cast<int>(bits_of(el.max)));
    return round_magnitude<R>(float_of(static_cast<u32>(y) & MAGNITUDE), el, noise);
}

// Quantize it.
template <Rounding R>
MX_INLINE float quantize_asymmetric(float x, const Scale& s, const Element& el, float noise) {
    const Rounded r = round_asymmetric<R>(x, s, el, noise);
    return multiply_add(r.integer * with_sign_of(s.up, x), r.binade, 0.0f);
}

// Return a rounded element as a multiple of the smallest one.
MX_INLINE float integer(const Rounded& r, const Element& el, float x) {
    return with_sign_of(r.integer * (r.binade * (1.0f / el.min_normal)), x);
}

// Return the code of a rounded element: OCP MX v1.0, section 5.3; fixed-point ones in two's complement. Codes without
// their sign count up from 0; a zero has no sign.
MX_INLINE u32 code(const Rounded& r, const Element& el, int bits, float x) {
    const int binades = static_cast<int>(bits_of(r.binade) >> 23) - static_cast<int>(bits_of(el.min_normal) >> 23);
    const u32 count = static_cast<u32>(static_cast<int>(r.integer)) + (static_cast<u32>(binades) << el.mantissa_bits);
    const u32 negative = count != 0 ? bits_of(x) >> 31 : 0u;
    const u32 whole = (negative != 0 ? 0u - count : count) & ((1u << bits) - 1u);
    return el.is_int != 0 ? whole : count | negative << (bits - 1);
}

// Return the code of a power-of-two scale that is a number.
MX_INLINE u32 code(const Scale& s, const Format& f) {
    return static_cast<u32>(127 - static_cast<int>(bits_of(s.down) >> 23) + f.scale_emax);
}

// Return the scale of twice the size, for a power-of-two scale; `up` is NaN where that exceeds the range.
MX_INLINE Scale next_scale(const Scale& s, const Format& f) {
    const float up = s.down > power_of_two(-f.scale_emax) ? s.up + s.up : float_of(QUIET_NAN);
    return {s.down * 0.5f, up};
}

MX_INLINE float squared(float x) { return x * x; }

// Return 1 where elements are divided by the scale of their block, because the tensor has no scale of its own.
MX_INLINE int divides(const Format& f) { return f.tensor_scale == 0.0f; }

// Return the scale of a tensor, given the float32 bits of its largest finite magnitude: see
// mxlab/numerics/reference.py.
MX_INLINE float tensor_scale(u32 amax, const Format& f) {
    const float t = float_of(amax) / (f.element.max * f.scale.max);
    return t > 0x1p-117f ? t : 0x1p-117f;
}

// Round the floating-point scale of a block, given the float32 bits of its largest magnitude; it is never zero.
MX_INLINE Rounded round_scale(u32 amax, const Format& f) {
    const u32 wanted = bits_of(float_of(amax) / f.element.max / (divides(f) ? 1.0f : f.tensor_scale));
    const int limited = smaller(static_cast<int>(wanted), static_cast<int>(bits_of(f.scale.max)));
    const Rounded r = round_magnitude<Rounding::even>(float_of(static_cast<u32>(limited)), f.scale, 0.0f);
    return {r.integer > 0.0f ? r.integer : 1.0f, r.binade};
}

// Return the floating-point scale of a block, given the float32 bits of its largest magnitude. `up` multiplies elements
// on their way back. `down` is its inverse, taken in two steps, if the tensor has a scale of its own; without one,
// elements are divided by `up`, and `down` is 1.
MX_INLINE Scale floating_scale(u32 amax, const Format& f) {
    const float t = divides(f) ? 1.0f : f.tensor_scale;
    const Rounded r = round_scale(amax, f);
    const float s = r.integer * power_of_two(-f.scale.mantissa_bits) * r.binade;
    return {divides(f) ? 1.0f : 1.0f / t / s, amax >= EXPONENT ? float_of(QUIET_NAN) : t * s};
}

// Round an element of a block with a floating-point scale to the element's grid.
template <Rounding R>
MX_INLINE Rounded round_floating(float x, const Scale& s, const Element& el, int divides, float noise) {
    const float scaled = x * s.down / (divides != 0 ? s.up : 1.0f);
    const int y = static_cast<int>(bits_of(scaled) & MAGNITUDE);
    const float limited = float_of(static_cast<u32>(smaller(y, static_cast<int>(bits_of(el.max)))));
    return round_magnitude<R>(limited, el, noise);
}

// Quantize it.
template <Rounding R>
MX_INLINE float quantize_floating(float x, const Scale& s, const Element& el, int divides, float noise) {
    const Rounded r = round_floating<R>(x, s, el, divides, noise);
    return r.integer * power_of_two(-el.mantissa_bits) * r.binade * with_sign_of(s.up, x) + 0.0f;
}

// Round an element on its own: what overflows the format becomes infinite, what only the type cannot hold saturates,
// NaN and infinities stay.
template <class T, Rounding R>
MX_INLINE float round_alone(float x, const Element& el, bool subnormals, float noise) {
    const float a = magnitude(x);
    const bool finite = bits_of(a) < EXPONENT;
    const Rounded rounded = round_magnitude<R>(finite ? a : 0.0f, el, noise);
    float r = rounded.integer * power_of_two(-el.mantissa_bits) * rounded.binade;
    r = r > el.max ? float_of(EXPONENT) : saturated<T>(r);
    r = !subnormals && a < el.min_normal ? 0.0f : r;
    return finite ? with_sign_of(r, x) + 0.0f : x;
}

}  // namespace mx::MX_ISA::exact
