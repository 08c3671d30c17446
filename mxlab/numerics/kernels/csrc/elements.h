// The third step of quantizing on the CPU: the elements of blocks whose scales are known.
#pragma once

#include "loops.h"

namespace mx::MX_ISA {
namespace {

constexpr int LANES = 256;  // elements that a loop does together: columns, or indices into a table

// Return the smallest power of two whose products with multiples of 2^lowest, of mantissas no longer than bfloat16's,
// are bfloat16 numbers; products with a larger one need no rounding either. Infinity where there is none.
template <class T>
float smallest_exact(int mantissa_bits, int lowest) {
    const int e = -133 - lowest;  // 2^-133 is the smallest bfloat16
    const bool exists = T::mantissa_bits == 7 && mantissa_bits <= 7 && e <= 127;
    return exists ? power_of_two(larger(e, -126)) : float_of(EXPONENT);
}

MX_INLINE int exponent_of(float power) { return static_cast<int>(bits_of(power) >> 23) - 127; }

// The smallest and the largest scale `up` with which results need neither rounding to the type nor saturation.
struct Range {
    float from, to;
    MX_MEMBER int holds(float up) const { return (up >= from) & (up <= to); }  // comparisons with NaN are false
};

template <class Op>
struct ExactRange {
    static Range of(const Format& f) {
        const int m = f.element.mantissa_bits;
        const float from = smallest_exact<typename Op::T>(m, exponent_of(f.element.min_normal));
        return {from, power_of_two(126 - f.element.emax - m)};  // elements are at most 2^(emax + 1)
    }
};

template <class T, Rounding R>
struct ExactRange<Floating<T, R>> {
    static Range of(const Format&) { return {float_of(QUIET_NAN), float_of(QUIET_NAN)}; }  // none
};

// Two bfloat16 at a time are worth it where an element takes few operations.
template <class Op>
constexpr bool FEW_OPERATIONS = true;
template <class T, Rounding R>
constexpr bool FEW_OPERATIONS<Microxcaling<T, R>> = false;

// An operation that computes elements, with its format.
template <class Op>
struct Computed : Op {
    static constexpr int64_t MIN_LOOP_BLOCK = 32;  // a shorter block does not get a loop of its own
    static constexpr bool PACKED_PAIRS = Op::T::mantissa_bits == 7 && FEW_OPERATIONS<Op>;
    const Format& format;
    Range exact;

    Computed(const Format& f, const u32*) : format(f), exact(ExactRange<Op>::of(f)) {}
    MX_MEMBER int is_exact(float up) const { return exact.holds(up); }
};

// microxcaling's numerics for a 16-bit type, where a table holds what a scaled element is rounded to.
template <class T_>
struct LookedUp {
    using T = T_;
    static constexpr int64_t MIN_LOOP_BLOCK = 256;
    static constexpr bool PACKED_PAIRS = T::mantissa_bits == 7, SEARCHES = false;
    const Format& format;
    const u32* table;  // bits of float32
    float exact_from;

    LookedUp(const Format& f, const u32* t) : format(f), table(t) {
        const int m = f.element.mantissa_bits;
        exact_from = smallest_exact<T>(m, exponent_of(f.element.min_normal) - m);
    }
    MX_INLINE Scale scale(u32 amax, const Format& f) { return microxcaling::scale<T>(amax, f); }
    MX_MEMBER int is_exact(float up) const { return up >= exact_from; }
};

// Replace each index by its entry.
MX_SCALAR void look_up_all(const u32* table, u32* indices, int64_t n) {
    for (int64_t i = 0; i < n; ++i) indices[i] = table[indices[i]];
}

// A scale that all elements of a loop share, indexed like a pointer to one scale per element.
struct Broadcast {
    float value;
    MX_MEMBER float operator[](int64_t) const { return value; }
};

// Two bfloat16 in a 32-bit word are the upper halves of two float32, which saves widening and narrowing. They share a
// scale. Exact results need neither rounding nor saturation before their upper halves are taken.
MX_INLINE u32 word_at(const u16* x, int64_t i) {
    u32 word;
    __builtin_memcpy(&word, x + 2 * i, sizeof word);
    return word;
}

template <bool IS_EXACT>
MX_INLINE void store_word(u16* out, int64_t i, float low, float high) {
    const u32 word = IS_EXACT ? bits_of(low) >> 16 | (bits_of(high) & 0xFFFF0000u)
                              : BF16::rounded_bits(low) >> 16 | (BF16::rounded_bits(high) & 0xFFFF0000u);
    __builtin_memcpy(out + 2 * i, &word, sizeof word);
}

// Quantize `n` pairs of bfloat16. `down` and `up` are Broadcast, or pointers to one scale per pair.
template <bool IS_EXACT, class Op, class Scales>
MX_INLINE void pairs(const Op& op, const u16* x, u16* out, const float* noise, int64_t n, Scales down, Scales up) {
    const Format f = op.format;  // a copy, which the compiler knows is not written to
    MX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
        const u32 word = word_at(x, i);
        const Scale s{down[i], up[i]};
        const float low = Op::element(float_of(word << 16), s, f, noise ? noise[2 * i] : 0.0f);
        const float high = Op::element(float_of(word & 0xFFFF0000u), s, f, noise ? noise[2 * i + 1] : 0.0f);
        if constexpr (IS_EXACT)
            store_word<true>(out, i, low, high);
        else
            store_word<false>(out, i, Op::in_range(low), Op::in_range(high));
    }
}

template <bool IS_EXACT, class Scales>
MX_INLINE void pairs(const LookedUp<BF16>& op, const u16* x, u16* out, const float*, int64_t n, Scales down,
                     Scales up) {
    u32 low[LANES], high[LANES];
    for (int64_t start = 0; start < n; start += LANES) {
        const int64_t count = n - start < LANES ? n - start : LANES;
        for (int64_t i = 0; i < count; ++i) {
            const u32 word = word_at(x, start + i);
            low[i] = BF16::rounded_bits(float_of(word << 16) * down[start + i]) >> 16;
            high[i] = BF16::rounded_bits(float_of(word & 0xFFFF0000u) * down[start + i]) >> 16;
        }
        look_up_all(op.table, low, count);
        look_up_all(op.table, high, count);
        MX_INDEPENDENT
        for (int64_t i = 0; i < count; ++i)
            store_word<IS_EXACT>(out, start + i, float_of(low[i]) * up[start + i], float_of(high[i]) * up[start + i]);
    }
}

// Quantize `n` elements of any type, one by one. `down` and `up` are Broadcast, or pointers to one scale per element.
template <class Op, class Stored, class Scales>
MX_INLINE void elements(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t n, Scales down,
                        Scales up) {
    using T = typename Op::T;
    const Format f = op.format;
    MX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
        out[i] = T::store(Op::in_range(Op::element(T::load(x[i]), {down[i], up[i]}, f, noise ? noise[i] : 0.0f)));
}

template <class T, class Scales>
MX_INLINE void elements(const LookedUp<T>& op, const u16* x, u16* out, const float*, int64_t n, Scales down,
                        Scales up) {
    u32 found[LANES];
    for (int64_t start = 0; start < n; start += LANES) {
        const int64_t count = n - start < LANES ? n - start : LANES;
        for (int64_t i = 0; i < count; ++i) found[i] = T::store(T::load(x[start + i]) * down[start + i]);
        look_up_all(op.table, found, count);
        for (int64_t i = 0; i < count; ++i) out[start + i] = T::store(float_of(found[i]) * up[start + i]);
    }
}

}  // namespace
}  // namespace mx::MX_ISA
