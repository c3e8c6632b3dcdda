#include "kernel.h"

namespace sa_plus_plus {

const char* complaint(const Product& p) {
  if (p.batch < 0 || p.height < 1 || p.width < 1 || p.b_r < 1 || p.b_c < 1 || p.kept < 0 || p.run < 1 || p.runs < 1) {
    return "a size is out of range";
  }
  const int64_t grid_r = p.grid_r(), grid_c = p.grid_c();
  if (p.starts[0] != 0 || p.starts[grid_c] != p.kept) return "starts do not go from 0 to the number of blocks";
  bool wrong = false;
  for (int64_t j = 0; j < grid_c; ++j) wrong |= p.starts[j] > p.starts[j + 1];
  if (wrong) return "starts fall";
  for (int64_t at = 0; at < p.kept; ++at) wrong |= p.rows[at] < 0 || p.rows[at] >= grid_r;
  return wrong ? "a block stands in a row outside the grid" : nullptr;
}

Kernel best_kernel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return kernel_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernel_avx2;
#endif
  return kernel_baseline;
}

}  // namespace sa_plus_plus
