"""A trained adapter as it is published: READ's LoRA in bfloat16, its base by the name that others know, no tokenizer.

    python -m benchmarks.publish runs/gradmem-smollm2-135m HuggingFaceTB/SmolLM2-135M-Instruct \
        hf_gradmem/pretrained/gradmem-smollm2-135m

What WRITE uses stays as it was trained, so memories that were written by the run are read by what is published.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_gradmem.configuration_gradmem import SAVE_ID


def publish(run: Path, base_name: str, output: Path) -> None:
    """Copy the adapter of a run."""
    tensors = load_file(run / "model.safetensors")
    smaller = {name: tensor.to(torch.bfloat16) if ".read." in name else tensor for name, tensor in tensors.items()}
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config.pop(SAVE_ID, None)
    config["base_model_name_or_path"] = base_name
    config["text_config"] = {
        name: value for name, value in config["text_config"].items() if not name.endswith("name_or_path")
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(smaller, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("base_name")
    parser.add_argument("output", type=Path)
    given = parser.parse_args()
    publish(given.run, given.base_name, given.output)
