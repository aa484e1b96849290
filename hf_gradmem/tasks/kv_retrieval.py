"""Key-value retrieval, the paper's synthetic task: write N pairs, then ask for values by key (or keys by value).

The text is the paper's: context `!k1:v1!!k2:v2!…|`, query `?!k:`, target `v!|`. A pair is a segment: it begins with
what a query will name. A backward query asks `?:v!` and is answered `k:|`. `mixed_orders` gives each pair in one order,
`!k:v!` or `:v!k:`, and asks it by what stands first.
"""

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset, IterableDataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from . import generated
from .generated import number_range
from .rows import SPLITS, check_split
from .task import Task

SYMBOLS = string.ascii_lowercase + string.ascii_uppercase + string.digits
PUNCTUATION = "!:?"
END = "|"
PAD, BOS, UNKNOWN = "<pad>", "<bos>", "<unk>"
Asked = Literal["both", "forward", "backward"]


@dataclass(frozen=True)
class KVRetrieval:
    """The distribution that contexts are drawn from; `row` is a pure function of its seed and an index.

    Attributes:
        num_pairs: pairs in a context, or the smallest and largest number, of which each context draws one.
        key_length, value_length: symbols in a key and in a value.
        num_symbols: how many of the 62 symbols (a–z, A–Z, 0–9) are used.
        noise_length: random symbols after each pair, outside its delimiters.
        queries_per_context: queries on a context, about different pairs; one on each pair when `None`.
        backward: share of queries that give the value and ask for the key. Above 0 the values are distinct as well.
        end_mark: whether the context ends in `|`, as in the paper.
        mirrored: give each pair in both orders, as two segments: `!k:v!` and `:v!k:`. Written that way, a pair begins
            with what a query of either direction will name.
        mixed_orders: give each pair once, as `!k:v!` or `:v!k:` with probability one half, and ask it by what stands
            first: forward (`?!k:`) or backward (`?:v!`). The values are distinct as well, and orders are drawn anew
            until both occur, which takes two pairs.
        asked: which pairs of mixed orders are asked: `"both"`, or only the `"forward"` or `"backward"` ones. The
            contexts are the same; those with fewer such pairs than `queries_per_context` bring fewer queries.
        shared_first_symbol: whether the values of a context begin with one symbol, drawn for each context. The first
            symbol of an answer then tells nothing about the pair: a control, as an easy symbol flatters exact match.
        segmented: whether each pair is a segment; otherwise the context is one, as in the paper.
        seed: of the stream.
        split: streams of different splits are independent.

    Raises:
        ValueError: a value is out of range, there are not so many distinct keys (or values), or two arguments exclude
            each other.
    """

    num_pairs: int | Sequence[int] = 8
    key_length: int = 2
    value_length: int = 2
    num_symbols: int = len(SYMBOLS)
    noise_length: int = 0
    queries_per_context: int | None = None
    backward: float = 0.0
    end_mark: bool = True
    mirrored: bool = False
    mixed_orders: bool = False
    asked: Asked = "both"
    shared_first_symbol: bool = False
    segmented: bool = True
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        check_split(self.split)
        generated.check_flags_of(self)
        if not 1 <= self.num_symbols <= len(SYMBOLS):
            raise ValueError(f"num_symbols must lie in 1..{len(SYMBOLS)}, got {self.num_symbols}.")
        for name, lowest in (("key_length", 1), ("value_length", 1), ("noise_length", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {getattr(self, name)}.")
        if self.queries_per_context is not None and self.queries_per_context < 1:
            raise ValueError(f"queries_per_context must be at least 1, got {self.queries_per_context}.")
        if not 0 <= self.backward <= 1:
            raise ValueError(f"backward is a share and must lie in 0..1, got {self.backward}.")
        fewest, most = number_range("num_pairs", self.num_pairs)
        self._check_orders(fewest)
        if self.shared_first_symbol and self.value_length < 2:
            raise ValueError(
                f"shared_first_symbol leaves nothing to tell values of value_length={self.value_length} apart: "
                "it takes at least 2."
            )
        lengths = [self.key_length]
        if self._distinct_values:
            lengths.append(self.value_length - self.shared_first_symbol)
        if most > self.num_symbols ** min(lengths):
            raise ValueError(
                f"num_pairs={most} needs as many distinct keys (and values, for backward queries), but words of "
                f"{min(lengths)} of {self.num_symbols} symbols are only {self.num_symbols ** min(lengths)}."
            )

    def _check_orders(self, fewest_pairs: int) -> None:
        if self.asked not in get_args(Asked):
            raise ValueError(f"asked must be one of {', '.join(get_args(Asked))}, got {self.asked!r}.")
        if not self.mixed_orders:
            if self.asked != "both":
                raise ValueError(
                    f"asked={self.asked!r} chooses among pairs of mixed_orders, which is off: set it, or backward=0 "
                    "or 1 for queries of one direction."
                )
            return
        if self.mirrored or self.backward:
            raise ValueError(
                f"mixed_orders gives each pair in one order and asks it by what stands first, so it excludes mirrored "
                f"and backward > 0 (got mirrored={self.mirrored}, backward={self.backward})."
            )
        if fewest_pairs < 2:
            raise ValueError(f"mixed_orders takes at least 2 pairs, one in each order, got num_pairs={self.num_pairs}.")

    @property
    def _distinct_values(self) -> bool:
        return self.backward > 0 or self.mixed_orders

    def row(self, index: int) -> dict[str, Any]:
        """The context of this index in the stream, with its queries and targets."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        fewest, most = number_range("num_pairs", self.num_pairs)
        count = fewest if fewest == most else int(rng.integers(fewest, most + 1))
        keys = self._words(rng, count, self.key_length, distinct=True)
        values = self._values(rng, count)
        noise = self._words(rng, count, self.noise_length, distinct=False)
        reversed_pairs = self._orders(rng, count)
        triples = list(zip(keys, values, noise, strict=True))
        segments = [
            f":{value}!{key}:{rest}" if turned else f"!{key}:{value}!{rest}"
            for (key, value, rest), turned in zip(triples, reversed_pairs, strict=True)
        ]
        if self.mirrored:
            segments += [f":{value}!{key}:{rest}" for key, value, rest in triples]
        if self.end_mark:
            segments[-1] += END
        order = rng.permutation(count)
        if self.asked != "both":
            order = order[reversed_pairs[order] == (self.asked == "backward")]
        queries, targets = [], []
        for pair in order[: self.queries_per_context or count]:
            if reversed_pairs[pair] or (self.backward and rng.random() < self.backward):
                queries.append(f"?:{values[pair]}!")
                targets.append(f"{keys[pair]}:{END}")
            else:
                queries.append(f"?!{keys[pair]}:")
                targets.append(f"{values[pair]}!{END}")
        context = segments if self.segmented else ["".join(segments)]
        return {"context": context, "queries": queries, "targets": targets}

    def _values(self, rng: np.random.Generator, count: int) -> list[str]:
        if not self.shared_first_symbol:
            return self._words(rng, count, self.value_length, self._distinct_values)
        first = SYMBOLS[int(rng.integers(self.num_symbols))]
        rests = self._words(rng, count, self.value_length - 1, self._distinct_values)
        return [first + rest for rest in rests]

    def _orders(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Which pairs stand value first: (count,) of bool. Mixed orders hold at least one of each."""
        turned = np.zeros(count, dtype=bool)
        # Anew until both occur, so that a context has a query of either direction; the same whatever is asked.
        while self.mixed_orders and turned.all() == turned.any():
            turned = rng.random(count) < 0.5
        return turned

    def _words(self, rng: np.random.Generator, count: int, length: int, distinct: bool) -> list[str]:
        if length == 0:
            return [""] * count
        base = self.num_symbols
        if base**length >= 2**63:  # more words than NumPy counts, of which no two would be the same
            found: dict[str, None] = {}
            while len(found) < count:
                found["".join(SYMBOLS[place] for place in rng.integers(base, size=length))] = None
            return list(found)
        numbers = rng.choice(base**length, size=count, replace=not distinct)
        return ["".join(SYMBOLS[int(number) // base**place % base] for place in range(length)) for number in numbers]


def load(split: str = "train", *, num_contexts: int = 1000, **arguments: Any) -> Dataset:
    """The first `num_contexts` contexts of a stream, as a table.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        num_contexts: how many contexts.
        arguments: those of [`KVRetrieval`].
    """
    return generated.table(KVRetrieval(split=split, **arguments), num_contexts)


def stream(
    split: str = "train", *, num_contexts: int | None = None, num_shards: int = 1, first: int = 0, **arguments: Any
) -> IterableDataset:
    """The same contexts, generated as they are needed.

    Shard s holds the contexts `first` + s, `first` + s + `num_shards`, …; processes and workers share the shards
    between them, so that each context is drawn once. With one shard it is the processes that share each batch, and the
    order does not depend on their number.

    Args:
        split: `"train"`, `"validation"` or `"test"`.
        num_contexts: how many contexts; endless when `None`, which needs as many shards as there are readers.
        num_shards: how many readers can share the stream.
        first: index of the first of them.
        arguments: those of [`KVRetrieval`].
    """
    return generated.stream(KVRetrieval(split=split, **arguments), num_contexts, num_shards, first)


def build_tokenizer(rows: Iterable[Mapping[str, Any]] = ()) -> PreTrainedTokenizerFast:
    """One token for each of the 62 symbols and the punctuation; `|` is the end token, so that answers stop there.

    Args:
        rows: not looked at. The vocabulary does not depend on them.
    """
    vocabulary = {token: index for index, token in enumerate([PAD, BOS, END, UNKNOWN, *PUNCTUATION, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=END, unk_token=UNKNOWN
    )


TASK = Task(load, stream, build_tokenizer)
