// Several kernels in one call. Knows nothing of XLA, so that it can be tested alone.
//
// A program is a list of numbers of 64 bits, which may come from a file that somebody forged. Each of its steps has
//
//     kind, operands..., result, attributes...
//
// with the attributes in the alphabetical order of their names, a float as its 32 bits, and a list after its length. An
// operand or result is a part of a buffer,
//
//     buffer, offset in bytes, type, rank, sizes...
//
// where the types are those of `Type`, and 3 for int32.
#pragma once

#include <cstdint>
#include <vector>

#include "validate.h"

namespace sa_plus_plus {

struct Buffer {
  void* data;
  int64_t bytes;
};

// The kinds, by their numbers in a program. Files have these: new ones come last.
enum class Step {
  kConvolution,
  kNarrowConvolution,
  kDepthwise,
  kAttention,
  kNormalization,
  kMaxPooling,
  kSumPooling,
  kRounding,
  kLookup,
  kCount
};

// What is wrong with a step, as `compute` says it, or null; which step, counted from 0, and what it is called.
struct Failure {
  const char* why;
  int64_t number;
  const char* kind;
};

// Runs the steps one after another, on at most `threads` threads, up to one with which something is wrong. The first
// `operands` of the buffers are not written, unless they are in the memory of others.
Failure run_sequence(List<int64_t> program, const std::vector<Buffer>& buffers, int64_t operands, int64_t threads);

}  // namespace sa_plus_plus
