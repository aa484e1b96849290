"""What an answer from a memory costs once the model is loaded, beside the bare generation of as many tokens.

    python -m benchmarks.answer_cost --base BASE

A note is written by the English adapter, and its questions are asked one by one, as `hf-gradmem chat` and the server
do, with the confidence's two further looks: each as the first question on a memory, for which the note is recited, as
one of four, and with nothing recited. Beside it the plain base, without memory or adapter, generates the same number of
tokens after the same question. They take turns in one process on one thread; what is counted is its processor time, and
the result is the ratio within a round. The table goes to `benchmarks/results/answer_cost.md`.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_gradmem import GradMemForCausalLM, GradMemMemory, get_gradmem_model
from hf_gradmem.commands.asking import ask_memory
from hf_gradmem.commands.packaged import LANGUAGE_ADAPTER
from hf_gradmem.reading.answering import generate_answers
from hf_gradmem.reading.queries import tokenize_queries

from .turns import base_on_one_thread, median_and_range

TABLE = Path(__file__).parent / "results" / "answer_cost.md"
NOTE = (
    "Selma Quill works as a surveyor. Selma Quill has a flat in Bergen. Selma Quill was born on 3 May 1961. "
    "Selma Quill bought a canoe."
)
QUESTIONS = (
    "What does Selma Quill work as?",
    "Where does Selma Quill live?",
    "When was Selma Quill born?",
    "What did Selma Quill buy?",
)
MOST = 16
DIRECT, RECITED = "question", "recite"
BARE = "no memory, bare generation"
Seconds = dict[str, float]


def bare_generation(model: GradMemForCausalLM, question: str, tokens: int) -> None:
    """So many tokens of the plain base after a question."""
    ids, mask = tokenize_queries([question], model.tokenizer, DIRECT)
    counts = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    pad = model.tokenizer.pad_token_id
    model.base_model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=pad, **counts)


def seconds_of(run: Callable[[], object]) -> float:
    """Processor time of a call."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def measure(model: GradMemForCausalLM, memory: GradMemMemory, rounds: int) -> list[Seconds]:
    """Seconds a question of each way, round after round; the first round warms up and is left out."""
    generated = generate_answers(model, QUESTIONS, memory, [0] * len(QUESTIONS), MOST, RECITED)
    lengths = [len(each) for each in generated.tokens]
    count = itertools.count(1)

    def new_memory() -> GradMemMemory:
        """The same to all purposes, and not known: what it recites has to be decoded."""
        return replace(memory, embeddings=memory.embeddings + 1e-6 * next(count))

    def answer(template: str, each_first: bool) -> None:
        asked = new_memory()
        for question in QUESTIONS:
            asked = new_memory() if each_first else asked
            ask_memory(model, [question], asked, max_new_tokens=MOST, template=template)

    def bare() -> None:
        for question, tokens in zip(QUESTIONS, lengths, strict=True):
            bare_generation(model, question, tokens)

    ways: dict[str, Callable[[], None]] = {
        "memory, nothing recited": lambda: answer(DIRECT, False),
        "memory, recited for its first question": lambda: answer(RECITED, True),
        "memory, recited for the first of four": lambda: answer(RECITED, False),
        BARE: bare,
    }
    found: list[Seconds] = []
    for turn in range(rounds + 1):
        order = list(ways) if turn % 2 else list(reversed(ways))
        found.append({name: seconds_of(ways[name]) / len(QUESTIONS) for name in order})
    return found[1:]


def table(found: list[Seconds], dtype: torch.dtype) -> str:
    """What was measured."""
    rows = []
    for way in found[0]:
        ratios = [each[way] / each[BARE] for each in found]
        seconds = statistics.median(each[way] for each in found)
        rows.append(f"| {way} | {seconds:.2f} | {median_and_range(ratios)} |")
    return f"""# The cost of an answer

`python -m benchmarks.answer_cost`: `gradmem-smollm2-135m-recite`, {len(QUESTIONS)} short questions about a note of four
sentences, with the confidence, beside the plain base generating as many tokens after the same question;
{len(found)} rounds in turns, one thread, {str(dtype).removeprefix("torch.")}, processor seconds a question.

| read from | seconds | of bare generation's, median | from | to |
|---|---|---|---|---|
{chr(10).join(rows)}
"""


def main() -> None:
    """Measure, and write the table."""
    given, base = base_on_one_thread(__doc__, rounds=10)
    model = get_gradmem_model(base, LANGUAGE_ADAPTER, tokenizer=AutoTokenizer.from_pretrained(given.base))
    found = measure(model, model.write(NOTE), given.rounds)
    TABLE.write_text(table(found, model.dtype), encoding="utf-8")
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
