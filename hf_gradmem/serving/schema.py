"""What requests may hold, in OpenAI's terms where there are any. What would be ignored is refused, but for `user`."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from ..texts.reading import check_unicode
from .engine import Sampling

_GREEDY_BELOW = 1e-4  # where the likeliest token is drawn as good as always, and logits over less leave float32


def _unicode(text: str) -> str:
    """The text, if tokenizers take it: JSON can spell half of a surrogate pair, such as "\\ud83d", by itself."""
    try:
        check_unicode(text, "The text")
    except ValueError as error:
        raise PydanticCustomError("not_unicode", "{said}", {"said": str(error)}) from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]
"""A text in whole characters."""

# Told apart beforehand, so that what is wrong with a list is said of the list, and not that it is no text.
Texts = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[list[Text], Tag("<texts>")],
    Discriminator(lambda given: "<texts>" if isinstance(given, list) else "<text>"),
]
"""A text, or a list of them."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewMemory(_Request):
    """A context to be written.

    Attributes:
        context: a text, or its segments, each of which is reconstructed on its own.
        id: to ask for it by; one is made up when absent.
    """

    context: Texts
    id: Text | None = None


class _Continuation(_Request):
    """What completions and chat completions have in common.

    Attributes:
        model: its name, which is checked.
        memory: id of the memory to read.
        temperature: 0, which is greedy, by default; so is any below 0.0001.
        top_p, seed, stop, stream, stream_options, max_tokens: as in OpenAI's API.
        n: 1; no more answers are given to a request.
        user: taken and not looked at.
    """

    model: Text
    memory: Text
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)  # as in OpenAI's API: an int64
    stop: Texts = Field(default_factory=list)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    n: Literal[1] = 1
    user: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """Null is as good as absent, as in OpenAI's API."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _with_its_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("no_stream", "stream_options goes with stream: true")
        return self

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen. Greedy answers do not differ by what a draw depends on."""
        if self.temperature < _GREEDY_BELOW:
            return Sampling()
        return Sampling(self.temperature, self.top_p, self.seed)

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop
        return tuple(text for text in given if text)


class Completion(_Continuation):
    """A prompt, which is continued as it stands."""

    prompt: Text


class Message(_Request):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text


class ChatCompletion(_Continuation):
    """A chat, of which the last turn is the user's."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _with_one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("two_limits", "Give either max_completion_tokens or max_tokens, and not both")
        return self


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
