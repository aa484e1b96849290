"""The command line, `hf-gradmem`.

Exit codes: 0 done; 1 tried and failed; 2 the command cannot be carried out as it was given; 130 interrupted. What a
command is asked for goes to stdout, everything else to stderr. Modules that need torch are imported by the commands.
"""

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .evaluation.tokens import TokenLosses
    from .memory import GradMemMemory
    from .modeling_gradmem import GradMemForCausalLM

FAILURE, MISTAKE, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="hf-gradmem",
    help="Write a context into a few memory vectors by gradient descent, and read from them with the context gone.",
    epilog="First steps:  [cyan]hf-gradmem demo[/]\n\nHelp on a command:  [cyan]hf-gradmem write --help[/]",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object for machines in place of text.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, mps, ...")]
Seed = Annotated[int, typer.Option(help="Seed of the random vectors that a base without an adapter writes from.")]
MODEL_HELP = "Directory or Hub repository of a GradMem adapter, or of any decoder."


def main() -> None:
    """Entry point of `hf-gradmem`."""
    app()


# ---------------------------------------------------------------------------------------------------- manners


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Run a command quietly, and report the user's mistakes and failures in one line in place of a stack trace."""

    @functools.wraps(function)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            with _quiet():
                function(*arguments, **options)
        except KeyboardInterrupt:
            _stop("Interrupted.", INTERRUPTED)
        except BrokenPipeError:
            raise
        except FloatingPointError as error:
            _stop(f"Error: {error}", FAILURE)
        except (ImportError, ValueError, TypeError, OSError) as error:
            _stop(f"Error: {error}", MISTAKE)

    return run


def _stop(message: str, code: int) -> NoReturn:
    typer.echo(" ".join(message.split()), err=True)
    raise typer.Exit(code)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries underneath for a span; this package's own warnings become one line each."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bar_was_enabled, hub_bars_disabled = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not hub_bars_disabled:
        enable_progress_bars()  # those of downloads, which the line before switched off as well
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"hf_gradmem\b")
            warnings.showwarning = lambda message, *_: typer.echo(f"Warning: {message}", err=True)
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bar_was_enabled:
            logging.enable_progress_bar()


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


# ---------------------------------------------------------------------------------------------------- demo


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem demo[/]\n\n"
    '[cyan]hf-gradmem demo --text "Gate 7 opens at 06:45." --memory-tokens 2[/]\n\n'
    "[cyan]hf-gradmem demo --json > demo.json[/]"
)
@_command
def demo(
    text: Annotated[str | None, typer.Option(help="Write this in place of the demo's own paragraph.")] = None,
    steps: Annotated[int, typer.Option(help="Take at most so many steps.")] = 200,
    memory_tokens: Annotated[int, typer.Option(help="How many memory vectors to write into.")] = 8,
    seed: Seed = 0,
    model: Annotated[str | None, typer.Option(help="Another base than SmolLM2-135M-Instruct.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a paragraph into 8 vectors of a small pretrained model, and decode it from them.

    Takes one or two minutes on two cores, and half a minute more at the first run, which unpacks the model.

    Exits with 1 unless the decoded text is the written one, character for character.
    """
    from .demo import TEXT, run_demo

    result = run_demo(
        Console(quiet=as_json, highlight=False),
        text=TEXT if text is None else text,
        model_name=model,
        steps=steps,
        num_memory_tokens=memory_tokens,
        seed=seed,
        device=device,
    )
    if as_json:
        _print_json(result.to_dict())
    if not result.verbatim:
        raise typer.Exit(FAILURE)


# ---------------------------------------------------------------------------------------------------- write


@app.command(
    epilog="Examples:\n\n"
    '[cyan]hf-gradmem write "Gate 7 opens at 06:45." --model ./adapter --output ./memory[/]\n\n'
    "[cyan]hf-gradmem write --file notes.txt --model HuggingFaceTB/SmolLM2-135M-Instruct --output ./memory[/]\n\n"
    "[cyan]cat notes.txt | hf-gradmem write --model ./adapter --output ./memory --steps 5 --json[/]"
)
@_command
def write(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    output: Annotated[Path, typer.Option(help="Directory to save the memory in.")],
    text: Annotated[str | None, typer.Argument(help="The context. Read from --file or stdin when absent.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the context from this UTF-8 file.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of gradient descent.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Step size.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Stop once the loss is below this, in nats per token; 0 never stops.")
    ] = None,
    memory_tokens: Annotated[int | None, typer.Option(help="Memory vectors (base without an adapter only).")] = None,
    optimizer: Annotated[
        Literal["sgd", "momentum", "adam"] | None, typer.Option(help="Update rule (base without an adapter only).")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a context into a memory and save it.

    Options that are not given are the adapter's own.

    A base without an adapter gets 8 vectors and at most 200 steps of Adam at 0.02; it stops at a loss of 0.03.
    """
    from .loading import PLAIN_BASE_TOLERANCE, is_adapter, load_model
    from .report import memory_facts

    context = _read_context(text, file)
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file, not a directory.")
    options = {"num_memory_tokens": memory_tokens, "write_optimizer": optimizer}
    options = {name: value for name, value in options.items() if value is not None}
    adapter = is_adapter(model)
    if adapter and options:
        raise ValueError("--memory-tokens and --optimizer are for a base without an adapter; an adapter has its own.")
    writer = load_model(model, options, seed=seed, device=device)
    if tolerance is None and not adapter:
        tolerance = PLAIN_BASE_TOLERANCE
    memory = writer.write(
        context,
        write_steps=steps,
        write_learning_rate=learning_rate,
        tolerance=tolerance,
        show_progress=sys.stderr.isatty() and not as_json,
        measure_final_loss=True,
    )
    memory.save_pretrained(output)
    facts = {"memory": str(output), **memory_facts(memory)}
    if as_json:
        _print_json(facts)
    else:
        _print_memory(facts)


def _read_context(text: str | None, file: Path | None) -> str:
    """The context from one of its three sources; the newlines that end a file or stdin are not part of it."""
    if text is not None and file is not None:
        raise ValueError("Give the context as an argument or as --file, and not both.")
    if text is None and file is None and sys.stdin.isatty():
        raise ValueError("There is no context: give it as an argument, as --file, or on stdin.")
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8").rstrip("\n")
        elif text is None:
            text = sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file or 'stdin'} is not UTF-8 text ({error}).") from error
    if not text:
        raise ValueError("The context is empty.")
    return text


# ---------------------------------------------------------------------------------------------------- write-dataset


@app.command(
    "write-dataset",
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem write-dataset notes.jsonl --model ./adapter --out memories/[/]\n\n"
    "[cyan]accelerate launch -m hf_gradmem.cli write-dataset notes.parquet --model ./adapter --out memories/[/]\n\n"
    '[cyan]hf-gradmem ask "When does gate 7 open?" --memories memories/ --id airport --model ./adapter[/]',
)
@_command
def write_dataset(
    source: Annotated[str, typer.Argument(help="A .jsonl, .csv or .parquet file, or a data set on the Hub.")],
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    out: Annotated[Path, typer.Option(help="Directory of the memories.")],
    context_column: Annotated[str, typer.Option(help="Column of the contexts: texts, or lists of texts.")] = "context",
    id_column: Annotated[
        str | None, typer.Option(help="Column of the ids; 'id' where there is one, else rows are numbered.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of a data set on the Hub.")] = "train",
    batch_size: Annotated[int, typer.Option(help="Contexts to write at a time.")] = 8,
    shard_size: Annotated[int, typer.Option(help="Memories in a file; what a killed run loses at most.")] = 1000,
    steps: Annotated[int | None, typer.Option(help="Steps of gradient descent.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Step size.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Stop once the loss is below this, in nats per token; 0 never stops.")
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a memory for each row of a data set, to be looked up by id.

    Given again after an interruption, the command writes what is missing. Under accelerate launch, or torchrun, the
    processes share the work. The result is a data set of Parquet files, which can be pushed to the Hub as it is.

    Options that are not given are the adapter's own; a base without an adapter writes as in hf-gradmem write.
    """
    from .loading import PLAIN_BASE_TOLERANCE, is_adapter, load_model
    from .memory_store import without_progress_bars
    from .write_dataset import load_source, processes
    from .write_dataset import write_dataset as write_rows

    with without_progress_bars():
        rows = load_source(source, split)
    if tolerance is None and not is_adapter(model):
        tolerance = PLAIN_BASE_TOLERANCE
    state = processes(cpu=True if device == "cpu" else None)
    if device == "auto" and (state.num_processes > 1 or state.device.type == "cpu"):
        device = str(state.device)
    facts = write_rows(
        load_model(model, seed=seed, device=device),
        rows,
        out,
        context_column=context_column,
        id_column=id_column,
        batch_size=batch_size,
        shard_size=shard_size,
        write_steps=steps,
        write_learning_rate=learning_rate,
        tolerance=tolerance,
        # Without the way to them: the facts are pushed with the memories.
        model_name=_last_name(model),
        source_name=_last_name(source),
        show_progress=sys.stderr.isatty() and not as_json,
    )
    state.destroy_process_group()
    if not state.is_main_process:
        return
    if as_json:
        _print_json({"memories": str(out), **facts})
        return
    vectors = f"{facts['num_memory_tokens']} vectors of width {facts['hidden_size']}, {facts['dtype']}"
    table = [("memories", f"{out}: {facts['num_rows']} in {facts['num_shards']} files"), ("each", vectors)]
    Console(highlight=False).print(_table([*table, ("written for", facts["fingerprint"])]))


def _last_name(name: str) -> str:
    path = Path(name).expanduser()
    return path.resolve().name if path.exists() else name


# ---------------------------------------------------------------------------------------------------- ask


@app.command(
    epilog="Examples:\n\n"
    '[cyan]hf-gradmem ask "When does gate 7 open?" --memory ./memory --model ./adapter[/]\n\n'
    '[cyan]hf-gradmem ask "Which gate?" --memory ./memory --model ./adapter --template chat --max-new-tokens 20[/]\n\n'
    '[cyan]hf-gradmem ask "Which gate?" --memories memories/ --id airport --model ./adapter[/]'
)
@_command
def ask(
    question: Annotated[str, typer.Argument(help="What to continue from the memory.")],
    model: Annotated[str, typer.Option(help="The model that the memory was written with.")],
    memory: Annotated[str | None, typer.Option(help="Directory, file or Hub repository of the memory.")] = None,
    memories: Annotated[
        str | None, typer.Option(help="What write-dataset wrote, or a Hub data set of it, in place of --memory.")
    ] = None,
    name: Annotated[str | None, typer.Option("--id", help="Which of the memories to read.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 50,
    template: Annotated[
        Literal["none", "chat"], typer.Option(help="Put the question into the tokenizer's chat template.")
    ] = "none",
    index: Annotated[int | None, typer.Option(help="Which memory to read, where there are several.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a question from a memory: print the model's greedy continuation.

    Sensible answers need a trained adapter; a base without one can only continue the text of its memory.
    """
    from .inputs import tokenize_queries
    from .loading import load_memory, load_reader
    from .reading import ending_tokens

    if (memory is None) == (memories is None):
        raise ValueError("Give the memory either as --memory, or as --memories and --id.")
    if (memories is None) != (name is None) or (memories is not None and index is not None):
        raise ValueError("--id goes with --memories, and --index with --memory.")
    chosen = _choose(load_memory(memory), index) if memories is None else _look_up(memories, name)
    reader = load_reader(model, chosen, device=device)
    tokenizer = reader.tokenizer
    if template == "chat" and tokenizer.chat_template is None:
        raise ValueError(f"The tokenizer of {model} has no chat template. Use --template none.")
    input_ids, attention_mask = tokenize_queries([question], tokenizer, template)
    if input_ids.numel() == 0:
        raise ValueError("The question is empty.")
    tokens = reader.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        memory=chosen,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **ending_tokens(tokenizer, reader.generation_config),
    )
    answer = tokenizer.decode(tokens[0, input_ids.shape[1] :], skip_special_tokens=True)
    if as_json:
        source = {"memory": memory} if memories is None else {"memories": memories, "id": name}
        _print_json({"question": question, "answer": answer, **source, "model": model})
    else:
        typer.echo(answer)


def _look_up(memories: str, name: str) -> "GradMemMemory":
    from .loading import load_store
    from .memory_store import without_progress_bars

    with without_progress_bars():
        store = load_store(memories)
    if name not in store:
        raise ValueError(f"There is no memory {name!r} in {memories}, which has {len(store)}.")
    return store[name]


def _choose(memory: "GradMemMemory", index: int | None) -> "GradMemMemory":
    if index is None and len(memory) > 1:
        raise ValueError(
            f"There are {len(memory)} memories here. Say with --index which to read: 0..{len(memory) - 1}."
        )
    if index is not None and not 0 <= index < len(memory):
        raise ValueError(f"--index must lie in 0..{len(memory) - 1}, got {index}.")
    return memory[index or 0]


# ---------------------------------------------------------------------------------------------------- inspect


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem inspect ./memory[/]\n\n"
    "[cyan]hf-gradmem inspect ./memory --model ./adapter[/]\n\n"
    "[cyan]hf-gradmem inspect ./memory --model ./adapter --context-file notes.txt --html tokens.html[/]\n\n"
    "[cyan]hf-gradmem inspect ./memory --json[/]"
)
@_command
def inspect(
    memory: Annotated[str, typer.Argument(help="Directory, file or Hub repository of the memory.")],
    model: Annotated[
        str | None, typer.Option(help="The model that it was written with, to decode it and weigh it against a cache.")
    ] = None,
    index: Annotated[int | None, typer.Option(help="Which memory to look at, where there are several.")] = None,
    context_file: Annotated[
        Path | None, typer.Option(help="The text that was written: show which of its tokens the memory holds.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write these tokens as a page of HTML.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a memory is and, given its model, what it holds and what it replaces."""
    from .loading import load_memory, load_reader
    from .report import decode_memory, kv_cache_bytes, memory_facts

    if html is not None and context_file is None:
        raise ValueError("--html shows the tokens of a context: give the text that was written as --context-file.")
    if context_file is not None and model is None:
        raise ValueError("--context-file needs the --model that the memory was written with.")
    context = None if context_file is None else _read_context(None, context_file)
    loaded = load_memory(memory)
    if index is not None or context is not None:
        loaded = _choose(loaded, index)
    facts = {"memory": memory, **memory_facts(loaded)}
    held = None
    if model is not None:
        reader = load_reader(model, loaded, device=device)
        for facts_of_one, decoded in zip(facts["contexts"], decode_memory(reader, loaded), strict=True):
            facts_of_one["decoded"] = decoded
            facts_of_one["kv_cache_bytes"] = kv_cache_bytes(reader, facts_of_one["tokens"])
        if context is not None:
            held = _tokens_held(reader, loaded, context, html)
            facts["token_losses"] = held.to_dict()
    if as_json:
        _print_json(facts)
        return
    _print_memory(facts)
    if held is not None:
        _print_tokens(held)


def _tokens_held(
    reader: "GradMemForCausalLM", memory: "GradMemMemory", context: str, html: Path | None
) -> "TokenLosses":
    from .evaluation.heat_map import save_heat_map
    from .evaluation.tokens import token_losses

    (held,) = token_losses(reader, memory, context)
    if html is not None:
        save_heat_map([held], html)
    return held


def _print_tokens(held: "TokenLosses") -> None:
    from .evaluation.heat_map import heat_map

    console = Console(highlight=False)
    for title, text in heat_map(held):
        console.print()
        console.print(title, style="bold", markup=False)
        console.print(text)
    console.print()
    bits = f"{held.bits_over_start:.1f} over the memory's start, {held.bits_over_base:.1f} over the base alone"
    console.print(_table([("bits recovered", bits)]))


def _print_memory(facts: dict[str, Any]) -> None:
    """A table of what [`memory_facts`] gives, and what `--model` adds to it."""
    from .report import describe_size

    console = Console(highlight=False)
    vectors = f"{facts['num_memory_tokens']} vectors of width {facts['hidden_size']}, {facts['dtype']}"
    console.print(_table([("memory", facts["memory"]), ("each", vectors), ("written for", facts["fingerprint"])]))
    for index, context in enumerate(facts["contexts"]):
        console.print()
        rows = [("context", str(index))] if len(facts["contexts"]) > 1 else []
        pieces = f" in {context['segments']} segments" if context["segments"] > 1 else ""
        rows.append(("tokens written", f"{context['tokens']}{pieces}"))
        rows.append(("steps", str(context["steps"])))
        losses = [("first", context["first_loss"]), ("last", context["last_loss"]), ("after", context["final_loss"])]
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
        rows.append(("loss (nats per token)", told or "not measured"))
        if "kv_cache_bytes" in context:
            rows.append(("size", describe_size(context["bytes"], context["kv_cache_bytes"])))
            decoded = context["decoded"]
            rows.append(("decodes to", "not shown: it was written in segments" if decoded is None else decoded))
        else:
            rows.append(("size", f"{context['bytes']:,} bytes"))
        console.print(_table(rows))


def _table(rows: list[tuple[str, str | None]]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True, min_width=21)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(str(value)))
    return table


# ---------------------------------------------------------------------------------------------------- train


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem train model_cards/gradmem-kv-tiny/recipe.yaml[/]\n\n"
    "[cyan]hf-gradmem train recipe.yaml --override seed=1 --override output_dir=runs/seed1[/]"
)
@_command
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: task, base, memory, stages and training arguments.")],
    override: Annotated[
        list[str] | None, typer.Option(help="key=value in place of the recipe's; gradmem.write_steps=5 reaches inside.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train an adapter as a recipe says.

    A run that was interrupted goes on from its last checkpoint when the command is given again.
    """
    from .training.recipe import load_recipe
    from .training.run import run_training

    loaded = load_recipe(recipe, override or ())
    results = run_training(loaded)
    if as_json:
        _print_json(results)
    else:
        typer.echo(f"Trained: {loaded.training.output_dir} ({results['steps']} steps)")


# ---------------------------------------------------------------------------------------------------- export


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem export ./memory --model ./adapter --format cartridge --output ./for-peft[/]\n\n"
    "[cyan]hf-gradmem export ./memory --model ./adapter --format prompt-embeds --output ./for-vllm[/]"
)
@_command
def export(
    memory: Annotated[str, typer.Argument(help="Directory, file or Hub repository of the memory.")],
    model: Annotated[str, typer.Option(help="The model that the memory was written with.")],
    output: Annotated[Path, typer.Option(help="Directory to write to.")],
    to_format: Annotated[
        Literal["prompt-tuning", "cartridge", "prompt-embeds"],
        typer.Option("--format", help="Adapter of stock PEFT (prompt-tuning, cartridge), or a file of embeddings."),
    ] = "prompt-tuning",
    index: Annotated[int | None, typer.Option(help="Which memory to export, where there are several.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Write a memory in a format that is read without this package: the base is all that the reader needs."""
    from .exports import PROMPT_EMBEDS_FILE
    from .loading import load_memory, load_reader

    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output} is a file, not a directory.")
    chosen = _choose(load_memory(memory), index)
    reader = load_reader(model, chosen, device=device)
    if to_format == "prompt-tuning":
        reader.export_prompt_tuning(chosen, output)
    elif to_format == "cartridge":
        reader.export_cartridge(chosen, output)
    else:
        reader.export_prompt_embeds(chosen, output / PROMPT_EMBEDS_FILE)
    if as_json:
        _print_json({"memory": memory, "format": to_format, "output": str(output)})
    else:
        typer.echo(f"Exported: {output} ({to_format})")


# ---------------------------------------------------------------------------------------------------- push


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem push ./adapter my-name/my-adapter[/]\n\n"
    '[cyan]hf-gradmem push ./memory my-name/my-memory --private --message "Minutes of May"[/]\n\n'
    "[cyan]HF_TOKEN=... hf-gradmem push model_cards/ my-name --json[/]"
)
@_command
def push(
    source: Annotated[
        Path, typer.Argument(help="Directory of an adapter, of a memory or of adapters (model_cards/), or a memory.")
    ],
    repo_id: Annotated[
        str, typer.Argument(help="Hub repository to push to; the user or organization for a directory of adapters.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository a private one.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, made if it is missing.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter or a memory to the Hugging Face Hub, with a model card, in one commit.

    The token is that of `hf auth login`, or HF_TOKEN.

    A README.md beside the adapter, or one that somebody wrote for the repository, is its card; else one is written.
    """
    from .loading import check_hub
    from .publishing import push as push_to_hub

    check_hub()
    pushed = push_to_hub(source, repo_id, private=private or None, revision=revision, commit_message=message)
    if as_json:
        facts = [
            {"source": one.source, "repo_id": one.repo_id, "commit": one.commit.oid, "url": one.commit.commit_url}
            for one in pushed
        ]
        _print_json({"pushed": facts})
    else:
        for one in pushed:
            typer.echo(f"Pushed: {one.source} -> {one.commit.repo_url} (commit {one.commit.oid[:7]})")


# ---------------------------------------------------------------------------------------------------- evaluate, plot


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem evaluate ./adapter --recipe recipe.yaml[/]\n\n"
    "[cyan]hf-gradmem evaluate ./adapter --recipe recipe.yaml --steps 1 --steps 2 --output results.json[/]\n\n"
    "[cyan]hf-gradmem evaluate ./m4 ./m8 --recipe recipe.yaml --set n4 --sweep num_pairs=4,8,16 --baseline prompt[/]"
)
@_command
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Directories or Hub repositories: adapters, or any decoder.")],
    recipe: Annotated[Path, typer.Option(help="The recipe whose evaluation sets are answered.")],
    steps: Annotated[
        list[int] | None, typer.Option(min=0, help="Steps of WRITE to measure at; the model's own when absent.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(help="prompt or none: answer by the plain base too, the context in its prompt or nowhere."),
    ] = None,
    eval_set: Annotated[
        list[str] | None, typer.Option("--set", help="Only this evaluation set of the recipe; may be repeated.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="argument=value,value,...: measure each set at each of these values of a task argument."),
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of the task: validation or test.")] = "test",
    metric: Annotated[
        Literal["exact_match", "squad", "none"] | None,
        typer.Option(help="How answers are compared; none measures losses alone. The task's own when absent."),
    ] = None,
    override: Annotated[list[str] | None, typer.Option(help="key=value in place of the recipe's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts at a time.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a recipe's evaluation sets from memory, and compare with their reference answers.

    Answers are generated; the share that is right token by token after the right ones before is given beside it.
    Running text is not answered: its loss is that of the continuation. What the memories hold is given in bits.

    A base without an adapter is given the untrained memory that the recipe's gradmem options describe.
    """
    from .evaluation.files import check_writable
    from .evaluation.readers import check_baselines
    from .evaluation.results import evaluate_model, evaluation_sets, load_sets, save_results, task_metric
    from .loading import load_model
    from .training.recipe import load_recipe

    if output is not None:
        check_writable(output)
    check_baselines(baseline or ())
    arguments = load_recipe(recipe, override or ()).arguments
    sets = evaluation_sets(arguments, eval_set or (), sweep or ())
    rows = load_sets(arguments.task, sets, split)
    chosen = task_metric(arguments.task) if metric is None else None if metric == "none" else metric
    report = {"task": arguments.task, "split": split, "metric": chosen, "results": []}
    for model in dict.fromkeys(models):
        report["results"] += evaluate_model(
            model,
            load_model(model, arguments.gradmem, seed=seed, device=device),
            rows,
            sets,
            steps or (),
            metric=chosen,
            baselines=baseline or (),
            batch_size=batch_size,
            show_progress=sys.stderr.isatty() and not as_json,
        )
        if output is not None:
            save_results(report, output)
    if as_json:
        _print_json(report)
    else:
        _print_results(report["results"])


def _print_results(records: list[dict[str, Any]]) -> None:
    """One table of the answers, and one of what the memories hold."""
    of_answers = ("exact_match", "f1", "teacher_forced_exact_match", "answer_loss", "num_answers")
    of_contexts = ("write_loss", "start_loss", "base_loss", "bits_over_start", "bits_over_base")
    _print_records(records, of_answers)
    memories = [record for record in records if record["context"] == "memory"]
    if memories:
        typer.echo()
        _print_records(memories, of_contexts)


def _print_records(records: list[dict[str, Any]], measures: tuple[str, ...]) -> None:
    names = {"write_steps": "steps", "teacher_forced_exact_match": "teacher forced"}
    conditions = ["set", "context", "write_steps"]
    if len({record["model"] for record in records}) > 1:
        conditions.insert(0, "model")
    columns = [*conditions, *(name for name in measures if any(name in record for record in records))]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        of_text = name in ("model", "set", "context")
        header = names.get(name, name.replace("_", " "))
        table.add_column(header, justify="left" if of_text else "right", no_wrap=of_text, overflow="ellipsis")
    for record in records:
        values = (record.get(name) for name in columns)
        table.add_row(
            *("" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value) for value in values)
        )
    Console(highlight=False).print(table)


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem plot results.json --output curve.png[/]\n\n"
    "[cyan]hf-gradmem plot results.json --x num_pairs --output capacity.svg[/]\n\n"
    "[cyan]hf-gradmem plot m2.json m4.json m8.json --x num_memory_tokens --y f1 --output size.png[/]"
)
@_command
def plot(
    results: Annotated[list[Path], typer.Argument(help="Results files of evaluate, drawn together.")],
    output: Annotated[Path, typer.Option(help="The picture to write: .png, .svg, .pdf, ...")],
    x: Annotated[
        str, typer.Option(help="write_steps, num_memory_tokens, or an argument of the task, as num_pairs.")
    ] = "write_steps",
    y: Annotated[str, typer.Option(help="Which measure: exact_match, f1, answer_loss, ...")] = "exact_match",
) -> None:
    """Draw a measure over the number of WRITE steps, the size of the memory, or an argument of the task."""
    from .evaluation.files import check_writable
    from .evaluation.plots import plot_results, save_picture
    from .evaluation.results import load_records

    check_writable(output)
    save_picture(plot_results(load_records(results), x, y), output)
    typer.echo(f"Drawn: {output}")


if __name__ == "__main__":
    main()
