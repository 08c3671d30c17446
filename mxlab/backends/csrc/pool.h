// A thread pool of our own: torch's is its OpenMP runtime, and a second OpenMP runtime beside it oversubscribes the cores.
#pragma once

#include <cfenv>
#include <cstdint>
#include <functional>

namespace mx {

// While it lives, the thread computes in the default floating-point state: results must not depend on
// torch.set_flush_denormal.
class DefaultArithmetic {
   public:
    DefaultArithmetic() {
        std::fegetenv(&saved_);
        std::fesetenv(FE_DFL_ENV);
    }
    ~DefaultArithmetic() { std::fesetenv(&saved_); }
    DefaultArithmetic(const DefaultArithmetic&) = delete;
    DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

   private:
    std::fenv_t saved_;
};

// Calls work(first, last) on ranges that cover [0, units), on the calling thread and up to `threads` - 1 others, and
// returns when all is done, under DefaultArithmetic. The ranges have `grain` units at least. Any number of threads may call it at once.
void parallel_for(int threads, int64_t units, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

}  // namespace mx
