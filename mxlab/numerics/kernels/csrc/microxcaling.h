// The `microxcaling` numerics of one block and one element: what microsoft/microxcaling's torch path computes, which
// rounds to the tensor's dtype after every operation. mxlab/numerics/microxcaling.py computes the same in torch; the
// tests require the same bits.
#pragma once

#include "mx.h"

namespace mx::MX_ISA::microxcaling {

// Return what to add to float32 bits so that just those mantissas of the binade 2^e carry into the exponent whose log2
// rounds up to e + 1 in the type.
template <class T>
MX_INLINE u32 carry(int e) {
    const int a = e ^ (e >> 31);  // e if e >= 0, else -e - 1: the distance from log2's zero
    const int octave = static_cast<int>(bits_of(static_cast<float>(a | 1)) >> 23) - 127;
    // 0, 1, 2, 5, 11, 22, 44, 88 for a in 0-1, 2-3, 4-7, ...; and 0, 1, 2, 5, 10, 21, 40, 74 for bfloat16.
    u32 n = (T::mantissa_bits == 7 ? 84u : 88u) >> (7 - octave);
    if constexpr (T::mantissa_bits == 7) n = octave == 6 ? 40u : octave == 7 ? 74u : n;
    return n << (23 - T::mantissa_bits);
}

// Return floor(log2(amax)), with log2 rounded to the type. microxcaling adds 2^-126 to an amax of zero to keep log2
// finite; float16 has no such number, and log2 is minus infinity there.
template <class T>
MX_INLINE int shared_exponent(u32 amax) {
    const Binary b = binary(amax);
    const int e = b.exponent + static_cast<int>((b.fraction + carry<T>(b.exponent)) >> 23);
    return amax != 0 ? e : T::mantissa_bits == 10 ? -(1 << 20) : -126;
}

// Return the scale of a block, given the float32 bits of its largest magnitude.
template <class T>
MX_INLINE Scale scale(u32 amax, const Format& f) {
    const int e = shared_exponent<T>(amax);
    const bool flushed = e < f.flushed_below;
    const int s = larger(e - f.element.emax, -f.scale_emax);
    const bool has_none = s > f.scale_emax || amax >= EXPONENT;
    const float up = has_none ? float_of(QUIET_NAN) : T::round(power_of_two(smaller(s, f.scale_emax)));
    // x * (1 / up) is x / up, as 1 / up is exact: `up` is a power of two, 0 or infinite. A flushed block is x * 0 / up.
    return {1.0f / up * (flushed ? 0.0f : 1.0f), up};
}

// Round a magnitude to an integer.
template <class T, Rounding R>
MX_INLINE float whole(float m, float noise) {
    if constexpr (R == Rounding::floor) return round_down(m);
    if constexpr (R == Rounding::dither) {
        constexpr float steps = static_cast<float>(1 << (T::mantissa_bits + 1));
        // The noise has as many bits as the type's own random numbers: it is never rounded up to 1.
        return round_down(T::round(m + static_cast<float>(static_cast<int>(noise * steps)) / steps));
    }
    const float nearest = round_down(T::round(m + 0.5f));
    if constexpr (R == Rounding::nearest) return nearest;
    const float halves = T::round(m - 0.5f) * 0.5f;
    return T::round(nearest - (halves == round_down(halves) ? 1.0f : 0.0f));
}

// Round a value to an integer.
template <class T, Rounding R>
MX_INLINE float to_integer(float v, float noise) {
    const float integer = whole<T, R>(magnitude(v), noise);
    return v == 0.0f ? 0.0f : with_sign_of(integer, v);  // integer * sign(v), the sign of -0 being +0
}

// Return 2^e of a value of the type, where e is microxcaling's exponent of it, but at least emin; 1 for integer
// formats.
template <class T>
MX_INLINE float binade(float y, const Element& el) {
    const u32 b = bits_of(y) & MAGNITUDE;
    const u32 carried = b + carry<T>(static_cast<int>(b >> 23) - 127);
    const int field = static_cast<int>(b == 0 || el.is_int != 0 ? bits_of(1.0f) : carried & EXPONENT);
    return T::round(float_of(static_cast<u32>(larger(field, static_cast<int>(bits_of(el.min_normal))))));
}

// Round a value to the element's grid, without limiting it to the largest element.
template <class T, Rounding R>
MX_INLINE float round_to_grid(float y, const Element& el, float noise) {
    const float steps = power_of_two(el.mantissa_bits), step = power_of_two(-el.mantissa_bits);
    const float unit = binade<T>(y, el);
    const float v = T::round(T::round(divided(y, unit)) * steps);
    return T::round(T::round(to_integer<T, R>(v, noise) * step) * unit);
}

// Round y = x * down, already rounded to the type, to an element; the caller multiplies by `up`.
template <class T, Rounding R>
MX_INLINE float round_scaled(float y, const Element& el, float noise) {
    const float r = round_to_grid<T, R>(y, el, noise);
    const float limited = r > el.max ? el.max : r < -el.max ? -el.max : r;
    return (bits_of(y) & MAGNITUDE) == EXPONENT ? y : limited;
}

// Quantize an element of a block.
template <class T, Rounding R>
MX_INLINE float quantize(float x, const Scale& s, const Element& el, float noise) {
    return T::round(round_scaled<T, R>(T::round(x * s.down), el, noise) * s.up);
}

// As round_scaled, in fewer steps, for elements of up to 8 significant bits with emin in [-64, 0] and emax <= 32, for
// float32 and bfloat16, and for the y that quantize passes, |y| < 2^(emax + 1). Under these conditions only the
// rounding to an integer rounds: the divisor of y exceeds 1 only where the quotient is at least 1/2.
template <class T, Rounding R>
MX_INLINE float round_scaled_simply(float y, const Element& el, float noise) {
    const u32 b = bits_of(y) & MAGNITUDE;
    const int e = static_cast<int>(b >> 23) - 127, a = e ^ (e >> 31);
    const int octave = static_cast<int>(bits_of(static_cast<float>(a | 1)) >> 23) - 127;
    // carry<T>(e), except in the highest octaves: below emin the exponent does not matter.
    const u32 n = (T::mantissa_bits == 7 ? 84u : 88u) >> (7 - octave);
    const int carried = static_cast<int>((b + (n << (23 - T::mantissa_bits))) & EXPONENT);
    const int lowest = static_cast<int>(bits_of(el.min_normal)), highest = el.is_int != 0 ? lowest : 0x7F000000;
    const int unit = smaller(larger(carried, lowest), highest), steps = el.mantissa_bits << 23;
    const float v = float_of(b) * float_of(static_cast<u32>(0x7F000000 + steps - unit));
    const float r = whole<T, R>(v, noise) * float_of(static_cast<u32>(unit - steps));
    return with_sign_of(r < el.max ? r : el.max, y + 0.0f);  // -0 + 0 is +0
}

// As quantize, under the same conditions; the caller rounds the result to the type.
template <class T, Rounding R>
MX_INLINE float quantize_simply(float x, const Scale& s, const Element& el, float noise) {
    return round_scaled_simply<T, R>(T::round(x * s.down), el, noise) * s.up;
}

// Round an element on its own: overflow becomes infinite, NaN and infinities stay.
template <class T, Rounding R>
MX_INLINE float round_alone(float x, const Element& el, bool subnormals, float noise) {
    const float y = subnormals || magnitude(x) >= el.min_normal ? x : x * 0.0f;
    const float r = round_to_grid<T, R>(y, el, noise);
    const float rounded = magnitude(r) > T::round(el.max) ? with_sign_of(float_of(EXPONENT), r) : r;
    return (bits_of(x) & MAGNITUDE) == EXPONENT ? x : rounded;
}

}  // namespace mx::MX_ISA::microxcaling
