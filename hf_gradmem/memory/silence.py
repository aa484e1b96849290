"""The libraries that read and write stores, silenced for a span."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence the progress bars of `datasets` for a span."""
    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


@contextmanager
def silent_errors() -> Iterator[None]:
    """Silence the log of `datasets` for a span: it logs the errors that it raises."""
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
