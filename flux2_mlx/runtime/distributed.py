"""Processes that mlx.launch started together: their group, seed and agreement."""

from __future__ import annotations

import os
import secrets

import mlx.core as mx
import numpy as np

from ..collectives import all_gather, all_sum
from ..errors import InputError


def launched() -> mx.distributed.Group | None:
    """The processes that mlx.launch, or mpirun, started this one with, if there are several."""
    if not any(name in os.environ for name in ("MLX_RANK", "OMPI_COMM_WORLD_RANK")):
        return None
    group = mx.distributed.init()
    return group if group.size() > 1 else None


def random_seed() -> int:
    return secrets.randbelow(2**32)


def shared_seed(group: mx.distributed.Group) -> int:
    """The first process's random seed."""
    seeds = all_gather(mx.array([random_seed()], mx.uint32), group)
    return int(np.array(seeds)[0])


def check_agreement(identity: str, group: mx.distributed.Group | None) -> None:
    """Refuse a data set that is not the same in all processes."""
    if group is None:
        return
    own = mx.array(list(bytes.fromhex(identity)), mx.uint32)[None]
    if np.ptp(np.array(all_gather(own, group)), axis=0).any():
        raise InputError("the processes have different images or captions; each needs the same folder")


def any_process(flag: bool, group: mx.distributed.Group | None) -> bool:
    """Whether ``flag`` is set in any process."""
    if group is None:
        return flag
    return bool(all_sum(mx.array(int(flag)), group).item())
