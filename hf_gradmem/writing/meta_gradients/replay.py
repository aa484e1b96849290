"""The conditions of a first run, for the run in the backward pass that repeats it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from ...base.asked import asking

Tensor = torch.Tensor


class Conditions:
    """Autocast and the state of the random numbers, on the CPU and on the device of `like`, as they are now."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._device_type = like, like.device.type
        self._autocast: dict[str, Any] = {
            "enabled": torch.is_autocast_enabled(self._device_type),
            "dtype": torch.get_autocast_dtype(self._device_type),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        self._devices, self._states = self._random_states()

    def _random_states(self) -> tuple[list[int], list[Tensor]]:
        devices, states = get_device_states(self._like)
        return devices, [torch.get_rng_state(), *states]

    def numbers_were_drawn(self) -> bool:
        """Whether any random number was drawn since."""
        return not all(map(torch.equal, self._states, self._random_states()[1]))

    @contextmanager
    def now(self) -> Iterator[None]:
        """The first run, for a span: no other thread's draws come between its own, and later ones go on behind them."""
        with self._drawing() as states:
            yield
        if not all(map(torch.equal, states, self._states)):
            self._set(states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """For a span, what they were then: dropout drops the same elements in the backward pass as in the step."""
        with self._drawing(), torch.autocast(self._device_type, **self._autocast):
            yield

    @contextmanager
    def _drawing(self) -> Iterator[list[Tensor]]:
        """Runs of the base draw the numbers that came then, one run behind the other; the process's stay as they are.

        Gives the states, which move on.
        """
        states = list(self._states)

        @contextmanager
        def numbers() -> Iterator[None]:
            with torch.random.fork_rng(self._devices, device_type=self._device_type):
                self._set(states)
                yield
                states[:] = self._random_states()[1]

        with asking(random_numbers=numbers):
            yield states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        set_device_states(self._devices, states[1:], device_type=self._device_type)
