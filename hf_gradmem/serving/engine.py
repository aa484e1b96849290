"""One thread that owns the model: requests wait in a bounded queue, and those that fit together run as one batch."""

import functools
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import StoppingCriteria

from ..base.modes import plain_generation
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.answering import answer_features, confidences
from ..reading.generation import ending_tokens
from ..reading.queries import pad_left
from ..reading.reciting import recite
from ..template import Template
from ..writing.fitting import fit_contexts
from ..writing.write import write_contexts


class QueueFullError(Exception):
    """The queue is as long as it may be."""


class _GivenUpError(Exception):
    """Nobody waits any more for what is under way."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, in OpenAI's terms.

    Attributes:
        temperature: 0 is greedy.
        top_p: share of the probability that tokens are drawn from.
        seed: of the draws; none is set when `None`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def arguments(self) -> dict[str, Any]:
        """As arguments of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class Piece:
    """What a request is told as it goes on.

    Attributes:
        text: what the answer goes on with.
        finish_reason: at the end, `"stop"` or `"length"`.
        num_tokens: of the answer up to here.
        error: what went wrong, in which case nothing follows.
        memory: what was written, where that was asked for.
        confidence: at the end, how likely the answer is right; `None` for an adapter that is not calibrated.
        quote: at the end, what the model quoted before the answer; `None` where it quotes nothing.
    """

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    error: BaseException | None = None
    memory: GradMemMemory | None = None
    confidence: float | None = None
    quote: str | None = None


@dataclass(eq=False)
class Job:
    """Something to do for a request.

    Attributes:
        tell: called from the engine's thread with each piece.
        cancelled: set by whoever no longer waits.
        begun: whether something was told already, so that it cannot be run anew.
    """

    tell: Callable[[Piece], None]
    cancelled: threading.Event = field(default_factory=threading.Event, init=False)
    begun: bool = field(default=False, init=False)


@dataclass(eq=False)
class Write(Job):
    """Write a context, given as text or as its segments."""

    context: str | list[str]

    @property
    def kind(self) -> Hashable:
        """Jobs of one kind run as one batch."""
        return "write"


@dataclass(eq=False)
class Recite(Job):
    """Say what the memory of a context decodes to.

    Attributes:
        memory: of one context.
    """

    memory: GradMemMemory

    @property
    def kind(self) -> Hashable:
        """Jobs of one kind run as one batch."""
        return "recite"


@dataclass(eq=False)
class Read(Job):
    """Continue a prompt from a memory.

    Attributes:
        memory: of one context.
        prompt: token ids.
        max_new_tokens: most tokens of the answer.
        sampling: how they are chosen.
        stop: texts that end the answer, and are not part of it.
        words: the template that the prompt was put into, where it was: what it has the model quote is not told as text.
    """

    memory: GradMemMemory
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    words: Template | None = None

    @property
    def kind(self) -> Hashable:
        """Rows of one length need no padding, which a memory in the cache would not bear.

        A job with a seed runs alone: what is drawn for a row depends on the rows beside it.
        """
        return "read", self.sampling, len(self.prompt) if self.sampling.seed is None else id(self)


class Engine:
    """Runs jobs in a thread of its own, in the order in which they came, those of one kind together.

    Args:
        model: which nobody else uses meanwhile.
        batch_size: most jobs at a time.
        max_waiting: most jobs in the queue.
    """

    def __init__(self, model: GradMemForCausalLM, *, batch_size: int = 16, max_waiting: int = 64) -> None:
        self.model = model
        self.batch_size, self.max_waiting = batch_size, max_waiting
        self._waiting: deque[Write | Recite | Read] = deque()
        self._running: list[Write | Recite | Read] = []
        self._changed = threading.Condition()
        self._closing = False
        self._do: dict[type, Callable[[list[Any]], None]] = {
            Write: self._write,
            Recite: self._recite,
            Read: self._read,
        }
        self._thread = threading.Thread(target=self._run, name="hf-gradmem", daemon=True)
        self._thread.start()

    def submit(self, job: Write | Recite | Read) -> None:
        """Put a job at the end of the queue.

        Raises:
            QueueFullError: there is no room, or the engine is closing.
        """
        with self._changed:
            self._drop_given_up()
            if self._closing or len(self._waiting) >= self.max_waiting:
                raise QueueFullError
            self._waiting.append(job)
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        """Jobs in the queue that somebody waits for."""
        with self._changed:
            self._drop_given_up()
            return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Jobs that are being done, among them those that were given up and have not been left yet."""
        with self._changed:
            return len(self._running)

    def close(self) -> None:
        """Stop at the next token, or the next step of a WRITE; what still waits is told so."""
        with self._changed:
            self._closing = True
            dropped = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for job in dropped:
            job.tell(Piece(error=QueueFullError()))
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._attempt(batch)

    def _attempt(self, batch: list[Any]) -> None:
        """Run a batch. One job that fails fails alone: those beside it that were told nothing are run once more."""
        try:
            self._do[type(batch[0])](batch)
        except _GivenUpError:
            for job in batch:
                if not job.cancelled.is_set():  # which waits still, while the engine closes
                    job.tell(Piece(error=QueueFullError()))
        except Exception as error:  # whatever it is, the requests are told, and the next ones are served
            for job in batch:
                if job.begun or len(batch) == 1:
                    job.tell(Piece(error=error))
                else:
                    self._attempt([job])

    def _next_batch(self) -> list[Any]:
        """The first job that waits and those of its kind; nothing when the engine closes."""
        with self._changed:
            self._running = []
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return []
                self._drop_given_up()
                if self._waiting:
                    kind = self._waiting[0].kind
                    alike = [job for job in self._waiting if job.kind == kind][: self.batch_size]
                    self._waiting = deque(job for job in self._waiting if job not in alike)
                    self._running = alike
                    return alike

    def _drop_given_up(self) -> None:
        """Room in the queue is for those who still wait, also while a long batch runs."""
        self._waiting = deque(job for job in self._waiting if not job.cancelled.is_set())

    def _leave_if_given_up(self, batch: list[Any]) -> None:
        if self._closing or all(job.cancelled.is_set() for job in batch):
            raise _GivenUpError

    def _write(self, batch: list[Write]) -> None:
        model, leave_if_given_up = self.model, functools.partial(self._leave_if_given_up, batch)
        # What a confidence looks at, which costs a forward pass.
        measure = model.config.confidence is not None
        contexts = fit_contexts(model.writer, model.tokenizer, [job.context for job in batch])
        leave_if_given_up()  # cutting a long text takes a while, too
        memory = write_contexts(
            model.writer,
            model.tokenize(contexts),
            identity=model.identity(),
            measure_final_loss=measure,
            on_step=leave_if_given_up,
        )
        for index, job in enumerate(batch):
            job.tell(Piece(memory=memory[index].to("cpu")))

    def _recite(self, batch: list[Recite]) -> None:
        texts = recite(self.model, _memory_of(batch), functools.partial(self._leave_if_given_up, batch))
        for job, text in zip(batch, texts, strict=True):
            job.tell(Piece(text, finish_reason="stop"))

    def _read(self, batch: list[Read]) -> None:
        model, sampling = self.model, batch[0].sampling
        input_ids, mask = pad_left([job.prompt for job in batch])
        ending = ending_tokens(model.tokenizer, model.generation_config)
        rows = [_Answer(job, model, ending.get("eos_token_id") or []) for job in batch]
        answers = _Answers(rows, lambda: self._closing)
        with plain_generation(), _drawn_from(sampling.seed):
            model.generate(
                input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                memory=_memory_of(batch).to(model.device),
                max_new_tokens=max(job.max_new_tokens for job in batch),
                stopping_criteria=[answers],
                **ending,
                **sampling.arguments(),
            )
        _tell_ends(model, answers.rows)


def _memory_of(batch: Sequence[Recite | Read]) -> GradMemMemory:
    """A row for each job: with two of one job, all behind it would be told what belongs to the job before."""
    for job in batch:
        if len(job.memory) != 1:
            raise ValueError(f"A request reads the memory of one context, got {len(job.memory)}. Give memory[0].")
    return GradMemMemory.cat([job.memory for job in batch])


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Draw from a seed for a span. It is the process's own, so later draws would repeat themselves: they begin anew."""
    if seed is None:
        yield
        return
    torch.manual_seed(seed)
    try:
        yield
    finally:
        torch.seed()  # on every device


def _tell_ends(model: GradMemForCausalLM, answers: list["_Answer"]) -> None:
    """Tell the ends that were held back until a calibrated adapter can say how sure it is of each answer."""
    held = [answer for answer in answers if answer.held is not None]
    if not held:
        return
    jobs = [answer.job for answer in held]
    input_ids, mask = pad_left([job.prompt for job in jobs])
    memory = GradMemMemory.cat([job.memory for job in jobs], keep_measured=True)
    features = answer_features(model, memory, input_ids, mask, [answer.read for answer in held], range(len(held)))
    for answer, sure in zip(held, confidences(model, features), strict=True):
        answer.end(sure)


class _Answers(StoppingCriteria):
    """Hands out the tokens of a batch as they come, and says which rows have ended."""

    def __init__(self, rows: list["_Answer"], closing: Callable[[], bool]) -> None:
        self.rows, self.closing = rows, closing

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        closing = self.closing()
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if closing and not row.ended:
                row.ended = True
                row.job.tell(Piece(error=QueueFullError()))
            row.take(token)
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)


class _Answer:
    """The answer to one request, token by token.

    Attributes:
        read: all of its tokens, the one that ended it among them.
        held: its end, which is told once it is known how sure the model is of the answer.
    """

    def __init__(self, job: Read, model: GradMemForCausalLM, ends: list[int]) -> None:
        self.job, self.tokenizer, self.ends = job, model.tokenizer, ends
        self.calibrated = model.config.confidence is not None
        self.read: list[int] = []
        self.told = 0  # characters
        self.ended = False
        self.held: Piece | None = None

    @property
    def tokens(self) -> list[int]:
        """Those of its text."""
        return self.read[:-1] if self.read and self.read[-1] in self.ends else self.read

    def take(self, token: int) -> None:
        """Take a token up, and tell what can be told of it."""
        if self.ended or self.job.cancelled.is_set():
            self.ended = True
            return
        self.read.append(token)
        finish = None
        if token in self.ends:
            finish = "stop"
        elif len(self.read) >= self.job.max_new_tokens:
            finish = "length"
        text = str(self.tokenizer.decode(self.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        quote = None
        if self.job.words is not None:
            quote, text = self.job.words.split(text, finish is not None)
        cut = min((place for stop in self.job.stop if (place := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, finish = text[:cut], "stop"
        sure = len(text) if finish else len(text) - _unsure(text, self.job.stop)
        self.ended = finish is not None
        if sure > self.told or self.ended:
            new, self.told = text[self.told : sure], max(self.told, sure)
            piece = Piece(new, finish, len(self.tokens), quote=quote if self.ended else None)
            if self.ended and self.calibrated:
                self.held = piece
            else:
                self._tell(piece)

    def end(self, confidence: float | None) -> None:
        """Tell the end that was held back."""
        if self.held is not None:
            self._tell(replace(self.held, confidence=confidence))

    def _tell(self, piece: Piece) -> None:
        # A client that has gone takes its event loop with it, which is no fault of this answer.
        self.job.begun = True
        with suppress(RuntimeError):
            self.job.tell(piece)


def _unsure(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end may still change: the beginning of a stop, and half of a character behind it."""
    whole = text.rstrip("\ufffd")
    begun = (size for stop in stops for size in range(len(stop) - 1, 0, -1) if whole.endswith(stop[:size]))
    return len(text) - len(whole) + max(begun, default=0)
