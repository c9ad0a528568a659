"""Progress bars on standard error. Their library is imported with the first that is shown: it takes a tenth of the time
to a small image, and asyncio comes with its bars for notebooks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO


class Hidden:
    """A bar that is not shown: whatever is called does nothing."""

    def __enter__(self) -> Hidden:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def progress_bar(what: str, total: int, *, shown: bool, **options: Any) -> Any:
    """A bar, to be entered; ``options`` are tqdm's."""
    if not shown:
        return Hidden()
    if "ipykernel" in sys.modules:
        from tqdm.auto import tqdm
    else:
        from tqdm import tqdm
    return tqdm(desc=what, total=total, **options)


def print_past(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print to standard output, or another file, past the bars that are shown."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        tqdm.write(text, file, end)
    else:
        print(text, end=end, file=file)
