"""The tokens of a context coloured by how well they are predicted, in the terminal and as a page of HTML."""

import html
import math
import os
from collections.abc import Iterator, Sequence

from rich.text import Text

from ..files import save_text
from .tokens import TokenLosses

LIKELY = math.log(2)  # a token of a smaller loss is more likely than all others together
_WORST = 8.0  # nats, at and above which the colour is deepest: about one in 3,000
_GOOD, _BAD = (255, 255, 255), (214, 39, 40)
_CONDITIONS = {
    "base": "by the base alone, without a memory",
    "start": "from the memory's start, before WRITE",
    "memory": "from the memory, after WRITE",
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Tokens in memory</title>
<style>
body {{ font: 16px/1.7 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #000; background: #fff }}
pre {{ font: 15px/1.8 monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
</style>
</head>
<body>
<p>The colour of a token is its loss: {legend}. Point at a token for its figure.</p>
{body}
</body>
</html>
"""


def heat_map(losses: TokenLosses) -> Iterator[tuple[str, Text]]:
    """Title and coloured text of each condition: by the base alone, from the memory's start, and from the memory."""
    for name, title in _CONDITIONS.items():
        text = Text()
        for token, loss in _tokens(losses, name):
            text.append(_visible(token), style=_style(loss))
        yield f"{title} ({count_likely(losses, name)})", text


def count_likely(losses: TokenLosses, condition: str) -> str:
    """How many tokens are more likely than not, in words."""
    likely = sum(loss < LIKELY for _, loss in _tokens(losses, condition))  # not NaN, which is below nothing
    return f"{likely} of {len(losses.tokens)} tokens more likely than not"


def save_heat_map(contexts: Sequence[TokenLosses], path: str | os.PathLike) -> None:
    """Write the heat maps of contexts as one page of HTML that needs nothing else, whole or not at all."""
    parts = []
    for losses in contexts:
        bits = f"{losses.bits_over_start:.0f} bits over its start, {losses.bits_over_base:.0f} over the base alone"
        parts.append(f"<h2>{len(losses.tokens)} tokens: the memory recovers {bits}</h2>")
        for name, title in _CONDITIONS.items():
            tokens = "".join(_span(token, loss) for token, loss in _tokens(losses, name))
            parts.append(f"<h3>{html.escape(title)} ({count_likely(losses, name)})</h3>\n<pre>{tokens}</pre>")
    legend = "".join(_span(f" {nats} nats ", nats) for nats in (0, 2, 4, 6, 8))
    page = _PAGE.format(legend=legend, body="\n".join(parts))
    save_text(page, path)


def _tokens(losses: TokenLosses, condition: str) -> Iterator[tuple[str, float]]:
    return zip(losses.tokens, getattr(losses, condition).tolist(), strict=True)


def _span(token: str, loss: float) -> str:
    told = "nothing before it" if math.isnan(loss) else f"{loss:.2f} nats"
    color = "" if math.isnan(loss) else f' style="background: rgb{_color(loss)}"'
    return f'<span title="{told}"{color}>{html.escape(_visible(token))}</span>'


def _style(loss: float) -> str:
    return "dim" if math.isnan(loss) else "black on rgb({},{},{})".format(*_color(loss))


def _color(loss: float) -> tuple[int, int, int]:
    share = min(max(loss, 0.0) / _WORST, 1.0)
    red, green, blue = (round(good + share * (bad - good)) for good, bad in zip(_GOOD, _BAD, strict=True))
    return red, green, blue


def _visible(token: str) -> str:
    """A line break is shown as well as made, so that its colour is seen."""
    return token.replace("\n", "⏎\n")
