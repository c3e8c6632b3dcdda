// Runs calls: cuts them into parts and computes these on at most `threads` threads, by a target's functions.
#pragma once

#include <cstdint>

#include "targets.h"
#include "validate.h"

namespace sa_plus_plus {

// Each checks a call and runs it by the best target, or says what is wrong: `kNoMemory` where there was too little.
extern const char kNoMemory[];
const char* compute(const ConvolutionArrays& arrays, const ConvolutionOptions& options, int64_t threads);
const char* compute(const DepthwiseArrays& arrays, const DepthwiseOptions& options, int64_t threads);
const char* compute(const Array& x, const Array& y, const Windows& windows, bool sums, int64_t threads);
const char* compute(const Array& x, const Array& y, const Rounding& rounding, int64_t threads);
const char* compute(const Array& x, List<int32_t> places, const Array& y, int64_t threads);
const char* compute(const NormalizationArrays& arrays, const NormalizationOptions& options, int64_t threads);
const char* compute(const AttentionArrays& arrays, List<int64_t> sizes, List<int64_t> strides, float scale,
                    int64_t threads);

// Each runs what was checked.
void run(const Convolution& convolution, int64_t threads, const Functions& functions);
void run(const Depthwise& depthwise, int64_t threads, const Functions& functions);
void run(const Pooling& pooling, int64_t threads, const Functions& functions);
void run(const Images& images, int64_t threads, const Functions& functions);
void run(const Lookup& lookup, int64_t threads, const Functions& functions);
void run(const Normalization& normalization, int64_t threads, const Functions& functions);
bool run(const Attention& attention, int64_t threads,
         const Functions& functions);  // false: no memory for keys and values

}  // namespace sa_plus_plus
