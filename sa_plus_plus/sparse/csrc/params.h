// What each kernel computes, and the part of it that one call does. Knows nothing of XLA, so that it can be tested
// alone.
//
// Targets are compiled for different processors and include this file. So no function here may be compiled by itself:
// the linker would keep one of the copies, and an older processor could run one that was compiled for a newer.
#pragma once

#include <cstdint>

#define SAPP_INLINE inline __attribute__((always_inline))

namespace sa_plus_plus {

enum class Type { kFloat, kBfloat16, kByte };  // float32, bfloat16, and 8 bits: unsigned in x and y, signed in blocks

SAPP_INLINE int64_t size_of(Type type) { return type == Type::kFloat ? 4 : type == Type::kBfloat16 ? 2 : 1; }

// Programs in files have these numbers: new ones come last.
enum class Activation {
  kNone,       // x
  kRelu,       // max(x, 0)
  kGelu,       // x Phi(x), with the normal distribution function Phi
  kGeluTanh,   // x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
  kSilu,       // x / (1 + exp(-x))
  kRelu6,      // min(max(x, 0), 6)
  kHardSwish,  // x min(max(x + 3, 0), 6) / 6
  kCount
};

// The product of a dense matrix x, the lhs, and a block-sparse one, the rhs, followed by an epilogue:
//
//     v = x @ w * scale + bias + (residual - residual_zero_point) * residual_scale
//     y = act(v),                                             act(v) = activation(v)                    in float types
//     y = clamp(round(act(v)) + y_zero_point, 0, 255),        act(v) = activation(v * y_unit) / y_unit  in bytes
//
// Accumulators are float32, or int32 where x is bytes.
//
// The rows of x are anywhere in its memory: those of a matrix follow one another; those of a convolution are patches of
// images, which overlap. Either way they come in runs, in which each begins `stride` after the one before it. Rows of y
// come in lines, with borders of y_zero_point around each image of `lines` lines. All lengths and strides count
// numbers.
struct Product {
  int64_t batch, height, width;  // x is (batch, height), w (height, width), y (batch, width)
  int64_t b_r, b_c;              // a block's rows and columns
  int64_t kept;                  // number of blocks
  Type x_type, w_type, y_type, residual_type;
  const void* x;
  const void* blocks;     // (kept, b_r / group, b_c, group)
  const int32_t* rows;    // (kept): the grid row of each block
  const int32_t* starts;  // (grid_c() + 1): the blocks of grid column j are numbers starts[j] to starts[j + 1]
  const float* scale;     // (width), or null
  const float* bias;      // (width), or null
  const void* residual;   // (batch, width) in any type, or null; may be y, if that is of the same type without borders
  float residual_scale, residual_zero_point, y_zero_point, y_unit;
  Activation activation;
  bool narrow;  // no weight in bytes is beyond -kNarrow to kNarrow
  void* y;
  int64_t run, stride;                    // rows in a run, and from one of them to the next
  int64_t runs, run_stride, runs_stride;  // from run to run, and from each `runs` of them to the next
  const int64_t* down;                    // (grid_r()): offset in a row of x of the lhs of a grid row's blocks
  int64_t line, lines;                    // rows of y in a line, and lines in an image
  int64_t top, bottom, left, right;       // the width of the borders around each image of y, in rows of y

  // Blocks of bfloat16 and bytes that meet x of the same type hold `group` rows, four bytes, of each column together,
  // and b_c is a multiple of kWide.
  SAPP_INLINE bool grouped() const { return x_type != Type::kFloat; }
  SAPP_INLINE int64_t group() const { return grouped() ? 4 / size_of(w_type) : 1; }
  SAPP_INLINE int64_t grid_r() const { return (height + b_r - 1) / b_r; }
  SAPP_INLINE int64_t grid_c() const { return (width + b_c - 1) / b_c; }
  SAPP_INLINE int64_t row(int64_t i) const {  // offset of row i in x
    const int64_t r = i / run;
    return r / runs * runs_stride + r % runs * run_stride + i % run * stride;
  }
  SAPP_INLINE int64_t y_line() const { return (left + line + right) * width; }
  SAPP_INLINE int64_t y_image() const { return (top + lines + bottom) * y_line(); }
  SAPP_INLINE int64_t y_row(int64_t i) const {  // offset of row i in y
    const int64_t l = i / line;
    return l / lines * y_image() + (top + l % lines) * y_line() + (left + i % line) * width;
  }
};

constexpr int kNarrow = 64;         // 2 * 255 * kNarrow < 2^15: two products with bytes of x add up in 16 bits
constexpr int64_t kWide = 16;       // columns of grouped blocks come in so many
constexpr int64_t kMostRows = 224;  // in a part

// Rows of y, at most kMostRows, and the columns of y that grid columns cover; ends are exclusive.
struct Part {
  int64_t top, bottom, left, right;
};

// Windows of images (images, rows, columns, channels): the largest number in each, or their sum. What is beyond an
// image's edges does not count.
struct Pooling {
  Type type;  // of x and y; sums are of floats
  bool sums;
  const void* x;
  void* y;
  int64_t lines, rows, columns, channels, y_rows, y_columns;                   // `lines` of y in all images
  int64_t window_rows, window_columns, stride_down, stride_across, top, left;  // the latter two are the padding
};

// Depthwise convolution of images (images, rows, columns, channels), each channel of x with `multiplier` windows of its
// own: y = activation(x * kernel + bias + residual). What is beyond an image's edges is zero.
struct Depthwise {
  const float *x, *kernel;       // (window_rows, window_columns, width()), outputs of a channel together
  const float *bias, *residual;  // (width()), and like y; or null
  float* y;
  int64_t lines, rows, columns, channels, multiplier, y_rows, y_columns;  // `lines` of y in all images
  int64_t window_rows, window_columns, stride_down, stride_across, dilation_down, dilation_across;
  int64_t top, left;  // the padding
  Activation activation;

  SAPP_INLINE int64_t width() const { return channels * multiplier; }
};

// Runs of numbers, each followed by zeros until there are `wide` of them:
//
//     y = x                                               in float types
//     y = clamp(round(x * scale) + zero_point, 0, 255)    in bytes
struct Runs {
  Type type;
  const float* x;
  void* y;
  int64_t count, run, wide;
  float scale, zero_point;
};

// Rows with their numbers in another order: y[i, k] = x[i, places[k]].
struct Lookup {
  Type type;
  const void* x;
  const int32_t* places;  // (y_columns), each below `columns`
  void* y;
  int64_t rows, columns, y_columns;
};

// Layer normalisation of each of `rows` rows, with the mean and the variance of the row; the mean counts as 0 unless
// they are `centred`:
//
//     out = (x - mean) / sqrt(variance + epsilon) * scale + shift
//     y = out                                              in float types
//     y = clamp(round(out * factor) + zero_point, 0, 255)  in bytes
struct Normalization {
  Type x_type, y_type;  // x: float or bfloat16
  const void* x;
  const float *scale, *shift;  // (columns)
  void* y;
  int64_t rows, columns;
  bool centred;
  float epsilon, factor, zero_point;
};

// softmax(scale q kᵀ + bias) v in each head: q is (heads, queries, depth), k (heads, keys, depth), v (heads, keys,
// width), bias (heads, queries, keys) and y (heads, queries, width). Heads have three axes of their own. In memory, all
// axes may be in any order except the last, which is contiguous.
struct Attention {
  struct Place {
    int64_t head[3], row;  // strides, in numbers; 0 along a broadcast axis
  };
  Type type;  // of q, k, v and y: float or bfloat16
  int64_t heads[3], queries, keys, depth, width;
  int64_t seen;  // how many keys the first query sees; each of the others sees one more than the one before it
  const void *q, *k, *v;
  const float* bias;  // or null
  void* y;
  Place q_at, k_at, v_at, bias_at, y_at;
  float scale;

  SAPP_INLINE int64_t all_heads() const { return heads[0] * heads[1] * heads[2]; }
  SAPP_INLINE int64_t start(const Place& place, int64_t head) const {  // offset of a head
    const int64_t last = head % heads[2], middle = head / heads[2] % heads[1], first = head / heads[2] / heads[1];
    return first * place.head[0] + middle * place.head[1] + last * place.head[2];
  }
};

constexpr int64_t kMostPanel = 64;  // columns of a matrix that are packed together, at most
constexpr int64_t kMostScores = 8;  // rows of scores that are computed together, at most

}  // namespace sa_plus_plus
