"""A memory as a PROMPT_TUNING adapter of stock PEFT: its vectors as virtual tokens."""

import os
from pathlib import Path

from peft import PromptTuningConfig, TaskType

from ..files import save_tensors
from .export import PEFT_WEIGHTS_FILE, StockPrefix


def save(prefix: StockPrefix, directory: str | os.PathLike) -> None:
    """Write the adapter's weights and configuration into a directory, which is made if it is missing."""
    text_config = prefix.decoder.base_model.config.get_text_config()
    save_tensors({"prompt_embeddings": prefix.vectors}, Path(directory) / PEFT_WEIGHTS_FILE, {"format": "pt"})
    PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=prefix.base_model_name_or_path,
        revision=prefix.base_model_revision,
        inference_mode=True,
        num_virtual_tokens=prefix.vectors.shape[0],
        token_dim=prefix.vectors.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=getattr(text_config, "num_attention_heads", None),
        num_layers=getattr(text_config, "num_hidden_layers", None),
    ).save_pretrained(os.fspath(directory))
