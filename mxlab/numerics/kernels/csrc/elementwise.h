// Loops of the CPU over single elements: rounding, tables of 16-bit types, random numbers.
#pragma once

#include "loops.h"

namespace mx::MX_ISA {
namespace {

// Round elements [first, last) on their own.
void round_alone(const Buffers& b, const Element& given, Numerics numerics, Rounding rounding, bool subnormals,
                 int64_t first, int64_t last) {
    const auto round = [&, el = given](auto op) {
        using Op = decltype(op);
        using T = typename Op::T;
        const auto* const x = static_cast<const typename T::Stored*>(b.source);
        auto* const out = static_cast<typename T::Stored*>(b.target);
        const float* const noise = b.noise;
        MX_INDEPENDENT
        for (int64_t i = first; i < last; ++i)
            out[i] = T::store(Op::alone(T::load(x[i]), el, subnormals, noise ? noise[i] : 0.0f));
    };
    with_dtype(b.dtype, [&](auto t) {
        with_rounding(rounding, [&](auto r) {
            using T = decltype(t);
            constexpr Rounding R = decltype(r)::value;
            if (numerics == Numerics::exact) return round(Exact<T, R>{});
            if constexpr (is_microxcalings(R)) round(Microxcaling<T, R>{});
        });
    });
}

// Fill in what each value of a 16-bit type, an element already scaled, is rounded to, as the bits of a float32.
void microxcaling_table(u32* table, Dtype dtype, const Element& el, Rounding rounding) {
    with_dtype(dtype, [&](auto t) {
        with_rounding(rounding, [&](auto r) {
            using T = decltype(t);
            constexpr Rounding R = decltype(r)::value;
            if constexpr (sizeof(typename T::Stored) == 2 && is_microxcalings(R))
                for (int i = 0; i < TABLE_SIZE; ++i) {
                    const float y = T::load(static_cast<u16>(i));
                    table[i] = bits_of(microxcaling::round_scaled<T, R>(y, el, 0.0f));
                }
        });
    });
}

// Replace each of the 16-bit elements [first, last) by its entry.
MX_SCALAR void look_up(const Buffers& b, const uint16_t* table, int64_t first, int64_t last) {
    const auto* const x = static_cast<const u16*>(b.source);
    auto* const out = static_cast<u16*>(b.target);
    for (int64_t i = first; i < last; ++i) out[i] = table[x[i]];
}

// Draw the numbers of elements [first, last).
void uniform_numbers(float* target, uint64_t seed, int64_t first, int64_t last) {
    constexpr int64_t COUNTERS = 16;
    float numbers[4 * COUNTERS];
    for (int64_t start = first / 4; start * 4 < last; start += COUNTERS) {
        for (int64_t i = 0; i < COUNTERS; ++i) {
            const Words w = philox(static_cast<u64>(start + i), seed);
            for (int k = 0; k < 4; ++k) numbers[4 * i + k] = uniform(w.word[k]);
        }
        const int64_t skip = start * 4 < first ? first - start * 4 : 0;
        const int64_t end = last - start * 4 < 4 * COUNTERS ? last - start * 4 : 4 * COUNTERS;
        for (int64_t i = skip; i < end; ++i) target[start * 4 + i] = numbers[i];
    }
}

}  // namespace
}  // namespace mx::MX_ISA
