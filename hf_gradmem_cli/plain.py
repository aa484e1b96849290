"""Text from files and models, made safe for a terminal: every text that the commands print goes through here."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

_DELETE = 0x7F
_KEPT = "\n\t"
_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in _KEPT} | {_DELETE: 0x2421}
# Those from 0x80 on have no picture of their own; some terminals take 0x9b for the beginning of a command.
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def plain(text: str) -> str:
    """The text with a visible character in place of each control character, but for line breaks and tabs.

    As many characters as before, so that places in the text stay where they are.
    """
    return text.translate(_PICTURES)


class PlainConsole(Console):
    """A console that prints texts as [`plain`] makes them; what is coloured is coloured by styles alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render(self, *arguments: Any, **options: Any) -> Iterable[Segment]:
        for text, style, control in super().render(*arguments, **options):
            yield Segment(plain(text), style, control)
