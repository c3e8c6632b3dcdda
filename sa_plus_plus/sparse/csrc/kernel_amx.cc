// Products of bytes and of bfloat16 by matrix registers: tiles of up to 16 rows, whose sums stay in registers over
// all blocks of 16 columns.
#if defined(__x86_64__) && defined(__linux__)
#include <immintrin.h>

#include "finish.inc"

namespace sa_plus_plus {
namespace {

constexpr int kSums = 6;  // registers 0 to 5: tiles of sums
#define LEFT 6   // that of x, and that of blocks; gcc takes them as text
#define RIGHT 7

// Register i has `rows[i]` rows of `bytes[i]` bytes.
struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  Config(int64_t tall, int64_t depth) {  // in bytes
    for (int i = 0; i < kSums; ++i) rows[i] = tall, bytes[i] = 4 * kWide;
    rows[LEFT] = tall, bytes[LEFT] = depth;
    rows[RIGHT] = depth / 4, bytes[RIGHT] = 4 * kWide;
  }
};

// The longest stretch of a block's column, in bytes, that registers hold.
int64_t depth_of(const Product& p) {
  const int64_t whole = p.b_r * size_of(p.x_type);
  int64_t parts = (whole + 63) / 64;
  while (whole % (4 * parts)) ++parts;
  return whole / parts;
}

// T tiles of `tall` rows of x that begin at x[t], times the columns from `offset` of grid column j.
template <bool Byte, int T>
void tiles(const Product& p, const uint8_t* const* x, int64_t tall, int64_t depth, int64_t j, int64_t offset,
           float* sums) {
  const int64_t size = size_of(p.x_type), stride = p.stride * size, block = p.b_r * p.b_c * size, wide = p.b_c * 4;
  const uint8_t* blocks = static_cast<const uint8_t*>(p.blocks) + offset * 4;
#define EACH(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5)
#define ZERO(t) if constexpr (t < T) _tile_zero(t);
  EACH(ZERO)
  for (int64_t at = p.starts[j]; at < p.starts[j + 1]; ++at) {
    const int64_t from = p.down[p.rows[at]] * size;
    const uint8_t* right = blocks + at * block;
    for (int64_t k = 0; k < p.b_r * size; k += depth, right += depth / 4 * wide) {
      _tile_loadd(RIGHT, right, wide);
#define ADD(t)                                                    \
  if constexpr (t < T) {                                          \
    _tile_loadd(LEFT, x[t] + from + k, stride);                  \
    if constexpr (Byte) _tile_dpbusd(t, LEFT, RIGHT);           \
    else _tile_dpbf16ps(t, LEFT, RIGHT);                        \
  }
      EACH(ADD)
    }
  }
#define STORE(t) if constexpr (t < T) _tile_stored(t, sums + t * tall * kWide, 4 * kWide);
  EACH(STORE)
#undef EACH
#undef ZERO
#undef ADD
#undef STORE
}

template <bool Byte>
void any_tiles(const Product& p, int64_t count, const uint8_t* const* x, int64_t tall, int64_t depth, int64_t j,
               int64_t offset, float* sums) {
  switch (count) {
    case 1: return tiles<Byte, 1>(p, x, tall, depth, j, offset, sums);
    case 2: return tiles<Byte, 2>(p, x, tall, depth, j, offset, sums);
    case 3: return tiles<Byte, 3>(p, x, tall, depth, j, offset, sums);
    case 4: return tiles<Byte, 4>(p, x, tall, depth, j, offset, sums);
    case 5: return tiles<Byte, 5>(p, x, tall, depth, j, offset, sums);
    default: return tiles<Byte, 6>(p, x, tall, depth, j, offset, sums);
  }
}

}  // namespace

void kernel_amx(const Product& p, const Part& part) {
  const Rows rows(p, part);
  const int64_t depth = depth_of(p), size = size_of(p.x_type);
  const uint8_t* x = static_cast<const uint8_t*>(p.x);
  int64_t configured = 0;
  alignas(64) float sums[kSums * 16 * kWide];
  for (int64_t top = part.top; top < part.bottom;) {
    // Tiles of equal height. The last of a run begins early enough to be whole: its rows that another has are not
    // finished again, for the residual may be where y is.
    int64_t tall = 0, count = 0, first[kSums] = {}, again[kSums] = {};
    const uint8_t* from[kSums] = {};
    while (count < kSums && top < part.bottom) {
      const int64_t end = (top / p.run + 1) * p.run, bottom = end < part.bottom ? end : part.bottom;
      const int64_t left = bottom - top;
      if (!count || top % p.run == 0) {  // the first of a run
        const int64_t needed = (left + 15) / 16, each = (left + needed - 1) / needed;
        if (count && each != tall) break;
        tall = each;
      }
      first[count] = left < tall ? bottom - tall : top;
      again[count] = top - first[count];
      from[count] = x + p.row(first[count]) * size;
      ++count;
      top = left <= tall ? bottom : top + tall;
    }
    if (configured != tall) {
      const Config config(tall, depth);
      _tile_loadconfig(&config);
      configured = tall;
    }
    for (int64_t j = part.left; j < part.right; ++j) {
      const int64_t end = (j + 1) * p.b_c <= p.width ? p.b_c : p.width - j * p.b_c;
      for (int64_t offset = 0; offset < end; offset += kWide) {
        p.x_type == Type::kByte ? any_tiles<true>(p, count, from, tall, depth, j, offset, sums)
                                : any_tiles<false>(p, count, from, tall, depth, j, offset, sums);
        const int64_t wide = end - offset < kWide ? end - offset : kWide;
        for (int64_t t = 0; t < count; ++t) {
          finish<16>(p, rows, first[t] + again[t] - part.top, tall - again[t], sums + (t * tall + again[t]) * kWide,
                     kWide, j * p.b_c + offset, wide);
        }
      }
    }
  }
  _tile_release();
}

}  // namespace sa_plus_plus
#endif
