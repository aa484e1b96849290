"""`python -m benchmarks.publish`: a run's adapter, or the mean of several, as it is published."""

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.publish import publish
from hf_gradmem import get_gradmem_model
from tests.support.small_models import named_base, with_memory

LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def runs(tmp_path):
    """Two runs of one WRITE, whose readers differ."""
    for number, name in enumerate(("one", "two"), start=1):
        model = with_memory(named_base(tmp_path / "base"), num_memory_tokens=2, read_lora=LORA)
        with torch.no_grad():
            model.base_model.get_parameter("model.layers.0.self_attn.q_proj.lora_A.read.weight").fill_(number)
        model.save_pretrained(tmp_path / name)
    return [tmp_path / "one", tmp_path / "two"]


def test_mean_of_runs_reads_the_memories_of_each(runs, tmp_path):
    publish(runs, str(tmp_path / "base"), tmp_path / "mean")
    one, mean = (get_gradmem_model(named_base(tmp_path / "base"), tmp_path / name) for name in ("one", "mean"))
    weight = mean.base_model.get_parameter("model.layers.0.self_attn.q_proj.lora_A.read.weight")
    assert (weight == 1.5).all()
    mean.check_memory(one.write(input_ids=torch.arange(4, 10)[None]))


def test_runs_that_write_differently_have_no_mean(runs, tmp_path):
    other = with_memory(named_base(tmp_path / "base"), num_memory_tokens=2, read_lora=LORA)
    with torch.no_grad():
        other.memory_init.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="differ in memory_init"):
        publish([*runs, tmp_path / "other"], str(tmp_path / "base"), tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
    publish(runs, str(tmp_path / "base"), tmp_path / "mean", write_of=tmp_path / "other")
    mean = get_gradmem_model(named_base(tmp_path / "base"), tmp_path / "mean")
    assert torch.equal(mean.memory_init, other.memory_init)
    assert (mean.base_model.get_parameter("model.layers.0.self_attn.q_proj.lora_A.read.weight") == 1.5).all()


def test_a_lora_of_writes_own_is_halved_if_asked(tmp_path):
    model = with_memory(named_base(tmp_path / "base"), num_memory_tokens=2, write_lora=LORA)
    model.save_pretrained(tmp_path / "run")
    name = "base_model.model.layers.0.self_attn.q_proj.lora_A.write.weight"
    for half, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        publish([tmp_path / "run"], str(tmp_path / "base"), tmp_path / "published", write_in_half=half)
        assert load_file(tmp_path / "published" / "model.safetensors")[name].dtype == dtype
    published = get_gradmem_model(named_base(tmp_path / "base"), tmp_path / "published")
    assert published.write(input_ids=torch.arange(4, 10)[None]).write_losses.isfinite().all()
