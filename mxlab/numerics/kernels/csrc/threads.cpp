#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace mx {
namespace {

using Work = std::function<void(int64_t, int64_t)>;

// Work whose ranges are handed out as threads ask for them: a thread that wakes late holds nobody up.
struct Job {
    const Work& work;
    const int64_t units, grain;
    std::atomic<int64_t> next{0};

    void run() {
        const DefaultArithmetic guard;
        for (;;) {
            const int64_t first = next.fetch_add(grain, std::memory_order_relaxed);
            if (first >= units) return;
            work(first, std::min(units, first + grain));
        }
    }
};

// Threads of our own, started when they are first needed.
class OwnThreads {
   public:
    // Do the job on the calling thread and up to `count` - 1 others.
    void run(int count, Job& job) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return job.run();  // another Python thread is using them
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            while (started_ < count - 1 && start_thread()) ++started_;
            job_ = &job;
            wanted_ = count - 1;
            ++generation_;
        }
        start_.notify_all();
        job.run();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;  // a thread that has not begun yet need not
        done_.wait(lock, [this] { return busy_ == 0; });
    }

   private:
    // Return false where the system has no thread left: those already started do the work.
    bool start_thread() {
        try {
            std::thread([this, number = started_] { serve(number); }).detach();
            return true;
        } catch (const std::system_error&) {
            return false;
        }
    }

    [[noreturn]] void serve(int number) {
        uint64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            Job* const job = job_;
            if (job == nullptr || number >= wanted_) continue;
            ++busy_;
            lock.unlock();
            job->run();
            lock.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable start_, done_;
    Job* job_ = nullptr;
    uint64_t generation_ = 0;
    int started_ = 0, wanted_ = 0, busy_ = 0;
};

// Never destroyed: its threads may wait on it until the process ends.
OwnThreads* own_threads = nullptr;

// GOMP_parallel of the runtime that torch uses, which calls a function on each thread of a team; null without one.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> openmp{nullptr};

void make_own_threads() { own_threads = new OwnThreads; }

// A forked child has no other threads, which GNU's runtime does not notice: there, new threads of our own serve.
void after_fork() {
    openmp = nullptr;
    make_own_threads();
}

OwnThreads& get_own_threads() {
    static std::once_flag once;
    std::call_once(once, make_own_threads);
    return *own_threads;
}

void watch_forks() {
#if !defined(_WIN32)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, after_fork); });
#endif
}

}  // namespace

bool adopt_openmp(const char* path) {
#if defined(_WIN32)
    return false;
#else
    watch_forks();
    void* const library = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    openmp = library ? reinterpret_cast<Parallel>(dlsym(library, "GOMP_parallel")) : nullptr;
    return openmp != nullptr;
#endif
}

void parallel_for(int threads, int64_t units, int64_t grain, const Work& work) {
    Job job{work, units, std::max<int64_t>(grain, 1)};
    const int useful = static_cast<int>(std::min<int64_t>(threads, (units + job.grain - 1) / job.grain));
    if (useful <= 1) return job.run();
    watch_forks();
    if (const Parallel parallel = openmp)
        // All of torch's threads, even where fewer would do: a team of another size costs more than it saves.
        parallel([](void* j) { static_cast<Job*>(j)->run(); }, &job, static_cast<unsigned>(threads), 0);
    else
        get_own_threads().run(useful, job);
}

}  // namespace mx
