// The ground that the CPU kernels and the CUDA kernels share: formats, float32 bits, storage types, random numbers.
//
// exact.h, microxcaling.h and ops.h build on it. None of the four includes a header of the standard library: NVRTC has
// none. None may be compiled with -ffast-math, or with a * b + c contracted to one operation except in multiply_add.
#pragma once

#if defined(__CUDACC__)
#define MX_MEMBER __host__ __device__ __forceinline__
#else
#define MX_MEMBER inline __attribute__((always_inline))
#endif
#define MX_INLINE static MX_MEMBER

// The GPU architecture where one PTX instruction replaces several operations, or 0. Only the bits of a NaN may differ.
// tests/support/cuda_on_cpu.h runs the rest of the CUDA code on the CPU and defines MX_NO_PTX.
#if defined(__CUDA_ARCH__) && !defined(MX_NO_PTX)
#define MX_PTX __CUDA_ARCH__
#else
#define MX_PTX 0
#endif

namespace mx {

using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

enum class Rounding { nearest, nearest_zero, even, floor, dither };

// An element format, with the constants that mxlab/formats/elements.py derives from its row.
struct Element {
    int mantissa_bits;
    int emax;
    float min_normal;  // 2^emin
    float max;
    int is_int;  // 0 or 1; a bool keeps GCC from vectorizing
};

struct Format {
    Element element;
    // For scales that are powers of two:
    int scale_emax;     // the shared exponent lies in [-scale_emax, scale_emax]
    int flushed_below;  // blocks whose largest magnitude is below 2^flushed_below become zero
    u32 carry;          // added to the 23 mantissa bits of the largest magnitude before its exponent is taken
    // For scales that are floating-point numbers:
    Element scale;
    float tensor_scale;  // multiplies the scales of all blocks; 0 if the format has none
};

// The factors of a block: `down` on its way to the element format, `up` on its way back.
struct Scale {
    float down, up;
};

// Each instruction set compiles its own copy of the code, in its own namespace so that the linker keeps them apart.
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

// Return a * b + c, where a * b is exact or c is zero: fusing the two operations changes no bit.
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

// Round toward zero, for 0 <= x < 2^24.
MX_INLINE float truncated(float x) {
#if defined(__CUDA_ARCH__)
    return truncf(x);
#else
    return static_cast<float>(static_cast<int>(x));
#endif
}

// Return x / unit, where unit is 0, infinite or a power of two of at least 2^-126. GPUs have no division instruction,
// but the inverse is exact: 2^(254 - b) for the biased exponent b, the subnormal 2^-127 for b = 254, 0 for infinity.
MX_INLINE float divided(float x, float unit) {
#if defined(__CUDA_ARCH__)
    const int b = static_cast<int>(bits_of(unit));
    const int inverse = larger(0x7F000000 - b, (0x7F800000 - b) >> 1);
    return x * float_of(b == 0 ? EXPONENT : static_cast<u32>(inverse));
#else
    return x / unit;
#endif
}

// Return 2^e for -127 <= e <= 127. 2^-127 is a subnormal: its biased exponent is 0 and its top mantissa bit is set.
MX_INLINE float power_of_two(int e) { return float_of(static_cast<u32>(larger((e + 127) * (1 << 23), 1 << 22))); }

// A positive float32 as its exponent and the 23 mantissa bits behind the leading one; subnormals are normalized.
struct Binary {
    int exponent;
    u32 fraction;
};

MX_INLINE Binary binary(u32 magnitude_bits) {
    const bool normal = magnitude_bits >= 0x00800000u;
    // The mantissa of a subnormal is an integer below 2^23: converting it to a float normalizes it exactly.
    const u32 b = normal ? magnitude_bits : bits_of(static_cast<float>(static_cast<int>(magnitude_bits)));
    return {static_cast<int>(b >> 23) - (normal ? 127 : 127 + 149), b & 0x007FFFFFu};
}

// ------------------------------------------------------------------------------------------------------- storage

// float32, bfloat16 and float16. `load` and `store` convert between memory and float32, in which all arithmetic is
// done; `round` rounds a float32 to the type, ties to even, as torch rounds the result of every operation.
struct F32 {
    using Stored = float;
    static constexpr int mantissa_bits = 23;
    static constexpr float max = 0x1.fffffep127f;
    MX_INLINE float load(float x) { return x; }
    MX_INLINE float store(float x) { return x; }
    MX_INLINE float round(float x) { return x; }
};

struct BF16 {
    using Stored = u16;
    static constexpr int mantissa_bits = 7;
    static constexpr float max = 0x1.fep127f;
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
    static constexpr float max = 65504.0f;
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
        // Adding and subtracting 2^23 units in the last place rounds, ties to even. The unit is 2^-10 of the binade,
        // or 2^-24 below the smallest normal number.
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

// Return x, or the end of the type's range where x is beyond it. NaN stays: comparisons with it are false.
template <class T>
MX_INLINE float saturated(float x) {
    const float largest = T::max, limited = x > largest ? largest : x;
    return limited < -largest ? -largest : limited;
}

// -------------------------------------------------------------------------------------------------------- dither

// Philox4x32-10 (Salmon et al., SC 2011). Element i of a tensor gets word i mod 4 of counter i / 4 under key `seed`.
struct Words {
    u32 word[4];
};

MX_INLINE Words philox(u64 counter, u64 seed) {
    u32 c0 = static_cast<u32>(counter), c1 = static_cast<u32>(counter >> 32), c2 = 0, c3 = 0;
    u32 k0 = static_cast<u32>(seed), k1 = static_cast<u32>(seed >> 32);
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10  // without an inner loop, a loop over counters can be vectorized
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

// Return a multiple of 2^-24 in [0, 1).
MX_INLINE float uniform(u32 word) { return static_cast<float>(static_cast<int>(word >> 8)) * 0x1p-24f; }

}  // namespace MX_ISA
}  // namespace mx
