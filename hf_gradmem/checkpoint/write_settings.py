"""What a memory depends on, of a configuration: to tell whether what is there is what would be written."""

from typing import Any

from ..configuration_gradmem import GradMemConfig
from ..losses import LOSSES, weight_name

# Told by a model's fingerprint, or where a base lies, or READ's alone.
_NOT_WRITES = (
    "text_config",
    "base_model_name_or_path",
    "base_model_revision",
    "base_model_id",
    "includes_base",
    "read_lora",
    "template",
    "confidence",
)
OF_TRAINING = (
    "meta_gradient",
    "meta_gradient_steps",
    "meta_gradient_radius",
    "checkpoint_write_steps",
    *map(weight_name, LOSSES),
)
"""Options that change no memory, only how its writing is trained."""


def write_settings(config: GradMemConfig) -> dict[str, Any]:
    """The options of a configuration that WRITE reads, those of its training among them."""
    return {name: getattr(config, name) for name in type(config).__annotations__ if name not in _NOT_WRITES}
