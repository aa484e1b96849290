"""Which of many memories answers a question: the one under which the question itself is the most likely.

score(q, M) = (1/|q|) Σ_i log p(q_i | M, q_<i) − (1/|G|) Σ_{g∈G} (1/|g|) Σ_i log p(g_i | M, g_<i)

in nats per token, as READ puts questions, with nothing recited. Some memories make every question likely, so each
one's mean over questions G that ask about nothing in particular is taken off. These means are kept beside the store, by
the content of each memory and for each reader, so each is computed once.
"""

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..base.lora import lora_scalings
from ..base.weights import hash_tensors
from ..files import save_tensors
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.queries import Queries, tokenize_queries
from ..reading.scoring import mean_log_probs
from .written import GradMemMemory

Tensor = torch.Tensor
Batches = Iterable[tuple[list[str], GradMemMemory]]

GENERIC_QUESTIONS = (
    "What is this about?",
    "Who is it?",
    "When did it happen?",
    "Where is it?",
    "How many are there?",
    "What is the name of it?",
    "Why did they do that?",
    "What was the result?",
    "Which one is the largest?",
    "How long did it take?",
    "Who made it?",
    "What does it cost?",
)
"""Questions about nothing in particular, which each memory's scores are compared with."""
_FORMAT = "gradmem-search-means"
_FORMAT_VERSION = "1"


@dataclass(frozen=True)
class SearchResult:
    """A memory that was found.

    Attributes:
        id: of the memory in its store.
        score: how well it fits the question. By likelihood, nats per token of the question over those of questions
            about nothing in particular; by words, BM25; by both, the sum of these, standardised over the memories.
    """

    id: str
    score: float


def joined(likely: Sequence[SearchResult], words: Sequence[SearchResult]) -> list[SearchResult]:
    """Two rankings of the same memories as one: the sum of their scores, each brought to mean 0 and spread 1.

    Args:
        likely, words: scores by likelihood and by words, in any order.
    """
    by_words = {result.id: result.score for result in words}
    both = torch.tensor([[result.score, by_words[result.id]] for result in likely], dtype=torch.float64)
    spread = both.std(0, correction=0)
    # Where all are alike, which question or words cannot tell apart, there is nothing to add.
    total = ((both - both.mean(0)) / torch.where(spread > 0, spread, torch.inf)).sum(1)
    return [SearchResult(result.id, score) for result, score in zip(likely, total.tolist(), strict=True)]


class LikelihoodSearch:
    """Ranks memories for one reader.

    Args:
        model: the reader.
        calibration: questions whose mean log-probability is taken off; none for plain log-probabilities.
        folder: where the means are kept; in this object alone when `None`.

    Attributes:
        identity: a hash of the reader and the questions: of all that a mean depends on beside the memory.

    Raises:
        ValueError: a question of the calibration has no token.
    """

    def __init__(
        self, model: GradMemForCausalLM, calibration: Sequence[str] = GENERIC_QUESTIONS, folder: Path | None = None
    ) -> None:
        self.model = model
        self._calibration = [_tokens(model, question) for question in calibration]
        self.identity = _identity(model, calibration)
        self._path = None if folder is None else folder / f"means-{self.identity}.safetensors"
        self._means = {} if self._path is None else _load_means(self._path, self.identity)
        self._checked: set[str | None] = set()

    def scores(self, question: str, batches: Batches, bar: tqdm) -> list[SearchResult]:
        """The score of every memory, in their order.

        Args:
            question: the question.
            batches: ids and memories, so many at a time as are to be run together.
            bar: moved on by the number of memories.

        Raises:
            ValueError: the question has no token, or a memory is of another writer.
        """
        asked, found, known = _tokens(self.model, question), list[SearchResult](), len(self._means)
        try:
            for ids, memory in batches:
                if memory.fingerprint not in self._checked:  # which looks at the weights each time
                    self.model.check_memory(memory)
                    self._checked.add(memory.fingerprint)
                values = self._log_probs(memory, asked) - self._means_of(memory)
                found += [SearchResult(name, score) for name, score in zip(ids, values.tolist(), strict=True)]
                bar.update(len(ids))
        finally:
            if self._path is not None and len(self._means) > known:
                _save_means(self._path, self._means, self.identity)
        return found

    def _means_of(self, memory: GradMemMemory) -> Tensor:
        """The mean of each memory over the questions of the calibration, `(memories,)`."""
        if not self._calibration:
            return torch.zeros(len(memory), dtype=torch.float64)
        keys = [hashlib.sha256(row.numpy().tobytes()).digest()[:16] for row in memory.embeddings.cpu()]
        missing = [row for row, key in enumerate(keys) if key not in self._means]
        if missing:
            values = torch.stack([self._log_probs(memory[missing], asked) for asked in self._calibration])
            self._means |= zip((keys[row] for row in missing), values.mean(0).tolist(), strict=True)
        return torch.tensor([self._means[key] for key in keys], dtype=torch.float64)

    def _log_probs(self, memory: GradMemMemory, asked: Tensor) -> Tensor:
        """Mean log-probability of a question's tokens under each memory, `(memories,)`."""
        model = self.model
        ids = asked.to(model.device).expand(len(memory), -1)
        every = torch.arange(len(memory), device=model.device)
        queries = Queries(ids, torch.ones_like(ids), ids, every, (len(memory),))
        return mean_log_probs(model.read_phase, memory.to(model.device).embeddings, queries).double().cpu()


def check_search(questions: Sequence[str], method: str, calibration: Sequence[str], **numbers: int | None) -> None:
    """Refuse an empty question, a way of searching that there is not, one text for several, and numbers below 1.

    Raises:
        ValueError: names the value, and what was expected.
    """
    if method not in ("likelihood", "joint", "bm25"):
        raise ValueError(f"method must be 'likelihood', 'joint' or 'bm25', got {method!r}.")
    if isinstance(calibration, str):
        raise ValueError(f"calibration must be a list of questions, got the text {calibration!r}.")
    for question in questions:
        if not question.strip():
            raise ValueError(f"The question {question!r} is empty: there is nothing to find a memory by.")
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def best_results(results: Iterable[SearchResult], count: int) -> list[SearchResult]:
    """The best of them, best first; of equals, the earlier one."""
    return heapq.nlargest(count, results, key=lambda result: result.score)


def _tokens(model: GradMemForCausalLM, question: str) -> Tensor:
    """What READ is given for a question, `(1, length)`."""
    tokens, _ = tokenize_queries([question], model.tokenizer, model.config.template)
    if not question or tokens.shape[1] == 0:
        raise ValueError(f"The question {question!r} has no token: there is nothing to find a memory by.")
    return tokens


def _identity(model: GradMemForCausalLM, calibration: Sequence[str]) -> str:
    """A hash of all that a mean depends on beside the memory: what READ uses, its words, and the questions."""
    lora = lora_scalings(model.base_model, model.read_phase.name)
    own = hash_tensors(model.read_phase.extra_tensors())
    tokens = [
        _tokens(model, question).tolist() for question in calibration
    ]  # the template and the tokenizer are in them
    facts: list[Any] = [model.fingerprint(), own, lora, str(model.dtype), tokens]
    if header := model.read_phase.header_ids:  # where there is none, means that lie beside a store already still count
        facts.append(header)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _load_means(path: Path, identity: str) -> dict[bytes, float]:
    """The means in a file; none where there is no such file, or one of something else: they are then computed anew."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            keys, means = file.get_tensor("keys"), file.get_tensor("means")
    except (OSError, SafetensorError):
        return {}
    expected = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "identity": identity}
    whole = keys.dtype == torch.uint8 and keys.shape == (len(means), 16) and means.dtype == torch.float64
    if header != expected or not whole or not bool(means.isfinite().all()):
        return {}
    data = keys.numpy().tobytes()
    return {data[place * 16 : place * 16 + 16]: mean for place, mean in enumerate(means.tolist())}


def _save_means(path: Path, means: dict[bytes, float], identity: str) -> None:
    keys = torch.frombuffer(bytearray(b"".join(means)), dtype=torch.uint8).reshape(-1, 16)
    tensors = {"keys": keys, "means": torch.tensor(list(means.values()), dtype=torch.float64)}
    header = {"format": _FORMAT, "format_version": _FORMAT_VERSION, "identity": identity}
    try:
        save_tensors(tensors, path, header)
    except OSError:  # a store that is not ours to write to: the means are computed again by the next process
        return
