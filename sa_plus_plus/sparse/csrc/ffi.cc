// What XLA calls: checks the buffers, cuts the product into parts and computes them on XLA's own threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sa_plus_plus {
namespace {

constexpr int64_t kRowsAtOnce = 48;                  // of x: few enough to stay in the second-level cache
constexpr int64_t kWorthAThread = int64_t{1} << 17;  // operations; waking a thread takes some microseconds

// Bands of rows, and in each as many groups of columns as give every thread something to do to the end.
std::vector<Part> cut(const Product& p, int64_t threads) {
  // Some runs, or pieces of one. Matrix registers take 96 rows at once.
  const int64_t most = p.grouped() ? kMostRows : kRowsAtOnce, pieces = (p.run + kMostRows - 1) / kMostRows;
  int64_t band = p.run <= most ? p.run * (most / p.run) : (p.run + pieces - 1) / pieces;
  if (p.run >= p.batch) band = most;
  std::vector<std::pair<int64_t, int64_t>> bands;
  for (int64_t top = 0; top < p.batch;) {
    const int64_t end = p.run <= most ? p.batch : std::min(p.batch, (top / p.run + 1) * p.run);
    bands.emplace_back(top, std::min(end, top + band));
    top = bands.back().second;
  }
  // An operation is 16 multiplications of floats, a tenth of the time for types that have matrix registers.
  const int64_t multiplications = p.batch * p.kept * p.b_r * p.b_c;
  const int64_t work = multiplications / (p.grouped() ? 4 : 1) + p.batch * p.width * 4;
  const int64_t count = bands.size();
  const int64_t wanted = threads < 2 ? 1 : std::clamp<int64_t>(work / kWorthAThread, 1, 4 * threads);
  const int64_t groups = std::min((wanted + count - 1) / std::max<int64_t>(count, 1), p.grid_c());
  std::vector<int64_t> bounds{0};
  for (int64_t g = 1, j = 0; g < groups; ++g) {  // a column costs its blocks, and one for storing
    while (j < p.grid_c() && (p.starts[j] + j) * groups < (p.kept + p.grid_c()) * g) ++j;
    if (j > bounds.back()) bounds.push_back(j);
  }
  if (bounds.back() < p.grid_c()) bounds.push_back(p.grid_c());
  std::vector<Part> parts;
  for (const auto& [top, bottom] : bands) {
    for (size_t g = 0; g + 1 < bounds.size(); ++g) parts.push_back({top, bottom, bounds[g], bounds[g + 1]});
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

// The parts of one call. Threads take them one by one; one that comes when all are taken touches no buffer.
class Work {
 public:
  Work(const Product& product, std::vector<Part> parts) : product_(product), parts_(std::move(parts)) {}

  void run() {
    const Kernel kernel = kernels(product_.x_type)->kernel;
    size_t finished = 0;
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < parts_.size(); ++finished) {
      kernel(product_, parts_[i]);
      fill_borders(product_, parts_[i]);
    }
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    if ((done_ += finished) == parts_.size()) all_done_.notify_all();
  }

  // A part that is taken has a thread at work on it, so this ends even if no other thread of the pool is free.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == parts_.size(); });
  }

 private:
  const Product product_;
  const std::vector<Part> parts_;
  std::atomic<size_t> next_{0};
  size_t done_ = 0;
  std::mutex mutex_;
  std::condition_variable all_done_;
};

void compute(const Product& product, ffi::ThreadPool& pool) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  auto parts = cut(product, threads);
  const int64_t helpers = std::min<int64_t>(threads, parts.size()) - 1;
  auto work = std::make_shared<Work>(product, std::move(parts));
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->run(); });
  work->run();
  work->wait();
}

using Indices = ffi::BufferR1<ffi::S32>;
using Numbers = ffi::BufferR1<ffi::F32>;

struct Options {
  int64_t window_rows, window_columns, stride_down, stride_across, top, bottom, left, right;
  float residual_scale, residual_zero, y_zero;
  bool relu;
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
    if (n != p.batch * p.width || residual.element_type() != y->element_type()) return refuse("the residual is not like y");
    p.residual = residual.untyped_data();
  }
  p.residual_scale = o.residual_scale, p.residual_zero = o.residual_zero, p.y_zero = o.y_zero, p.relu = o.relu;
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
  compute(p, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace sa_plus_plus

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    sa_plus_plus::Options, ffi::StructMember<int64_t>("window_rows"), ffi::StructMember<int64_t>("window_columns"),
    ffi::StructMember<int64_t>("stride_down"), ffi::StructMember<int64_t>("stride_across"),
    ffi::StructMember<int64_t>("top"), ffi::StructMember<int64_t>("bottom"), ffi::StructMember<int64_t>("left"),
    ffi::StructMember<int64_t>("right"), ffi::StructMember<float>("residual_scale"),
    ffi::StructMember<float>("residual_zero"), ffi::StructMember<float>("y_zero"), ffi::StructMember<bool>("relu"));

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
