"""Criteo with 20 x 20 blocks: a part of Table 2 and Figure 5; see `common.criteo` and docs/paper.md."""

import functools

from configs import common

get_config = functools.partial(common.criteo, block=20)
