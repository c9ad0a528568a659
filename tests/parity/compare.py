"""How close two arrays or pictures are."""

import mlx.core as mx
import numpy as np
import torch

# Relative errors that float32 may have: on the CPU those of sums in another order; on a GPU sines, exponentials and
# Winograd convolutions are less exact besides, by how much nobody has measured yet. And the share of an image's values
# that such errors may round to the next level.
ON_CPU = mx.default_device() == mx.cpu
EXACT = 1e-5 if ON_CPU else 1e-3
ROUNDED = 1e-3 if ON_CPU else 5e-2


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
    """At most one level of difference, on ROUNDED of the values; neither picture flat."""
    a, b = np.asarray(ours, np.int16), np.asarray(theirs, np.int16)
    assert a.shape == b.shape
    assert b.std() > 5
    difference = np.abs(a - b)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= ROUNDED
