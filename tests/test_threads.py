"""One model in several threads: each gets what it would get alone, whatever the others do. 500 answers in all."""

import copy
import pickle
import threading

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_gradmem import GradMemForCausalLM
from tests.support.threads import Job, switching_often, wrong_answers
from tests.support.tiny_models import tiny_tokens
from tests.support.writing import build

LORA = {
    "write_lora": {"r": 2, "target_modules": ["q_proj", "up_proj"]},
    "read_lora": {"r": 2, "target_modules": ["v_proj", "up_proj"]},
}


def moved(model: GradMemForCausalLM) -> GradMemForCausalLM:
    """Its LoRA, which starts at nothing, at something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


def dropping(model: GradMemForCausalLM) -> GradMemForCausalLM:
    """In train mode, with a dropout that drops everything: what drops is as little by chance as what does not."""
    dropouts = [module for module in model.base_model.modules() if isinstance(module, nn.Dropout)]
    dropouts[-1].p = 1.0
    model.base_model.requires_grad_(True)
    return model.train()


def jobs_of(model: GradMemForCausalLM, writer: GradMemForCausalLM | None = None) -> dict[str, Job]:
    """What threads do with a model: each a function of nothing that gives tensors.

    Args:
        model: run when one of them is called, and not before.
        writer: writes the memory that they read; the model itself by default.
    """
    context, query = tiny_tokens(2, 9), tiny_tokens(2, 5, seed=1)
    memory = (writer or model).write(input_ids=context)

    def read() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(input_ids=query, memory=memory).logits]

    def train() -> list[torch.Tensor]:
        output = model(context_input_ids=context, input_ids=query, labels=query)
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(output.loss, weights, allow_unused=True)
        return [output.loss.detach(), *(gradient for gradient in gradients if gradient is not None)]

    return {
        "write": lambda: [model.write(input_ids=context).embeddings],
        "generate": lambda: [model.generate(query, memory=memory, max_new_tokens=4, do_sample=False)],
        "read": read,
        "train": train,
        "reconstruct": lambda: [model.reconstruct(memory)],
    }


def with_attention_of_its_own(model: GradMemForCausalLM) -> GradMemForCausalLM:
    """Exact steps cannot take it, and put "eager" in its place."""
    transformers.AttentionInterface.register("of_its_own", sdpa_attention_forward)
    transformers.AttentionMaskInterface.register("of_its_own", transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation("of_its_own")
    return model


CASES = {
    "lora": lambda: moved(build(**LORA)),
    "ids": lambda: build("gemma4_text"),
    "dropout": lambda: dropping(build("gpt2")),
    "finite differences": lambda: dropping(build("gpt2", meta_gradient="finite_difference")),
    "attention": lambda: with_attention_of_its_own(build()),
    "keys and values": lambda: moved(build(**LORA, memory_form="key_values")),
}


@pytest.mark.parametrize("case", CASES)
def test_each_thread_gets_what_it_would_get_alone(case):
    model = CASES[case]()
    jobs = jobs_of(model)
    expected = [job() for job in jobs.values()]
    attention = model.base_model.config._attn_implementation
    assert wrong_answers(list(jobs.values()), expected, times=13) == 0
    assert model.base_model.config._attn_implementation == attention


def test_a_new_model_may_be_first_used_by_several_threads():
    """What the base can do is found out then."""
    wrong = 0
    for round_ in range(20):
        model_type = ("llama", "gemma4_text")[round_ % 2]
        twin = build(model_type)
        jobs, known = jobs_of(build(model_type), writer=twin), jobs_of(twin)
        names = ["write", "generate", "read"]
        wrong += wrong_answers([jobs[name] for name in names], [known[name]() for name in names], times=1)
    assert wrong == 0


def test_writes_side_by_side_leave_what_trains_and_every_mode_as_they_were():
    model = dropping(moved(build("gpt2", write_lora={"r": 2, "target_modules": ["c_attn"]})))
    write = jobs_of(model)["write"]
    trained = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    assert wrong_answers([write, write], [write()] * 2, times=25) == 0
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("settings", "runs", "alike"),
    [
        ({}, 4, [1, 3]),
        ({"meta_gradient": "finite_difference", "meta_gradient_radius": 1e-4}, 4, [0, 2, 3]),
        ({"writer": "forward", "checkpoint_write_steps": True}, 3, [0, 2]),
    ],
    ids=["exact", "finite differences", "forward"],
)
def test_a_step_is_run_again_with_its_own_dropout_whatever_other_threads_draw(settings, runs, alike):
    """Of the runs of the base, READ's among them, those of the one step drop the same."""
    model = build("gpt2", write_steps=1, **settings)
    dropout = [module for module in model.base_model.modules() if isinstance(module, nn.Dropout)][-1]
    dropout.p = 0.5
    model.base_model.requires_grad_(True)
    model.train()
    train, trainer, dropped, done = jobs_of(model)["train"], threading.current_thread(), [], threading.Event()

    def record(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        if threading.current_thread() is trainer and module.training:
            dropped.append(output == 0)

    def draw() -> None:
        memory = model.write(input_ids=tiny_tokens(1, 5))
        while not done.is_set():
            model.generate(tiny_tokens(1, 4), memory=memory, max_new_tokens=4, do_sample=True)

    dropout.register_forward_hook(record)
    other = threading.Thread(target=draw)
    with switching_often():
        other.start()
        try:
            for _ in range(15):
                dropped.clear()
                train()
                assert len(dropped) == runs
                assert all(torch.equal(dropped[run], dropped[alike[0]]) for run in alike)
                assert not torch.equal(dropped[runs // 2], dropped[0]) or len(alike) == 3
        finally:
            done.set()
            other.join()


def test_a_model_with_a_lora_by_phase_can_be_copied_and_pickled():
    model = moved(build(**LORA))
    expected = jobs_of(model)["write"]()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(jobs_of(other)["write"](), expected, rtol=0, atol=0)
        assert other.state_dict().keys() == model.state_dict().keys()
