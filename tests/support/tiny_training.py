"""A recipe of six steps on a model as small as it can be, and what tests ask of such a run."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_gradmem.tasks.collator import DataCollatorForGradMem
from hf_gradmem.tasks.kv_retrieval import build_tokenizer
from hf_gradmem.training.metrics import TeacherForcedExactMatch, most_likely_tokens
from hf_gradmem.training.recipe import make_recipe
from hf_gradmem.training.run import build_model

TINY = {
    "task": "kv_retrieval",
    "task_arguments": {"num_pairs": 2, "key_length": 1, "value_length": 1, "num_symbols": 8, "end_mark": False},
    "stages": [{"steps": 6}],
    "base_config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "train_base": True,
    "gradmem": {
        "num_memory_tokens": 2,
        "write_steps": 2,
        "learn_write_learning_rate": "per_token",
        "write_learning_rate": 0.04,
        "write_head": True,
        "checkpoint_write_steps": False,
    },
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def tiny_recipe(directory, **changes):
    return make_recipe(TINY | {"output_dir": str(directory)} | changes)


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_same_weights(first, second, tolerance=0.0):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(
            tensor, second[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


# ------------------------------------------------------------------------------------------------ same numbers


def on_two_processes(*arguments):
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    result = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


# ------------------------------------------------------------------------------------------------ stock Trainer


def stock_trainer(directory, model, rows=None, **settings):
    tokenizer = build_tokenizer()
    limits = {"max_context_length": 30, "max_query_length": 8, "queries_per_context": 4}
    arguments = TrainingArguments(
        output_dir=str(directory),
        **{"remove_unused_columns": False, "report_to": "none", "use_cpu": True, "disable_tqdm": True} | settings,
    )
    return Trainer(
        model=model,
        args=arguments,
        data_collator=DataCollatorForGradMem(tokenizer, **limits, padding="max_length"),
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=TeacherForcedExactMatch(),
        preprocess_logits_for_metrics=most_likely_tokens,
    )


def tiny_model(**gradmem):
    recipe = make_recipe(TINY | {"output_dir": "unused", "gradmem": TINY["gradmem"] | gradmem})
    return build_model(recipe.arguments)
