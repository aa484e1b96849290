"""WRITE: what it computes, the conditions it runs under, and that it leaves nothing behind."""

import contextlib
from functools import partial

import pytest
import torch
from torch.nn import functional

from hf_gradmem import GradMemForCausalLM, GradMemMemory
from hf_gradmem.writing.contexts import Contexts
from hf_gradmem.writing.write import write_at_steps
from tests.support import writing
from tests.support.tiny_models import tiny_tokens
from tests.support.writing_text import word_tokenizer

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


build = partial(writing.build, write_steps=3)


def randomize_lora(model: GradMemForCausalLM) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


def plain_loss(model: GradMemForCausalLM, memory: torch.Tensor, prefix: torch.Tensor, tokens: torch.Tensor):
    """Summed loss of `tokens` after [prefix; memory], by the base alone and without padding."""
    embed = model.base_model.get_input_embeddings()
    embeds = torch.cat([embed(prefix), memory, embed(tokens)])[None]
    logits = model.base_model(inputs_embeds=embeds).logits[0]
    return functional.cross_entropy(logits[-len(tokens) - 1 : -1], tokens, reduction="sum")


def plain_write(model: GradMemForCausalLM, segments: list[torch.Tensor], prefix_segments: int) -> torch.Tensor:
    """The method in a few lines of autograd: K steps of SGD on the mean loss over all segments' tokens."""
    memory = model.memory_init.detach().clone()
    for _ in range(model.config.write_steps):
        memory.requires_grad_()
        loss = 0
        for j, segment in enumerate(segments):
            prefix = torch.cat([torch.empty(0, dtype=torch.long), *segments[max(j - prefix_segments, 0) : j]])
            loss = loss + plain_loss(model, memory, prefix, segment)
        (gradient,) = torch.autograd.grad(loss / sum(map(len, segments)), memory)
        memory = (memory - model.config.write_learning_rate * gradient).detach()
    return memory


@pytest.mark.parametrize("prefix_segments", [0, 1, 2])
def test_a_memory_in_segments_equals_plain_autograd(prefix_segments):
    model = build(write_prefix_segments=prefix_segments)
    tokens = tiny_tokens(2, 9)
    lengths = [[4, 2, 3], [1, 6]]
    ids = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3, [0] * 1 + [1] * 6 + [1] * 2])
    mask = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    memory = model.write(input_ids=tokens, attention_mask=mask, segment_ids=ids)
    assert memory.segment_lengths.tolist() == [[4, 2, 3], [1, 6, 0]]
    for row in range(2):
        segments = list(tokens[row, : sum(lengths[row])].split(lengths[row]))
        expected = plain_write(model, segments, prefix_segments)
        torch.testing.assert_close(memory.embeddings[row], expected, rtol=1e-6, atol=1e-7)


def test_relative_steps_are_steps_of_the_starts_size():
    """Of the learned start, whatever the memory that is written on, and without a gradient of their own."""
    plain, relative = build(), build(write_relative_step_size=True)
    rate = plain.config.write_learning_rate
    scale = float(plain.memory_init.detach().square().mean().sqrt())
    memory = plain.write(input_ids=tiny_tokens(1, 4, seed=1))
    for begin in (None, memory):
        expected = plain.write(input_ids=tiny_tokens(1, 6), write_learning_rate=rate * scale, memory=begin)
        actual = relative.write(input_ids=tiny_tokens(1, 6), memory=begin)
        torch.testing.assert_close(actual.embeddings, expected.embeddings, rtol=1e-6, atol=1e-7)
    relative = build(write_relative_step_size=True, write_learning_rate=rate / scale).train()
    tokens = {"context_input_ids": tiny_tokens(1, 6), "input_ids": tiny_tokens(1, 3), "labels": tiny_tokens(1, 3)}
    for model in (relative, plain.train()):
        model(**tokens).loss.backward()
    torch.testing.assert_close(relative.memory_init.grad, plain.memory_init.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("in_turn", [False, True])
def test_steps_on_the_sum_are_steps_as_many_times_as_large_as_there_are_tokens(in_turn):
    """Of each sample's own tokens, padding left out; the losses that are told stay means."""
    settings = {"write_prefix_segments": 0, "write_segments_in_turn": in_turn, "write_steps": 1}
    plain, summed = build(**settings), build(**settings, write_loss_reduction="sum")
    rate = plain.config.write_learning_rate / 10
    tokens, mask = tiny_tokens(2, 9), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    written = summed.write(input_ids=tokens, attention_mask=mask, write_learning_rate=rate)
    for row, length in enumerate((9, 5)):
        expected = plain.write(input_ids=tokens[row : row + 1, :length], write_learning_rate=rate * length)
        torch.testing.assert_close(written.embeddings[row], expected.embeddings[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(written.write_losses[row], expected.write_losses[0], rtol=1e-6, atol=1e-7)


def test_steps_on_the_sum_do_not_shrink_with_what_else_is_written():
    """One step from the start: what two segments do to the memory is the sum of what each does."""
    model = build(write_prefix_segments=0, write_steps=1, write_loss_reduction="sum", write_learning_rate=0.01)
    tokens, ids = tiny_tokens(1, 9), torch.tensor([[0] * 4 + [1] * 5])
    start = model.memory_init.detach()
    moved = [model.write(input_ids=part).embeddings[0] - start for part in tokens.split([4, 5], dim=1)]
    together = model.write(input_ids=tokens, segment_ids=ids).embeddings[0] - start
    torch.testing.assert_close(together, sum(moved), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_segments_in_turn_are_appended_one_by_one(optimizer):
    """Each has its own steps, and a fresh state of the optimiser."""
    model = build(write_segments_in_turn=True, write_prefix_segments=0, write_optimizer=optimizer)
    tokens, mask = tiny_tokens(2, 9), torch.tensor([[1] * 9, [1] * 7 + [0] * 2])
    ids = torch.tensor([[0] * 4 + [1] * 2 + [2] * 3, [0] * 1 + [1] * 6 + [1] * 2])
    memory = model.write(input_ids=tokens, attention_mask=mask, segment_ids=ids)
    for row, lengths in enumerate([[4, 2, 3], [1, 6]]):
        appended, losses = None, 0
        for segment in tokens[row, : sum(lengths)].split(lengths):
            appended = model.write(input_ids=segment[None], memory=appended)
            losses = losses + len(segment) * appended.write_losses[0]
        torch.testing.assert_close(memory.embeddings[row], appended.embeddings[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(memory.write_losses[row], losses / sum(lengths), rtol=1e-6, atol=1e-7)
    together = build(write_prefix_segments=0, write_optimizer=optimizer)
    together = together.write(input_ids=tokens, attention_mask=mask, segment_ids=ids)
    assert not torch.allclose(memory.embeddings, together.embeddings, rtol=1e-3)


def test_the_bar_counts_the_steps_of_every_turn(capsys):
    model = build(write_segments_in_turn=True)
    model.write(input_ids=tiny_tokens(2, 9), segment_ids=(torch.arange(9) // 4).expand(2, -1), show_progress=True)
    assert "9/9" in capsys.readouterr().err


def test_segments_in_turn_stop_each_at_the_tolerance():
    model = build(write_segments_in_turn=True, write_steps=6)
    tokens, ids = tiny_tokens(1, 9), torch.tensor([[0] * 4 + [1] * 5])
    unstopped = model.write(input_ids=tokens[:, :4]).write_losses[0]
    memory = model.write(input_ids=tokens, segment_ids=ids, tolerance=float(unstopped[2]) + 1e-6)
    assert not memory.write_losses[0, :3].isnan().any()
    assert memory.write_losses[0, 3:].isnan().sum() < 6


def test_a_segment_that_stopped_counts_no_more_in_the_losses_of_its_context():
    """A loss of 0 in its place would look as if the context were learned."""
    model = build(write_segments_in_turn=True, write_steps=6, write_prefix_segments=0)
    segments = tiny_tokens(1, 9).split([4, 5], dim=1)
    tolerance = float(model.write(input_ids=segments[0]).write_losses[0, 1]) + 1e-6
    total = counted = torch.zeros(6, dtype=torch.float64)
    appended, stopped = None, []
    for segment in segments:
        appended = model.write(input_ids=segment, memory=appended, tolerance=tolerance)
        losses = appended.write_losses[0]
        stopped.append(losses.isnan())
        total = total + losses.nan_to_num() * segment.numel()
        counted = counted + ~losses.isnan() * segment.numel()
    assert (stopped[0] != stopped[1]).any()  # one goes on where the other has stopped
    ids = torch.tensor([[0] * 4 + [1] * 5])
    written = model.write(input_ids=torch.cat(segments, dim=1), segment_ids=ids, tolerance=tolerance).write_losses[0]
    torch.testing.assert_close(written, total / counted, rtol=1e-9, atol=0, equal_nan=True)


def test_a_whole_context_equals_plain_autograd():
    model = build()
    tokens = tiny_tokens(1, 9)
    expected = plain_write(model, [tokens[0]], 0)
    torch.testing.assert_close(model.write(input_ids=tokens).embeddings[0], expected, rtol=1e-6, atol=1e-7)


def test_a_segment_length_cuts_like_segment_ids():
    tokens = tiny_tokens(2, 9)
    ids = (torch.arange(9) // 4).expand(2, -1)
    given = build().write(input_ids=tokens, segment_ids=ids)
    cut = build(write_segment_length=4).write(input_ids=tokens)
    assert torch.equal(given.embeddings, cut.embeddings)
    assert cut.segment_lengths.tolist() == [[4, 4, 1]] * 2


def test_a_whole_context_is_cut_beside_one_in_segments_as_it_is_alone():
    model = build(write_segment_length=2)
    model.tokenizer = word_tokenizer()
    together = model.write([["w3 w4 w5", "w6"], "w7 w8 w9 w20 w21"])
    assert together.segment_lengths.tolist() == [[3, 1, 0], [2, 2, 1]]
    alone = model.write("w7 w8 w9 w20 w21")
    torch.testing.assert_close(together.embeddings[1], alone.embeddings[0], rtol=1e-6, atol=1e-7)


@contextlib.contextmanager
def train_mode(model):
    model.base_model.requires_grad_(True)
    model.train()
    yield
    assert model.training
    assert model.base_model.training


CONDITIONS = {
    "plain": lambda model: contextlib.nullcontext(),
    "no_grad": lambda model: torch.no_grad(),
    "inference_mode": lambda model: torch.inference_mode(),
    "train": train_mode,
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_write_under_every_condition_leaves_nothing_behind(dtype, condition):
    expected = build(dtype=dtype).write(input_ids=tiny_tokens(2, 9), measure_final_loss=True)
    model = build(dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with CONDITIONS[condition](model):
        tokens = tiny_tokens(2, 9)  # an inference tensor where that is the condition
        memory = model.write(input_ids=tokens, attention_mask=torch.ones_like(tokens), measure_final_loss=True)
    assert torch.equal(memory.embeddings, expected.embeddings)
    assert torch.equal(memory.write_losses, expected.write_losses)
    assert memory.embeddings.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not memory.embeddings.requires_grad
    assert not memory.embeddings.is_inference()
    assert not memory.final_write_loss.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dropout_model", ["gpt2"])
def test_dropout_is_off_in_write_and_on_in_training(dropout_model):
    model = build(dropout_model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    still = model.write(input_ids=tiny_tokens(2, 9)).embeddings
    model.base_model.requires_grad_(True)
    model.train()
    assert torch.equal(model.write(input_ids=tiny_tokens(2, 9)).embeddings, still)
    inputs = {"context_input_ids": tiny_tokens(2, 9), "input_ids": tiny_tokens(2, 4)}
    assert not torch.equal(model(**inputs).memory.embeddings.detach(), still)


def test_a_frozen_base_stays_in_eval_mode():
    model = build().train()
    assert model.training
    assert not model.base_model.training
    model.base_model.requires_grad_(True)
    assert model.train().base_model.training


def test_lora_trains_with_its_own_dropout_and_without_the_base_s():
    model = build(
        "gpt2", write_lora={"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.5}
    )
    training = {name for name, module in model.train().base_model.named_modules() if module.training}
    assert any("lora_dropout" in name for name in training)
    assert all("lora_" in name for name in training)


def test_losses_fall_and_are_those_of_each_step():
    model = build(write_steps=6)
    memory = model.write(input_ids=tiny_tokens(2, 9), measure_final_loss=True)
    assert (memory.write_losses[:, -1] < memory.write_losses[:, 0]).all()
    again = model.write(input_ids=tiny_tokens(2, 9), memory=memory, write_steps=1)
    torch.testing.assert_close(memory.final_write_loss, again.write_losses[:, 0])


def test_writing_on_from_a_memory_is_the_same_as_going_on():
    model = build(write_steps=4)
    whole = model.write(input_ids=tiny_tokens(2, 9))
    half = model.write(input_ids=tiny_tokens(2, 9), write_steps=2)
    rest = model.write(input_ids=tiny_tokens(2, 9), write_steps=2, memory=half)
    torch.testing.assert_close(rest.embeddings, whole.embeddings, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"write_optimizer": "adam", "write_learning_rate": 0.02, "learn_write_learning_rate": "per_step"},
        {"write_segments_in_turn": True},
        {"writer": "forward"},
        {"writer": "pooled", "write_steps": 2},
    ],
    ids=["gradient", "adam", "in turn", "forward", "pooled"],
)
def test_memories_after_several_numbers_of_steps_are_those_of_as_many_writes(settings):
    model = build(**settings)
    if model.write_log_learning_rate is not None:  # each step one of its own
        model.write_log_learning_rate.data.copy_(torch.tensor([0.05, 0.02, 0.01], dtype=torch.float64).log())
    segments = (
        None if settings.get("writer") else torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 2, 2]])
    )
    contexts = {"input_ids": tiny_tokens(2, 9), "segment_ids": segments}
    asked = Contexts(contexts["input_ids"], torch.ones(2, 9, dtype=torch.long), segments)
    steps = [0] if settings.get("writer") == "pooled" else [4, 0, 2]
    found = write_at_steps(model.writer, asked, steps, identity=model.identity())
    assert list(found) == steps
    for number, memory in found.items():
        alone = model.write(**contexts, write_steps=number)
        assert torch.equal(memory.embeddings, alone.embeddings)
        assert torch.equal(memory.write_losses.nan_to_num(), alone.write_losses.nan_to_num())
        assert memory.fingerprint == alone.fingerprint


def test_contexts_of_one_segment_that_would_be_written_in_turn_are_written_after_several_numbers_of_steps():
    model, ids = build(write_segments_in_turn=True), tiny_tokens(2, 9)
    for segments in (None, torch.zeros(2, 9, dtype=torch.long)):
        asked = Contexts(ids, torch.ones(2, 9, dtype=torch.long), segments)
        for number, memory in write_at_steps(model.writer, asked, [3, 0], identity=model.identity()).items():
            assert torch.equal(memory.embeddings, model.write(input_ids=ids, write_steps=number).embeddings)


def test_appending_counts_both_contexts():
    model = build()
    first = model.write(input_ids=tiny_tokens(1, 9))
    both = model.write(input_ids=tiny_tokens(1, 4, seed=1), memory=first)
    assert both.num_context_tokens.tolist() == [13]
    assert both.is_segmented.tolist() == [True]
    assert not torch.equal(both.embeddings, first.embeddings)


def test_tolerance_stops_each_sample_by_itself():
    model = build(write_steps=8)
    tokens = tiny_tokens(2, 9)
    free = model.write(input_ids=tokens)
    tolerance = free.write_losses[0, 3].item() + 1e-9
    assert (free.write_losses[1] > tolerance).any()
    stopped = model.write(input_ids=tokens, tolerance=tolerance)
    first_below = int((free.write_losses[0] < tolerance).nonzero()[0])
    assert stopped.write_losses[0].isnan().tolist() == [step > first_below for step in range(8)]
    at_stop = model.write(input_ids=tokens[:1], write_steps=first_below)
    torch.testing.assert_close(stopped.embeddings[0], at_stop.embeddings[0])
    alone = model.write(input_ids=tokens[1:], tolerance=tolerance)
    torch.testing.assert_close(stopped.embeddings[1], alone.embeddings[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("cut", [{}, {"write_segment_length": 3, "write_prefix_segments": 0}])
def test_samples_that_stopped_are_run_no_more(optimizer, cut, monkeypatch):
    model = build(write_steps=12, write_optimizer=optimizer, **cut)
    tokens, mask = tiny_tokens(5, 9), torch.ones(5, 9, dtype=torch.long)
    mask[0, 4:] = 0
    free = model.write(input_ids=tokens, attention_mask=mask)
    tolerance = float(free.write_losses[:, 4].median()) + 1e-9
    rows, whole = [], model.decoder.hidden_states
    monkeypatch.setattr(
        model.decoder, "hidden_states", lambda inputs: rows.append(len(inputs.embeddings)) or whole(inputs)
    )
    stopped = model.write(input_ids=tokens, attention_mask=mask, tolerance=tolerance)
    monkeypatch.undo()
    taken = (~stopped.write_losses.isnan()).sum(1)
    assert len(set(taken.tolist())) > 1
    assert rows[0] > rows[-1] > 0
    for row in range(5):
        given = {"input_ids": tokens[row : row + 1], "attention_mask": mask[row : row + 1]}
        alone = model.write(**given, tolerance=tolerance)
        torch.testing.assert_close(stopped.embeddings[row], alone.embeddings[0], rtol=1e-8, atol=1e-9)
        expected = free.write_losses[row].where(torch.arange(12) < taken[row], torch.nan)
        torch.testing.assert_close(stopped.write_losses[row], expected, rtol=1e-8, atol=1e-9, equal_nan=True)


def test_batches_and_progress_change_nothing(capsys):
    model = build()
    tokens = tiny_tokens(5, 9)
    together = model.write(input_ids=tokens)
    assert capsys.readouterr().err == ""
    apart = model.write(input_ids=tokens, batch_size=2, show_progress=True)
    torch.testing.assert_close(apart.embeddings, together.embeddings, rtol=1e-7, atol=1e-9)
    assert "9/9" in capsys.readouterr().err


def test_no_steps_leave_the_learned_start():
    model = build(write_steps=0)
    memory = model.write(input_ids=tiny_tokens(2, 9))
    assert torch.equal(memory.embeddings, model.memory_init.detach().expand(2, -1, -1))
    assert memory.write_losses.shape == (2, 0)


@pytest.mark.parametrize("learned", ["per_step", "per_token"])
def test_learned_step_sizes_start_at_the_configured_one_and_repeat_the_last(learned):
    fixed = build(write_steps=2)
    model = build(write_steps=2, learn_write_learning_rate=learned)
    tokens = tiny_tokens(1, 9)
    torch.testing.assert_close(model.write(input_ids=tokens).embeddings, fixed.write(input_ids=tokens).embeddings)
    with torch.no_grad():
        model.write_log_learning_rate[0] -= 1
        model.write_log_learning_rate[1] += 1
    first = model.write(input_ids=tokens, write_steps=1)
    expected = first
    for _ in range(3):
        expected = fixed.write(
            input_ids=tokens, memory=expected_for(fixed, expected), write_steps=1, write_learning_rate=0.3 * torch.e
        )
    torch.testing.assert_close(model.write(input_ids=tokens, write_steps=4).embeddings, expected.embeddings)


@pytest.mark.parametrize("learned", ["none", "per_step", "per_token"])
def test_steps_shrink_by_the_decay_also_beyond_those_that_are_learned(learned):
    model = build(write_steps=2, write_step_decay=0.5, learn_write_learning_rate=learned)
    plain, tokens, memory = build(), tiny_tokens(1, 9), None
    for step in range(4):
        begin = None if memory is None else expected_for(plain, memory)
        rate = 0.3 * 0.5**step
        memory = plain.write(input_ids=tokens, memory=begin, write_steps=1, write_learning_rate=rate)
    for given in (None, 0.3):
        actual = model.write(input_ids=tokens, write_steps=4, write_learning_rate=given)
        torch.testing.assert_close(actual.embeddings, memory.embeddings, rtol=1e-6, atol=1e-7)


def expected_for(model: GradMemForCausalLM, memory: GradMemMemory) -> GradMemMemory:
    """The memory as if `model` had written it."""
    return GradMemMemory(memory.embeddings, memory.write_losses, memory.segment_lengths, None, model.fingerprint())


def test_a_learning_rate_given_replaces_the_learned_ones():
    model = build(learn_write_learning_rate="per_token")
    with torch.no_grad():
        model.write_log_learning_rate.add_(1)
    tokens = tiny_tokens(1, 9)
    given = model.write(input_ids=tokens, write_learning_rate=0.3)
    assert torch.equal(given.embeddings, build().write(input_ids=tokens).embeddings)


def test_write_lora_changes_write_and_leaves_read_bitwise_the_base():
    plain = build()
    model = build(write_lora=LORA)
    randomize_lora(model)
    tokens, query = tiny_tokens(2, 9), tiny_tokens(2, 4)
    assert not torch.equal(model.write(input_ids=tokens).embeddings, plain.write(input_ids=tokens).embeddings)
    memory = plain.write(input_ids=tokens)
    with torch.no_grad():
        read = model(input_ids=query, memory=expected_for(model, memory)).logits
        assert torch.equal(read, plain(input_ids=query, memory=memory).logits)
    assert torch.equal(model.base_model(query).logits, plain.base_model(query).logits)


def test_read_lora_changes_read_and_leaves_write_bitwise_the_base():
    plain = build()
    model = build(read_lora=LORA)
    randomize_lora(model)
    model.memory_init = plain.memory_init
    tokens, query = tiny_tokens(2, 9), tiny_tokens(2, 4)
    memory = model.write(input_ids=tokens)
    assert torch.equal(memory.embeddings, plain.write(input_ids=tokens).embeddings)
    with torch.no_grad():
        read = model(input_ids=query, memory=memory).logits
        assert not torch.equal(read, plain(input_ids=query, memory=expected_for(plain, memory)).logits)


def test_lora_keeps_requires_grad_whatever_the_phase():
    model = build(write_lora=LORA, read_lora=LORA)
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    lora[0].requires_grad_(False)
    model.write(input_ids=tiny_tokens(1, 9))
    assert [parameter.requires_grad for parameter in lora] == [False] + [True] * (len(lora) - 1)


def test_reconstruct_decodes_what_write_reached():
    """Enough steps make a tiny model recall its context word for word, each sample to its own length."""
    model = build(write_steps=300, write_optimizer="adam", write_learning_rate=0.05, num_memory_tokens=4)
    tokens = tiny_tokens(2, 8)
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    memory = model.write(input_ids=tokens, attention_mask=mask, tolerance=0.01)
    decoded = model.reconstruct(memory)
    assert torch.equal(decoded[0], tokens[0])
    assert torch.equal(decoded[1, :5], tokens[1, 3:])
    assert (decoded[1, 5:] == 0).all()


@pytest.mark.parametrize("head", [False, True], ids=["by the base's own generation", "by forward passes"])
def test_what_is_called_at_each_token_of_a_reconstruction_may_leave_it(head):
    model, calls = build(write_head=head), []
    memory = model.write(input_ids=tiny_tokens(1, 7))
    model.reconstruct(memory, on_token=lambda: calls.append(None))
    assert len(calls) == 7
    with pytest.raises(KeyError, match="enough"):
        model.reconstruct(memory, on_token=lambda: {}["enough"])


def test_nothing_is_reconstructed_of_no_memory():
    model = build()
    assert model.reconstruct(model.write(input_ids=tiny_tokens(1, 7))[0:0]).shape == (0, 0)


def test_reconstruct_runs_under_write_conditions():
    """With a head, control tokens and a LoRA of WRITE's own, greedy decoding is the argmax of WRITE's logits."""
    model = build(write_head=True, num_control_tokens=2, write_lora=LORA, memory_projection=True)
    randomize_lora(model)
    with torch.no_grad():
        model.write_head.weight.normal_()
    tokens = tiny_tokens(1, 5)
    memory = model.write(input_ids=tokens)
    decoded = model.reconstruct(memory)
    logits = model.write_phase.logits(model.write_phase.prefix(memory.embeddings))
    assert decoded[0, 0] == logits[0, -1].argmax()


def test_a_memory_in_segments_is_reconstructed_after_prefixes_alone():
    model = build(
        write_steps=400, write_optimizer="adam", write_learning_rate=0.05, num_memory_tokens=6, write_segment_length=4
    )
    tokens = tiny_tokens(1, 8)
    memory = model.write(input_ids=tokens, tolerance=0.01)
    with pytest.raises(ValueError, match="prefix_input_ids"):
        model.reconstruct(memory)
    assert torch.equal(model.reconstruct(memory, prefix_input_ids=tokens[:, :4]), tokens[:, 4:])


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (tiny_tokens(3, 2), "3 rows of prefix_input_ids for 1 memories"),
        (tiny_tokens(1, 2)[0], r"prefix_input_ids must be .* with 2 dimensions, got shape \(2,\)"),
        (torch.tensor([[5, 9999]]), "prefix_input_ids must lie in .*, got 5..9999"),
    ],
    ids=["rows", "shape", "vocabulary"],
)
def test_prefixes_that_no_memory_can_be_decoded_behind_are_refused(prefix, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model.reconstruct(model.write(input_ids=tiny_tokens(1, 4)), prefix_input_ids=prefix)


@pytest.mark.parametrize("settings", [{"write_segments_in_turn": True, "write_prefix_segments": 0}, {"write_steps": 0}])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_neither_turns_nor_a_write_without_steps_hand_back_a_graph(settings, condition):
    model = build(**settings)
    ids, segments = tiny_tokens(2, 9), (torch.arange(9) // 4).expand(2, -1)
    with CONDITIONS[condition](model):
        memory = model.write(input_ids=ids, segment_ids=segments)
    assert not memory.embeddings.requires_grad
    assert not memory.write_losses.requires_grad
    with torch.no_grad():
        output = model(context_input_ids=ids, context_segment_ids=segments, input_ids=ids)
    assert not output.memory.embeddings.requires_grad
