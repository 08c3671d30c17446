// The scales of a panel of outputs, brought beside each other.
#pragma once

#include "unpack.h"

namespace mx::MX_ISA {
namespace {

// Write the scales of `count` blocks of a panel as [count][PANEL]; 0 for what does not exist.
MX_NOINLINE void look_up_scales(const DotWeight& w, int64_t blocks, int64_t output, int64_t first, int64_t count,
                                float* out) {
    for (int64_t c = 0; c < PANEL; ++c)
        for (int64_t b = 0; b < count; ++b) {
            const bool exists = output + c < w.outputs && first + b < blocks;
            out[b * PANEL + c] = exists ? w.scale_of[w.scales[(output + c) * blocks + first + b]] : 0.0f;
        }
}

#if defined(__AVX2__)

MX_INLINE __m128i eight_bytes(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }

// The same for eight outputs and eight blocks whose scales are powers of two: bytes become exponents.
MX_INLINE void shift_scales(const uint8_t* scales, int64_t blocks, float unit, float* out) {
    __m128i two[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
        two[i] = _mm_unpacklo_epi8(eight_bytes(scales + 2 * i * blocks), eight_bytes(scales + (2 * i + 1) * blocks));
    const __m128i low[2] = {_mm_unpacklo_epi16(two[0], two[1]), _mm_unpacklo_epi16(two[2], two[3])};
    const __m128i high[2] = {_mm_unpackhi_epi16(two[0], two[1]), _mm_unpackhi_epi16(two[2], two[3])};
    const __m128i pairs[4] = {_mm_unpacklo_epi32(low[0], low[1]), _mm_unpackhi_epi32(low[0], low[1]),
                              _mm_unpacklo_epi32(high[0], high[1]), _mm_unpackhi_epi32(high[0], high[1])};
    const __m256 units = _mm256_set1_ps(unit);
#pragma GCC unroll 8
    for (int b = 0; b < 8; ++b) {
        const __m128i codes = b % 2 == 0 ? pairs[b / 2] : _mm_srli_si128(pairs[b / 2], 8);
        const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(codes), 23);
        _mm256_store_ps(out + b * PANEL, _mm256_mul_ps(_mm256_castsi256_ps(bits), units));
    }
}

void find_weight_scales(const DotWeight& w, const DotShape& s, int64_t output, int64_t first, int64_t count,
                        float* out) {
    const int64_t blocks = s.blocks();
    for (int64_t i = 0; i < PANEL * count; i += 64)
        __builtin_prefetch(w.scales + ((output + PANEL) * blocks + first) + i);
    int64_t b = 0;
    if (w.unit != 0.0f && output + PANEL <= w.outputs)
        for (; b + 8 <= count && first + b + 8 <= blocks; b += 8)
            for (int64_t half = 0; half < PANEL; half += 8)
                shift_scales(w.scales + (output + half) * blocks + first + b, blocks, w.unit, out + b * PANEL + half);
    if (b < count) look_up_scales(w, blocks, output, first + b, count - b, out + b * PANEL);
}

#else

void find_weight_scales(const DotWeight& w, const DotShape& s, int64_t output, int64_t first, int64_t count,
                        float* out) {
    look_up_scales(w, s.blocks(), output, first, count, out);
}

#endif

}  // namespace
}  // namespace mx::MX_ISA
