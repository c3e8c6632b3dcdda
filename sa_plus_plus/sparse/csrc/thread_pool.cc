// The threads of thread_pool.h: started at the first job, asleep between jobs.
#include "thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace sa_plus_plus {
namespace {

constexpr std::chrono::microseconds kSpin{500};  // longer than JAX takes between two calls of a network
constexpr int kPauses = 256;  // some microseconds, between two yields to other threads, such as XLA's

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

constexpr int64_t kMostThreads = 64;

struct Job {
  void (*task)(const void* context, int64_t i);
  const void* context;
  int64_t count, each;  // tasks in all, and in a part

  int64_t parts() const { return (count + each - 1) / each; }

  void run(int64_t part) const {
    for (int64_t i = part * each; i < std::min(count, (part + 1) * each); ++i) task(context, i);
  }
};

// Which parts of a share are left, and how many threads the job may have, as one number.
struct Left {
  static constexpr int kBits = 28;
  static constexpr int64_t kMost = (int64_t{1} << kBits) - 1;
  uint64_t number;

  static Left of(int64_t next, int64_t end, int64_t threads) {
    return {static_cast<uint64_t>(next | end << kBits | threads << 2 * kBits)};
  }
  int64_t next() const { return number & kMost; }
  int64_t end() const { return number >> kBits & kMost; }
  int64_t threads() const { return number >> 2 * kBits; }
  bool any() const { return next() < end(); }
};

// What one thread does first of a job: consecutive parts, the same in jobs of as many. A thread that waits finds all
// that it needs to begin in one cache line, which takes some 40 ns from core to core, and 200 where they share no cache.
struct alignas(64) Share {
  // Whoever replaces `left` by the next number has a part of `job`, which stays what it is until that part is done.
  std::atomic<uint64_t> left{0};
  Job job{};
  alignas(64) std::atomic<int64_t> done{0};  // parts this thread has done, in all jobs
  std::atomic<bool> asleep{false};
  std::condition_variable wake;
};

class Pool {
 public:
  // All parts are done when this returns, also where no helper comes or none can be started.
  void run(const Job& job, int64_t threads) {
    const int64_t parts = job.parts();
    std::unique_lock<std::mutex> mine(owner_, std::try_to_lock);
    if (!mine) {
      for (int64_t i = 0; i < parts; ++i) job.run(i);
      return;
    }
    start(threads);
    for (int64_t s = threads - 1; s >= 0; --s) {
      Share& share = shares_[s];
      share.job = job;
      share.left = Left::of(s * parts / threads, (s + 1) * parts / threads, threads).number;
      if (!share.asleep) continue;
      std::lock_guard<std::mutex> lock(mutex_);
      share.wake.notify_one();
    }
    work(0, threads);
    wanted_ += parts;
    for (int64_t i = 1; done() != wanted_; ++i) i % kPauses ? pause() : std::this_thread::yield();
  }

 private:
  void start(int64_t threads) {
    try {
      for (; started_ < threads; ++started_) {
        if (started_) std::thread(&Pool::help, this, started_).detach();  // the first is the one that is here
      }
    } catch (const std::system_error&) {  // the threads that have started do all parts
    }
  }

  // The thread's own share, and then what others have left of theirs.
  void work(int64_t thread, int64_t threads) {
    Share& own = shares_[thread];
    for (int64_t n = 0; n < threads; ++n) {
      Share& share = shares_[(thread + n) % threads];
      int64_t taken = 0;
      for (Left left{share.left}; left.any() && thread < left.threads();) {
        if (!share.left.compare_exchange_weak(left.number, left.number + 1)) continue;
        share.job.run(left.next());
        ++left.number, ++taken;
      }
      if (taken) own.done.store(own.done.load(std::memory_order_relaxed) + taken, std::memory_order_release);
    }
  }

  int64_t done() const {
    int64_t sum = 0;
    for (int64_t s = 0; s < started_; ++s) sum += shares_[s].done.load(std::memory_order_acquire);
    return sum;
  }

  void help(int64_t thread) {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "sa_plus_plus");  // as `top -H` shows it
#endif
    for (;;) work(thread, wait(shares_[thread]).threads());
  }

  Left wait(Share& share) {
    const auto any = [&] { return Left{share.left}.any(); };
    for (auto until = std::chrono::steady_clock::now() + kSpin; !any();) {
      for (int i = 0; i < kPauses && !any(); ++i) pause();
      std::this_thread::yield();
      if (std::chrono::steady_clock::now() < until) continue;
      std::unique_lock<std::mutex> lock(mutex_);
      share.asleep = true;
      share.wake.wait(lock, any);
      share.asleep = false;
    }
    return {share.left};
  }

  std::mutex owner_;
  int64_t started_ = 0, wanted_ = 0;  // owner_'s: threads, the owner's own included, and parts of all jobs
  Share shares_[kMostThreads];
  std::mutex mutex_;
};

std::atomic<int64_t> most{0};
std::atomic<Pool*> pool{nullptr};  // never destroyed: its threads outlive main

Pool& current() {
  static const bool made = [] {
#if !defined(_WIN32)
    // A forked process has a copy of the pool's memory, but not its threads.
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    pool = new Pool;
    return true;
  }();
  static_cast<void>(made);
  return *pool;
}

}  // namespace

void set_threads(int64_t threads) { most = threads; }

void parallel(int64_t count, int64_t threads, void (*task)(const void*, int64_t), const void* context) {
  if (const int64_t limit = most) threads = std::min(threads, limit);
  threads = std::max<int64_t>(1, std::min({threads, count, kMostThreads}));
  if (threads > 1) return current().run({task, context, count, count / Left::kMost + 1}, threads);
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace sa_plus_plus
