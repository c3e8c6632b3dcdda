// Calls as a forged file could make them: attributes drawn from the whole of int64, arrays without numbers that claim
// any size. All go through the checks; what these accept is run, with every buffer allocated to its exact size, so that
// an address sanitizer sees any access beyond one, and twice over different contents of the result, which must become
// equal: so all of it is written. Prints by kind how many calls were checked, how many of them accepted, and how many
// of those had a result that is not empty.
//
//     calls_fuzz CALLS [FIRST]
//
// Call number i depends on nothing but i: `calls_fuzz 1 i` repeats it.
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "run.h"
#include "sequence.h"
#include "thread_pool.h"

// So that every failure of a sanitizer ends in a signal.
extern "C" const char* __asan_default_options() { return "abort_on_error=1"; }
extern "C" const char* __ubsan_default_options() { return "abort_on_error=1"; }

using fuzz::between;
using fuzz::fail;
using fuzz::one_in;
using namespace sa_plus_plus;

namespace {

long long number;  // of the call

enum Outcome { kRefused, kEmpty, kComputed };

void tell(int signal) {
  std::printf("%sin call %lld\n", signal == SIGALRM ? "no end " : "", number);
  std::fflush(stdout);
  std::_Exit(1);
}

constexpr int64_t kMostNumbers = 1 << 12;  // in an array

// Any 64 bits, most often where arithmetic goes wrong: near powers of two, near what is real, near the quotient of a
// limit and what is real.
int64_t wild(int64_t real) {
  const int64_t few = between(-2, 2);
  const uint64_t power = uint64_t{1} << between(0, 63), limit = uint64_t{1} << between(29, 63);
  uint64_t bits;
  switch (between(0, 6)) {
    case 0: return few;
    case 1: bits = static_cast<uint64_t>(real) + few; break;
    case 2: bits = power + few; break;
    case 3: bits = -power + few; break;
    case 4: bits = limit / std::max<int64_t>(1, real) + few; break;
    case 5: bits = limit / between(1, 64) + few; break;
    default: bits = fuzz::generator();
  }
  return static_cast<int64_t>(bits);
}

float wild_float() {
  const float numbers[] = {0, 1, -1, 127.5, 255, 255.5, 256, -0.25, 1e30, -1e30, INFINITY, -INFINITY, NAN};
  return numbers[between(0, 12)];
}

Type any_type() { return static_cast<Type>(between(0, 2)); }

// Numbers that every type holds exactly, in memory of exactly their size.
std::unique_ptr<char[]> memory(Type type, int64_t count) {
  auto bytes = std::make_unique<char[]>(count * size_of(type));
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t byte = fuzz::generator() & 7;
    const float value = byte;
    if (type == Type::kByte) bytes[i] = byte;
    else
      std::memcpy(&bytes[i * size_of(type)], reinterpret_cast<const char*>(&value) + 4 - size_of(type), size_of(type));
  }
  return bytes;
}

float value(const Array& array, int64_t at) {
  const char* from = static_cast<const char*>(array.data) + at * size_of(array.type);
  if (array.type == Type::kByte) return static_cast<uint8_t>(*from);
  float value = 0;
  std::memcpy(reinterpret_cast<char*>(&value) + 4 - size_of(array.type), from, size_of(array.type));
  return value;
}

// An array with its sizes and memory.
struct Held {
  Array array;
  std::vector<int64_t> sizes;
  std::unique_ptr<char[]> bytes;

  Held(Type type, std::vector<int64_t> sizes) : array{type, nullptr, 0, nullptr}, sizes(std::move(sizes)) {}

  // Another size, which may be out of all proportion if the array then has no numbers.
  void spoil() {
    if (sizes.empty()) return;
    int64_t& size = sizes[between(0, sizes.size() - 1)];
    size = std::max<int64_t>(0, wild(size) & INT64_MAX);
    if (count() <= kMostNumbers) return;
    sizes[between(0, sizes.size() - 1)] = 0;
    if (one_in(2)) sizes[between(0, sizes.size() - 1)] = wild(1) & INT64_MAX;
    if (count() > kMostNumbers) sizes[0] = 0;
  }

  int64_t count() {
    array.rank = sizes.size(), array.sizes = sizes.data();
    return array.count();
  }

  Array& made() {
    bytes = memory(array.type, count());
    array.data = bytes.get();
    return array;
  }
};

template <class Number>
struct Listed {
  std::vector<Number> numbers;
  std::unique_ptr<Number[]> exact;

  List<Number> made() {
    exact = std::make_unique<Number[]>(numbers.size());
    std::copy(numbers.begin(), numbers.end(), exact.get());
    return {exact.get(), static_cast<int64_t>(numbers.size())};
  }
};

// Runs twice, over different contents of y.
template <class Run>
void run_twice(const Array& y, Run run) {
  const int64_t size = y.count() * size_of(y.type);
  std::memset(y.data, 0x55, size);
  run();
  std::vector<char> first(static_cast<char*>(y.data), static_cast<char*>(y.data) + size);
  std::memset(y.data, 0xaa, size);
  run();
  if (size && std::memcmp(first.data(), y.data, size)) fail("not all of the result is written");
}

void same(double got, double want, const char* what) {
  if (got == want) return;
  std::printf("%s: %g, not %g\n", what, got, want);
  fail("a wrong number");
}

template <class Options>
void spoil(Options& options, int64_t integers) {  // one of the integers that it begins with
  int64_t* const at = reinterpret_cast<int64_t*>(&options) + between(0, integers - 1);
  *at = wild(*at);
}

// Sums of products by the definition of a convolution, for results that are these alone.
void check_sums(const ConvolutionArrays& a, const ConvolutionOptions& o, const Product& p) {
  if (!p.batch) return;
  const int64_t *in = a.x.sizes, *out = a.y.sizes, group = p.group(), across = o.window_columns * in[3];
  for (int64_t i = 0; i < p.batch; ++i) {
    const int64_t image = i / (p.lines * p.line), row = i / p.line % p.lines, column = i % p.line;
    for (int64_t c = 0; c < p.width; ++c) {
      double sum = 0;
      for (int64_t at = p.starts[c / p.b_c]; at < p.starts[c / p.b_c + 1]; ++at) {
        for (int64_t r = 0; r < p.b_r && p.rows[at] * p.b_r + r < p.height; ++r) {
          const int64_t k = p.rows[at] * p.b_r + r;
          const int64_t down = row * o.stride_down + k / across, right = column * o.stride_across + k % across / in[3];
          const int64_t from = ((image * in[1] + down) * in[2] + right) * in[3] + k % in[3];
          sum += value(a.x, from) *
                 value(a.blocks, ((at * p.b_r / group + r / group) * p.b_c + c % p.b_c) * group + r % group);
        }
      }
      same(value(a.y, ((image * out[1] + o.top + row) * out[2] + o.left + column) * out[3] + c), sum, "a convolution");
    }
  }
}

// One of those that this processor supports, for all of these types of x.
const Functions& any_target(int types) {
  std::vector<const Functions*> able;
  for (const Target& target : all_targets()) {
    if (target.supported && (target.types & types) == types) able.push_back(target.functions);
  }
  return *able[between(0, able.size() - 1)];
}

Outcome convolve() {
  const Type type = any_type();
  const int64_t group = type == Type::kFloat ? 1 : type == Type::kBfloat16 ? 2 : 4;
  ConvolutionOptions o{between(1, 3), between(1, 3), between(1, 2), between(1, 2), 0, 0, 0, 0, 0, 1, 0, 0, 1};
  if (one_in(2)) o.window_rows = o.window_columns = o.stride_down = o.stride_across = 1;
  if (one_in(2)) o.top = between(0, 2), o.bottom = between(0, 2), o.left = between(0, 2), o.right = between(0, 2);
  const bool plain = one_in(2);
  if (!plain) {
    o.activation = between(0, static_cast<int64_t>(Activation::kCount) - 1);
    o.y_zero_point = between(0, 255), o.y_unit = 0.5, o.residual_scale = 2, o.residual_zero_point = 3;
  }
  o.narrow = one_in(2);  // all numbers are
  const int64_t images = between(0, 2), lines = between(0, 4), line = between(0, one_in(4) ? 40 : 6),
                width = between(0, 40);
  const int64_t channels = one_in(20) ? 0 : group * between(1, 6);
  Held x(type, {images, std::max<int64_t>(0, lines - 1) * o.stride_down + o.window_rows + between(0, 1),
                std::max<int64_t>(0, line - 1) * o.stride_across + o.window_columns + between(0, 1), channels});
  Held y(plain ? Type::kFloat : any_type(), {images, o.top + lines + o.bottom, o.left + line + o.right, width});
  int64_t b_r = group * between(1, 6);
  while (channels && (o.window_columns * channels) % b_r && (type != Type::kFloat || o.window_rows > 1)) b_r -= group;
  const int64_t b_c = type == Type::kFloat ? between(1, 40) : kWide * between(1, 2);
  const int64_t grid_r = (o.window_rows * o.window_columns * channels + b_r - 1) / b_r,
                grid_c = (width + b_c - 1) / b_c;
  Listed<int32_t> rows, starts{{0}, {}};
  const int64_t rare = between(1, 4);
  for (int64_t j = 0; j < grid_c; ++j) {
    for (int64_t i = 0; i < grid_r; ++i) {
      if (one_in(rare)) rows.numbers.push_back(i);
    }
    starts.numbers.push_back(rows.numbers.size());
  }
  const int64_t kept = rows.numbers.size();
  Held blocks(type == Type::kFloat && one_in(3) ? Type::kBfloat16 : type, {kept, b_r, b_c});
  if (type != Type::kFloat) blocks.sizes = {kept, b_r / group, b_c, group};
  Listed<float> scale, bias;
  Held residual(any_type(), {0});
  if (!plain && one_in(2)) scale.numbers.resize(width, 0.5f);
  if (!plain && one_in(2)) bias.numbers.resize(width, 1.0f);
  if (!plain && one_in(2)) residual.sizes = {images, lines, line, width};

  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 9)) {
      case 0: x.spoil(); break;
      case 1: y.spoil(); break;
      case 2: blocks.spoil(); break;
      case 3: residual.spoil(); break;
      case 4: (one_in(2) ? rows : starts).numbers.resize(between(0, 4), between(0, 3)); break;
      case 5: (one_in(2) ? scale : bias).numbers.resize(between(0, 41)); break;
      case 6: {
        std::vector<int32_t>& list = (one_in(2) ? rows : starts).numbers;
        if (!list.empty()) list[between(0, list.size() - 1)] = wild(kept);
        break;
      }
      case 7: (one_in(2) ? o.y_zero_point : one_in(2) ? o.y_unit : o.residual_zero_point) = wild_float(); break;
      case 8: (one_in(2) ? x : blocks).array.type = any_type(); break;
      default: spoil(o, 9);
    }
  }
  const ConvolutionArrays arrays{x.made(),     blocks.made(), rows.made(),     starts.made(),
                                 scale.made(), bias.made(),   residual.made(), y.made()};
  Convolution prepared;
  if (prepare(arrays, o, &prepared)) return kRefused;
  const Functions& functions = any_target(bit(x.array.type));
  const int64_t threads = between(1, 4);
  run_twice(arrays.y, [&] { run(prepared, threads, functions); });
  const Product& p = prepared.product;
  const bool alone = !p.scale && !p.bias && !p.residual && p.activation == Activation::kNone;
  if (alone && p.y_type == Type::kFloat) check_sums(arrays, o, p);
  return y.count() ? kComputed : kEmpty;
}

// The sums of a depthwise convolution, by its definition.
void check_depthwise(const DepthwiseArrays& a, const DepthwiseOptions& o) {
  const int64_t *in = a.x.sizes, *out = a.y.sizes, *window = a.kernel.sizes;
  int64_t at = 0;
  for (int64_t n = 0; n < out[0]; ++n) {
    for (int64_t i = 0; i < out[1]; ++i) {
      for (int64_t j = 0; j < out[2]; ++j) {
        for (int64_t c = 0; c < out[3]; ++c, ++at) {
          double want = (a.bias.count ? a.bias.data[c] : 0) + (a.residual.count() ? value(a.residual, at) : 0);
          for (int64_t r = 0; a.x.count() && r < window[0]; ++r) {
            for (int64_t s = 0; s < window[1]; ++s) {
              const __int128 down =
                  static_cast<__int128>(i) * o.stride_down + static_cast<__int128>(r) * o.dilation_down - o.top;
              const __int128 right =
                  static_cast<__int128>(j) * o.stride_across + static_cast<__int128>(s) * o.dilation_across - o.left;
              if (down < 0 || right < 0 || down >= in[1] || right >= in[2]) continue;
              const int64_t row = static_cast<int64_t>(down), column = static_cast<int64_t>(right),
                            channel = c / (out[3] / in[3]);
              want += value(a.x, ((n * in[1] + row) * in[2] + column) * in[3] + channel) *
                      value(a.kernel, (r * window[1] + s) * out[3] + c);
            }
          }
          if (static_cast<Activation>(o.activation) == Activation::kRelu6) want = std::clamp(want, 0.0, 6.0);
          same(value(a.y, at), want, "a depthwise convolution");
        }
      }
    }
  }
}

Outcome convolve_each() {
  DepthwiseOptions o{between(1, 3), between(1, 3), between(1, 3), between(1, 3), between(0, 3), between(0, 3), 0};
  o.activation = one_in(2) ? 0 : between(0, static_cast<int64_t>(Activation::kCount) - 1);
  const int64_t channels = one_in(3) ? between(16, 70) : between(1, 20),
                width = channels * (one_in(3) ? between(1, 3) : 1);
  Held x(Type::kFloat, {between(0, 2), between(0, 6), between(0, 12), channels});
  Held kernel(Type::kFloat, {between(1, 3), between(1, 4), width}), residual(Type::kFloat, {0});
  Held y(Type::kFloat, {x.sizes[0], between(0, 4), between(0, one_in(3) ? 12 : 4), width});
  if (y.count() > kMostNumbers) y.sizes[1] = 1;
  Listed<float> bias;
  if (one_in(2)) bias.numbers.resize(width, 1.0f);
  if (one_in(3)) residual.sizes = y.sizes;
  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 7)) {
      case 0: x.spoil(); break;
      case 1: y.spoil(); break;
      case 2: kernel.spoil(); break;
      case 3: residual.spoil(); break;
      case 4: bias.numbers.resize(between(0, 41)); break;
      case 5: (one_in(2) ? x : kernel).array.type = any_type(); break;
      default: spoil(o, 7);
    }
  }
  const DepthwiseArrays arrays{x.made(), kernel.made(), bias.made(), residual.made(), y.made()};
  Depthwise prepared;
  if (prepare(arrays, o, &prepared)) return kRefused;
  const Functions& functions = any_target(kAll);
  const int64_t threads = between(1, 4);
  run_twice(arrays.y, [&] { run(prepared, threads, functions); });
  const auto activation = static_cast<Activation>(o.activation);
  const bool exact = activation == Activation::kNone || activation == Activation::kRelu6;
  if (exact && y.count()) check_depthwise(arrays, o);
  return y.count() ? kComputed : kEmpty;
}

void check_pooled(const Array& x, const Array& y, const Pooling& p, const Windows& w) {
  const int64_t* out = y.sizes;
  int64_t at = 0;
  for (int64_t n = 0; n < out[0]; ++n) {
    for (int64_t i = 0; i < out[1]; ++i) {
      for (int64_t j = 0; j < out[2]; ++j) {
        for (int64_t c = 0; c < out[3]; ++c, ++at) {
          double want = p.sums || p.type == Type::kByte ? 0 : -INFINITY;
          for (int64_t r = 0; r < p.rows; ++r) {
            for (int64_t s = 0; s < p.columns; ++s) {
              const __int128 down = r + static_cast<__int128>(w.top) - static_cast<__int128>(i) * w.stride_down;
              const __int128 right = s + static_cast<__int128>(w.left) - static_cast<__int128>(j) * w.stride_across;
              if (down < 0 || right < 0 || down >= w.window_rows || right >= w.window_columns) continue;
              const double number = value(x, ((n * p.rows + r) * p.columns + s) * out[3] + c);
              want = p.sums ? want + number : std::max(want, number);
            }
          }
          same(value(y, at), want, "pooling");
        }
      }
    }
  }
}

Outcome pool() {
  Windows w{between(1, 3), between(1, 3), between(1, 2), between(1, 2), between(0, 2), between(0, 2)};
  const bool sums = one_in(3);
  const Type type = sums ? Type::kFloat : any_type();
  const int64_t images = between(0, 2), channels = one_in(4) ? between(60, 150) : between(0, 20);
  Held x(type, {images, between(0, 5), between(0, 5), channels}),
      y(type, {images, between(0, 4), between(0, 4), channels});
  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 5)) {
      case 0: x.spoil(); break;
      case 1: y.spoil(); break;
      case 2: {
        const int64_t axis = one_in(2) ? 0 : 3;
        x.spoil(), y.sizes[axis] = x.sizes[axis];
        if (y.count() > kMostNumbers) y.sizes[1] = 0;
        break;
      }
      default: spoil(w, 6);
    }
  }
  Pooling prepared;
  x.made(), y.made();
  if (prepare(x.array, y.array, w, sums, &prepared)) return kRefused;
  const Functions& functions = any_target(kAll);
  const int64_t threads = between(1, 4);
  run_twice(y.array, [&] { run(prepared, threads, functions); });
  if (y.count()) check_pooled(x.array, y.array, prepared, w);
  return y.count() ? kComputed : kEmpty;
}

void check_rounded(const Array& x, const Array& y, const Rounding& r) {
  const int64_t *in = x.sizes, *out = y.sizes;
  int64_t at = 0;
  for (int64_t n = 0; n < out[0]; ++n) {
    for (int64_t i = 0; i < out[1]; ++i) {
      for (int64_t j = 0; j < out[2]; ++j) {
        for (int64_t c = 0; c < out[3]; ++c, ++at) {
          const int64_t row = i - r.top, column = j - r.left;
          const bool inside = row >= 0 && row < in[1] && column >= 0 && column < in[2] && c < in[3];
          double want = inside ? value(x, ((n * in[1] + row) * in[2] + column) * in[3] + c) : 0;
          if (y.type == Type::kByte) {
            want = inside ? std::nearbyint(std::clamp(want * r.scale + r.zero_point, 0.0, 255.0))
                          : static_cast<int>(r.zero_point);
          }
          same(value(y, at), want, "rounding");
        }
      }
    }
  }
}

Outcome round_some() {
  Rounding r{0, 0, 1, 0};
  const Type type = any_type();
  if (type == Type::kByte) r.scale = std::ldexp(1.0f, between(-3, 6)), r.zero_point = between(0, 255);
  if (one_in(2)) r.top = between(0, 2), r.left = between(0, 2);
  const bool colours = one_in(4);  // which have a path of their own, with many columns and one more channel
  const int64_t images = between(0, 2), rows = between(0, 4), columns = between(0, colours ? 40 : 4);
  const int64_t channels = colours ? 3 : between(0, 20), more = colours ? 1 : one_in(2) ? 0 : between(0, 3);
  Held x(Type::kFloat, {images, rows, columns, channels});
  Held y(type, {images, r.top + rows + more, r.left + columns + more, channels + (one_in(2) ? more : 0)});
  bool finite = true;
  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 4)) {
      case 0: x.spoil(); break;
      case 1: y.spoil(); break;
      case 2: (one_in(2) ? r.scale : r.zero_point) = wild_float(), finite = false; break;
      default: spoil(r, 2);
    }
  }
  Images prepared;
  x.made(), y.made();
  if (prepare(x.array, y.array, r, &prepared)) return kRefused;
  const Functions& functions = any_target(kAll);
  const int64_t threads = between(1, 4);
  run_twice(y.array, [&] { run(prepared, threads, functions); });
  if (finite && y.count()) check_rounded(x.array, y.array, r);
  return y.count() ? kComputed : kEmpty;
}

Outcome look_some_up() {
  std::vector<int64_t> sizes(between(0, 3));
  for (int64_t& size : sizes) size = between(0, 6);
  sizes.push_back(between(0, 20));
  const int64_t columns = sizes.back();
  const Type type = any_type();
  Held x(type, sizes);
  Listed<int32_t> places;
  places.numbers.resize(columns ? between(0, 30) : 0);
  for (int32_t& place : places.numbers) place = between(0, columns - 1);
  sizes.back() = places.numbers.size();
  Held y(type, sizes);
  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 4)) {
      case 0: x.spoil(); break;
      case 1: y.spoil(); break;
      case 2: x.spoil(), y.sizes = x.sizes, y.sizes.back() = places.numbers.size(); break;
      case 3: places.numbers.resize(between(0, 30), static_cast<int32_t>(wild(columns))); break;
      default: (one_in(2) ? x : y).array.type = any_type();
    }
    if (y.count() > kMostNumbers) y.sizes[0] = 0;
  }
  const List<int32_t> list = places.made();
  Lookup prepared;
  x.made(), y.made();
  if (prepare(x.array, list, y.array, &prepared)) return kRefused;
  const Functions& functions = any_target(kAll);
  const int64_t threads = between(1, 4);
  run_twice(y.array, [&] { run(prepared, threads, functions); });
  for (int64_t i = 0; i < y.count(); ++i) {
    const int64_t row = i / list.count, place = list.data[i % list.count];
    same(value(y.array, i), value(x.array, row * x.sizes.back() + place), "lookup");
  }
  return y.count() ? kComputed : kEmpty;
}

// A normalisation by its definition, as far as the type of y holds it.
void check_normalized(const NormalizationArrays& a, const NormalizationOptions& o) {
  const int64_t columns = a.x.sizes[a.x.rank - 1], count = a.y.count();
  for (int64_t first = 0; first < count; first += columns) {
    double mean = 0, variance = 0;
    for (int64_t k = 0; o.centred && k < columns; ++k) mean += value(a.x, first + k) / columns;
    for (int64_t k = 0; k < columns; ++k) variance += std::pow(value(a.x, first + k) - mean, 2) / columns;
    for (int64_t k = 0; k < columns; ++k) {
      double want =
          (value(a.x, first + k) - mean) / std::sqrt(variance + o.epsilon) * a.scale.data[k] + a.shift.data[k];
      double most = 1e-4;
      if (a.y.type == Type::kBfloat16) most += std::ldexp(std::abs(want), -8);
      if (a.y.type == Type::kByte) want = std::clamp(want * o.factor + o.zero_point, 0.0, 255.0), most = 0.51;
      if (!(std::abs(value(a.y, first + k) - want) <= most)) fail("a wrong number of a normalisation");
    }
  }
}

Outcome normalize() {
  NormalizationOptions o{between(0, 1), std::ldexp(1.0f, between(-10, 1)), 1, 0};
  std::vector<int64_t> sizes(between(0, 3));
  for (int64_t& size : sizes) size = between(0, 4);
  sizes.push_back(one_in(4) ? between(60, 150) : between(0, 40));
  const Type type = any_type();
  Held x(one_in(2) ? Type::kFloat : Type::kBfloat16, sizes), y(type, sizes);
  if (type == Type::kByte) o.factor = between(1, 32), o.zero_point = between(0, 255);
  Listed<float> scale{std::vector<float>(sizes.back(), 0.5f), {}}, shift{std::vector<float>(sizes.back(), 2.0f), {}};
  bool plain = true;
  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 6)) {
      case 0: x.spoil(); break;
      case 1: y.spoil(); break;
      case 2: x.spoil(), y.sizes = x.sizes; break;
      case 3: (one_in(2) ? scale : shift).numbers.resize(between(0, 41), 1.0f); break;
      case 4: (one_in(2) ? x : y).array.type = any_type(), plain = false; break;
      case 5: (one_in(3) ? o.epsilon : one_in(2) ? o.factor : o.zero_point) = wild_float(), plain = false; break;
      default: spoil(o, 1);
    }
  }
  const NormalizationArrays arrays{x.made(), scale.made(), shift.made(), y.made()};
  Normalization prepared;
  if (prepare(arrays, o, &prepared)) return kRefused;
  const Functions& functions = any_target(kAll);
  const int64_t threads = between(1, 4);
  run_twice(arrays.y, [&] { run(prepared, threads, functions); });
  if (plain && y.count()) check_normalized(arrays, o);
  return y.count() ? kComputed : kEmpty;
}

Outcome attend() {
  const Type type = one_in(20) ? Type::kByte : one_in(2) ? Type::kFloat : Type::kBfloat16;
  std::vector<int64_t> sizes{between(1, 3), between(1, 2), between(1, 2), between(1, 9),
                             between(1, 9), between(1, 9), between(1, 9), 1};
  sizes[7] = between(1, sizes[4]);
  std::vector<int64_t> strides(20);
  const int64_t rows[] = {sizes[3], sizes[4], sizes[4], sizes[3], sizes[3]};
  const int64_t lasts[] = {sizes[5], sizes[5], sizes[6], sizes[4], sizes[6]};
  std::vector<Held> held;
  const bool biased = one_in(2);
  for (int64_t i = 0; i < 5; ++i) {  // axes in any order, and the same along some of them
    int64_t order[] = {0, 1, 2, 3}, size = lasts[i];
    std::shuffle(order, order + 4, fuzz::generator);
    for (int64_t axis : order) {
      const int64_t length = axis < 3 ? sizes[axis] : rows[i];
      if (length == 1 || (i < 4 && (axis < 3 || i == 3) && one_in(3))) continue;
      strides[4 * i + axis] = size, size *= length;
    }
    if (i == 3 && !biased) size = 0;
    held.emplace_back(i == 3 ? Type::kFloat : type, std::vector<int64_t>{size});
  }
  for (int64_t i = between(0, 3); i > 0; --i) {
    switch (between(0, 9)) {
      case 0: held[between(0, 4)].spoil(); break;
      case 1: (one_in(2) ? sizes : strides).resize(between(0, 21), 1); break;
      case 2:
      case 3:
      case 4:
        if (sizes.empty()) break;
        else sizes[between(0, sizes.size() - 1)] = wild(lasts[between(0, 4)]);
        break;
      default:
        if (strides.empty()) break;
        else strides[between(0, strides.size() - 1)] = wild(held[between(0, 4)].count());
    }
  }
  Listed<int64_t> lengths{sizes, {}}, steps{strides, {}};
  const AttentionArrays arrays{held[0].made(), held[1].made(), held[2].made(), held[3].made(), held[4].made()};
  Attention prepared;
  if (prepare(arrays, lengths.made(), steps.made(), 0.25f, &prepared)) return kRefused;
  const Functions& functions = any_target(kAll);
  const int64_t threads = between(1, 4);
  run_twice(arrays.y, [&] {
    if (!run(prepared, threads, functions)) fail("attention that fits its arrays needs too much memory");
  });
  return kComputed;
}

// A step on a matrix, by itself; what `in_sequence` computes at once.
void alone(Step kind, const std::vector<float>& x, std::vector<float>& y, int64_t columns,
           const std::vector<float>& vector, const std::vector<float>& block, List<int32_t> places) {
  const int64_t rows = x.size() / columns, image[] = {1, 1, rows, columns}, shape[] = {1, columns, columns};
  auto array = [](const std::vector<float>& from, int64_t rank, const int64_t* sizes) {
    return Array{Type::kFloat, const_cast<float*>(from.data()), rank, sizes};
  };
  const Array in = array(x, 4, image), out = array(y, 4, image);
  const List<float> numbers{vector.data(), columns};
  const int64_t zero[] = {0};
  const char* why = nullptr;
  if (kind == Step::kConvolution) {
    const int32_t positions[] = {0, 0, 1};
    const Array residual{Type::kFloat, nullptr, 1, zero};
    const ConvolutionArrays arrays{
        in, array(block, 3, shape), {positions, 1}, {positions + 1, 2}, {}, numbers, residual, out};
    Convolution prepared;
    why = prepare(arrays, {1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1}, &prepared);
    if (!why) run(prepared, 1, *target_for(Type::kFloat).functions);
  } else if (kind == Step::kNormalization) {
    Normalization prepared;
    why = prepare(NormalizationArrays{in, numbers, numbers, out}, {1, 1, 1, 0}, &prepared);
    if (!why) run(prepared, 1, *target_for_all().functions);
  } else if (kind == Step::kMaxPooling) {
    Pooling prepared;
    why = prepare(in, out, {1, 2, 1, 1, 0, 1}, false, &prepared);
    if (!why) run(prepared, 1, *target_for_all().functions);
  } else if (kind == Step::kLookup) {
    Lookup prepared;
    why = prepare(in, places, out, &prepared);
    if (!why) run(prepared, 1, *target_for_all().functions);
  } else {
    Images prepared;
    why = prepare(in, out, Rounding{0, 0, 1, 0}, &prepared);
    if (!why) run(prepared, 1, *target_for_all().functions);
  }
  if (why) fail(why);
}

Outcome in_sequence() {
  const int64_t rows = between(1, 5), columns = between(1, 20), size = rows * columns, bytes = size * sizeof(float);
  auto drawn = [](int64_t count) {
    std::vector<float> numbers(count);
    for (float& each : numbers) each = between(-8, 8);
    return numbers;
  };
  const std::vector<float> x = drawn(size), vector = drawn(columns), block = drawn(columns * columns);
  const std::vector<int32_t> positions{0, 0, 1};  // of the one block
  std::vector<int32_t> looked(columns);
  for (int32_t& place : looked) place = between(0, columns - 1);
  const List<int32_t> places{looked.data(), columns};
  std::vector<std::unique_ptr<char[]>> held;
  std::vector<Buffer> buffers;
  auto buffer = [&](const void* from, int64_t count) {  // of exactly its size
    held.push_back(std::make_unique<char[]>(count));
    if (from) std::memcpy(held.back().get(), from, count);
    buffers.push_back({held.back().get(), count});
  };
  buffer(x.data(), bytes), buffer(vector.data(), columns * sizeof(float));
  buffer(block.data(), block.size() * sizeof(float)), buffer(positions.data(), sizeof(int32_t) * 3);
  buffer(looked.data(), sizeof(int32_t) * columns), buffer(nullptr, bytes), buffer(nullptr, 2 * bytes);

  std::vector<int64_t> program;
  auto put = [&](std::initializer_list<int64_t> numbers) { program.insert(program.end(), numbers); };
  constexpr int64_t one = 0x3f800000;  // 1.0f
  std::vector<float> now = x, next(size);
  int64_t at[] = {0, 0};  // where the value is: buffer and offset
  const int64_t steps = between(1, 5);
  bool reads = false;  // positions
  for (int64_t i = 0; i < steps; ++i) {
    const Step kinds[] = {Step::kConvolution, Step::kNormalization, Step::kMaxPooling, Step::kRounding, Step::kLookup};
    const Step kind = kinds[between(0, 4)];
    const bool last = i + 1 == steps;
    reads |= kind == Step::kConvolution || kind == Step::kLookup;
    const int64_t to[] = {last ? 5 : 6, last ? 0 : i % 2 * bytes};
    put({static_cast<int64_t>(kind), at[0], at[1], 0, 4, 1, 1, rows, columns});
    if (kind == Step::kConvolution) {
      put({2, 0, 0, 3, 1, columns, columns, 3, 0, 3, 1, 1, 3, 4, 3, 1, 2, 0, 0, 0, 1, 0, 1, 0, 0, 1, columns});
      put({0, 0, 0, 1, 0});
    }
    if (kind == Step::kNormalization) put({1, 0, 0, 1, columns, 1, 0, 0, 1, columns});
    if (kind == Step::kLookup) put({4, 0, 3, 1, columns});
    put({to[0], to[1], 0, 4, 1, 1, rows, columns});
    if (kind == Step::kConvolution) put({1, 0, 0, one, 0, 0, 1, 1, 0, 1, 1, one, 0});
    if (kind == Step::kNormalization) put({1, one, one, 0});
    if (kind == Step::kMaxPooling) put({1, 1, 1, 0, 2, 1});
    if (kind == Step::kRounding) put({0, one, 0, 0});
    alone(kind, now, next, columns, vector, block, places);
    std::swap(now, next);
    at[0] = to[0], at[1] = to[1];
  }
  const int64_t changes = between(0, 2);
  for (int64_t i = 0; i < changes; ++i) {
    int64_t& number = program[between(0, program.size() - 1)];
    number = one_in(2) ? wild(number) : between(0, 6);
  }
  if (changes && one_in(4)) program.resize(between(0, program.size()));
  const bool shared = one_in(8);  // the positions are in the memory of the steps
  for (int i : {3, 4}) {
    if (shared) buffers[i].data = buffers[6].data, buffers[i].bytes = std::min(buffers[i].bytes, buffers[6].bytes);
  }
  auto exact = std::make_unique<int64_t[]>(program.size());
  std::copy(program.begin(), program.end(), exact.get());
  const char* why = run_sequence({exact.get(), static_cast<int64_t>(program.size())}, buffers, 5, 1).why;
  if (std::memcmp(buffers[0].data, x.data(), bytes) || std::memcmp(held[3].get(), positions.data(), 12) ||
      std::memcmp(held[4].get(), looked.data(), sizeof(int32_t) * columns))
    fail("an operand is overwritten");
  if (shared && !changes && !why && reads) fail("positions in the memory of the steps are accepted");
  if (changes || shared) return why ? kRefused : kComputed;
  if (why) fail(why);
  if (std::memcmp(buffers[5].data, now.data(), bytes)) fail("a sequence that differs from its steps");
  return kComputed;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGABRT, tell), std::signal(SIGALRM, tell);
  set_threads(1);
  struct {
    const char* name;
    Outcome (*one)();
    long long checked, accepted, computed;
  } kinds[] = {{"convolution", convolve, 0, 0, 0}, {"depthwise", convolve_each, 0, 0, 0},
               {"pooling", pool, 0, 0, 0},         {"rounding", round_some, 0, 0, 0},
               {"lookup", look_some_up, 0, 0, 0},  {"normalization", normalize, 0, 0, 0},
               {"attention", attend, 0, 0, 0},     {"sequence", in_sequence, 0, 0, 0}};
  const long long calls = argc > 1 ? std::atoll(argv[1]) : 0, first = argc > 2 ? std::atoll(argv[2]) : 0;
  for (number = first; number < first + calls; ++number) {
    if (number % 1024 == 0) alarm(100);
    fuzz::generator.state = static_cast<uint64_t>(number) * 0x2545f4914f6cdd1d;
    auto& kind = kinds[number % std::size(kinds)];
    const Outcome outcome = kind.one();
    ++kind.checked, kind.accepted += outcome != kRefused, kind.computed += outcome == kComputed;
  }
  const char* before = "{";
  for (const auto& kind : kinds) {
    std::printf("%s\"%s\": {\"checked\": %lld, \"accepted\": %lld, \"computed\": %lld}", before, kind.name,
                kind.checked, kind.accepted, kind.computed);
    before = ", ";
  }
  std::printf("}\n");
}
