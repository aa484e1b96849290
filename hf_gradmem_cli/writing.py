"""Commands that write memories: demo, write, write-dataset."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .app import FAILURE, command, manners, shows_progress
from .inputs import check_output, last_name, read_contexts
from .options import (
    AsJson,
    BatchSize,
    Device,
    LearningRate,
    Model,
    OutputDirectory,
    Revision,
    Seed,
    SegmentLength,
    Steps,
    Strict,
    Tolerance,
    TrustRemoteCode,
)
from .plain import PlainConsole
from .printing import describe_vectors, describe_writer, print_facts, print_json, print_memory, suggest

if TYPE_CHECKING:
    from accelerate import PartialState

ContextFile = Annotated[
    Path | None, typer.Option(help="Read the context from this UTF-8 file, or one from each text file of a folder.")
]
Optimizer = Annotated[
    Literal["sgd", "momentum", "adam"] | None, typer.Option(help="Update rule (base without an adapter only).")
]
Source = Annotated[
    str,
    typer.Argument(help="A .jsonl, .csv or .parquet file, a folder of .txt and .md files, or a data set on the Hub."),
]
IdColumn = Annotated[
    str | None, typer.Option(help="Column of the ids; 'id' where there is one, else rows are numbered.")
]
KeepText = Annotated[
    bool, typer.Option("--keep-text", help="Keep the contexts beside their memories: ask then finds words in them.")
]


@command(
    "hf-gradmem demo",
    'hf-gradmem demo --text "Gate 7 opens at 06:45." --memory-tokens 2',
    "hf-gradmem demo --json > demo.json",
)
def demo(
    text: Annotated[str | None, typer.Option(help="Write this in place of the demo's own paragraph.")] = None,
    steps: Annotated[int, typer.Option(help="Take at most so many steps.")] = 200,
    memory_tokens: Annotated[int, typer.Option(help="How many memory vectors to write into.")] = 16,
    seed: Seed = 0,
    model: Annotated[str | None, typer.Option(help="Another base than SmolLM2-135M-Instruct.")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a paragraph into 16 vectors of a small pretrained model, and decode it from them.

    Takes one or two minutes on two cores, and half a minute more at the first run, which unpacks the model.

    Exits with 1 unless the decoded text is the written one, character for character.
    """
    from hf_gradmem.commands.demo import TEXT, run_demo

    result = run_demo(
        PlainConsole(quiet=as_json or manners.quiet),
        text=TEXT if text is None else text,
        model_name=model,
        steps=steps,
        num_memory_tokens=memory_tokens,
        seed=seed,
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(result.to_dict())
    if not result.verbatim:
        raise typer.Exit(FAILURE)


@command(
    'hf-gradmem write "Gate 7 opens at 06:45." --model ./adapter --output ./memory',
    "hf-gradmem write --file notes.txt --model HuggingFaceTB/SmolLM2-135M-Instruct --output ./memory",
    "hf-gradmem write --file notes/ --model ./adapter --output ./memories --segment-length 128",
    "cat notes.txt | hf-gradmem write --model ./adapter --output ./memory --steps 5 --json",
)
def write(
    model: Model,
    output: OutputDirectory,
    text: Annotated[str | None, typer.Argument(help="The context. Read from --file or stdin when absent.")] = None,
    file: ContextFile = None,
    segment_length: SegmentLength = None,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    tolerance: Tolerance = None,
    memory_tokens: Annotated[int | None, typer.Option(help="Memory vectors (base without an adapter only).")] = None,
    optimizer: Optimizer = None,
    batch_size: BatchSize = 8,
    strict: Strict = False,
    revision: Revision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a context into a memory and save it.

    Of a folder, each .txt and .md file is a context, in the order of their paths; their memories are saved together and
    told apart by --index. To look them up by path, or to write very many, use hf-gradmem write-dataset.

    Options that are not given are the adapter's own.

    A base without an adapter gets 8 vectors and at most 200 steps of Adam at 0.05; it stops at a loss of 0.03.
    """
    from hf_gradmem.commands.opening import PLAIN_BASE_TOLERANCE, is_adapter, load_model
    from hf_gradmem.evaluation.memory_facts import memory_facts
    from hf_gradmem.hub.client import MEMORY_FILE
    from hf_gradmem.writing.fitting import fit_contexts

    check_output(output, MEMORY_FILE)
    contexts, folder = read_contexts(text, file)
    adapter = is_adapter(model, revision=revision, trust_remote_code=trust_remote_code)
    options = _plain_base_options(adapter, num_memory_tokens=memory_tokens, write_optimizer=optimizer)
    writer = load_model(
        model, options, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code
    )
    if tolerance is None and not adapter:
        tolerance = PLAIN_BASE_TOLERANCE
    memory = writer.write(
        fit_contexts(writer.writer, writer.tokenizer, contexts, segment_length),
        write_steps=steps,
        write_learning_rate=learning_rate,
        tolerance=tolerance,
        batch_size=batch_size,
        show_progress=shows_progress(as_json),
        measure_final_loss=True,
    )
    memory.save_pretrained(output)
    facts = {"memory": str(output), **memory_facts(memory)}
    if folder is not None:
        facts["skipped"] = folder.skipped
        for of_one, name in zip(facts["contexts"], folder.ids, strict=True):
            of_one["file"] = name
    _print_written(facts, as_json, strict, model)


def _plain_base_options(is_adapter: bool, **given: Any) -> dict[str, Any]:
    from hf_gradmem.commands.opening import PLAIN_BASE_OPTIONS

    options = {name: value for name, value in given.items() if value is not None}
    if is_adapter and options:
        raise ValueError("--memory-tokens and --optimizer are for a base without an adapter; an adapter has its own.")
    return PLAIN_BASE_OPTIONS | options


def _print_written(facts: dict[str, Any], as_json: bool, strict: bool, model: str) -> None:
    if as_json:
        print_json(facts)
    elif not manners.quiet:
        print_memory(facts)
        suggest(f'hf-gradmem ask "..." --memory {facts["memory"]} --model {model}')
    _end(facts, strict)


@command(
    "hf-gradmem write-dataset notes.jsonl --model ./adapter --output memories/",
    "hf-gradmem write-dataset notes/ --model ./adapter --output memories/ --strict",
    "accelerate launch -m hf_gradmem_cli write-dataset notes.parquet --model ./adapter --output memories/",
    "hf-gradmem write-dataset notes.jsonl --model ./adapter --output memories/ --keep-text",
    'hf-gradmem ask "When does gate 7 open?" --memories memories/ --model ./adapter',
    name="write-dataset",
)
def write_dataset(
    source: Source,
    model: Model,
    output: OutputDirectory,
    context_column: Annotated[str, typer.Option(help="Column of the contexts: texts, or lists of texts.")] = "context",
    id_column: IdColumn = None,
    split: Annotated[str, typer.Option(help="Which part of a data set on the Hub.")] = "train",
    batch_size: BatchSize = 8,
    shard_size: Annotated[int, typer.Option(min=1, help="Memories in a file; what a killed run loses at most.")] = 1000,
    segment_length: SegmentLength = None,
    strict: Strict = False,
    keep_text: KeepText = False,
    steps: Steps = None,
    learning_rate: LearningRate = None,
    tolerance: Tolerance = None,
    revision: Revision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Write a memory for each row of a data set, or each text of a folder, to be looked up by id: a text's is its path.

    Given again after an interruption, the command writes what is missing. Under accelerate launch, or torchrun, the
    processes share the work. The result is a data set of Parquet files, which can be pushed to the Hub as it is.

    Options that are not given are the adapter's own; a base without an adapter writes as in hf-gradmem write.
    """
    from hf_gradmem.commands.dataset_rows import load_source
    from hf_gradmem.commands.opening import PLAIN_BASE_TOLERANCE, is_adapter, load_model
    from hf_gradmem.commands.write_dataset import write_dataset as write_rows
    from hf_gradmem.memory.shards import FACTS_FILE
    from hf_gradmem.memory.silence import without_progress_bars

    check_output(output, FACTS_FILE)
    with without_progress_bars():
        rows = load_source(source, split)
    if tolerance is None and not is_adapter(model, revision=revision, trust_remote_code=trust_remote_code):
        tolerance = PLAIN_BASE_TOLERANCE
    state, device = _process(device)
    facts = write_rows(
        load_model(model, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code),
        rows,
        output,
        context_column=context_column,
        id_column=id_column,
        batch_size=batch_size,
        shard_size=shard_size,
        write_steps=steps,
        write_learning_rate=learning_rate,
        tolerance=tolerance,
        segment_length=segment_length,
        show_progress=shows_progress(as_json),
        keep_text=keep_text,
        **_names(model, source),
    )
    state.destroy_process_group()
    if state.is_main_process:
        _print_store(output, facts, as_json, model)
    _end(facts, strict)


def _names(model: str, source: str) -> dict[str, Any]:
    """What facts call model and source: without the way to them, for they are pushed with the memories."""
    return {"model_name": last_name(model), "source_name": last_name(source)}


def _process(device: str) -> "tuple[PartialState, str]":
    """Which of the processes of a launch this is, and where it computes."""
    from hf_gradmem.commands.write_dataset import processes

    state = processes(cpu=True if device == "cpu" else None)
    if device == "auto" and (state.num_processes > 1 or state.device.type == "cpu"):
        device = str(state.device)
    return state, device


def _print_store(output: Path, facts: dict[str, Any], as_json: bool, model: str) -> None:
    if as_json:
        print_json({"memories": str(output), **facts})
    elif not manners.quiet:
        written = f"{output}: {facts['num_rows']} in {facts['num_shards']} files"
        rows = [("memories", written), ("each", describe_vectors(facts)), ("written by", describe_writer(facts))]
        cut = facts["segments"]
        if cut["contexts"]:
            told = f"{cut['total']:,}; {cut['contexts']} of {facts['num_rows']} contexts in up to {cut['most']}"
            rows.append(("segments", told))
        print_facts(rows)
        suggest(f'hf-gradmem ask "..." --memories {output} --model {model}')


def _end(facts: dict[str, Any], strict: bool) -> None:
    """With --strict, a command that had to skip files has failed."""
    if strict and facts.get("skipped"):
        raise typer.Exit(FAILURE)
