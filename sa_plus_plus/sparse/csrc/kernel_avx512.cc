#if defined(__x86_64__)
#define KERNEL kernel_avx512
#define LANES 16
#define TALL 12
#include "kernel.inc"
#endif
