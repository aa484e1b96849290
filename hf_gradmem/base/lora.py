"""LoRA by phase: weights in the base that are on in one phase, and what is the base's own beside them."""

import functools
import warnings
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from .asked import ASKED, asking

PHASES = ("write", "read")
"""Names of the adapters of our own."""

# Arguments by which PEFT changes, trains or adds to what is no LoRA: that is in the base in every phase.
_OUTSIDE_PHASES = (
    "modules_to_save",
    "bias",
    "trainable_token_indices",
    "layer_replication",
    "kasa_config",
    "ensure_weight_tying",
)
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")  # the others of PEFT alter the base's weights, or need data

# The GradMem that a base was given to last; a copy of a base is nobody's yet.
_taken_by: WeakKeyDictionary[nn.Module, ref[nn.Module]] = WeakKeyDictionary()


def inject_lora(base_model: PreTrainedModel, arguments: dict[str, Any], phase: str, dtype: torch.dtype) -> None:
    """Add to the base, in place, a LoRA that is on in a span of [`lora_phase`] alone.

    Args:
        base_model: the decoder.
        arguments: those of a `peft.LoraConfig`.
        phase: name of the adapter, `"write"` or `"read"`.
        dtype: of the LoRA's own weights.

    Raises:
        ValueError: the arguments do not make a LoRA for this base.
    """
    # PEFT freezes every other parameter when it injects; what trains is not its decision here.
    trainable = [parameter for parameter in base_model.parameters() if parameter.requires_grad]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # two phases, two adapters
            _check_stays_in_phase(arguments)
            config = LoraConfig(**arguments)
            _check_leaves_embedding(config, base_model)
            inject_adapter_in_model(config, base_model, adapter_name=phase)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{phase}_lora={arguments} does not fit {type(base_model).__name__}: {error}") from error
    for parameter in trainable:
        parameter.requires_grad_(True)
    for layer in _lora_layers(base_model):
        layer.enable_adapters(False)
        if not isinstance(layer, _ByPhase):
            layer.__class__ = _by_phase(layer.__class__)
        if phase not in layer.lora_variant:  # a variant, such as DoRA, computes with the weights itself
            for part in (layer.lora_A[phase], layer.lora_B[phase]) if phase in layer.lora_A else ():
                if type(part) is nn.Linear:
                    part.__class__ = _LinearInPrecisionOfInput
    for module in lora_modules(base_model).values():
        for part in module.modules():
            # By PEFT: B = 0. The type of `nn.Module` knows no attributes but tensors and modules.
            part._is_hf_initialized = True  # type: ignore[assignment]
        module.to(dtype).requires_grad_(True)


def _check_stays_in_phase(arguments: dict[str, Any]) -> None:
    plain = vars(LoraConfig())
    for name in _OUTSIDE_PHASES:
        value = arguments.get(name)
        if value and value != plain.get(name):
            raise ValueError(f"{name} changes what is in the base in every phase. Leave it at {plain.get(name)!r}.")
    initialisation = arguments.get("init_lora_weights", True)
    if initialisation not in _INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={initialisation!r} is none of those that leave the base's own weights as they are, "
            f"which are there in every phase. Use one of {', '.join(map(repr, _INITIALISATIONS))}."
        )


def _check_leaves_embedding(config: LoraConfig, base_model: PreTrainedModel) -> None:
    embedding: Any = base_model.get_input_embeddings()
    for name, module in base_model.named_modules():
        if getattr(module, "weight", None) is not embedding.weight:
            continue
        in_modules = config.target_modules and check_target_module_exists(config, name)
        if in_modules or any(f".{name}.weight".endswith(f".{target}") for target in config.target_parameters or ()):
            tied = "" if module is embedding else " (its weight is tied to it)"
            raise ValueError(
                f"{name} is the base's token embedding{tied}, and tokens are looked up there outside the phases. Leave "
                "it out of the targets."
            )


class _ByPhase:
    """A layer of PEFT whose adapters are what the thread's phase says; outside phases, what PEFT's own switches say.

    Nothing is switched in the layer, so that threads can be in phases of their own.
    """

    @property
    def disable_adapters(self: Any) -> bool:
        return self._disable_adapters if ASKED.phase is None else not _has(self, ASKED.phase)

    @property
    def active_adapter(self: Any) -> str | list[str]:
        return self._active_adapter if ASKED.phase is None else ASKED.phase

    def _cast_input_dtype(self: Any, x: Any, dtype: torch.dtype) -> Any:
        if ASKED.phase in self.lora_A and isinstance(self.lora_A[ASKED.phase], _LinearInPrecisionOfInput):
            return x  # the weights are cast, which are fewer
        return super()._cast_input_dtype(x, dtype)  # type: ignore[misc]  # of the layer of PEFT behind this class

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        return _empty_layer, (type(self).__bases__[1],), self.__getstate__()


class _LinearInPrecisionOfInput(nn.Linear):
    """Weights that train in float32, and multiply in the precision of the base, as under autocast."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.linear(
            input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype)
        )


@functools.cache
def _by_phase(layer_class: Any) -> Any:
    """The class of PEFT with [`_ByPhase`] in front of it, under its own name."""
    return type(layer_class.__name__, (_ByPhase, layer_class), {"__module__": layer_class.__module__})


def _empty_layer(layer_class: type) -> Any:
    """A layer that a copy or a pickle gives its state: their class cannot be found by its name."""
    return _by_phase(layer_class).__new__(_by_phase(layer_class))


def _lora_layers(base_model: nn.Module) -> list[Any]:  # a BaseTunerLayer is a module, but PEFT's type does not say so
    return [module for module in base_model.modules() if isinstance(module, BaseTunerLayer)]


def _named_layers(base_model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in base_model.named_modules() if isinstance(module, BaseTunerLayer)}


def _has_own(base_model: nn.Module) -> bool:
    """Whether a GradMem's LoRA is in the base."""
    return any(_has(layer, phase) for layer in _lora_layers(base_model) for phase in PHASES)


def _take_out(base_model: nn.Module) -> None:
    for parent in list(base_model.modules()):
        for name, layer in list(parent.named_children()):
            inside: Any = layer
            while isinstance(inside, BaseTunerLayer):  # one may be around another
                inside = inside.get_base_layer()
            if inside is not layer:
                setattr(parent, name, inside)
    vars(base_model).pop("peft_config", None)


@contextmanager
def lora_taken_back(base_model: nn.Module) -> Iterator[None]:
    """Have a base that had no LoRA be without one again where the span fails, which injects some."""
    try:
        yield
    except BaseException:
        _take_out(base_model)
        raise


def take_over(base_model: nn.Module, model: nn.Module) -> None:
    """Have the base be this model's: the LoRA of one that it was given to before is taken out.

    Args:
        base_model: the decoder.
        model: the GradMem that may bring a LoRA.
    """
    if _has_own(base_model):
        _take_out(base_model)
    _taken_by[base_model] = ref(model)


def check_owner(base_model: nn.Module, model: Any) -> None:
    """Refuse to run a model whose base has gone to another, where either has a LoRA.

    Args:
        base_model: the decoder.
        model: the GradMem that is to run it.

    Raises:
        RuntimeError: its LoRA was taken out of the base, or the other's is in it.
    """
    owner = _taken_by.get(base_model)
    if owner is None or owner() is model:
        return
    config = model.config
    if config.write_lora is not None or config.read_lora is not None or _has_own(base_model):
        raise RuntimeError(
            f"The {type(base_model).__name__} of this model was given to another GradMem since, and a base has the "
            "LoRA of one alone. Load the base once for each of them."
        )


def other_adapters(base_model: nn.Module) -> list[str]:
    """Names of the PEFT adapters in the base beside those of our own."""
    parts = (getattr(layer, part) for layer in _lora_layers(base_model) for part in layer.adapter_layer_names)
    return sorted({name for part in parts for name in part} - set(PHASES))


def check_own_alone(base_model: nn.Module, model: Any) -> None:
    """Refuse a model whose LoRA by phase has other adapters beside it, which are off, or which they took with them.

    Raises:
        RuntimeError: its LoRA is no longer in the base.
        ValueError: the base has both.
    """
    expected = [phase for phase in PHASES if getattr(model.config, f"{phase}_lora") is not None]
    if not expected:
        return
    layers = _lora_layers(base_model)
    gone = [f"{phase}_lora" for phase in expected if not any(_has(layer, phase) for layer in layers)]
    if gone:
        raise RuntimeError(
            f"{' and '.join(gone)} of this model is no longer in its base: to unload or merge a PEFT adapter around it "
            "takes out every LoRA. Load the model anew."
        )
    if others := other_adapters(base_model):
        raise ValueError(
            f"The base has a PEFT adapter ({', '.join(others)}) beside write_lora or read_lora, which alone would be "
            "used, and trained. Leave the adapter out, or make the model without a LoRA of its own."
        )


def check_savable(base_model: nn.Module, model: Any) -> None:
    """Refuse to save a model with what its checkpoint has no place for, or without what its configuration names.

    Raises:
        RuntimeError: its LoRA is no longer in the base.
        ValueError: a PEFT adapter is around it.
    """
    check_owner(base_model, model)
    check_own_alone(base_model, model)
    if others := other_adapters(base_model):
        raise ValueError(
            f"A PEFT adapter ({', '.join(others)}) is around this model, and its checkpoint has no place for one. Save "
            "that by the PeftModel, and the model once it is out: model = peft_model.unload(), or merge_and_unload() "
            "to keep in the base what it learned."
        )


def check_head_without_lora(base_model: PreTrainedModel) -> None:
    """Refuse to resize a vocabulary whose head has a LoRA, which would keep its size.

    Raises:
        ValueError: it has one.
    """
    if isinstance(base_model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "The base's output head has a LoRA, which is made for its vocabulary: resize that first, and then make the "
            "model, or leave the head out of target_modules."
        )


def lora_modules(base_model: nn.Module) -> dict[str, nn.Module]:
    """The containers of LoRA weights in the base, by their name in it."""
    return {
        f"{name}.{part}": container
        for name, layer in base_model.named_modules()
        for part, container in lora_parts(layer).items()
    }


def lora_parts(layer: nn.Module) -> dict[str, nn.Module]:
    """The containers of LoRA weights in one layer; none where it is no layer of PEFT's."""
    names = layer.adapter_layer_names if isinstance(layer, BaseTunerLayer) else ()
    return {name: part for name in names if isinstance(part := getattr(layer, name, None), nn.Module)}


def lora_only_modules(base_model: nn.Module) -> list[nn.Module]:
    """Every part of the LoRA layers but the layer of the base inside: weights and dropout."""
    return [
        child for layer in _lora_layers(base_model) for name, child in layer.named_children() if name != "base_layer"
    ]


def lora_parameters(base_model: nn.Module, phase: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and weights of the LoRA of one phase."""
    for name, layer in _named_layers(base_model).items():
        yield from _weights(name, layer, [phase])


def _weights(name: str, layer: Any, adapters: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and weights of some adapters of one layer, which has this name in the base."""
    for part, container in lora_parts(layer).items():
        for key, parameter in container.named_parameters():
            if key.split(".")[0] in adapters:
                yield f"{name}.{part}.{key}", parameter


def lora_scalings(base_model: nn.Module, phase: str) -> dict[str, float]:
    """What the LoRA of one phase is multiplied by, by the names of its layers: no weight tells."""
    layers = sorted(_named_layers(base_model).items())
    return {name: float(layer.scaling[phase]) for name, layer in layers if _has(layer, phase)}


def others_on(base_model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights of the other PEFT adapters that are on, and what they are multiplied by; of none that are merged."""
    tensors: dict[str, torch.Tensor] = {}
    scalings: dict[str, float] = {}
    for name, layer in _named_layers(base_model).items():
        if layer.disable_adapters or layer.merged:
            continue
        on = sorted(set(layer.active_adapters) - set(PHASES))
        tensors |= dict(_weights(name, layer, on))
        scaling: dict[str, float] = getattr(layer, "scaling", {})
        scalings |= {f"{name}.{adapter}": float(scaling[adapter]) for adapter in on if adapter in scaling}
    return tensors, scalings


def lora_phase(phase: str, base_model: nn.Module, model: nn.Module) -> AbstractContextManager[None]:
    """Run bases with the LoRA of `phase` (`"write"` or `"read"`) alone, in this thread and for a span.

    A layer without a LoRA for this phase runs the base's own weights, bit for bit. Within a span of the same phase
    nothing is done, which a trace could not follow.

    Raises:
        RuntimeError, ValueError: as of [`check_owner`] and [`check_own_alone`].
    """
    if ASKED.phase == phase:
        return nullcontext()
    check_owner(base_model, model)
    check_own_alone(base_model, model)
    # What is looked up by the thread is not settled: a run stays one.
    return asking(phase=phase, settled=ASKED.settled)


def _has(layer: Any, phase: str) -> bool:
    return any(phase in getattr(layer, part) for part in layer.adapter_layer_names)


def base_keys(model: nn.Module) -> set[str]:
    """Keys of the model's state dict that belong to the base itself, tied ones included, LoRA ones not.

    Args:
        model: with the base as `base_model`.
    """
    lora = tuple(f"base_model.{name}." for name in lora_modules(model.get_submodule("base_model")))
    return {key for key in model.state_dict() if key.startswith("base_model.") and not (lora and key.startswith(lora))}


def train_beside_base(model: nn.Module, *, base_trains: bool = False) -> None:
    """Everything beside the base trains, a LoRA inside it as well, and the base's own weights where asked for."""
    base = base_keys(model)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(base_trains or key not in base)
