// The kernel compiled for AVX-512 with products of bfloat16.
#if defined(__x86_64__)
#define KERNEL kernel_avx512bf16
#define LANES 16
#define TALL 14
#define TALLER 14
#define HALVES_ALONE
#include "kernel.inc"
#endif
