"""Commands that read memories: ask, inspect."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import command
from .inputs import choose, read_context
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
)
from .printing import print_json, print_memory, print_text, print_tokens

if TYPE_CHECKING:
    from hf_gradmem import GradMemForCausalLM, GradMemMemory
    from hf_gradmem.evaluation import TokenLosses


@command(
    'hf-gradmem ask "When does gate 7 open?" --memory ./memory --model ./adapter',
    'hf-gradmem ask "Which gate?" --memory ./memory --model ./adapter --template chat --max-new-tokens 20',
    'hf-gradmem ask "Which gate?" --memories memories/ --id airport --model ./adapter',
)
def ask(
    question: Annotated[str, typer.Argument(help="What to continue from the memory.")],
    model: Reader,
    memory: Annotated[str | None, typer.Option(help="Directory, file or Hub repository of the memory.")] = None,
    memories: Annotated[
        str | None, typer.Option(help="What write-dataset wrote, or a Hub data set of it, in place of --memory.")
    ] = None,
    name: Annotated[str | None, typer.Option("--id", help="Which of the memories to read.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 50,
    template: Template = None,
    index: Index = None,
    revision: Revision = None,
    memory_revision: MemoryRevision = None,
    seed: Seed = 0,
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Answer a question from a memory: print the model's greedy continuation.

    Sensible answers need a trained adapter; a base without one can only continue the text of its memory.
    """
    from hf_gradmem.commands.opening import load_memory, load_reader
    from hf_gradmem.reading.generation import ending_tokens
    from hf_gradmem.reading.queries import tokenize_queries

    if (memory is None) == (memories is None):
        raise ValueError("Give the memory either as --memory, or as --memories and --id.")
    if (memories is None) != (name is None) or (memories is not None and index is not None):
        raise ValueError("--id goes with --memories, and --index with --memory.")
    if memory is not None:
        chosen = choose(load_memory(memory, revision=memory_revision), index)
    elif memories is not None and name is not None:
        chosen = _look_up(memories, name, memory_revision)
    reader = load_reader(
        model, chosen, revision=revision, seed=seed, device=device, trust_remote_code=trust_remote_code
    )
    tokenizer = reader.tokenizer
    if not question:
        raise ValueError("The question is empty.")
    if template is not None:
        reader.config.template = template  # which also says what stands before the memory
    input_ids, attention_mask = tokenize_queries([question], tokenizer, reader.config.template)
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
        print_json({"question": question, "answer": answer, **source, "model": model})
    else:
        print_text(str(answer))


def _look_up(memories: str, name: str, revision: str | None) -> "GradMemMemory":
    from hf_gradmem.commands.opening import load_store
    from hf_gradmem.memory.store import without_progress_bars

    with without_progress_bars():
        store = load_store(memories, revision=revision)
    if name not in store:
        raise ValueError(f"There is no memory {name!r} in {memories}, which has {len(store)}.")
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
    html: Annotated[Path | None, typer.Option(help="Also write these tokens as a page of HTML.")] = None,
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
    from hf_gradmem.files import check_writable

    if html is not None and context_file is None:
        raise ValueError("--html shows the tokens of a context: give the text that was written as --context-file.")
    if context_file is not None and model is None:
        raise ValueError("--context-file needs the --model that the memory was written with.")
    if html is not None:
        check_writable(html)
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
