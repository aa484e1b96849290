"""Running out of memory in WRITE, with what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

IN_TRAINING = (
    "Train on fewer contexts at a time (per_device_train_batch_size; gradient_accumulation_steps makes up for it), cut "
    'them shorter with write_segment_length, or use meta_gradient="finite_difference", which needs the least.'
)
IN_EVALUATION = (
    "Take fewer contexts at a time (per_device_eval_batch_size), or cut them shorter with write_segment_length."
)


@contextmanager
def out_of_memory_explained(advice: str) -> Iterator[None]:
    """Say what to lower where the device, or the host, has no more memory.

    Args:
        advice: settings to change, as a sentence.

    Raises:
        torch.OutOfMemoryError: with the advice before the device's own words.
    """
    try:
        yield
    except RuntimeError as error:  # a torch.OutOfMemoryError on an accelerator; on a CPU known by its words alone
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise torch.OutOfMemoryError(f"WRITE ran out of memory. {advice} The device says: {error}") from error
