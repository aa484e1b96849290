"""What the engine does about a write that nobody waits for any more."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from hf_gradmem import GradMemForCausalLM
from hf_gradmem.commands.packaged import RETRIEVAL_ADAPTER
from hf_gradmem.serving.engine import Engine, Piece, QueueFullError, Recite, Write
from hf_gradmem.writing.objectives.reconstruction import ReconstructionObjective

LONG, LATER = "!a:b!" * 100, "!c:d!"


@pytest.fixture(scope="module")
def model() -> GradMemForCausalLM:
    return GradMemForCausalLM.from_pretrained(RETRIEVAL_ADAPTER)


class Steps:
    """Counts the steps that are taken, and holds one of them up in its middle until it may go on."""

    def __init__(self) -> None:
        self.taken, self.held = 0, 1
        self.entered, self.leave = threading.Event(), threading.Event()

    def count(self) -> None:
        self.taken += 1
        if self.taken == self.held:
            self.entered.set()
            assert self.leave.wait(20)


@pytest.fixture
def steps(monkeypatch) -> Steps:
    steps, step = Steps(), ReconstructionObjective.value_and_gradient
    monkeypatch.setattr(ReconstructionObjective, "value_and_gradient", lambda *given: steps.count() or step(*given))
    return steps


@contextmanager
def engine_of(model: GradMemForCausalLM, steps: Steps) -> Iterator[Engine]:
    engine = Engine(model)
    try:
        yield engine
    finally:
        steps.leave.set()
        engine.close()


def submitted(engine: Engine, context: str) -> tuple[Write, Callable[[], Piece]]:
    """A write in the queue, and what waits for what it is told."""
    told: SimpleQueue[Piece] = SimpleQueue()
    engine.submit(job := Write(told.put, context))
    return job, lambda: told.get(timeout=20)


def test_a_write_that_was_given_up_makes_way_at_its_next_step(model, steps):
    with engine_of(model, steps) as engine:
        given_up, _ = submitted(engine, LONG)
        assert steps.entered.wait(20)
        _, later = submitted(engine, LATER)
        given_up.cancelled.set()
        assert (engine.num_waiting, engine.num_running) == (1, 1)
        steps.leave.set()
        assert later().memory == model.write(LATER)
    assert model.writer.write_steps == 2
    assert steps.taken == 1 + 2 + 2  # of the first write, the later one, and the one that it is compared with
    assert engine.num_running == 0


def test_a_write_that_one_of_its_requests_waits_for_goes_on(model, steps):
    written, queued = threading.Event(), threading.Event()
    steps.held = model.writer.write_steps + 1
    with engine_of(model, steps) as engine:
        engine.submit(Write(lambda _: written.set() or queued.wait(20), LATER))
        assert written.wait(20)  # and the engine waits until both of the next batch are there
        given_up, _ = submitted(engine, LATER)
        _, other = submitted(engine, LONG)
        queued.set()
        assert steps.entered.wait(20)
        assert engine.num_running == 2
        given_up.cancelled.set()
        steps.leave.set()
        assert other().memory is not None


def test_a_write_ends_at_its_next_step_when_the_engine_closes(model, steps):
    with engine_of(model, steps) as engine:
        _, told = submitted(engine, LONG)
        assert steps.entered.wait(20)
        _, waiting = submitted(engine, LATER)
        closing = threading.Thread(target=engine.close)
        closing.start()
        assert isinstance(waiting().error, QueueFullError)
        steps.leave.set()
        assert isinstance(told().error, QueueFullError)
        closing.join(20)
        assert not closing.is_alive()
    assert steps.taken == 1


@pytest.mark.parametrize("prefix", [1, 0], ids=["in segments", "whole"])
def test_a_recitation_that_was_given_up_makes_way_at_its_next_token(model, monkeypatch, prefix):
    segment = LATER * 20
    memory = model.write([[segment, segment]] if prefix else segment)
    monkeypatch.setattr(model.config, "write_prefix_segments", prefix)
    runs, logits = Steps(), model.write_phase.logits
    monkeypatch.setattr(model.write_phase, "logits", lambda *given: runs.count() or logits(*given))
    runs.held = 3
    with engine_of(model, runs) as engine:
        told: SimpleQueue[Piece] = SimpleQueue()
        engine.submit(job := Recite(told.put, memory))
        assert runs.entered.wait(20)
        _, later = submitted(engine, LATER)
        job.cancelled.set()
        runs.leave.set()
        assert later().memory is not None
    assert told.empty()
    assert runs.taken < len(segment)
