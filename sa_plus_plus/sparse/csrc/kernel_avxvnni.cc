// The kernel compiled for AVX2 with products of bytes (AVX-VNNI).
#if defined(__x86_64__)
#define KERNEL kernel_avxvnni
#define LANES 8
#define TALL 6
#define TALLER 12
#define BYTES_ALONE
#include "kernel.inc"
#endif
