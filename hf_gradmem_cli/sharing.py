"""Commands that hand over what was made: export, push."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .app import command
from .inputs import check_no_model, check_output, choose
from .options import (
    AsJson,
    Device,
    Index,
    Memory,
    MemoryRevision,
    OutputDirectory,
    Reader,
    Revision,
    Seed,
    TrustRemoteCode,
)
from .printing import print_json, report_done


@command(
    "hf-gradmem export ./memory --model ./adapter --format cartridge --output ./for-peft",
    "hf-gradmem export ./memory --model ./adapter --format prompt-embeds --output ./for-vllm",
)
def export(
    memory: Memory,
    model: Reader,
    output: OutputDirectory,
    to_format: Annotated[
        Literal["prompt-tuning", "cartridge", "prompt-embeds"],
        typer.Option("--format", help="Adapter of stock PEFT (prompt-tuning, cartridge), or a file of embeddings."),
    ] = "prompt-tuning",
    index: Index = None,
    revision: Revision = None,
    memory_revision: MemoryRevision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a memory in a format that is read without this package: the base is all that the reader needs."""
    from hf_gradmem.commands.opening import load_memory, load_reader
    from hf_gradmem.exports import EXPORTS

    check_no_model(output)
    check_output(output)
    chosen = choose(load_memory(memory, revision=memory_revision), index)
    reader = load_reader(
        model, chosen, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code
    )
    EXPORTS[to_format](reader.stock_prefix(chosen), output)
    if as_json:
        print_json({"memory": memory, "format": to_format, "output": str(output)})
    else:
        report_done(f"Exported: {output} ({to_format})")


@command(
    "hf-gradmem push ./adapter my-name/my-adapter",
    'hf-gradmem push ./memory my-name/my-memory --private --message "Minutes of May"',
    "HF_TOKEN=... hf-gradmem push model_cards/ my-name --json",
)
def push(
    source: Annotated[
        Path,
        typer.Argument(
            help="Directory of an adapter, a memory, many memories, or of adapters (model_cards/); or a memory."
        ),
    ],
    repo_id: Annotated[
        str, typer.Argument(help="Hub repository to push to; the user or organization for a directory of adapters.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if it is missing.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter or memories to the Hugging Face Hub, with a model card, in one commit.

    The token is that of `hf auth login`, or HF_TOKEN.

    A README.md beside the adapter, or one that somebody wrote for the repository, is its card; else one is written.
    """
    from hf_gradmem.commands.push import push as push_to_hub
    from hf_gradmem.hub.client import check_hub

    check_hub()
    pushed = push_to_hub(source, repo_id, private=private or None, revision=revision, commit_message=message)
    if as_json:
        facts = [
            {"source": one.source, "repo_id": one.repo_id, "commit": one.commit.oid, "url": one.commit.commit_url}
            for one in pushed
        ]
        print_json({"pushed": facts})
    else:
        for one in pushed:
            report_done(f"Pushed: {one.source} -> {one.commit.repo_url} (commit {one.commit.oid[:7]})")
