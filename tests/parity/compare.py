"""How close two arrays or pictures are."""

import mlx.core as mx
import numpy as np
import torch


def to_torch(array: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def to_mlx(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.detach().numpy())


def relative_error(ours: mx.array, theirs: torch.Tensor) -> float:
    """||a - b|| / ||b||, after making sure that the shapes agree and the reference is not trivial."""
    a, b = np.array(ours.astype(mx.float32), np.float64), theirs.detach().double().numpy()
    assert a.shape == b.shape
    assert np.abs(b).max() > 1e-3
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def assert_same_picture(ours, theirs) -> None:
    """At most one level of difference, on at most 0.1 % of the values; neither picture flat."""
    a, b = np.asarray(ours, np.int16), np.asarray(theirs, np.int16)
    assert a.shape == b.shape
    assert b.std() > 5
    difference = np.abs(a - b)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3
