// What one element and one block go through: the code that the CPU kernels and the CUDA kernels share.
//
// Both numerics of mxlab are here (see docs/architecture.md): `exact`, the OCP Microscaling specification v1.0, section
// 6.3, and `emulator`, what microsoft/microxcaling's torch path computes. mxlab/backends/reference.py and
// microxcaling.py say the same in torch; the tests hold all of them to the same bits.
//
// No header of the standard library is included: NVRTC has none. Nothing here may be compiled with -ffast-math, nor
// with a * b + c contracted to one operation but where multiply_add says so.
#pragma once

#if defined(__CUDACC__)
#define MX_MEMBER __host__ __device__ __forceinline__
#else
#define MX_MEMBER inline __attribute__((always_inline))
#endif
#define MX_INLINE static MX_MEMBER

// Where one instruction of the GPU does what takes several here: the architecture, or 0. Bits may differ for NaN only.
// tests/cuda_on_cpu.h takes the rest of the CUDA code to the CPU, and defines MX_NO_PTX.
#if defined(__CUDA_ARCH__) && !defined(MX_NO_PTX)
#define MX_PTX __CUDA_ARCH__
#else
#define MX_PTX 0
#endif

namespace mx {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

enum class Rounding { nearest, even, floor, dither };

// Formats, with the constants that mxlab/formats.py derives from its rows.
struct Element {
    int mantissa_bits;
    int emax;
    float min_normal;  // 2^emin
    float max;
    int is_int;  // 0 or 1; a bool keeps GCC from vectorising
};

struct Format {
    Element element;
    // Scales that are powers of two:
    int scale_emax;     // the shared exponent lies in [-scale_emax, scale_emax]
    int flushed_below;  // blocks whose largest magnitude is below 2^this become zero
    u32 carry;          // what is added to a largest mantissa, of 23 bits, before its exponent is taken
    // Scales that are floating-point numbers:
    Element scale;
    float tensor_scale;  // on top of all blocks' scales; 0: there is none
};

// Each instruction set compiles its own copy of the code; the namespace keeps the linker from mixing them up.
#ifndef MX_ISA
#define MX_ISA portable
#endif
namespace MX_ISA {

// ---------------------------------------------------------------------------------------------------------- bits

MX_INLINE u32 bits_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(x);
#else
    return __builtin_bit_cast(u32, x);
#endif
}

MX_INLINE float float_of(u32 bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    return __builtin_bit_cast(float, bits);
#endif
}

constexpr u32 SIGN = 0x80000000u, MAGNITUDE = 0x7FFFFFFFu, EXPONENT = 0x7F800000u, QUIET_NAN = 0x7FC00000u;

MX_INLINE float magnitude(float x) { return float_of(bits_of(x) & MAGNITUDE); }
MX_INLINE float with_sign_of(float magnitude, float x) { return float_of(bits_of(magnitude) | (bits_of(x) & SIGN)); }
MX_INLINE int larger(int a, int b) { return a > b ? a : b; }
MX_INLINE int smaller(int a, int b) { return a < b ? a : b; }

// a * b + c where a * b is exact or c is zero, so that fusing them changes nothing.
MX_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

MX_INLINE float round_down(float x) {
#if defined(__CUDA_ARCH__)
    return floorf(x);
#else
    return __builtin_floorf(x);
#endif
}

MX_INLINE float round_to_even(float x) {
#if defined(__CUDA_ARCH__)
    return rintf(x);
#else
    return __builtin_rintf(x);
#endif
}

// Toward zero, where 0 <= x < 2^24.
MX_INLINE float truncated(float x) {
#if defined(__CUDA_ARCH__)
    return truncf(x);
#else
    return static_cast<float>(static_cast<int>(x));
#endif
}

// x / unit, where unit is 0, infinite or a power of two from 2^-126 on. GPUs have no instruction for a division, but the
// inverse is exact: 2^(254 - b) for the biased exponent b, the subnormal 2^-127 for b = 254, and 0 for infinity.
MX_INLINE float divided(float x, float unit) {
#if defined(__CUDA_ARCH__)
    const int b = static_cast<int>(bits_of(unit));
    const int inverse = larger(0x7F000000 - b, (0x7F800000 - b) >> 1);
    return x * float_of(b == 0 ? EXPONENT : static_cast<u32>(inverse));
#else
    return x / unit;
#endif
}

// 2^e for -127 <= e <= 127. The biased exponent of 2^-127 is 0: it is the subnormal with the top mantissa bit.
MX_INLINE float power_of_two(int e) { return float_of(static_cast<u32>(larger((e + 127) * (1 << 23), 1 << 22))); }

// A positive float32 as exponent and the 23 mantissa bits behind the leading one; subnormals are normalised.
struct Binary {
    int exponent;
    u32 fraction;
};

MX_INLINE Binary binary(u32 magnitude_bits) {
    const bool normal = magnitude_bits >= 0x00800000u;
    // The mantissa of a subnormal is an integer below 2^23; as a float it is normalised, exactly.
    const u32 b = normal ? magnitude_bits : bits_of(static_cast<float>(static_cast<int>(magnitude_bits)));
    return {static_cast<int>(b >> 23) - (normal ? 127 : 127 + 149), b & 0x007FFFFFu};
}

// ------------------------------------------------------------------------------------------------------- storage

// float32, bfloat16 and float16 in memory, and as the float32 that all arithmetic is done in. `round` is the value
// after rounding to the type, half to even, as torch rounds the result of every operation.
struct F32 {
    using Stored = float;
    static constexpr int mantissa_bits = 23;
    MX_INLINE float load(float x) { return x; }
    MX_INLINE float store(float x) { return x; }
    MX_INLINE float round(float x) { return x; }
};

struct BF16 {
    using Stored = u16;
    static constexpr int mantissa_bits = 7;
    MX_INLINE float load(u16 x) { return float_of(static_cast<u32>(x) << 16); }
    MX_INLINE u32 rounded_bits(float x) {
        const u32 b = bits_of(x);
        const u32 rounded = b + 0x7FFFu + ((b >> 16) & 1u);
        return (b & MAGNITUDE) > EXPONENT ? QUIET_NAN : rounded;
    }
#if MX_PTX >= 800
    MX_INLINE u16 store(float x) {
        u16 r;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
        return r;
    }
    MX_INLINE float round(float x) {
        u32 r;  // x in the upper half, 0 in the lower: as a float, x rounded
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x), "f"(0.0f));
        return float_of(r);
    }
#else
    MX_INLINE u16 store(float x) { return static_cast<u16>(rounded_bits(x) >> 16); }
    MX_INLINE float round(float x) { return float_of(rounded_bits(x) & 0xFFFF0000u); }
#endif
};

struct F16 {
    using Stored = u16;
    static constexpr int mantissa_bits = 10;
#if MX_PTX
    MX_INLINE float load(u16 x) {
        float r;
        asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
        return r;
    }
    MX_INLINE u16 store(float x) {
        u16 r;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
        return r;
    }
    MX_INLINE float round(float x) { return load(store(x)); }
#else
    MX_INLINE float load(u16 x) {
        const u32 shifted = static_cast<u32>(x & 0x7FFFu) << 13;
        const float scaled = float_of(shifted) * float_of(0x77800000u);  // 2^112: the difference of the biases
        const u32 m = shifted >= 0x0F800000u ? shifted | EXPONENT : bits_of(scaled);
        return float_of(m | (static_cast<u32>(x & 0x8000u) << 16));
    }
    MX_INLINE float round(float x) {
        const float a = magnitude(x);
        // Adding and taking away 2^23 units of the last place rounds half to even, the unit being 2^-10 of the
        // binade, or 2^-24 below the smallest normal number.
        const u32 binade = static_cast<u32>(larger(static_cast<int>(bits_of(a) & EXPONENT), 0x38800000));
        const float big = float_of(binade + (13u << 23));
        const float rounded = a < 65520.0f ? (a + big) - big : (a == a ? float_of(EXPONENT) : float_of(QUIET_NAN));
        return with_sign_of(rounded, x);
    }
    MX_INLINE u16 store(float x) {
        const float r = round(x);
        const u32 m = bits_of(r) & MAGNITUDE;
        const u32 half = m >= EXPONENT ? (m > EXPONENT ? 0x7E00u : 0x7C00u)
                                       : bits_of(float_of(m) * float_of(0x07800000u)) >> 13;  // 2^-112
        return static_cast<u16>(half | (bits_of(r) >> 16 & 0x8000u));
    }
#endif
};

// -------------------------------------------------------------------------------------------------------- dither

// Philox4x32-10 (Salmon et al., SC 2011): element i gets word i mod 4 of the counter i / 4 under the key `seed`.
struct Words {
    u32 word[4];
};

MX_INLINE Words philox(u64 counter, u64 seed) {
    u32 c0 = static_cast<u32>(counter), c1 = static_cast<u32>(counter >> 32), c2 = 0, c3 = 0;
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10  // flat, so that a loop over counters can be done with vectors
#endif
    for (int i = 0; i < 10; ++i) {
        const u64 p0 = 0xD2511F53ull * c0, p1 = 0xCD9E8D57ull * c2;
        c0 = static_cast<u32>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<u32>(p1);
        c2 = static_cast<u32>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<u32>(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// A multiple of 2^-24 in [0, 1).
MX_INLINE float uniform(u32 word) { return static_cast<float>(static_cast<int>(word >> 8)) * 0x1p-24f; }

// --------------------------------------------------------------------------------------------------------- exact

namespace exact {

// What a block is multiplied with on its way to the element format, 2^-s, and back. Elements come back as integers, in
// units of 2^-mantissa_bits of their binade, so that `up` is 2^(s - mantissa_bits).
struct Scale {
    float down, up;
};

// From the bits of the block's largest magnitude (NaN and infinities above all others).
MX_INLINE Scale scale(u32 amax, const Format& f) {
    const Binary b = binary(amax);
    const int e = amax == 0 ? -126 : b.exponent;
    const int wanted = e + static_cast<int>((b.fraction + f.carry) >> 23) - f.element.emax;
    const int s = smaller(larger(wanted, -f.scale_emax), f.scale_emax);
    const float kept = e < f.flushed_below ? 0.0f : power_of_two(-f.element.mantissa_bits);
    const bool has_none = wanted > f.scale_emax || amax >= EXPONENT;
    return {power_of_two(-s), (has_none ? float_of(QUIET_NAN) : power_of_two(s)) * kept};  // exact, also if subnormal
}

// a * steps rounded to an integer, where 0 <= a * steps < 2^24. Halves away from zero would be truncate(v + 0.5), but for
// 0.49999997, which that sum rounds up to 1: the constant is the float below 0.5.
template <Rounding R>
MX_INLINE float to_integer(float a, float steps, float noise) {
    if constexpr (R == Rounding::nearest)
        return truncated(multiply_add(a, steps, 0x0.ffffffp-1f));
    const float v = a * steps;
    if constexpr (R == Rounding::even) return round_to_even(v);
    const float whole = truncated(v);
    if constexpr (R == Rounding::floor) return whole;
    // floor(v + u), without the rounding of that sum.
    return whole + (v - whole >= 1.0f - noise ? 1.0f : 0.0f);
}

// A finite magnitude rounded to the element's grid, not limited to its largest value: `integer` units of
// 2^-mantissa_bits of `binade`. An integer format is the case emin = emax = 0.
struct Rounded {
    float integer, binade;
};

template <Rounding R>
MX_INLINE Rounded round_magnitude(float a, const Element& el, float noise) {
    const int field = larger(static_cast<int>(bits_of(a) & EXPONENT), static_cast<int>(bits_of(el.min_normal)));
    const float twice_inverse = float_of(EXPONENT - static_cast<u32>(field));  // 2 / binade: never subnormal
    const float integer = to_integer<R>(a * twice_inverse, power_of_two(el.mantissa_bits - 1), noise);
    return {integer, float_of(static_cast<u32>(field))};
}

// An element of a block. Its magnitude is limited first: the largest value is on the grid, and NaN becomes a number
// (the block's scale is NaN then). Only the last product can round.
template <Rounding R>
MX_INLINE float quantize(float x, const Scale& s, const Element& el, float noise) {
    const int y = static_cast<int>(bits_of(x * s.down) & MAGNITUDE);
    const float limited = float_of(static_cast<u32>(smaller(y, static_cast<int>(bits_of(el.max)))));
    const Rounded r = round_magnitude<R>(limited, el, noise);
    return multiply_add(r.integer * with_sign_of(s.up, x), r.binade, 0.0f);  // + 0: a zero result is +0
}

// The same for elements from -1 to less than 1, and a scale no smaller than the largest magnitude: only what is positive
// needs a limit. As integers, the bits of negative numbers are below those of all others.
template <Rounding R>
MX_INLINE float quantize_asymmetric(float x, const Scale& s, const Element& el, float noise) {
    const int y = smaller(static_cast<int>(bits_of(x * s.down)), static_cast<int>(bits_of(el.max)));
    const Rounded r = round_magnitude<R>(float_of(static_cast<u32>(y) & MAGNITUDE), el, noise);
    return multiply_add(r.integer * with_sign_of(s.up, x), r.binade, 0.0f);
}

// Where the scale is a power of two, the next one, if the range has it, or else NaN.
MX_INLINE Scale next_scale(const Scale& s, const Format& f) {
    const float up = s.down > power_of_two(-f.scale_emax) ? s.up + s.up : float_of(QUIET_NAN);
    return {s.down * 0.5f, up};
}

MX_INLINE float squared(float x) { return x * x; }

// Whether the scale of a block is the only one, and a divisor.
MX_INLINE int divides(const Format& f) { return f.tensor_scale == 0.0f; }

// The scale of a tensor whose largest finite magnitude is given: see mxlab/backends/reference.py.
MX_INLINE float tensor_scale(u32 amax, const Format& f) {
    const float t = float_of(amax) / (f.element.max * f.scale.max);
    return t > 0x1p-117f ? t : 0x1p-117f;
}

// A scale that is a floating-point number. `up` is the factor that takes elements back, as they are, and `down`, where
// there is a scale of the tensor, its inverse in two steps; elsewhere elements are divided by `up`, and `down` is 1.
MX_INLINE Scale floating_scale(u32 amax, const Format& f) {
    const float t = divides(f) ? 1.0f : f.tensor_scale;
    const u32 wanted = bits_of(float_of(amax) / f.element.max / t);
    const int limited = smaller(static_cast<int>(wanted), static_cast<int>(bits_of(f.scale.max)));
    const Rounded r = round_magnitude<Rounding::even>(float_of(static_cast<u32>(limited)), f.scale, 0.0f);
    const float units = r.integer > 0.0f ? r.integer : 1.0f;  // never zero
    const float s = units * power_of_two(-f.scale.mantissa_bits) * r.binade;
    return {divides(f) ? 1.0f : 1.0f / t / s, amax >= EXPONENT ? float_of(QUIET_NAN) : t * s};
}

template <Rounding R>
MX_INLINE float quantize_floating(float x, const Scale& s, const Element& el, int divides, float noise) {
    const float scaled = x * s.down / (divides != 0 ? s.up : 1.0f);
    const int y = static_cast<int>(bits_of(scaled) & MAGNITUDE);
    const float limited = float_of(static_cast<u32>(smaller(y, static_cast<int>(bits_of(el.max)))));
    const Rounded r = round_magnitude<R>(limited, el, noise);
    return r.integer * power_of_two(-el.mantissa_bits) * r.binade * with_sign_of(s.up, x) + 0.0f;
}

// An element on its own: what overflows becomes infinite, NaN and infinities stay.
template <Rounding R>
MX_INLINE float round_alone(float x, const Element& el, bool subnormals, float noise) {
    const float a = magnitude(x);
    const bool finite = bits_of(a) < EXPONENT;
    const Rounded rounded = round_magnitude<R>(finite ? a : 0.0f, el, noise);
    float r = rounded.integer * power_of_two(-el.mantissa_bits) * rounded.binade;
    r = r > el.max ? float_of(EXPONENT) : r;
    r = !subnormals && a < el.min_normal ? 0.0f : r;
    return finite ? with_sign_of(r, x) + 0.0f : x;
}

}  // namespace exact

// ------------------------------------------------------------------------------------------------------ emulator

namespace emulator {

// How many of the largest mantissas of the binade 2^e have a log2 that rounds up to e + 1 in the type, as what to add
// to float32 bits so that just those carry into the exponent.
template <class T>
MX_INLINE u32 carry(int e) {
    const int a = e ^ (e >> 31);  // e if e >= 0, else -e - 1: the distance from log2's zero
    const int octave = static_cast<int>(bits_of(static_cast<float>(a | 1)) >> 23) - 127;
    // 0, 1, 2, 5, 11, 22, 44, 88 for a in 0-1, 2-3, 4-7, ...; and 0, 1, 2, 5, 10, 21, 40, 74 for bfloat16.
    u32 n = (T::mantissa_bits == 7 ? 84u : 88u) >> (7 - octave);
    if constexpr (T::mantissa_bits == 7) n = octave == 6 ? 40u : octave == 7 ? 74u : n;
    return n << (23 - T::mantissa_bits);
}

// floor(log2(amax)) with log2 rounded to the type. The emulator adds 2^-126 to an amax of zero to keep log2 finite;
// float16 has no such number, and its log2 is minus infinity there.
template <class T>
MX_INLINE int shared_exponent(u32 amax) {
    const Binary b = binary(amax);
    const int e = b.exponent + static_cast<int>((b.fraction + carry<T>(b.exponent)) >> 23);
    return amax != 0 ? e : T::mantissa_bits == 10 ? -(1 << 20) : -126;
}

using exact::Scale;

template <class T>
MX_INLINE Scale scale(u32 amax, const Format& f) {
    const int e = shared_exponent<T>(amax);
    const bool flushed = e < f.flushed_below;
    const int s = larger(e - f.element.emax, -f.scale_emax);
    const bool has_none = s > f.scale_emax || amax >= EXPONENT;
    const float up = has_none ? float_of(QUIET_NAN) : T::round(power_of_two(smaller(s, f.scale_emax)));
    // 1 / up is exact, and x * (1 / up) is x / up: `up` is a power of two, 0 or infinite. A flushed block is x * 0 / up.
    return {1.0f / up * (flushed ? 0.0f : 1.0f), up};
}

// A magnitude rounded to an integer.
template <class T, Rounding R>
MX_INLINE float whole(float m, float noise) {
    if constexpr (R == Rounding::floor) return round_down(m);
    if constexpr (R == Rounding::dither) {
        constexpr float steps = static_cast<float>(1 << (T::mantissa_bits + 1));
        // As many bits as the type's own random numbers have: never rounded up to 1.
        return round_down(T::round(m + static_cast<float>(static_cast<int>(noise * steps)) / steps));
    }
    const float nearest = round_down(T::round(m + 0.5f));
    if constexpr (R == Rounding::nearest) return nearest;
    const float halves = T::round(m - 0.5f) * 0.5f;
    return T::round(nearest - (halves == round_down(halves) ? 1.0f : 0.0f));
}

template <class T, Rounding R>
MX_INLINE float to_integer(float v, float noise) {
    const float integer = whole<T, R>(magnitude(v), noise);
    return v == 0.0f ? 0.0f : with_sign_of(integer, v);  // integer * sign(v), the sign of -0 being +0
}

// 2^e of a value of the type, e the emulator's exponent, at least emin; 1 for integer formats.
template <class T>
MX_INLINE float binade(float y, const Element& el) {
    const u32 b = bits_of(y) & MAGNITUDE;
    const u32 carried = b + carry<T>(static_cast<int>(b >> 23) - 127);
    const int field = static_cast<int>(b == 0 || el.is_int != 0 ? bits_of(1.0f) : carried & EXPONENT);
    return T::round(float_of(static_cast<u32>(larger(field, static_cast<int>(bits_of(el.min_normal))))));
}

template <class T, Rounding R>
MX_INLINE float round_to_grid(float y, const Element& el, float noise) {
    const float steps = power_of_two(el.mantissa_bits), step = power_of_two(-el.mantissa_bits);
    const float unit = binade<T>(y, el);
    const float v = T::round(T::round(divided(y, unit)) * steps);
    return T::round(T::round(to_integer<T, R>(v, noise) * step) * unit);
}

// An element of a block, y = x * down rounded to the type, still to be multiplied by `up`.
template <class T, Rounding R>
MX_INLINE float round_scaled(float y, const Element& el, float noise) {
    const float r = round_to_grid<T, R>(y, el, noise);
    const float limited = r > el.max ? el.max : r < -el.max ? -el.max : r;
    return (bits_of(y) & MAGNITUDE) == EXPONENT ? y : limited;
}

template <class T, Rounding R>
MX_INLINE float quantize(float x, const Scale& s, const Element& el, float noise) {
    return T::round(round_scaled<T, R>(T::round(x * s.down), el, noise) * s.up);
}

// As round_scaled, in fewer steps, for elements of up to 8 significant bits with emin in [-64, 0] and emax <= 32, for
// float32 and bfloat16, and for the y that quantize passes, |y| < 2^(emax + 1). Nothing but the rounding to an integer
// rounds then: what y is divided by exceeds 1 only where the quotient is at least 1/2.
template <class T, Rounding R>
MX_INLINE float round_scaled_simply(float y, const Element& el, float noise) {
    const u32 b = bits_of(y) & MAGNITUDE;
    const int e = static_cast<int>(b >> 23) - 127, a = e ^ (e >> 31);
    const int octave = static_cast<int>(bits_of(static_cast<float>(a | 1)) >> 23) - 127;
    // carry<T>(e), but for the highest octaves: below emin the exponent does not matter.
    const u32 n = (T::mantissa_bits == 7 ? 84u : 88u) >> (7 - octave);
    const int carried = static_cast<int>((b + (n << (23 - T::mantissa_bits))) & EXPONENT);
    const int lowest = static_cast<int>(bits_of(el.min_normal)), highest = el.is_int != 0 ? lowest : 0x7F000000;
    const int unit = smaller(larger(carried, lowest), highest), steps = el.mantissa_bits << 23;
    const float v = float_of(b) * float_of(static_cast<u32>(0x7F000000 + steps - unit));
    const float r = whole<T, R>(v, noise) * float_of(static_cast<u32>(unit - steps));
    return with_sign_of(r < el.max ? r : el.max, y + 0.0f);  // -0 + 0 is +0
}

// As quantize, under the same conditions; still to be rounded to the type.
template <class T, Rounding R>
MX_INLINE float quantize_simply(float x, const Scale& s, const Element& el, float noise) {
    return round_scaled_simply<T, R>(T::round(x * s.down), el, noise) * s.up;
}

template <class T, Rounding R>
MX_INLINE float round_alone(float x, const Element& el, bool subnormals, float noise) {
    const float y = subnormals || magnitude(x) >= el.min_normal ? x : x * 0.0f;
    const float r = round_to_grid<T, R>(y, el, noise);
    const float rounded = magnitude(r) > T::round(el.max) ? with_sign_of(float_of(EXPONENT), r) : r;
    return (bits_of(x) & MAGNITUDE) == EXPONENT ? x : rounded;
}

}  // namespace emulator
}  // namespace MX_ISA
}  // namespace mx
