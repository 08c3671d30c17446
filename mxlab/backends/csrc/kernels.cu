// The CUDA kernels. NVRTC compiles them at run time, one template instance at a time, for the GPU at hand: see
// mxlab/backends/cuda.py. What an element and a block go through is the code of mx.h, as on the CPU.
//
// Every argument of a kernel is an address or a 64-bit integer, what Python passes without conversion. Tensors are dense;
// source and target may be the same: a thread reads what it writes, and nothing that another thread writes.
#define MX_ISA device
#include "mx.h"

#define MX_KERNEL __global__ void __launch_bounds__(THREADS)
#define MX_DEVICE static __device__ __forceinline__

namespace mx {
namespace MX_ISA {

using i64 = long long;

constexpr int THREADS = 256;  // of a thread block
constexpr u32 WARP = 0xFFFFFFFFu;

// ------------------------------------------------------------------------------------------------------ arguments

// A format in two words, as packed by cuda.py: small integers, and the bits of two floats.
MX_DEVICE Format unpacked(u64 small, u64 floats) {
    const auto field = [small](int i) { return static_cast<int>(small >> 8 * i & 0xFF); };
    const Element element{field(0), field(1), float_of(static_cast<u32>(floats)), float_of(static_cast<u32>(floats >> 32)),
                          field(2)};
    return {element, field(3), field(4) ? -126 : -0x7FFFFFFF};
}

MX_DEVICE i64 thread_index() { return static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x; }

// ------------------------------------------------------------------------------------------------------- numerics

template <class T_, Rounding R>
struct Exact {
    using T = T_;
    static constexpr bool draws = R == Rounding::dither;
    MX_DEVICE exact::Scale scale(u32 amax, const Format& f) { return exact::scale(amax, f); }
    MX_DEVICE float element(float x, const exact::Scale& s, const Element& el, float noise) {
        return exact::quantize<R>(x, s, el, noise);
    }
    MX_DEVICE float alone(float x, const Element& el, bool subnormals, float noise) {
        return exact::round_alone<R>(x, el, subnormals, noise);
    }
};

template <class T_, Rounding R>
struct Emulator {
    using T = T_;
    static constexpr bool draws = R == Rounding::dither;
    MX_DEVICE exact::Scale scale(u32 amax, const Format& f) { return emulator::scale<T>(amax, f); }
    MX_DEVICE float element(float x, const exact::Scale& s, const Element& el, float noise) {
        return emulator::quantize<T, R>(x, s, el, noise);
    }
    MX_DEVICE float alone(float x, const Element& el, bool subnormals, float noise) {
        return emulator::round_alone<T, R>(x, el, subnormals, noise);
    }
};

// For most formats: see mx.h.
template <class T, Rounding R>
struct SimpleEmulator : Emulator<T, R> {
    MX_DEVICE float element(float x, const exact::Scale& s, const Element& el, float noise) {
        return emulator::quantize_simply<T, R>(x, s, el, noise);
    }
};

MX_DEVICE u32 larger_of(u32 a, u32 b) { return a > b ? a : b; }

template <class T>
MX_DEVICE u32 magnitude_bits(typename T::Stored x) {
    return bits_of(T::load(x)) & MAGNITUDE;
}

// The largest of `lanes` neighbouring threads, a power of two up to 32; every thread of the warp must come here.
MX_DEVICE u32 largest_of_lanes(u32 amax, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        amax = larger_of(amax, __shfl_xor_sync(WARP, amax, distance));
    return amax;
}

// -------------------------------------------------------------------------------------------------------- vectors

// What a thread reads and writes at once.
struct alignas(16) Vector {
    u32 word[4];
};

template <class T>
constexpr int PER_VECTOR = 16 / static_cast<int>(sizeof(typename T::Stored));

template <class T>
MX_DEVICE float get(const Vector& v, int i) {
    if constexpr (sizeof(typename T::Stored) == 4)
        return T::load(float_of(v.word[i]));
    else
        return T::load(static_cast<u16>(v.word[i / 2] >> (i % 2 * 16)));
}

template <class T>
MX_DEVICE void put(Vector& v, int i, float x) {
    if constexpr (sizeof(typename T::Stored) == 4)
        v.word[i] = bits_of(T::store(x));
    else
        v.word[i / 2] |= static_cast<u32>(T::store(x)) << (i % 2 * 16);
}

template <class T>
MX_DEVICE u32 largest(const Vector& v) {
    u32 amax = 0;
#pragma unroll
    for (int i = 0; i < PER_VECTOR<T>; ++i) amax = larger_of(amax, bits_of(get<T>(v, i)) & MAGNITUDE);
    return amax;
}

// `count` vectors of whole blocks, one behind the other. The threads that share a block are neighbours in a warp; a block
// is one element, or a power of two of them from one vector on.
template <class Op, int BLOCK>
MX_KERNEL quantize_vectors(const Vector* source, Vector* target, const float* noise, i64 count, u64 small, u64 floats) {
    using T = typename Op::T;
    constexpr int N = PER_VECTOR<T>, AT_ONCE = 2;  // two reads on their way hide the memory's latency better than one
    const Format f = unpacked(small, floats);
    const i64 first = static_cast<i64>(blockIdx.x) * (THREADS * AT_ONCE) + threadIdx.x;
    Vector v[AT_ONCE];
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const i64 i = first + k * THREADS;
        v[k] = i < count ? source[i] : Vector{};
    }
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const i64 i = first + k * THREADS;
        const exact::Scale shared = Op::scale(largest_of_lanes(largest<T>(v[k]), BLOCK / N), f);
        Vector out{};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float x = get<T>(v[k], j);
            const exact::Scale s = BLOCK == 1 ? Op::scale(bits_of(x) & MAGNITUDE, f) : shared;
            put<T>(out, j, Op::element(x, s, f.element, Op::draws && i < count ? noise[i * N + j] : 0.0f));
        }
        if (i < count) target[i] = out;
    }
}

// --------------------------------------------------------------------------------------------- any block, any axis

// A contiguous tensor seen as (outer, axis, inner), its blocks of `block` elements along the axis; a trailing partial
// block is a block of its own. The elements of a block are handed out in pieces of at most `piece`, and `lanes`
// neighbouring threads walk through a piece in turns.
struct Layout {
    i64 outer, axis, inner, block, piece;
    int lanes;
};

struct Walk {
    i64 offset, step, count;  // of the elements that a thread visits
    i64 block;                // the number of the block they are part of
};

MX_DEVICE i64 divided_up(i64 a, i64 b) { return (a + b - 1) / b; }

MX_DEVICE Walk walk(const Layout& l) {
    const i64 pieces = divided_up(l.block, l.piece), blocks = divided_up(l.axis, l.block);
    i64 rest = thread_index();
    const i64 turn = rest % l.lanes;
    rest /= l.lanes;
    const i64 column = rest % l.inner;
    rest /= l.inner;
    const i64 piece = rest % pieces;
    rest /= pieces;
    const i64 b = rest % blocks, row = rest / blocks;
    const i64 start = b * l.block + piece * l.piece;
    i64 end = (b + 1) * l.block < l.axis ? (b + 1) * l.block : l.axis;
    if (end - start > l.piece) end = start + l.piece;
    const i64 count = row < l.outer && end - start > turn ? divided_up(end - start - turn, l.lanes) : 0;
    return {(row * l.axis + start + turn) * l.inner + column, l.lanes * l.inner, count,
            (row * blocks + b) * l.inner + column};
}

template <class T>
MX_DEVICE u32 largest(const typename T::Stored* source, const Walk& w) {
    u32 amax = 0;
    for (i64 i = 0; i < w.count; ++i) amax = larger_of(amax, magnitude_bits<T>(source[w.offset + i * w.step]));
    return amax;
}

template <class Op, class Stored>
MX_DEVICE void quantize_along(const Stored* source, Stored* target, const float* noise, const Walk& w, u32 amax,
                              const Format& f) {
    using T = typename Op::T;
    const exact::Scale s = Op::scale(amax, f);
    for (i64 i = 0; i < w.count; ++i) {
        const i64 at = w.offset + i * w.step;
        target[at] = T::store(Op::element(T::load(source[at]), s, f.element, Op::draws ? noise[at] : 0.0f));
    }
}

// A piece is a whole block.
template <class Op>
MX_KERNEL quantize_blocks(const typename Op::T::Stored* source, typename Op::T::Stored* target, const float* noise,
                          i64 outer, i64 axis, i64 inner, i64 block, i64 lanes, u64 small, u64 floats) {
    const int sharing = static_cast<int>(lanes);
    const Walk w = walk({outer, axis, inner, block, block, sharing});
    const u32 amax = largest_of_lanes(largest<typename Op::T>(source, w), sharing);
    quantize_along<Op>(source, target, noise, w, amax, unpacked(small, floats));
}

// Long blocks: first the largest magnitude of each, into `amax` (zeros), then the elements.
template <class T>
MX_KERNEL find_largest(const typename T::Stored* source, u32* amax, i64 outer, i64 axis, i64 inner, i64 block, i64 piece,
                       i64 lanes) {
    const int sharing = static_cast<int>(lanes);
    const Walk w = walk({outer, axis, inner, block, piece, sharing});
    const u32 found = largest_of_lanes(largest<T>(source, w), sharing);
    if (w.count > 0 && threadIdx.x % sharing == 0) atomicMax(&amax[w.block], found);
}

template <class Op>
MX_KERNEL quantize_pieces(const typename Op::T::Stored* source, typename Op::T::Stored* target, const float* noise,
                          const u32* amax, i64 outer, i64 axis, i64 inner, i64 block, i64 piece, i64 lanes, u64 small,
                          u64 floats) {
    const Walk w = walk({outer, axis, inner, block, piece, static_cast<int>(lanes)});
    if (w.count > 0) quantize_along<Op>(source, target, noise, w, amax[w.block], unpacked(small, floats));
}

// --------------------------------------------------------------------------------------------------- element-wise

// A thread does one vector; what is left over, and tensors that do not start on a vector, element by element.
template <class Op>
MX_KERNEL round_alone(const typename Op::T::Stored* source, typename Op::T::Stored* target, const float* noise, i64 count,
                      i64 aligned, i64 subnormals, u64 small, u64 floats) {
    using T = typename Op::T;
    constexpr int N = PER_VECTOR<T>;
    const Element el = unpacked(small, floats).element;
    const i64 first = thread_index() * N;
    if (aligned && first + N <= count) {
        const Vector v = *reinterpret_cast<const Vector*>(source + first);
        Vector out{};
#pragma unroll
        for (int i = 0; i < N; ++i)
            put<T>(out, i, Op::alone(get<T>(v, i), el, subnormals, Op::draws ? noise[first + i] : 0.0f));
        *reinterpret_cast<Vector*>(target + first) = out;
        return;
    }
    for (i64 i = first; i < count && i < first + N; ++i)
        target[i] = T::store(Op::alone(T::load(source[i]), el, subnormals, Op::draws ? noise[i] : 0.0f));
}

// One uniform number per element, by its index.
MX_KERNEL uniform_numbers(float* target, i64 count, u64 seed) {
    const i64 counter = thread_index();
    const Words words = philox(static_cast<u64>(counter), seed);
    for (int i = 0; i < 4 && counter * 4 + i < count; ++i) target[counter * 4 + i] = uniform(words.word[i]);
}

}  // namespace MX_ISA
}  // namespace mx
