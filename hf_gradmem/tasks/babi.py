"""bAbI (Weston et al., arXiv 1502.05698): short stories of one-sentence facts, with questions on what holds now.

Each sentence is a segment, or the story is one. A question is asked of the sentences before it, and of no later one.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..texts.reading import read_text
from .rows import FEATURES, check_split, checked
from .sources import load_hub, source_name, take_split
from .task import Task

PAD, BOS, END, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
_LINE = re.compile(r"(\d+) (.*)")
_WORD = r"\w+|[^\w\s]"

# A statement, or a question with its answer.
Line = tuple[str, str | None]


def load(
    split: str = "train",
    *,
    path: str | os.PathLike | None = None,
    hub_name: str | None = None,
    hub_config: str | None = None,
    hub_split: str = "train",
    hub_revision: str | None = None,
    validation_share: float = 0.1,
    segmented: bool = True,
) -> Dataset:
    """A row for each question: the story so far, the question, its answer.

    Args:
        split: `"train"` and `"validation"` share the stories between them; `"test"` is all of them, for a test file.
        path: a file in the original text format, such as `qa1_single-supporting-fact_train.txt`.
        hub_name: a data set of one `story` a row (`id`, `type`, `text`, `answer`), such as `facebook/babi_qa`.
        hub_config, hub_split, hub_revision: which part of it, for instance `en-10k-qa1`.
        validation_share: share of the stories that are the validation part.
        segmented: whether each sentence is a segment; otherwise the story is one.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is in another format, or an argument is out of range.
    """
    check_split(split)
    source = source_name(path, hub_name)
    if path is not None:
        stories = list(parse(read_text(path), source))
    else:
        stories = _hub_stories(load_hub(source, hub_config, hub_split, hub_revision), source)
    if not stories:
        raise ValueError(f"{source} holds no story.")
    rows = [row for story in take_split(stories, split, validation_share) for row in _rows(story)]
    if not rows:
        raise ValueError(f"{source} holds no question for the {split} split.")
    if not segmented:
        rows = [row | {"context": ["".join(row["context"])]} for row in rows]
    return Dataset.from_list(list(checked(rows, source)), features=FEATURES)


def parse(text: str, source: str = "the text") -> Iterator[list[Line]]:
    """Stories of the original format: numbered lines, a new story at number 1, tabs before answer and evidence.

    Raises:
        ValueError: a line has no number, or a question no answer.
    """
    story: list[Line] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"Line {number} of {source} is not a bAbI line, a number and a sentence: {line!r}.")
        if match[1] == "1" and story:
            yield story
            story = []
        sentence, tab, rest = match[2].partition("\t")
        answer = rest.partition("\t")[0].strip()
        if tab and not answer:
            raise ValueError(f"The question in line {number} of {source} has no answer: {line!r}.")
        story.append((sentence.strip(), answer if tab else None))
    if story:
        yield story


def _hub_stories(rows: Iterable[dict[str, Any]], source: str) -> list[list[Line]]:
    stories = []
    for row in rows:
        story = row.get("story")
        if not isinstance(story, dict) or not {"type", "text", "answer"} <= story.keys():
            raise ValueError(f"{source} has no column 'story' with type, text and answer, only {sorted(row)}.")
        lines = zip(story["type"], story["text"], story["answer"], strict=True)
        stories.append([(text.strip(), answer if kind in (1, "question") else None) for kind, text, answer in lines])
    return stories


def _rows(story: list[Line]) -> Iterator[dict[str, Any]]:
    sentences: list[str] = []
    for text, answer in story:
        if answer is None:
            sentences.append(f"{text}\n")
        else:
            yield {"context": list(sentences), "queries": [text], "targets": [f" {answer}"]}


def build_tokenizer(rows: Iterable[Mapping[str, Any]]) -> PreTrainedTokenizerFast:
    """One token for each word of the rows, in alphabetical order, for a base that is trained from scratch."""
    return word_tokenizer(text for row in rows for text in [*row["context"], *row["queries"], *row["targets"]])


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each word and mark of the texts, in alphabetical order, after the special ones."""
    words = sorted({word for text in texts for word in re.findall(_WORD, text)})
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(_WORD), behavior="isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END, unk_token=UNKNOWN
    )


TASK = Task(load, build_tokenizer=build_tokenizer)
