"""GradMem for Hugging Face Transformers: write a context into memory tokens, answer from them.

Importing the package registers it with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, and the task
`"gradmem-text-generation"` with `transformers.pipeline`.
"""

from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from . import pipeline as _pipeline
from .configuration_gradmem import GradMemConfig
from .memory.written import GradMemMemory
from .modeling_gradmem import GradMemForCausalLM, GradMemOutput, get_gradmem_model
from .reading.answering import Answer
from .texts.cutting import cut_text

if TYPE_CHECKING:
    from .memory.store import MemoryStore
    from .tasks.collator import DataCollatorForGradMem

__version__ = "0.1.0"

AutoConfig.register(GradMemConfig.model_type, GradMemConfig, exist_ok=True)
AutoModel.register(GradMemConfig, GradMemForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(GradMemConfig, GradMemForCausalLM, exist_ok=True)
_pipeline.register()


def __getattr__(name: str) -> Any:
    """What brings `datasets`, which takes a second to import: on demand."""
    if name == "DataCollatorForGradMem":
        from .tasks.collator import DataCollatorForGradMem

        return DataCollatorForGradMem
    if name == "MemoryStore":
        from .memory.store import MemoryStore

        return MemoryStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Answer",
    "DataCollatorForGradMem",
    "GradMemConfig",
    "GradMemForCausalLM",
    "GradMemMemory",
    "GradMemOutput",
    "MemoryStore",
    "cut_text",
    "get_gradmem_model",
]
