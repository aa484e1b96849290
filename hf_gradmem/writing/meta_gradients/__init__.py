"""Ways back: how the outer loss is differentiated through a step of WRITE."""

from .exact import Exact
from .finite_difference import FiniteDifference
from .first_order import Detached, FirstOrder
from .meta_gradient import MetaGradient

META_GRADIENTS: dict[str, type[MetaGradient]] = {
    "exact": Exact,
    "finite_difference": FiniteDifference,
    "first_order": FirstOrder,
    "none": Detached,
}
"""The ways back by name."""

__all__ = ["META_GRADIENTS", "MetaGradient"]
