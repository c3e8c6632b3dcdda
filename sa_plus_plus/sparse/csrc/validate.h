// What is asked for, and whether it fits the arrays that come with it. Knows nothing of XLA, so that it can be tested
// alone. All attributes may come from a file that somebody forged: any number of 64 bits.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace sa_plus_plus {

// An operand or a result: the numbers at `data`, as many as the product of its sizes, none of which is negative. One of
// no numbers may have sizes beyond all memory.
struct Array {
  Type type;
  void* data;
  int64_t rank;
  const int64_t* sizes;

  int64_t count() const;
};

template <class Number>
struct List {
  const Number* data;
  int64_t count;
};

// Sums and products of sizes, saturated at a number larger than any buffer; no size may be negative.
constexpr int64_t kEndless = INT64_MAX;

inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  return __builtin_mul_overflow(a, b, &product) ? kEndless : product;
}

inline int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  return __builtin_add_overflow(a, b, &sum) ? kEndless : sum;
}

// Each `prepare` sets what `run` computes, or says what is wrong, and then nothing may be run. What it accepts reads
// nothing beyond its operands and writes every number of its result.

// x (images, rows, columns, channels), padded already, times blocks whose rows belong to one row of the window. y
// gets borders of zeros: those that the next convolution pads its images with. A matrix is one image of one line.
struct ConvolutionOptions {
  int64_t window_rows, window_columns, stride_down, stride_across, top, bottom, left, right;
  int64_t activation;
  float residual_scale, residual_zero_point, y_zero_point, y_unit;
  bool narrow = false;  // the caller's word that no weight in bytes is beyond -kNarrow to kNarrow
};

struct Convolution {
  Product product;  // without rows where y is borders alone, or empty
  std::vector<int64_t> down;
  int64_t count;  // numbers of y
};

struct ConvolutionArrays {
  Array x, blocks;
  List<int32_t> rows, starts;
  List<float> scale, bias;  // empty for none
  Array residual;           // empty for none
  Array y;
};

const char* prepare(const ConvolutionArrays& arrays, const ConvolutionOptions& options, Convolution* convolution);

struct Windows {
  int64_t window_rows, window_columns, stride_down, stride_across, top, left;
};

const char* prepare(const Array& x, const Array& y, const Windows& windows, bool sums, Pooling* pooling);

// Images as `Runs` rounds them, with borders and more channels, both zeros.
struct Rounding {
  int64_t top, left;
  float scale, zero_point;
};

struct Images {
  Type type;
  const float* x;
  void* y;
  int64_t lines, rows, columns, channels, y_rows, y_columns, y_channels;  // `lines` of y in all images
  Rounding options;
};

const char* prepare(const Array& x, const Array& y, const Rounding& rounding, Images* images);

const char* prepare(const Array& x, List<int32_t> places, const Array& y, Lookup* lookup);

struct DepthwiseOptions {
  int64_t stride_down, stride_across, dilation_down, dilation_across, top, left;
  int64_t activation;
};

struct DepthwiseArrays {
  Array x, kernel;   // (window rows, window columns, outputs)
  List<float> bias;  // empty for none
  Array residual;    // empty for none
  Array y;
};

const char* prepare(const DepthwiseArrays& arrays, const DepthwiseOptions& options, Depthwise* depthwise);

struct NormalizationOptions {
  int64_t centred;
  float epsilon, factor, zero_point;
};

struct NormalizationArrays {
  Array x;
  List<float> scale, shift;
  Array y;
};

const char* prepare(const NormalizationArrays& arrays, const NormalizationOptions& options,
                    Normalization* normalization);

// `sizes`: three of heads, queries, keys, depth, width, `seen`; `strides`: four each of q, k, v, bias and y.
struct AttentionArrays {
  Array q, k, v, bias, y;  // bias may be empty, for none
};

const char* prepare(const AttentionArrays& arrays, List<int64_t> sizes, List<int64_t> strides, float scale,
                    Attention* attention);

// What is wrong with a product whose sizes are those of its arrays, or null: kernels check nothing again.
const char* validate(const Product& product);

// What is wrong with attention, or null. `counts` are the numbers in q, k, v, bias and y.
const char* validate(const Attention& attention, const int64_t counts[5]);

// How many floats the scratch memory of a thread holds.
int64_t scratch_of(const Attention& attention);

}  // namespace sa_plus_plus
