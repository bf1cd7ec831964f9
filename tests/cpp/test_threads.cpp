// A pool of threads in a process that forks.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <thread>
#include <vector>

#include "threads.h"

namespace {

using mlf::FairMutex;
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

void expect(const char* what, bool holds) {
  if (holds) return;
  std::fprintf(stderr, "%s: not so\n", what);
  ++failures;
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

// How often a worker slept between some calls that follow each other like the steps of an answer.
long sleeps_of_a_worker(int calls) {
  long first = -1, last = -1;
#if defined(RUSAGE_THREAD)
  constexpr auto kBetween = std::chrono::microseconds(60);
  ThreadPool pool(2);
  for (int call = 0; call < calls; ++call) {
    pool.run([&](int thread) {
      rusage usage{};
      if (thread == 0 || getrusage(RUSAGE_THREAD, &usage) != 0) return;
      last = usage.ru_nvcsw;
      if (first < 0) first = last;
    });
    const auto called = std::chrono::steady_clock::now();
    while (std::chrono::steady_clock::now() - called < kBetween) {
    }
  }
#else
  static_cast<void>(calls);
#endif
  return last - first;
}

// To wake it takes longer than a program needs between two steps. Other programs may keep this one
// from calling in time: in one of many attempts they do not.
void a_worker_is_awake_for_the_next_call() {
  if (std::thread::hardware_concurrency() < 2) return;
  constexpr int kAttempts = 200, kCalls = 20;
  bool awake = false;
  for (int attempt = 0; attempt < kAttempts && !awake; ++attempt)
    awake = sleeps_of_a_worker(kCalls) < kCalls / 2;
  expect("a worker is awake for the next call", awake);
}

void wait_for_users(FairMutex& mutex, int64_t users) {
  while (mutex.users() < users) rest(1);
}

// Who has it twice in a row would keep it from others for as long as it likes.
void a_mutex_is_had_in_the_order_of_asking() {
  FairMutex mutex;
  std::atomic<int> had{0};
  std::atomic<bool> ordered{true};
  mutex.lock();
  std::vector<std::thread> others;
  for (int i = 0; i < 3; ++i) {
    others.emplace_back([&, i] {
      mutex.lock();
      if (had++ != i) ordered = false;
      mutex.unlock();
    });
    wait_for_users(mutex, i + 2);
  }
  expect("a mutex in use is not free", !mutex.try_lock());
  mutex.unlock();
  mutex.lock();
  expect("who waited comes before who returns", had == 3 && ordered);
  mutex.unlock();
  for (std::thread& other : others) other.join();
  expect("a mutex is free at the end", mutex.try_lock());
  expect("and then in use", !mutex.try_lock());
  mutex.unlock();
}

// The child has neither who holds the mutex nor who waits for it.
void a_child_can_use_and_destroy_a_mutex() {
  auto mutex = std::make_unique<FairMutex>();
  mutex->lock();
  std::thread waiting([&] {
    mutex->lock();
    mutex->unlock();
  });
  wait_for_users(*mutex, 2);
  const pid_t child = fork();
  if (child == 0) {
    const bool free = mutex->try_lock();
    if (free) mutex->unlock();
    mutex->lock();
    mutex->unlock();
    mutex.reset();
    _exit(free ? 0 : 1);
  }
  expect_end("a mutex used in a child", child);
  const pid_t destroying = fork();
  if (destroying == 0) {
    mutex.reset();
    _exit(0);
  }
  expect_end("a mutex destroyed in a child", destroying);
  mutex->unlock();
  waiting.join();
}

// How often a worker slept at some barriers that the other thread came to a little later.
long sleeps_at_barriers(int barriers) {
  long slept = 0;
#if defined(RUSAGE_THREAD)
  constexpr auto kLater = std::chrono::microseconds(20);
  ThreadPool pool(2);
  pool.run([&](int thread) {
    for (int i = 0; i < barriers; ++i) {
      pool.barrier();
      rusage before{}, after{};
      if (thread != 0) getrusage(RUSAGE_THREAD, &before);
      const auto begin = std::chrono::steady_clock::now();
      while (thread == 0 && std::chrono::steady_clock::now() - begin < kLater) {
      }
      pool.barrier();
      if (thread == 0) continue;
      getrusage(RUSAGE_THREAD, &after);
      slept += after.ru_nvcsw - before.ru_nvcsw;
    }
  });
#else
  static_cast<void>(barriers);
#endif
  return slept;
}

// As long as stages differ, whatever a pause takes.
void a_worker_is_awake_at_a_barrier() {
  if (std::thread::hardware_concurrency() < 2) return;
  constexpr int kAttempts = 200, kBarriers = 20;
  bool awake = false;
  for (int attempt = 0; attempt < kAttempts && !awake; ++attempt)
    awake = sleeps_at_barriers(kBarriers) < kBarriers / 2;
  expect("a worker is awake at a barrier", awake);
}

}  // namespace

int main() {
  a_mutex_is_had_in_the_order_of_asking();
  a_child_can_use_and_destroy_a_mutex();
  a_worker_is_awake_for_the_next_call();
  a_worker_is_awake_at_a_barrier();
  a_child_can_destroy_a_pool();
  a_child_can_use_a_pool();
  return failures ? 1 : 0;
}
