// Threads: those of the OpenMP runtime that torch has loaded, where that is GNU's, or else a small pool of our own.
//
// Torch's threads are awake: between two operators they wait in a loop for a while, and a thread of anybody else's would
// have to share a core with one. A second OpenMP runtime would be as bad.
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

// Calls work(first, last) on ranges of `grain` units (the last may be shorter) that cover [0, units), on the calling thread
// and up to `threads` - 1 others, under DefaultArithmetic, and returns when all is done. `work` must not throw. Any number
// of threads may call it at once.
void parallel_for(int threads, int64_t units, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

// Uses the threads of the GNU OpenMP runtime at `path` from now on, if it is loaded already; false where it is not.
bool adopt_openmp(const char* path);

}  // namespace mx
