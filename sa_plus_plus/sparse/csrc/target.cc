// All kernels of one target, SAPP_TARGET: compiled once for each row of targets.def, with its flags. Nothing here may
// come from a header that has functions which are not always inlined: one compiled for a newer processor could be
// linked in where an older one runs.
#include "targets.h"

#include "attention.inc"
#include "depthwise.inc"
#include "lookup.inc"
#include "normalization.inc"
#include "pooling.inc"
#if defined(__AMX_TILE__)
#include "amx.inc"
#else
#include "gemm.inc"
#endif

namespace sa_plus_plus::SAPP_TARGET {
namespace {

template <int types>
constexpr Functions compiled() {
  if constexpr (types == kAll) return {gemm, depthwise, pooling, rounding, look_up, normalization, attention};
  else return {gemm};
}

}  // namespace

const Functions functions = compiled<kTypes>();

}  // namespace sa_plus_plus::SAPP_TARGET
