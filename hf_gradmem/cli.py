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
    from .memory import GradMemMemory

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
        except (ValueError, TypeError, OSError) as error:
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


# ---------------------------------------------------------------------------------------------------- ask


@app.command(
    epilog="Examples:\n\n"
    '[cyan]hf-gradmem ask "When does gate 7 open?" --memory ./memory --model ./adapter[/]\n\n'
    '[cyan]hf-gradmem ask "Which gate?" --memory ./memory --model ./adapter --template chat --max-new-tokens 20[/]'
)
@_command
def ask(
    question: Annotated[str, typer.Argument(help="What to continue from the memory.")],
    memory: Annotated[str, typer.Option(help="Directory, file or Hub repository of the memory.")],
    model: Annotated[str, typer.Option(help="The model that the memory was written with.")],
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
    from .loading import load_memory, load_reader

    chosen = _choose(load_memory(memory), index)
    reader = load_reader(model, chosen, device=device)
    tokenizer = reader.tokenizer
    if template == "chat":
        if tokenizer.chat_template is None:
            raise ValueError(f"The tokenizer of {model} has no chat template. Use --template none.")
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    else:
        prompt = tokenizer(question, return_tensors="pt")
    if prompt.input_ids.numel() == 0:
        raise ValueError("The question is empty.")
    tokens = reader.generate(
        input_ids=prompt.input_ids,
        attention_mask=prompt.attention_mask,
        memory=chosen,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    answer = tokenizer.decode(tokens[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
    if as_json:
        _print_json({"question": question, "answer": answer, "memory": memory, "model": model})
    else:
        typer.echo(answer)


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
    "[cyan]hf-gradmem inspect ./memory --json[/]"
)
@_command
def inspect(
    memory: Annotated[str, typer.Argument(help="Directory, file or Hub repository of the memory.")],
    model: Annotated[
        str | None, typer.Option(help="The model that it was written with, to decode it and weigh it against a cache.")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a memory is and, given its model, what it holds and what it replaces."""
    from .loading import load_memory, load_reader
    from .report import decode_memory, kv_cache_bytes, memory_facts

    loaded = load_memory(memory)
    facts = {"memory": memory, **memory_facts(loaded)}
    if model is not None:
        reader = load_reader(model, loaded, device=device)
        for context, decoded in zip(facts["contexts"], decode_memory(reader, loaded), strict=True):
            context["decoded"] = decoded
            context["kv_cache_bytes"] = kv_cache_bytes(reader, context["tokens"])
    if as_json:
        _print_json(facts)
    else:
        _print_memory(facts)


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


# ---------------------------------------------------------------------------------------------------- evaluate


@app.command(
    epilog="Examples:\n\n"
    "[cyan]hf-gradmem evaluate ./adapter --recipe recipe.yaml[/]\n\n"
    "[cyan]hf-gradmem evaluate ./adapter --recipe recipe.yaml --steps 1 --steps 2 --steps 4 --output results.json[/]"
)
@_command
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or Hub repository of a GradMem adapter.")],
    recipe: Annotated[Path, typer.Option(help="The recipe whose evaluation sets are answered.")],
    steps: Annotated[
        list[int] | None, typer.Option(help="Steps of WRITE to measure at; the adapter's own number when absent.")
    ] = None,
    split: Annotated[str, typer.Option(help="Which part of the task: validation or test.")] = "test",
    metric: Annotated[Literal["exact_match", "squad"], typer.Option(help="How answers are compared.")] = "exact_match",
    override: Annotated[list[str] | None, typer.Option(help="key=value in place of the recipe's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Contexts at a time.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Write the results to this JSON file.")] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer a recipe's evaluation sets from memory, and compare with their reference answers.

    Answers are generated; the share that is right token by token after the right ones before is given beside it.
    """
    from .evaluation import evaluate_rows
    from .loading import load_model
    from .tasks import load_task
    from .training.recipe import load_recipe

    arguments = load_recipe(recipe, override or ()).arguments
    if not arguments.eval_sets:
        raise ValueError(f"{recipe} names no eval_sets.")
    reader = load_model(model, device=device)
    results = {}
    for name, given in arguments.eval_sets.items():
        rows = load_task(arguments.task, **arguments.task_arguments | given | {"split": split})
        results[name] = evaluate_rows(
            reader,
            rows,
            steps or [reader.config.write_steps],
            metric=metric,
            batch_size=batch_size,
            show_progress=sys.stderr.isatty() and not as_json,
        )
    report = {"model": model, "task": arguments.task, "split": split, "write_steps_trained": reader.config.write_steps}
    report["sets"] = results
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if as_json:
        _print_json(report)
    else:
        _print_results(results)


def _print_results(results: dict[str, dict[int, dict[str, float]]]) -> None:
    table = Table(box=None, pad_edge=False)
    names = [name for by_steps in results.values() for measured in by_steps.values() for name in measured]
    columns = list(dict.fromkeys(names))
    for name in ("set", "steps", *columns):
        table.add_column(name.replace("_", " "), justify="left" if name == "set" else "right")
    for set_name, by_steps in results.items():
        for steps, measured in by_steps.items():
            values = [measured[name] for name in columns]
            table.add_row(
                set_name, str(steps), *(f"{value:.4f}" if isinstance(value, float) else str(value) for value in values)
            )
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
