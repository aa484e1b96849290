"""What keeping a memory's keys and values beside its vectors would save, and what it would cost.

    python -m benchmarks.kept_cache --base BASE

Questions of a dozen tokens are answered in sixteen new ones by the plain base, behind a memory of input vectors. The
vectors go into the prompt, as READ has them, or their keys and values are at hand, as a store could keep them. Both
take turns in one process on one thread, and give the same tokens; what is counted is processor time, and the result is
the ratio within a round. The table goes to `benchmarks/results/kept_cache.md`.
"""

import copy
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, PreTrainedModel

from .turns import base_on_one_thread, median_and_range

TABLE = Path(__file__).parent / "results" / "kept_cache.md"
SHAPES = tuple((vectors, questions) for vectors in (8, 32) for questions in (1, 16))
QUESTION_LENGTH, NEW_TOKENS = 12, 16
Tensor = torch.Tensor


@torch.no_grad()
def memory_cache(base: PreTrainedModel, memory: Tensor) -> DynamicCache:
    """The keys and values of a memory, `(questions, num_memory_tokens, width)`."""
    return base(inputs_embeds=memory, use_cache=True).past_key_values


def generate(
    base: PreTrainedModel, memory: Tensor, questions: Tensor, kept: DynamicCache | None
) -> tuple[Tensor, float]:
    """The new tokens, and the processor seconds that they took; a kept cache is copied first, for it grows."""
    begin = time.process_time()
    past = copy.deepcopy(kept)
    inputs = torch.cat([memory, base.get_input_embeddings()(questions)], dim=1)
    tokens = base.generate(
        inputs_embeds=inputs,
        attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
        past_key_values=past,
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return tokens, time.process_time() - begin


def measure(base: PreTrainedModel, vectors: int, questions: int, rounds: int) -> tuple[list[float], list[float]]:
    """The ratio of each round, and the seconds without a kept cache; the first round warms up and is left out."""
    embedding = base.get_input_embeddings().weight
    torch.manual_seed(0)
    asked = torch.randint(len(embedding), (questions, QUESTION_LENGTH))
    memory = embedding[torch.randint(len(embedding), (vectors,))].detach().expand(questions, -1, -1)
    kept = memory_cache(base, memory)
    ratios, seconds = [], []
    for turn in range(rounds + 1):
        found = {way: generate(base, memory, asked, way) for way in ((None, kept) if turn % 2 else (kept, None))}
        if not torch.equal(found[None][0], found[kept][0]):
            raise RuntimeError(f"other tokens from the kept cache, with {vectors} vectors and {questions} questions")
        ratios.append(found[kept][1] / found[None][1])
        seconds.append(found[None][1])
    return ratios[1:], seconds[1:]


def size_ratio(base: PreTrainedModel) -> float:
    """How many numbers a position has as keys and values, for each that it has as an input vector."""
    cache = memory_cache(base, base.get_input_embeddings().weight[None, :1])
    numbers = sum(part.numel() for layer in cache.layers for part in (layer.keys, layer.values))
    return numbers / base.get_input_embeddings().embedding_dim


def main() -> None:
    """Measure, and write the table."""
    given, base = base_on_one_thread(__doc__, rounds=6)
    rows = []
    for vectors, questions in SHAPES:
        ratios, seconds = measure(base, vectors, questions, given.rounds)
        rows.append(f"| {vectors} | {questions} | {statistics.median(seconds):.2f} | {median_and_range(ratios)} |")
    TABLE.write_text(
        f"""# Keys and values of a memory, kept

`python -m benchmarks.kept_cache`: SmolLM2-135M answers questions of {QUESTION_LENGTH} tokens in {NEW_TOKENS} new ones,
behind a memory of input vectors whose keys and values are at hand, beside the same with the vectors in the prompt;
{given.rounds} rounds in turns, one thread, {given.dtype}, processor seconds.

| vectors | questions at once | seconds, vectors in the prompt | kept / in the prompt, median | from | to |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Kept, they have {size_ratio(base):.0f} numbers for each number of the vectors.
""",
        encoding="utf-8",
    )
    print(TABLE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
