"""FLUX.2 [klein] on Apple Silicon, in MLX alone.

The public names are those of ``public``. They are imported when the first of them is asked for, so that a command can
take an interrupt, and MLX its environment, before the third of a second that importing takes.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__

if TYPE_CHECKING:
    from .public import *  # noqa: F403  # what it lists in __all__

# On M5 and CUDA MLX rounds the factors of float32 products to TF32 unless this is 0 when it first multiplies.
os.environ.setdefault("MLX_ENABLE_TF32", "0")


def __getattr__(name: str) -> Any:
    """A public name, or a module that came with them."""
    if not name.startswith("__") or name == "__all__":
        public = import_module(".public", __name__)
        globals().update({known: getattr(public, known) for known in public.__all__}, __all__=public.__all__)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    __getattr__("__all__")
    return list(globals())
