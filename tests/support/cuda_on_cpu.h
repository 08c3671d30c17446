// Enough of CUDA to run kernels.cu on a CPU in a test. Every thread of a thread block is a fiber; fibers take turns,
// each running until it shuffles. When all have arrived, all go on. A thread block in which only some threads shuffle
// is reported: on a GPU it would hang or read garbage.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#define __CUDACC__
#define __CUDA_ARCH__ 750
#define MX_NO_PTX
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)

namespace on_cpu {

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};

constexpr int THREADS = 256;
inline Index thread, block;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline unsigned exchanged[2][THREADS];  // of this shuffle and of the one before it
inline unsigned shuffles[THREADS];
inline void (*body)(void*);
inline void* body_argument;

inline void run_fiber() {
    body(body_argument);
    fibers[thread.x].done = true;
    swapcontext(&fibers[thread.x].context, &scheduler);
}

inline void wait_for_others() {
    const unsigned self = thread.x;
    swapcontext(&fibers[self].context, &scheduler);
}

inline void start(Fiber& fiber) {
    fiber.done = false;
    fiber.stack.resize(32768);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
}

// Run the fibers of a thread block. Return false where some ended while others waited for them.
inline bool run_block() {
    fibers.resize(THREADS);
    for (Fiber& fiber : fibers) start(fiber);
    for (unsigned& n : shuffles) n = 0;
    for (int waiting = THREADS; waiting > 0;) {
        waiting = 0;
        for (unsigned i = 0; i < THREADS; ++i) {
            thread.x = i;
            swapcontext(&scheduler, &fibers[i].context);
            waiting += !fibers[i].done;
        }
        if (waiting != 0 && waiting != THREADS) return false;
    }
    return true;
}

// Convert a 64-bit argument to the type of a kernel's parameter.
template <class To>
To converted(long long argument) {
    if constexpr (std::is_pointer_v<To>)
        return reinterpret_cast<To>(argument);
    else
        return static_cast<To>(argument);
}

template <class... A, std::size_t... I>
bool launch(void (*kernel)(A...), const long long* arguments, long long threads, std::index_sequence<I...>) {
    auto call = [&] { kernel(converted<A>(arguments[I])...); };
    body = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    body_argument = &call;
    bool well = true;
    for (long long b = 0; b < (threads + THREADS - 1) / THREADS; ++b) {
        block.x = static_cast<unsigned>(b);
        well = run_block() && well;
    }
    return well;
}

// Run kernel(arguments...) in as many thread blocks as `threads` need; all arguments are 64-bit integers. Return false
// if a thread block got stuck.
template <class... A>
bool launch(void (*kernel)(A...), long long threads, const long long* arguments, int count) {
    return count == sizeof...(A) && launch(kernel, arguments, threads, std::index_sequence_for<A...>{});
}

}  // namespace on_cpu

#define threadIdx on_cpu::thread
#define blockIdx on_cpu::block

inline unsigned __float_as_uint(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }

inline unsigned read_of(unsigned thread, unsigned value) {
    const unsigned self = threadIdx.x;
    unsigned* const values = on_cpu::exchanged[on_cpu::shuffles[self]++ % 2];
    values[self] = value;
    on_cpu::wait_for_others();
    return values[thread];
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int distance) {
    return read_of(threadIdx.x ^ static_cast<unsigned>(distance), value);
}

inline float __shfl_sync(unsigned, float value, int lane, int width) {
    const unsigned first = threadIdx.x - threadIdx.x % static_cast<unsigned>(width);
    return __uint_as_float(read_of(first + static_cast<unsigned>(lane), __float_as_uint(value)));
}

inline void atomicAdd(unsigned long long* at, unsigned long long value) { *at += value; }

inline void atomicMax(unsigned* at, unsigned value) { *at = *at > value ? *at : value; }
