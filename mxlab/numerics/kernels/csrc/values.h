// Packed codes back to values.
#pragma once

#include <cmath>

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

// Return the largest magnitude of the multiples that codes stand for.
float largest_multiple(const DotElement& e, const float* value_of) {
    if (!value_of) return 128.0f;  // integers of eight bits
    float largest = 0.0f;
    for (int64_t code = 0; code < int64_t{1} << e.bits; ++code)
        if (std::fabs(value_of[code]) > largest) largest = std::fabs(value_of[code]);
    return largest;
}

// Write the first `n` of CODES_READ multiples times their scales; `fits`: no product is beyond the range of the type.
template <class T, class Scale>
MX_INLINE void store_values(const float* multiples, bool fits, int64_t n, typename T::Stored* out, Scale scale) {
    if (fits && n == CODES_READ)
        for (int64_t i = 0; i < CODES_READ; ++i) out[i] = T::store(multiples[i] * scale(i));
    else
        for (int64_t i = 0; i < n; ++i) out[i] = T::store(saturated<T>(multiples[i] * scale(i)));
}

// Goes through the scales of a row, some elements at a time.
class RowScales {
   public:
    // `most`: the largest scale whose products need no limit.
    RowScales(const float* scale_of, const uint8_t* scales, int64_t block, float most)
        : scale_of_(scale_of), next_(scales), block_(block), left_(block), most_(most) {}

    // Store the values of the next `n` elements from their multiples.
    template <class T>
    void store(const float* multiples, int64_t n, typename T::Stored* out) {
        if (left_ >= n) {
            const float scale = scale_of_[*next_];
            pass(n);
            return store_values<T>(multiples, !(scale > most_), n, out, [&](int64_t) { return scale; });
        }
        float scales[CODES_READ] = {}, largest = 0.0f;
        for (int64_t i = 0; i < n;) {
            const int64_t run = left_ < n - i ? left_ : n - i;
            const float scale = scale_of_[*next_];
            largest = scale > largest ? scale : largest;
            for (const int64_t end = i + run; i < end; ++i) scales[i] = scale;
            pass(run);
        }
        store_values<T>(multiples, largest <= most_, n, out, [&](int64_t i) { return scales[i]; });
    }

   private:
    void pass(int64_t n) {
        left_ -= n;
        if (left_ > 0) return;
        ++next_;
        left_ = block_;
    }

    const float* scale_of_;
    const uint8_t* next_;
    int64_t block_, left_;
    float most_;
};

template <class T, class Find>
MX_INLINE void unpack_rows(const DotWeight& w, const DotElement& e, const Unpacking& u, int64_t first, int64_t last,
                           Find find) {
    const int64_t blocks = (u.length + u.block - 1) / u.block;
    const float most = T::max / largest_multiple(e, u.value_of);
    for (int64_t row = first; row < last; ++row) {
        auto* const out = static_cast<typename T::Stored*>(u.target) + row * u.length;
        RowScales scales(w.scale_of, w.scales + row * blocks, u.block, most);
        for (int64_t k = 0; k < u.length; k += CODES_READ) {
            alignas(32) float multiples[CODES_READ];
            find(CodesAt(w, e, row, k), multiples);
            scales.template store<T>(multiples, u.length - k < CODES_READ ? u.length - k : CODES_READ, out + k);
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
