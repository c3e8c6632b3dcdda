// Random products, and random attention, through each target that this processor supports, against sums in double, with
// every buffer allocated to its exact size: an address sanitizer then sees any access beyond one. Prints the number of
// products and the targets, or what failed.
//
//     fuzz PRODUCTS [SEED]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "fuzz.h"
#include "targets.h"
#include "validate.h"

using fuzz::between;
using fuzz::fail;
using fuzz::generator;
using sa_plus_plus::Activation;
using sa_plus_plus::Attention;
using sa_plus_plus::Product;
using sa_plus_plus::Target;
using sa_plus_plus::Type;

namespace {

template <class T>
std::unique_ptr<T[]> exactly(const std::vector<T>& values) {  // a vector's memory may be larger than the vector
  auto copy = std::make_unique<T[]>(values.size());
  std::copy(values.begin(), values.end(), copy.get());
  return copy;
}

// Numbers that the type holds exactly, and so small that float holds their sums exactly.
std::vector<double> numbers(int64_t n, Type type, bool with_sign = true) {
  std::vector<double> values(n);
  for (double& value : values) {
    value = type == Type::kByte ? between(with_sign ? -127 : 0, with_sign ? 127 : 255) : between(-64, 64) / 16.0;
  }
  return values;
}

uint16_t half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

float widened(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// The numbers as they are held in memory of exactly their size.
std::unique_ptr<char[]> memory(const std::vector<double>& values, Type type) {
  const int64_t size = sa_plus_plus::size_of(type);
  auto bytes = std::make_unique<char[]>(values.size() * size);
  for (size_t i = 0; i < values.size(); ++i) {
    const float number = values[i];
    const uint16_t narrow = half(number);
    const uint8_t byte = static_cast<int>(values[i]);  // of either sign
    const void* from = type == Type::kFloat      ? static_cast<const void*>(&number)
                       : type == Type::kBfloat16 ? &narrow
                                                 : static_cast<const void*>(&byte);
    std::memcpy(bytes.get() + i * size, from, size);
  }
  return bytes;
}

std::vector<float> floats(const std::vector<double>& values) { return {values.begin(), values.end()}; }

Type any_type() { return std::vector<Type>{Type::kFloat, Type::kBfloat16, Type::kByte}[between(0, 2)]; }

double activated(Activation activation, double x) {
  switch (activation) {
    case Activation::kRelu: return x < 0 ? 0 : x;
    case Activation::kGelu: return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
    case Activation::kGeluTanh: return x * 0.5 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kSilu: return x / (1 + std::exp(-x));
    case Activation::kRelu6: return std::clamp(x, 0.0, 6.0);
    case Activation::kHardSwish: return x * std::clamp(x + 3, 0.0, 6.0) / 6;
    default: return x;
  }
}

// The result for a sum of products, as the type of y holds it, but for the rounding to bytes.
double epilogue(const Product& p, double sum, int64_t row, int64_t column, const std::vector<double>& residual) {
  sum = sum * (p.scale ? p.scale[column] : 1) + (p.bias ? p.bias[column] : 0);
  if (p.residual) sum += (residual[row * p.width + column] - p.residual_zero_point) * p.residual_scale;
  if (p.y_type == Type::kByte) sum = activated(p.activation, sum * p.y_unit) / p.y_unit;
  else sum = activated(p.activation, sum);
  if (p.y_type == Type::kByte) return std::min(std::max(sum + p.y_zero_point, 0.0), 255.0);
  return p.y_type == Type::kBfloat16 ? widened(half(static_cast<float>(sum))) : sum;
}

void one() {
  Product p{};
  p.x_type = any_type(), p.y_type = any_type(), p.residual_type = any_type();
  p.w_type = p.x_type == Type::kFloat && between(0, 1) ? Type::kBfloat16 : p.x_type;
  const int64_t group = p.group();
  p.batch = between(0, 3) ? between(0, 30) : between(30, 60);
  p.b_r = group * between(1, (between(0, 1) ? 8 : 70) / group);
  p.b_c = p.grouped() ? sa_plus_plus::kWide * between(1, 3) : between(1, between(0, 1) ? 8 : 70);
  p.height = p.grouped() ? p.b_r * between(1, 5) : between(1, 5 * p.b_r);
  p.width = between(1, 5 * p.b_c);
  p.run = std::max<int64_t>(1, p.batch), p.stride = p.height, p.runs = 1;
  p.line = std::max<int64_t>(1, p.batch), p.lines = 1;
  int64_t across = p.height, line = 0, size = p.batch * p.height;  // `across` numbers lie together
  if (between(0, 1)) {                                             // a convolution
    const int64_t images = between(1, 2), window_rows = between(1, 3), window_columns = between(1, 3);
    const int64_t down = between(1, 2), right = between(1, 2);
    p.b_r = group * between(1, 20 / group);
    const int64_t channels = p.b_r * between(1, 3);
    p.runs = between(1, 4), p.run = between(1, 16);
    across = window_columns * channels;
    const int64_t high = (p.runs - 1) * down + window_rows;
    line = ((p.run - 1) * right + window_columns) * channels;
    p.height = window_rows * across;
    p.batch = images * p.runs * p.run;
    p.stride = right * channels, p.run_stride = down * line, p.runs_stride = high * line;
    size = images * high * line;
    p.line = p.run, p.lines = p.runs;
    if (between(0, 1)) p.top = between(0, 2), p.bottom = between(0, 2), p.left = between(0, 2), p.right = between(0, 2);
  }
  auto offset = [&](int64_t k) { return k / across * line + k % across; };  // of number k of a row
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < p.grid_r(); ++i) offsets.push_back(offset(i * p.b_r));
  p.activation = static_cast<Activation>(between(0, static_cast<int64_t>(Activation::kCount) - 1));
  p.y_unit = p.y_type == Type::kByte ? std::ldexp(1.0f, between(-8, 0)) : 1;
  const double density = std::vector<double>{0, 0.1, 0.5, 1}[between(0, 3)];
  std::vector<int32_t> rows, starts{0};
  for (int64_t j = 0; j < p.grid_c(); ++j) {
    for (int64_t i = 0; i < p.grid_r(); ++i) {
      if (std::uniform_real_distribution<double>()(generator) < density) rows.push_back(i);
    }
    starts.push_back(rows.size());
  }
  p.kept = rows.size();
  auto x = numbers(size, p.x_type, false), w = numbers(p.kept * p.b_r * p.b_c, p.w_type);
  p.narrow = between(0, 1);
  if (p.narrow && p.w_type == Type::kByte) {
    const double most = sa_plus_plus::kNarrow;
    const bool extreme = between(0, 3) == 0;  // the largest sums of two products
    for (double& number : w) number = extreme ? (between(0, 1) ? most : -most) : std::clamp(number, -most, most);
    if (extreme) std::fill(x.begin(), x.end(), 255);
  }
  const auto residual = numbers(p.batch * p.width, p.residual_type, false);
  auto grouped = w;  // `group` rows of each column together
  for (int64_t i = 0; i < static_cast<int64_t>(w.size()); ++i) {
    const int64_t block = i / (p.b_r * p.b_c), row = i / p.b_c % p.b_r, column = i % p.b_c;
    grouped[block * p.b_r * p.b_c + (row / group * p.b_c + column) * group + row % group] = w[i];
  }
  auto scale = floats(numbers(p.width, Type::kFloat)), bias = floats(numbers(p.width, Type::kFloat));
  for (float& number : scale) number = std::ldexp(1.0f, between(-10, 0));
  const auto x_memory = memory(x, p.x_type), w_memory = memory(grouped, p.w_type);
  const auto residual_memory = memory(residual, p.residual_type);
  const auto scale_memory = exactly(scale), bias_memory = exactly(bias);
  const auto rows_memory = exactly(rows), starts_memory = exactly(starts);
  const auto offsets_memory = exactly(offsets);
  p.down = offsets_memory.get();
  p.x = x_memory.get();
  p.blocks = w_memory.get();
  p.rows = rows_memory.get();
  p.starts = starts_memory.get();
  p.scale = between(0, 1) ? scale_memory.get() : nullptr;
  p.bias = between(0, 1) ? bias_memory.get() : nullptr;
  p.residual = between(0, 1) ? residual_memory.get() : nullptr;
  p.residual_scale = std::ldexp(1.0, between(-6, 0)), p.residual_zero_point = between(0, 128),
  p.y_zero_point = between(0, 128);
  if (const char* why = validate(p)) fail(why);

  const int64_t places = (p.batch + p.line * p.lines - 1) / (p.line * p.lines) * p.y_image();
  const int64_t bytes = sa_plus_plus::size_of(p.y_type);
  for (const Target& target : sa_plus_plus::all_targets()) {
    if (!target.supported || !target.multiplies(p.x_type)) continue;
    const auto y_memory = exactly(std::vector<char>(places * bytes, 0x7f));
    p.y = y_memory.get();
    if (p.residual) p.residual = residual_memory.get();
    if (p.residual && p.residual_type == p.y_type && places == p.batch * p.width && between(0, 1)) {  // in its place
      std::memcpy(p.y, residual_memory.get(), places * bytes);
      p.residual = p.y;
    }
    const int64_t column = between(0, p.grid_c());
    for (int64_t top = 0, bottom; top < p.batch; top = bottom) {
      bottom = std::min(p.batch, top + between(1, sa_plus_plus::kMostRows));
      target.functions->gemm(p, {top, bottom, 0, column});
      target.functions->gemm(p, {top, bottom, column, p.grid_c()});
    }
    int64_t untouched = places * bytes;
    for (int64_t b = 0; b < p.batch; ++b) {
      for (int64_t c = 0; c < p.width; ++c) {
        double sum = 0;
        for (int64_t at = starts[c / p.b_c]; at < starts[c / p.b_c + 1]; ++at) {
          for (int64_t k = 0; k < p.b_r && rows[at] * p.b_r + k < p.height; ++k) {
            sum += x[p.row(b) + offset(rows[at] * p.b_r + k)] * w[(at * p.b_r + k) * p.b_c + c % p.b_c];
          }
        }
        const char* at = y_memory.get() + (p.y_row(b) + c) * bytes;
        double got;
        if (p.y_type == Type::kByte) got = static_cast<uint8_t>(*at);
        if (p.y_type == Type::kBfloat16) got = widened(*reinterpret_cast<const uint16_t*>(at));
        if (p.y_type == Type::kFloat) got = *reinterpret_cast<const float*>(at);
        const double want = epilogue(p, sum, b, c, residual);
        // A byte is the nearest to the sum as float holds it, which next to a tie may lie on the other side.
        double most = p.y_type == Type::kByte ? 0.5 + 1e-4 : 1e-6 * std::abs(want);
        if (p.activation > Activation::kRelu) {  // not exact: so the last digit of a bfloat16 may differ too
          most += p.y_type == Type::kByte
                      ? 1e-3
                      : 1e-6 + (p.y_type == Type::kBfloat16 ? std::ldexp(1.0, -7) : 4e-6) * std::abs(want);
        }
        if (!(std::abs(got - want) <= most)) {
          std::printf("%s: %.9g, not %.9g\n", target.name, got, want);
          fail("a wrong number");
        }
        untouched -= bytes;
      }
    }
    for (int64_t i = 0; i < places * bytes; ++i) untouched -= y_memory[i] == 0x7f;
    if (untouched > 0) fail("a border was written to");
  }

  if (p.kept == 0) return;  // now with indices that are wrong somewhere
  auto spoil = [&](int32_t& index) {
    const int32_t old = index;
    index = between(0, 1) ? -static_cast<int32_t>(between(1, 1 << 30)) : static_cast<int32_t>(p.kept + p.grid_r()) + 1;
    if (!validate(p)) fail("a bad product was not refused");
    index = old;
  };
  spoil(rows_memory[between(0, p.kept - 1)]);
  spoil(starts_memory[between(0, p.grid_c())]);
}

// An array of `rows` by `last` numbers for each head, its axes in any order but the last, the same along some of the
// first `repeatable` axes; returns how many numbers.
int64_t placed(const Attention& a, int64_t rows, int64_t last, int64_t repeatable, Attention::Place* place) {
  int64_t* strides[] = {&place->head[0], &place->head[1], &place->head[2], &place->row};
  int64_t sizes[] = {a.heads[0], a.heads[1], a.heads[2], rows}, order[] = {0, 1, 2, 3}, size = last;
  std::shuffle(order, order + 4, generator);
  for (int64_t axis : order) {
    const bool repeated = axis < repeatable && between(0, 2) == 0;
    *strides[axis] = repeated ? 0 : size;
    if (!repeated) size *= sizes[axis];
  }
  return size;
}

void attend_one() {
  Attention a{};
  a.type = between(0, 1) ? Type::kFloat : Type::kBfloat16;
  for (int64_t& heads : a.heads) heads = between(1, 3);
  auto any = [&] { return between(0, 1) ? between(1, 9) : between(1, 80); };
  a.queries = any(), a.keys = any(), a.depth = any(), a.width = any();
  a.scale = std::ldexp(1.0f, between(-8, 0));
  a.seen = between(0, 1) ? a.keys : between(1, a.keys);
  int64_t sizes[] = {placed(a, a.queries, a.depth, 4, &a.q_at), placed(a, a.keys, a.depth, 3, &a.k_at),
                     placed(a, a.keys, a.width, 3, &a.v_at), placed(a, a.queries, a.keys, 4, &a.bias_at),
                     placed(a, a.queries, a.width, 0, &a.y_at)};
  const auto q = numbers(sizes[0], a.type), k = numbers(sizes[1], a.type), v = numbers(sizes[2], a.type);
  auto bias = numbers(sizes[3], Type::kFloat);
  for (double& number : bias) number = between(0, 3) ? number : -1e9;
  const auto q_memory = memory(q, a.type), k_memory = memory(k, a.type), v_memory = memory(v, a.type);
  const auto bias_memory = exactly(floats(bias));
  a.q = q_memory.get(), a.k = k_memory.get(), a.v = v_memory.get();
  a.bias = between(0, 1) ? bias_memory.get() : nullptr;
  if (const char* why = validate(a, sizes)) fail(why);
  for (const Target& target : sa_plus_plus::all_targets()) {
    const auto attention = target.functions->attention;
    if (!target.supported || !attention) continue;
    const auto y_memory = exactly(std::vector<char>(sizes[4] * sa_plus_plus::size_of(a.type), 0x7f));
    const auto scratch = exactly(std::vector<float>(sa_plus_plus::scratch_of(a)));
    a.y = y_memory.get();
    for (int64_t head = 0; head < a.all_heads(); ++head) {
      const int64_t middle = between(0, a.queries);
      attention(a, head, 0, middle, scratch.get(), false);
      attention(a, head, middle, a.queries, scratch.get(), true);
      for (int64_t i = 0; i < a.queries; ++i) {
        std::vector<double> shares(a.keys), sums(a.width);
        double largest = -INFINITY, total = 0;
        const int64_t seen = std::min(a.keys, a.seen + i);
        for (int64_t j = 0; j < seen; ++j) {
          for (int64_t d = 0; d < a.depth; ++d) {
            shares[j] += q[a.start(a.q_at, head) + i * a.q_at.row + d] * k[a.start(a.k_at, head) + j * a.k_at.row + d];
          }
          shares[j] *= a.scale;
          if (a.bias) shares[j] += bias[a.start(a.bias_at, head) + i * a.bias_at.row + j];
          largest = std::max(largest, shares[j]);
        }
        for (int64_t j = 0; j < seen; ++j) {
          total += shares[j] = std::exp(shares[j] - largest);
          for (int64_t c = 0; c < a.width; ++c) sums[c] += shares[j] * v[a.start(a.v_at, head) + j * a.v_at.row + c];
        }
        for (int64_t c = 0; c < a.width; ++c) {
          const int64_t at = a.start(a.y_at, head) + i * a.y_at.row + c;
          const double want = sums[c] / total;
          const double got = a.type == Type::kFloat ? reinterpret_cast<const float*>(y_memory.get())[at]
                                                    : widened(reinterpret_cast<const uint16_t*>(y_memory.get())[at]);
          // Where all keys are masked, what is left of the scores beside the mask is rounded to 64.
          const bool masked = largest < -1e8;
          if (!masked && !(std::abs(got - want) <=
                           2e-5 + (a.type == Type::kBfloat16 ? std::ldexp(1.0, -7) : 0) * std::abs(want))) {
            std::printf("attention, %s: %.9g, not %.9g\n", target.name, got, want);
            fail("a wrong number");
          }
        }
      }
    }
  }
  const int64_t number = between(0, 4);  // now with an array that is too small
  --sizes[number];
  if (!validate(a, sizes) && (number != 3 || a.bias)) fail("attention on too small an array was not refused");
}

}  // namespace

int main(int argc, char** argv) {
  const int products = argc > 1 ? std::atoi(argv[1]) : 0;
  if (argc > 2) generator.state = std::atoll(argv[2]);
  for (int i = 0; i < products; ++i) i % 8 ? one() : attend_one();
  std::printf("%d products in", products);
  for (const Target& target : sa_plus_plus::all_targets()) {
    if (target.supported) std::printf(" %s", target.name);
  }
  std::printf("\n");
}
