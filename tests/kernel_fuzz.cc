// Random products through each kernel that this processor can run, against sums in double, with every buffer allocated
// to its exact size: an address sanitizer then sees any access beyond one. Prints the number of products, or what failed.
//
//     fuzz PRODUCTS [SEED]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernel.h"

using sa_plus_plus::Kernel;
using sa_plus_plus::Product;

namespace {

std::mt19937 generator;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {  // a vector's memory may be larger than the vector
  auto copy = std::make_unique<T[]>(values.size());
  std::copy(values.begin(), values.end(), copy.get());
  return copy;
}

std::vector<float> numbers(int64_t n) {  // exact in bfloat16
  std::vector<float> values(n);
  for (float& value : values) value = static_cast<float>(between(-64, 64)) / 16;
  return values;
}

std::vector<uint16_t> halves(const std::vector<float>& values) {
  std::vector<uint16_t> result;
  for (float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    result.push_back(bits >> 16);
  }
  return result;
}

void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

void one(const std::vector<Kernel>& kernels) {
  Product p{};
  p.batch = between(0, 3) ? between(0, 30) : between(30, 60);
  p.b_r = between(1, between(0, 1) ? 8 : 70);
  p.b_c = between(1, between(0, 1) ? 8 : 70);
  p.height = between(1, 5 * p.b_r);
  p.width = between(1, 5 * p.b_c);
  p.run = std::max<int64_t>(1, p.batch), p.stride = p.height, p.runs = 1;
  int64_t channels = p.height, window_columns = 1, line = 0, size = p.batch * p.height;
  if (between(0, 1)) {  // a convolution
    const int64_t images = between(1, 2), window_rows = between(1, 3), down = between(1, 2), across = between(1, 2);
    window_columns = between(1, 3);
    p.b_r = between(1, 20);
    channels = p.b_r * between(1, 3);
    p.runs = between(1, 4), p.run = between(1, 16);
    const int64_t high = (p.runs - 1) * down + window_rows;
    line = ((p.run - 1) * across + window_columns) * channels;
    p.height = window_rows * window_columns * channels;
    p.batch = images * p.runs * p.run;
    p.stride = across * channels, p.run_stride = down * line, p.runs_stride = high * line;
    size = images * high * line;
  }
  std::vector<int64_t> offsets;
  auto offset = [&](int64_t k) {  // of number k of a row
    const int64_t place = k / channels;
    return place / window_columns * line + place % window_columns * channels + k % channels;
  };
  for (int64_t i = 0; i < p.grid_r(); ++i) offsets.push_back(offset(i * p.b_r));
  p.half = between(0, 1);
  p.relu = between(0, 1);
  const double density = std::vector<double>{0, 0.1, 0.5, 1}[between(0, 3)];
  std::vector<int32_t> rows, starts{0};
  for (int64_t j = 0; j < p.grid_c(); ++j) {
    for (int64_t i = 0; i < p.grid_r(); ++i) {
      if (std::uniform_real_distribution<double>()(generator) < density) rows.push_back(i);
    }
    starts.push_back(rows.size());
  }
  p.kept = rows.size();
  const auto x = numbers(size), w = numbers(p.kept * p.b_r * p.b_c), bias = numbers(p.width);
  const auto x_memory = exactly(x), w_memory = exactly(w), bias_memory = exactly(bias);
  const auto half_memory = exactly(halves(w));
  const auto rows_memory = exactly(rows), starts_memory = exactly(starts);
  const auto offsets_memory = exactly(offsets);
  p.down = offsets_memory.get();
  p.x = x_memory.get();
  p.blocks = p.half ? static_cast<const void*>(half_memory.get()) : w_memory.get();
  p.rows = rows_memory.get();
  p.starts = starts_memory.get();
  p.bias = between(0, 1) ? bias_memory.get() : nullptr;
  if (complaint(p)) fail("a good product was refused");

  for (Kernel kernel : kernels) {
    const auto y_memory = exactly(std::vector<float>(p.batch * p.width, NAN));
    p.y = y_memory.get();
    const int64_t row = between(0, p.batch), column = between(0, p.grid_c());
    kernel(p, {0, row, 0, column});
    kernel(p, {0, row, column, p.grid_c()});
    kernel(p, {row, p.batch, 0, p.grid_c()});
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t c = 0; c < p.width; ++c) {
        double sum = p.bias ? bias[c] : 0;
        for (int64_t at = starts[c / p.b_c]; at < starts[c / p.b_c + 1]; ++at) {
          for (int64_t k = 0; k < p.b_r && rows[at] * p.b_r + k < p.height; ++k) {
            const int64_t from = p.row(b) - p.x + offset(rows[at] * p.b_r + k);
            sum += double{x[from]} * w[(at * p.b_r + k) * p.b_c + c % p.b_c];
          }
        }
        if (p.relu && sum < 0) sum = 0;
        if (!(std::abs(p.y[b * p.width + c] - sum) < 1e-3)) fail("a wrong number");
      }
    }
  }

  if (p.kept == 0) return;  // now with indices that are wrong somewhere
  auto spoil = [&](int32_t& index) {
    const int32_t old = index;
    index = between(0, 1) ? -static_cast<int32_t>(between(1, 1 << 30)) : static_cast<int32_t>(p.kept + p.grid_r()) + 1;
    if (!complaint(p)) fail("a bad product was not refused");
    index = old;
  };
  spoil(rows_memory[between(0, p.kept - 1)]);
  spoil(starts_memory[between(0, p.grid_c())]);
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Kernel> kernels{sa_plus_plus::kernel_baseline};
#if defined(__x86_64__)
  if (sa_plus_plus::best_kernel() != sa_plus_plus::kernel_baseline) kernels.push_back(sa_plus_plus::kernel_avx2);
  if (sa_plus_plus::best_kernel() == sa_plus_plus::kernel_avx512) kernels.push_back(sa_plus_plus::kernel_avx512);
#endif
  const int products = argc > 1 ? std::atoi(argv[1]) : 0;
  if (argc > 2) generator.seed(std::atoi(argv[2]));
  for (int i = 0; i < products; ++i) one(kernels);
  std::printf("%d products\n", products);
}
