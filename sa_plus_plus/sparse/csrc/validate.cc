// The checks of validate.h, in arithmetic that cannot overflow.
#include "validate.h"

#include <algorithm>
#include <utility>

namespace sa_plus_plus {

int64_t Array::count() const {
  if (std::find(sizes, sizes + rank, 0) != sizes + rank) return 0;
  int64_t count = 1;
  for (int64_t i = 0; i < rank; ++i) count = times(count, sizes[i]);
  return count;
}

namespace {

constexpr int64_t kFar = int64_t{1} << 60;  // positions this far apart can still be added

// Positions of windows along an axis; the last of them, if there are any, ends within `size`.
bool fit(int64_t positions, int64_t stride, int64_t window, int64_t size) {
  return !positions || plus(times(positions - 1, stride), window) <= size;
}

bool is_byte(float number) { return number >= 0 && number <= 255; }  // false for NaN

}  // namespace

const char* prepare(const ConvolutionArrays& arrays, const ConvolutionOptions& o, Convolution* convolution) {
  const Array &x = arrays.x, &y = arrays.y, &blocks = arrays.blocks;
  if (x.rank != 4 || y.rank != 4) return "x and y need four dimensions";
  const int64_t *in = x.sizes, *out = y.sizes, *kept = blocks.sizes, channels = in[3];
  const char* const misfit = "the result does not fit the images";
  if (o.window_rows < 1 || o.window_columns < 1 || o.stride_down < 1 || o.stride_across < 1 || in[0] != out[0])
    return misfit;
  if (std::min({o.top, o.bottom, o.left, o.right}) < 0 || o.top > out[1] || o.bottom > out[1] - o.top ||
      o.left > out[2] || o.right > out[2] - o.left) {
    return misfit;
  }
  Product& p = convolution->product = {};
  p.top = o.top, p.bottom = o.bottom, p.left = o.left, p.right = o.right;
  p.lines = out[1] - o.top - o.bottom, p.line = out[2] - o.left - o.right;
  if (!fit(p.lines, o.stride_down, o.window_rows, in[1]) || !fit(p.line, o.stride_across, o.window_columns, in[2]))
    return misfit;
  p.x_type = x.type, p.w_type = blocks.type, p.y_type = y.type, p.y = y.data;
  p.residual_scale = o.residual_scale, p.residual_zero_point = o.residual_zero_point, p.y_zero_point = o.y_zero_point,
  p.y_unit = o.y_unit;
  if (p.y_type == Type::kByte && !is_byte(o.y_zero_point)) return "the zero point is not a byte";
  if (o.activation < 0 || o.activation >= static_cast<int64_t>(Activation::kCount)) return "an unknown activation";
  p.activation = static_cast<Activation>(o.activation), p.narrow = o.narrow;
  if (blocks.rank != (p.grouped() ? 4 : 3)) return "blocks have the wrong number of dimensions";
  convolution->count = y.count();
  if (!convolution->count || !p.lines || !p.line) return nullptr;

  // All sizes of y are real from here on, and so are those of x, unless it has no channels.
  p.batch = in[0] * p.lines * p.line, p.width = out[3];
  p.height = times(times(o.window_rows, o.window_columns), channels);
  p.kept = kept[0], p.b_r = p.grouped() ? times(kept[1], kept[3]) : kept[1], p.b_c = kept[2];
  if (p.b_r < 1 || p.b_c < 1 || (p.grouped() && kept[3] != p.group())) return "blocks are empty, or not grouped";
  if (!p.kept) {  // as if x had no columns: without blocks their size is arbitrary
    p.height = 0, p.b_r = p.group(), p.b_c = std::min(p.b_c, (p.width + kWide - 1) / kWide * kWide);
  }
  p.x = x.data, p.blocks = blocks.data, p.rows = arrays.rows.data, p.starts = arrays.starts.data;
  if (arrays.rows.count != p.kept || arrays.starts.count != p.grid_c() + 1)
    return "rows and starts do not match the number of blocks";
  for (const List<float>& numbers : {arrays.scale, arrays.bias}) {
    if (numbers.count && numbers.count != p.width) return "scale and bias need one number for each column of y";
  }
  p.scale = arrays.scale.count ? arrays.scale.data : nullptr;
  p.bias = arrays.bias.count ? arrays.bias.data : nullptr;
  if (const int64_t n = arrays.residual.count()) {
    if (n != p.batch * p.width) return "the residual does not have the size of y";
    p.residual = arrays.residual.data, p.residual_type = arrays.residual.type;
  }
  // A single position has no stride. Rows of x follow one another in a line of y; where nothing lies between lines or
  // images, beyond it as well.
  const int64_t down = p.lines > 1 ? o.stride_down : 1, right = p.line > 1 ? o.stride_across : 1;
  const bool lines_adjoin = down == 1 && right == 1 && o.window_columns == 1 && p.line == in[2];
  const bool images_adjoin = lines_adjoin && p.lines == in[1];
  const int64_t line = in[2] * channels, across = o.window_columns * channels;
  p.stride = right * channels;
  p.run = images_adjoin ? p.batch : lines_adjoin ? p.lines * p.line : p.line;
  p.runs = lines_adjoin ? 1 : p.lines;
  p.run_stride = down * line, p.runs_stride = in[1] * line;
  if (const char* why = validate(p)) return why;
  if (p.height && across % p.b_r && o.window_rows > 1) return "a block spans two rows of the window";
  convolution->down.resize(p.grid_r());
  int64_t at = 0, top = 0;  // in a row of the window, and where that begins
  for (int64_t& down : convolution->down) {
    down = top + at;
    if ((at += p.b_r) >= across) at = 0, top += line;
  }
  p.down = convolution->down.data();
  return nullptr;
}

const char* validate(const Product& p) {
  if (p.batch < 0 || p.height < 0 || p.width < 1 || p.b_r < 1 || p.b_c < 1 || p.kept < 0 || p.run < 1 || p.runs < 1 ||
      p.line < 1 || p.lines < 1 || p.top < 0 || p.bottom < 0 || p.left < 0 || p.right < 0) {
    return "a size is out of range";
  }
  if (p.x_type == Type::kFloat ? p.w_type == Type::kByte : p.w_type != p.x_type) return "types of x and blocks differ";
  if (p.grouped() && (p.b_r % p.group() || p.b_c % kWide || p.height % p.b_r)) return "blocks do not fit their groups";
  const int64_t grid_r = p.grid_r(), grid_c = p.grid_c();
  if (p.starts[0] != 0 || p.starts[grid_c] != p.kept) return "starts must begin at 0 and end at the number of blocks";
  bool wrong = false;
  for (int64_t j = 0; j < grid_c; ++j) wrong |= p.starts[j] > p.starts[j + 1];
  if (wrong) return "starts must be non-decreasing";
  uint32_t most = 0;  // a negative row is among the largest without a sign
  for (int64_t at = 0; at < p.kept; ++at) most = std::max(most, static_cast<uint32_t>(p.rows[at]));
  wrong = p.kept && most >= std::min<int64_t>(grid_r, int64_t{1} << 31);
  return wrong ? "the row of a block is outside the grid" : nullptr;
}

const char* prepare(const Array& x, const Array& y, const Windows& o, bool sums, Pooling* pooling) {
  if (x.rank != 4 || y.rank != 4) return "x and y need four dimensions";
  const int64_t *in = x.sizes, *out = y.sizes;
  if (in[0] != out[0] || in[3] != out[3] || x.type != y.type || (sums && x.type != Type::kFloat))
    return "x and y have incompatible shapes or types";
  if (std::min({o.window_rows, o.window_columns, o.stride_down, o.stride_across}) < 1 || std::min(o.top, o.left) < 0) {
    return "a window, stride or padding is out of range";
  }
  Pooling& p = *pooling = {};
  p.type = x.type, p.sums = sums, p.x = x.data, p.y = y.data;
  if (!y.count()) return nullptr;
  if (!fit(out[1], o.stride_down, o.window_rows, kFar) || !fit(out[2], o.stride_across, o.window_columns, kFar) ||
      std::max(o.top, o.left) > kFar) {
    return "a window, stride or padding is out of range";
  }
  const bool empty = !x.count();  // then all windows are
  p.rows = empty ? 0 : in[1], p.columns = empty ? 0 : in[2], p.channels = in[3];
  p.lines = out[0] * out[1], p.y_rows = out[1], p.y_columns = out[2];
  p.window_rows = o.window_rows, p.window_columns = o.window_columns, p.top = o.top, p.left = o.left;
  p.stride_down = out[1] > 1 ? o.stride_down : 1, p.stride_across = out[2] > 1 ? o.stride_across : 1;
  return nullptr;
}

const char* prepare(const DepthwiseArrays& arrays, const DepthwiseOptions& o, Depthwise* depthwise) {
  const Array &x = arrays.x, &y = arrays.y, &kernel = arrays.kernel;
  if (x.rank != 4 || y.rank != 4 || kernel.rank != 3) return "x and y need four dimensions, the kernel three";
  if (x.type != Type::kFloat || kernel.type != Type::kFloat || y.type != Type::kFloat)
    return "x, the kernel and y need to be float32";
  if (o.activation < 0 || o.activation >= static_cast<int64_t>(Activation::kCount)) return "an unknown activation";
  const int64_t *in = x.sizes, *out = y.sizes, *window = kernel.sizes;
  if (in[0] != out[0] || window[2] != out[3]) return "x, the kernel and y have incompatible shapes";
  Depthwise& d = *depthwise = {};
  if (!y.count()) return nullptr;
  const char* const misfit = "a window, stride, dilation or padding is out of range";
  if (std::min({window[0], window[1], o.stride_down, o.stride_across, o.dilation_down, o.dilation_across}) < 1)
    return misfit;
  if (std::min(o.top, o.left) < 0 || std::max(o.top, o.left) > kFar) return misfit;
  const int64_t reach_down = times(window[0] - 1, o.dilation_down),
                reach_across = times(window[1] - 1, o.dilation_across);
  if (!fit(out[1], o.stride_down, plus(reach_down, 1), kFar) ||
      !fit(out[2], o.stride_across, plus(reach_across, 1), kFar))
    return misfit;
  if (!in[3] || out[3] % in[3]) return "the outputs are not a multiple of the channels";
  const bool empty = !x.count();  // then all sums are
  d.rows = empty ? 0 : in[1], d.columns = empty ? 0 : in[2], d.channels = in[3], d.multiplier = out[3] / in[3];
  d.lines = out[0] * out[1], d.y_rows = out[1], d.y_columns = out[2], d.window_rows = window[0],
  d.window_columns = window[1];
  d.stride_down = out[1] > 1 ? o.stride_down : 1, d.stride_across = out[2] > 1 ? o.stride_across : 1;
  d.dilation_down = window[0] > 1 ? o.dilation_down : 1, d.dilation_across = window[1] > 1 ? o.dilation_across : 1;
  d.top = o.top, d.left = o.left, d.activation = static_cast<Activation>(o.activation);
  d.x = static_cast<const float*>(x.data), d.kernel = static_cast<const float*>(kernel.data),
  d.y = static_cast<float*>(y.data);
  if (arrays.bias.count && arrays.bias.count != out[3]) return "the bias needs one number for each channel of y";
  d.bias = arrays.bias.count ? arrays.bias.data : nullptr;
  if (const int64_t n = arrays.residual.count()) {
    if (n != y.count() || arrays.residual.type != Type::kFloat)
      return "the residual does not have the size and type of y";
    d.residual = static_cast<const float*>(arrays.residual.data);
  }
  return nullptr;
}

const char* prepare(const Array& x, const Array& y, const Rounding& o, Images* images) {
  if (x.rank != 4 || y.rank != 4) return "x and y need four dimensions";
  const int64_t *in = x.sizes, *out = y.sizes;
  if (x.type != Type::kFloat || in[0] != out[0] || in[1] > out[1] || in[2] > out[2] || in[3] > out[3] ||
      std::min(o.top, o.left) < 0 || o.top > out[1] - in[1] || o.left > out[2] - in[2]) {
    return "x and y have incompatible shapes or types";
  }
  if (y.type == Type::kByte && !is_byte(o.zero_point)) return "the zero point is not a byte";
  const int64_t lines = y.count() ? out[0] * out[1] : 0;  // so that all sizes are real where there are any
  *images = {y.type, static_cast<const float*>(x.data), y.data, lines, in[1], in[2], in[3], out[1], out[2], out[3], o};
  return nullptr;
}

const char* prepare(const Array& x, List<int32_t> places, const Array& y, Lookup* lookup) {
  const bool alike = x.rank >= 1 && x.rank == y.rank && x.type == y.type;
  if (!alike || !std::equal(x.sizes, x.sizes + x.rank - 1, y.sizes)) return "x and y have incompatible shapes or types";
  const int64_t columns = x.sizes[x.rank - 1], y_columns = y.sizes[y.rank - 1];
  if (places.count != y_columns) return "places need one number for each column of y";
  for (int64_t k = 0; k < places.count; ++k) {
    if (places.data[k] < 0 || places.data[k] >= columns) return "a place is not a column of x";
  }
  *lookup = {x.type, x.data, places.data, y.data, y_columns ? y.count() / y_columns : 0, columns, y_columns};
  return nullptr;
}

const char* prepare(const NormalizationArrays& arrays, const NormalizationOptions& o, Normalization* normalization) {
  const Array &x = arrays.x, &y = arrays.y;
  if (x.rank < 1 || x.rank != y.rank || !std::equal(x.sizes, x.sizes + x.rank, y.sizes)) {
    return "x and y have incompatible shapes";
  }
  if (x.type == Type::kByte) return "x is neither float32 nor bfloat16";
  if (y.type == Type::kByte && !is_byte(o.zero_point)) return "the zero point is not a byte";
  Normalization& n = *normalization = {};
  n.x_type = x.type, n.y_type = y.type, n.x = x.data, n.y = y.data;
  n.centred = o.centred, n.epsilon = o.epsilon, n.factor = o.factor, n.zero_point = o.zero_point;
  const int64_t count = y.count();
  if (!count) return nullptr;
  n.columns = x.sizes[x.rank - 1], n.rows = count / n.columns;
  n.scale = arrays.scale.data, n.shift = arrays.shift.data;
  const bool fit = arrays.scale.count == n.columns && arrays.shift.count == n.columns;
  return fit ? nullptr : "scale and shift need one number for each column of y";
}

const char* prepare(const AttentionArrays& arrays, List<int64_t> sizes, List<int64_t> strides, float scale,
                    Attention* attention) {
  if (sizes.count != 8 || strides.count != 20) return "wrong number of sizes or strides";
  Attention& a = *attention = {};
  const Array *q = &arrays.q, *k = &arrays.k, *v = &arrays.v, *y = &arrays.y;
  for (const Array* other : {k, v, y}) {
    if (other->type != q->type) return "q, k, v and y are of different types";
  }
  if (arrays.bias.type != Type::kFloat) return "the bias is not float32";
  a.type = q->type, a.scale = scale;
  std::copy_n(sizes.data, 3, a.heads);
  a.queries = sizes.data[3], a.keys = sizes.data[4], a.depth = sizes.data[5], a.width = sizes.data[6];
  a.seen = sizes.data[7];
  Attention::Place* places[] = {&a.q_at, &a.k_at, &a.v_at, &a.bias_at, &a.y_at};
  for (int i = 0; i < 5; ++i) {
    std::copy_n(strides.data + 4 * i, 3, places[i]->head);
    places[i]->row = strides.data[4 * i + 3];
  }
  a.q = q->data, a.k = k->data, a.v = v->data, a.y = y->data;
  const int64_t counts[] = {q->count(), k->count(), v->count(), arrays.bias.count(), y->count()};
  a.bias = counts[3] ? static_cast<const float*>(arrays.bias.data) : nullptr;
  return validate(a, counts);
}

namespace {

// Whether rows of `last` numbers in each head are all of an array, each number once: in order of its stride, each axis
// begins where those before it end.
bool covers(const Attention& a, const Attention::Place& place, int64_t rows, int64_t last, int64_t count) {
  std::pair<int64_t, int64_t> axes[] = {
      {place.head[0], a.heads[0]}, {place.head[1], a.heads[1]}, {place.head[2], a.heads[2]}, {place.row, rows}};
  std::sort(std::begin(axes), std::end(axes));
  for (const auto& [stride, size] : axes) {
    if (size == 1) continue;
    if (stride != last) return false;
    last = times(last, size);
  }
  return last == count;
}

}  // namespace

const char* validate(const Attention& a, const int64_t counts[5]) {
  if (a.type == Type::kByte) return "q, k, v and y are neither float32 nor bfloat16";
  const int64_t least = std::min({a.heads[0], a.heads[1], a.heads[2], a.queries, a.keys, a.depth, a.width, a.seen});
  if (least < 1 || a.seen > a.keys) return "an axis is empty, or the number of keys that a query sees is out of range";
  const Attention::Place* places[] = {&a.q_at, &a.k_at, &a.v_at, &a.bias_at, &a.y_at};
  const int64_t rows[] = {a.queries, a.keys, a.keys, a.queries, a.queries};
  const int64_t lasts[] = {a.depth, a.depth, a.width, a.keys, a.width};
  for (int i = 0; i < 5; ++i) {
    if (i == 3 && !a.bias) continue;
    if (places[i]->row < 0) return "a stride is negative";
    int64_t end = plus(times(rows[i] - 1, places[i]->row), lasts[i]);
    for (int h = 0; h < 3; ++h) {
      if (places[i]->head[h] < 0) return "a stride is negative";
      end = plus(end, times(a.heads[h] - 1, places[i]->head[h]));
    }
    if (end > counts[i]) return "an operand is too small";
  }
  // So scratch memory is not much more than that of keys and values.
  if (a.keys > 1 && (a.k_at.row < a.depth || a.v_at.row < a.width)) return "keys or values overlap";
  return covers(a, a.y_at, a.queries, a.width, counts[4]) ? nullptr : "the strides leave parts of the result unwritten";
}

int64_t scratch_of(const Attention& a) {
  constexpr int64_t rows = kMostScores;
  auto whole = [](int64_t n) { return (n + kMostPanel - 1) / kMostPanel * kMostPanel; };
  return whole(a.keys) * (a.depth + rows) + whole(a.width) * (a.keys + rows) + a.depth * rows;
}

}  // namespace sa_plus_plus
