"""What a memory is: the value that WRITE leaves, the forms that it can take, and the phases that use it.

The store of many memories is not imported here: it brings `datasets`, which takes a second.
"""

from .form import MemoryForm
from .input_vectors import InputVectors
from .key_values import KeyValues
from .written import GradMemMemory

FORMS: dict[str, type[MemoryForm]] = {"input_vectors": InputVectors, "key_values": KeyValues}
"""The forms of a memory by name."""

__all__ = ["FORMS", "GradMemMemory", "InputVectors", "KeyValues", "MemoryForm"]
