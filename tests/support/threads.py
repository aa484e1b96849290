"""Several threads on one model, each answer compared with what one thread gives."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Job = Callable[[], Sequence[torch.Tensor]]


@contextmanager
def switching_often() -> Iterator[None]:
    """Threads take turns after a few instructions, so that they meet in every line."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def wrong_answers(jobs: Sequence[Job], expected: Sequence[Sequence[torch.Tensor]], times: int) -> int:
    """How many answers are not what is expected, an exception among them, when each job has a thread of its own.

    Args:
        jobs: begun at once, each run `times` times in its thread.
        expected: the answer of each of them.
    """
    barrier, wrong = threading.Barrier(len(jobs)), []

    def run(job: Job, right: Sequence[torch.Tensor]) -> None:
        barrier.wait()
        for _ in range(times):
            try:
                answer = job()
                for value, wanted in zip(answer, right, strict=True):
                    torch.testing.assert_close(value, wanted, rtol=1e-7, atol=1e-9)
            except Exception as error:  # an answer that does not come is a wrong one
                wrong.append(error)

    threads = [threading.Thread(target=run, args=both) for both in zip(jobs, expected, strict=True)]
    with switching_often():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for error in wrong[:3]:
        print(f"{type(error).__name__}: {str(error)[:300]}")
    return len(wrong)
