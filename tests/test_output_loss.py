"""Every fast path of WRITE beside the plain one: the output loss, frozen weights, rows and contexts by length."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn import functional

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.writing import objective as objective_module
from hf_gradmem.writing import output_loss
from hf_gradmem.writing.objective import ReconstructionObjective, weights_frozen
from hf_gradmem.writing.output_loss import OutputHead, head_cross_entropy

from .tiny_models import tiny_causal_lm, tiny_tokens

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["lm_head"]}
LENGTHS = torch.tensor([3, 9, 5, 8, 4])
MASK = (torch.arange(9) < LENGTHS[:, None]).long()


def build(model_type: str = "llama", dtype: torch.dtype = torch.float64, **settings) -> GradMemForCausalLM:
    torch.manual_seed(0)
    defaults = {"num_memory_tokens": 3, "write_steps": 2, "write_learning_rate": 0.3}
    return get_gradmem_model(tiny_causal_lm(model_type, dtype), GradMemConfig(**defaults | settings))


def objective_of(model: GradMemForCausalLM, segment_ids: torch.Tensor | None = None):
    return model._objective(model._rows(tiny_tokens(5, 9), MASK.bool(), segment_ids))


@pytest.fixture
def small_parts(monkeypatch):
    """A few positions at a time and groups of few rows, so that the pieces are many."""
    monkeypatch.setattr(output_loss, "_LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(output_loss, "_FEWEST_POSITIONS", 4)
    monkeypatch.setattr(objective_module, "_POSITIONS_AT_ONCE", 20)
    monkeypatch.setattr(objective_module, "_PADDING_WORTH_A_RUN", 2)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("with_bias", [False, True])
def test_loss_through_the_head_equals_plain_cross_entropy(with_bias):
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((11, 6), (17, 6), (17,)))
    targets, weights = torch.randint(17, (11,)), torch.randn(11, dtype=torch.float64)
    bias = bias if with_bias else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    expected = functional.cross_entropy(functional.linear(hidden, weight, bias), targets, reduction="none")
    losses = head_cross_entropy(hidden, OutputHead(weight, bias), targets)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=1e-13)
    pairs = zip(
        torch.autograd.grad((losses * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    )
    for actual, plain in pairs:
        torch.testing.assert_close(actual, plain, rtol=1e-12, atol=1e-13)


def test_a_second_derivative_is_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = head_cross_entropy(hidden, OutputHead(weight), torch.tensor([0, 1, 2])).sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, hidden, create_graph=True)


# What each base's head is: the product alone (with a bias in phi), or capped or scaled behind it.
HEADS = {"llama": True, "gpt2": True, "phi": True, "mamba": True, "gemma2": False, "granite": False, "cohere": False}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("model_type", HEADS)
def test_the_first_order_path_equals_the_plain_one(model_type):
    model = build(model_type)
    objective = objective_of(model, torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]).expand(5, -1))
    assert (objective.output_head is not None) == HEADS[model_type]
    assert len(objective._groups) > 1
    assert_paths_agree(model, objective)


def assert_paths_agree(model, objective):
    memory = (model.memory_init + torch.randn(5, 1, 1, dtype=torch.float64)).detach().requires_grad_()
    weights = [p for p in model.parameters() if p.requires_grad and p is not model.memory_init]
    plain = objective(memory)
    expected = torch.autograd.grad(plain.sum(), [memory, *weights], allow_unused=True)
    once = objective.first_order(memory)
    # Some bases cast their logits to float32 whatever they compute in, mamba among them.
    torch.testing.assert_close(once, plain.to(once), rtol=1e-6, atol=1e-7)
    for actual, wanted in zip(
        torch.autograd.grad(once.sum(), [memory, *weights], allow_unused=True), expected, strict=True
    ):
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)
    losses, gradient = objective.value_and_gradient(memory)
    torch.testing.assert_close(losses, plain.detach().to(losses), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected[0], rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    "settings",
    [{"write_head": True, "memory_projection": True, "num_control_tokens": 1}, {"write_lora": LORA}],
    ids=["head of its own", "LoRA on the head"],
)
def test_the_first_order_path_equals_the_plain_one_with(settings):
    model = build(**settings)
    model.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "write_head" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    objective = objective_of(model)
    assert (objective.output_head is None) == ("write_lora" in settings)
    assert_paths_agree(model, objective)


def saved_tensors(model: GradMemForCausalLM) -> list[torch.Tensor]:
    """What a step keeps for its backward pass, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        objective_of(model).value_and_gradient(model.memory_init.expand(5, -1, -1))
    return [tensor for tensor in kept if tensor.untyped_storage().data_ptr() not in weights]


def test_a_step_keeps_no_logits_and_nothing_for_a_weight_s_sake():
    frozen, trained = build(write_head=True), build(write_head=True)
    trained.requires_grad_(True)
    shapes = [tensor.shape for tensor in saved_tensors(frozen)]
    assert [tensor.shape for tensor in saved_tensors(trained)] == shapes
    assert not any(frozen.decoder.vocab_size in shape for shape in shapes)
    assert all(parameter.requires_grad for parameter in trained.parameters())


def test_frozen_weights_train_again_after_an_error():
    model = build()
    model.base_model.requires_grad_(True)
    model.memory_init.requires_grad_(False)

    def fail():
        with weights_frozen(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(parameter.requires_grad for parameter in model.base_model.parameters())
    assert not model.memory_init.requires_grad


@pytest.mark.parametrize("settings", [{}, {"write_segment_length": 4}], ids=["whole", "segments"])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_contexts_of_any_length_come_back_in_their_order(batch_size, settings, monkeypatch):
    model, ids = build(**settings), tiny_tokens(5, 9)
    apart = [model.write(input_ids=ids[row : row + 1, : LENGTHS[row]]) for row in range(5)]
    if batch_size is None:
        monkeypatch.setattr(objective_module, "_PADDING_WORTH_A_RUN", 2)
    together = model.write(input_ids=ids, attention_mask=MASK, batch_size=batch_size)
    assert together.num_context_tokens.tolist() == LENGTHS.tolist()
    for row, alone in enumerate(apart):
        torch.testing.assert_close(together.embeddings[row], alone.embeddings[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(together.write_losses[row], alone.write_losses[0], rtol=1e-6, atol=1e-8)
    further = model.write(input_ids=ids, attention_mask=MASK, batch_size=batch_size, memory=together)
    first = model.write(input_ids=ids[:1, :3], memory=together[0])
    torch.testing.assert_close(further.embeddings[0], first.embeddings[0], rtol=1e-6, atol=1e-8)


def test_like_lengths_share_a_run():
    """Rows are cut into groups where it spares padding, and every row is in one of them."""
    model = build()
    rows = model._rows(tiny_tokens(5, 9), MASK.bool(), None)
    assert rows.grouped_by_length() == [rows]
    groups = rows.take(torch.arange(5)), *(rows.take(torch.tensor([row])) for row in range(5))
    assert [part.input_ids.shape[1] for part in groups] == [9, *LENGTHS.tolist()]


def test_a_context_that_diverges_is_named_by_its_place():
    model = build(write_learning_rate=1e300, write_steps=3)
    with pytest.raises(FloatingPointError, match="context 0"):
        model.write(input_ids=tiny_tokens(5, 9), attention_mask=MASK)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_out_of_memory_says_what_to_lower(error, monkeypatch):
    model = build()
    assert model.decoder.output_head is not None

    def fail(*arguments):
        raise error

    monkeypatch.setattr(model.decoder, "hidden_states", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"batch_size \(now 2 contexts\).*memory"):
        model.write(input_ids=tiny_tokens(5, 9), batch_size=2)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("meta_gradient", ["exact", "finite_difference"])
def test_out_of_memory_in_training_says_what_to_lower(meta_gradient, in_backward, monkeypatch):
    model = build(meta_gradient=meta_gradient)
    ids, runs = tiny_tokens(2, 9), 0
    plain = ReconstructionObjective._prefixes

    def fail_at_last(*arguments):
        nonlocal runs
        runs += 1
        if not in_backward or runs > model.config.write_steps:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*arguments)

    monkeypatch.setattr(ReconstructionObjective, "_prefixes", fail_at_last)
    with pytest.raises(torch.OutOfMemoryError, match=r"per_device_train_batch_size.*finite_difference"):
        model(context_input_ids=ids, input_ids=ids, labels=ids).loss.backward()


def test_out_of_memory_in_evaluation_says_nothing_of_training(monkeypatch):
    model = build()

    def fail(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ReconstructionObjective, "_prefixes", fail)
    ids = tiny_tokens(2, 9)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError, match="per_device_eval_batch_size"):
        model(context_input_ids=ids, input_ids=ids)


def test_half_precision_base_with_memory_and_step_in_float32():
    ids = tiny_tokens(5, 9)
    model = build(dtype=torch.bfloat16, write_steps=1, write_learning_rate=1e-4)
    memory = model.write(input_ids=ids, attention_mask=MASK).embeddings
    assert memory.dtype == torch.float32
    moved = memory - model.memory_init
    assert moved.any(dim=2).all()  # a step this small would vanish in bfloat16's eight bits
    exact = build(dtype=torch.float32, write_steps=1, write_learning_rate=1e-4)
    exact.load_state_dict(model.state_dict())
    expected = exact.write(input_ids=ids, attention_mask=MASK).embeddings - exact.memory_init
    assert functional.cosine_similarity(moved.flatten(1), expected.flatten(1)).min() > 0.99


@pytest.mark.slow
def test_a_compiled_decoder_writes_any_length_with_one_graph():
    model = build(dtype=torch.float32)
    contexts = [tiny_tokens(2, length) for length in (9, 5, 7)]
    expected = [model.write(input_ids=ids).embeddings for ids in contexts]
    torch._dynamo.reset()
    counters.clear()
    model.get_decoder().compile(dynamic=True, backend="aot_eager")
    for ids, wanted in zip(contexts, expected, strict=True):
        torch.testing.assert_close(model.write(input_ids=ids).embeddings, wanted)
    assert counters["stats"]["unique_graphs"] == 1
