"""Token permutations: later passes slice the tokens in another order, so that slices exchange information.

Source: Shen, Liu, Xing, "Sliced Recursive Transformer", ECCV 2022, arXiv:2111.05297, permutation and its inverse
around sliced self-attention. The whole batch shares one permutation.

Deviation: the authors draw from the global generator in evaluation too, so that their logits change from call to call.
Here evaluation uses one fixed permutation per sequence length, the same on every machine. Training draws them from
torch's generator, as dropout does; or, if a seed is set, number k from a generator seeded by (seed, k), which makes a
run reproducible and its state two integers (`sret train` does so).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sret.errors import InputError


class Permutation(Protocol):
    """A reordering of tokens and its inverse: `undo(apply(x))` is `x`."""

    def apply(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), reordered."""
        ...

    def undo(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C), in the original order again."""
        ...


def invert(index: Tensor) -> Tensor:
    """(N,) int64 -> (N,) int64: the permutation that undoes `index`."""
    return torch.empty_like(index).scatter_(0, index, torch.arange(index.numel(), device=index.device))


@dataclass(frozen=True)
class IndexPermutation:
    """Any order of the tokens: position i receives token `index[i]`; `index` is (N,) int64.

    `inverse`, also (N,) int64, undoes it; it is computed if it is None.
    """

    index: Tensor
    inverse: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)

    def undo(self, x: Tensor) -> Tensor:
        return x.index_select(1, invert(self.index) if self.inverse is None else self.inverse)


@dataclass(frozen=True)
class StridedPermutation:
    """Slice g receives tokens g, g + G, g + 2G, ...

    If G divides N, `AttentionResidual` takes a view instead of calling these methods. If not, the first N mod G slices
    hold one more token, as in `SlicedAttention`.
    """

    num_groups: int

    def apply(self, x: Tensor) -> Tensor:
        return self._indices(x).apply(x)

    def undo(self, x: Tensor) -> Tensor:
        return self._indices(x).undo(x)

    def _indices(self, x: Tensor) -> IndexPermutation:
        N, G = x.shape[1], self.num_groups
        return IndexPermutation(torch.cat([torch.arange(g, N, G, device=x.device) for g in range(G)]))


def fixed_permutation(num_tokens: int, device: torch.device | str | None = None) -> Tensor:
    """(N,) int64: the permutation that evaluation uses for this many tokens.

    Positions are ordered by a 32-bit mixing hash of their number. The hash is one-to-one, so no two keys tie, and it
    is plain integer arithmetic, so the order is the same on every device, machine and version, traced or not.
    """
    if torch.compiler.is_exporting() and isinstance(num_tokens, int):  # a constant of the exported graph
        return torch.tensor(sorted(range(num_tokens), key=lambda i: _mixed(i + 1)), device=device)
    return _mixed(torch.arange(1, num_tokens + 1, device=device)).argsort()


def _mixed(key: Any) -> Any:
    """The hash of 32-bit integers: of one, or of a tensor of them."""
    for _ in range(2):
        key = ((key ^ (key >> 16)) * 0x45D9F3B) & 0xFFFFFFFF  # an odd multiplier: one-to-one modulo 2^32
    return key ^ (key >> 16)


class Permuter:
    """Gives each pass its permutation: a new random one in training, a fixed one in evaluation.

    Its state is `seed` and `count`, the number of permutations drawn so far (`state_dict`, `load_state_dict`). Equal
    states give equal permutations on one type of device, so all processes of a distributed run use the same ones (a CPU
    and a GPU draw different ones).

    Without a seed, permutations come from torch's global generator of the device: they obey `torch.manual_seed`, and
    are repeated by what saves or restores its state, such as `torch.utils.checkpoint` and accelerate's `save_state`.
    """

    def __init__(self, kind: str = "random", seed: int | None = 0) -> None:
        self.kind = kind
        self.seed = seed
        self.count = 0

    def __call__(self, num_tokens: int, num_groups: int, device: torch.device, *, is_training: bool) -> Permutation:
        """The permutation of the next pass, on `device`. Raises `InputError` if `replay` has none that fits."""
        if _replayed is not None:
            return IndexPermutation(_next_replayed(_replayed, num_tokens, device))
        if self.kind == "strided":
            return StridedPermutation(num_groups)
        if is_training:
            return IndexPermutation(self._draw(num_tokens, device))
        return IndexPermutation(fixed_permutation(num_tokens, device))

    @torch.compiler.disable  # a seeded generator cannot be traced; its result can be used by traced code
    def _draw(self, num_tokens: int, device: torch.device) -> Tensor:
        if self.seed is None:
            self.count += 1
            return torch.randperm(num_tokens, device=device)
        # Large odd factors spread neighbouring seeds and counts over all non-negative int64.
        seed = (self.seed * 0x9E3779B97F4A7C15 + self.count * 0xD1B54A32D192ED03) & (2**63 - 1)
        self.count += 1
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randperm(num_tokens, generator=generator, device=device)

    def state_dict(self) -> dict[str, int | None]:
        return {"seed": self.seed, "count": self.count}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        self.seed, self.count = state["seed"], state["count"] or 0


class StaticPermuter(Permuter):
    """A permuter whose permutations of training stay at one place in memory, as a CUDA graph needs.

    `load_state_dict` draws as many as were used after the last one, into the same memory: those that a `Permuter` with
    this state would draw one after the other.
    """

    def __init__(self, permuter: Permuter) -> None:
        super().__init__(permuter.kind, permuter.seed)
        self._drawn: list[Tensor] = []
        self._used = 0

    def forget(self) -> None:
        """The next passes may be other ones, with other numbers of tokens."""
        self._drawn = []

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        super().load_state_dict(state)
        self._used = 0
        for index in self._drawn:
            index.copy_(super()._draw(len(index), index.device))

    def _draw(self, num_tokens: int, device: torch.device) -> Tensor:
        if self._used == len(self._drawn):
            self._drawn.append(super()._draw(num_tokens, device))
        self._used += 1
        return self._drawn[self._used - 1]


class CachedPermuter(Permuter):
    """A permuter for inference: caches the fixed permutation of each number of tokens and slices."""

    MAX_CACHED = 64

    def __init__(self, kind: str = "random") -> None:
        super().__init__(kind)
        self._cache: dict[tuple[int, int, torch.device], Permutation] = {}

    def __call__(self, num_tokens: int, num_groups: int, device: torch.device, *, is_training: bool) -> Permutation:
        """The permutation of evaluation, in training mode too."""
        if _replayed is not None:
            return super().__call__(num_tokens, num_groups, device, is_training=False)
        key = num_tokens, num_groups, device
        permutation = self._cache.get(key)
        if permutation is None:
            if len(self._cache) == self.MAX_CACHED:
                self._cache.clear()
            with torch.inference_mode(False):  # it may be used later where gradients are computed
                permutation = super().__call__(num_tokens, num_groups, device, is_training=False)
                if isinstance(permutation, IndexPermutation):
                    permutation = IndexPermutation(permutation.index, invert(permutation.index))
            self._cache[key] = permutation
        return permutation


_replayed: list[Tensor] | None = None


@contextmanager
def replay(permutations: Sequence[Tensor]) -> Iterator[None]:
    """Within this context every model takes its permutations from this list, (N,) int64 each, in the order of use.

    Raises `InputError` when the list runs out, when one has the wrong length, or when some are left at the end.
    """
    global _replayed
    outer, _replayed = _replayed, list(permutations)
    try:
        yield
        if _replayed:
            raise InputError(f"{len(_replayed)} of {len(permutations)} replayed permutations were not used")
    finally:
        _replayed = outer


def _next_replayed(queue: list[Tensor], num_tokens: int, device: torch.device) -> Tensor:
    if not queue:
        raise InputError(f"the replayed permutations ran out at a pass over {num_tokens} tokens; give one per pass")
    index = queue.pop(0)
    if index.numel() != num_tokens:
        raise InputError(f"the next replayed permutation has {index.numel()} tokens, but the pass has {num_tokens}")
    return index.to(device)
