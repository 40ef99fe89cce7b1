"""Makes subclasses with another forward, whose objects can be copied and pickled although no module holds the class."""

from collections.abc import Callable
from typing import Any

from torch import nn

Make = Callable[..., type[nn.Module]]


def subclass(base: type[nn.Module], prefix: str, forward: Callable[..., Any], make: Make) -> type[nn.Module]:
    """A subclass of `base` with this forward.

    Args:
        prefix: of its name.
        make: the function that makes this class of `base`, which a pickled object names.
    """

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _empty, (make, base), vars(self)

    members = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__}
    return type(f"{prefix}{base.__name__}", (base,), members)


def _empty(make: Make, base: type[nn.Module]) -> nn.Module:
    """An object without attributes; its state is set afterwards."""
    kind = make(base)
    return kind.__new__(kind)
