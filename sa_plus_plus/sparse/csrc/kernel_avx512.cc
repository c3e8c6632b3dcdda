// The kernel, attention, images and depthwise convolutions compiled for AVX-512.
#if defined(__x86_64__)
#define KERNEL kernel_avx512
#define POOL pool_avx512
#define ROUND round_avx512
#define ATTEND attend_avx512
#define DEPTHWISE depthwise_avx512
#define LANES 16
#define TALL 14
#define TALLER 14
#include "kernel.inc"
#endif
