"""What every architecture must do, checked on a tiny random model of each in float64.

`python -m tests.support.architectures` checks them all and writes `benchmarks/results/architectures.md`.
"""

import sys
import warnings
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from hf_gradmem import GradMemForCausalLM
from tests.support.tiny_models import CAUSAL_LM_MODEL_TYPES, UNBUILDABLE, Float64Everywhere, tiny_causal_lm, tiny_tokens
from tests.support.writing import MEMORY_TOKENS, build

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "architectures.md"
LONGEST_ROW_TRIED = 16


def check_write(model: GradMemForCausalLM) -> None:
    """Writing moves the memory and leaves the base as it was."""
    before = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    memory = model.write(input_ids=tiny_tokens(2, 9))
    moved = (memory.embeddings - model.memory_init).abs().amax(dim=(1, 2))
    assert (moved > 1e-6).all(), f"the memory moved by {moved.tolist()} only"
    for name, tensor in model.base_model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"writing changed {name}"
    assert all(parameter.grad is None for parameter in model.parameters()), "writing left a gradient"


def check_meta_gradient(model: GradMemForCausalLM) -> None:
    """The gradient through the write is the slope of the loss, along a random direction of the memory's start."""
    context, query = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 5, seed=2)
    start = model.memory_init.detach().clone()
    direction = torch.randn_like(start)
    direction /= direction.norm()

    def loss(offset: float) -> torch.Tensor:
        with torch.no_grad():
            model.memory_init.copy_(start + offset * direction)
        return model(context_input_ids=context, input_ids=query, labels=query).loss

    loss(0.0).backward()
    slope = (model.memory_init.grad * direction).sum().item()
    model.zero_grad()
    measured = []
    for epsilon in (1e-5, 1e-6, 1e-4):  # the first is enough for all but a few, which need another
        with torch.no_grad():
            measured.append((loss(epsilon).item() - loss(-epsilon).item()) / (2 * epsilon))
        error = abs(slope - measured[-1]) / max(abs(slope), abs(measured[-1]), 1e-3)
        if error < 1e-4:
            break
    loss(0.0)
    assert error < 1e-4, f"the meta-gradient is {slope:.8g}, finite differences say {measured}"


def check_checkpointing(model_type: str) -> GradMemForCausalLM:
    """Recomputing the steps in the backward pass gives the gradient of the unrolled graph."""
    try:
        return recomputed_equals_unrolled(model_type, torch.float64)
    except RuntimeError:  # some do not run in float64 by themselves
        return recomputed_equals_unrolled(model_type, torch.float32)


def recomputed_equals_unrolled(model_type: str, dtype: torch.dtype) -> GradMemForCausalLM:
    context, query = tiny_tokens(2, 9, seed=1), tiny_tokens(2, 5, seed=2)
    gradients = []
    for checkpointed in (False, True):
        model = build(model_type, dtype, checkpoint_write_steps=checkpointed)
        model(context_input_ids=context, input_ids=query, labels=query).loss.backward()
        gradients.append(model.memory_init.grad)
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < 1e-4, f"checkpointed and unrolled gradients differ by {difference:.2g}"
    return model


def routes(model: GradMemForCausalLM) -> str:
    """How the base is run, where that is not the plain way."""
    decoder, found = model.decoder, []
    if not decoder.embeddings_suffice:
        found.append("run on ids with the embeddings replaced")
    if not decoder.generates_from_embeddings:
        found.append("generates from `forward`")
    if not decoder.keeps_segments_apart(MEMORY_TOKENS, LONGEST_ROW_TRIED):
        found.append("a row for each segment")
    return "".join(f"{mark} {route}" for mark, route in zip(";,,", found, strict=False))


def check_segments(model: GradMemForCausalLM) -> None:
    """Segments side by side in one row are written as in rows of their own, or not put there."""
    ids, segment_ids = tiny_tokens(2, 9), torch.tensor([[0] * 3 + [1] * 2 + [2] * 4, [0] * 5 + [1] * 4])
    model.config.write_prefix_segments = 0
    packed = model.write(input_ids=ids, segment_ids=segment_ids).embeddings
    apart, model.decoder.keeps_segments_apart = model.decoder.keeps_segments_apart, lambda *lengths: False
    difference = (model.write(input_ids=ids, segment_ids=segment_ids).embeddings - packed).abs().max().item()
    model.decoder.keeps_segments_apart = apart
    model.config.write_prefix_segments = 1
    assert difference < 1e-6, f"segments in one row write a memory that differs by {difference:.2g}"


def check_padding(model: GradMemForCausalLM) -> None:
    """A context's memory is the same alone, in a batch, and with any padding."""
    long, short = tiny_tokens(1, 9, seed=3)[0], tiny_tokens(1, 6, seed=4)[0]
    alone = model.write(input_ids=short[None]).embeddings[0]

    def written(left: int, right: int) -> torch.Tensor:
        rows = torch.full((2, left + len(short) + right), 7)
        mask = torch.zeros_like(rows)
        rows[0, : len(long)], mask[0, : len(long)] = long, 1
        rows[1, left : left + len(short)], mask[1, left : left + len(short)] = short, 1
        return model.write(input_ids=rows, attention_mask=mask).embeddings[1]

    for left, right in ((0, 3), (3, 0), (2, 6)):
        difference = (written(left, right) - alone).abs().max().item()
        assert difference < 1e-7, f"{left} tokens of left and {right} of right padding change it by {difference:.2g}"


def check_generation(model: GradMemForCausalLM) -> None:
    """Generation starts with the prompt and goes on as `forward` says; left padding changes nothing."""
    memory = model.write(input_ids=tiny_tokens(2, 8, seed=5))
    prompt = tiny_tokens(2, 5, seed=6)
    mask = torch.ones_like(prompt)
    prompt[1, :2], mask[1, :2] = 0, 0
    settings = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}
    generated = model.generate(prompt, attention_mask=mask, memory=memory, **settings)
    assert torch.equal(generated[:, :5], prompt), "the output does not start with the prompt"
    with torch.no_grad():
        logits = model(input_ids=prompt, attention_mask=mask, memory=memory).logits
    banned = model.generation_config.eos_token_id  # min_new_tokens bars them
    if banned is not None:
        logits[..., banned] = -torch.inf
    first = logits[:, -1].argmax(-1)
    assert torch.equal(generated[:, 5], first), f"first tokens {generated[:, 5].tolist()}, forward {first.tolist()}"
    alone = model.generate(prompt[1:, 2:], memory=memory[1], **settings)
    assert torch.equal(alone[0, 3:], generated[1, 5:]), "left padding of a row changes its continuation"


def own_exception(model_type: str) -> str:
    """The exception that the base itself raises when it is run on `inputs_embeds` and differentiated."""
    base = tiny_causal_lm(model_type)
    try:
        embeds = base.get_input_embeddings()(tiny_tokens(2, 6)).detach().requires_grad_()
        base(inputs_embeds=embeds).logits.sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{model_type} runs on inputs_embeds")


def own_gradient_is_truncated(model_type: str) -> str:
    """The base's own gradient with respect to `inputs_embeds` is not the slope of its logits."""
    base = tiny_causal_lm(model_type)
    embeds = base.get_input_embeddings()(tiny_tokens(2, 6)).detach().requires_grad_()
    direction = torch.randn_like(embeds)
    base(inputs_embeds=embeds).logits.square().sum().backward()
    slope = (embeds.grad * direction).sum().item()
    with torch.no_grad():
        high, low = (base(inputs_embeds=embeds + e * direction).logits.square().sum().item() for e in (1e-5, -1e-5))
    measured = (high - low) / 2e-5
    assert abs(slope - measured) > 0.01 * abs(measured), f"{model_type} differentiates itself rightly"
    return f"its own gradient is {slope:.4g} where finite differences of its logits say {measured:.4g}"


def own_logits_depend_on_padding(model_type: str) -> str:
    """The base's own logits change when padding is appended behind a mask."""
    base = tiny_causal_lm(model_type)
    ids = tiny_tokens(1, 6)
    padded = torch.cat([ids, ids[:, :3]], dim=1)
    mask = (torch.arange(9) < 6).long()[None]
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        change = (base(input_ids=padded, attention_mask=mask).logits[:, :6] - logits).abs().max().item()
    assert change > 1e-3, f"{model_type} minds its padding"
    return f"its own logits change by {change:.2g} when masked padding follows"


# What cannot pass for a reason of the base's own, and how the base shows it by itself.
OWN_LIMITS = {
    "cpmant": own_exception,
    "hrm_text": own_gradient_is_truncated,
    "musicgen": own_exception,
    "musicgen_melody": own_exception,
    "prophetnet": own_logits_depend_on_padding,
    "reformer": own_exception,
}

CHECKS = (check_write, check_meta_gradient, check_segments, check_padding, check_generation)


def outcome(model_type: str) -> str:
    """`passed`, `not built` or `own limit` with the reason, or `FAILED` with what went wrong."""
    if model_type in UNBUILDABLE:
        return f"not built: {UNBUILDABLE[model_type]}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Float64Everywhere():
                if model_type in OWN_LIMITS:
                    return f"own limit: {OWN_LIMITS[model_type](model_type)}"
                # Recomputation in the backward pass would leave the Float64Everywhere block.
                model = build(model_type, checkpoint_write_steps=False)
                for check in CHECKS:
                    check(model)
            return "passed" + routes(check_checkpointing(model_type))
        except Exception as error:
            return f"FAILED: {type(error).__name__}: {error}"


def main() -> None:
    """Check every architecture, or those named, and write the table."""
    outcomes = {model_type: outcome(model_type) for model_type in tqdm(sys.argv[1:] or CAUSAL_LM_MODEL_TYPES)}
    passed = [model_type for model_type, result in outcomes.items() if result.startswith("passed")]
    rows = [f"| {model_type} | {' '.join(result.split())[:200]} |" for model_type, result in outcomes.items()]
    table = [
        "# Architectures",
        "",
        f"{len(passed)} of the {len(outcomes)} causal language models of Transformers {transformers.__version__} pass, "
        "each as a tiny random model in float64 with its default attention. "
        "Command: `python -m tests.support.architectures`.",
        "",
        "A model passes when writing moves the memory and leaves the base untouched; the meta-gradient equals a "
        "directional finite difference, and recomputed steps give the gradient of the unrolled graph; segments that "
        "share a row are written as in rows of their own; a memory does not depend on its batch or on right, left or "
        "longer padding; generation starts with the prompt, goes on with the argmax of `forward`'s logits, and does "
        "not depend on left padding. An own limit is one that the base "
        "shows by itself, on `inputs_embeds` and without this package, and that the test asserts. Where the base's own "
        "`generate` does not follow from embeddings, generation runs the forward pass anew for each token, uncached. "
        "Where a base does not keep segments in one row apart, each has a row of its own.",
        "",
        "| architecture | outcome |",
        "|---|---|",
        *rows,
    ]
    print("\n".join(row for row in rows if "| passed" not in row), len(passed), "passed of", len(outcomes))
    if len(outcomes) == len(CAUSAL_LM_MODEL_TYPES):
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
