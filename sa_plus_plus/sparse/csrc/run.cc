// The parts into which products, depthwise convolutions, attention, normalisation, pooling, rounding and lookups are
// cut for threads.
#include "run.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "thread_pool.h"

namespace sa_plus_plus {
namespace {

constexpr int64_t kFewRows = 96;                     // in a part, so that their sums and x stay in the caches
constexpr int64_t kWorthAThread = int64_t{1} << 15;  // operations; some microseconds

// Bands of rows, and in each as many groups of columns as give every thread something to do to the end.
std::vector<Part> cut(const Product& p, int64_t threads) {
  // Some runs, or pieces of one, about as many rows in each; if possible a whole number of bands for each thread, so
  // that a layer's threads read what they wrote themselves in the layer before. But where the blocks are much larger
  // than x, each of them is best read by one thread alone, which then takes as many rows as it can.
  const int64_t x_numbers = p.run < p.batch ? p.batch / p.run * p.run_stride : p.batch * p.stride;
  const bool by_columns = threads > 1 && p.grid_c() >= 2 * threads &&
                          p.kept * p.b_r * p.b_c * size_of(p.w_type) > 4 * x_numbers * size_of(p.x_type);
  const int64_t most = by_columns ? kMostRows : kFewRows, multiple = by_columns ? 1 : threads;
  std::vector<std::pair<int64_t, int64_t>> bands;
  auto divide = [&](int64_t top, int64_t bottom, int64_t unit, int64_t most, int64_t multiple) {
    const int64_t units = (bottom - top + unit - 1) / unit, each = std::max<int64_t>(1, most / unit);
    int64_t count = (units + each - 1) / each;
    if (multiple > 1 && units >= 2 * multiple) count = (count + multiple - 1) / multiple * multiple;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = top + i * units / count * unit, to = top + (i + 1) * units / count * unit;
      bands.emplace_back(from, std::min(bottom, to));
    }
  };
  if (p.run >= p.batch) divide(0, p.batch, 16, most, multiple);
  else if (p.run <= kMostRows) divide(0, p.batch, p.run, most, multiple);
  else
    for (int64_t top = 0; top < p.batch; top += p.run) divide(top, std::min(p.batch, top + p.run), 1, kMostRows, 1);
  // An operation is 16 multiplications of floats, a tenth of the time for types that have matrix registers.
  const int64_t multiplications = times(p.batch, p.kept * p.b_r * p.b_c);
  const int64_t work = plus(multiplications / (p.grouped() ? 4 : 1), p.batch * p.width * 4);
  const int64_t count = bands.size();
  const int64_t wanted = threads < 2 ? 1 : std::clamp<int64_t>(work / kWorthAThread, 1, 4 * threads);
  const int64_t each = by_columns ? 4 * threads : (wanted + count - 1) / std::max<int64_t>(count, 1);
  const int64_t groups = std::min(each, p.grid_c());
  std::vector<int64_t> bounds{0};
  for (int64_t g = 1, j = 0; g < groups; ++g) {  // a column costs its blocks, and one for storing
    while (j < p.grid_c() && (p.starts[j] + j) * groups < (p.kept + p.grid_c()) * g) ++j;
    if (j > bounds.back()) bounds.push_back(j);
  }
  if (bounds.back() < p.grid_c()) bounds.push_back(p.grid_c());
  const int64_t pieces = bounds.size() - 1;
  std::vector<Part> parts;
  for (int64_t i = 0; i < count * pieces; ++i) {  // a thread's parts follow one another
    const auto [top, bottom] = bands[by_columns ? i % count : i / pieces];
    const int64_t g = by_columns ? i / count : i % pieces;
    parts.push_back({top, bottom, bounds[g], bounds[g + 1]});
  }
  return parts;
}

// `count` numbers of y from number `from` on become the zero point.
void fill(const Product& p, int64_t from, int64_t count) {
  const int64_t size = size_of(p.y_type);
  std::memset(static_cast<char*>(p.y) + from * size, size == 1 ? static_cast<int>(p.y_zero_point) : 0, count * size);
}

// Fill the padding around output lines that start in this part.
void fill_borders(const Product& p, const Part& part) {
  if (part.left != 0 || !(p.top || p.bottom || p.left || p.right)) return;
  for (int64_t l = (part.top + p.line - 1) / p.line; l * p.line < part.bottom; ++l) {
    const int64_t first = p.y_row(l * p.line);
    fill(p, first - p.left * p.width, p.left * p.width);
    fill(p, first + p.line * p.width, p.right * p.width);
    const int64_t image = l / p.lines * p.y_image();
    if (l % p.lines == 0) fill(p, image, p.top * p.y_line());
    if (l % p.lines == p.lines - 1) fill(p, image + (p.top + p.lines) * p.y_line(), p.bottom * p.y_line());
  }
}

constexpr int64_t kFewQueries = 48;       // in a part, so that packing keys and values is little beside them
constexpr int64_t kFewNumbers = 1 << 11;  // half a microsecond: fewer are not worth another thread

}  // namespace

void run(const Convolution& convolution, int64_t threads, const Functions& functions) {
  const Product& p = convolution.product;
  if (!p.batch) return convolution.count ? fill(p, 0, convolution.count) : void();
  struct Work {
    const Product& product;
    const std::vector<Part> parts;
    const Functions& functions;
  } const work{p, cut(p, threads), functions};
  auto task = [](const void* context, int64_t i) {
    const Work& work = *static_cast<const Work*>(context);
    work.functions.gemm(work.product, work.parts[i]);
    fill_borders(work.product, work.parts[i]);
  };
  parallel(work.parts.size(), threads, task, &work);
}

void run(const Depthwise& depthwise, int64_t threads, const Functions& functions) {
  if (!depthwise.lines) return;
  struct Work {
    const Depthwise& d;
    const Functions& functions;
    const int64_t pieces;  // of each line
  };
  const Depthwise& d = depthwise;
  const int64_t work = times(d.lines * d.y_columns * d.width(), plus(times(d.window_rows, d.window_columns), 4));
  const int64_t wanted = threads < 2 ? 1 : std::clamp<int64_t>(work / kWorthAThread, 1, 4 * threads);
  const Work all{d, functions, std::min((wanted + d.lines - 1) / d.lines, d.y_columns)};
  auto task = [](const void* context, int64_t i) {
    const Work& w = *static_cast<const Work*>(context);
    const int64_t piece = i % w.pieces, columns = w.d.y_columns;
    w.functions.depthwise(w.d, i / w.pieces, piece * columns / w.pieces, (piece + 1) * columns / w.pieces);
  };
  parallel(d.lines * all.pieces, std::min(threads, wanted), task, &all);
}

void run(const Pooling& pooling, int64_t threads, const Functions& functions) {
  struct Work {
    const Pooling& pooling;
    const Functions& functions;
  } const work{pooling, functions};
  auto task = [](const void* context, int64_t line) {
    const Work& work = *static_cast<const Work*>(context);
    work.functions.pooling(work.pooling, line);
  };
  parallel(pooling.lines, threads, task, &work);
}

namespace {

// Images whose numbers are rounded one by one: cut into equal parts.
void run_flat(const Images& m, int64_t threads, const Functions& functions) {
  const int64_t count = m.lines * m.columns * m.channels;
  struct Work {
    const Runs all;
    const int64_t parts;
    const Functions& functions;
  } const work{{m.type, m.x, m.y, 1, count, count, m.options.scale, m.options.zero_point},
               std::clamp<int64_t>(count / kFewNumbers, 1, 4 * threads),
               functions};
  auto task = [](const void* context, int64_t i) {
    const Work& w = *static_cast<const Work*>(context);
    const int64_t from = i * w.all.run / w.parts, to = (i + 1) * w.all.run / w.parts;
    Runs part = w.all;
    part.x += from, part.run = part.wide = to - from;
    part.y = static_cast<char*>(part.y) + from * size_of(part.type);
    w.functions.rounding(part);
  };
  parallel(work.parts, threads, task, &work);
}

}  // namespace

void run(const Images& images, int64_t threads, const Functions& functions) {
  if (images.rows == images.y_rows && images.columns == images.y_columns && images.channels == images.y_channels) {
    return run_flat(images, threads, functions);
  }
  struct Work {
    const Images& images;
    const Functions& functions;
  } const work{images, functions};
  auto task = [](const void* context, int64_t i) {
    const Work& work = *static_cast<const Work*>(context);
    const Images& m = work.images;
    const int64_t image = i / m.y_rows, row = i % m.y_rows - m.options.top;
    const int64_t wide = m.y_columns * m.y_channels, size = size_of(m.type);
    char* y = static_cast<char*>(m.y) + i * wide * size;
    auto fill = [&](char* from, char* end) {
      std::memset(from, size == 1 ? static_cast<int>(m.options.zero_point) : 0, end - from);
    };
    if (row < 0 || row >= m.rows) return fill(y, y + wide * size);
    const float* x = m.x + (image * m.rows + row) * m.columns * m.channels;
    char* from = y + m.options.left * m.y_channels * size;
    fill(y, from);
    Runs runs{m.type, x, from, m.columns, m.channels, m.y_channels, m.options.scale, m.options.zero_point};
    if (m.channels == m.y_channels) runs.count = 1, runs.run = runs.wide = m.columns * m.channels;
    work.functions.rounding(runs);
    fill(from + m.columns * m.y_channels * size, y + wide * size);
  };
  parallel(images.lines, threads, task, &work);
}

namespace {

// `kernel(first, last)` for all rows, in parts of as many numbers as are worth a thread.
template <class Kernel>
void run_rows(const Kernel& kernel, int64_t rows, int64_t columns, int64_t threads) {
  struct Work {
    const Kernel& kernel;
    const int64_t rows, parts;
  } const work{kernel, rows, std::clamp<int64_t>(rows * columns / kFewNumbers, 1, 4 * threads)};
  auto task = [](const void* context, int64_t i) {
    const Work& w = *static_cast<const Work*>(context);
    w.kernel(i * w.rows / w.parts, (i + 1) * w.rows / w.parts);
  };
  parallel(work.parts, threads, task, &work);
}

}  // namespace

void run(const Lookup& lookup, int64_t threads, const Functions& functions) {
  auto kernel = [&](int64_t first, int64_t last) { functions.look_up(lookup, first, last); };
  run_rows(kernel, lookup.rows, lookup.y_columns, threads);
}

void run(const Normalization& normalization, int64_t threads, const Functions& functions) {
  auto kernel = [&](int64_t first, int64_t last) { functions.normalization(normalization, first, last); };
  run_rows(kernel, normalization.rows, normalization.columns, threads);
}

bool run(const Attention& a, int64_t threads, const Functions& functions) {
  const int64_t heads = a.all_heads();
  const int64_t wanted = (4 * threads + heads - 1) / heads;
  const int64_t pieces = std::clamp<int64_t>(a.queries / kFewQueries, 1, wanted);  // of each head
  constexpr int64_t line = 64 / sizeof(float);
  const int64_t needed = (scratch_of(a) + line - 1) / line * line, most = std::min(threads, heads * pieces);
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[most * needed + line]);
  if (!memory) return false;
  static std::atomic<int64_t> calls{0};
  std::atomic<int64_t> taken{0};
  struct Work {
    const Attention& a;
    const Functions& functions;
    const int64_t call, pieces, needed;
    float* const scratch;  // a part for each thread
    std::atomic<int64_t>& taken;
  };
  float* const aligned =
      memory.get() + (line - reinterpret_cast<uintptr_t>(memory.get()) / sizeof(float) % line) % line;
  const Work work{a, functions, ++calls, pieces, needed, aligned, taken};
  auto task = [](const void* context, int64_t i) {
    const Work& w = *static_cast<const Work*>(context);
    thread_local struct {
      int64_t call, head;
      float* scratch;
    } mine;
    const int64_t head = i / w.pieces, piece = i % w.pieces;
    const bool packed = mine.call == w.call && mine.head == head;
    if (mine.call != w.call) mine.scratch = w.scratch + w.taken++ * w.needed;
    mine.call = w.call, mine.head = head;
    const int64_t first = piece * w.a.queries / w.pieces, last = (piece + 1) * w.a.queries / w.pieces;
    w.functions.attention(w.a, head, first, last, mine.scratch, packed);
  };
  parallel(heads * pieces, threads, task, &work);
  return true;
}

const char kNoMemory[] = "no memory for keys and values";

const char* compute(const ConvolutionArrays& arrays, const ConvolutionOptions& options, int64_t threads) {
  Convolution prepared;
  const char* why = prepare(arrays, options, &prepared);
  if (!why) run(prepared, threads, *target_for(arrays.x.type).functions);
  return why;
}

// For all kernels but products, which have a target for each type.
template <class Prepared, class... Arguments>
const char* compute_as(int64_t threads, const Arguments&... arguments) {
  Prepared prepared;
  const char* why = prepare(arguments..., &prepared);
  if (!why) run(prepared, threads, *target_for_all().functions);
  return why;
}

const char* compute(const DepthwiseArrays& arrays, const DepthwiseOptions& options, int64_t threads) {
  return compute_as<Depthwise>(threads, arrays, options);
}

const char* compute(const Array& x, const Array& y, const Windows& windows, bool sums, int64_t threads) {
  return compute_as<Pooling>(threads, x, y, windows, sums);
}

const char* compute(const Array& x, const Array& y, const Rounding& rounding, int64_t threads) {
  return compute_as<Images>(threads, x, y, rounding);
}

const char* compute(const Array& x, List<int32_t> places, const Array& y, int64_t threads) {
  return compute_as<Lookup>(threads, x, places, y);
}

const char* compute(const NormalizationArrays& arrays, const NormalizationOptions& options, int64_t threads) {
  return compute_as<Normalization>(threads, arrays, options);
}

const char* compute(const AttentionArrays& arrays, List<int64_t> sizes, List<int64_t> strides, float scale,
                    int64_t threads) {
  Attention prepared;
  if (const char* why = prepare(arrays, sizes, strides, scale, &prepared)) return why;
  return run(prepared, threads, *target_for_all().functions) ? nullptr : kNoMemory;
}

}  // namespace sa_plus_plus
