// The thread pool where a body throws, as one without memory does: the caller gets the first exception once everyone is
// out of its body, no further task begins, and the pool goes on working. For the thread and address sanitizers.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "parallel.h"

namespace {

void require(bool ok, const char* what, int threads) {
    if (ok) return;
    std::printf("%s, %d threads\n", what, threads);
    std::exit(1);
}

// Tasks from `bad` on throw; `inside` lives on this stack, so a helper that outstays the call is seen.
void check(int threads, int64_t tasks, int64_t bad) {
    std::atomic<int> inside{0};
    std::atomic<int64_t> done{0};
    bool thrown = false;
    try {
        cmr::parallel_for(tasks, threads, [&](int64_t task, int slot) {
            require(slot >= 0 && slot < threads, "a slot outside the threads", threads);
            ++inside;
            if (task >= bad) {
                --inside;
                throw std::bad_alloc();
            }
            ++done;
            --inside;
        });
    } catch (const std::bad_alloc&) {
        thrown = true;
    }
    require(inside == 0, "a helper was still in the body", threads);
    require(thrown == (bad < tasks), "the exception did not come out", threads);
    require(done <= std::min(bad, tasks) && (thrown || done == tasks), "tasks were lost", threads);
}

}  // namespace

int main() {
    for (int round = 0; round < 200; ++round)
        for (int threads : {1, 2, 3, 8})
            for (int64_t bad : {0, 1, 7, 40, 1000}) check(threads, 40, bad);
    std::vector<std::thread> users;  // several callers at once, some of which fail
    for (int user = 0; user < 4; ++user)
        users.emplace_back([user] {
            for (int round = 0; round < 100; ++round) check(3, 30, user % 2 ? 5 : 100);
        });
    for (std::thread& user : users) user.join();
    std::printf("parallel ok\n");
}
