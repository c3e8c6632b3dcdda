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

constexpr int64_t kRowsAtOnce = 48;              // of x: few enough to stay in the second-level cache
constexpr int64_t kWorthAThread = int64_t{1} << 18;  // multiplications; waking a thread takes some microseconds

// Bands of rows, and in each as many groups of columns as give every thread something to do to the end.
std::vector<Part> cut(const Product& p, int64_t threads) {
  const int64_t work = p.batch * p.kept * p.b_r * p.b_c;
  const int64_t bands = (p.batch + kRowsAtOnce - 1) / kRowsAtOnce;
  const int64_t wanted = threads < 2 ? 1 : std::clamp<int64_t>(work / kWorthAThread, 1, 4 * threads);
  const int64_t groups = std::min((wanted + bands - 1) / std::max<int64_t>(bands, 1), p.grid_c());
  std::vector<int64_t> bounds{0};
  for (int64_t g = 1, j = 0; g < groups; ++g) {  // a column costs its blocks, and one for storing
    while (j < p.grid_c() && (p.starts[j] + j) * groups < (p.kept + p.grid_c()) * g) ++j;
    if (j > bounds.back()) bounds.push_back(j);
  }
  if (bounds.back() < p.grid_c()) bounds.push_back(p.grid_c());
  std::vector<Part> parts;
  for (int64_t top = 0; top < p.batch; top += kRowsAtOnce) {
    for (size_t g = 0; g + 1 < bounds.size(); ++g) {
      parts.push_back({top, std::min(p.batch, top + kRowsAtOnce), bounds[g], bounds[g + 1]});
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

ffi::Error block_sparse_matmul(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer blocks,
                               ffi::BufferR1<ffi::S32> rows, ffi::BufferR1<ffi::S32> starts,
                               ffi::BufferR1<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> y, bool relu) {
  auto refuse = [](std::string why) { return ffi::Error::InvalidArgument("block_sparse_matmul: " + std::move(why)); };
  const auto across = x.dimensions(), kept = blocks.dimensions(), out = y->dimensions();
  if (across.size() < 1 || out.size() < 1 || kept.size() != 3) return refuse("a buffer has too few dimensions");
  const bool half = blocks.element_type() == ffi::BF16;
  if (!half && blocks.element_type() != ffi::F32) return refuse("blocks are neither float32 nor bfloat16");
  const int64_t biases = bias.element_count();
  const Product product{all_but_last(across), across.back(), out.back(), kept[1], kept[2], kept[0], x.typed_data(),
                        blocks.untyped_data(), half, rows.typed_data(), starts.typed_data(),
                        biases ? bias.typed_data() : nullptr, relu, y->typed_data()};
  if (all_but_last(out) != product.batch) return refuse("x and y have different leading dimensions");
  if (biases && biases != product.width) return refuse("bias is not as long as y is wide");
  if (kept[1] < 1 || kept[2] < 1 || static_cast<int64_t>(rows.element_count()) != kept[0] ||
      static_cast<int64_t>(starts.element_count()) != product.grid_c() + 1) {
    return refuse("the indices are not those of the blocks");
  }
  if (const char* why = complaint(product)) return refuse(why);
  if (product.batch) compute(product, pool);
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

// Of XLA's interface, as of the headers that this was compiled with.
extern "C" int sa_plus_plus_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }
