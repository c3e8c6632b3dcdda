// The kernel, attention, images and depthwise convolutions compiled for AVX2 and FMA.
#if defined(__x86_64__)
#define KERNEL kernel_avx2
#define POOL pool_avx2
#define ROUND round_avx2
#define ATTEND attend_avx2
#define DEPTHWISE depthwise_avx2
#define LANES 8
#define TALL 6
#define TALLER 12
#include "kernel.inc"
#endif
