// What this processor supports, and the choice among the targets.
#include "targets.h"

#include <atomic>
#include <cstring>
#include <iterator>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sa_plus_plus {
namespace {

#if defined(__x86_64__)
enum Word { EAX, EBX, ECX, EDX };

// gcc 12 and clang do not know all by name everywhere, so the processor is asked itself.
bool cpuid(unsigned leaf, unsigned subleaf, Word word, int bit) {
  unsigned words[4] = {};
  if (__get_cpuid_max(0, nullptr) < leaf) return false;
  __cpuid_count(leaf, subleaf, words[0], words[1], words[2], words[3]);
  return words[word] >> bit & 1;
}

bool has_amx() {  // tiles, of bytes and of bfloat16; the system gives a process matrix registers when it asks for them
#if defined(__linux__)
  return cpuid(7, 0, EDX, 24) && cpuid(7, 0, EDX, 25) && cpuid(7, 0, EDX, 22) &&
         syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
#else
  return false;
#endif
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#define TARGET(...) +1
constexpr int kTargets =
#include "targets.def"
    ;
#undef TARGET

#if defined(__aarch64__) && defined(__linux__)
bool has_dot() { return getauxval(AT_HWCAP) >> 20 & 1; }    // HWCAP_ASIMDDP
bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }  // HWCAP2_I8MM
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }  // HWCAP2_BF16
#elif defined(__aarch64__) && defined(__APPLE__)
bool has(const char* feature) {
  int value = 0;
  size_t size = sizeof value;
  return !sysctlbyname(feature, &value, &size, nullptr, 0) && value;
}

bool has_dot() { return has("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has("hw.optional.arm.FEAT_I8MM"); }
bool has_bf16() { return has("hw.optional.arm.FEAT_BF16"); }
#elif defined(__aarch64__)
bool has_dot() { return false; }
bool has_i8mm() { return false; }
bool has_bf16() { return false; }
#endif

// The rows of targets.def; each extends a later one.
struct Table {
  Table() {
    for (Target* target = std::end(rows); target-- != rows;) {
      if (const Target* extended = find(target->extends)) target->supported &= extended->supported;
    }
  }

  const Target* find(const char* name) const {
    for (const Target& target : rows) {
      if (!std::strcmp(target.name, name)) return &target;
    }
    return nullptr;
  }

  Target rows[kTargets] = {
#define TARGET(name, extends, flags, supported, types, lanes, registers, vectors, rows, tall, start, limit) \
  {#name, #extends, supported, types, {lanes, registers, vectors, rows, tall}, start, limit, &name::functions},
#include "targets.def"
#undef TARGET
  };
};

const Table& table() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  static const Table table;
  return table;
}

std::atomic<const Target*> limit{nullptr};

// Whether a target is the limit, or one that the limit extends.
bool allowed(const Target& target) {
  const Target* at = limit;
  if (!at) return true;
  while (at && at != &target) at = table().find(at->extends);
  return at;
}

const Target& first_of(int types) {
  for (const Target& target : table().rows) {
    if (target.supported && (target.types & types) == types && allowed(target)) return target;
  }
  return std::end(table().rows)[-1];  // the baseline
}

}  // namespace

Targets all_targets() { return {std::begin(table().rows), std::end(table().rows)}; }

const Target& target_for(Type x_type) { return first_of(bit(x_type)); }

const Target& target_for_all() { return first_of(kAll); }

bool limit_targets(const char* name) {
  if (!name) return limit = nullptr, true;
  const Target* target = table().find(name);
  if (!target || !target->supported) return false;
  limit = target;
  return true;
}

}  // namespace sa_plus_plus
