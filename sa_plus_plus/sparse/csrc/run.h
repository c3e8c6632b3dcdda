// Runs what was checked: cuts it into parts and computes them on at most `threads` threads, by a
// target's functions.
#pragma once

#include <cstdint>

#include "targets.h"
#include "validate.h"

namespace sa_plus_plus {

void run(const Convolution& convolution, int64_t threads, const Functions& functions);
void run(const Depthwise& depthwise, int64_t threads, const Functions& functions);
void run(const Pooling& pooling, int64_t threads, const Functions& functions);
void run(const Images& images, int64_t threads, const Functions& functions);
void run(const Normalization& normalization, int64_t threads, const Functions& functions);
bool run(const Attention& attention, int64_t threads,
         const Functions& functions);  // false: no memory for keys and values

}  // namespace sa_plus_plus
