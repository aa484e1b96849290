"""What a thread asks of the base, for a span of code. Other threads run the same base under what they ask for."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


class Asked(threading.local):
    """Conditions of this thread's runs, as attributes of the one value [`ASKED`].

    A thread of autograd's asks for nothing: what runs the base in a backward pass asks there itself.

    Attributes:
        phase: whose LoRA is on; none of ours when `None`.
        evaluates: whether runs are in eval mode, whatever mode the base is in.
        twice_differentiable: whether runs keep to operations that have a second derivative.
        recomputes: whether the base's activation checkpointing, where it is on, has a use.
        uncompiled: whether what is compiled in the base runs as it was before.
        random_numbers: entered around each run, where its random numbers are not those of the process.
        freezes_weights: whether weights are constants, whatever their `requires_grad` says.
        generates_plainly: whether `generate` is plain greedy decoding, whatever the base's configuration says.
        settled: whether this is a run of the base, which has all of that already.
    """

    phase: str | None = None
    evaluates: bool = False
    twice_differentiable: bool = False
    recomputes: bool = True
    uncompiled: bool = False
    random_numbers: Callable[[], AbstractContextManager[None]] | None = None
    freezes_weights: bool = False
    generates_plainly: bool = False
    settled: bool = False


ASKED = Asked()
"""What the thread that looks asks for."""


@contextmanager
def asking(**conditions: Any) -> Iterator[None]:
    """Ask for some conditions for a span; the runs in it are settled anew.

    Args:
        conditions: attributes of [`Asked`].
    """
    conditions = {"settled": False, **conditions}
    before = {name: getattr(ASKED, name) for name in conditions}
    for name, value in conditions.items():
        setattr(ASKED, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(ASKED, name, value)
