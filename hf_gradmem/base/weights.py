"""The weights of a base by content: a short hash, the same wherever they lie and in whatever precision."""

import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional

from .lora import lora_parts

Tensor = torch.Tensor
Result = TypeVar("Result")

_HASH_LENGTH = 12
# A checksum is taken of so many elements, and so many are converted at a time: on CPUs as many as its caches hold.
_BLOCK, _CHUNK_OF_CPU, _CHUNK = 4096, 1 << 20, 1 << 24
# Elements that are looked at, in a tensor that is not looked at whole, to tell whether it was edited.
_SAMPLES = 32
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BaseWeights(dict[str, Tensor]):
    """Weights by their names; those that accelerate keeps elsewhere have no data here, and are fetched one by one.

    Attributes:
        elsewhere: gives the data of these, by name.
    """

    def __init__(self) -> None:
        self.elsewhere: dict[str, Callable[[], Tensor]] = {}

    def data(self, name: str) -> Tensor:
        """The tensor itself, or its data from a disk or from working memory."""
        with suppress(KeyError):  # it is not kept elsewhere either
            return self.elsewhere[name]()
        return self[name]


def base_weights(base_model: nn.Module) -> BaseWeights:
    """Weights and saved buffers of the base itself, by the names that they have without a LoRA around them.

    `state_dict` would gather the parts of a sharded model, which one process cannot do alone.
    """
    found = BaseWeights()
    waiting, seen = [("", base_model)], set[nn.Module]()
    while waiting:  # in the order of `named_modules`, which would go through all of the LoRA as well
        prefix, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        unsaved = module._non_persistent_buffers_set
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and name not in unsaved:
                whole = f"{prefix}.{name}".removeprefix(".").replace(".base_layer.", ".")
                found[whole] = tensor
                if tensor.device.type == "meta" and (stored := _stored_by(module)) is not None:
                    found.elsewhere[whole] = functools.partial(stored.__getitem__, name)
        lora = lora_parts(module)
        children = [(name, child) for name, child in module.named_children() if name not in lora]
        waiting += [(f"{prefix}.{name}".removeprefix("."), child) for name, child in reversed(children)]
    return found


def _stored_by(module: nn.Module) -> Mapping[str, Tensor] | None:
    """What accelerate puts into a module's weights while it runs, and takes out again."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((each.weights_map for each in hooks if getattr(each, "weights_map", None) is not None), None)


@torch.no_grad()
def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of names, shapes and every element, rounded to bfloat16.

    So weights that were stored in bfloat16 have one hash in float32, in bfloat16 and on every device. Those loaded in
    float16 mostly have another, since float16 rounds small weights off. A tensor without data here counts by its shape.

    The hash is of checksums of 4096 elements each: Σ wᵢ·bᵢ of their 16 bits bᵢ as integers and odd weights wᵢ < 2²⁴,
    which float64 sums exactly, in whatever order. They change with any one element, and with an exchange of two.
    """
    digest = hashlib.sha256()
    known: dict[tuple, bytes] = {}  # tied weights are summed once
    for name in sorted(tensors):
        fetched = isinstance(tensors, BaseWeights) and name in tensors.elsewhere
        tensor = _local(tensors.data(name) if isinstance(tensors, BaseWeights) else tensors[name])
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        if fetched:  # whose place in working memory the next one may have
            known.clear()
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if not _has_data(tensor):
            continue
        if place not in known:
            known[place] = _checksums(tensor).cpu().numpy().astype("<i8").tobytes()
        digest.update(known[place])
    return digest.hexdigest()[:_HASH_LENGTH]


def hash_tensors(tensors: Mapping[str, Tensor], settings: Iterable[object] = ()) -> str:
    """A short hash of named tensors, every element as float32, and of settings by their `repr`."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if _has_data(tensor):
            whole = _local(tensor.detach()).to("cpu", torch.float32).contiguous().numpy()
            digest.update(whole.astype("<f4").tobytes())
    for setting in settings:
        digest.update(repr(setting).encode())
    return digest.hexdigest()[:_HASH_LENGTH]


class Cached(Generic[Result]):
    """What is made of the tensors that it is called with, computed again only when one of them has changed.

    Reading asks for it at every call; the weights rarely change between two of them. It keeps no tensor of a model.
    Whether one was replaced or edited is told by its address and version, and, since edits through `.data` leave the
    version as it was, by its elements: those of small tensors all, those of others here and there.

    Args:
        function: gives it, such as a hash.
        whole_up_to: size of the largest tensor of which every element is looked at.
    """

    def __init__(self, function: Callable[..., Result], whole_up_to: int = 0) -> None:
        self._function, self._whole_up_to = function, whole_up_to
        self._last: tuple[list, Tensor, Result] | None = None

    def __call__(self, tensors: Mapping[str, Tensor], *arguments: object, thorough: bool = False) -> Result:
        """What is made of them.

        Args:
            tensors: by name.
            arguments: of `function` beside them.
            thorough: look at every element; it is computed again.
        """
        marks = [arguments, *((name, *_mark(tensor)) for name, tensor in tensors.items())]
        sample = _sample(tensors.values(), self._whole_up_to)
        known = self._last
        if thorough or known is None or known[0] != marks or not torch.equal(known[1], sample):
            known = self._last = marks, sample, self._function(tensors, *arguments)
        return known[2]


def _mark(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@torch.no_grad()
def _sample(tensors: Iterable[Tensor], whole_up_to: int) -> Tensor:
    """Elements of each tensor as integers, or their sum where all are looked at."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # joined before they are looked at: fewer calls
    for tensor in map(_local, tensors):
        if not _has_data(tensor):
            continue
        flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
        if len(flat) <= whole_up_to:
            part = flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)[None]
        else:
            part = flat[:: len(flat) // _SAMPLES + 1]
        alike.setdefault((part.device, part.dtype), []).append(part)
    joined = [torch.cat(parts) for parts in alike.values()]
    integers = [part.view(_INTEGERS[part.element_size()]).long().cpu() for part in joined]
    return torch.cat(integers) if integers else torch.empty(0, dtype=torch.int64)


def _checksums(tensor: Tensor) -> Tensor:
    """One exact integer for every [`_BLOCK`] elements, int64."""
    if tensor.device.type == "mps":  # has no float64
        tensor = tensor.cpu()
    flat = tensor.detach().reshape(-1)
    weights = (torch.arange(_BLOCK, device=flat.device) * 2654435761 % (1 << 24)).bitwise_or(1).double()
    sums = []
    for chunk in flat.split(_CHUNK_OF_CPU if flat.device.type == "cpu" else _CHUNK):
        bits = _bits(chunk).double()
        bits = functional.pad(bits, (0, -len(bits) % _BLOCK)).view(-1, _BLOCK)
        sums.append((bits @ weights).long())
    return torch.cat(sums)


def _bits(flat: Tensor) -> Tensor:
    """Elements as integers of at most 16 bits: floats rounded to bfloat16, anything else byte by byte."""
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    if flat.is_floating_point():
        return flat.to(torch.bfloat16).view(torch.int16)
    return flat.view(torch.uint8)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _has_data(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0
