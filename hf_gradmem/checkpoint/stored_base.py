"""Whether a base in memory is still the one that its name stands for: its weights beside the files of that name."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from ..base.weights import base_weights

Tensor = torch.Tensor


def differs_from_stored(base_model: PreTrainedModel, name: str | os.PathLike, revision: str | None) -> bool:
    """Whether some weight of a base is another than loading it by its name would give.

    Every element is compared, in the precision that the base has here. What cannot be compared counts as equal:
    weights that are quantised or sharded here, those that Transformers renames as it loads them, and all of a base
    whose files are not on this machine or are not safetensors.

    Args:
        base_model: as it is.
        name: the directory or Hub repository that it is to be loaded from again; the Hub is not asked.
        revision: of the repository.
    """
    if getattr(base_model, "is_quantized", False):
        return False
    weights = {key: tensor for key, tensor in base_weights(base_model).items() if _is_whole(tensor)}
    prefix = f"{base_model.base_model_prefix}."
    for file in _stored_files(name, revision):
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  # not a dict
                own = next((weights[each] for each in _names(key, prefix) if each in weights), None)
                if own is not None and _differs(own, stored.get_tensor(key)):
                    return True
    return False


def _names(key: str, prefix: str) -> tuple[str, ...]:
    """What a stored weight may be called in a model: Transformers adds or drops the name of the decoder in it."""
    return key, prefix + key, key.removeprefix(prefix)


def _is_whole(tensor: Tensor) -> bool:
    sharded = hasattr(tensor, "to_local") or hasattr(tensor, "ds_id")
    return tensor.is_floating_point() and tensor.device.type != "meta" and tensor.numel() > 0 and not sharded


@torch.no_grad()
def _differs(own: Tensor, stored: Tensor) -> bool:
    if own.shape != stored.shape:
        return True
    return not torch.equal(stored.to(own.device, own.dtype), own)


def _stored_files(name: str | os.PathLike, revision: str | None) -> Iterator[str]:
    """The safetensors of a model that are on this machine; none where some are missing."""

    def find(file: str) -> str | None:
        if os.path.isdir(name):
            path = Path(name) / file
            return str(path) if path.is_file() else None
        return cached_file(
            os.fspath(name),
            file,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    try:
        if (whole := find(SAFE_WEIGHTS_NAME)) is not None:
            yield whole
        elif (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            shards = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
            files = [find(shard) for shard in sorted(shards)]
            if None not in files:
                yield from (file for file in files if file is not None)
    except OSError:  # a name that is no repository's
        return
