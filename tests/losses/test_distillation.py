"""Distillation from the prompt, against plain runs of the base, one query at a time."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from tests.support.gradients import (
    BATCH,
    CONTEXT,
    CONTEXT_MASK,
    EVERYTHING,
    LABELS,
    LORA,
    QUERIES,
    assert_gradient_is_the_slope,
    build,
    training,
)
from tests.support.messages import says
from tests.support.small_models import small_tokenizer
from tests.support.tiny_models import tiny_tokens


def reference(model, output) -> torch.Tensor:
    """The mean divergence, from what forward says and from the base on context and query."""
    divergences = []
    for context, mask, of_context, labels, logits in zip(
        CONTEXT, CONTEXT_MASK, QUERIES, LABELS, output.logits, strict=True
    ):
        for query, answer, said in zip(of_context, labels, logits, strict=True):
            prompt = torch.cat([context[mask.bool()], query])[None]
            with torch.no_grad():
                behind = model.base_model(input_ids=prompt).logits[0, mask.sum() :]
            for place in range(1, len(query)):
                if answer[place] != -100:
                    p, q = behind[place - 1].softmax(-1), said[place - 1].softmax(-1)
                    divergences.append((p * (p.log() - q.log())).sum())
    return torch.stack(divergences).mean()


def test_it_is_the_divergence_from_the_plain_base_with_the_context_in_its_prompt():
    labels = LABELS.clone()
    labels[:, :, 0] = -100  # its logits are the memory's last ones, which no output has
    model = build(distillation_loss_weight=0.7, reconstruction_loss_weight=0, write_lora=LORA, read_lora=LORA)
    output = model(**BATCH | {"labels": labels})
    torch.testing.assert_close(output.loss - output.read_loss, 0.7 * reference(model, output), rtol=1e-9, atol=1e-12)


def test_the_first_token_of_a_query_is_compared_too():
    model = build(distillation_loss_weight=1.0, reconstruction_loss_weight=0)
    only = torch.full_like(LABELS, -100)
    only[0, 0, 0] = QUERIES[0, 0, 0]
    output = model(**BATCH | {"labels": only})
    memory = model.write(input_ids=CONTEXT[:1], attention_mask=CONTEXT_MASK[:1]).embeddings[0]
    with torch.no_grad():
        of_reader = model.base_model(inputs_embeds=memory[None]).logits[0, -1].log_softmax(-1)
        of_base = model.base_model(input_ids=CONTEXT[:1]).logits[0, -1].log_softmax(-1)
    expected = (of_base.exp() * (of_base - of_reader)).sum()
    torch.testing.assert_close((output.loss - output.read_loss).detach(), expected, rtol=1e-9, atol=1e-12)


def test_its_gradient_is_the_slope():
    model = training(**EVERYTHING, distillation_loss_weight=0.7)
    beside = {
        name: parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name or name.startswith(("memory", "write", "read"))
    }
    assert_gradient_is_the_slope(model, beside)


def test_padding_changes_nothing():
    model = build(distillation_loss_weight=0.7)
    blank, losses = torch.zeros((2, 3), dtype=torch.long), []
    for before, behind in ((0, 3), (3, 0)):
        context, mask = (
            torch.cat([blank[:, :before], values, blank[:, :behind]], dim=1) for values in (CONTEXT, CONTEXT_MASK)
        )
        losses.append(model(**BATCH | {"context_input_ids": context, "context_attention_mask": mask}).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0] == pytest.approx(model(**BATCH).loss.item(), rel=1e-9)


def test_the_teacher_is_a_constant_where_the_base_trains(monkeypatch):
    model = build(distillation_loss_weight=1.0)
    model.base_model.requires_grad_(True)
    seen, run = [], model.decoder.logits
    monkeypatch.setattr(model.decoder, "logits", lambda inputs: seen.append(run(inputs)) or seen[-1])
    assert model(**BATCH).loss.requires_grad
    (prompted,) = [logits for logits in seen if logits.shape[1] == CONTEXT.shape[1] + QUERIES.shape[2]]
    assert not prompted.requires_grad


def test_a_given_memory_has_no_prompt_to_learn_from():
    model = build(distillation_loss_weight=0.7)
    memory = model.write(input_ids=CONTEXT, attention_mask=CONTEXT_MASK)
    output = model(memory=memory, input_ids=QUERIES, labels=LABELS)
    assert output.loss == output.read_loss


def test_a_given_memory_beside_its_context_is_taught_as_one_that_is_written():
    model = build(distillation_loss_weight=0.7, reconstruction_loss_weight=0)
    memory = model.write(input_ids=CONTEXT, attention_mask=CONTEXT_MASK)
    output = model(memory=memory, **BATCH)
    assert output.loss > output.read_loss
    torch.testing.assert_close(output.loss, model(**BATCH).loss, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match=says(f"{len(CONTEXT)} memories", "1 contexts in context_input_ids")):
        model(memory=memory, input_ids=QUERIES, labels=LABELS, context_input_ids=CONTEXT[:1])
    with pytest.raises(ValueError, match="not both"):  # nothing is taught where nothing is scored
        model(memory=memory, input_ids=QUERIES, context_input_ids=CONTEXT)


def test_a_batch_without_labels_has_loss_0():
    model = build(distillation_loss_weight=0.7, reconstruction_loss_weight=0)
    assert model(**BATCH | {"labels": torch.full_like(LABELS, -100)}).loss == 0


def test_a_prompt_that_is_longer_than_the_window_is_refused():
    model = build(distillation_loss_weight=0.7)
    window = model.decoder.window
    long = tiny_tokens(1, window - 4, seed=4)
    with pytest.raises(ValueError, match=says(f"{window + 1} tokens together", f"is {window}", "set the weight to 0")):
        model(context_input_ids=long, input_ids=QUERIES[:1, :1], labels=LABELS[:1, :1])


def test_padding_may_go_past_the_window():
    """GPT-2 has a vector for each position and no more, and takes rows whose tokens alone fit."""
    model = build(distillation_loss_weight=1.0, reconstruction_loss_weight=0)
    contexts, queries = tiny_tokens(2, 100, seed=5), tiny_tokens(2, 60, seed=6)
    of_context, of_query = torch.ones_like(contexts), torch.ones_like(queries)
    of_context[1, 10:] = of_query[0, 10:] = 0
    batch = {"context_input_ids": contexts, "context_attention_mask": of_context, "input_ids": queries}
    together = model(**batch, attention_mask=of_query, labels=queries).loss
    sums = [
        count * model(context_input_ids=contexts[[row], :length], input_ids=asked, labels=asked).loss
        for row, length, count in ((0, 100, 10), (1, 10, 60))
        for asked in [queries[[row], :count]]
    ]
    torch.testing.assert_close(together, sum(sums) / 70)


@pytest.mark.parametrize("template", ["plain", {"context": "{context}", "query": "a{memory}{query}"}], ids=str)
def test_the_prompt_begins_as_the_tokenizer_begins_texts(template, monkeypatch):
    model = build(distillation_loss_weight=1.0, template=template)
    tokenizer = small_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.tokenizer, seen = tokenizer, []
    run = model.decoder.logits
    monkeypatch.setattr(model.decoder, "logits", lambda inputs: seen.append(inputs.input_ids) or run(inputs))
    model(**BATCH)
    words = [] if template == "plain" else tokenizer("a", add_special_tokens=False).input_ids
    (prompts,) = [ids for ids in seen if ids.shape[1] == 1 + len(words) + CONTEXT.shape[1] + QUERIES.shape[2]]
    assert prompts[0].tolist() == [1, *words, *CONTEXT[0].tolist(), *QUERIES[0, 0].tolist()]
