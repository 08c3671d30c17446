// The first two steps of quantizing on the CPU: the largest magnitudes of blocks, and their scales.
#pragma once

#include "loops.h"

namespace mx::MX_ISA {
namespace {

constexpr int BLOCKS = 64;  // blocks whose scales are computed together, in vectors

// Return the largest of `n` 16-bit magnitudes.
MX_INLINE u16 largest_16(const u16* x, int64_t n) {
    int64_t i = 0;
    u16 m = 0;
#if defined(__AVX2__)
    // x86 has one horizontal instruction, the minimum of eight; compilers do not use it for a maximum.
    if (n >= 8) {
        __m256i sixteen = _mm256_setzero_si256();
        for (; i + 16 <= n; i += 16) {
            const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
            sixteen = _mm256_max_epu16(sixteen, _mm256_and_si256(next, _mm256_set1_epi16(0x7FFF)));
        }
        __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(sixteen), _mm256_extracti128_si256(sixteen, 1));
        if (i + 8 <= n) {
            const __m128i next = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i));
            eight = _mm_max_epu16(eight, _mm_and_si128(next, _mm_set1_epi16(0x7FFF)));
            i += 8;
        }
        const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
        m = static_cast<u16>(~_mm_cvtsi128_si32(least));
    }
#endif
    for (; i < n; ++i) {
        const u16 a = x[i] & 0x7FFF;
        m = a > m ? a : m;
    }
    return m;
}

// Return the largest magnitude of `n` values, as the bits of a float32.
template <class T>
MX_INLINE u32 largest(const typename T::Stored* x, int64_t n) {
    if constexpr (sizeof(typename T::Stored) == 2) return bits_of(T::load(largest_16(x, n)));
    int m = 0;
    for (int64_t i = 0; i < n; ++i) m = larger(m, static_cast<int>(bits_of(T::load(x[i])) & MAGNITUDE));
    return static_cast<u32>(m);
}

// The same without NaN and infinities.
template <class T>
u32 largest_finite(const typename T::Stored* x, int64_t n) {
    int m = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int a = static_cast<int>(bits_of(T::load(x[i])) & MAGNITUDE);
        m = larger(m, a < static_cast<int>(EXPONENT) ? a : 0);
    }
    return static_cast<u32>(m);
}

// Compute the scales of `n` blocks. Not inlined: among other code, compilers fail to vectorize this loop.
template <class Op>
MX_NOINLINE void find_scales(const Format& given, const u32* __restrict amax, float* __restrict down,
                             float* __restrict up, int64_t n) {
    const Format format = given;
    for (int64_t i = 0; i < n; ++i) {
        const Scale s = Op::scale(amax[i], format);
        down[i] = s.down;
        up[i] = s.up;
    }
}

}  // namespace
}  // namespace mx::MX_ISA
