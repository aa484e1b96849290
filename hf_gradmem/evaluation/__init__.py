"""Measuring what a memory answers, and what it holds.

[`evaluate_rows`] gives a record for each number of WRITE steps, and one for each baseline. All records have

- `context`: `"memory"`, or the baseline; `write_steps`: the number, also of `"other"`, or `None`;
- the metric (`exact_match`, `f1`) of generated answers;
- `teacher_forced_exact_match`: the share of answers whose every token is the most likely one after the right ones
    before it; `answer_loss`: nats per answer token. A first token without a query before it is not scored, in any
    record: without a context nothing predicts it;
- `num_answers`, `num_answer_tokens`, `num_contexts`.

Those of a memory have, where the targets of some questions say "not in memory" and those of others do not,

- `auroc_not_in_memory`: the share of pairs of a question that the context does not answer and one that it does in which
    "not in memory" is the likelier answer to the first; ties count half;

and, about the context itself,

- `recited_verbatim`, where the template has memories recited: the share of contexts that theirs decodes to letter by
    letter. What is recited, right or wrong, stands before the questions, also for `teacher_forced_exact_match`;
- `write_loss`, `start_loss`, `base_loss`: nats per context token from the memory, from its learned start, and by the
    plain base without a memory (where it can predict the token), each the mean over contexts of the mean over tokens,
    segments and prefixes as in WRITE;
- `bits_over_start`, `bits_over_base`: mean over contexts of Σ_tokens (loss without − loss from the memory) / ln 2,
    without being from the start, and by the base: bits of context recovered. The base knows what the text says by
    itself, a start that was never trained does not: the smaller one is the safe claim;
- `bits_over_start_per_float`, `bits_over_base_per_float`: the same for each number in the memory;
- `num_context_tokens`.
"""

from .answers import answer_queries
from .measure import evaluate_rows
from .metrics import ExactMatch, SquadMetric
from .tokens import AnswerTokens, TokenLosses, answer_tokens, bits_recovered, token_losses

__all__ = [
    "AnswerTokens",
    "ExactMatch",
    "SquadMetric",
    "TokenLosses",
    "answer_queries",
    "answer_tokens",
    "bits_recovered",
    "evaluate_rows",
    "token_losses",
]
