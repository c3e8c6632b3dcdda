"""ResNet-50 on ImageNet with 64 x 64 blocks: a column of Tables 1, 3 and 4; see `common.imagenet` and docs/paper.md."""

import functools

from configs import common

get_config = functools.partial(common.imagenet, block=64)
