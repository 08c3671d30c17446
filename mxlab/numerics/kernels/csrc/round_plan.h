// Rounding element by element, for all parts of the extension module.
#pragma once

#include <array>
#include <memory>
#include <mutex>

#include "module.h"
#include "threads.h"

namespace mx {

// Two tables of TABLE_SIZE entries, for bfloat16 and for float16, each made when it is first asked for.
template <class Entry>
class Tables {
   public:
    template <class Fill>
    const Entry* get(Dtype dtype, Fill fill) {
        const int i = dtype == Dtype::bfloat16 ? 0 : 1;
        std::call_once(made_[i], [&] {
            const DefaultArithmetic guard;
            tables_[i] = std::make_unique<Entry[]>(TABLE_SIZE);
            fill(tables_[i].get());
        });
        return tables_[i].get();
    }

   private:
    std::array<std::once_flag, 2> made_;
    std::array<std::unique_ptr<Entry[]>, 2> tables_;
};

inline bool has_table(Dtype dtype, Rounding rounding) {
    return dtype != Dtype::float32 && rounding != Rounding::dither;
}

// Rounds the elements of tensors, each on its own, to one element format.
class RoundPlan {
   public:
    RoundPlan(const Element& element, Rounding rounding, bool subnormals, Numerics numerics)
        : element_(element), rounding_(rounding), numerics_(numerics), subnormals_(subnormals) {}

    void run(uintptr_t source, uintptr_t target, uintptr_t noise, int dtype, int64_t count, int threads) {
        const nanobind::gil_scoped_release release;
        round(buffers(source, target, noise, dtype), count, threads);
    }

    void round(const Buffers& b, int64_t count, int threads) {
        parallel_for(useful(threads, count), count, WORTH_A_THREAD / 2,
                     [&](int64_t first, int64_t last) { round(b, first, last); });
    }

    // Round elements [first, last), on this thread.
    void round(const Buffers& b, int64_t first, int64_t last) {
        if (has_table(b.dtype, rounding_)) return active_kernels().look_up(b, table_for(b.dtype), first, last);
        active_kernels().round_alone(b, element_, numerics_, rounding_, subnormals_, first, last);
    }

   private:
    const uint16_t* table_for(Dtype dtype) {
        return tables_.get(dtype, [&](uint16_t* t) {
            for (int i = 0; i < TABLE_SIZE; ++i) t[i] = static_cast<uint16_t>(i);
            const Buffers all{t, t, nullptr, dtype};
            active_kernels().round_alone(all, element_, numerics_, rounding_, subnormals_, 0, TABLE_SIZE);
        });
    }

    Element element_;
    Rounding rounding_;
    Numerics numerics_;
    bool subnormals_;
    Tables<uint16_t> tables_;
};

}  // namespace mx
