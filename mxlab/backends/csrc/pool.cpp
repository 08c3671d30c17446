#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace mx {
namespace {

using Work = std::function<void(int64_t, int64_t)>;

// Ranges are handed out as threads ask for them, so that a worker that wakes late costs nothing: the others go on.
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

class Pool {
   public:
    void run(int threads, Job& job) {
        const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return job.run();  // another Python thread has the workers
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < threads - 1) {
                std::thread([this, number = workers_] { serve(number); }).detach();
                ++workers_;
            }
            job_ = &job;
            wanted_ = threads - 1;
            ++generation_;
        }
        start_.notify_all();
        job.run();
        std::unique_lock<std::mutex> lock(mutex_);
        job_ = nullptr;  // who has not begun yet, need not
        done_.wait(lock, [this] { return busy_ == 0; });
    }

   private:
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
    int workers_ = 0, wanted_ = 0, busy_ = 0;
};

// Never destroyed: workers may wait on it until the process ends. A forked child has no workers, so it gets a new one.
Pool* pool = nullptr;

void make_pool() { pool = new Pool; }

Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        make_pool();
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, make_pool);
#endif
    });
    return *pool;
}

}  // namespace

void parallel_for(int threads, int64_t units, int64_t grain, const Work& work) {
    Job job{work, units, std::max<int64_t>(grain, 1)};
    if (threads > 1 && units > job.grain)
        the_pool().run(threads, job);
    else
        job.run();
}

}  // namespace mx
