// Threads: those of the OpenMP runtime that torch has loaded, if that is GNU's, or else a few of our own.
//
// Torch's threads are awake: between two operators they wait in a loop for a while, and any other thread, such as one
// of a second OpenMP runtime, would have to share a core with one of them.
#pragma once

#include <cfenv>
#include <cstdint>
#include <functional>

namespace mx {

// Sets the default floating-point state of the thread for its own lifetime: results must not depend on
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

// Call work(first, last) on ranges of `grain` units (the last may be shorter) that cover [0, units), on the calling
// thread and up to `threads` - 1 others, under DefaultArithmetic; return when all is done. `work` must not throw. Any
// number of threads may call this at once.
void parallel_for(int threads, int64_t units, int64_t grain, const std::function<void(int64_t, int64_t)>& work);

// Use the threads of the GNU OpenMP runtime at `path` from now on. Return false where it is not loaded already.
bool adopt_openmp(const char* path);

}  // namespace mx
