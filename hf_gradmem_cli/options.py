"""Options that several commands have, under one name."""

from pathlib import Path
from typing import Annotated, Any

import typer


def output_option(text: str, *names: str) -> Any:
    """Where a command writes to, by these names or as --output."""
    return typer.Option(*(names or ("--output", "--out", "-o")), help=text)


_MODEL = (
    "Directory or Hub repository of a GradMem adapter, or of any decoder; gradmem-smollm2-135m comes with the package. "
    "A copy in the local Hub cache is used as it is; `hf download` brings it up to date."
)
_READER = "The model that the memory was written with."

Model = Annotated[str, typer.Option(help=_MODEL)]
Reader = Annotated[str, typer.Option(help=_READER)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model's Hub repository.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that the model's repository brings. Read it first."),
]
Memory = Annotated[str, typer.Argument(help="Directory, file or Hub repository of the memory.")]
MemoryRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the memory's Hub repository.")]
Index = Annotated[int | None, typer.Option(help="Which memory, where there are several.")]
OutputDirectory = Annotated[Path, output_option("Directory to write to.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--override", help="key=value in place of the recipe's; gradmem.write_steps=5 reaches inside."),
]
Steps = Annotated[int | None, typer.Option(help="Steps of gradient descent.")]
LearningRate = Annotated[float | None, typer.Option(help="Step size.")]
Tolerance = Annotated[
    float | None, typer.Option(help="Stop once the loss is below this, in nats per token; 0 never stops.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines in place of text.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps, ...")]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**63 - 1, help="Seed of the random vectors that a base without an adapter writes from."),
]
Template = Annotated[
    str | None,
    typer.Option(
        help="Words around a question: plain, question, quote, recite, chat, chat_inside; the adapter's own when "
        "absent."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Contexts at a time.")]
SegmentLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Cut texts into segments of at most so many tokens, at paragraphs and sentences. When absent, only a text "
        "that is longer than the base's window is cut, into segments that fit.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 1 if files of a folder had to be skipped.")]
