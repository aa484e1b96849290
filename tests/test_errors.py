"""Bad input is refused where it comes in, by a message that names the value and what was expected."""

import re

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, get_gradmem_model

from .small_models import EVERY_OPTION, PLAIN, named_base, nameless_base, small_tokenizer, with_memory
from .tiny_models import tiny_causal_lm, tiny_tokens

CONTEXT, QUERY = tiny_tokens(2, 8, seed=1), tiny_tokens(2, 4, seed=2)


@pytest.fixture(scope="module")
def model():
    model = with_memory(nameless_base(), **PLAIN)
    model.tokenizer = small_tokenizer()
    return model


@pytest.fixture(scope="module")
def memory(model):
    return model.write(input_ids=CONTEXT)


def says(*parts: str) -> str:
    """A pattern for a message that holds these parts, in this order."""
    return "(?s)" + ".*".join(map(re.escape, parts))


# ------------------------------------------------------------------------------------------------ contexts


@pytest.mark.parametrize(("text", "index"), [("", "0 of 1"), (["abc", ""], "1 of 2"), (["abc", []], "1 of 2")])
def test_empty_text(model, text, index):
    with pytest.raises(ValueError, match=says(f"context {index} has no tokens", "at least one token")):
        model.write(text)


def test_no_texts(model):
    with pytest.raises(ValueError, match="no context was given"):
        model.write([])


def test_row_that_is_masked_throughout(model):
    mask = torch.ones_like(CONTEXT)
    mask[1] = 0
    expected = says("context 1 of 2 has no tokens")
    with pytest.raises(ValueError, match=expected):
        model.write(input_ids=CONTEXT, attention_mask=mask)
    with pytest.raises(ValueError, match=expected):
        model(context_input_ids=CONTEXT, context_attention_mask=mask, input_ids=QUERY)


def test_something_other_than_text(model):
    with pytest.raises(TypeError, match=says("a context is a text or a list of texts", "[1, 2]")):
        model.write([[1, 2]])


def test_text_and_tokens_at_once_or_neither(model):
    for arguments in ({}, {"context": "abc", "input_ids": CONTEXT}):
        with pytest.raises(ValueError, match="either a text or input_ids, and not both"):
            model.write(**arguments)


def test_text_without_a_tokenizer():
    with pytest.raises(ValueError, match=says("no tokenizer", "tokenizer= to get_gradmem_model", "input_ids")):
        with_memory(nameless_base(), **PLAIN).write("abc")


def test_context_longer_than_the_window(model):
    expected = says("needs 133 positions", "window of LlamaForCausalLM is 128", "segments", "write_segment_length")
    with pytest.raises(ValueError, match=expected):
        model.write(input_ids=tiny_tokens(1, 130))
    assert model.write(input_ids=tiny_tokens(1, 130), segment_ids=torch.arange(130)[None] // 50).is_segmented.all()


@pytest.mark.parametrize("name", ["attention_mask", "segment_ids"])
def test_mask_of_another_shape_than_its_context(model, name):
    with pytest.raises(ValueError, match=says(f"context {name}", "shape of its input_ids, (2, 8), got (2, 7)")):
        model.write(input_ids=CONTEXT, **{name: torch.ones(2, 7, dtype=torch.long)})


@pytest.mark.parametrize("ids", [torch.ones(8, dtype=torch.long), torch.ones(2, 8)], ids=["flat", "floating_point"])
def test_context_that_is_no_batch_of_token_ids(model, ids):
    with pytest.raises(ValueError, match=says("context input_ids must be a tensor of token ids with 2 dim", "got")):
        model.write(input_ids=ids)


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("write_steps", -1, ("write_steps must be at least 0, got -1",)),
        ("write_learning_rate", -0.5, ("write_learning_rate must be greater than 0, got -0.5",)),
        ("write_learning_rate", 0.0, ("write_learning_rate must be greater than 0, got 0",)),
    ],
)
def test_write_argument_out_of_range(model, argument, value, expected):
    with pytest.raises(ValueError, match=says(*expected)):
        model.write(input_ids=CONTEXT, **{argument: value})


def test_write_that_diverges_names_the_context_and_what_to_lower():
    model = with_memory(tiny_causal_lm("gpt2", torch.float32), **PLAIN)
    with pytest.raises(FloatingPointError, match=says("context 0", "NaN or inf", "Lower write_learning_rate", "1e+30")):
        model.write(input_ids=CONTEXT, write_learning_rate=1e30, write_steps=4)


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_broken_weight_is_blamed_on_the_context_that_meets_it(batch_size):
    model = with_memory(nameless_base(), **PLAIN)
    context = torch.tensor([[20, 21, 22], [20, 21, 23], [24, 50, 22]])
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.nan
    with pytest.raises(FloatingPointError, match=says("context 2", "Lower write_learning_rate (now 0.4)")):
        model.write(input_ids=context, batch_size=batch_size)


# ------------------------------------------------------------------------------------------------ queries


def test_neither_memory_nor_context_or_both(model, memory):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match="nothing to read from: give") as caught:
            read(input_ids=QUERY)
        assert all(name in str(caught.value) for name in ("context_input_ids", "a memory"))
        with pytest.raises(ValueError, match="either a memory or context_input_ids, and not both"):
            read(input_ids=QUERY, memory=memory, context_input_ids=CONTEXT)


def test_no_query(model, memory):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=says("nothing to read with", "input_ids")):
            read(memory=memory)


def test_something_other_than_a_memory(model, memory):
    with pytest.raises(TypeError, match="memory must be a GradMemMemory, got Tensor"):
        model(input_ids=QUERY, memory=memory.embeddings)


@pytest.mark.parametrize(("index", "found"), [([0, 2], "0..2"), ([-1, 0], "-1..0")])
def test_context_index_out_of_range(model, memory, index, found):
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=says(f"context_index must lie in 0..1, got {found}")):
            read(input_ids=QUERY, memory=memory, context_index=torch.tensor(index))


def test_context_index_of_another_length_than_the_queries(model, memory):
    with pytest.raises(ValueError, match=says("one entry for each", "(3,)", "(2,)")):
        model(input_ids=QUERY, memory=memory, context_index=torch.tensor([0, 1, 0]))


def test_as_many_queries_as_nothing_else(model, memory):
    with pytest.raises(ValueError, match=says("2 memories for 3 rows", "context_index")):
        model(input_ids=tiny_tokens(3, 4), memory=memory)


@pytest.mark.parametrize("name", ["labels", "attention_mask"])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 4), (1, 4)])
def test_labels_or_mask_of_another_shape_than_the_query(model, memory, name, shape):
    expected = says(f"{name} must have the shape of its input_ids, (2, 4), got {shape}")
    with pytest.raises(ValueError, match=expected):
        model(input_ids=QUERY, memory=memory, **{name: torch.ones(shape, dtype=torch.long)})


def test_several_queries_on_each_memory_in_generate(model, memory):
    with pytest.raises(ValueError, match=says("flat prompts", "(2, 2, 4)", "context_index")):
        model.generate(input_ids=tiny_tokens(4, 4).view(2, 2, 4), memory=memory)


@pytest.mark.parametrize("max_length", [3, 4])
def test_max_length_that_leaves_no_room(model, memory, max_length):
    expected = says(f"max_length={max_length} leaves no room after a prompt of 4 tokens", "max_new_tokens")
    with pytest.raises(ValueError, match=expected):
        model.generate(input_ids=QUERY, memory=memory, max_length=max_length)


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("write_step", "write_steps"), ("num_mem_tokens", "num_memory_tokens"), ("wlora", "write_lora")],
)
def test_unknown_option_names_the_nearest(option, nearest):
    with pytest.raises(ValueError, match=says(f"no option '{option}'", f"nearest is '{nearest}'")):
        GradMemConfig(**{option: 1})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_memory_tokens": 0}, ("num_memory_tokens must be at least 1, got 0",)),
        ({"write_steps": -2}, ("write_steps must be at least 0, got -2",)),
        ({"write_learning_rate": 0.0}, ("write_learning_rate must be greater than 0, got 0.0",)),
        ({"write_learning_rate": float("nan")}, ("write_learning_rate must be greater than 0, got nan",)),
        ({"write_max_grad_norm": -1.0}, ("write_max_grad_norm must be greater than 0, got -1.0",)),
        ({"write_betas": (0.9, 1.0)}, ("write_betas must be two numbers in [0, 1), got (0.9, 1.0)",)),
        ({"meta_gradient": "second"}, ("meta_gradient must be one of", "'exact'", "'first_order'", "got 'second'")),
        ({"meta_gradient_radius": 0.0}, ("meta_gradient_radius must be greater than 0, got 0.0",)),
        ({"writer": "rmt"}, ("writer must be one of", "'forward'", "got 'rmt'")),
        (
            {"writer": "forward", "write_head": True},
            ('write_head=True belongs to writer="gradient"', "Leave it at False"),
        ),
        ({"learn_write_learning_rate": "per_step", "write_steps": 0}, ("'per_step' needs write_steps of at least 1",)),
        ({"write_segment_length": 0}, ("write_segment_length must be at least 1, got 0",)),
    ],
    ids=str,
)
def test_option_out_of_range(options, expected):
    with pytest.raises(ValueError, match=says(*expected)):
        GradMemConfig(**options)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("num_memory_tokens", "8", "int"),
        ("num_memory_tokens", 8.0, "int"),
        ("write_steps", None, "int"),
        ("write_learning_rate", "fast", "float"),
        ("memory_projection", "yes", "bool"),
        ("write_lora", ["q_proj"], "dict"),
        ("write_optimizer", "rmsprop", "sgd"),
    ],
)
def test_option_of_another_type(option, value, expected):
    with pytest.raises(StrictDataclassFieldValidationError, match=says(option, "expected", expected, str(value))):
        GradMemConfig(**{option: value})


def test_training_what_gets_no_gradient():
    model = with_memory(nameless_base(), **PLAIN, meta_gradient="none")
    with pytest.raises(ValueError, match=says('meta_gradient="none"', "nothing trains here", '"exact"')):
        model(context_input_ids=CONTEXT, input_ids=QUERY, labels=QUERY)


# ------------------------------------------------------------------------------------------------ bases


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


def test_peft_model_as_a_base():
    base = peft.get_peft_model(nameless_base(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=says("transformers.PreTrainedModel", "got PeftModel", "merge_and_unload()")):
        get_gradmem_model(base)


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


def test_lora_that_finds_nothing_in_the_base():
    with pytest.raises(ValueError, match=says("write_lora=", "no_such", "does not fit LlamaForCausalLM")):
        get_gradmem_model(nameless_base(), GradMemConfig(write_lora={"r": 2, "target_modules": ["no_such"]}))


# ------------------------------------------------------------------------------------------------ files


@pytest.fixture
def adapter(tmp_path):
    with_memory(named_base(tmp_path / "base"), **EVERY_OPTION).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


LOADERS = {
    "from_pretrained": GradMemForCausalLM.from_pretrained,
    "get_gradmem_model": lambda directory: get_gradmem_model(named_base(directory.parent / "base"), directory),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("keep", [0, 50, -1])
def test_truncated_adapter(adapter, load, keep):
    path = adapter / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=says(f"{path} is not a readable safetensors file", "copied whole")):
        load(adapter)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_foreign_weights_in_an_adapter(adapter, load):
    save_file({"theirs": torch.zeros(2)}, adapter / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says("not the adapter that its config.json describes", "unexpected theirs")):
        load(adapter)


@pytest.mark.parametrize(
    "key", ["memory_init", "read_end", "base_model.model.layers.1.self_attn.v_proj.lora_B.read.weight"]
)
def test_adapter_that_lacks_a_parameter(adapter, key):
    tensors = load_file(adapter / "model.safetensors")
    del tensors[key]
    save_file(tensors, adapter / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says(f"missing {key}", "unexpected none")):
        AutoModel.from_pretrained(adapter)


def test_adapter_of_another_shape_than_its_configuration(adapter):
    with pytest.raises(
        ValueError, match=says("does not fit its own configuration", "memory_init", "[3, 32]", "[4, 32]")
    ):
        GradMemForCausalLM.from_pretrained(adapter, num_memory_tokens=4)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_directory_without_weights(adapter, load):
    (adapter / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(adapter)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_directory_without_a_configuration(adapter, load):
    (adapter / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        load(adapter)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_directory_of_another_kind_of_model(adapter, load):
    with pytest.raises(ValueError, match=says("model of type 'llama', not 'gradmem'", "get_gradmem_model")):
        load(adapter.parent / "base")


def test_attaching_a_checkpoint_that_brings_its_own_base(tmp_path):
    with_memory(nameless_base(), **PLAIN).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says("includes its own base", "Load it with from_pretrained")):
        get_gradmem_model(nameless_base(), tmp_path)


def test_memory_of_a_file_that_is_a_model(adapter):
    with pytest.raises(ValueError, match=says("is not a memory", "'format': 'pt'")):
        GradMemMemory.from_pretrained(adapter / "model.safetensors")
