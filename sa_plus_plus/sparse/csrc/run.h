// Runs what was checked: cuts it into parts and computes them on at most `threads` threads.
#pragma once

#include <cstdint>

#include "checks.h"

namespace sa_plus_plus {

void run(const Convolution& convolution, int64_t threads, Kernel kernel);
void run(const Depthwise& depthwise, int64_t threads, Convolve convolve);
void run(const Pooling& pooling, int64_t threads, Pool pool);
void run(const Images& images, int64_t threads, Round round);
bool run(const Attention& attention, int64_t threads, Attend attend);  // false: no memory for keys and values

}  // namespace sa_plus_plus
