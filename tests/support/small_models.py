"""Bases, adapters and tokenizers of the tests about files: as small as they can be, with every option on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_gradmem import GradMemConfig, GradMemForCausalLM, get_gradmem_model
from tests.support.tiny_models import FIRST_ORDINARY_TOKEN, VOCAB_SIZE, tiny_causal_lm

EVERY_OPTION = {
    "num_memory_tokens": 3,
    "write_steps": 2,
    "num_control_tokens": 2,
    "memory_projection": True,
    "write_head": True,
    "learn_write_learning_rate": "per_token",
    "write_lora": {"r": 2, "target_modules": ["q_proj"]},
    "read_lora": {"r": 2, "target_modules": ["v_proj"]},
}
PLAIN = {"num_memory_tokens": 3, "write_steps": 2}


def named_base(directory: Path, model_type: str = "llama", seed: int = 0, **arguments) -> PreTrainedModel:
    """A base that was loaded from a directory, and so has a name."""
    if not directory.exists():
        tiny_causal_lm(model_type, torch.float32, seed).save_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, **arguments)


def cutting_adapter(directory: Path, **options) -> str:
    """An adapter's directory, with its base beside it, that cuts contexts which come without segments."""
    torch.manual_seed(0)
    config = GradMemConfig(num_memory_tokens=3, write_segment_length=6, **options)
    model = get_gradmem_model(named_base(directory / "base"), config, tokenizer=small_tokenizer())
    model.save_pretrained(directory / "adapter")
    return str(directory / "adapter")


def small_llama(vocab_size: int, tokenizer: PreTrainedTokenizerFast | None = None, **options) -> PreTrainedModel:
    """A Llama of two layers with random weights, and the special tokens of a tokenizer."""
    special = {name: getattr(tokenizer, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, **special | size | {"initializer_range": 0.3} | options)
    return AutoModelForCausalLM.from_config(config)


def templated(tokenizer: PreTrainedTokenizerFast, template: str | dict[str, str]) -> GradMemForCausalLM:
    """A GradMem model of this vocabulary that puts questions in these words."""
    base = small_llama(len(tokenizer), tokenizer)
    return get_gradmem_model(base, GradMemConfig(num_memory_tokens=4, template=template), tokenizer=tokenizer)


def nameless_base(tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    base = tiny_causal_lm("llama", dtype)
    if tied:
        base.config.tie_word_embeddings = True
        base.tie_weights()
    return base


def with_memory(base: PreTrainedModel, **options) -> GradMemForCausalLM:
    """A GradMem model, every parameter beside the base moved away from where it started; the same at each call."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        model = get_gradmem_model(base, GradMemConfig(**options))
        for name, parameter in model.named_parameters():
            if not name.startswith("base_model.") or "lora_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64).to(parameter))
    return model


def ids_of(model: GradMemForCausalLM, text: str) -> torch.Tensor:
    """`(1, length)`, a text's tokens alone."""
    return torch.tensor([model.tokenizer(text, add_special_tokens=False).input_ids])


def small_tokenizer(offset: int = 0) -> PreTrainedTokenizerFast:
    """One id for each lower-case letter; `offset` tells tokenizers apart."""
    letters = {chr(97 + i): FIRST_ORDINARY_TOKEN + offset + i for i in range(26)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | letters
    assert max(vocabulary.values()) < VOCAB_SIZE
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
