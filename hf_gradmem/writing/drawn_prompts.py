"""Words of a segment that stand between the memory and the segment in WRITE, drawn anew at each step.

A question names a few words of the sentence that answers it, in an order of its own. A memory that is written behind
always the same words is recalled from the beginning of a sentence; written behind these, by what a question names.
"""

import random
from dataclasses import dataclass, replace
from string import punctuation

import torch
from torch.nn.utils.rnn import pad_sequence

from ..memory.phase import Phase
from .rows import ContextRows

WORDS = "{words}"
"""What stands for the drawn words in a `write_prompt`."""
_SHARE = 0.5


@dataclass(frozen=True)
class DrawnPrompts:
    """A prompt with `{words}` in it.

    Attributes:
        prompt: the words of all segments, and where their own stand.
        phase: WRITE, whose model has the tokenizer.
    """

    prompt: str
    phase: Phase

    @property
    def num_own_tokens(self) -> int:
        """Tokens of the prompt without words of a segment."""
        return len(self._tokens(""))

    def before(self, rows: ContextRows, step: int) -> ContextRows:
        """The segments of some rows, alone, each behind the prompt that it has at a step of WRITE.

        A prompt has at most as many tokens as its segment and the prompt's own words together. What is drawn depends on
        the segment and the step and on nothing else, so that a context is written alike whatever stands beside it.
        """
        segments = [ids[scored].tolist() for ids, scored in zip(rows.input_ids, rows.scored, strict=True)]
        own = self.num_own_tokens
        prompts = [self._drawn(segment, step)[: len(segment) + own] for segment in segments]
        device = rows.input_ids.device
        ids = pad_sequence(
            [torch.tensor(prompt + segment) for prompt, segment in zip(prompts, segments, strict=True)],
            batch_first=True,
        ).to(device)
        place = torch.arange(ids.shape[1], device=device)
        begins, lengths = (torch.tensor(list(map(len, each)), device=device)[:, None] for each in (prompts, segments))
        mask = place < begins + lengths
        return replace(
            rows, input_ids=ids, attention_mask=mask, scored=mask & (place >= begins), all_behind_memory=True
        )

    def _drawn(self, segment: list[int], step: int) -> list[int]:
        """Tokens of the prompt of one segment."""
        tokenizer, rng = self.phase.module.tokenizer, random.Random(f"{step} {segment}")
        every = [word for part in tokenizer.decode(segment).split() if (word := part.strip(punctuation))]
        words = [word for word in every if rng.random() < _SHARE]
        if not words and len(every) > 1:  # of one word alone, nothing would be left to say
            words = [rng.choice(every)]
        rng.shuffle(words)
        return self._tokens(" ".join(words))

    def _tokens(self, words: str) -> list[int]:
        return self.phase.module.tokenizer(self.prompt.replace(WORDS, words), add_special_tokens=False).input_ids
