// The operations that the loops of the CPU and of CUDA are instantiated with. An operation says, for a storage type T
// and a rounding, how a block gets its scale, how an element is quantized under a scale, what becomes of a result
// beyond the range of T, and how an element is rounded alone.
#pragma once

#include "exact.h"
#include "microxcaling.h"

namespace mx::MX_ISA {

// The exact numerics with a power-of-two scale.
template <class T_, Rounding R>
struct Exact {
    using T = T_;
    static constexpr bool DRAWS = R == Rounding::dither;  // needs a random number for each element
    static constexpr bool SEARCHES = false;               // tries the next power of two, too: see exact::next_scale
    MX_INLINE Scale scale(u32 amax, const Format& f) { return exact::scale(amax, f); }
    MX_INLINE float element(float x, const Scale& s, const Format& f, float noise) {
        return exact::quantize<R>(x, s, f.element, noise);
    }
    // What the element is rounded to, as a number of the element format.
    MX_INLINE exact::Rounded rounded(float x, const Scale& s, const Format& f) {
        return exact::round_limited<R>(x, s, f.element, 0.0f);
    }
    // What the smallest element is under the scale.
    MX_INLINE float unit(const Scale& s, const Format& f) { return s.up * f.element.min_normal; }
    MX_INLINE u32 scale_code(const Scale& s, u32, const Format& f) { return exact::code(s, f); }
    MX_INLINE float in_range(float result) { return saturated<T>(result); }
    MX_INLINE float alone(float x, const Element& el, bool subnormals, float noise) {
        return exact::round_alone<T, R>(x, el, subnormals, noise);
    }
};

// The same for elements in [-1, 1).
template <class T, Rounding R>
struct Asymmetric : Exact<T, R> {
    MX_INLINE float element(float x, const Scale& s, const Format& f, float noise) {
        return exact::quantize_asymmetric<R>(x, s, f.element, noise);
    }
    MX_INLINE exact::Rounded rounded(float x, const Scale& s, const Format& f) {
        return exact::round_asymmetric<R>(x, s, f.element, 0.0f);
    }
};

// The same with the better of two scales, by the sum of squared errors.
template <class T, Rounding R>
struct Searched : Exact<T, R> {
    static constexpr bool SEARCHES = true;
};

// The same with a floating-point scale.
template <class T, Rounding R>
struct Floating : Exact<T, R> {
    MX_INLINE Scale scale(u32 amax, const Format& f) { return exact::floating_scale(amax, f); }
    MX_INLINE float element(float x, const Scale& s, const Format& f, float noise) {
        return exact::quantize_floating<R>(x, s, f.element, exact::divides(f), noise);
    }
    MX_INLINE exact::Rounded rounded(float x, const Scale& s, const Format& f) {
        return exact::round_floating<R>(x, s, f.element, exact::divides(f), 0.0f);
    }
    MX_INLINE float unit(const Scale& s, const Format& f) {
        return s.up * (power_of_two(-f.element.mantissa_bits) * f.element.min_normal);
    }
    MX_INLINE u32 scale_code(const Scale&, u32 amax, const Format& f) {
        return exact::code(exact::round_scale(amax, f), f.scale, 9, 0.0f);
    }
};

// microxcaling's numerics.
template <class T_, Rounding R>
struct Microxcaling {
    using T = T_;
    static constexpr bool DRAWS = R == Rounding::dither, SEARCHES = false;
    MX_INLINE Scale scale(u32 amax, const Format& f) { return microxcaling::scale<T>(amax, f); }
    MX_INLINE float element(float x, const Scale& s, const Format& f, float noise) {
        return microxcaling::quantize<T, R>(x, s, f.element, noise);
    }
    MX_INLINE float in_range(float result) { return result; }  // overflows, as in microxcaling
    MX_INLINE float alone(float x, const Element& el, bool subnormals, float noise) {
        return microxcaling::round_alone<T, R>(x, el, subnormals, noise);
    }
};

// The same in fewer steps, for the formats that microxcaling::quantize_simply serves.
template <class T, Rounding R>
struct SimpleMicroxcaling : Microxcaling<T, R> {
    MX_INLINE float element(float x, const Scale& s, const Format& f, float noise) {
        return microxcaling::quantize_simply<T, R>(x, s, f.element, noise);
    }
};

}  // namespace mx::MX_ISA
