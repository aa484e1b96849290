"""Greedy answers: from a memory, or from a plain prompt."""

from collections.abc import Mapping, Sequence

import torch

from ..base.modes import generator, plain_generation, settled
from ..base.token_ids import check_vocabulary
from ..memory.written import GradMemMemory
from ..modeling_gradmem import GradMemForCausalLM
from ..reading.answering import which_memories
from ..reading.generation import ending_tokens, new_tokens
from ..reading.queries import pad_left
from ..reading.reciting import tokenize_asked
from ..template import get_template, template_in_use


def answer_queries(
    model: GradMemForCausalLM,
    memory: GradMemMemory,
    queries: Sequence[str],
    context_index: Sequence[int],
    max_new_tokens: int,
    template: str | Mapping[str, str] | None = None,
) -> list[str]:
    """Greedy answers read from memory, without special tokens and what is quoted before them.

    Args:
        model: the reader.
        memory: one or several contexts.
        queries: the questions.
        context_index: which memory each of them is about.
        max_new_tokens: most tokens of an answer.
        template: the words around each question; the adapter's by default.

    Raises:
        ValueError: a memory of another model, or numbers in `context_index` that do not match.
    """
    context_index = which_memories(len(queries), len(memory), context_index)
    if not queries:
        return []
    setting = template_in_use(template, model.config.template, model.tokenizer)
    input_ids, mask = tokenize_asked(model, memory, queries, context_index, setting)
    ending = ending_tokens(model.tokenizer, model.generation_config)
    with plain_generation():
        tokens = new_tokens(model, memory, input_ids, mask, context_index, max_new_tokens=max_new_tokens, **ending)
    words = get_template(setting, model.tokenizer)
    return [words.split(text)[1] for text in model.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@torch.no_grad()
def answer_prompts(model: GradMemForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[str]:
    """Greedy answers of the plain base, without memory or LoRA, to prompts of tokens; without special tokens.

    Raises:
        ValueError: a prompt has no token, or one that the base does not have.
    """
    if not all(prompts):
        raise ValueError("A prompt has no token: there is nothing to continue.")
    input_ids, mask = pad_left(prompts)
    check_vocabulary("input_ids", input_ids, model.decoder.vocab_size)  # before they are on an accelerator
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    ending = ending_tokens(model.tokenizer, model.generation_config)
    with plain_generation(), settled(model.base_model):
        generated = generator(model.base_model).generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **ending
        )
    return model.tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
