"""Commands that read memories: ask, inspect."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import command, shows_progress
from .inputs import check_files, choose, read_context
from .options import (
    AsJson,
    Device,
    Index,
    Memory,
    MemoryRevision,
    Reader,
    Revision,
    Seed,
    SegmentLength,
    Template,
    TrustRemoteCode,
    output_option,
)
from .printing import print_json, print_json_line, print_memory, print_text, print_tokens, report_done

if TYPE_CHECKING:
    from hf_gradmem import GradMemForCausalLM, GradMemMemory, MemoryStore
    from hf_gradmem.commands.asking import Asked
    from hf_gradmem.evaluation import TokenLosses


Questions = Annotated[
    Path | None,
    typer.Option(help='A file of questions in place of one: one a line, or .jsonl with "question" in each line.'),
]
MemoryId = Annotated[
    str | None, typer.Option("--id", help="Which of the memories to read; the question finds it when absent.")
]
Top = Annotated[
    int, typer.Option(min=1, help="How many of the memories to read without --id; the best answer is given.")
]
AbstainBelow = Annotated[float | None, typer.Option(help="Below this confidence, 0..1, say that it is not in memory.")]


@command(
    'hf-gradmem ask "When does gate 7 open?" --memory ./memory --model ./adapter',
    'hf-gradmem ask "Which gate?" --memories memories/ --id airport --model ./adapter',
    'hf-gradmem ask "When does gate 7 open?" --memories memories/ --model ./adapter --abstain-below 0.5',
    "hf-gradmem ask --questions questions.txt --memories memories/ --model ./adapter --json",
)
def ask(
    model: Reader,
    question: Annotated[str | None, typer.Argument(help="What to continue from the memory.")] = None,
    questions: Questions = None,
    memory: Annotated[str | None, typer.Option(help="Directory, file or Hub repository of the memory.")] = None,
    memories: Annotated[
        str | None, typer.Option(help="What write-dataset wrote, or a Hub data set of it, in place of --memory.")
    ] = None,
    name: MemoryId = None,
    top: Top = 3,
    abstain_below: AbstainBelow = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at a time.")] = 32,
    template: Template = None,
    index: Index = None,
    revision: Revision = None,
    memory_revision: MemoryRevision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Answer questions from a memory, or from the memories that they are about.

    Of many memories without --id, those are read under which the question is the most likely; where the store keeps
    its texts, words choose which of them come into question. The answer's memory is named.

    Sensible answers need a trained adapter; a base without one can only continue the text of its memory.
    """
    from hf_gradmem.commands.asking import ask_memory, ask_store, read_questions
    from hf_gradmem.commands.opening import load_memory, load_reader, load_store

    _check_asked(question, questions, memory, memories, name, index)
    asked = [question or ""] if questions is None else read_questions(questions)
    store = None if memories is None else load_store(memories, revision=memory_revision)
    if memory is not None:
        chosen = choose(load_memory(memory, revision=memory_revision), index)
    elif store is not None:
        chosen = _look_up(store, store.ids[0] if name is None else name)
    reader = load_reader(
        model, chosen, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code
    )
    if template is not None:
        reader.config.template = template  # which also says what stands before the memory
    how: dict[str, Any] = {"abstain_below": abstain_below, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    how["template"] = reader.config.template
    if store is not None and name is None:
        found = ask_store(reader, asked, store, top=top, show_progress=shows_progress(as_json), **how)
    else:
        found = ask_memory(reader, asked, chosen, memory_id=name, **how)
    source = {"memory": memory} if memories is None else {"memories": memories}
    for each in found:
        if as_json:
            (print_json if questions is None else print_json_line)(each.to_dict() | source | {"model": model})
        else:
            _print_answer(each, several=questions is not None, searched=memories is not None and name is None)


def _check_asked(
    question: str | None,
    questions: Path | None,
    memory: str | None,
    memories: str | None,
    name: str | None,
    index: int | None,
) -> None:
    """Refuse what contradicts itself before anything is loaded."""
    if (question is None) == (questions is None):
        raise ValueError("Give either a question or --questions, a file of them.")
    if question == "":
        raise ValueError("The question is empty.")
    if (memory is None) == (memories is None):
        raise ValueError("Give the memory either as --memory, or as --memories, of which --id chooses one.")
    if (name is not None and memories is None) or (index is not None and memories is not None):
        raise ValueError("--id goes with --memories, and --index with --memory.")


def _print_answer(asked: "Asked", several: bool, searched: bool) -> None:
    """The answer; then, unless that is all that is wanted, where it is from and how sure the model is."""
    if several:
        print_text(asked.question)
    print_text(asked.text)
    answer = asked.answer
    told = [f"from {answer.memory_id}"] if searched else []
    if asked.quote is not None:
        told.append(f"quoting “{asked.quote}”")
    if answer.confidence is not None:
        told.append(f"confidence {answer.confidence:.2f}")
    if told:
        report_done(", ".join(told))
    if several:
        report_done("")


def _look_up(store: "MemoryStore", name: str) -> "GradMemMemory":
    if name not in store:
        raise ValueError(f"There is no memory {name!r} in {store.name}, which has {len(store)}.")
    return store[name]


@command(
    "hf-gradmem inspect ./memory",
    "hf-gradmem inspect ./memory --model ./adapter",
    "hf-gradmem inspect ./memory --model ./adapter --context-file notes.txt --html tokens.html",
    "hf-gradmem inspect ./memory --json",
)
def inspect(
    memory: Memory,
    model: Annotated[
        str | None, typer.Option(help="The model that it was written with, to decode it and weigh it against a cache.")
    ] = None,
    index: Index = None,
    context_file: Annotated[
        Path | None, typer.Option(help="The text that was written: show which of its tokens the memory holds.")
    ] = None,
    segment_length: SegmentLength = None,
    html: Annotated[Path | None, output_option("Also write these tokens as a page of HTML.", "--html")] = None,
    revision: Revision = None,
    memory_revision: MemoryRevision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what a memory is and, given its model, what it holds and what it replaces."""
    from hf_gradmem.base.cache_size import kv_cache_bytes
    from hf_gradmem.commands.opening import load_memory, load_reader
    from hf_gradmem.evaluation.memory_facts import decode_memory, memory_facts

    if html is not None and context_file is None:
        raise ValueError("--html shows the tokens of a context: give the text that was written as --context-file.")
    if context_file is not None and model is None:
        raise ValueError("--context-file needs the --model that the memory was written with.")
    check_files(html, beside=[] if context_file is None else [context_file])
    context = None if context_file is None else read_context(None, context_file)
    loaded = load_memory(memory, revision=memory_revision)
    if index is not None or context is not None:
        loaded = choose(loaded, index)
    facts = {"memory": memory, **memory_facts(loaded)}
    held = None
    if model is not None:
        reader = load_reader(
            model, loaded, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code
        )
        for facts_of_one, decoded in zip(facts["contexts"], decode_memory(reader, loaded), strict=True):
            facts_of_one["decoded"] = decoded
            facts_of_one["kv_cache_bytes"] = kv_cache_bytes(reader.decoder, facts_of_one["tokens"])
        if context is not None:
            held = _tokens_held(reader, loaded, context, segment_length, html)
            facts["token_losses"] = held.to_dict()
    if as_json:
        print_json(facts)
        return
    print_memory(facts)
    if held is not None:
        print_tokens(held)


def _tokens_held(
    reader: "GradMemForCausalLM",
    memory: "GradMemMemory",
    context: str,
    segment_length: int | None,
    html: Path | None,
) -> "TokenLosses":
    from hf_gradmem.evaluation import token_losses
    from hf_gradmem.evaluation.heat_map import save_heat_map
    from hf_gradmem.writing.fitting import fit_contexts

    fitting = fit_contexts(reader.writer, reader.tokenizer, [context], segment_length)
    (held,) = token_losses(reader, memory, fitting)
    if html is not None:
        save_heat_map([held], html)
    return held
