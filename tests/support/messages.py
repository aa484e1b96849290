"""Patterns for messages."""

import re


def says(*parts: str) -> str:
    """A pattern for a message that holds these parts, in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))
