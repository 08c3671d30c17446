// Packed codes back to values.
#pragma once

#include "unpack.h"

namespace mx::MX_ISA {
namespace {

#if defined(__AVX2__)

// Codes that are integers, as numbers.
template <class Read>
MX_INLINE void find_multiples(const uint8_t* packed, const DotElement& e, float* out, Read read) {
    alignas(32) uint8_t bytes[CODES_READ];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), read(packed));
    const __m256i offset = _mm256_set1_epi32(e.offset);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * i));
        const __m256i whole = _mm256_sub_epi32(_mm256_cvtepu8_epi32(eight), offset);
        _mm256_storeu_ps(out + 8 * i, _mm256_cvtepi32_ps(whole));
    }
}

#else

template <class F>
void with_reader(const DotElement&, F f) {
    f(0);
}

MX_INLINE void find_multiples(const uint8_t* packed, const DotElement& e, float* out, int) {
    uint8_t bytes[CODES_READ];
    look_up(packed, e.bits, e.bytes, bytes);
    for (int64_t i = 0; i < CODES_READ; ++i) out[i] = static_cast<float>(bytes[i] - e.offset);
}

#endif

// Write the first `n` of CODES_READ multiples, from element `first` of a row on, times their scales.
template <class T>
MX_INLINE void store_values(const float* multiples, const float* scale_of, const uint8_t* scales, const Unpacking& u,
                            int64_t first, int64_t n, typename T::Stored* out) {
    if (u.block % CODES_READ == 0 && n == CODES_READ) {
        const float scale = scale_of[scales[first / u.block]];
        for (int64_t i = 0; i < CODES_READ; ++i) out[i] = T::store(saturated<T>(multiples[i] * scale));
        return;
    }
    for (int64_t i = 0; i < n; ++i)
        out[i] = T::store(saturated<T>(multiples[i] * scale_of[scales[(first + i) / u.block]]));
}

template <class T, class Find>
MX_INLINE void unpack_rows(const DotWeight& w, const DotElement& e, const Unpacking& u, int64_t first, int64_t last,
                           Find find) {
    const int64_t blocks = (u.length + u.block - 1) / u.block;
    for (int64_t row = first; row < last; ++row) {
        auto* const out = static_cast<typename T::Stored*>(u.target) + row * u.length;
        for (int64_t k = 0; k < u.length; k += CODES_READ) {
            alignas(32) float multiples[CODES_READ];
            find(CodesAt(w, e, row, k), multiples);
            const int64_t n = u.length - k < CODES_READ ? u.length - k : CODES_READ;
            store_values<T>(multiples, w.scale_of, w.scales + row * blocks, u, k, n, out + k);
        }
    }
}

void values(const DotWeight& w, const DotElement& e, const Unpacking& u, int64_t first, int64_t last) {
    with_dtype(u.dtype, [&](auto t) {
        using T = decltype(t);
        if (u.value_of)
            return unpack_rows<T>(w, e, u, first, last,
                                  [&](const uint8_t* packed, float* out) { look_up(packed, e.bits, u.value_of, out); });
        with_reader(e, [&](auto read) {
            unpack_rows<T>(w, e, u, first, last,
                           [&](const uint8_t* packed, float* out) { find_multiples(packed, e, out, read); });
        });
    });
}

}  // namespace
}  // namespace mx::MX_ISA
