"""READ: what `forward` computes, and generation from a memory."""

import pytest
import torch
from torch.nn import functional
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

from hf_gradmem import GradMemForCausalLM
from tests.support.tiny_models import tiny_tokens
from tests.support.writing import build

# Both ways of generating: from the base's own cached `generate`, and from `forward`.
GENERATING = {"cached": "llama", "from forward": "gemma3"}


@pytest.fixture
def model():
    return build()


def plain_logits(model: GradMemForCausalLM, memory: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Logits after [memory; query] by the base alone, without padding; the memory's last position first."""
    embeds = torch.cat([memory, model.base_model.get_input_embeddings()(query)])[None]
    return model.base_model(inputs_embeds=embeds).logits[0, len(memory) - 1 :]


@pytest.mark.parametrize("model_type", GENERATING.values(), ids=GENERATING)
def test_what_follows_no_prompt_comes_from_the_memory_alone(model_type):
    model = build(model_type)
    memory = model.write(input_ids=tiny_tokens(2, 9, seed=1))
    tokens = torch.empty((2, 0), dtype=torch.long)
    output = model.generate(tokens, memory=memory, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for _ in range(4):
        # The next token of each row is the likeliest after memory and tokens so far, padded by one that does not count.
        query = torch.cat([tokens, tokens.new_full((2, 1), 5)], dim=1)
        following = torch.stack([plain_logits(model, memory.embeddings[row], query[row])[-2] for row in range(2)])
        tokens = torch.cat([tokens, following.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(output, tokens)
    prompts, mask = tiny_tokens(2, 3), torch.tensor([[0, 0, 0], [1, 1, 1]])
    beside = model.generate(
        prompts, attention_mask=mask, memory=memory, max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(beside[0, 3:], tokens[0])


def test_logits_are_aligned_with_the_query_and_the_first_token_is_scored(model):
    query = tiny_tokens(2, 5)
    labels = query.clone()
    labels[0, :2] = -100
    output = model(context_input_ids=tiny_tokens(2, 9, seed=1), input_ids=query, labels=labels)
    expected_losses = []
    for row in range(2):
        logits = plain_logits(model, output.memory.embeddings[row], query[row])
        torch.testing.assert_close(output.logits[row], logits[1:], rtol=1e-6, atol=1e-7)
        losses = functional.cross_entropy(logits[:-1], labels[row], reduction="none", ignore_index=-100)
        expected_losses.append(losses[labels[row] != -100])
    torch.testing.assert_close(output.read_loss, torch.cat(expected_losses).mean(), rtol=1e-6, atol=1e-7)
    reconstruction = output.write_losses[:, -1].mean()
    torch.testing.assert_close(output.loss, output.read_loss + 0.5 * reconstruction)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_of_queries_changes_nothing(model, padding):
    query = tiny_tokens(1, 5)
    context = tiny_tokens(1, 9, seed=1)
    left, right = {"left": (3, 0), "right": (0, 3), "both": (2, 2)}[padding]
    padded = functional.pad(query, (left, right), value=7)
    mask = functional.pad(torch.ones_like(query), (left, right))
    labels = functional.pad(query, (left, right), value=-100)
    plain = model(context_input_ids=context, input_ids=query, labels=query)
    other = model(context_input_ids=context, input_ids=padded, attention_mask=mask, labels=labels)
    torch.testing.assert_close(other.loss, plain.loss, rtol=1e-7, atol=0)
    torch.testing.assert_close(other.logits[:, left : left + 5], plain.logits, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_labels_at_padding_are_not_scored(model, padding):
    """As where the labels are the input ids, padding and all."""
    query, context = tiny_tokens(2, 5), tiny_tokens(2, 9, seed=1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    mask = mask.flip(1) if padding == "left" else mask
    unscored = query.masked_fill(mask == 0, -100)
    inputs = {"context_input_ids": context, "input_ids": query, "attention_mask": mask}
    loss = model(**inputs, labels=query).read_loss
    torch.testing.assert_close(loss, model(**inputs, labels=unscored).read_loss, rtol=1e-12, atol=0)
    alone = [
        model(context_input_ids=context[row : row + 1], input_ids=tokens, labels=tokens).read_loss * tokens.numel()
        for row, tokens in enumerate(query[row, mask[row].bool()][None] for row in range(2))
    ]
    torch.testing.assert_close(loss, sum(alone) / 8, rtol=1e-6, atol=1e-7)


def test_several_queries_on_each_context_equal_flat_ones(model):
    context = tiny_tokens(2, 9, seed=1)
    queries = tiny_tokens(6, 5).view(2, 3, 5)
    mask = torch.ones_like(queries)
    labels = queries.clone()
    mask[1, 2], labels[1, 2] = 0, -100  # this query is missing
    nested = model(context_input_ids=context, input_ids=queries, attention_mask=mask, labels=labels)
    flat = model(
        context_input_ids=context,
        input_ids=queries.view(6, 5)[:5],
        labels=labels.view(6, 5)[:5],
        context_index=torch.tensor([0, 0, 0, 1, 1]),
    )
    torch.testing.assert_close(nested.loss, flat.loss)
    torch.testing.assert_close(nested.logits.view(6, 5, -1)[:5], flat.logits)
    assert nested.write_losses.shape[0] == nested.logits.shape[0] == 2


def test_a_memory_reads_as_its_context_did(model):
    context, query = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 5)
    memory = model.write(input_ids=context)
    from_memory = model(input_ids=query, memory=memory, labels=query)
    from_context = model(context_input_ids=context, input_ids=query, labels=query)
    torch.testing.assert_close(from_memory.logits, from_context.logits)
    torch.testing.assert_close(from_memory.read_loss, from_context.read_loss)
    assert from_memory.write_losses is None
    assert from_memory.loss == from_memory.read_loss


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_training_loss_without_a_graph(model, mode):
    inputs = {"context_input_ids": tiny_tokens(2, 9), "input_ids": tiny_tokens(2, 5), "labels": tiny_tokens(2, 5)}
    trained = model(**inputs)
    with mode():
        evaluated = model(**inputs)
    torch.testing.assert_close(evaluated.loss, trained.loss.detach())
    assert not evaluated.loss.requires_grad
    assert not evaluated.memory.embeddings.requires_grad
    assert evaluated.memory.fingerprint == model.fingerprint()


def test_a_memory_of_no_steps_stays_as_it_is_when_the_start_moves(model):
    start = model.memory_init.detach().clone()
    with torch.no_grad():
        memory = model(context_input_ids=tiny_tokens(2, 9), input_ids=tiny_tokens(2, 5), write_steps=0).memory
        model.memory_init.add_(1)
    assert torch.equal(memory.embeddings, start.expand(2, -1, -1))


def test_a_batch_without_labels_to_score_has_a_loss_of_zero(model):
    memory = model.write(input_ids=tiny_tokens(1, 9))
    labels = torch.full((1, 5), -100)
    assert model(input_ids=tiny_tokens(1, 5), memory=memory, labels=labels).loss == 0


def test_a_tuple_on_request(model):
    memory = model.write(input_ids=tiny_tokens(1, 9))
    output = model(input_ids=tiny_tokens(1, 5), memory=memory)
    (logits, given) = model(input_ids=tiny_tokens(1, 5), memory=memory, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert given.fingerprint == memory.fingerprint


def greedy(model: GradMemForCausalLM, memory, prompt: torch.Tensor, steps: int) -> torch.Tensor:
    tokens = prompt[None]
    for _ in range(steps):
        with torch.no_grad():
            logits = model(input_ids=tokens, memory=memory).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    return tokens[0]


@pytest.fixture(params=GENERATING.values(), ids=GENERATING)
def generator(request):
    model = build(request.param, torch.float32)
    model.generation_config.eos_token_id = None
    assert model.decoder.generates_from_embeddings == (request.param == GENERATING["cached"])
    return model


def test_unequal_prompts_continue_as_each_alone(generator):
    memory = generator.write(input_ids=tiny_tokens(3, 9, seed=1))
    prompts = tiny_tokens(3, 6)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [1] * 3 + [0] * 3])
    generated = generator.generate(prompts, attention_mask=mask, memory=memory, do_sample=False, max_new_tokens=4)
    assert torch.equal(generated[:, :6], prompts)
    for row in range(3):
        prompt = prompts[row, mask[row].bool()]
        assert torch.equal(generated[row, 6:], greedy(generator, memory[row], prompt, 4)[len(prompt) :])


def test_one_memory_serves_many_prompts(generator):
    memory = generator.write(input_ids=tiny_tokens(2, 9, seed=1))
    prompts = tiny_tokens(3, 4)
    settings = {"do_sample": False, "max_new_tokens": 3}
    generated = generator.generate(prompts, memory=memory[1], **settings)
    indexed = generator.generate(prompts, memory=memory, context_index=torch.tensor([1, 1, 1]), **settings)
    assert torch.equal(generated, indexed)
    assert torch.equal(generated[2], greedy(generator, memory[1], prompts[2], 3))


def test_beams_and_return_sequences_repeat_memory_and_prompt(generator):
    memory = generator.write(input_ids=tiny_tokens(2, 9, seed=1))
    prompts = tiny_tokens(2, 4)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4, "num_return_sequences": 2}
    output = generator.generate(prompts, memory=memory, return_dict_in_generate=True, output_scores=True, **settings)
    assert torch.equal(output.sequences[:, :4], prompts.repeat_interleave(2, dim=0))
    # The score of a beam is the mean log-probability that `forward` gives its tokens.
    for row, sequence in enumerate(output.sequences):
        with torch.no_grad():
            logits = generator(input_ids=sequence[None], memory=memory[row // 2]).logits[0]
        log_probabilities = logits.log_softmax(-1)[3:-1].gather(1, sequence[4:, None]).sum()
        assert output.sequences_scores[row].item() == pytest.approx(log_probabilities.item() / 4, abs=1e-3)


def test_sampling_is_reproducible_and_follows_the_seed(generator):
    memory = generator.write(input_ids=tiny_tokens(1, 9, seed=1))
    samples = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        samples.append(
            generator.generate(
                tiny_tokens(1, 4), memory=memory, do_sample=True, max_new_tokens=8, num_return_sequences=3
            )
        )
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    assert len(set(map(tuple, samples[0].tolist()))) > 1


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.extend(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_prompt_and_continuation(generator):
    memory = generator.write(input_ids=tiny_tokens(1, 9, seed=1))
    streamer = Recorder()
    generated = generator.generate(
        tiny_tokens(1, 4), memory=memory, do_sample=False, max_new_tokens=5, streamer=streamer
    )
    assert streamer.tokens == generated[0].tolist()
    assert streamer.ended


class Words:
    """Stands in for a tokenizer: each token is a word."""

    def decode(self, tokens, **kwargs):
        return " ".join(f"w{token}" for token in torch.as_tensor(tokens).tolist())


@pytest.mark.parametrize("streamer_class", [TextStreamer, TextIteratorStreamer])
def test_a_text_streamer_can_skip_the_prompt(generator, streamer_class, capsys):
    memory = generator.write(input_ids=tiny_tokens(1, 9, seed=1))
    streamer = streamer_class(Words(), skip_prompt=True)
    generated = generator.generate(
        tiny_tokens(1, 4), memory=memory, do_sample=False, max_new_tokens=5, streamer=streamer
    )
    text = "".join(streamer) if streamer_class is TextIteratorStreamer else capsys.readouterr().out
    assert text.split() == Words().decode(generated[0, 4:]).split()


def test_lengths_count_the_prompt_and_not_the_memory(generator):
    memory = generator.write(input_ids=tiny_tokens(1, 9, seed=1))
    prompt = tiny_tokens(1, 4)
    assert generator.generate(prompt, memory=memory, do_sample=False, max_length=7).shape[1] == 7
    assert generator.generate(prompt, memory=memory, do_sample=False, max_new_tokens=2).shape[1] == 6
    first = generator.generate(prompt, memory=memory, do_sample=False, max_new_tokens=1)[0, -1].item()
    generator.generation_config.eos_token_id = first
    generator.generation_config.pad_token_id = 0
    assert generator.generate(prompt, memory=memory, do_sample=False, max_length=9).shape[1] == 5
    longer = generator.generate(prompt, memory=memory, do_sample=False, max_length=9, min_length=8)
    assert first not in longer[0, 4:7]
    # A least length that the prompt has already asks for nothing.
    assert generator.generate(prompt, memory=memory, do_sample=False, max_length=9, min_length=4).shape[1] == 5


def test_a_context_in_place_of_a_memory(generator):
    context, prompt = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 4)
    settings = {"do_sample": False, "max_new_tokens": 4}
    from_context = generator.generate(prompt, context_input_ids=context, **settings)
    assert torch.equal(from_context, generator.generate(prompt, memory=generator.write(input_ids=context), **settings))


def test_generation_uses_the_configuration_of_the_base(generator):
    memory = generator.write(input_ids=tiny_tokens(1, 9, seed=1))
    assert generator.generation_config is generator.base_model.generation_config
    generator.generation_config.max_new_tokens = 3
    generator.generation_config.do_sample = False
    assert generator.generate(tiny_tokens(1, 4), memory=memory).shape[1] == 7


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3"])
def test_reading_ends_where_the_window_of_the_base_does(model_type):
    model, room = build(model_type, torch.float32), 128 - 3
    memory = model.write(input_ids=tiny_tokens(1, 9, seed=1))
    settings = {"memory": memory, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert model.generate(tiny_tokens(1, room - 4), max_new_tokens=50, **settings).shape[1] == room
    assert model(input_ids=tiny_tokens(1, room), memory=memory).logits.shape[1] == room
    with pytest.raises(ValueError, match=r"longest prompt has 125 tokens.* 128 positions .* leave 125"):
        model.generate(tiny_tokens(1, room), max_new_tokens=1, **settings)
    with pytest.raises(ValueError, match=r"longest query has 126 tokens.* 128 positions .* leave 125"):
        model(input_ids=tiny_tokens(1, room + 1), memory=memory)


def penalised(model: GradMemForCausalLM, memory, prompt: torch.Tensor, penalty: float | None, steps: int) -> list[int]:
    """Greedy tokens where each new one makes itself less likely, or impossible."""
    new: list[int] = []
    for _ in range(steps):
        logits = model(input_ids=torch.cat([prompt, torch.tensor(new, dtype=torch.long)])[None], memory=memory).logits
        scores = logits[0, -1].detach().clone()
        for token in set(new):
            if penalty is None:
                scores[token] = -torch.inf
            else:
                scores[token] *= penalty if scores[token] < 0 else 1 / penalty
        new.append(int(scores.argmax()))
    return new


WAYS = {"cached": {}, "from forward": {"model_type": "gemma3"}, "keys and values": {"memory_form": "key_values"}}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("setting", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 1}], ids=str)
@pytest.mark.parametrize("in_base", [True, False], ids=["of the base", "of the call"])
def test_processors_see_new_tokens_whatever_stands_beside_them(options, setting, in_base):
    model = build(**options)
    memory, prompts = model.write(input_ids=tiny_tokens(1, 9, seed=1)), tiny_tokens(2, 9)
    given = {"memory": memory, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    if in_base:
        model.generation_config.update(**setting)
    else:
        given |= setting
    expected = penalised(model, memory, prompts[0, 3:], setting.get("repetition_penalty"), 12)
    alone = model.generate(prompts[:1, 3:], **given)
    mask = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    beside = model.generate(prompts, attention_mask=mask, **given)
    assert alone[0, 6:].tolist() == expected
    assert beside[0, 9:].tolist() == expected


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_states_of_ragged_prompts_behind_keys_and_values_are_refused(name):
    model = build(memory_form="key_values")
    memory, mask = model.write(input_ids=tiny_tokens(2, 9, seed=1)), torch.ones((2, 8), dtype=torch.long)
    given = {"memory": memory, "max_new_tokens": 2, "return_dict_in_generate": True, name: True}
    assert model.generate(tiny_tokens(2, 8), **given)[name.removeprefix("output_")]
    mask[0, :3] = 0
    with pytest.raises(ValueError, match=f"{name}=True needs .* prompts of one length"):
        model.generate(tiny_tokens(2, 8), attention_mask=mask, **given)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_settings_that_mean_nothing_behind_a_memory_are_refused(options):
    model = build(**options)
    memory, prompt = model.write(input_ids=tiny_tokens(1, 9, seed=1)), tiny_tokens(1, 8)
    given = {"memory": memory, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    refused = {"assistant_model": model.base_model, "guidance_scale": 2.0, "prompt_lookup_num_tokens": 3}
    refused["prefill_chunk_size"] = 2
    expected = model.generate(prompt, guidance_scale=1, **given)
    if not options:
        assert model.generate(prompt, prompt_lookup_num_tokens=refused.pop("prompt_lookup_num_tokens"), **given).equal(
            expected
        )
    for name, value in refused.items():
        with pytest.raises(ValueError, match=rf"{name}=.* runs the base without the memory"):
            model.generate(prompt, **{name: value}, **given)
    for name in ("inputs", "inputs_embeds", "past_key_values", "position_ids"):
        with pytest.raises(ValueError, match=f"{name} of generate means the prompt"):
            model.generate(prompt, **{name: prompt}, **given)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("count", [2, 140])  # so many that the memory is cached
def test_a_cache_that_the_base_asks_for_is_no_hindrance(options, count):
    model = build(**options)
    memory, prompts = model.write(input_ids=tiny_tokens(1, 9, seed=1)), tiny_tokens(count, 3)
    given = {"memory": memory, "do_sample": False, "max_new_tokens": 3, "eos_token_id": None}
    expected = model.generate(prompts, **given)
    model.generation_config.cache_implementation = "static"
    assert torch.equal(model.generate(prompts, **given), expected)
