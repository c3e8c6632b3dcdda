// What XLA calls: checks the buffers, cuts the product into parts and computes them on XLA's own threads.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sa_plus_plus {
namespace {

constexpr int64_t kRowsAtOnce = 48;                  // of x: few enough to stay in the second-level cache
constexpr int64_t kWorthAThread = int64_t{1} << 18;  // multiplications; waking a thread takes some microseconds

// Bands of rows, and in each as many groups of columns as give every thread something to do to the end.
std::vector<Part> cut(const Product& p, int64_t threads) {
  const int64_t work = p.batch * p.kept * p.b_r * p.b_c;
  const int64_t band = p.run < p.batch ? p.run * std::max<int64_t>(1, kRowsAtOnce / p.run) : kRowsAtOnce;
  const int64_t bands = (p.batch + band - 1) / band;
  const int64_t wanted = threads < 2 ? 1 : std::clamp<int64_t>(work / kWorthAThread, 1, 4 * threads);
  const int64_t groups = std::min((wanted + bands - 1) / std::max<int64_t>(bands, 1), p.grid_c());
  std::vector<int64_t> bounds{0};
  for (int64_t g = 1, j = 0; g < groups; ++g) {  // a column costs its blocks, and one for storing
    while (j < p.grid_c() && (p.starts[j] + j) * groups < (p.kept + p.grid_c()) * g) ++j;
    if (j > bounds.back()) bounds.push_back(j);
  }
  if (bounds.back() < p.grid_c()) bounds.push_back(p.grid_c());
  std::vector<Part> parts;
  for (int64_t top = 0; top < p.batch; top += band) {
    for (size_t g = 0; g + 1 < bounds.size(); ++g) {
      parts.push_back({top, std::min(p.batch, top + band), bounds[g], bounds[g + 1]});
    }
  }
  return parts;
}

// The parts of one call. Threads take them one by one; one that comes when all are taken touches no buffer.
class Work {
 public:
  Work(const Product& product, std::vector<Part> parts) : product_(product), parts_(std::move(parts)) {}

  void run() {
    static const Kernel kernel = best_kernel();
    size_t finished = 0;
    for (size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < parts_.size(); ++finished) {
      kernel(product_, parts_[i]);
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

int64_t all_but_last(ffi::AnyBuffer::Dimensions dims) {
  int64_t product = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) product *= dims[i];
  return product;
}

using Floats = ffi::Buffer<ffi::F32>;
using Indices = ffi::BufferR1<ffi::S32>;

// The product without x and y, of which `height` and `width` are known; or what is wrong with it.
ffi::ErrorOr<Product> product_of(int64_t batch, int64_t height, int64_t width, ffi::AnyBuffer blocks, Indices rows,
                                 Indices starts, ffi::BufferR1<ffi::F32> bias, bool relu) {
  auto refuse = [](const char* why) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(std::string("block-sparse product: ") + why));
  };
  const auto kept = blocks.dimensions();
  const bool half = blocks.element_type() == ffi::BF16;
  if (!half && blocks.element_type() != ffi::F32) return refuse("blocks are neither float32 nor bfloat16");
  if (kept.size() != 3 || kept[1] < 1 || kept[2] < 1) return refuse("blocks have no third dimension, or are empty");
  const int64_t biases = bias.element_count();
  if (biases && biases != width) return refuse("bias is not as long as y is wide");
  Product p{};
  p.batch = batch, p.height = height, p.width = width, p.b_r = kept[1], p.b_c = kept[2], p.kept = kept[0];
  p.blocks = blocks.untyped_data(), p.half = half, p.rows = rows.typed_data(), p.starts = starts.typed_data();
  p.bias = biases ? bias.typed_data() : nullptr, p.relu = relu;
  p.run = std::max<int64_t>(1, batch), p.stride = height, p.runs = 1;
  if (static_cast<int64_t>(rows.element_count()) != p.kept ||
      static_cast<int64_t>(starts.element_count()) != p.grid_c() + 1) {
    return refuse("the indices are not those of the blocks");
  }
  if (const char* why = complaint(p)) return refuse(why);
  return p;
}

ffi::Error block_sparse_matmul(ffi::ThreadPool pool, Floats x, ffi::AnyBuffer blocks, Indices rows, Indices starts,
                               ffi::BufferR1<ffi::F32> bias, ffi::Result<Floats> y, bool relu) {
  const auto across = x.dimensions(), out = y->dimensions();
  if (across.size() < 1 || out.size() < 1 || all_but_last(across) != all_but_last(out)) {
    return ffi::Error::InvalidArgument("block-sparse product: x and y have different leading dimensions");
  }
  auto p = product_of(all_but_last(across), across.back(), out.back(), blocks, rows, starts, bias, relu);
  if (p.has_error()) return p.error();
  std::vector<int64_t> down(p->grid_r());
  for (int64_t i = 0; i < p->grid_r(); ++i) down[i] = i * p->b_r;
  p->x = x.typed_data(), p->y = y->typed_data(), p->down = down.data();
  if (p->batch) compute(*p, pool);
  return ffi::Error::Success();
}

// x (images, rows, columns, channels), padded already; a block's rows are of one place in the window.
ffi::Error block_sparse_conv(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::AnyBuffer blocks, Indices rows,
                             Indices starts, ffi::BufferR1<ffi::F32> bias, ffi::ResultBufferR4<ffi::F32> y,
                             int64_t window_rows, int64_t window_columns, int64_t stride_down, int64_t stride_across,
                             bool relu) {
  const auto in = x.dimensions(), out = y->dimensions();
  const int64_t channels = in[3], line = in[2] * channels;
  if (window_rows < 1 || window_columns < 1 || stride_down < 1 || stride_across < 1 || in[0] != out[0] || !channels ||
      (out[1] - 1) * stride_down + window_rows > in[1] || (out[2] - 1) * stride_across + window_columns > in[2]) {
    return ffi::Error::InvalidArgument("block-sparse convolution: the result does not fit the images");
  }
  auto p = product_of(out[0] * out[1] * out[2], window_rows * window_columns * channels, out[3], blocks, rows, starts,
                      bias, relu);
  if (p.has_error()) return p.error();
  if (channels % p->b_r) return ffi::Error::InvalidArgument("block-sparse convolution: a block is in two places");
  std::vector<int64_t> down(p->grid_r());
  for (int64_t i = 0; i < p->grid_r(); ++i) {
    const int64_t place = i * p->b_r / channels;
    down[i] = place / window_columns * line + place % window_columns * channels + i * p->b_r % channels;
  }
  p->x = x.typed_data(), p->y = y->typed_data(), p->down = down.data();
  if (!p->batch) return ffi::Error::Success();
  p->run = out[2], p->stride = stride_across * channels;
  p->runs = out[1], p->run_stride = stride_down * line, p->runs_stride = in[1] * line;
  compute(*p, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace sa_plus_plus

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_block_sparse_matmul, sa_plus_plus::block_sparse_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("relu"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_block_sparse_conv, sa_plus_plus::block_sparse_conv,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Attr<int64_t>("window_rows")
                                  .Attr<int64_t>("window_columns")
                                  .Attr<int64_t>("stride_down")
                                  .Attr<int64_t>("stride_across")
                                  .Attr<bool>("relu"));

// Of XLA's interface, as of the headers that this was compiled with.
extern "C" int sa_plus_plus_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }
