// The kernel compiled for AVX-512 with products of bytes (VNNI).
#if defined(__x86_64__)
#define KERNEL kernel_avx512vnni
#define LANES 16
#define TALL 14
#define TALLER 14
#define BYTES_ALONE
#include "kernel.inc"
#endif
