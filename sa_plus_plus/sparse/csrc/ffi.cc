// What XLA calls: checks the buffers, cuts the product into parts and computes them on threads of its own.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "kernel.h"
#include "pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sa_plus_plus {
namespace {

constexpr int64_t kFewRows = 96;  // in a part, so that their sums and x stay in the caches
constexpr int64_t kWorthAThread = int64_t{1} << 15;  // operations; some microseconds

// Bands of rows, and in each as many groups of columns as give every thread something to do to the end.
std::vector<Part> cut(const Product& p, int64_t threads) {
  // Some runs, or pieces of one, about as many rows in each; if possible a whole number of bands for each thread, so that
  // a layer's threads read what they wrote themselves in the layer before. But where the blocks are much larger than x,
  // each of them is best read by one thread alone, which then takes as many rows as it can.
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
  else for (int64_t top = 0; top < p.batch; top += p.run) divide(top, std::min(p.batch, top + p.run), 1, kMostRows, 1);
  // An operation is 16 multiplications of floats, a tenth of the time for types that have matrix registers.
  const int64_t multiplications = p.batch * p.kept * p.b_r * p.b_c;
  const int64_t work = multiplications / (p.grouped() ? 4 : 1) + p.batch * p.width * 4;
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

// Fill what borders on the lines that begin in a part.
void fill_borders(const Product& p, const Part& part) {
  if (part.left != 0 || !(p.top || p.bottom || p.left || p.right)) return;
  const int64_t size = size_of(p.y_type);
  auto fill = [&](int64_t from, int64_t count) {
    std::memset(static_cast<char*>(p.y) + from * size, size == 1 ? static_cast<int>(p.y_zero) : 0, count * size);
  };
  for (int64_t l = (part.top + p.line - 1) / p.line; l * p.line < part.bottom; ++l) {
    const int64_t first = p.y_row(l * p.line);
    fill(first - p.left * p.width, p.left * p.width);
    fill(first + p.line * p.width, p.right * p.width);
    const int64_t image = l / p.lines * p.y_image();
    if (l % p.lines == 0) fill(image, p.top * p.y_line());
    if (l % p.lines == p.lines - 1) fill(image + (p.top + p.lines) * p.y_line(), p.bottom * p.y_line());
  }
}

void compute(const Product& product, int64_t threads) {
  struct Work {
    const Product& product;
    const std::vector<Part> parts;
    const Kernel kernel;
  } const work{product, cut(product, threads), kernels(product.x_type)->kernel};
  auto task = [](const void* context, int64_t i) {
    const Work& work = *static_cast<const Work*>(context);
    work.kernel(work.product, work.parts[i]);
    fill_borders(work.product, work.parts[i]);
  };
  parallel(work.parts.size(), threads, task, &work);
}

using Indices = ffi::BufferR1<ffi::S32>;
using Numbers = ffi::BufferR1<ffi::F32>;

struct Options {
  int64_t window_rows, window_columns, stride_down, stride_across, top, bottom, left, right;
  int64_t activation;
  float residual_scale, residual_zero, y_zero, y_unit;
};

// False for a type that no kernel knows. Whether bytes have a sign is up to who calls: XLA has both.
bool type_of(ffi::DataType type, Type* known) {
  if (type == ffi::F32) *known = Type::kFloat;
  else if (type == ffi::BF16) *known = Type::kHalf;
  else if (type == ffi::U8 || type == ffi::S8) *known = Type::kByte;
  else return false;
  return true;
}

// x (images, rows, columns, channels), padded already, times blocks of which the rows are of one line of the window. y
// gets borders of zeros: those that the next convolution pads its images with. A matrix is one image of one line.
ffi::Error block_sparse_conv(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer blocks, Indices rows,
                             Indices starts, Numbers scale, Numbers bias, ffi::AnyBuffer residual,
                             ffi::Result<ffi::AnyBuffer> y, const Options& o) {
  auto refuse = [](const char* why) {
    return ffi::Error::InvalidArgument(std::string("block-sparse product: ") + why);
  };
  const auto in = x.dimensions(), out = y->dimensions(), kept = blocks.dimensions();
  Product p{};
  if (!type_of(x.element_type(), &p.x_type) || !type_of(blocks.element_type(), &p.w_type) ||
      !type_of(y->element_type(), &p.y_type)) {
    return refuse("x, blocks or y are neither float32, bfloat16 nor bytes");
  }
  if (in.size() != 4 || out.size() != 4) return refuse("x and y need four dimensions");
  const int64_t channels = in[3], line = in[2] * channels;
  p.top = o.top, p.bottom = o.bottom, p.left = o.left, p.right = o.right;
  p.lines = out[1] - o.top - o.bottom, p.line = out[2] - o.left - o.right;
  if (o.window_rows < 1 || o.window_columns < 1 || o.stride_down < 1 || o.stride_across < 1 || in[0] != out[0] ||
      std::min({o.top, o.bottom, o.left, o.right}) < 0 || !channels || p.lines < 0 || p.line < 0 ||
      (p.lines - 1) * o.stride_down + o.window_rows > in[1] ||
      (p.line - 1) * o.stride_across + o.window_columns > in[2]) {
    return refuse("the result does not fit the images");
  }
  const bool grouped = p.x_type != Type::kFloat;
  if (kept.size() != (grouped ? 4 : 3)) return refuse("blocks have another number of dimensions");
  p.batch = in[0] * p.lines * p.line;
  p.height = o.window_rows * o.window_columns * channels, p.width = out[3];
  p.kept = kept[0], p.b_r = grouped ? kept[1] * kept[3] : kept[1], p.b_c = kept[2];
  if (p.b_r < 1 || p.b_c < 1 || (grouped && kept[3] != p.group())) return refuse("blocks are empty, or not grouped");
  p.x = x.untyped_data(), p.y = y->untyped_data(), p.blocks = blocks.untyped_data();
  p.rows = rows.typed_data(), p.starts = starts.typed_data();
  if (static_cast<int64_t>(rows.element_count()) != p.kept ||
      static_cast<int64_t>(starts.element_count()) != p.grid_c() + 1) {
    return refuse("the indices are not those of the blocks");
  }
  for (const Numbers& numbers : {scale, bias}) {
    const int64_t n = numbers.element_count();
    if (n && n != p.width) return refuse("scale or bias is not as long as y is wide");
  }
  p.scale = scale.element_count() ? scale.typed_data() : nullptr;
  p.bias = bias.element_count() ? bias.typed_data() : nullptr;
  if (const int64_t n = residual.element_count()) {
    if (n != p.batch * p.width || !type_of(residual.element_type(), &p.residual_type)) return refuse("the residual is not like y");
    p.residual = residual.untyped_data();
  }
  p.residual_scale = o.residual_scale, p.residual_zero = o.residual_zero, p.y_zero = o.y_zero, p.y_unit = o.y_unit;
  if (o.activation < 0 || o.activation >= static_cast<int64_t>(Activation::kCount)) return refuse("an unknown activation");
  p.activation = static_cast<Activation>(o.activation);
  if (!p.batch) return ffi::Error::Success();
  // Rows of x follow one another in a line of y; where nothing lies between lines or images, beyond it as well.
  const bool lines_adjoin = o.stride_down == 1 && o.stride_across == 1 && o.window_columns == 1 && p.line == in[2];
  const bool images_adjoin = lines_adjoin && p.lines == in[1];
  p.stride = o.stride_across * channels;
  p.run = images_adjoin ? p.batch : lines_adjoin ? p.lines * p.line : p.line;
  p.runs = lines_adjoin ? 1 : p.lines;
  p.run_stride = o.stride_down * line, p.runs_stride = in[1] * line;
  if (const char* why = complaint(p)) return refuse(why);
  const int64_t across = o.window_columns * channels;
  if (across % p.b_r && o.window_rows > 1) return refuse("a block is in two lines of the window");
  std::vector<int64_t> down(p.grid_r());
  for (int64_t i = 0; i < p.grid_r(); ++i) down[i] = i * p.b_r / across * line + i * p.b_r % across;
  p.down = down.data();
  compute(p, std::max<int64_t>(1, pool.num_threads()));
  return ffi::Error::Success();
}

struct Windows {
  int64_t window_rows, window_columns, stride_down, stride_across, top, left;
};

// The largest number, or the sum, of each window of images; what is beyond their edges does not count.
ffi::Error pool_images(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer y, const Windows& o, bool sums) {
  const auto in = x.dimensions(), out = y.dimensions();
  Pooling p{};
  if (in.size() != 4 || out.size() != 4 || in[0] != out[0] || in[3] != out[3] || x.element_type() != y.element_type() ||
      !type_of(x.element_type(), &p.type) || (sums && p.type != Type::kFloat) || o.window_rows < 1 ||
      o.window_columns < 1 || o.stride_down < 1 || o.stride_across < 1) {
    return ffi::Error::InvalidArgument("pooling: x and y do not go together");
  }
  p.sums = sums, p.x = x.untyped_data(), p.y = y.untyped_data();
  p.rows = in[1], p.columns = in[2], p.channels = in[3], p.y_rows = out[1], p.y_columns = out[2];
  p.window_rows = o.window_rows, p.window_columns = o.window_columns;
  p.stride_down = o.stride_down, p.stride_across = o.stride_across, p.top = o.top, p.left = o.left;
  struct Work {
    const Pooling& pooling;
    const Pool pool;
  } const work{p, pool()};
  auto task = [](const void* context, int64_t line) {
    const Work& work = *static_cast<const Work*>(context);
    work.pool(work.pooling, line);
  };
  parallel(out[0] * out[1], std::max<int64_t>(1, threads.num_threads()), task, &work);
  return ffi::Error::Success();
}

ffi::Error max_pool(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, const Windows& o) {
  return pool_images(threads, x, *y, o, false);
}

ffi::Error sum_pool(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, const Windows& o) {
  return pool_images(threads, x, *y, o, true);
}

using Integers = ffi::Span<const int64_t>;

constexpr int64_t kFewQueries = 48;  // in a part, so that packing keys and values is little beside them

// `sizes`: three of heads, queries, keys, depth, width, `seen`; `strides`: four each of q, k, v, bias and y.
ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::Buffer<ffi::F32> bias, ffi::Result<ffi::AnyBuffer> y, Integers sizes, Integers strides,
                     float scale) {
  auto refuse = [](const char* why) { return ffi::Error::InvalidArgument(std::string("attention: ") + why); };
  if (sizes.size() != 8 || strides.size() != 20) return refuse("the numbers of sizes and strides are wrong");
  Attention a{};
  for (const auto& type : {k.element_type(), v.element_type(), y->element_type()}) {
    if (type != q.element_type()) return refuse("q, k, v and y are of different types");
  }
  if (!type_of(q.element_type(), &a.type)) return refuse("q, k, v and y are neither float32 nor bfloat16");
  std::copy_n(sizes.begin(), 3, a.heads);
  a.queries = sizes[3], a.keys = sizes[4], a.depth = sizes[5], a.width = sizes[6], a.seen = sizes[7], a.scale = scale;
  Attention::Place* places[] = {&a.q_at, &a.k_at, &a.v_at, &a.bias_at, &a.y_at};
  for (int i = 0; i < 5; ++i) {
    std::copy_n(strides.begin() + 4 * i, 3, places[i]->head);
    places[i]->row = strides[4 * i + 3];
  }
  a.q = q.untyped_data(), a.k = k.untyped_data(), a.v = v.untyped_data(), a.y = y->untyped_data();
  a.bias = bias.element_count() ? bias.typed_data() : nullptr;
  const int64_t counts[] = {
      static_cast<int64_t>(q.element_count()), static_cast<int64_t>(k.element_count()),
      static_cast<int64_t>(v.element_count()), static_cast<int64_t>(bias.element_count()),
      static_cast<int64_t>(y->element_count())};
  if (const char* why = complaint(a, counts)) return refuse(why);
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), heads = a.all_heads();
  const int64_t wanted = (4 * threads + heads - 1) / heads;
  const int64_t pieces = std::clamp<int64_t>(a.queries / kFewQueries, 1, wanted);  // of each head
  constexpr int64_t line = 64 / sizeof(float);
  const int64_t needed = (scratch_of(a) + line - 1) / line * line, most = std::min(threads, heads * pieces);
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[most * needed + line]);
  if (!memory) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: no memory for keys and values");
  static std::atomic<int64_t> calls{0};
  std::atomic<int64_t> taken{0};
  struct Work {
    const Attention& a;
    const Attend attend;
    const int64_t call, pieces, needed;
    float* const scratch;  // a part for each thread
    std::atomic<int64_t>& taken;
  };
  float* const aligned = memory.get() + (line - reinterpret_cast<uintptr_t>(memory.get()) / sizeof(float) % line) % line;
  const Work work{a, *attends(), ++calls, pieces, needed, aligned, taken};
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
    w.attend(w.a, head, first, last, mine.scratch, packed);
  };
  parallel(heads * pieces, threads, task, &work);
  return ffi::Error::Success();
}

constexpr int64_t kFewNumbers = 1 << 13;  // fewer are not worth another thread

struct Rounding {
  int64_t top, left;
  float scale, zero;
};

// Images as they are, in bfloat16, or in bytes as round(x * scale) + zero, with borders and more channels, both zeros.
ffi::Error round_images(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::Result<ffi::AnyBuffer> y, const Rounding& o) {
  struct Work {
    const float* x;
    void* y;
    int64_t rows, columns, channels, out_rows, out_columns, out_channels;
    Type type;
    Round round;
    const Rounding& o;
  };
  const auto in = x.dimensions(), out = y->dimensions();
  Type type;
  if (out.size() != 4 || in[0] != out[0] || o.top < 0 || o.left < 0 || out[1] < in[1] + o.top ||
      out[2] < in[2] + o.left || out[3] < in[3] || !type_of(y->element_type(), &type)) {
    return ffi::Error::InvalidArgument("round_images: x and y do not go together");
  }
  if (in[1] == out[1] && in[2] == out[2] && in[3] == out[3]) {  // contiguous: cut into equal parts
    const Runs all{type, x.typed_data(), y->untyped_data(), 1, static_cast<int64_t>(x.element_count()), 0, o.scale, o.zero};
    struct Flat {
      const Runs& all;
      const int64_t parts;
      const Round round;
    };
    const int64_t threads = std::max<int64_t>(1, pool.num_threads());
    const Flat flat{all, std::clamp<int64_t>(all.run / kFewNumbers, 1, 4 * threads), round()};
    auto task = [](const void* context, int64_t i) {
      const Flat& f = *static_cast<const Flat*>(context);
      const int64_t from = i * f.all.run / f.parts, to = (i + 1) * f.all.run / f.parts;
      Runs part = f.all;
      part.x += from, part.run = part.wide = to - from;
      part.y = static_cast<char*>(part.y) + from * size_of(part.type);
      f.round(part);
    };
    parallel(flat.parts, threads, task, &flat);
    return ffi::Error::Success();
  }
  const Work work{x.typed_data(), y->untyped_data(), in[1], in[2], in[3], out[1], out[2], out[3], type, round(), o};
  auto task = [](const void* context, int64_t i) {
    const Work& w = *static_cast<const Work*>(context);
    const int64_t image = i / w.out_rows, row = i % w.out_rows - w.o.top;
    const int64_t wide = w.out_columns * w.out_channels;
    const int64_t size = size_of(w.type);
    char* y = static_cast<char*>(w.y) + i * wide * size;
    auto fill = [&](char* from, char* end) { std::memset(from, size == 1 ? static_cast<int>(w.o.zero) : 0, end - from); };
    if (row < 0 || row >= w.rows) return fill(y, y + wide * size);
    const float* x = w.x + (image * w.rows + row) * w.columns * w.channels;
    char* from = y + w.o.left * w.out_channels * size;
    fill(y, from);
    Runs runs{w.type, x, from, w.columns, w.channels, w.out_channels, w.o.scale, w.o.zero};
    if (w.channels == w.out_channels) runs.count = 1, runs.run = runs.wide = w.columns * w.channels;
    w.round(runs);
    fill(from + w.columns * w.out_channels * size, y + wide * size);
  };
  parallel(out[0] * out[1], std::max<int64_t>(1, pool.num_threads()), task, &work);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace sa_plus_plus

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sa_plus_plus::Rounding, ffi::StructMember<int64_t>("top"),
                                      ffi::StructMember<int64_t>("left"), ffi::StructMember<float>("scale"),
                                      ffi::StructMember<float>("zero"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_round_images, sa_plus_plus::round_images,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::Rounding>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_attention, sa_plus_plus::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("sizes")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<float>("scale"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sa_plus_plus::Windows, ffi::StructMember<int64_t>("window_rows"), ffi::StructMember<int64_t>("window_columns"),
    ffi::StructMember<int64_t>("stride_down"), ffi::StructMember<int64_t>("stride_across"),
    ffi::StructMember<int64_t>("top"), ffi::StructMember<int64_t>("left"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_max_pool, sa_plus_plus::max_pool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::Windows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_sum_pool, sa_plus_plus::sum_pool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::Windows>());

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sa_plus_plus::Options, ffi::StructMember<int64_t>("window_rows"), ffi::StructMember<int64_t>("window_columns"),
    ffi::StructMember<int64_t>("stride_down"), ffi::StructMember<int64_t>("stride_across"),
    ffi::StructMember<int64_t>("top"), ffi::StructMember<int64_t>("bottom"), ffi::StructMember<int64_t>("left"),
    ffi::StructMember<int64_t>("right"), ffi::StructMember<int64_t>("activation"),
    ffi::StructMember<float>("residual_scale"),
    ffi::StructMember<float>("residual_zero"), ffi::StructMember<float>("y_zero"), ffi::StructMember<float>("y_unit"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_block_sparse_conv, sa_plus_plus::block_sparse_conv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::Options>());

// Of XLA's interface, as of the headers that this was compiled with.
extern "C" int sa_plus_plus_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// The name of the kernel that products of x of a type run in: 0 for float32, 1 for bfloat16, 2 for bytes.
extern "C" const char* sa_plus_plus_kernel(int type) {
  return sa_plus_plus::kernels(static_cast<sa_plus_plus::Type>(type))->name;
}

// Minimum nanoseconds of a small product on one thread, with x and blocks of the given type.
extern "C" double sa_plus_plus_nanoseconds(int x_type) {
  using sa_plus_plus::Type;
  constexpr int64_t rows = 56, side = 64, wide = sa_plus_plus::kWide;
  sa_plus_plus::Product p{};
  p.x_type = static_cast<Type>(x_type), p.w_type = p.x_type, p.y_type = Type::kFloat;
  std::vector<float> x(rows * side), blocks(side * side), y(rows * side);
  const std::vector<int32_t> grid_rows(side / wide, 0), starts{0, 1, 2, 3, 4};
  const int64_t down = 0;
  p.batch = p.run = p.line = rows, p.height = p.width = p.b_r = p.stride = side, p.b_c = wide;
  p.kept = side / wide, p.runs = p.lines = 1;
  p.x = x.data(), p.blocks = blocks.data(), p.y = y.data(), p.down = &down;
  p.rows = grid_rows.data(), p.starts = starts.data(), p.activation = sa_plus_plus::Activation::kNone;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 100; ++i) {
    const auto start = std::chrono::steady_clock::now();
    sa_plus_plus::kernels(p.x_type)->kernel(p, {0, rows, 0, p.kept});
    least = std::min(least, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

extern "C" void sa_plus_plus_set_threads(int64_t threads) { sa_plus_plus::set_threads(threads); }
