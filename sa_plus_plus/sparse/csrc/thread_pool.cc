// The threads of thread_pool.h: started at the first job, asleep between jobs.
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#endif

namespace sa_plus_plus {
namespace {

constexpr std::chrono::microseconds kSpin{500};  // longer than JAX takes between two calls of a network

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int64_t kMostShares = 64;

// Each thread has a share of consecutive parts, the same in jobs of as many, and then takes what others have left.
struct Job {
  int64_t shares, count;
  void (*task)(const void*, int64_t);
  const void* context;
  struct alignas(64) {
    std::atomic<int64_t> next;
  } share[kMostShares];

  Job(int64_t shares, int64_t count, void (*task)(const void*, int64_t), const void* context)
      : shares(shares), count(count), task(task), context(context) {
    for (int64_t s = 0; s < shares; ++s) share[s].next.store(start(s), std::memory_order_relaxed);
  }

  int64_t start(int64_t s) const { return s * count / shares; }

  void work(int64_t mine) {
    for (int64_t n = 0; n < shares; ++n) {
      const int64_t s = (mine + n) % shares, end = start(s + 1);
      for (int64_t i; (i = share[s].next.fetch_add(1, std::memory_order_relaxed)) < end;) task(context, i);
    }
  }
};

class Pool {
 public:
  // The job is over when all its parts are taken and nobody works for it any more: so it ends even where no helper
  // comes, as in a process that was forked from one that had some.
  void run(Job& job, int64_t helpers) {
    std::unique_lock<std::mutex> mine(owner_, std::try_to_lock);
    if (!mine) return job.work(0);
    while (threads_ < helpers) std::thread(&Pool::help, this, threads_++).detach();
    wanted_ = helpers;
    job_ = &job;
    ++round_;
    if (asleep_ > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    job.work(0);
    job_ = nullptr;
    for (int64_t i = 0; busy_ > 0; ++i) i % 64 ? pause() : std::this_thread::yield();
  }

 private:
  void help(int64_t number) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "sa_plus_plus");  // as `top -H` shows it
#endif
    for (uint64_t seen = 0;;) {
      seen = after(seen);
      ++busy_;  // before the job is looked at: its owner clears that and then waits for those who are busy
      if (Job* job = job_; job && number < wanted_) job->work(number + 1);
      --busy_;
    }
  }

  uint64_t after(uint64_t seen) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    while (round_ == seen) {
      for (int i = 0; i < 64 && round_ == seen; ++i) pause();
      std::this_thread::yield();  // to other threads of XLA's, if there are any to run
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return round_ != seen; });
      --asleep_;
    }
    return round_;
  }

  std::mutex owner_;
  int64_t threads_ = 0;  // owner_'s
  std::atomic<int64_t> wanted_{0}, busy_{0}, asleep_{0};
  std::atomic<Job*> job_{nullptr};
  std::atomic<uint64_t> round_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

std::atomic<int64_t> most{0};

}  // namespace

void set_threads(int64_t threads) { most = threads; }

void parallel(int64_t count, int64_t threads, void (*task)(const void*, int64_t), const void* context) {
  static Pool& pool = *new Pool;  // never destroyed: its threads outlive main
  if (const int64_t limit = most) threads = std::min(threads, limit);
  threads = std::max<int64_t>(1, std::min({threads, count, kMostShares}));
  Job job(threads, count, task, context);
  threads > 1 ? pool.run(job, threads - 1) : job.work(0);
}

}  // namespace sa_plus_plus
