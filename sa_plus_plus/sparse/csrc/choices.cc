// Which of the compiled forms of each function this processor can run.
#include "kernel.h"

#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sa_plus_plus {

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

const Pool* pools() {
  static const Pool forms[] = FORMS(pool);
  return runnable(forms);
}

const Round* rounds() {
  static const Round forms[] = FORMS(round);
  return runnable(forms);
}

const Attend* attends() {
  static const Attend forms[] = FORMS(attend);
  return runnable(forms);
}

const Convolve* depthwises() {
  static const Convolve forms[] = FORMS(depthwise);
  return runnable(forms);
}

const Choice* kernels(Type x_type) {
  static const Choices choices;
  return choices.of[static_cast<int>(x_type)];
}

}  // namespace sa_plus_plus
