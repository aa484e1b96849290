"""Answers read from memory: generated, and scored teacher-forced beside it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ..memory import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading import IGNORED_LABEL
from ..training.collator import DataCollatorForGradMem
from .metrics import ExactMatch, SquadMetric

METRICS = {"exact_match": ExactMatch, "squad": SquadMetric}


def answer_queries(
    model: GradMemForCausalLM,
    memory: GradMemMemory,
    queries: Sequence[str],
    context_index: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers, without special tokens.

    Args:
        model: the reader.
        memory: one or several contexts.
        queries: the questions.
        context_index: which memory each of them is about.
        max_new_tokens: most tokens of an answer.
    """
    tokenizer = model.tokenizer
    encoded = [tokenizer(query, add_special_tokens=False).input_ids for query in queries]
    width = max(map(len, encoded))
    input_ids = torch.tensor([[0] * (width - len(tokens)) + tokens for tokens in encoded])
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in encoded])
    generated = model.generate(
        input_ids,
        attention_mask=mask,
        memory=memory,
        context_index=torch.tensor(context_index),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)


def evaluate_rows(
    model: GradMemForCausalLM,
    rows: Dataset | Iterable[dict[str, Any]],
    write_steps: Sequence[int],
    metric: str = "exact_match",
    batch_size: int = 64,
    show_progress: bool = False,
) -> dict[int, dict[str, float]]:
    """Write the context of each row, answer its queries from memory, and compare, for each number of WRITE steps.

    Args:
        model: adapter and base, with a tokenizer.
        rows: of [`hf_gradmem.tasks`]: context, queries, targets, and `answers` where there are several.
        write_steps: numbers of steps to measure at.
        metric: `"exact_match"` or `"squad"`.
        batch_size: contexts at a time.
        show_progress: show a progress bar.

    Returns:
        For each number of steps the metric on generated answers; `teacher_forced_exact_match`, the share of answers
        whose every token is the most likely one after the right ones before it; `answer_loss`, nats per answer token;
        `write_loss`, nats per context token after the last step; and how many answers there were.

    Raises:
        ValueError: there are no rows, an unknown metric, or a row without text.
    """
    if metric not in METRICS:
        raise ValueError(f"There is no metric {metric!r}. The metrics are {', '.join(METRICS)}.")
    rows = list(rows)
    if not rows:
        raise ValueError("There is nothing to evaluate: no row was given.")
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    results = {}
    with tqdm(total=len(write_steps) * len(batches), desc="Evaluating", disable=not show_progress) as bar:
        for steps in write_steps:
            counts = _Counts(metric)
            for batch in batches:
                _evaluate_batch(model, batch, steps, counts)
                bar.update()
            results[steps] = counts.result()
    return results


class _Counts:
    """What adds up over the batches."""

    def __init__(self, metric: str) -> None:
        self.metric = METRICS[metric]()
        self.answers = self.right = self.tokens = self.contexts = 0
        self.answer_loss = self.write_loss = 0.0

    def result(self) -> dict[str, float]:
        return self.metric.compute() | {
            "teacher_forced_exact_match": self.right / self.answers,
            "answer_loss": self.answer_loss / self.tokens,
            "write_loss": self.write_loss / self.contexts,
            "num_answers": self.answers,
        }


@torch.no_grad()
def _evaluate_batch(model: GradMemForCausalLM, rows: list[dict[str, Any]], steps: int, counts: _Counts) -> None:
    batch = {name: values.to(model.device) for name, values in DataCollatorForGradMem(model.tokenizer)(rows).items()}
    memory = model.write(
        input_ids=batch["context_input_ids"],
        attention_mask=batch["context_attention_mask"],
        segment_ids=batch.get("context_segment_ids"),
        write_steps=steps,
        measure_final_loss=True,
    )
    labels = batch["labels"]
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels, memory=memory)
    scored = labels[..., 1:] != IGNORED_LABEL
    right = (output.logits[..., :-1, :].argmax(-1) == labels[..., 1:]) | ~scored
    answered = scored.any(-1)
    counts.right += int((right.all(-1) & answered).sum())
    counts.answers += int(answered.sum())
    counts.tokens += int(scored.sum())
    counts.answer_loss += float(output.read_loss) * int(scored.sum())
    counts.write_loss += float(memory.final_write_loss.sum())
    counts.contexts += len(rows)

    tokenizer = model.tokenizer
    queries = [query for row in rows for query in row["queries"]]
    index = [position for position, row in enumerate(rows) for _ in row["queries"]]
    targets = [target for row in rows for target in row["targets"]]
    longest = max(len(tokenizer(target, add_special_tokens=False).input_ids) for target in targets)
    answers = answer_queries(model, memory, queries, index, max_new_tokens=longest + 1)
    counts.metric.add_batch(predictions=answers, references=_references(rows, tokenizer))


def _references(rows: list[dict[str, Any]], tokenizer: Any) -> list[list[str]]:
    """The reference answers of each query, as a generated answer that is right would be decoded."""
    references = []
    for row in rows:
        for number, target in enumerate(row["targets"]):
            tokens = tokenizer(target, add_special_tokens=False).input_ids
            answers = row["answers"][number] if row.get("answers") else []
            references.append([tokenizer.decode(tokens, skip_special_tokens=True), *answers])
    return references
