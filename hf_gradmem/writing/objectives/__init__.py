"""What WRITE descends on, as a function of the memory."""

from .objective import Objective
from .reconstruction import ReconstructionObjective

OBJECTIVES: dict[str, type[Objective]] = {"reconstruction": ReconstructionObjective}
"""The objectives of WRITE by name."""

__all__ = ["OBJECTIVES", "Objective", "ReconstructionObjective"]
