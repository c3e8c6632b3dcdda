// Random jobs for thread_pool.h: from one thread, from several at once, and in forked processes, which start without
// helpers. Every task of a job must run exactly once, before the job ends, in no more threads than were asked for, and
// helpers that are asleep must come. For a thread sanitizer.
//
//     fuzz JOBS
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "thread_pool.h"

namespace {

std::atomic<int64_t> started{0};

struct Sums {
  const std::vector<int>& in;
  std::vector<int>& out;
  std::atomic<int>& threads;
  const int64_t number = ++started;
};

void add(const void* context, int64_t i) {
  const Sums& sums = *static_cast<const Sums*>(context);
  thread_local int64_t last = 0;
  if (last != sums.number) ++sums.threads;
  last = sums.number;
  sums.out[i] += sums.in[i];
  if (sums.in[i] % 8 == 0) std::this_thread::yield();
}

void jobs(int count, unsigned seed) {
  std::mt19937 generator(seed);
  auto below = [&](unsigned most) { return static_cast<int>(generator() % most); };
  for (int job = 0; job < count; ++job) {
    std::vector<int> in(1 + below(40)), out(in.size());
    for (int& number : in) number = 1 + below(100);
    std::atomic<int> threads{0};
    const Sums sums{in, out, threads};
    const int most = 1 + below(5);
    sa_plus_plus::parallel(in.size(), most, add, &sums);
    if (out != in || threads > most) std::printf("job %d of %u is wrong\n", job, seed), std::abort();
    if (!below(200)) usleep(700);  // helpers fall asleep
  }
}

// A job whose tasks wait for each other: helpers come, also those that are asleep.
void meeting(int threads) {
  std::atomic<int> here{0};
  struct Both {
    std::atomic<int>& here;
    const int all;
  } const both{here, threads};
  auto wait = [](const void* context, int64_t) {
    const Both& both = *static_cast<const Both*>(context);
    ++both.here;
    for (int tries = 0; both.here < both.all; ++tries) {
      if (tries > 20000) std::puts("a thread does not come"), std::abort();
      usleep(500);
    }
  };
  sa_plus_plus::parallel(threads, threads, wait, &both);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const int count = std::atoi(argv[1]);
  jobs(count, 0);
  for (int threads : {2, 3, 4, 2}) usleep(2000), meeting(threads);
  std::vector<std::thread> threads;
  for (unsigned t = 1; t <= 3; ++t) threads.emplace_back(jobs, count, t);
  for (std::thread& thread : threads) thread.join();
  for (unsigned child = 4; child < 8; ++child) {
    const pid_t id = fork();
    if (!id) {
      usleep(2000);
      meeting(child);  // with as many threads as before the fork, and more
      jobs(100, child);
      _exit(0);
    }
    int status = 1;
    if (waitpid(id, &status, 0) != id || status) std::abort();
  }
  std::puts("done");
}
