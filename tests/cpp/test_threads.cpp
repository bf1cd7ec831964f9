// A pool of threads in a process that forks.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>

#include "threads.h"

namespace {

using mlf::ThreadPool;

constexpr int kSeconds = 20;  // a child that takes longer hangs
int failures = 0;

void rest(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

// The exit status of a child, -1 if it never ends.
int status_of(pid_t child) {
  for (int wait = 0; wait < 100 * kSeconds; ++wait) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child)
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    rest(10);
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return -1;
}

void expect_end(const char* what, pid_t child) {
  const int status = child > 0 ? status_of(child) : -1;
  if (status == 0) return;
  std::fprintf(stderr, "%s: %d, not 0\n", what, status);
  ++failures;
}

// The worker has ended its part and sleeps at the barrier when the process forks: nobody wakes it
// in the child, where it does not exist. Call `use` there.
template <class Use>
pid_t fork_while_a_worker_sleeps(Use use) {
  auto pool = std::make_unique<ThreadPool>(2);
  pid_t child = -1;
  std::atomic<bool> ended{false};
  pool->run([&](int thread) {
    if (thread != 0) {
      ended = true;
      return;
    }
    while (!ended) rest(1);
    rest(200);
    child = fork();
  });
  if (child != 0) return child;
  use(pool);
  _exit(0);
}

void a_child_can_destroy_a_pool() {
  expect_end("destroyed in a child",
             fork_while_a_worker_sleeps([](std::unique_ptr<ThreadPool>& pool) { pool.reset(); }));
}

void a_child_can_use_a_pool() {
  const pid_t child = fork_while_a_worker_sleeps([](std::unique_ptr<ThreadPool>& pool) {
    std::atomic<int> calls{0};
    pool->run([&](int) { ++calls; });
    pool.reset();
    if (calls != 2) _exit(1);
  });
  expect_end("used in a child", child);
}

}  // namespace

int main() {
  a_child_can_destroy_a_pool();
  a_child_can_use_a_pool();
  return failures ? 1 : 0;
}
