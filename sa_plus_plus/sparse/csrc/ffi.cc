// What XLA calls: describes its buffers, has them checked and the result computed on threads of our own.
#include <algorithm>
#include <chrono>
#include <limits>
#include <string>
#include <vector>

#include "run.h"
#include "sequence.h"
#include "thread_pool.h"
#include "validate.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace sa_plus_plus {
namespace {

ffi::Error refused(const char* what, const char* why) {
  return ffi::Error::InvalidArgument(std::string(what) + ": " + why);
}

ffi::Error outcome(const char* what, const char* why) {
  if (!why) return ffi::Error::Success();
  const auto code = why == kNoMemory ? ffi::ErrorCode::kResourceExhausted : ffi::ErrorCode::kInvalidArgument;
  return ffi::Error(code, std::string(what) + ": " + why);
}

int64_t threads_of(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// False for a type that no kernel knows; bytes are `byte`, with a sign or without.
bool describe(const ffi::AnyBuffer& buffer, Array* array, ffi::DataType byte = ffi::U8) {
  const ffi::DataType type = buffer.element_type();
  if (type != ffi::F32 && type != ffi::BF16 && type != byte) return false;
  array->type = type == ffi::F32 ? Type::kFloat : type == ffi::BF16 ? Type::kBfloat16 : Type::kByte;
  array->data = buffer.untyped_data();
  array->rank = buffer.dimensions().size(), array->sizes = buffer.dimensions().begin();
  return true;
}

constexpr char kUnknown[] = "an operand or the result is neither float32, bfloat16 nor bytes";

List<int32_t> list(const ffi::BufferR1<ffi::S32>& b) { return {b.typed_data(), b.dimensions()[0]}; }

List<float> list(const ffi::BufferR1<ffi::F32>& b) { return {b.typed_data(), b.dimensions()[0]}; }

ffi::Error convolution(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer blocks, ffi::BufferR1<ffi::S32> rows,
                       ffi::BufferR1<ffi::S32> starts, ffi::BufferR1<ffi::F32> scale, ffi::BufferR1<ffi::F32> bias,
                       ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> y, const ConvolutionOptions& options) {
  constexpr char what[] = "block-sparse product";
  ConvolutionArrays arrays{};
  if (!describe(x, &arrays.x) || !describe(blocks, &arrays.blocks, ffi::S8) || !describe(residual, &arrays.residual) ||
      !describe(*y, &arrays.y)) {
    return refused(what, kUnknown);
  }
  arrays.rows = list(rows), arrays.starts = list(starts), arrays.scale = list(scale), arrays.bias = list(bias);
  return outcome(what, compute(arrays, options, threads_of(pool)));
}

// The same where no weight in bytes is beyond -kNarrow to kNarrow.
ffi::Error narrow_convolution(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer blocks,
                              ffi::BufferR1<ffi::S32> rows, ffi::BufferR1<ffi::S32> starts,
                              ffi::BufferR1<ffi::F32> scale, ffi::BufferR1<ffi::F32> bias, ffi::AnyBuffer residual,
                              ffi::Result<ffi::AnyBuffer> y, const ConvolutionOptions& options) {
  ConvolutionOptions narrow = options;
  narrow.narrow = true;
  return convolution(pool, x, blocks, rows, starts, scale, bias, residual, y, narrow);
}

ffi::Error depthwise(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer kernel, ffi::BufferR1<ffi::F32> bias,
                     ffi::AnyBuffer residual, ffi::Result<ffi::AnyBuffer> y, const DepthwiseOptions& options) {
  constexpr char what[] = "depthwise convolution";
  DepthwiseArrays arrays{};
  if (!describe(x, &arrays.x) || !describe(kernel, &arrays.kernel) || !describe(residual, &arrays.residual) ||
      !describe(*y, &arrays.y)) {
    return refused(what, kUnknown);
  }
  arrays.bias = list(bias);
  return outcome(what, compute(arrays, options, threads_of(pool)));
}

// The largest number, or the sum, of each window of images; positions outside the images are ignored.
ffi::Error pool_images(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, const Windows& windows, bool sums) {
  Array from{}, to{};
  if (!describe(x, &from) || !describe(y, &to)) return refused("pooling", kUnknown);
  return outcome("pooling", compute(from, to, windows, sums, threads_of(pool)));
}

ffi::Error max_pool(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, const Windows& windows) {
  return pool_images(pool, x, *y, windows, false);
}

ffi::Error sum_pool(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y, const Windows& windows) {
  return pool_images(pool, x, *y, windows, true);
}

ffi::Error round_images(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y,
                        const Rounding& rounding) {
  Array from{}, to{};
  if (!describe(x, &from) || !describe(*y, &to)) return refused("round_images", kUnknown);
  return outcome("round_images", compute(from, to, rounding, threads_of(pool)));
}

ffi::Error look_up(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR1<ffi::S32> places,
                   ffi::Result<ffi::AnyBuffer> y) {
  Array from{}, to{};
  if (!describe(x, &from) || !describe(*y, &to)) return refused("lookup", kUnknown);
  return outcome("lookup", compute(from, list(places), to, threads_of(pool)));
}

ffi::Error layer_norm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR1<ffi::F32> scale,
                      ffi::BufferR1<ffi::F32> shift, ffi::Result<ffi::AnyBuffer> y,
                      const NormalizationOptions& options) {
  constexpr char what[] = "layer normalisation";
  NormalizationArrays arrays{};
  if (!describe(x, &arrays.x) || !describe(*y, &arrays.y)) return refused(what, kUnknown);
  arrays.scale = list(scale), arrays.shift = list(shift);
  return outcome(what, compute(arrays, options, threads_of(pool)));
}

using Integers = ffi::Span<const int64_t>;

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer bias,
                     ffi::Result<ffi::AnyBuffer> y, Integers sizes, Integers strides, float scale) {
  AttentionArrays arrays{};
  if (!describe(q, &arrays.q) || !describe(k, &arrays.k) || !describe(v, &arrays.v) || !describe(bias, &arrays.bias) ||
      !describe(*y, &arrays.y)) {
    return refused("attention", kUnknown);
  }
  const List<int64_t> lengths{sizes.begin(), static_cast<int64_t>(sizes.size())};
  const List<int64_t> steps{strides.begin(), static_cast<int64_t>(strides.size())};
  return outcome("attention", compute(arrays, lengths, steps, scale, threads_of(pool)));
}

// False for a type of which several numbers may share a byte.
bool add(const ffi::AnyBuffer& b, std::vector<Buffer>* buffers) {
  const ffi::DataType type = b.element_type();
  const bool known = type == ffi::F32 || type == ffi::BF16 || type == ffi::S8 || type == ffi::U8 || type == ffi::S32;
  buffers->push_back({b.untyped_data(), static_cast<int64_t>(b.size_bytes())});
  return known;
}

ffi::Error sequence(ffi::ThreadPool pool, ffi::RemainingArgs operands, ffi::RemainingRets results, Integers program) {
  constexpr char what[] = "sequence of kernels";
  std::vector<Buffer> buffers;
  bool known = true;
  for (size_t i = 0; i < operands.size(); ++i) known &= add(*operands.get<ffi::AnyBuffer>(i), &buffers);
  for (size_t i = 0; i < results.size(); ++i) known &= add(**results.get<ffi::AnyBuffer>(i), &buffers);
  if (!known) return refused(what, "an operand or a result is neither float32, bfloat16, bytes nor int32");
  const List<int64_t> steps{program.begin(), static_cast<int64_t>(program.size())};
  const Failure failure = run_sequence(steps, buffers, operands.size(), threads_of(pool));
  if (!failure.why) return ffi::Error::Success();
  const std::string step = std::string(what) + ", step " + std::to_string(failure.number) + " (" + failure.kind + ")";
  return outcome(step.c_str(), failure.why);
}

}  // namespace
}  // namespace sa_plus_plus

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sa_plus_plus_sequence, sa_plus_plus::sequence,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<ffi::Span<const int64_t>>("program"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sa_plus_plus::Rounding, ffi::StructMember<int64_t>("top"),
                                      ffi::StructMember<int64_t>("left"), ffi::StructMember<float>("scale"),
                                      ffi::StructMember<float>("zero"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_round_images, sa_plus_plus::round_images,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::Rounding>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sa_plus_plus_look_up, sa_plus_plus::look_up,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::BufferR1<ffi::S32>>().Ret<ffi::AnyBuffer>());

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sa_plus_plus::NormalizationOptions, ffi::StructMember<int64_t>("centred"),
                                      ffi::StructMember<float>("epsilon"), ffi::StructMember<float>("factor"),
                                      ffi::StructMember<float>("zero"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_layer_norm, sa_plus_plus::layer_norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::NormalizationOptions>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_attention, sa_plus_plus::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<ffi::Span<const int64_t>>("sizes")
                                  .Attr<ffi::Span<const int64_t>>("strides")
                                  .Attr<float>("scale"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sa_plus_plus::Windows, ffi::StructMember<int64_t>("window_rows"),
                                      ffi::StructMember<int64_t>("window_columns"),
                                      ffi::StructMember<int64_t>("stride_down"),
                                      ffi::StructMember<int64_t>("stride_across"), ffi::StructMember<int64_t>("top"),
                                      ffi::StructMember<int64_t>("left"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sa_plus_plus_max_pool, sa_plus_plus::max_pool,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attrs<sa_plus_plus::Windows>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    sa_plus_plus_sum_pool, sa_plus_plus::sum_pool,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Attrs<sa_plus_plus::Windows>());

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sa_plus_plus::ConvolutionOptions, ffi::StructMember<int64_t>("window_rows"),
                                      ffi::StructMember<int64_t>("window_columns"),
                                      ffi::StructMember<int64_t>("stride_down"),
                                      ffi::StructMember<int64_t>("stride_across"), ffi::StructMember<int64_t>("top"),
                                      ffi::StructMember<int64_t>("bottom"), ffi::StructMember<int64_t>("left"),
                                      ffi::StructMember<int64_t>("right"), ffi::StructMember<int64_t>("activation"),
                                      ffi::StructMember<float>("residual_scale"),
                                      ffi::StructMember<float>("residual_zero"), ffi::StructMember<float>("y_zero"),
                                      ffi::StructMember<float>("y_unit"));

static auto convolution_operands() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::BufferR1<ffi::S32>>()
      .Arg<ffi::BufferR1<ffi::S32>>()
      .Arg<ffi::BufferR1<ffi::F32>>()
      .Arg<ffi::BufferR1<ffi::F32>>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attrs<sa_plus_plus::ConvolutionOptions>();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_block_sparse_conv, sa_plus_plus::convolution, convolution_operands());
XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_narrow_block_sparse_conv, sa_plus_plus::narrow_convolution,
                              convolution_operands());

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(sa_plus_plus::DepthwiseOptions, ffi::StructMember<int64_t>("stride_down"),
                                      ffi::StructMember<int64_t>("stride_across"),
                                      ffi::StructMember<int64_t>("dilation_down"),
                                      ffi::StructMember<int64_t>("dilation_across"), ffi::StructMember<int64_t>("top"),
                                      ffi::StructMember<int64_t>("left"), ffi::StructMember<int64_t>("activation"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(sa_plus_plus_depthwise_conv, sa_plus_plus::depthwise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attrs<sa_plus_plus::DepthwiseOptions>());

// Of XLA's interface, as of the headers that this was compiled with.
extern "C" int sa_plus_plus_ffi_version() { return 1000 * XLA_FFI_API_MAJOR + XLA_FFI_API_MINOR; }

// The table of targets as JSON: its rows in order, types of x by their numbers.
extern "C" const char* sa_plus_plus_targets() {
  using namespace sa_plus_plus;
  static const std::string* text = [] {
    auto* json = new std::string("[");
    for (const Target& target : all_targets()) {
      std::string types;
      for (Type type : {Type::kFloat, Type::kBfloat16, Type::kByte}) {
        if (target.multiplies(type)) types += (types.empty() ? "" : ", ") + std::to_string(static_cast<int>(type));
      }
      if (json->size() > 1) *json += ", ";
      *json += std::string("{\"name\": \"") + target.name + "\", \"extends\": \"" + target.extends;
      *json += "\", \"supported\": " + std::to_string(target.supported) + ", \"types\": [" + types;
      *json += "], \"start\": " + std::to_string(target.start);
      *json += ", \"limit\": " + std::to_string(target.limit);
      *json += ", \"columns\": " + std::to_string(target.tile.lanes * target.tile.vectors) + "}";
    }
    *json += "]";
    return json;
  }();
  return text->c_str();
}

// The row of the table that products of x of a type run in: 0 for float32, 1 for bfloat16, 2 for bytes.
extern "C" int sa_plus_plus_target(int x_type) {
  using namespace sa_plus_plus;
  return &target_for(static_cast<Type>(x_type)) - all_targets().first;
}

// Only targets that the named one is or extends from now on, or all for null; 0 if this processor supports none of that
// name.
extern "C" int sa_plus_plus_limit_targets(const char* name) { return sa_plus_plus::limit_targets(name); }

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
    sa_plus_plus::target_for(p.x_type).functions->gemm(p, {0, rows, 0, p.kept});
    least = std::min(least, std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count());
  }
  return least;
}

extern "C" void sa_plus_plus_set_threads(int64_t threads) { sa_plus_plus::set_threads(threads); }
