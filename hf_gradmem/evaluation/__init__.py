"""Measuring what a memory answers."""

from .answers import answer_queries, evaluate_rows
from .metrics import ExactMatch, SquadMetric

__all__ = ["ExactMatch", "SquadMetric", "answer_queries", "evaluate_rows"]
