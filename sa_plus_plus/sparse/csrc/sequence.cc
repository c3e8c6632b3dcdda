// The steps of sequence.h: read, checked and run.
#include "sequence.h"

#include <cstring>

#include "run.h"

namespace sa_plus_plus {
namespace {

constexpr int64_t kIntegers = 3;  // the type of int32
constexpr const char* kNames[] = {"product",
                                  "product of narrow weights",
                                  "depthwise convolution",
                                  "attention",
                                  "normalization",
                                  "max pooling",
                                  "sum pooling",
                                  "rounding",
                                  "lookup"};
static_assert(sizeof kNames / sizeof *kNames == static_cast<size_t>(Step::kCount));

// Takes a program apart. What it cannot read is zero or empty, and `wrong` says why.
class Reader {
 public:
  Reader(List<int64_t> program, const std::vector<Buffer>& buffers, int64_t operands)
      : program_(program), buffers_(buffers), operands_(operands) {}

  const char* wrong = nullptr;

  bool done() const { return wrong || at_ == program_.count; }

  int64_t integer() { return at_ < program_.count ? program_.data[at_++] : refuse("the program ends within a step"); }

  float number() {
    const auto bits = static_cast<uint32_t>(integer());
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }

  List<int64_t> integers() {
    const int64_t count = integer();
    if (count < 0 || count > program_.count - at_) return {nullptr, refuse("a list ends beyond the program")};
    at_ += count;
    return {program_.data + at_ - count, count};
  }

  Array operand() { return numbers(false); }

  Array result() { return numbers(true); }

  List<float> floats() {
    int64_t type;
    const Array array = part(&type, false);
    if (!wrong && type != static_cast<int64_t>(Type::kFloat)) refuse("a list that is not of floats");
    return wrong ? List<float>{nullptr, 0} : List<float>{static_cast<const float*>(array.data), array.count()};
  }

  // In memory that no step writes: what was checked must not change while it is used.
  List<int32_t> positions() {
    int64_t type;
    const Array array = part(&type, false);
    if (!wrong && (type != kIntegers || !constant_)) refuse("positions that are not an operand of the call in int32");
    const char* const from = static_cast<const char*>(array.data);
    for (size_t i = operands_; !wrong && i < buffers_.size(); ++i) {
      const char* const written = static_cast<const char*>(buffers_[i].data);
      if (from < written + buffers_[i].bytes && written < from + array.count() * sizeof(int32_t)) {
        refuse("positions in the memory of a result");
      }
    }
    return wrong ? List<int32_t>{nullptr, 0} : List<int32_t>{static_cast<const int32_t*>(array.data), array.count()};
  }

 private:
  int64_t refuse(const char* why) {
    if (!wrong) wrong = why;
    return 0;
  }

  // Of the types that kernels compute with.
  Array numbers(bool written) {
    int64_t type;
    const Array array = part(&type, written);
    if (!wrong && (type < 0 || type >= kIntegers)) refuse("an operand or a result of an unknown type");
    return array;
  }

  Array part(int64_t* type, bool written) {
    const int64_t buffer = integer(), offset = integer();
    *type = integer();
    const int64_t rank = integer();
    Array array{Type::kByte, nullptr, 0, nullptr};
    if (wrong) return array;
    if (buffer < 0 || buffer >= static_cast<int64_t>(buffers_.size())) return refuse("there is no such buffer"), array;
    constant_ = buffer < operands_;
    if (written && constant_) return refuse("a result in an operand of the call"), array;
    if (*type >= 0 && *type < kIntegers) array.type = static_cast<Type>(*type);
    if (rank < 0 || rank > program_.count - at_) return refuse("a wrong number of sizes"), array;
    array.rank = rank, array.sizes = program_.data + at_;
    at_ += rank;
    for (int64_t i = 0; i < rank; ++i) {
      if (array.sizes[i] < 0) return refuse("a negative size"), array;
    }
    const int64_t size = *type == kIntegers ? sizeof(int32_t) : size_of(array.type);
    if (offset < 0 || offset % size || plus(offset, times(array.count(), size)) > buffers_[buffer].bytes) {
      return refuse("a part that is not in its buffer"), array;
    }
    array.data = static_cast<char*>(buffers_[buffer].data) + offset;
    return array;
  }

  const List<int64_t> program_;
  const std::vector<Buffer>& buffers_;
  const int64_t operands_;
  int64_t at_ = 0;
  bool constant_ = false;  // whether the last part is of an operand of the call
};

const char* convolution(Reader& r, bool narrow, int64_t threads) {
  ConvolutionArrays a{};
  a.x = r.operand(), a.blocks = r.operand(), a.rows = r.positions(), a.starts = r.positions();
  a.scale = r.floats(), a.bias = r.floats(), a.residual = r.operand(), a.y = r.result();
  ConvolutionOptions o{};
  o.activation = r.integer(), o.bottom = r.integer(), o.left = r.integer();
  o.residual_scale = r.number(), o.residual_zero_point = r.number(), o.right = r.integer();
  o.stride_across = r.integer(), o.stride_down = r.integer(), o.top = r.integer();
  o.window_columns = r.integer(), o.window_rows = r.integer();
  o.y_unit = r.number(), o.y_zero_point = r.number(), o.narrow = narrow;
  return r.wrong ? r.wrong : compute(a, o, threads);
}

const char* depthwise(Reader& r, int64_t threads) {
  DepthwiseArrays a{};
  a.x = r.operand(), a.kernel = r.operand(), a.bias = r.floats(), a.residual = r.operand(), a.y = r.result();
  DepthwiseOptions o{};
  o.activation = r.integer(), o.dilation_across = r.integer(), o.dilation_down = r.integer(), o.left = r.integer();
  o.stride_across = r.integer(), o.stride_down = r.integer(), o.top = r.integer();
  return r.wrong ? r.wrong : compute(a, o, threads);
}

const char* attention(Reader& r, int64_t threads) {
  AttentionArrays a{};
  a.q = r.operand(), a.k = r.operand(), a.v = r.operand(), a.bias = r.operand(), a.y = r.result();
  const float scale = r.number();
  const List<int64_t> sizes = r.integers(), strides = r.integers();
  return r.wrong ? r.wrong : compute(a, sizes, strides, scale, threads);
}

const char* normalization(Reader& r, int64_t threads) {
  NormalizationArrays a{};
  a.x = r.operand(), a.scale = r.floats(), a.shift = r.floats(), a.y = r.result();
  NormalizationOptions o{};
  o.centred = r.integer(), o.epsilon = r.number(), o.factor = r.number(), o.zero_point = r.number();
  return r.wrong ? r.wrong : compute(a, o, threads);
}

const char* pooling(Reader& r, bool sums, int64_t threads) {
  const Array x = r.operand(), y = r.result();
  Windows o{};
  o.left = r.integer(), o.stride_across = r.integer(), o.stride_down = r.integer(), o.top = r.integer();
  o.window_columns = r.integer(), o.window_rows = r.integer();
  return r.wrong ? r.wrong : compute(x, y, o, sums, threads);
}

const char* rounding(Reader& r, int64_t threads) {
  const Array x = r.operand(), y = r.result();
  Rounding o{};
  o.left = r.integer(), o.scale = r.number(), o.top = r.integer(), o.zero_point = r.number();
  return r.wrong ? r.wrong : compute(x, y, o, threads);
}

const char* look_up(Reader& r, int64_t threads) {
  const Array x = r.operand();
  const List<int32_t> places = r.positions();
  const Array y = r.result();
  return r.wrong ? r.wrong : compute(x, places, y, threads);
}

const char* step(Reader& r, int64_t kind, int64_t threads) {
  switch (static_cast<Step>(kind)) {
    case Step::kConvolution: return convolution(r, false, threads);
    case Step::kNarrowConvolution: return convolution(r, true, threads);
    case Step::kDepthwise: return depthwise(r, threads);
    case Step::kAttention: return attention(r, threads);
    case Step::kNormalization: return normalization(r, threads);
    case Step::kMaxPooling: return pooling(r, false, threads);
    case Step::kSumPooling: return pooling(r, true, threads);
    case Step::kRounding: return rounding(r, threads);
    case Step::kLookup: return look_up(r, threads);
    default: return "there is no such step";
  }
}

}  // namespace

Failure run_sequence(List<int64_t> program, const std::vector<Buffer>& buffers, int64_t operands, int64_t threads) {
  Reader reader(program, buffers, operands);
  for (int64_t number = 0; !reader.done(); ++number) {
    const int64_t kind = reader.integer();
    if (const char* why = step(reader, kind, threads)) {
      const bool known = kind >= 0 && kind < static_cast<int64_t>(Step::kCount);
      return {why, number, known ? kNames[kind] : "unknown"};
    }
  }
  return {nullptr, 0, ""};
}

}  // namespace sa_plus_plus
