"""The demo: a paragraph goes into a few vectors of a small pretrained model and comes back word for word."""

import sys
import time
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..base.cache_size import kv_cache_bytes
from ..evaluation import answer_queries
from ..evaluation.memory_facts import decode_memory, describe_size, tensor_bytes, write_losses
from ..modeling_gradmem import GradMemForCausalLM
from ..tasks.kv_retrieval import END, KVRetrieval
from .opening import PLAIN_BASE_OPTIONS, PLAIN_BASE_TOLERANCE, load_model
from .packaged import FORWARD_ADAPTER, RETRIEVAL_ADAPTER, find_demo_model
from .questions import Notes, answer_notes, tell_notes

TEXT = (
    "On 9 June 1934 the surveyor Ilse Brandvold measured Lake Tammerin at 61 metres, paid the ferryman Tobias Quill "
    "17 crowns, and carried 23 brass plates to Harrow Point."
)
# Twice those of a base alone by default: the paragraph is learned in half as many steps.
NUM_MEMORY_TOKENS = 16
_BAR_WIDTH = 40
_TABLE_ROWS = 8


@dataclass(frozen=True)
class Retrieval:
    """Queries that a trained adapter answered from memory.

    Attributes:
        context: what was written, in segments.
        queries: what was asked with the context gone.
        answers: what the model generated.
        forward_answers: what one generated that writes by forward passes alone.
        expected: what the context says.
    """

    context: list[str]
    queries: list[str]
    answers: list[str]
    forward_answers: list[str]
    expected: list[str]


@dataclass(frozen=True)
class DemoResult:
    """What happened.

    Attributes:
        model: the base, by name or directory.
        text: what was written.
        unwritten: what the memory decoded to before the first step.
        decoded: what it decoded to afterwards.
        verbatim: whether `decoded` is `text`, character for character.
        num_tokens: tokens in the text.
        steps: forward and backward passes.
        losses: reconstruction loss at each step, in nats per token.
        memory_shape: memory vectors and their width.
        memory_bytes: of the memory vectors.
        kv_cache_bytes: of the cache that the base keeps for the text in a prompt, if it could be measured.
        seconds: that the write took.
        retrieval: what a trained adapter answered from memory.
        notes: what the language adapter answered in English; `None` on another base than the one it belongs to.
    """

    model: str
    text: str
    unwritten: str
    decoded: str
    verbatim: bool
    num_tokens: int
    steps: int
    losses: list[float]
    memory_shape: tuple[int, int]
    memory_bytes: int
    kv_cache_bytes: int | None
    seconds: float
    retrieval: Retrieval
    notes: Notes | None

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def run_demo(
    console: Console,
    *,
    text: str = TEXT,
    model_name: str | None = None,
    steps: int = PLAIN_BASE_OPTIONS["write_steps"],
    num_memory_tokens: int = NUM_MEMORY_TOKENS,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> DemoResult:
    """Write a text, decode the memory, and tell the story on `console` as it happens.

    Args:
        console: where the story goes; one made with `quiet=True` tells none.
        text: what to write.
        model_name: directory or Hub repository of the base; SmolLM2-135M-Instruct when absent.
        steps: at most so many; the write stops when the text is learned.
        num_memory_tokens: m.
        seed, device, trust_remote_code: as in [`load_model`].

    Raises:
        OSError: the model is neither on this machine nor within reach.
        ValueError: an empty text, or options out of range.
    """
    name = model_name or find_demo_model(console)
    options = PLAIN_BASE_OPTIONS | {"num_memory_tokens": num_memory_tokens, "write_steps": steps}
    model = load_model(name, options, seed=seed, device=device, trust_remote_code=trust_remote_code)
    num_tokens = len(model.tokenizer(text, add_special_tokens=False).input_ids)
    unwritten = model.write(text, write_steps=0)
    _tell_start(console, name, text, num_tokens, num_memory_tokens)

    show_progress = not console.quiet and sys.stderr.isatty()
    if not show_progress:
        console.print("Writing (half a minute on two cores) ...")
    start = time.perf_counter()
    memory = model.write(text, tolerance=PLAIN_BASE_TOLERANCE, show_progress=show_progress)
    seconds = time.perf_counter() - start
    losses = write_losses(memory)
    _tell_losses(console, losses, steps, seconds)

    before, after = (decode_memory(model, each)[0] or "" for each in (unwritten, memory))
    result = DemoResult(
        model=name,
        text=text,
        unwritten=before,
        decoded=after,
        verbatim=after == text,
        num_tokens=num_tokens,
        steps=len(losses),
        losses=losses,
        memory_shape=(memory.embeddings.shape[1], memory.embeddings.shape[2]),
        memory_bytes=tensor_bytes(memory.embeddings),
        kv_cache_bytes=kv_cache_bytes(model.decoder, num_tokens),
        seconds=seconds,
        retrieval=answer_from_memory(seed),
        notes=answer_notes(name) if model_name is None else None,
    )
    _tell_end(console, result)
    return result


def answer_from_memory(seed: int) -> Retrieval:
    """Write eight random pairs with the adapters in this package, and ask for each value with the context gone."""
    task = KVRetrieval(num_pairs=8, key_length=1, value_length=1, end_mark=False, split="test", seed=seed)
    row = task.row(0)
    queries = row["queries"]
    answers = {}
    for adapter in (RETRIEVAL_ADAPTER, FORWARD_ADAPTER):
        model = GradMemForCausalLM.from_pretrained(adapter)
        memory = model.write([row["context"]])
        answers[adapter] = answer_queries(model, memory, queries, [0] * len(queries), max_new_tokens=4)
    return Retrieval(
        context=row["context"],
        queries=queries,
        answers=answers[RETRIEVAL_ADAPTER],
        forward_answers=answers[FORWARD_ADAPTER],
        expected=[target.removesuffix(END) for target in row["targets"]],
    )


# ---------------------------------------------------------------------------------------------------- the story


def _tell_start(console: Console, name: str, text: str, num_tokens: int, num_memory_tokens: int) -> None:
    console.print()
    console.print(
        f"A text of {num_tokens} tokens goes into {num_memory_tokens} vectors. Every weight of the model stays as it "
        "is: gradient descent moves the vectors until the model, given them alone, predicts the text."
    )
    _tell_fact(console, "Model", name)
    _tell_fact(console, "Text", text)
    console.print()


def _tell_losses(console: Console, losses: list[float], allowed_steps: int, seconds: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("step", justify="right")
    table.add_column("loss (nats per token)", justify="right")
    table.add_column("")
    for step in _spread(len(losses), _TABLE_ROWS):
        bar = "█" * round(_BAR_WIDTH * losses[step] / max(losses))
        table.add_row(str(step + 1), f"{losses[step]:.3f}", Text(bar, style="cyan"))
    console.print(table)
    if losses:
        end = "learned, stopped early" if len(losses) < allowed_steps else "all that were allowed"
        console.print(f"{len(losses)} of {allowed_steps} steps ({end}), {seconds:.0f} s")


def _tell_end(console: Console, result: DemoResult) -> None:
    _tell_decoded(console, result)
    _tell_retrieval(console, result.retrieval)
    if result.notes is not None:
        tell_notes(console, result.notes)


def _tell_decoded(console: Console, result: DemoResult) -> None:
    _tell_fact(console, "Decoded from the vectors before the first step", result.unwritten)
    _tell_fact(console, "Decoded from the vectors after the last step", result.decoded)
    console.print()
    if result.verbatim:
        console.print(f"[bold green]Verbatim:[/] the decoded text is the written one, all {result.num_tokens} tokens.")
    else:
        console.print(
            "[bold red]Not verbatim:[/] the decoded text is not the written one. Allow more --steps or more "
            "--memory-tokens, or write a shorter --text."
        )
    console.print(describe_size(result.memory_bytes, result.kv_cache_bytes))
    console.print()
    console.print(
        "What this shows is storage. This model was never trained to use such vectors, so it can recite the text but "
        "not answer questions about it. Answering needs a trained adapter, such as the two below: give one to "
        "`hf-gradmem write` and `hf-gradmem ask` as --model.",
        markup=False,
    )


def _tell_retrieval(console: Console, retrieval: Retrieval) -> None:
    console.print()
    console.print(
        "A trained adapter answers. This one, gradmem-kv-tiny, is a tiny model that learned to look values up by key: "
        "two gradient steps write the pairs below into 8 vectors, the pairs are gone, and each is asked for. Beside it "
        "the same model, trained as long, that writes by two forward passes in place of the steps.",
        markup=False,
    )
    _tell_fact(console, "Written", " ".join(retrieval.context))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("query", "answer from memory", "forward passes only", "expected"):
        table.add_column(name)
    for query, *answers, expected in zip(
        retrieval.queries, retrieval.answers, retrieval.forward_answers, retrieval.expected, strict=True
    ):
        shown = [Text(answer, style="green" if answer == expected else "red") for answer in answers]
        table.add_row(Text(query), *shown, Text(expected))
    console.print(table)


def _tell_fact(console: Console, name: str, value: str) -> None:
    console.print()
    console.print(name, style="bold")
    console.print(Padding(Text(value), (0, 0, 0, 2), expand=False))


def _spread(count: int, at_most: int) -> list[int]:
    """Evenly spread indices into `count` items, the first and the last among them."""
    if count <= at_most:
        return list(range(count))
    return [round(row * (count - 1) / (at_most - 1)) for row in range(at_most)]
