"""Python's collector of cycles, held back while vocabularies are read and libraries imported."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within this context no cycles are looked for.

    The collector walks through everything again and again while hundreds of thousands of tuples and strings are made,
    none of which is garbage: that took longer than making them.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
