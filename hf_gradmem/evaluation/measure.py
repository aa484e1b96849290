"""What is right, lost and recovered when queries are answered: from memories of so many WRITE steps, and without."""

import math
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..base.modes import evaluating
from ..base.output_head import cross_entropy
from ..base.token_ids import IGNORED_LABEL
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.scoring import count_right
from ..tasks import check_row
from ..tasks.collator import DataCollatorForGradMem, targets_of
from ..tasks.facts import NOT_TOLD
from ..tasks.rows import context_text, with_lists
from ..template import Template, get_template, template_in_use
from ..writing.contexts import Contexts
from ..writing.write import write_at_steps
from .metrics import ExactMatch, SquadMetric, auroc
from .others import OtherMemories, other_rows
from .readers import OTHER, MemoryReader, PromptReader, ReadBatch, Reader, check_baselines
from .tokens import base_token_losses, bits_recovered, memory_token_losses

Tensor = torch.Tensor

METRICS = {"exact_match": ExactMatch, "squad": SquadMetric}


def evaluate_rows(
    model: GradMemForCausalLM,
    rows: Dataset | Iterable[dict[str, Any]],
    write_steps: Sequence[int],
    metric: str | None = "exact_match",
    *,
    baselines: Sequence[str] = (),
    template: str | Mapping[str, str] | None = None,
    batch_size: int = 64,
    keep_answers: bool = False,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Answer the queries of each row with its context in the memory, in the prompt, or nowhere, and measure.

    Args:
        model: adapter and base, with a tokenizer.
        rows: of [`hf_gradmem.tasks`]: context, queries, targets, and what more is known, as `answers`.
        write_steps: numbers of WRITE steps to measure the memory at.
        metric: of generated answers: `"exact_match"`, `"squad"`, or `None` to generate none and measure losses alone,
            as for running text.
        baselines: `"prompt"`, the plain base with the context in front of the query, and `"none"`, the plain base with
            the query alone. Neither uses the memory or a LoRA. A base that was trained from scratch with its memory
            has never seen such prompts. `"other"`, the memory of another context: what the reader guesses.
        template: the words around queries and contexts; the adapter's by default.
        batch_size: contexts (and prompts) at a time. The other context of the first row is the last of its batch.
        keep_answers: give each record its `answers` as well: `row`, `query`, `answer` and `references` of each.
        show_progress: show a progress bar.

    Returns:
        A record for each number of steps, then one for each baseline: [`~hf_gradmem.evaluation`] says what is in one.

    Raises:
        ValueError: there are no rows, a row without text, an unknown metric or baseline, a negative number of steps,
            an empty query to generate from, no other context to read from, or prompts beyond the base's window.
    """
    rows, write_steps = list(map(with_lists, rows)), list(dict.fromkeys(map(operator.index, write_steps)))
    _check(rows, write_steps, metric, baselines, batch_size)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    tell_apart = metric is not None and len({_is_told(target) for row in rows for target in row["targets"]}) == 2
    size = math.prod(model.form.shape)
    totals = {
        each: _Totals(metric, size, tell_apart and each[0] == "memory") for each in _conditions(write_steps, baselines)
    }
    words = template_in_use(template, model.config.template, model.tokenizer)
    longest = 0 if metric is None else longest_answer(rows, get_template(words, model.tokenizer), model.tokenizer)
    collate = _collating(model, words)
    numbers = other_rows(rows, batch_size) if OTHER in baselines else []
    others = {steps: OtherMemories(rows, numbers) for steps in write_steps}
    with tqdm(total=len(batches) * len(totals), desc="Evaluating", disable=not show_progress) as bar, evaluating():
        for part in batches:
            batch = ReadBatch(part, collate, words)
            contexts = _Contexts(model, batch, write_steps, others) if write_steps else None
            for (context, steps), total in totals.items():
                if contexts is None or steps is None:
                    reader: Reader = PromptReader(model, with_context=context == "prompt", batch_size=batch_size)
                else:
                    reader = contexts.other(steps) if context == OTHER else contexts.memory(steps, total)
                _read(reader, batch, model.tokenizer, total, longest)
                bar.update()
    return [_record(condition, total, keep_answers) for condition, total in totals.items()]


def _check(
    rows: list[dict[str, Any]],
    write_steps: Sequence[int],
    metric: str | None,
    baselines: Sequence[str],
    batch_size: int,
) -> None:
    if metric is not None and metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}. The metrics are {', '.join(METRICS)}.")
    check_baselines(baselines)
    if not write_steps and not baselines:
        raise ValueError("There is nothing to evaluate: give a number of write_steps, or a baseline.")
    if any(steps < 0 for steps in write_steps):
        raise ValueError(f"write_steps must be at least 0, got {min(write_steps)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not rows:
        raise ValueError("There is nothing to evaluate: no row was given.")
    if OTHER in baselines and not write_steps:
        raise ValueError("The baseline 'other' reads from the memory of another context: give write_steps.")
    for index, row in enumerate(rows):
        check_row(row, f"row {index}")
        if metric is not None and not all(row["queries"]):
            raise ValueError(
                f"A query of row {index} is empty: there is nothing to answer. Measure losses alone (--metric none, or "
                "metric=None in Python), or, where other rows are questions, give the recipe's eval_sets running text "
                "as a set of its own: {task: text, path: ...}."
            )


def _collating(
    model: GradMemForCausalLM, words: str | Mapping[str, str]
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
    """What makes tensors of rows, on the model's device."""
    cutting = model.writer.cutting
    collator = DataCollatorForGradMem(model.tokenizer, template=words, **cutting)
    return lambda rows: {name: values.to(model.device) for name, values in collator(rows).items()}


def _conditions(write_steps: Sequence[int], baselines: Sequence[str]) -> list[tuple[str, int | None]]:
    """What is read from, and after how many steps where it was written."""
    steps_of = {"memory": write_steps, OTHER: write_steps}
    return [(name, steps) for name in dict.fromkeys(["memory", *baselines]) for steps in steps_of.get(name, [None])]


def _record(condition: tuple[str, int | None], total: "_Totals", keep_answers: bool) -> dict[str, Any]:
    context, steps = condition
    answers = {"answers": total.answers()} if keep_answers else {}
    return {"context": context, "write_steps": steps} | total.result() | answers


def _is_told(target: str) -> bool:
    return target.strip() != NOT_TOLD


class _Contexts:
    """The contexts of a batch, written, and what of their losses does not depend on the number of steps."""

    @torch.no_grad()
    def __init__(
        self,
        model: GradMemForCausalLM,
        batch: ReadBatch,
        write_steps: Sequence[int],
        others: Mapping[int, OtherMemories],
    ) -> None:
        self.model, self.batch, self.others = model, batch, others
        contexts = self._contexts(batch.tensors)
        self.memories = self._written(contexts, write_steps)
        self.rows = model.writer.rows(contexts)
        start = model.form.start(len(contexts))
        self.start_losses = memory_token_losses(model, self.rows, start)
        self.base_losses = base_token_losses(model, self.rows)

    def memory(self, steps: int, total: "_Totals") -> MemoryReader:
        """The memories after so many steps, counted by what they hold of the contexts."""
        memory = self.memories[steps]
        losses = memory_token_losses(self.model, self.rows, memory.embeddings)
        sizes = self.rows.num_tokens.tolist()
        split = (values.split(sizes) for values in (losses, self.start_losses, self.base_losses))
        for of_memory, of_start, of_base in zip(*split, strict=True):
            total.add_context(of_memory, of_start, of_base)
        reader = MemoryReader(self.model, memory)
        texts = reader.texts(self.batch)
        if texts is not None:
            total.add_recited(texts, self.batch.rows)
        return reader

    def other(self, steps: int) -> MemoryReader:
        """Each row with the memory of another context, after so many steps."""

        def write(row: Mapping[str, Any]) -> GradMemMemory:
            return self._written(self._contexts(self.batch.collate([row])), [steps])[steps]

        return MemoryReader(self.model, self.others[steps].of_next(self.memories[steps], write))

    def _contexts(self, tensors: Mapping[str, Tensor]) -> Contexts:
        return Contexts(
            tensors["context_input_ids"], tensors["context_attention_mask"], tensors.get("context_segment_ids")
        ).checked(self.model.device)

    def _written(self, contexts: Contexts, write_steps: Sequence[int]) -> dict[int, GradMemMemory]:
        return write_at_steps(self.model.writer, contexts, write_steps, identity=self.model.identity())


@torch.no_grad()
def _read(reader: Reader, batch: ReadBatch, tokenizer: Any, total: "_Totals", longest: int) -> None:
    first = total.counts["contexts"]
    total.counts["contexts"] += len(batch.rows)
    for logits, labels in reader.logits(batch):
        total.add_answers(logits, labels)
    if total.tell_apart and isinstance(reader, MemoryReader):
        total.add_unknown(reader.log_probs(batch, NOT_TOLD), batch.rows)
    if total.metric is not None:
        words = get_template(batch.template, tokenizer)
        total.asked += zip([first + index for index in batch.context_index], batch.queries, strict=True)
        total.predictions += reader.answers(batch, max_new_tokens=longest)
        total.references += references_of(batch.rows, words, tokenizer)


def longest_answer(rows: Sequence[Mapping[str, Any]], words: Template, tokenizer: Any) -> int:
    """How many tokens a right answer takes at most, its end among them: of all rows, in whatever batches they are."""
    texts = [text for row in rows for right in _right_rows(row) for text in targets_of(right, words)]
    return 1 + max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in dict.fromkeys(texts))


def _right_rows(row: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The row itself, and with each of the further accepted answers as a target, behind the space that parts it."""
    yield row
    spaces = [target[: len(target) - len(target.lstrip())] for target in row["targets"]]
    for accepted in zip_longest(*(row.get("answers") or []), fillvalue=""):
        yield {**row, "targets": [space + answer for space, answer in zip(spaces, accepted, strict=True)]}


def references_of(rows: list[dict[str, Any]], words: Template, tokenizer: Any) -> list[list[str]]:
    """The reference answers of each query, as a generated answer that is right would be decoded."""

    def decoded(answer: str) -> str:
        ids = tokenizer(words.target(answer), add_special_tokens=False).input_ids
        return tokenizer.decode(ids, skip_special_tokens=True)

    return [
        [decoded(answer) for answer in (target, *further)]
        for row in rows
        for target, further in zip(row["targets"], row.get("answers") or [()] * len(row["targets"]), strict=True)
    ]


class _Totals:
    """What adds up over the batches of one record: counts, and sums of losses and of bits."""

    def __init__(self, metric: str | None, memory_floats: int, tell_apart: bool) -> None:
        self.metric = metric
        self.tell_apart = tell_apart  # questions that are answered from those that are not
        self.memory_floats = memory_floats
        self.counts: Counter[str] = Counter()
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.asked: list[tuple[int, str]] = []
        self.predictions: list[str] = []
        self.references: list[list[str]] = []
        self.unknown: list[float] = []
        self.told: list[bool] = []

    def add_unknown(self, log_probs: list[float], rows: list[dict[str, Any]]) -> None:
        """Count how likely it is from each memory that it does not say what is asked."""
        self.unknown += log_probs
        self.told += [_is_told(target) for row in rows for target in row["targets"]]

    def add_answers(self, logits: Tensor, labels: Tensor) -> None:
        counts = count_right(logits.argmax(-1), labels)
        self.counts["right"] += counts.right_answers
        self.counts["answers"] += counts.answers
        self.counts["tokens"] += counts.tokens
        predicting, expected = logits[..., :-1, :], labels[..., 1:]
        scored = expected != IGNORED_LABEL
        self.sums["answer_loss"] += float(cross_entropy(predicting[scored], expected[scored]).double().sum())

    def add_recited(self, texts: list[str], rows: list[dict[str, Any]]) -> None:
        """Count the memories that recite their context to the letter."""
        self.counts["recited"] += len(texts)
        self.counts["verbatim"] += sum(
            text == context_text(row["context"]) for text, row in zip(texts, rows, strict=True)
        )

    def add_context(self, of_memory: Tensor, of_start: Tensor, of_base: Tensor) -> None:
        self.sums["write_loss"] += float(of_memory.mean())
        self.sums["start_loss"] += float(of_start.mean())
        if not bool(of_base.isnan().all()):  # a single token with nothing before it has no loss without a memory
            self.sums["base_loss"] += float(of_base.nanmean())
            self.counts["base_contexts"] += 1
        self.sums["bits_over_start"] += float(bits_recovered(of_start, of_memory))
        self.sums["bits_over_base"] += float(bits_recovered(of_base, of_memory))
        self.counts["context_tokens"] += len(of_memory)

    def answers(self) -> list[dict[str, Any]]:
        """Each question, with the row that it is about, what was answered and what would have been right."""
        return [
            {"row": row, "query": query, "answer": answer, "references": references}
            for (row, query), answer, references in zip(self.asked, self.predictions, self.references, strict=True)
        ]

    def result(self) -> dict[str, Any]:
        counts = self.counts
        result: dict[str, Any] = {}
        if not counts["tokens"]:
            raise ValueError("There is nothing to measure: no answer has a token that something stands before.")
        if self.metric is not None:
            metric = METRICS[self.metric](keep_in_memory=True)
            result |= metric.compute(predictions=self.predictions, references=self.references) or {}
        if self.unknown:
            result["auroc_not_in_memory"] = auroc(np.array(self.unknown), ~np.array(self.told))
        result |= {
            "teacher_forced_exact_match": counts["right"] / counts["answers"],
            "answer_loss": self.sums["answer_loss"] / counts["tokens"],
            "num_answers": counts["answers"],
            "num_answer_tokens": counts["tokens"],
            "num_contexts": counts["contexts"],
        }
        if not counts["context_tokens"]:
            return result
        if counts["recited"]:
            result["recited_verbatim"] = counts["verbatim"] / counts["recited"]
        names = ("write_loss", "start_loss", "base_loss", "bits_over_start", "bits_over_base")
        means = {name: self.sums[name] / counts["contexts"] for name in names}
        means["base_loss"] = self.sums["base_loss"] / counts["base_contexts"] if counts["base_contexts"] else math.nan
        means |= {f"{name}_per_float": means[name] / self.memory_floats for name in names[3:]}
        # A base that can predict none of a context's tokens has no loss: JSON knows no NaN.
        result |= {name: None if math.isnan(mean) else mean for name, mean in means.items()}
        return result | {"num_context_tokens": counts["context_tokens"]}
