"""What wrote a memory: told by content, alike wherever it lies, and every other writer refused."""

import dataclasses
import shutil

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from hf_gradmem import GradMemConfig, GradMemForCausalLM, GradMemMemory, get_gradmem_model
from hf_gradmem.base.weights import Cached, hash_tensors, hash_weights
from hf_gradmem.memory.fingerprint import shown_name
from tests.support.small_models import EVERY_OPTION, PLAIN, named_base, with_memory
from tests.support.tiny_models import tiny_causal_lm, tiny_tokens

CONTEXT, QUERY = tiny_tokens(1, 6), tiny_tokens(1, 3, seed=2)
READS_ALONE = ("read_start", "read_end", ".read.weight")  # parts of the names of READ's own parameters
NOT_IDENTITY = (*READS_ALONE, "write_log_learning_rate")


@pytest.fixture
def model(tmp_path) -> GradMemForCausalLM:
    return with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)


# ------------------------------------------------------------------------------------------------ what belongs to it


def parameter_names() -> list[str]:
    model = with_memory(tiny_causal_lm("llama", torch.float32), **EVERY_OPTION)
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("through_data", [False, True], ids=["in place", "through .data"])
@pytest.mark.parametrize("name", parameter_names())
def test_each_part_of_the_writer_and_nothing_else_is_its_identity(model, name, through_data):
    parameter = model.get_parameter(name)
    memory = model.write(input_ids=CONTEXT)
    with torch.no_grad():
        (parameter.data if through_data else parameter).mul_(1.5)
    assert (model.fingerprint() == memory.fingerprint) == name.endswith(NOT_IDENTITY)
    if name.endswith(NOT_IDENTITY):
        model(input_ids=QUERY, memory=memory)
    else:
        with pytest.raises(ValueError, match=r"another base|another start"):
            model(input_ids=QUERY, memory=memory)


def test_a_peft_adapter_around_the_model_is_part_of_its_identity_while_it_is_on(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    plain = model.write(input_ids=CONTEXT)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    memory = wrapped.write(input_ids=CONTEXT)
    wrapped.check_memory(memory)
    for other, read in ((plain, wrapped), (memory, with_memory(named_base(tmp_path / "base"), **PLAIN))):
        with pytest.raises(ValueError, match="the same base, but another start"):
            read.check_memory(other)
    with wrapped.disable_adapter():
        wrapped.check_memory(plain)
    with torch.no_grad():
        model.base_model.model.layers[1].self_attn.q_proj.lora_B.default.weight[0, 0] += 1e-3
    assert wrapped.fingerprint() != memory.fingerprint


@pytest.mark.parametrize("name", ["memory_init", "memory_projection.weight", "write_head.weight", "lora_A.write"])
def test_one_element_of_what_write_uses_beside_the_base_changes_the_identity(model, name):
    (parameter,) = (parameter for key, parameter in model.named_parameters() if name in key and "layers.1" not in key)
    before = model.fingerprint()
    for index in (0, parameter.numel() // 2, parameter.numel() - 1):
        value = parameter.data.view(-1)[index].clone()
        parameter.data.view(-1)[index] += 1e-4
        assert model.fingerprint() != before
        parameter.data.view(-1)[index] = value
        assert model.fingerprint() == before


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"write_steps": 5, "write_learning_rate": 2.0}, True),
        ({"write_optimizer": "adam"}, True),
        ({"learn_write_learning_rate": "none"}, True),
        ({"read_lora": None}, True),
        ({"read_lora": {"r": 4, "target_modules": ["q_proj"]}}, True),
        ({"write_lora": {"r": 2, "lora_alpha": 32, "target_modules": ["q_proj"]}}, False),
        ({"write_lora": None}, False),
    ],
    ids=str,
)
def test_settings_belong_to_it_where_they_say_what_writes_and_not_how_far(model, options, same):
    # Of the same weights as the base in the directory.
    other = get_gradmem_model(tiny_causal_lm("llama", torch.float32), GradMemConfig(**EVERY_OPTION | options))
    writer = {name: value for name, value in model.state_dict().items() if not name.endswith(NOT_IDENTITY)}
    other.load_state_dict(writer, strict=False)
    assert (other.fingerprint() == model.fingerprint()) == same


def test_forms_of_memory_are_told_apart(tmp_path):
    start = torch.ones(3, 32)
    prints = set()
    for form in ("input_vectors", "key_values", {"name": "key_values", "write": "values"}):
        model = get_gradmem_model(named_base(tmp_path / "base"), GradMemConfig(num_memory_tokens=3, memory_form=form))
        model.memory_init.data.copy_(start)
        prints.add(model.fingerprint())
    assert len(prints) == 3
    named = GradMemConfig(num_memory_tokens=3, memory_form={"name": "key_values"})
    model = get_gradmem_model(named_base(tmp_path / "base"), named)
    model.memory_init.data.copy_(start)
    assert model.fingerprint() in prints


def test_weights_that_lie_on_a_disk_count_as_those_at_hand(tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}

    def offloaded(name):
        folder = tmp_path / f"{name}-offloaded"
        base = AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map=places, offload_folder=str(folder))
        assert base.get_parameter("model.layers.1.mlp.up_proj.weight").is_meta
        return get_gradmem_model(base, tmp_path / "adapter")

    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    model.save_pretrained(tmp_path / "adapter")
    other = named_base(tmp_path / "base")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(3.0)
    other.save_pretrained(tmp_path / "other")
    memory = offloaded("base").write(input_ids=CONTEXT)
    model.check_memory(memory)
    with pytest.raises(ValueError, match="another base"):
        offloaded("other").check_memory(memory)


# ------------------------------------------------------------------------------------------------ who reads what


def test_memory_of_another_base_is_refused_with_both_identities(tmp_path):
    one = with_memory(named_base(tmp_path / "one"), **PLAIN)
    two = with_memory(named_base(tmp_path / "two", seed=1), **PLAIN)
    memory = one.write(input_ids=CONTEXT)
    both = rf"written by {one.fingerprint()} \(on one\), but this model is {two.fingerprint()} \(on two\): another base"
    for use in (two, two.generate, two.reconstruct, lambda memory, **_: two.export_prompt_tuning(memory, tmp_path)):
        arguments = {} if use == two.reconstruct else {"input_ids": QUERY}
        with pytest.raises(ValueError, match=both):
            use(memory=memory, **arguments)
    with pytest.raises(ValueError, match=both):
        two.write(input_ids=CONTEXT, memory=memory)


def test_base_that_was_trained_or_replaced_at_the_same_path_is_refused(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), **PLAIN)
    memory = model.write(input_ids=CONTEXT)
    tiny_causal_lm("llama", torch.float32, 3).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="another base"):
        with_memory(named_base(tmp_path / "base"), **PLAIN)(input_ids=QUERY, memory=memory)
    model.base_model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(context_input_ids=CONTEXT, input_ids=QUERY, labels=QUERY).loss.backward()
    optimizer.step()
    with pytest.raises(ValueError, match="another base, or the same after its weights changed"):
        model(input_ids=QUERY, memory=memory)


@pytest.mark.parametrize("place", ["link", "copy"])
def test_memory_is_read_wherever_the_base_lies(tmp_path, place):
    writer = with_memory(named_base(tmp_path / "base"), **EVERY_OPTION)
    memory = writer.write(input_ids=CONTEXT)
    if place == "link":
        (tmp_path / "link").symlink_to(tmp_path / "base", target_is_directory=True)
    else:
        shutil.copytree(tmp_path / "base", tmp_path / "copy")
    reader = with_memory(AutoModelForCausalLM.from_pretrained(tmp_path / place), **EVERY_OPTION)
    assert reader.identity().base_name == place
    assert torch.equal(reader(input_ids=QUERY, memory=memory).logits, writer(input_ids=QUERY, memory=memory).logits)


def test_reader_with_a_lora_and_vectors_of_its_own_reads_its_writers_memories(model):
    writer = {name: value for name, value in model.state_dict().items() if not name.endswith(READS_ALONE)}
    config = GradMemConfig(**EVERY_OPTION | {"read_lora": {"r": 4, "target_modules": ["o_proj", "up_proj"]}})
    reader = get_gradmem_model(tiny_causal_lm("llama", torch.float32), config)
    plain = get_gradmem_model(
        tiny_causal_lm("llama", torch.float32), GradMemConfig(**EVERY_OPTION | {"read_lora": None})
    )
    for other in (reader, plain):
        # READ's LoRA stands around some of the base's layers, which are then called otherwise.
        own = other.state_dict()
        names = {name.replace(".base_layer.", "."): name for name in own}
        plain_names = {name.replace(".base_layer.", "."): value for name, value in writer.items()}
        other.load_state_dict({names[name]: value for name, value in plain_names.items()}, strict=False)
        other(input_ids=QUERY, memory=model.write(input_ids=CONTEXT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_base_has_one_identity_in_every_precision_that_keeps_its_bfloat16_weights(tmp_path, dtype):
    writer = with_memory(named_base(tmp_path / "base"), **PLAIN)
    loaded = named_base(tmp_path / "base", dtype=dtype)
    reader = get_gradmem_model(loaded, GradMemConfig(**PLAIN))
    reader.memory_init.data.copy_(writer.memory_init)
    reader(input_ids=QUERY, memory=writer.write(input_ids=CONTEXT))


def test_memory_is_read_on_the_word_of_who_relabels_it(tmp_path):
    one = with_memory(named_base(tmp_path / "one"), **PLAIN)
    two = with_memory(named_base(tmp_path / "two", seed=1), **PLAIN)
    memory = one.write(input_ids=CONTEXT)
    relabelled = memory.relabelled(two.fingerprint())
    two(input_ids=QUERY, memory=relabelled)
    assert torch.equal(relabelled.embeddings, memory.embeddings)
    with pytest.raises(ValueError, match="another base"):
        one(input_ids=QUERY, memory=relabelled)


def test_memory_of_the_first_version_is_refused_as_such_and_read_once_relabelled(model):
    memory = model.write(input_ids=CONTEXT)
    old = dataclasses.replace(memory, fingerprint="/home/me/base@main/32/0123456789ab", base_name=None)
    with pytest.raises(ValueError, match=r"saved by an earlier version.*relabelled\(model.fingerprint\(\)\)"):
        model(input_ids=QUERY, memory=old)
    model(input_ids=QUERY, memory=old.relabelled(model.fingerprint()))


def test_memory_of_another_size_is_refused_with_both_sizes(tmp_path):
    base = named_base(tmp_path / "base")
    memory = get_gradmem_model(base, GradMemConfig(num_memory_tokens=5)).write(input_ids=CONTEXT)
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=3))
    with pytest.raises(ValueError, match="memory has 5 vectors of width 32, but this model reads 3 of width 32"):
        model(input_ids=QUERY, memory=memory)


# ------------------------------------------------------------------------------------------------ names


def test_no_memory_names_a_local_path(model, tmp_path):
    memory = model.write(input_ids=CONTEXT)
    memory.save_pretrained(tmp_path / "memory")
    assert str(tmp_path).encode() not in (tmp_path / "memory" / "memory.safetensors").read_bytes()
    loaded = GradMemMemory.from_pretrained(tmp_path / "memory")
    assert (loaded.fingerprint, loaded.base_name) == (model.fingerprint(), "base")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("me/base", "me/base"),
        ("gpt2", "gpt2"),
        ("/home/me/models/base/", "base"),
        ("../models/base", "base"),
        ("C:\\Users\\me\\base", "base"),
        (None, None),
    ],
)
def test_name_of_a_directory_is_its_last_part(name, shown):
    assert shown_name(name) == shown


# ------------------------------------------------------------------------------------------------ hashes


@pytest.mark.parametrize("size", [1, 4096, 4097, 3_000_000])
def test_hash_of_weights_changes_with_any_one_element_and_with_an_exchange_of_two(size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0))
    before = hash_weights({"weight": weight})
    for index in (0, size // 3, size - 1):
        edited = weight.clone()
        edited[index] *= 1.01
        assert hash_weights({"weight": edited}) != before
    if size > 1:
        edited = weight.clone()
        edited[[0, 1]] = weight[[1, 0]]
        assert hash_weights({"weight": edited}) != before


def test_hash_of_weights_is_that_of_their_values_names_and_shapes():
    weight = torch.randn(6, 4).bfloat16()
    same = {"as float32": weight.float(), "as float64": weight.double(), "strided": weight.t().contiguous().t()}
    assert {hash_weights({"weight": tensor}) for tensor in same.values()} == {hash_weights({"weight": weight})}
    for other in ({"bias": weight}, {"weight": weight.reshape(4, 6)}, {"weight": weight, "bias": weight[0]}):
        assert hash_weights(other) != hash_weights({"weight": weight})
    packed = torch.arange(256, dtype=torch.uint8)
    assert hash_weights({"weight": packed}) != hash_weights({"weight": packed.roll(1)})


def test_hash_is_computed_again_only_when_something_changed():
    computed = []
    layer, cached = nn.Linear(300, 300), Cached(lambda tensors: computed.append(1) or hash_tensors(tensors))
    tensors = dict(layer.named_parameters())
    first = cached(tensors)
    assert cached(tensors) == first
    assert len(computed) == 1
    with torch.inference_mode():
        assert cached(tensors) == first
    with torch.no_grad():
        layer.weight[5, 5] += 1
    assert cached(tensors) != first
    assert len(computed) == 2
