"""What is printed on stdout: facts as tables for people, or as JSON for machines.

All of it may come from files and models of others. So it goes through `plain.py`, and no text of theirs is read as
markup.
"""

import json
import re
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from .app import manners, shows_progress
from .plain import PlainConsole, plain

if TYPE_CHECKING:
    from hf_gradmem.evaluation import TokenLosses


def print_json(value: dict[str, Any]) -> None:
    """One JSON object, with control characters as its escapes, which a reader turns back."""
    _print_json(json.dumps(value, ensure_ascii=False, indent=2))


def print_json_line(value: dict[str, Any]) -> None:
    """The same in one line, where there is one for each of several."""
    _print_json(json.dumps(value, ensure_ascii=False))


def _print_json(text: str) -> None:
    typer.echo(re.sub("[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_text(text: str) -> None:
    """A text as it is, but for control characters."""
    typer.echo(plain(text))


def report_done(text: str) -> None:
    """Say what was done, unless nobody wants to hear it."""
    if not manners.quiet:
        print_text(text)


def suggest(command: str) -> None:
    """What one would do next, to somebody who looks on."""
    if shows_progress(as_json=False):
        typer.echo(plain(f"Next: {command}"), err=True)


def print_facts(rows: list[tuple[str, str | None]]) -> None:
    """A table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True, min_width=21)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(str(value)))
    PlainConsole().print(table)


def describe_vectors(facts: dict[str, Any]) -> str:
    """The size of each memory."""
    return f"{facts['num_memory_tokens']} vectors of width {facts['hidden_size']}, {facts['dtype']}"


def describe_writer(facts: dict[str, Any]) -> str | None:
    """The fingerprint of what wrote memories, and the name of its base."""
    name = facts.get("base_name")
    return f"{facts['fingerprint']} on {name}" if name and facts["fingerprint"] else facts["fingerprint"]


def print_memory(facts: dict[str, Any]) -> None:
    """A table of what `hf_gradmem.evaluation.memory_facts` gives, and what a model adds to it."""
    from hf_gradmem.evaluation.memory_facts import MOST_DECODED, describe_size

    of_all = [("memory", facts["memory"]), ("each", describe_vectors(facts)), ("written by", describe_writer(facts))]
    print_facts(of_all)
    for index, context in enumerate(facts["contexts"]):
        typer.echo()
        called = f"{index}: {context['file']}" if "file" in context else str(index)
        rows: list[tuple[str, str | None]] = [("context", called)] if len(facts["contexts"]) > 1 else []
        pieces = f" in {context['segments']} segments" if context["segments"] > 1 else ""
        rows.append(("tokens written", f"{context['tokens']}{pieces}"))
        rows.append(("steps", str(context["steps"])))
        losses = [("first", context["first_loss"]), ("last", context["last_loss"]), ("after", context["final_loss"])]
        told = ", ".join(f"{name} {loss:.4f}" for name, loss in losses if loss is not None)
        rows.append(("loss (nats per token)", told or "not measured"))
        if "kv_cache_bytes" in context:
            rows.append(("size", describe_size(context["bytes"], context["kv_cache_bytes"])))
            why = "in segments" if context["segments"] > 1 else f"from more than {MOST_DECODED:,} tokens"
            decoded = context["decoded"]
            rows.append(("decodes to", f"not shown: it was written {why}" if decoded is None else decoded))
        else:
            rows.append(("size", f"{context['bytes']:,} bytes"))
        print_facts(rows)


def print_tokens(held: "TokenLosses") -> None:
    """The tokens of a context, coloured by how well the memory holds them."""
    from hf_gradmem.evaluation.heat_map import heat_map

    console = PlainConsole()
    for title, text in heat_map(held):
        console.print()
        console.print(title, style="bold", markup=False)
        console.print(text)
    console.print()
    bits = f"{held.bits_over_start:.1f} over the memory's start, {held.bits_over_base:.1f} over the base alone"
    print_facts([("bits recovered", bits)])


def print_results(records: list[dict[str, Any]]) -> None:
    """One table of the answers, and one of what the memories hold; of each model, where there are several.

    No figure is cut: where a table is wider than the terminal, names are broken into lines.
    """
    models = list(dict.fromkeys(record["model"] for record in records))
    for number, model in enumerate(models):
        if len(models) > 1:
            if number:
                typer.echo()
            PlainConsole().print(Text(str(model), style="bold"), overflow="fold")
        _print_model([record for record in records if record["model"] == model])


def _print_model(records: list[dict[str, Any]]) -> None:
    of_answers = (
        "exact_match",
        "f1",
        "teacher_forced_exact_match",
        "answer_loss",
        "auroc_not_in_memory",
        "num_answers",
    )
    of_contexts = ("recited_verbatim", "write_loss", "start_loss", "base_loss", "bits_over_start", "bits_over_base")
    _print_records(records, of_answers)
    memories = [record for record in records if record["context"] == "memory"]
    if memories:
        typer.echo()
        _print_records(memories, of_contexts)


def _print_records(records: list[dict[str, Any]], measures: tuple[str, ...]) -> None:
    names = {"write_steps": "steps", "teacher_forced_exact_match": "teacher forced"}
    columns = ["set", "context", "write_steps"]
    columns += [name for name in measures if any(name in record for record in records)]
    table = Table(box=None, pad_edge=False)
    for name in columns:
        header = names.get(name, name.replace("_", " "))
        if name in ("set", "context"):
            table.add_column(Text(header), overflow="fold")
        else:  # a word of its name under the other, and the figure as it is
            table.add_column(Text(header.replace(" ", "\n")), justify="right", no_wrap=True)
    for record in records:
        table.add_row(*(Text(_shown(record.get(name))) for name in columns))
    PlainConsole().print(table)


def print_reliability(sets: dict[str, dict[str, Any]]) -> None:
    """How far a confidence can be acted on: one row for each set, and the reliability table of all together."""
    measures = ["auroc", "auroc_own", "auroc_own_or_other", "brier", "share_right_own", "share_right_other"]
    _print_table(["set", *measures, "num_answers"], [{"set": name} | measured for name, measured in sets.items()])
    typer.echo()
    _print_table(["from", "to", "confidence", "right", "count"], sets["all"]["reliability"])


def _print_table(columns: list[str], records: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(name.replace("_", "\n")), justify="left" if name == "set" else "right", overflow="fold")
    for record in records:
        table.add_row(*(Text(_shown(record[name])) for name in columns))
    PlainConsole().print(table)


def _shown(value: object) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
