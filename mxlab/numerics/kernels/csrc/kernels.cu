// The CUDA kernels. NVRTC compiles them at run time, one template instance at a time, for the GPU at hand: see
// mxlab/numerics/kernels/cuda.py. Blocks and elements are computed by the operations of ops.h, as on the CPU.
//
// Every argument of a kernel is an address or a 64-bit integer, which Python passes without conversion. Tensors are
// dense. Source and target may be the same: a thread reads only what it writes itself.
#define MX_ISA device
#include "ops.h"

#define MX_KERNEL __global__ void __launch_bounds__(THREADS)
#define MX_DEVICE static __device__ __forceinline__

namespace mx {
namespace MX_ISA {

using i64 = long long;

constexpr int THREADS = 256;  // of a thread block
constexpr u32 WARP = 0xFFFFFFFFu;

// ------------------------------------------------------------------------------------------------------ arguments

// Unpack a format from the three words that launches.py packs: small integers; the smallest normal and the largest
// element; the same of a floating-point scale, or the carry into the exponent of another. `tensor` points to the
// largest finite magnitude of the tensor if the format has a scale for the tensor, and is null otherwise.
MX_DEVICE Format unpacked(u64 small, u64 limits, u64 scale = 0, const u32* tensor = nullptr) {
    const auto field = [small](int i) { return static_cast<int>(small >> 8 * i & 0xFF); };
    const auto low = [](u64 word) { return float_of(static_cast<u32>(word)); };
    const auto high = [](u64 word) { return float_of(static_cast<u32>(word >> 32)); };
    Format f{};
    f.element = {field(0), field(1), low(limits), high(limits), field(2)};
    f.scale_emax = field(3);
    f.flushed_below = field(4) ? -126 : -0x7FFFFFFF;
    f.carry = static_cast<u32>(scale);
    f.scale = {field(5), field(6), low(scale), high(scale), 0};
    f.tensor_scale = tensor ? exact::tensor_scale(*tensor, f) : 0.0f;
    return f;
}

MX_DEVICE i64 thread_index() { return static_cast<i64>(blockIdx.x) * THREADS + threadIdx.x; }

// ------------------------------------------------------------------------------------------------------- blocks

MX_DEVICE u32 larger_of(u32 a, u32 b) { return a > b ? a : b; }

template <class T>
MX_DEVICE u32 magnitude_bits(typename T::Stored x) {
    return bits_of(T::load(x)) & MAGNITUDE;
}

// Return the largest value of `lanes` neighbouring threads, a power of two up to 32. Every thread of the warp must call
// it.
MX_DEVICE u32 largest_of_lanes(u32 amax, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        amax = larger_of(amax, __shfl_xor_sync(WARP, amax, distance));
    return amax;
}

// The sums of squared errors of a block under a scale and under the next power of two.
struct Search {
    Scale scale, next;
    float error, next_error;

    MX_MEMBER Search(const Scale& s, const Format& f)
        : scale(s), next(exact::next_scale(s, f)), error(0.0f), next_error(0.0f) {}
    template <class Op>
    MX_MEMBER void add(float x, const Format& f) {
        error += exact::squared(x - Op::in_range(Op::element(x, scale, f, 0.0f)));
        next_error += exact::squared(x - Op::in_range(Op::element(x, next, f, 0.0f)));
    }
    MX_MEMBER Scale better() const { return next_error < error ? next : scale; }
};

// -------------------------------------------------------------------------------------------------------- vectors

// The 16 bytes that a thread reads and writes at once.
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

// Return the better scale of a block that `lanes` neighbouring threads share, one vector each. Errors are added up in
// index order: the threads take turns.
template <class Op>
MX_DEVICE Scale searched(const Vector& v, const Scale& s, const Format& f, int lanes) {
    using T = typename Op::T;
    Search search(s, f);
    for (int turn = 0; turn < lanes; ++turn) {
        if (static_cast<int>(threadIdx.x) % lanes == turn) {
#pragma unroll
            for (int i = 0; i < PER_VECTOR<T>; ++i) search.template add<Op>(get<T>(v, i), f);
        }
        search.error = __shfl_sync(WARP, search.error, turn, lanes);
        search.next_error = __shfl_sync(WARP, search.next_error, turn, lanes);
    }
    return search.better();
}

// Return the scale of a block of one element.
template <class Op>
MX_DEVICE Scale scale_alone(float x, const Format& f) {
    const Scale s = Op::scale(bits_of(x) & MAGNITUDE, f);
    if constexpr (!Op::SEARCHES) return s;
    Search search(s, f);
    search.template add<Op>(x, f);
    return search.better();
}

// Quantize `count` vectors of whole blocks, one behind the other. A block is one element, or one vector or a power of
// two of vectors. The threads that share a block are neighbours in a warp.
template <class Op, int BLOCK>
MX_KERNEL quantize_vectors(const Vector* source, Vector* target, const float* noise, i64 count, u64 small, u64 limits,
                           u64 scale, const u32* tensor) {
    using T = typename Op::T;
    constexpr int N = PER_VECTOR<T>, AT_ONCE = 2;  // two loads in flight hide the memory's latency better than one
    const Format f = unpacked(small, limits, scale, tensor);
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
        Scale shared = Op::scale(largest_of_lanes(largest<T>(v[k]), BLOCK / N), f);
        if constexpr (Op::SEARCHES && BLOCK > 1) shared = searched<Op>(v[k], shared, f, BLOCK / N);
        Vector out{};
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float x = get<T>(v[k], j);
            const Scale s = BLOCK == 1 ? scale_alone<Op>(x, f) : shared;
            put<T>(out, j, Op::in_range(Op::element(x, s, f, Op::DRAWS && i < count ? noise[i * N + j] : 0.0f)));
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
    i64 block;                // index of the block they are part of
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
    Scale s = Op::scale(amax, f);
    if constexpr (Op::SEARCHES) {
        Search search(s, f);
        for (i64 i = 0; i < w.count; ++i) search.template add<Op>(T::load(source[w.offset + i * w.step]), f);
        s = search.better();
    }
    for (i64 i = 0; i < w.count; ++i) {
        const i64 at = w.offset + i * w.step;
        target[at] = T::store(Op::in_range(Op::element(T::load(source[at]), s, f, Op::DRAWS ? noise[at] : 0.0f)));
    }
}

// Quantize whole blocks, a piece each. A search adds up errors in index order, and needs `lanes` to be 1.
template <class Op>
MX_KERNEL quantize_blocks(const typename Op::T::Stored* source, typename Op::T::Stored* target, const float* noise,
                          i64 outer, i64 axis, i64 inner, i64 block, i64 lanes, u64 small, u64 limits, u64 scale,
                          const u32* tensor) {
    const int sharing = static_cast<int>(lanes);
    const Walk w = walk({outer, axis, inner, block, block, sharing});
    const u32 amax = largest_of_lanes(largest<typename Op::T>(source, w), sharing);
    quantize_along<Op>(source, target, noise, w, amax, unpacked(small, limits, scale, tensor));
}

// Write the largest magnitude of each long block to `amax`, which holds zeros.
template <class T>
MX_KERNEL find_largest(const typename T::Stored* source, u32* amax, i64 outer, i64 axis, i64 inner, i64 block,
                       i64 piece, i64 lanes) {
    const int sharing = static_cast<int>(lanes);
    const Walk w = walk({outer, axis, inner, block, piece, sharing});
    const u32 found = largest_of_lanes(largest<T>(source, w), sharing);
    if (w.count > 0 && threadIdx.x % sharing == 0) atomicMax(&amax[w.block], found);
}

// Quantize long blocks, whose largest magnitudes are in `amax`.
template <class Op>
MX_KERNEL quantize_pieces(const typename Op::T::Stored* source, typename Op::T::Stored* target, const float* noise,
                          const u32* amax, i64 outer, i64 axis, i64 inner, i64 block, i64 piece, i64 lanes, u64 small,
                          u64 limits, u64 scale, const u32* tensor) {
    const Walk w = walk({outer, axis, inner, block, piece, static_cast<int>(lanes)});
    if (w.count > 0)
        quantize_along<Op>(source, target, noise, w, amax[w.block], unpacked(small, limits, scale, tensor));
}

// Write the largest finite magnitude of `count` elements to `found`, which holds zero. A thread reads AT_ONCE of them.
template <class T>
MX_KERNEL find_largest_finite(const typename T::Stored* source, u32* found, i64 count) {
    constexpr int AT_ONCE = 32;
    const i64 first = static_cast<i64>(blockIdx.x) * (THREADS * AT_ONCE) + threadIdx.x;
    u32 largest = 0;
#pragma unroll
    for (int k = 0; k < AT_ONCE; ++k) {
        const i64 i = first + k * THREADS;
        const u32 next = i < count ? magnitude_bits<T>(source[i]) : 0;
        largest = larger_of(largest, next < EXPONENT ? next : 0);
    }
    largest = largest_of_lanes(largest, 32);
    if (threadIdx.x % 32 == 0 && largest > 0) atomicMax(found, largest);
}

// --------------------------------------------------------------------------------------------------- element-wise

// Round elements on their own. A thread does one vector; the rest, and tensors that are not aligned, go element by
// element.
template <class Op>
MX_KERNEL round_alone(const typename Op::T::Stored* source, typename Op::T::Stored* target, const float* noise,
                      i64 count, i64 aligned, i64 subnormals, u64 small, u64 limits) {
    using T = typename Op::T;
    constexpr int N = PER_VECTOR<T>;
    const Element el = unpacked(small, limits).element;
    const i64 first = thread_index() * N;
    if (aligned && first + N <= count) {
        const Vector v = *reinterpret_cast<const Vector*>(source + first);
        Vector out{};
#pragma unroll
        for (int i = 0; i < N; ++i)
            put<T>(out, i, Op::alone(get<T>(v, i), el, subnormals, Op::DRAWS ? noise[first + i] : 0.0f));
        *reinterpret_cast<Vector*>(target + first) = out;
        return;
    }
    for (i64 i = first; i < count && i < first + N; ++i)
        target[i] = T::store(Op::alone(T::load(source[i]), el, subnormals, Op::DRAWS ? noise[i] : 0.0f));
}

// Draw one uniform number per element, by its index.
MX_KERNEL uniform_numbers(float* target, i64 count, u64 seed) {
    const i64 counter = thread_index();
    const Words words = philox(static_cast<u64>(counter), seed);
    for (int i = 0; i < 4 && counter * 4 + i < count; ++i) target[counter * 4 + i] = uniform(words.word[i]);
}

// Add up the memory of many tensors as 64-bit words. Of tensor i, table[2 * i] is the address, aligned to 16 bytes, and
// table[2 * i + 1] the number of pairs of words; sums[i] holds zero. SUMMING_BLOCKS thread blocks share a tensor.
MX_KERNEL sum_words(const u64* table, u64* sums) {
    constexpr int SUMMING_BLOCKS = 8;
    struct alignas(16) Pair {
        u64 low, high;
    };
    const u64* const entry = table + 2 * (blockIdx.x / SUMMING_BLOCKS);
    const Pair* const pairs = reinterpret_cast<const Pair*>(entry[0]);
    const u64 count = entry[1], stride = SUMMING_BLOCKS * THREADS;
    u64 sum = 0;
#pragma unroll 4
    for (u64 i = blockIdx.x % SUMMING_BLOCKS * THREADS + threadIdx.x; i < count; i += stride)
        sum += pairs[i].low + pairs[i].high;
    atomicAdd(sums + blockIdx.x / SUMMING_BLOCKS, sum);
}

}  // namespace MX_ISA
}  // namespace mx
