"""What a task is: rows of contexts, queries and targets, and how they are tokenised and scored."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """A task that a memory is trained and measured on. Each module of this folder ends with its own, `TASK`.

    Attributes:
        load: `load(split, **arguments)` → the rows of `"train"`, `"validation"` or, where there is one, `"test"`, in
            the form of [`~hf_gradmem.tasks.rows`].
        stream: the same rows generated as they are read, for a task that generates them. It also takes `num_contexts`,
            and `first`, the index of the first one.
        build_tokenizer: `build_tokenizer(rows)` → a tokenizer with the task's own vocabulary, for a base that is
            trained from scratch. It takes all rows that the base is to know, loaded as it looks at them, if it does.
        metric: the metric of [`~hf_gradmem.evaluation.evaluate_rows`] that the task is scored by where nothing else is
            asked for; `None` measures losses alone.
    """

    load: Callable[..., Dataset]
    stream: Callable[..., IterableDataset] | None = None
    build_tokenizer: Callable[..., PreTrainedTokenizerBase] | None = None
    metric: str | None = "exact_match"
