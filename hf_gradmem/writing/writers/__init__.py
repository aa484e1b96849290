"""How a context becomes a memory."""

from .forward import ForwardWriter
from .gradient import GradientWriter
from .pooled import PooledWriter
from .writer import Descent, Kept, Writer, WriteTrace

WRITERS: dict[str, type[Writer]] = {"gradient": GradientWriter, "forward": ForwardWriter, "pooled": PooledWriter}
"""The writers by name."""

__all__ = ["WRITERS", "Descent", "Kept", "WriteTrace", "Writer"]
