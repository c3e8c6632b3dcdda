// The targets that the kernels are compiled for, and which of them this processor runs.
#pragma once

#include <cstdint>

#include "params.h"

namespace sa_plus_plus {

// A part of a product; the columns from `first` to `last` of a line of a depthwise convolution, and a line of pooling,
// lines being counted through all images; the rows from `first` to `last` of a lookup or a normalisation; the queries
// from `first` to `last` of a head. The scratch memory of attention, best aligned to cache lines, is kept between calls:
// it is `packed` if the call before was for the same head.
using GemmFunction = void (*)(const Product&, const Part&);
using DepthwiseFunction = void (*)(const Depthwise&, int64_t line, int64_t first, int64_t last);
using PoolingFunction = void (*)(const Pooling&, int64_t line);
using RoundingFunction = void (*)(const Runs&);
using LookupFunction = void (*)(const Lookup&, int64_t first, int64_t last);
using NormalizationFunction = void (*)(const Normalization&, int64_t first, int64_t last);
using AttentionFunction = void (*)(const Attention&, int64_t head, int64_t first, int64_t last, float* scratch,
                                   bool packed);

struct Functions {
  GemmFunction gemm;
  DepthwiseFunction depthwise = nullptr;  // null, like all that follow, in a target that has products alone
  PoolingFunction pooling = nullptr;
  RoundingFunction rounding = nullptr;
  LookupFunction look_up = nullptr;
  NormalizationFunction normalization = nullptr;
  AttentionFunction attention = nullptr;
};

// What the processor's registers hold.
struct Tile {
  int lanes, registers, vectors, rows, tall;
};

constexpr int bit(Type type) { return 1 << static_cast<int>(type); }
constexpr int kBytes = bit(Type::kByte), kBfloat16s = bit(Type::kBfloat16),
              kAll = bit(Type::kFloat) | kBytes | kBfloat16s;

// A row of targets.def.
struct Target {
  const char *name, *extends;
  bool supported;  // by this processor
  int types;       // of x in products: a `bit` for each
  Tile tile;
  int start, limit;
  const Functions* functions;

  bool multiplies(Type x_type) const { return types & bit(x_type); }
};

// Each target in a namespace of its own, so that the linker cannot take a function of one for that of another.
#define TARGET(name, extends, flags, supported, types, lanes, registers, vectors, rows, tall, start, limit) \
  namespace name {                                                                                          \
  constexpr int kTypes = types;                                                                             \
  constexpr Tile kTile{lanes, registers, vectors, rows, tall};                                              \
  constexpr int kLimit = limit;                                                                             \
  extern const Functions functions;                                                                         \
  }
#include "targets.def"
#undef TARGET

struct Targets {
  const Target *first, *last;  // the last is exclusive

  const Target* begin() const { return first; }
  const Target* end() const { return last; }
};

Targets all_targets();  // the table

// The best target for products of x of a type, and the best for all else: of those that this processor supports, and
// that are what `limit_targets` named or what it extends.
const Target& target_for(Type x_type);
const Target& target_for_all();
bool limit_targets(const char* name);  // null for no limit; false: there is none of that name, or it is not supported

}  // namespace sa_plus_plus
