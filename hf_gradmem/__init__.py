"""GradMem for Hugging Face Transformers: write a context into memory tokens, answer from them.

Importing the package registers it with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_gradmem import GradMemConfig
from .memory import GradMemMemory
from .modeling_gradmem import GradMemForCausalLM, GradMemOutput, get_gradmem_model

__version__ = "0.1.0"

AutoConfig.register(GradMemConfig.model_type, GradMemConfig, exist_ok=True)
AutoModel.register(GradMemConfig, GradMemForCausalLM, exist_ok=True)
AutoModelForCausalLM.register(GradMemConfig, GradMemForCausalLM, exist_ok=True)

__all__ = [
    "GradMemConfig",
    "GradMemForCausalLM",
    "GradMemMemory",
    "GradMemOutput",
    "get_gradmem_model",
]
