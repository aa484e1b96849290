"""What is wrong with a request that could not be read: which of its fields, and why."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError

from .schema import error_body


def invalid_body(error: RequestValidationError, content_type: str | None) -> dict[str, Any]:
    """An error as OpenAI's clients read it.

    Args:
        error: of which the first mistake is told.
        content_type: that the request names.
    """
    first = error.errors()[0]
    kind, (part, *place) = first["type"], first["loc"]
    name = None
    if kind == "json_invalid":
        message = f"The body is not JSON: {first['ctx']['error']} at character {place[0]}."
    elif isinstance(error.body, bytes):  # which nobody has read, as it is not said to be JSON
        message = f"The header Content-Type must be application/json, got {content_type or 'none'}."
    elif kind == "string_unicode":
        message = "The name of a field is not valid Unicode: half a surrogate pair. This server has no such field."
    elif part == "body" and not place and isinstance(error.body, dict):  # of fields that do not go together
        message = f"{first['msg']}."
    elif part == "body" and not place:
        message = f"The body must be a JSON object, got {_kind_of(error.body)}."
    else:
        name = _field(place, error.body if part == "body" else None, missing=kind == "missing")
        message = f"{name}: {first['msg']}" + " (this server has no such field)" * ("extra" in kind)
    return error_body(message, "invalid_request_error", name)


def _field(place: Sequence[str | int], body: Any, missing: bool) -> str:
    """The name of a field from the place of a mistake, without the kinds of value that stand in it too."""
    if body is None:
        return ".".join(map(str, place))
    names = []
    for number, part in enumerate(place):
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            names.append(part)
            body = body[part]
        elif missing and number == len(place) - 1:
            names.append(part)
    return ".".join(map(str, names))


def _kind_of(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "a bool", int: "a number", float: "a number"}
    return kinds.get(type(value), "nothing")
