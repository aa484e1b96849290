"""Measuring what a memory answers, and what it holds."""

from .answers import answer_queries
from .measure import evaluate_rows
from .metrics import ExactMatch, SquadMetric
from .tokens import TokenLosses, bits_recovered, token_losses

__all__ = [
    "ExactMatch",
    "SquadMetric",
    "TokenLosses",
    "answer_queries",
    "bits_recovered",
    "evaluate_rows",
    "token_losses",
]
