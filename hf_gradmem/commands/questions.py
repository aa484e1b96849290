"""The end of the demo: notes in English are written, gone, and asked about."""

import math
import time
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..modeling_gradmem import get_gradmem_model
from ..reading.reciting import recite
from ..tasks.facts import NOT_TOLD
from .packaged import LANGUAGE_ADAPTER

# Each note with what is asked about it, and what it says.
NOTES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Selma Quill works as a surveyor. Selma Quill has a flat in Bergen. Bruno Lindt is paid 3,400 crowns a month. "
        "Bruno Lindt bought a telescope.",
        (
            ("What does Selma Quill work as?", "surveyor"),
            ("Where does Selma Quill live?", "Bergen"),
            ("How much does Bruno Lindt earn?", "3,400 crowns"),
            ("What is Selma Quill's favourite drink?", NOT_TOLD),
        ),
    ),
    (
        "The lighthouse at Harrow Point was built in 1871 by the engineer Tobias Dahl, and its lamp burned whale oil "
        "until 1904.",
        (
            ("When was the lighthouse at Harrow Point built?", "1871"),
            ("Who built the lighthouse at Harrow Point?", "Tobias Dahl"),
            ("What did the lamp of the lighthouse burn?", "whale oil"),
        ),
    ),
)


@dataclass(frozen=True)
class Answered:
    """A question that was answered from a memory.

    Attributes:
        question: the question.
        answer: what the model generated.
        expected: what the note says.
        likelihood: of the answer's tokens, their geometric mean.
        confidence: how likely the answer is right; `None` for an adapter that is not calibrated.
    """

    question: str
    answer: str
    expected: str
    likelihood: float
    confidence: float | None = None


@dataclass(frozen=True)
class Notes:
    """What was written, and what came of it.

    Attributes:
        notes: the texts.
        recited: what their memories decode to.
        answered: the questions, in order.
        steps: of WRITE, for each note.
        seconds: that the write took.
    """

    notes: list[str]
    recited: list[str]
    answered: list[Answered]
    steps: int
    seconds: float


def answer_notes(base_name: str) -> Notes:
    """Write the notes into the base with the adapter of this package, and ask, with the notes gone.

    Args:
        base_name: directory or Hub repository of SmolLM2-135M-Instruct, which the adapter belongs to.
    """
    base_model = AutoModelForCausalLM.from_pretrained(base_name)
    model = get_gradmem_model(base_model, LANGUAGE_ADAPTER, tokenizer=AutoTokenizer.from_pretrained(base_name))
    notes = [note for note, _ in NOTES]
    begin = time.perf_counter()
    memory = model.write(notes, measure_final_loss=model.config.confidence is not None)
    seconds = time.perf_counter() - begin
    asked = [(index, *question) for index, (_, questions) in enumerate(NOTES) for question in questions]
    about, questions, expected = (list(column) for column in zip(*asked, strict=True))
    answers = model.answer(questions, memory, context_index=about, max_new_tokens=16)
    answered = [
        Answered(question, answer.text, target, math.exp(answer.log_prob), answer.confidence)
        for question, answer, target in zip(questions, answers, expected, strict=True)
    ]
    return Notes(notes, recite(model, memory), answered, memory.write_losses.shape[1], seconds)


def tell_notes(console: Console, notes: Notes) -> None:
    """The story of it on a console."""
    console.print()
    console.print(
        "And in English. The notes below go into the same pretrained model, its weights frozen: "
        f"{notes.steps} gradient steps each, {notes.seconds:.0f} s together. Then they are gone: it recites what "
        "the steps left behind, and answers from it. It was trained to read such memories, on other texts.",
        markup=False,
    )
    console.print()
    for note in notes.notes:
        console.print(Padding(Text(note), (0, 0, 0, 2), expand=False))
    console.print()
    console.print("Recited from memory:")
    console.print()
    for note, said in zip(notes.notes, notes.recited, strict=True):
        console.print(Padding(Text(said, style="green" if said == note else "red"), (0, 0, 0, 2), expand=False))
    console.print()
    table = Table(box=None, pad_edge=False, header_style="bold")
    calibrated = any(each.confidence is not None for each in notes.answered)
    for name in ("question", "answer from memory", "confidence" if calibrated else "likelihood", "the note says"):
        table.add_column(name)
    for each in notes.answered:
        right = each.answer.casefold() == each.expected.casefold()
        answer = Text(each.answer, style="green" if right else "red")
        sure = each.likelihood if each.confidence is None else each.confidence
        table.add_row(Text(each.question), answer, f"{sure:.0%}", Text(each.expected))
    console.print(table)
