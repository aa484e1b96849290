"""Words between the memory and what is written: unscored, in every step, and in WRITE alone; some drawn at each."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from hf_gradmem import GradMemConfig, GradMemForCausalLM
from tests.support.small_models import ids_of, small_tokenizer, with_memory
from tests.support.tiny_models import tiny_causal_lm

CLOSE = partial(torch.testing.assert_close, rtol=0, atol=1e-9)
PROMPT = "which"
DRAWN = "q{words}z"


def build(write_prompt: str = PROMPT, model_type: str = "llama", **options) -> GradMemForCausalLM:
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": 0.3, "num_control_tokens": 1}
    model = with_memory(tiny_causal_lm(model_type), write_prompt=write_prompt, **defaults | options)
    model.tokenizer = small_tokenizer()
    return model


def loss_by_hand(
    model: GradMemForCausalLM, memory: torch.Tensor, text: str, prompt: torch.Tensor | None = None
) -> torch.Tensor:
    """Of the text alone, behind memory, control vectors and the prompt's tokens in a row of the base."""
    embed = model.base_model.get_input_embeddings()
    ids, prompt = ids_of(model, text), ids_of(model, PROMPT) if prompt is None else prompt
    row = [model.write_start[None], memory, model.write_end[None], embed(prompt), embed(ids)]
    logits = model.base_model(inputs_embeds=torch.cat(row, dim=1)).logits
    return functional.cross_entropy(logits[0, -ids.shape[1] - 1 : -1], ids[0])


def test_steps_descend_on_the_loss_of_what_follows_the_prompt():
    model = build(write_steps=1)
    start = model.memory_init.detach()[None].requires_grad_()
    (gradient,) = torch.autograd.grad(loss := loss_by_hand(model, start, "klmn"), start)
    memory = model.write("klmn", measure_final_loss=True)
    CLOSE(memory.write_losses[0, 0], loss.detach())
    CLOSE(memory.embeddings, (start - 0.3 * gradient).detach())
    CLOSE(memory.final_write_loss[0], loss_by_hand(model, memory.embeddings, "klmn").detach())


@pytest.mark.parametrize(
    "form", ["input_vectors", {"name": "key_values", "write": "values"}], ids=["vectors", "values"]
)
@pytest.mark.parametrize(("prompt", "prefix_segments"), [(PROMPT, 0), (PROMPT, 1), (DRAWN, 0)])
def test_a_context_does_not_depend_on_its_batch_or_on_how_its_segments_are_laid_out(form, prompt, prefix_segments):
    options = {"memory_form": form, "write_prefix_segments": prefix_segments, "num_control_tokens": 0}
    model = build(prompt, "gpt2", **options)  # which computes in float64 throughout
    contexts = [["klm", "nopq", "r"], ["abcdefghij", "x"]]
    together = model.write(contexts).embeddings
    model.decoder.keeps_segments_apart = lambda *lengths: False
    for context, expected in zip(contexts, together, strict=True):
        CLOSE(model.write([context]).embeddings[0], expected)


def test_reading_has_no_prompt():
    prompted, plain = build(), build(write_prompt="")
    memory = prompted.write("klmn")
    assert not torch.allclose(memory.embeddings, plain.write("klmn").embeddings)
    ids = ids_of(plain, "abc")
    with torch.no_grad():
        CLOSE(prompted(input_ids=ids, memory=memory).logits, plain(input_ids=ids, memory=memory).logits)


def test_a_memory_is_decoded_behind_the_prompt_that_it_was_written_behind():
    model = build(write_steps=60, num_memory_tokens=8)
    memory = model.write("klmn")
    assert model.reconstruct(memory).tolist() == ids_of(model, "klmn").tolist()
    model.config.write_prompt = "other words"
    assert model.reconstruct(memory).tolist() != ids_of(model, "klmn").tolist()


def test_the_prompt_takes_its_room_in_the_window():
    assert build(write_prompt="").writer.room - build().writer.room == len(PROMPT)


def test_the_prompt_stays_with_the_adapter(tmp_path):
    model = build(includes_base=True)
    memory = model.write("klmn")
    model.save_pretrained(tmp_path)
    again = GradMemForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.write_prompt == PROMPT
    CLOSE(again.write("klmn").embeddings, memory.embeddings)


def test_a_writer_without_steps_has_no_use_for_one():
    with pytest.raises(ValueError, match=r'write_prompt=.which. belongs to writer="gradient"'):
        GradMemConfig(writer="pooled", write_prompt=PROMPT)


def test_a_prompt_goes_with_its_writer():
    model = build()
    model.write("klmn")
    model.config.writer, model.config.write_prompt = "forward", ""
    expected = build(write_prompt="", writer="forward").write("klmn")
    CLOSE(model.write("klmn").embeddings, expected.embeddings)


def drawn_for(model: GradMemForCausalLM, text: str, step: int) -> torch.Tensor:
    """`(1, length)`, the tokens of the prompt that stands before a text at a step."""
    rows = model.writer.drawn.before(model.writer.rows(model.tokenize([text]).checked(model.device)), step)
    assert rows.input_ids[rows.scored].tolist() == ids_of(model, text)[0].tolist()
    return rows.input_ids[rows.attention_mask & ~rows.scored][None]


def test_each_step_descends_behind_some_words_of_the_text_drawn_for_it():
    model = build(DRAWN, write_prefix_segments=0)
    prompts = [drawn_for(model, "abcdefgh", step) for step in range(2)]
    assert prompts[0].tolist() != prompts[1].tolist()
    memory = start = model.memory_init.detach()[None].requires_grad_()
    for prompt in prompts:
        loss = loss_by_hand(model, memory, "abcdefgh", prompt)
        memory = memory - 0.3 * torch.autograd.grad(loss, memory)[0]
    CLOSE(model.write("abcdefgh").embeddings, memory.detach())
    CLOSE(model.write("abcdefgh", tolerance=1e-9).embeddings, memory.detach())
    assert not torch.allclose(memory, start)


def test_the_drawn_words_are_the_text_s_own_and_never_more_than_it_has():
    model = build(DRAWN, write_prefix_segments=0)
    own, drawn = ids_of(model, "qz"), [drawn_for(model, "abcdefgh", step)[0].tolist() for step in range(20)]
    begins, ends = own[0].tolist()
    for prompt in drawn:
        words = [token for token in prompt[1:] if token not in (ends, model.tokenizer.unk_token_id)]
        assert prompt[0] == begins
        assert words
        assert set(words) <= set(ids_of(model, "abcdefgh")[0].tolist())
        assert len(prompt) <= 2 + len("abcdefgh")
    assert len(set(map(tuple, drawn))) > 10
    # A text of one word would be given away whole.
    assert drawn_for(model, "a", 0).tolist() == own.tolist()


def test_the_drawn_words_take_their_room_and_no_segments_stand_before_them():
    plain, drawn = build("", write_prefix_segments=0), build(DRAWN, write_prefix_segments=0)
    assert drawn.writer.room == (plain.writer.room - 2) // 2
    longest, window = drawn.writer.room, drawn.decoder.window
    drawn.write("a" * longest, write_steps=0)
    with pytest.raises(ValueError, match=rf"needs {drawn.writer.positions_of(longest + 1)} positions .* is {window}"):
        drawn.write("a" * (longest + 1), write_steps=0)
    assert drawn.writer.positions_of(longest) <= window < drawn.writer.positions_of(longest + 1)
    with pytest.raises(ValueError, match=r"q\{words\}z.*write_prefix_segments=0"):
        GradMemConfig(write_prompt=DRAWN)
