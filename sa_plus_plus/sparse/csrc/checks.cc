#include "kernel.h"

#include <algorithm>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sa_plus_plus {

const char* complaint(const Product& p) {
  if (p.batch < 0 || p.height < 1 || p.width < 1 || p.b_r < 1 || p.b_c < 1 || p.kept < 0 || p.run < 1 || p.runs < 1 ||
      p.line < 1 || p.lines < 1 || p.top < 0 || p.bottom < 0 || p.left < 0 || p.right < 0) {
    return "a size is out of range";
  }
  if (p.x_type == Type::kFloat ? p.w_type == Type::kByte : p.w_type != p.x_type) return "types of x and blocks differ";
  if (p.grouped() && (p.b_r % p.group() || p.b_c % kWide || p.height % p.b_r)) return "blocks do not fit their groups";
  const int64_t grid_r = p.grid_r(), grid_c = p.grid_c();
  if (p.starts[0] != 0 || p.starts[grid_c] != p.kept) return "starts do not go from 0 to the number of blocks";
  bool wrong = false;
  for (int64_t j = 0; j < grid_c; ++j) wrong |= p.starts[j] > p.starts[j + 1];
  if (wrong) return "starts fall";
  for (int64_t at = 0; at < p.kept; ++at) wrong |= p.rows[at] < 0 || p.rows[at] >= grid_r;
  return wrong ? "a block stands in a row outside the grid" : nullptr;
}

namespace {

#if defined(__x86_64__)
// gcc 12 and clang do not know these by name everywhere, so the processor is asked itself.
bool has(unsigned leaf, unsigned subleaf, int word, int bit) {
  unsigned words[4] = {};
  if (__get_cpuid_max(0, nullptr) < leaf) return false;
  __cpuid_count(leaf, subleaf, words[0], words[1], words[2], words[3]);
  return words[word] >> bit & 1;
}

bool amx(int bit) {  // the system gives a process matrix registers when it asks for them
#if defined(__linux__)
  static const bool granted = has(7, 0, 3, 24) && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
  return granted && has(7, 0, 3, bit);
#else
  return false;
#endif
}
#endif

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

struct Choices {
  Choice of[3][7] = {};

  Choices() {
    int n[3] = {};
    auto add = [&](Type type, Kernel kernel, const char* name) {
      const int t = static_cast<int>(type);
      of[t][n[t]++] = {kernel, name};
    };
    auto add_all = [&](Kernel kernel, const char* name) {
      for (Type type : {Type::kFloat, Type::kHalf, Type::kByte}) add(type, kernel, name);
    };
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = has_avx512(), avx2 = has_avx2();
#if defined(__linux__)
    if (avx512 && amx(25)) add(Type::kByte, kernel_amx, "amx");
    if (avx512 && amx(22)) add(Type::kHalf, kernel_amx, "amx");
#endif
    if (avx512 && __builtin_cpu_supports("avx512vnni")) add(Type::kByte, kernel_avx512vnni, "avx512_vnni");
    if (avx512 && has(7, 1, 0, 5)) add(Type::kHalf, kernel_avx512bf16, "avx512_bf16");
    if (avx2 && has(7, 1, 0, 4)) add(Type::kByte, kernel_avxvnni, "avx_vnni");
    if (avx512) add_all(kernel_avx512, "avx512");
    if (avx2) add_all(kernel_avx2, "avx2");
#endif
    add_all(kernel_baseline, "baseline");
  }
};

}  // namespace

#if defined(__x86_64__)
#define FORMS(name) {name##_avx512, name##_avx2, name##_baseline, nullptr}
#else
#define FORMS(name) {name##_baseline, nullptr}
#endif

// From the first of all forms of a function that this processor can run.
template <class Form>
const Form* runnable(const Form* forms) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return forms + (has_avx512() ? 0 : has_avx2() ? 1 : 2);
#else
  return forms;
#endif
}

Pool pool() {
  static const Pool forms[] = FORMS(pool);
  return *runnable(forms);
}

Round round() {
  static const Round forms[] = FORMS(round);
  return *runnable(forms);
}

const Attend* attends() {
  static const Attend forms[] = FORMS(attend);
  return runnable(forms);
}

const char* complaint(const Attention& a, const int64_t sizes[5]) {
  if (a.type == Type::kByte) return "q, k, v and y are neither float32 nor bfloat16";
  const int64_t least = std::min({a.heads[0], a.heads[1], a.heads[2], a.queries, a.keys, a.depth, a.width, a.seen});
  if (least < 1) return "an axis is empty, or a query sees no key";
  const Attention::Place* places[] = {&a.q_at, &a.k_at, &a.v_at, &a.bias_at, &a.y_at};
  const int64_t rows[] = {a.queries, a.keys, a.keys, a.queries, a.queries};
  const int64_t lasts[] = {a.depth, a.depth, a.width, a.keys, a.width};
  for (int i = 0; i < 5; ++i) {
    if (i == 3 && !a.bias) continue;
    int64_t end = (rows[i] - 1) * places[i]->row + lasts[i];
    for (int h = 0; h < 3; ++h) {
      if (places[i]->head[h] < 0) return "a stride is negative";
      end += (a.heads[h] - 1) * places[i]->head[h];
    }
    if (places[i]->row < 0) return "a stride is negative";
    if (end > sizes[i]) return "an operand is too small";
  }
  return nullptr;
}

int64_t scratch_of(const Attention& a) {
  constexpr int64_t rows = kMostScores;
  auto whole = [](int64_t n) { return (n + kMostPanel - 1) / kMostPanel * kMostPanel; };
  return whole(a.keys) * (a.depth + rows) + whole(a.width) * (a.keys + rows) + a.depth * rows;
}

const Choice* kernels(Type x_type) {
  static const Choices choices;
  return choices.of[static_cast<int>(x_type)];
}

}  // namespace sa_plus_plus
