// A thread pool for coarse tasks: dynamic (one atomic counter per job), no spinning, usable from many threads at once.
//
// parallel_for(tasks, threads, body) calls body(task, slot) for task in [0, tasks); at most `threads` calls run at a
// time and each of those has its own slot in [0, threads). The caller works too, so one thread never touches the pool.
// Bodies allocate nothing. Should one throw all the same, no further task begins, and the first exception is the
// caller's once all helpers are out of its body; where threads cannot be had, those that are there do the work.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace cmr {

class ThreadPool {
public:
    static ThreadPool& instance() {
        static std::once_flag once;
        std::call_once(once, [] {
            current() = new ThreadPool;
#if defined(__unix__) || defined(__APPLE__)
            // a forked child has none of the workers: it starts a pool of its own
            pthread_atfork(nullptr, nullptr, [] { current() = new ThreadPool; });
#endif
        });
        return *current();
    }

    void run(int64_t tasks, int threads, const std::function<void(int64_t, int)>& body) {
        const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
        auto job = std::make_shared<Job>();
        job->tasks = tasks;
        job->body = &body;
        const int asked = helpers > 0 ? ask(job, helpers) : 0;
        for (int i = 0; i < asked; ++i) wake_.notify_one();
        job->drain(0);
        if (asked > 0) {
            std::unique_lock<std::mutex> lock(mutex_);
            // helpers that never woke are not waited for
            for (auto it = queue_.begin(); it != queue_.end();)
                it = it->first == job ? queue_.erase(it) : std::next(it);
            job->done.wait(lock, [&] { return job->running == 0; });
        }
        if (job->error) std::rethrow_exception(job->error);
    }

private:
    struct Job {
        std::atomic<int64_t> next{0};
        int64_t tasks = 0;
        const std::function<void(int64_t, int)>* body = nullptr;
        int running = 0;  // helpers inside drain, guarded by the pool's mutex
        std::condition_variable done;
        std::atomic<bool> failed{false};
        std::exception_ptr error;  // of whoever set `failed`

        void drain(int slot) noexcept {
            try {
                for (int64_t task; !failed.load(std::memory_order_relaxed) &&
                                   (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
                    (*body)(task, slot);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
            }
        }
    };

    // Queues the job for up to `helpers` workers; returns for how many.
    int ask(const std::shared_ptr<Job>& job, int helpers) {
        std::lock_guard<std::mutex> lock(mutex_);
        int asked = 0;
        try {
            while (static_cast<int>(workers_.size()) < helpers) {
                workers_.reserve(workers_.size() + 1);  // so that a thread that has begun is not lost
                workers_.emplace_back([this] { work(); });
                workers_.back().detach();
            }
        } catch (...) {  // no memory or no thread to be had
        }
        try {
            for (; asked < std::min<int>(helpers, static_cast<int>(workers_.size())); ++asked)
                queue_.emplace_back(job, asked + 1);
        } catch (...) {
        }
        return asked;
    }

    static ThreadPool*& current() {
        static ThreadPool* pool = nullptr;  // never destroyed: detached workers may outlive main
        return pool;
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return !queue_.empty(); });
            auto [job, slot] = queue_.front();
            queue_.pop_front();
            ++job->running;
            lock.unlock();
            job->drain(slot);
            lock.lock();
            if (--job->running == 0) job->done.notify_all();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::pair<std::shared_ptr<Job>, int>> queue_;
    std::vector<std::thread> workers_;
};

template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
    if (threads <= 1 || tasks <= 1) {
        for (int64_t task = 0; task < tasks; ++task) body(task, 0);
        return;
    }
    ThreadPool::instance().run(tasks, threads, body);
}

}  // namespace cmr
