#define KERNEL kernel_baseline
#define LANES 4
#define TALL 6
#include "kernel.inc"
