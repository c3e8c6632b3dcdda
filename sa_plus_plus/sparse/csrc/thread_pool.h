// Threads that help with one job at a time. Between jobs they spin for a while before they sleep: the layers of a
// network follow one another within microseconds, and waking a thread takes some fifty.
#pragma once

#include <cstdint>

namespace sa_plus_plus {

// Calls `task(context, i)` once for each i in [0, count), on this thread and up to `threads - 1` others. Where these
// are at work for another caller, on this thread alone.
void parallel(int64_t count, int64_t threads, void (*task)(const void* context, int64_t i), const void* context);

// At most so many threads for all jobs from now on; 0 for as many as `parallel` is asked for.
void set_threads(int64_t threads);

}  // namespace sa_plus_plus
