// The CPU kernels. Compiled once per instruction set, with MX_ISA its name: plain loops over the code of mx.h, written so
// that compilers turn them into vector code.
#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__clang__)
#define MX_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define MX_INDEPENDENT _Pragma("GCC ivdep")  // iterations are independent, also where the target is the source
#endif

// Two loads a cycle are faster than what compilers make of a table and vectors.
#if defined(__clang__)
#define MX_SCALAR __attribute__((noinline))
#else
#define MX_SCALAR __attribute__((noinline, optimize("no-tree-vectorize")))
#endif

namespace mx {
namespace MX_ISA {
namespace {

constexpr int BLOCKS = 64;     // blocks whose scales are found together, to find them with vectors
constexpr int LANES = 256;     // columns that are done together where blocks do not lie along the last axis
constexpr int64_t UNIT = 8192;  // elements of a unit of work, roughly

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The layout with block sizes no longer than the axis, and where blocks fill the rows, all rows as one.
Layout simplified(Layout l) {
    if (l.block > l.axis) l.block = l.axis;
    if (l.block == 1) return {1, 1, l.outer * l.axis * l.inner, 1};  // every element a block: do them side by side
    if (l.inner == 1 && l.axis % l.block == 0) return {1, l.outer * l.axis, 1, l.block};
    return l;
}

// How many blocks along the axis make a unit of work, and the units of one row (or of one column of blocks).
int64_t blocks_per_unit(const Layout& l) {
    const int64_t elements = l.inner == 1 ? l.block : l.block * (l.inner < LANES ? l.inner : LANES);
    return elements < UNIT ? UNIT / elements : 1;
}

int64_t units_along_axis(const Layout& l) { return divided_up(divided_up(l.axis, l.block), blocks_per_unit(l)); }

int64_t quantize_units(const Layout& given) {
    const Layout l = simplified(given);
    return l.outer * units_along_axis(l) * divided_up(l.inner, LANES);
}

// The largest of `n` 16-bit magnitudes.
MX_INLINE u16 largest_16(const u16* x, int64_t n) {
    int64_t i = 0;
    u16 m = 0;
#if defined(__AVX2__)
    // x86 has one horizontal instruction, the minimum of eight; compilers do not know that it serves for a maximum.
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

// The bits, as float32, of the largest magnitude.
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

// ---------------------------------------------------------------------------------------------------- numerics
// What the loops below need of a numerics: scales, one element, how a result is stored, and how long a block is worth a
// loop of its own.

// The smallest power of two whose products with multiples of 2^lowest, of mantissas no longer than bfloat16's, are
// bfloat16 numbers as they are; products with a larger one need no rounding. Infinity where there is none.
template <class T>
float smallest_plain(int mantissa_bits, int lowest) {
    const int e = -133 - lowest;  // 2^-133 is the smallest bfloat16
    const bool exists = T::mantissa_bits == 7 && mantissa_bits <= 7 && e <= 127;
    return exists ? power_of_two(larger(e, -126)) : float_of(EXPONENT);
}

MX_INLINE int exponent_of(float power) { return static_cast<int>(bits_of(power) >> 23) - 127; }

template <class T_, Rounding R>
struct Exact {
    using T = T_;
    static constexpr int64_t SHORTEST = 32;
    static constexpr bool PAIRS = T::mantissa_bits == 7, SEARCHES = false;
    const Format& format;
    float plain_from;

    Exact(const Format& f, const u32*)
        : format(f), plain_from(smallest_plain<T>(f.element.mantissa_bits, exponent_of(f.element.min_normal))) {}
    MX_INLINE exact::Scale scale(u32 amax, const Format& f) { return exact::scale(amax, f); }
    MX_MEMBER bool is_plain(float up) const { return up >= plain_from; }
    MX_MEMBER float element(float x, float down, float up, const Element& el, float noise) const {
        return exact::quantize<R>(x, {down, up}, el, noise);
    }
};

template <class T>
struct Asymmetric : Exact<T, Rounding::even> {
    using Exact<T, Rounding::even>::Exact;
    MX_MEMBER float element(float x, float down, float up, const Element& el, float noise) const {
        return exact::quantize_asymmetric<Rounding::even>(x, {down, up}, el, noise);
    }
};

template <class T, Rounding R>
struct Searched : Exact<T, R> {
    using Exact<T, R>::Exact;
    static constexpr bool SEARCHES = true;
};

template <class T_, Rounding R>
struct Floating {
    using T = T_;
    static constexpr int64_t SHORTEST = 32;
    static constexpr bool PAIRS = T::mantissa_bits == 7, SEARCHES = false;
    const Format& format;
    int divides;

    Floating(const Format& f, const u32*) : format(f), divides(exact::divides(f)) {}
    MX_INLINE exact::Scale scale(u32 amax, const Format& f) { return exact::floating_scale(amax, f); }
    MX_MEMBER bool is_plain(float) const { return false; }
    MX_MEMBER float element(float x, float down, float up, const Element& el, float noise) const {
        return exact::quantize_floating<R>(x, {down, up}, el, divides, noise);
    }
};

template <class T_, Rounding R>
struct Emulator {
    using T = T_;
    static constexpr int64_t SHORTEST = 32;
    static constexpr bool PAIRS = false, SEARCHES = false;
    const Format& format;

    Emulator(const Format& f, const u32*) : format(f) {}
    MX_INLINE exact::Scale scale(u32 amax, const Format& f) { return emulator::scale<T>(amax, f); }
    MX_MEMBER bool is_plain(float) const { return false; }
    MX_MEMBER float element(float x, float down, float up, const Element& el, float noise) const {
        return emulator::quantize<T, R>(x, {down, up}, el, noise);
    }
};

// The same for 16-bit types, with what a scaled element is rounded to looked up.
template <class T_>
struct Lookup {
    using T = T_;
    static constexpr int64_t SHORTEST = 256;
    static constexpr bool PAIRS = T::mantissa_bits == 7, SEARCHES = false;
    const Format& format;
    const u32* table;  // bits of float32
    float plain_from;

    Lookup(const Format& f, const u32* t) : format(f), table(t) {
        const int m = f.element.mantissa_bits;
        plain_from = smallest_plain<T>(m, exponent_of(f.element.min_normal) - m);
    }
    MX_INLINE exact::Scale scale(u32 amax, const Format& f) { return emulator::scale<T>(amax, f); }
    MX_MEMBER bool is_plain(float up) const { return up >= plain_from; }
};

// ------------------------------------------------------------------------------------------------------- loops

// Each index replaced by the bits of its entry.
MX_SCALAR void look_up_all(const u32* table, u32* indices, int64_t n) {
    for (int64_t i = 0; i < n; ++i) indices[i] = table[indices[i]];
}

// Not inlined: among other code, compilers no longer see that this loop can be done with vectors.
template <class Op>
__attribute__((noinline)) void find_scales(const Format& given, const u32* __restrict amax, float* __restrict down,
                                           float* __restrict up, int64_t n) {
    const Format format = given;
    for (int64_t i = 0; i < n; ++i) {
        const exact::Scale s = Op::scale(amax[i], format);
        down[i] = s.down;
        up[i] = s.up;
    }
}

// Where the next power of two has the smaller sum of squared errors, it becomes the scale of its block. Sums are added up
// in index order, which takes one addition after the other: several blocks take turns.
constexpr int64_t IN_TURN = 8, TOGETHER = 128;

struct Errors {
    float squares[IN_TURN][TOGETHER];
    float sums[IN_TURN];

    void add_up(int64_t n) {
        for (int64_t i = 0; i < n; ++i)
            for (int64_t b = 0; b < IN_TURN; ++b) sums[b] += squares[b][i];
    }
};

template <class Op, class Stored>
MX_INLINE void squared_errors(const Op& op, const Stored* x, int64_t n, const exact::Scale& s, float* squares) {
    const Element el = op.format.element;
    for (int64_t i = 0; i < n; ++i) {
        const float v = Op::T::load(x[i]);
        squares[i] = exact::squared(v - op.element(v, s.down, s.up, el, 0.0f));
    }
}

template <class Op, class Stored>
__attribute__((noinline)) void search_rows(const Op& op, const Stored* x, int64_t count, int64_t n, float* down, float* up) {
    Errors errors{}, next_errors{};
    for (int64_t first = 0; first < count; first += IN_TURN) {
        const int64_t blocks = count - first < IN_TURN ? count - first : IN_TURN;
        exact::Scale next[IN_TURN];
        for (int64_t b = 0; b < IN_TURN; ++b) errors.sums[b] = next_errors.sums[b] = 0.0f;
        for (int64_t b = 0; b < blocks; ++b) next[b] = exact::next_scale({down[first + b], up[first + b]}, op.format);
        for (int64_t start = 0; start < n; start += TOGETHER) {
            const int64_t length = n - start < TOGETHER ? n - start : TOGETHER;
            for (int64_t b = 0; b < blocks; ++b) {
                const Stored* const from = x + (first + b) * n + start;
                squared_errors(op, from, length, {down[first + b], up[first + b]}, errors.squares[b]);
                squared_errors(op, from, length, next[b], next_errors.squares[b]);
            }
            errors.add_up(length);
            next_errors.add_up(length);
        }
        for (int64_t b = 0; b < blocks; ++b) {
            if (!(next_errors.sums[b] < errors.sums[b])) continue;
            down[first + b] = next[b].down;
            up[first + b] = next[b].up;
        }
    }
}

template <class Op, class Stored>
__attribute__((noinline)) void search_columns(const Op& op, const Stored* x, int64_t rows, int64_t lanes, int64_t stride,
                                              float* down, float* up) {
    using T = typename Op::T;
    const Element el = op.format.element;
    float next_down[LANES], next_up[LANES], error[LANES] = {}, next_error[LANES] = {};
    for (int64_t i = 0; i < lanes; ++i) {
        const exact::Scale next = exact::next_scale({down[i], up[i]}, op.format);
        next_down[i] = next.down;
        next_up[i] = next.up;
    }
    for (int64_t r = 0; r < rows; ++r, x += stride)
        for (int64_t i = 0; i < lanes; ++i) {
            const float v = T::load(x[i]);
            error[i] += exact::squared(v - op.element(v, down[i], up[i], el, 0.0f));
            next_error[i] += exact::squared(v - op.element(v, next_down[i], next_up[i], el, 0.0f));
        }
    for (int64_t i = 0; i < lanes; ++i) {
        down[i] = next_error[i] < error[i] ? next_down[i] : down[i];
        up[i] = next_error[i] < error[i] ? next_up[i] : up[i];
    }
}

// Each value `copies` times.
MX_INLINE void repeat_each(const float* value, float* out, int64_t n, int64_t copies) {
    for (int64_t b = 0; b < n; ++b)
        for (int64_t i = 0; i < copies; ++i) out[b * copies + i] = value[b];
}

__attribute__((noinline)) void repeat(const float* __restrict value, float* __restrict out, int64_t n, int64_t copies) {
    if (copies == 4) return repeat_each(value, out, n, 4);
    if (copies == 8) return repeat_each(value, out, n, 8);
    if (copies == 16) return repeat_each(value, out, n, 16);
    repeat_each(value, out, n, copies);
}

// A scale that all elements of a loop share; a pointer is one for each.
struct Same {
    float value;
    MX_MEMBER float operator[](int64_t) const { return value; }
};

// Two bfloat16 in a word are the upper halves of two float32: no widening, no narrowing. They share a scale. Plain results
// are upper halves as they are.
MX_INLINE u32 word_at(const u16* x, int64_t i) {
    u32 word;
    __builtin_memcpy(&word, x + 2 * i, sizeof word);
    return word;
}

template <bool Plain>
MX_INLINE void store_word(u16* out, int64_t i, float low, float high) {
    const u32 word = Plain ? bits_of(low) >> 16 | (bits_of(high) & 0xFFFF0000u)
                           : BF16::rounded_bits(low) >> 16 | (BF16::rounded_bits(high) & 0xFFFF0000u);
    __builtin_memcpy(out + 2 * i, &word, sizeof word);
}

template <bool Plain, class Op, class Scales>
MX_INLINE void pairs(const Op& given, const u16* x, u16* out, const float* noise, int64_t n, Scales down, Scales up) {
    const Op op = given;  // a copy of which the compiler knows that nothing is written to it
    const Element el = op.format.element;
    MX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i) {
        const u32 word = word_at(x, i);
        const float low = op.element(float_of(word << 16), down[i], up[i], el, noise ? noise[2 * i] : 0.0f);
        const float high = op.element(float_of(word & 0xFFFF0000u), down[i], up[i], el, noise ? noise[2 * i + 1] : 0.0f);
        store_word<Plain>(out, i, low, high);
    }
}

template <bool Plain, class Scales>
MX_INLINE void pairs(const Lookup<BF16>& op, const u16* x, u16* out, const float*, int64_t n, Scales down, Scales up) {
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
            store_word<Plain>(out, start + i, float_of(low[i]) * up[start + i], float_of(high[i]) * up[start + i]);
    }
}

// The same for every type, one by one.
template <class Op, class Stored, class Scales>
MX_INLINE void elements(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t n, Scales down,
                        Scales up) {
    using T = typename Op::T;
    const Element el = op.format.element;
    MX_INDEPENDENT
    for (int64_t i = 0; i < n; ++i)
        out[i] = T::store(op.element(T::load(x[i]), down[i], up[i], el, noise ? noise[i] : 0.0f));
}

template <class T, class Scales>
MX_INLINE void elements(const Lookup<T>& op, const u16* x, u16* out, const float*, int64_t n, Scales down, Scales up) {
    u32 found[LANES];
    for (int64_t start = 0; start < n; start += LANES) {
        const int64_t count = n - start < LANES ? n - start : LANES;
        for (int64_t i = 0; i < count; ++i) found[i] = T::store(T::load(x[start + i]) * down[start + i]);
        look_up_all(op.table, found, count);
        for (int64_t i = 0; i < count; ++i) out[start + i] = T::store(float_of(found[i]) * up[start + i]);
    }
}

// Each block with its scale.
template <class Op, class Stored>
MX_INLINE void long_blocks(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t count, int64_t n,
                           const float* down, const float* up) {
    for (int64_t b = 0; b < count; ++b, x += n, out += n, noise += noise ? n : 0) {
        const Same d{down[b]}, u{up[b]};
        if constexpr (Op::PAIRS) {
            if (n % 2 == 0) {
                if (op.is_plain(up[b]))
                    pairs<true>(op, x, out, noise, n / 2, d, u);
                else
                    pairs<false>(op, x, out, noise, n / 2, d, u);
                continue;
            }
        }
        elements(op, x, out, noise, n, d, u);
    }
}

// Blocks shorter than loops like them are done together, each element (or pair) with its own copy of the scale.
template <class Op, class Stored>
MX_INLINE void short_blocks(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t count, int64_t n,
                            const float* down, const float* up) {
    constexpr int64_t TOGETHER = 1024;
    float downs[TOGETHER], ups[TOGETHER];
    const bool paired = Op::PAIRS && n % 2 == 0;
    const int64_t copies = paired ? n / 2 : n, step = TOGETHER / copies;
    for (int64_t first = 0; first < count; first += step) {
        const int64_t blocks = count - first < step ? count - first : step;
        int plain = 1;
        for (int64_t b = 0; b < blocks; ++b) plain &= op.is_plain(up[first + b]);
        repeat(down + first, downs, blocks, copies);
        repeat(up + first, ups, blocks, copies);
        const Stored* const from = x + first * n;
        Stored* const to = out + first * n;
        const float* const u = noise ? noise + first * n : nullptr;
        if constexpr (Op::PAIRS) {
            if (paired) {
                if (plain)
                    pairs<true>(op, from, to, u, blocks * copies, &downs[0], &ups[0]);
                else
                    pairs<false>(op, from, to, u, blocks * copies, &downs[0], &ups[0]);
                continue;
            }
        }
        elements(op, from, to, u, blocks * n, &downs[0], &ups[0]);
    }
}

// `count` whole blocks of `n` elements, one behind the other.
template <class Op, class Stored>
MX_INLINE void row_blocks(const Op& op, const Stored* x, Stored* out, const float* noise,
                                                      int64_t count, int64_t n) {
    u32 amax[BLOCKS];
    float down[BLOCKS], up[BLOCKS];
    for (int64_t b = 0; b < count; ++b) amax[b] = largest<typename Op::T>(x + b * n, n);
    find_scales<Op>(op.format, amax, down, up, count);
    if constexpr (Op::SEARCHES) search_rows(op, x, count, n, down, up);
    if (n < Op::SHORTEST)
        short_blocks(op, x, out, noise, count, n, down, up);
    else
        long_blocks(op, x, out, noise, count, n, down, up);
}

// `n` consecutive elements of a row, cut into blocks of `block`. The usual block sizes are constants to the compiler.
template <class Op, class Stored>
void row(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t n, int64_t block) {
    while (n > 0) {
        const int64_t count = n < block ? 1 : n / block < BLOCKS ? n / block : BLOCKS;
        const int64_t length = n < block ? n : block;
        if (length == 8)
            row_blocks(op, x, out, noise, count, 8);
        else if (length == 16)
            row_blocks(op, x, out, noise, count, 16);
        else if (length == 32)
            row_blocks(op, x, out, noise, count, 32);
        else if (length == 64)
            row_blocks(op, x, out, noise, count, 64);
        else
            row_blocks(op, x, out, noise, count, length);
        x += count * length;
        out += count * length;
        if (noise) noise += count * length;
        n -= count * length;
    }
}

// `rows` elements along the axis, in each of `lanes` neighbouring columns: one block per column.
template <class Op, class Stored>
void columns(const Op& op, const Stored* x, Stored* out, const float* noise, int64_t rows, int64_t lanes,
             int64_t stride) {
    using T = typename Op::T;
    u32 amax[LANES] = {};
    float down[LANES], up[LANES];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < lanes; ++i) {
            const int a = static_cast<int>(bits_of(T::load(x[r * stride + i])) & MAGNITUDE);
            amax[i] = static_cast<u32>(larger(a, static_cast<int>(amax[i])));
        }
    find_scales<Op>(op.format, amax, down, up, lanes);
    if constexpr (Op::SEARCHES) search_columns(op, x, rows, lanes, stride, down, up);
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t skip = r * stride;
        elements(op, x + skip, out + skip, noise ? noise + skip : nullptr, lanes, &down[0], &up[0]);
    }
}

template <class Op>
void quantize(const Buffers& buffers, const Layout& given, const Format& format, const u32* table, int64_t first,
              int64_t last) {
    using Stored = typename Op::T::Stored;
    const Op op(format, table);
    const Layout l = simplified(given);
    const int64_t per_unit = blocks_per_unit(l), along_axis = units_along_axis(l), across = divided_up(l.inner, LANES);
    for (int64_t unit = first; unit < last; ++unit) {
        const int64_t lane = unit % across * LANES, start = unit / across % along_axis * per_unit * l.block;
        const int64_t offset = (unit / across / along_axis * l.axis + start) * l.inner + lane;
        const int64_t n = l.axis - start < per_unit * l.block ? l.axis - start : per_unit * l.block;
        const Stored* const x = static_cast<const Stored*>(buffers.source) + offset;
        Stored* const out = static_cast<Stored*>(buffers.target) + offset;
        const float* const noise = buffers.noise ? buffers.noise + offset : nullptr;
        if (l.inner == 1) {
            row(op, x, out, noise, n, l.block);
            continue;
        }
        const int64_t lanes = l.inner - lane < LANES ? l.inner - lane : LANES;
        for (int64_t r = 0; r < n; r += l.block) {
            const int64_t rows = n - r < l.block ? n - r : l.block, skip = r * l.inner;
            columns(op, x + skip, out + skip, noise ? noise + skip : nullptr, rows, lanes, l.inner);
        }
    }
}

// ---------------------------------------------------------------------------------- from run time to templates

template <class F>
void with_dtype(Dtype dtype, F f) {
    if (dtype == Dtype::float32) return f(F32{});
    if (dtype == Dtype::bfloat16) return f(BF16{});
    f(F16{});
}

template <Rounding R>
struct Constant {
    static constexpr Rounding value = R;
};

template <class F>
void with_rounding(Rounding rounding, F f) {
    if (rounding == Rounding::nearest) return f(Constant<Rounding::nearest>{});
    if (rounding == Rounding::even) return f(Constant<Rounding::even>{});
    if (rounding == Rounding::floor) return f(Constant<Rounding::floor>{});
    f(Constant<Rounding::dither>{});
}

void quantize_exact(const Buffers& b, const Layout& l, const Format& f, Scaling scaling, Rounding rounding,
                    int64_t first, int64_t last) {
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        if (scaling == Scaling::asymmetric) return quantize<Asymmetric<T>>(b, l, f, nullptr, first, last);
        with_rounding(rounding, [&](auto r) {
            constexpr Rounding R = decltype(r)::value;
            if (scaling == Scaling::floating) return quantize<Floating<T, R>>(b, l, f, nullptr, first, last);
            if constexpr (R != Rounding::dither) {
                if (scaling == Scaling::searched) return quantize<Searched<T, R>>(b, l, f, nullptr, first, last);
            }
            quantize<Exact<T, R>>(b, l, f, nullptr, first, last);
        });
    });
}

void quantize_emulator(const Buffers& b, const Layout& l, const Format& f, Rounding rounding, const u32* table,
                       int64_t first, int64_t last) {
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        if constexpr (sizeof(typename T::Stored) == 2) {
            if (table) return quantize<Lookup<T>>(b, l, f, table, first, last);
        }
        with_rounding(rounding, [&](auto r) {
            quantize<Emulator<T, decltype(r)::value>>(b, l, f, nullptr, first, last);
        });
    });
}

u32 largest_finite(const Buffers& b, int64_t first, int64_t last) {
    u32 found = 0;
    with_dtype(b.dtype, [&](auto t) {
        using T = decltype(t);
        found = largest_finite<T>(static_cast<const typename T::Stored*>(b.source) + first, last - first);
    });
    return found;
}

void round_alone(const Buffers& b, const Element& given, Numerics numerics, Rounding rounding, bool subnormals,
                 int64_t first, int64_t last) {
    const Element el = given;
    with_dtype(b.dtype, [&](auto t) {
        with_rounding(rounding, [&](auto r) {
            using T = decltype(t);
            constexpr Rounding R = decltype(r)::value;
            const auto* const x = static_cast<const typename T::Stored*>(b.source);
            auto* const out = static_cast<typename T::Stored*>(b.target);
            const float* const noise = b.noise;
            if (numerics == Numerics::exact) {
                MX_INDEPENDENT
                for (int64_t i = first; i < last; ++i)
                    out[i] = T::store(exact::round_alone<R>(T::load(x[i]), el, subnormals, noise ? noise[i] : 0.0f));
            } else {
                MX_INDEPENDENT
                for (int64_t i = first; i < last; ++i)
                    out[i] = T::store(
                        emulator::round_alone<T, R>(T::load(x[i]), el, subnormals, noise ? noise[i] : 0.0f));
            }
        });
    });
}

void emulator_table(u32* table, Dtype dtype, const Element& el, Rounding rounding) {
    with_dtype(dtype, [&](auto t) {
        with_rounding(rounding, [&](auto r) {
            using T = decltype(t);
            if constexpr (sizeof(typename T::Stored) == 2)
                for (int i = 0; i < TABLE_SIZE; ++i)
                    table[i] = bits_of(emulator::round_scaled<T, decltype(r)::value>(T::load(static_cast<u16>(i)), el, 0.0f));
        });
    });
}

MX_SCALAR void look_up(const Buffers& b, const uint16_t* table, int64_t first, int64_t last) {
    const auto* const x = static_cast<const u16*>(b.source);
    auto* const out = static_cast<u16*>(b.target);
    for (int64_t i = first; i < last; ++i) out[i] = table[x[i]];
}

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
}  // namespace MX_ISA

#define MX_NAME_(isa) isa##_kernels
#define MX_NAME(isa) MX_NAME_(isa)
#define MX_TEXT_(isa) #isa
#define MX_TEXT(isa) MX_TEXT_(isa)

const Kernels MX_NAME(MX_ISA) = {
    MX_TEXT(MX_ISA),
    MX_ISA::quantize_units,
    MX_ISA::quantize_exact,
    MX_ISA::quantize_emulator,
    MX_ISA::largest_finite,
    MX_ISA::round_alone,
    MX_ISA::emulator_table,
    MX_ISA::look_up,
    MX_ISA::uniform_numbers,
};

}  // namespace mx
