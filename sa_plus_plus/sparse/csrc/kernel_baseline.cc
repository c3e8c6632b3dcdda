// The kernel, attention, images and depthwise convolutions compiled for any processor.
#define KERNEL kernel_baseline
#define POOL pool_baseline
#define ROUND round_baseline
#define ATTEND attend_baseline
#define DEPTHWISE depthwise_baseline
#define LANES 4
#define TALL 6
#define TALLER 12
#include "kernel.inc"
