"""The model: which bases it takes, how it is cast and resized, what trains in it."""

import peft
import pytest
import torch
from transformers import (
    AutoModel,
    GPT2ForSequenceClassification,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from tests.support.comparing import assert_equal_states, base_state, beside_base
from tests.support.messages import says
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, with_memory
from tests.support.tiny_models import VOCAB_SIZE, tiny_causal_lm, tiny_config, tiny_tokens

CONTEXT, QUERY = tiny_tokens(2, 8, seed=1), tiny_tokens(2, 4, seed=2)


# ------------------------------------------------------------------------------------------------ what trains


def test_training_what_gets_no_gradient():
    model = with_memory(nameless_base(), **PLAIN, meta_gradient="none")
    with pytest.raises(ValueError, match=says('meta_gradient="none"', "nothing trains here", '"exact"')):
        model(context_input_ids=CONTEXT, input_ids=QUERY, labels=QUERY)
    own_start = {"memory_form": {"name": "key_values", "own_start": True}, "meta_gradient": "none"}
    model = with_memory(nameless_base(), **PLAIN, **own_start)
    model.memory_init.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing trains here but the memory's start"):
        model(context_input_ids=CONTEXT, input_ids=QUERY, labels=QUERY)


@pytest.mark.parametrize(
    "own", [{"write_head": True}, {"write_lora": {"r": 1, "target_modules": ["q_proj"]}}, {"num_control_tokens": 1}]
)
def test_past_detached_steps_what_is_of_write_alone_trains_by_its_last_loss_alone(own):
    def loss(weight):
        model = with_memory(nameless_base(), **PLAIN | own, meta_gradient="none", reconstruction_loss_weight=weight)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("write" in name)
        return model(context_input_ids=CONTEXT, input_ids=QUERY, labels=QUERY).loss

    assert loss(1.0).requires_grad
    with pytest.raises(ValueError, match="what is WRITE's own"):
        loss(0.0)


# ------------------------------------------------------------------------------------------------ bases


@pytest.mark.parametrize("model_type", ["llama", "mpt"])
def test_a_context_beyond_the_window_is_refused_whatever_the_base_calls_it(model_type):
    model = with_memory(tiny_causal_lm(model_type, torch.float32), **PLAIN)
    with pytest.raises(ValueError, match=says(f"needs {model.decoder.window + 1} positions", "cut_text")):
        model.write(input_ids=tiny_tokens(1, model.writer.room + 1))


class TakesNoEmbeddings(PreTrainedModel):
    config_class = LlamaConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaForCausalLM(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def forward(self, input_ids, attention_mask=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_decoder_that_takes_no_embeddings():
    base = TakesNoEmbeddings(tiny_causal_lm("llama").config)
    with pytest.raises(TypeError, match=says("TakesNoEmbeddings takes no inputs_embeds")):
        get_gradmem_model(base)


@pytest.mark.parametrize(
    ("model_class", "expected"),
    [
        (GPT2Model, "GPT2Model has no language-model head"),
        (GPT2ForSequenceClassification, "GPT2ForSequenceClassification has no language-model head"),
        (T5ForConditionalGeneration, "T5ForConditionalGeneration is an encoder with a decoder"),
    ],
)
def test_model_that_is_no_decoder_is_refused_when_it_is_wrapped(model_class, expected):
    config = tiny_config("gpt2")
    if model_class is T5ForConditionalGeneration:
        config = T5Config(vocab_size=80, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match=says(expected, "AutoModelForCausalLM")):
        get_gradmem_model(model_class(config))


def test_broken_weights_are_named_and_not_blamed_on_embeddings():
    base = nameless_base()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=says("LlamaForCausalLM in torch.float32", "NaN", "layers.1.mlp.up_proj")):
        get_gradmem_model(base, GradMemConfig(**PLAIN)).write(input_ids=CONTEXT)


def test_base_that_gives_plain_tuples():
    base = nameless_base()
    base.config.return_dict = False
    with pytest.raises(ValueError, match=says("LlamaForCausalLM gives plain tuples", "return_dict = True")):
        get_gradmem_model(base)


def test_peft_model_as_a_base():
    base = peft.get_peft_model(nameless_base(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=says("transformers.PreTrainedModel", "got PeftModel", "merge_and_unload()")):
        get_gradmem_model(base)


def test_adapters_that_would_be_lost_or_train_nothing_are_refused():
    lora = {"r": 2, "target_modules": ["q_proj"]}
    model = get_gradmem_model(nameless_base(), GradMemConfig(num_memory_tokens=2, read_lora=lora))
    with pytest.raises(ValueError, match=says("read_lora and write_lora", "get_peft_model")):
        model.add_adapter(peft.LoraConfig(**lora))
    with pytest.raises(ValueError, match=says("read_lora and write_lora", "get_peft_model")):
        model.load_adapter("me/adapter")
    wrapped, ids = peft.get_peft_model(model, peft.LoraConfig(**lora)), torch.ones(1, 3, dtype=torch.long)
    for run in (lambda: wrapped(context_input_ids=ids, input_ids=ids, labels=ids), lambda: model.write(input_ids=ids)):
        with pytest.raises(ValueError, match=says("a PEFT adapter (default) beside write_lora or read_lora")):
            run()


def test_a_lora_of_its_own_that_a_peft_model_took_out_is_missed(tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj"]}
    model = get_gradmem_model(nameless_base(), GradMemConfig(num_memory_tokens=2, write_lora=lora))
    merged = peft.get_peft_model(model, peft.LoraConfig(**lora)).merge_and_unload()
    for run in (lambda: merged.write(input_ids=CONTEXT), lambda: merged.save_pretrained(tmp_path / "out")):
        with pytest.raises(RuntimeError, match="write_lora of this model is no longer in its base"):
            run()
    assert not (tmp_path / "out").exists()


def test_a_model_within_a_peft_model_is_saved_once_it_is_out(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=says("A PEFT adapter (default) is around", "peft_model.unload()")):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    memory = wrapped.merge_and_unload().write(input_ids=CONTEXT)
    model.save_pretrained(tmp_path / "adapter")
    loaded = GradMemForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded.write(input_ids=CONTEXT).embeddings, memory.embeddings)


@pytest.mark.parametrize("option", ["read_lora", "write_lora"])
def test_a_head_with_a_lora_keeps_its_size(option):
    model = with_memory(nameless_base(), **PLAIN, **{option: {"r": 2, "target_modules": ["lm_head"]}})
    with pytest.raises(ValueError, match="output head has a LoRA"):
        model.resize_token_embeddings(VOCAB_SIZE + 4)
    assert model.vocab_size == VOCAB_SIZE


def test_activation_checkpointing_recomputes_nothing_where_nothing_is_differentiated():
    model = with_memory(nameless_base(), **PLAIN, memory_form="key_values")
    memory = model.write(input_ids=CONTEXT)
    expected = model(input_ids=QUERY, memory=memory).logits
    model.base_model.requires_grad_(True)
    model.gradient_checkpointing_enable()
    model.train()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=QUERY, memory=memory).logits, expected)
        torch.testing.assert_close(model(context_input_ids=CONTEXT, input_ids=QUERY).logits, expected)
    generated = model.generate(QUERY, memory=memory, max_new_tokens=1, do_sample=False)
    assert torch.equal(generated[:, -1], expected[:, -1].argmax(-1))
    assert any(layer.gradient_checkpointing for layer in model.base_model.model.layers)


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_a_peft_model_around_it_runs_and_trains(task_type):
    """PEFT names arguments of a causal language model that it leaves out."""
    model, ids = (
        get_gradmem_model(nameless_base(), GradMemConfig(num_memory_tokens=2)),
        torch.ones(1, 3, dtype=torch.long),
    )
    batch = {"context_input_ids": ids, "input_ids": ids, "labels": ids}
    expected = model(**batch).loss
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type)
    wrapped = peft.get_peft_model(model, lora)
    loss = wrapped(**batch).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in wrapped.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("config", [{"write_steps": 2}, 3])
def test_something_that_is_no_configuration_and_no_place(config):
    with pytest.raises(TypeError, match="An adapter is a GradMemConfig, for a new one, or where it lies"):
        get_gradmem_model(nameless_base(), config)


def test_module_that_is_no_pretrained_model():
    with pytest.raises(TypeError, match=says("transformers.PreTrainedModel", "got Linear")):
        get_gradmem_model(torch.nn.Linear(2, 2))


def test_configuration_without_a_base():
    with pytest.raises(ValueError, match=says("text_config is empty and no base_model was given", "get_gradmem_model")):
        GradMemForCausalLM(GradMemConfig())


@pytest.mark.parametrize("model_type", ["cohere", "gemma2"])
def test_write_head_on_logits_that_are_more_than_a_linear_head(model_type):
    base = tiny_causal_lm(model_type)
    with pytest.raises(ValueError, match=says("write_head=True", type(base).__name__, "Use write_head=False")):
        get_gradmem_model(base, GradMemConfig(write_head=True))


def test_a_seed_draws_one_start_whatever_lora_stands_beside_it():
    """So that readers of several kinds can be trained on memories that one of them wrote."""
    starts = []
    for options in ({}, {"read_lora": {"r": 2}}, {"read_lora": {"r": 4}, "write_lora": {"r": 1}}):
        torch.manual_seed(0)
        model = with_memory(nameless_base(), **PLAIN | options)
        starts.append(model.memory_init)
    assert torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0], starts[2])


def test_lora_that_finds_nothing_in_the_base():
    with pytest.raises(ValueError, match=says("write_lora=", "no_such", "does not fit LlamaForCausalLM")):
        get_gradmem_model(nameless_base(), GradMemConfig(write_lora={"r": 2, "target_modules": ["no_such"]}))


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_to_half_precision_casts_the_base_alone(base, dtype):
    model = with_memory(base, **EVERY_OPTION)
    before = beside_base(model)
    model.memory_init.grad = torch.ones_like(model.memory_init)
    assert model.to(dtype).dtype == dtype
    assert {value.dtype for value in base_state(model).values()} == {dtype}
    assert_equal_states(beside_base(model), before)
    assert model.memory_init.grad.dtype == torch.float32
    model.float()
    assert_equal_states(beside_base(model), before)
    assert {value.dtype for value in base_state(model).values()} == {torch.float32}


def test_casting_to_double_casts_everything_and_half_precision_takes_it_back(base):
    model = with_memory(base, **EVERY_OPTION).double()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64}
    model.half()
    assert {value.dtype for value in beside_base(model).values()} == {torch.float32}


# ------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_vocabulary_keeps_its_rows_and_is_saved_with_the_base(tmp_path, tied):
    nameless_base(tied).save_pretrained(tmp_path / "base")
    model = with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)
    old = {
        "embeddings": model.get_input_embeddings().weight.clone(),
        "head": model.get_output_embeddings().weight.clone(),
        "write_head": model.write_head.weight.clone(),
    }
    model.resize_token_embeddings(VOCAB_SIZE + 6)
    new = {
        "embeddings": model.get_input_embeddings().weight,
        "head": model.get_output_embeddings().weight,
        "write_head": model.write_head.weight,
    }
    for name, weight in new.items():
        assert weight.shape[0] == VOCAB_SIZE + 6
        assert torch.equal(weight[:VOCAB_SIZE], old[name])
    assert torch.equal(new["write_head"][VOCAB_SIZE:], new["head"][VOCAB_SIZE:])
    assert not new["embeddings"].requires_grad
    assert new["write_head"].requires_grad
    model.save_pretrained(tmp_path / "full")
    loaded = AutoModel.from_pretrained(tmp_path / "full")
    assert_equal_states(loaded.state_dict(), model.state_dict())
    added = torch.tensor([[VOCAB_SIZE + 1, VOCAB_SIZE + 5, 20]])
    assert torch.equal(model.write(input_ids=added).embeddings, loaded.write(input_ids=added).embeddings)


def test_resizing_to_the_same_size_leaves_the_base_to_its_name(base, tmp_path):
    model = with_memory(base, **PLAIN)
    model.resize_token_embeddings(VOCAB_SIZE)
    model.save_pretrained(tmp_path / "adapter")
    assert not AutoModel.from_pretrained(tmp_path / "adapter").config.includes_base
