"""A trained adapter as it is published: READ's LoRA in bfloat16, its base by the name that others know, no tokenizer.

    python -m benchmarks.publish runs/gradmem-smollm2-135m HuggingFaceTB/SmolLM2-135M-Instruct \
        hf_gradmem/pretrained/gradmem-smollm2-135m

What WRITE uses stays as it was trained, so memories that were written by the run are read by what is published. Of
several runs that go on from one another, READ's LoRA is the mean of theirs, which forgets less of what the earlier ones
could (Wortsman et al., arXiv 2203.05482). `--write-of RUN` takes what WRITE uses, and the configuration, from another
run. `--write-in-half` has a LoRA of WRITE's in bfloat16 as well: memories are then those of what is published alone.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from hf_gradmem.configuration_gradmem import SAVE_ID


def publish(
    runs: Sequence[Path], base_name: str, output: Path, write_of: Path | None = None, write_in_half: bool = False
) -> None:
    """Copy the adapter of a run, or the mean of several, with what WRITE uses and the configuration of `write_of`.

    Raises:
        ValueError: `write_of` is not given, and what WRITE uses differs between the runs.
    """
    held = [load_file(run / "model.safetensors") for run in runs]
    writes = load_file(write_of / "model.safetensors") if write_of else held[0]
    smaller = {}
    for name, tensor in writes.items():
        if ".read." in name:
            smaller[name] = torch.stack([tensors[name].float() for tensors in held]).mean(0).to(torch.bfloat16)
        elif write_of or all(torch.equal(tensor, tensors[name]) for tensors in held):
            smaller[name] = tensor.to(torch.bfloat16) if write_in_half and ".write." in name else tensor
        else:
            raise ValueError(
                f"The runs differ in {name}, which WRITE uses. The mean is of READ's LoRA alone: say by --write-of "
                "whose the rest is to be."
            )
    config = json.loads(((write_of or runs[0]) / "config.json").read_text(encoding="utf-8"))
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
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("base_name")
    parser.add_argument("output", type=Path)
    parser.add_argument("--write-of", type=Path)
    parser.add_argument("--write-in-half", action="store_true")
    given = parser.parse_args()
    publish(given.runs, given.base_name, given.output, given.write_of, given.write_in_half)
