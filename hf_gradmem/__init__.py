"""GradMem for Hugging Face Transformers: write a context into memory tokens, answer from them.

Importing the package registers it with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_gradmem import GradMemConfig
from .memory import GradMemMemory
from .modeling_gradmem import GradMemForCausalLM, GradMemOutput, get_gradmem_model

if TYPE_CHECKING:
    from .training.collator import DataCollatorForGradMem

__version__ = "0.1.0"

AutoConfig.register(GradMemConfig.model_type, GradMemConfig, exist_ok=True)
AutoModel.register(GradMemConfig, GradMemForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(GradMemConfig, GradMemForCausalLM, exist_ok=True)


def __getattr__(name: str) -> Any:
    """The collator brings `datasets`, which takes a second to import: on demand."""
    if name == "DataCollatorForGradMem":
        from .training.collator import DataCollatorForGradMem

        return DataCollatorForGradMem
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "DataCollatorForGradMem",
    "GradMemConfig",
    "GradMemForCausalLM",
    "GradMemMemory",
    "GradMemOutput",
    "get_gradmem_model",
]
