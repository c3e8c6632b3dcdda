// A dense matrix times a block-sparse one, on a part of the result. Knows nothing of XLA, so that it can be driven alone.
#pragma once

#include <cstdint>

namespace sa_plus_plus {

// y = x @ w, then + bias, then max(., 0). y and the blocks are row-major and without gaps. The rows of x are anywhere in
// its memory: those of a matrix follow one another; those of a convolution are patches of images, which overlap. Either
// way they come in runs, in which each begins `stride` after the one before it.
struct Product {
  int64_t batch, height, width;  // x has `batch` rows of `height` numbers, y as many of `width`
  int64_t b_r, b_c;              // a block's rows and columns
  int64_t kept;                  // number of blocks
  const float* x;
  const void* blocks;  // (kept, b_r, b_c): float, or bfloat16 if `half`
  bool half;
  const int32_t* rows;    // (kept): in which grid row a block stands
  const int32_t* starts;  // (grid_c() + 1): the blocks of grid column j are numbers starts[j] to starts[j + 1]
  const float* bias;      // (width), or null
  bool relu;
  float* y;
  int64_t run, stride;                   // rows in a run, and floats from one of them to the next
  int64_t runs, run_stride, runs_stride; // floats from run to run, and from each `runs` of them to the next
  const int64_t* down;                   // (grid_r()): where in a row what meets the blocks of a grid row begins

  int64_t grid_r() const { return (height + b_r - 1) / b_r; }
  int64_t grid_c() const { return (width + b_c - 1) / b_c; }
  const float* row(int64_t i) const {
    const int64_t r = i / run;
    return x + r / runs * runs_stride + r % runs * run_stride + i % run * stride;
  }
};

// Rows of y, and the columns of y that grid columns cover; ends are exclusive.
struct Part {
  int64_t top, bottom, left, right;
};

// What is wrong with the indices, or null. A kernel may be run only on a product that passes: it looks at nothing again.
const char* complaint(const Product& product);

// One and the same source compiled for several instruction sets.
using Kernel = void (*)(const Product&, const Part&);
void kernel_baseline(const Product& product, const Part& part);
void kernel_avx2(const Product& product, const Part& part);
void kernel_avx512(const Product& product, const Part& part);

// The best that this processor has.
Kernel best_kernel();

}  // namespace sa_plus_plus
