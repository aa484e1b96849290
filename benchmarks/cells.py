"""One cell of the performance tables, measured in a process of its own.

    python -m benchmarks.cells '{"kind": "write", "measure": "time", "batch": 1, "tokens": 256}'

prints the result as JSON. `time`: every variant once in each round, one after the other, so that what else the machine
does reaches all of them; ratios are taken within a round. On a CPU it is the processor time of the one thread, which
other work on the machine hardly changes. `memory`: one variant, its peak above the loaded model.
"""

import argparse
import ctypes
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from benchmarks.gemm_floor import (
    FROZEN_READ,
    FROZEN_SECOND_ORDER_STEP,
    SECOND_ORDER_STEP,
    TRAINED_READ,
    WRITE_STEP,
    attention_products,
    weight_products,
)
from benchmarks.meta_gradient import FORWARD_MODE, forward_over_reverse
from benchmarks.reference_style import ReferenceSettings, ReferenceStyle
from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from hf_gradmem.base import fused_attention, short_attention
from hf_gradmem.base.fused_attention import FusedTwiceDifferentiable
from hf_gradmem.base.short_attention import ShortAttentionInFloat32
from hf_gradmem.training.memories import train_reading_alone
from hf_gradmem.writing.meta_gradients import finite_difference

Tensor = torch.Tensor
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEMORY_TOKENS = 8

# The shape of SmolLM2-135M with 8 of its 30 layers and room for 32k positions, and the paper's key-value model.
SHAPES = {
    "smollm2-8-layers": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "kv-4-layers": {
        "vocab_size": 128,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}

SHAPES["smollm2"] = SHAPES["smollm2-8-layers"] | {"num_hidden_layers": 30}

QUERY_TOKENS_TRAINED, READER_QUERY_TOKENS = 8, 24
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}

Run = Callable[[], Any]


def build_base(shape: str, attn_implementation: str = "sdpa", dtype: str = "float32") -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    base = AutoModelForCausalLM.from_config(
        config, attn_implementation=attn_implementation, dtype=getattr(torch, dtype)
    )
    return base.to(DEVICE).eval()


def tokens(batch: int, length: int, vocabulary: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator).to(DEVICE)


# ------------------------------------------------------------------------------------------------ what is measured


def write_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """One whole WRITE of `cell["batch"]` contexts of `length` tokens."""
    steps, batch = cell["steps"], cell["batch"]
    dtype = "bfloat16" if variant.endswith("bfloat16") else cell["dtype"]
    base = build_base(cell["shape"], "eager" if variant == "reference" else "sdpa", dtype)
    ids = tokens(batch, length, base.config.vocab_size)
    if variant == "reference":
        model = ReferenceStyle(base, ReferenceSettings(MEMORY_TOKENS, steps))
        return lambda: model.write(ids, torch.ones_like(ids))[0].detach()
    if variant.startswith("floor"):
        products = [weight_products(base, batch * (length + MEMORY_TOKENS), batch * length)]
        if variant == "floor with attention":
            products.append(attention_products(base, batch, length + MEMORY_TOKENS))
        return lambda: [run() for _ in range(steps) for run in products]
    writer = "forward" if variant == "forward-only" else "gradient"
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=MEMORY_TOKENS, write_steps=steps, writer=writer))
    if variant == "compiled":
        base.get_decoder().compile(dynamic=True)
    return lambda: model.write(input_ids=ids)


def train_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """Loss and backward pass of one training step: the whole base trains, as the paper's key-value models do, or LoRA.

    LoRA is one for WRITE and one for READ; a plain loop has one for both.
    """
    steps, batch, frozen = cell["steps"], cell["batch"], cell["trains"] == "lora"
    base = build_base(cell["shape"], "eager" if variant == "reference" else "sdpa", cell["dtype"])
    if variant.startswith("floor"):
        products = training_products(base, cell, length, last_step=variant.endswith("last step"))
        return lambda: [run() for run in products]
    context = tokens(batch, length, base.config.vocab_size)
    query = tokens(batch, QUERY_TOKENS_TRAINED, base.config.vocab_size, seed=1)
    batch_of = {"context_input_ids": context, "input_ids": query, "labels": query}
    if variant == "reference":
        model = ReferenceStyle(base, ReferenceSettings(MEMORY_TOKENS, steps, reconstruction_loss_weight=0.5))
        if frozen:
            inject_adapter_in_model(LoraConfig(**LORA), base)  # which freezes the rest of it
        masks = {"context_attention_mask": torch.ones_like(context), "attention_mask": torch.ones_like(query)}
        loss = lambda: model(**batch_of, **masks)[0]  # noqa: E731
    else:
        meta_gradient, *options = variant.replace(FORWARD_MODE, "finite_difference").split(", ")
        model = get_gradmem_model(
            base,
            GradMemConfig(
                num_memory_tokens=MEMORY_TOKENS,
                write_steps=steps,
                meta_gradient=meta_gradient,
                meta_gradient_steps=1 if "last step" in options else None,
                checkpoint_write_steps="unrolled" not in options,
                write_lora=LORA if frozen else None,
                read_lora=LORA if frozen else None,
            ),
        )
        if not frozen:
            model.requires_grad_(True)
        if "compiled" in options:
            model.compile()
        loss = lambda: model(**batch_of).loss  # noqa: E731
    model.train()
    step = _training_step(model, loss)
    if variant == FORWARD_MODE:
        return mock.patch.object(finite_difference, "differenced_gradient", forward_over_reverse)(step)
    return step


def training_products(base: PreTrainedModel, cell: dict[str, Any], length: int, last_step: bool) -> list[Run]:
    """The products with the base's weights of a training step, of second order in each step of WRITE or in the last."""
    batch, frozen = cell["batch"], cell["trains"] == "lora"
    second_order, read = (FROZEN_SECOND_ORDER_STEP, FROZEN_READ) if frozen else (SECOND_ORDER_STEP, TRAINED_READ)
    steps = [WRITE_STEP if last_step else second_order] * (cell["steps"] - 1) + [second_order]
    return [
        *(weight_products(base, batch * (length + MEMORY_TOKENS), batch * length, step) for step in steps),
        weight_products(base, batch * (QUERY_TOKENS_TRAINED + MEMORY_TOKENS), batch * QUERY_TOKENS_TRAINED, read),
    ]


def _training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
    def run() -> None:
        model.zero_grad()
        loss().backward()

    return run


def reader_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """A step of training LoRA to answer: from memories that were written before, or from the contexts themselves."""
    base = build_base(cell["shape"], dtype=cell["dtype"])
    context = tokens(cell["batch"], length, base.config.vocab_size)
    query = tokens(cell["batch"], READER_QUERY_TOKENS, base.config.vocab_size, seed=1)
    if variant == "full context":
        inject_adapter_in_model(LoraConfig(**LORA), base)
        prompt = torch.cat([context, query], dim=1)
        labels = prompt.masked_fill(torch.arange(prompt.shape[1], device=DEVICE) < length, -100)
        return _training_step(base.train(), lambda: base(input_ids=prompt, labels=labels, use_cache=False).loss)
    config = GradMemConfig(num_memory_tokens=MEMORY_TOKENS, memory_form=variant, read_lora=LORA)
    model = get_gradmem_model(base, config)
    memory = model.write(input_ids=context, write_steps=1)
    train_reading_alone(model)
    return _training_step(model.train(), lambda: model(input_ids=query, labels=query, memory=memory).loss)


def attention_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """Causal attention with its backward pass and the derivative of that, of one layer."""
    inputs, weight = _attention_inputs(cell, length)
    fused_attention._SHORTEST = 0

    def run() -> None:
        mode = FusedTwiceDifferentiable() if variant == "fused" else sdpa_kernel(SDPBackend.MATH)
        with mode:
            output = functional.scaled_dot_product_attention(*inputs, is_causal=True)
            gradients = torch.autograd.grad(output, inputs, weight, create_graph=True)
        torch.autograd.grad(gradients, inputs, [weight] * 3)

    return run


def short_attention_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """Causal attention with its backward pass, of one layer of a base in half precision."""
    inputs, weight = _attention_inputs(cell, length)
    short_attention.LONGEST = length

    def run() -> None:
        with ShortAttentionInFloat32() if variant == "float32 inside" else nullcontext():
            output = functional.scaled_dot_product_attention(*inputs, is_causal=True)
        torch.autograd.grad(output, inputs, weight)

    return run


def _attention_inputs(cell: dict[str, Any], length: int) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values of one layer, and a gradient of what comes out."""
    torch.manual_seed(0)
    settings, dtype = SHAPES[cell["shape"]], getattr(torch, cell["dtype"])
    heads = settings["num_attention_heads"]
    shape = cell["batch"], heads, length, settings["hidden_size"] // heads
    *inputs, weight = (torch.randn(shape, device=DEVICE, dtype=dtype) for _ in range(4))
    return [tensor.requires_grad_() for tensor in inputs], weight


def segments_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """A training step, or a WRITE, of contexts in segments of `cell["segment"]` tokens, with 4 queries on each."""
    batch, segment = cell["batch"], cell["segment"]
    base = build_base(cell["shape"], dtype=cell["dtype"])
    context = tokens(batch, length, base.config.vocab_size)
    query = tokens(4 * batch, QUERY_TOKENS_TRAINED, base.config.vocab_size, seed=1).view(batch, 4, -1)
    segments = {"segment_ids": (torch.arange(length, device=DEVICE) // segment).expand_as(context)}
    what, *options = variant.split(", ")
    model = get_gradmem_model(
        base,
        GradMemConfig(
            num_memory_tokens=MEMORY_TOKENS,
            write_steps=cell["steps"],
            write_prefix_segments=0,
            checkpoint_write_steps=False,
        ),
    )
    if "repeated" in options:
        model.decoder.keeps_segments_apart = lambda *lengths: False
    if what == "write":
        return lambda: model.write(input_ids=context, **segments)
    model.requires_grad_(True).train()
    inputs = {f"context_{name}": values for name, values in segments.items()}
    return _training_step(model, lambda: model(context_input_ids=context, input_ids=query, labels=query, **inputs).loss)


QUERY_TOKENS, NEW_TOKENS = 16, 16


def read_variant(cell: dict[str, Any], variant: str, length: int) -> Run:
    """What one context costs, or a batch of queries on it: 16 tokens and 16 new ones each, greedy and cached."""
    base = build_base(cell["shape"], dtype=cell["dtype"])
    model = get_gradmem_model(base, GradMemConfig(num_memory_tokens=MEMORY_TOKENS, write_steps=cell["steps"]))
    context = tokens(1, length, base.config.vocab_size)
    if variant == "write":
        return lambda: model.write(input_ids=context)
    if variant == "prefill":
        return lambda: _prefill(base, base.get_input_embeddings()(context))
    if variant == "products of WRITE":
        return write_variant(cell | {"batch": 1}, "floor with attention", length)
    queries = base.get_input_embeddings()(tokens(cell["batch"], QUERY_TOKENS, base.config.vocab_size, seed=1))
    prefix = model.memory_init.detach()[None].to(base.dtype)
    if variant == "query, memory in the prompt":
        inputs = torch.cat([prefix.expand(len(queries), -1, -1), queries], dim=1)
        return lambda: _answer(base, inputs, DynamicCache(config=base.config))
    start = prefix if variant == "query, memory cached" else base.get_input_embeddings()(context)
    cache = _prefill(base, start)
    cache.batch_repeat_interleave(len(queries))
    if variant == "copy of the KV cache":
        return lambda: [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    return lambda: _answer(base, queries, cache)


@torch.no_grad()
def _prefill(base: PreTrainedModel, embeds: Tensor) -> DynamicCache:
    cache = DynamicCache(config=base.config)
    base.get_decoder()(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def _answer(base: PreTrainedModel, embeds: Tensor, cache: DynamicCache) -> Tensor:
    """Greedy decoding on a cache that is cut back to where it was."""
    before, answer = cache.get_seq_length(), []
    for _ in range(NEW_TOKENS):
        output = base(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
        answer.append(output.logits[:, -1].argmax(-1))
        embeds = base.get_input_embeddings()(answer[-1][:, None])
    cache.crop(before - cache.get_seq_length())  # negative: how many tokens to take off
    return torch.stack(answer, dim=1)


VARIANTS = {
    "write": write_variant,
    "train": train_variant,
    "reader": reader_variant,
    "attention": attention_variant,
    "short_attention": short_attention_variant,
    "segments": segments_variant,
    "read": read_variant,
}


# ------------------------------------------------------------------------------------------------ how


def prepare(cell: dict[str, Any]) -> dict[str, Run]:
    """Every variant, ready to be measured: what is done once is done."""
    make = VARIANTS[cell["kind"]]
    for variant in cell["variants"]:
        make(cell, variant, min(32, cell["tokens"]))()  # once in a process: threads, kernels
    torch.compiler.reset()  # which forgets the lengths that it saw
    runs = {variant: make(cell, variant, cell["tokens"]) for variant in cell["variants"]}
    for variant, run in runs.items():
        if "compiled" in variant:
            run()
    return runs


def measure_time(cell: dict[str, Any]) -> dict[str, Any]:
    runs = prepare(cell)
    rounds = []
    for index in range(cell["rounds"]):
        order = list(runs)[index % len(runs) :] + list(runs)[: index % len(runs)]
        rounds.append({variant: _seconds(runs[variant]) for variant in order})
    return {"rounds": rounds}


def _seconds(run: Run) -> float:
    gc.collect()
    if DEVICE == "cpu" and torch.get_num_threads() == 1:
        start = time.process_time()
        run()
        return time.process_time() - start
    synchronize = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def measure_memory(cell: dict[str, Any]) -> dict[str, Any]:
    """Peak of the process, or of the device, above what it holds once the model is loaded and has run once."""
    (run,) = prepare(cell).values()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _seconds(run)
        return {"bytes": torch.cuda.max_memory_allocated() - before, "seconds": seconds}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = _process_memory("VmRSS")
    seconds = _seconds(run)
    return {"bytes": _process_memory("VmHWM") - before, "seconds": seconds}


def _process_memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def state_bytes(cell: dict[str, Any]) -> dict[str, Any]:
    """Bytes kept of one context: the memory, and the KV cache in its place."""
    base = build_base(cell["shape"], dtype=cell["dtype"])
    cache = _prefill(base, base.get_input_embeddings()(tokens(1, cell["tokens"], base.config.vocab_size)))
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    model: GradMemForCausalLM = get_gradmem_model(base, GradMemConfig(num_memory_tokens=MEMORY_TOKENS))
    return {"memory": model.memory_init.nbytes, "cache": held}


MEASURES = {"time": measure_time, "memory": measure_memory, "bytes": state_bytes}
DEFAULTS = {"shape": "smollm2-8-layers", "trains": "all", "dtype": "float32", "steps": 2, "rounds": 3, "threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cell", type=json.loads)
    cell = DEFAULTS | parser.parse_args().cell
    torch.set_num_threads(cell["threads"])
    result = MEASURES[cell["measure"]](cell)
    print(json.dumps({"cell": cell, "load": os.getloadavg()[0], "torch": torch.__version__} | result))


if __name__ == "__main__":
    main()
