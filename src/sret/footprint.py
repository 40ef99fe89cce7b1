"""How much memory a step of training takes, measured on one pass of each stage.

    peak = max over recursions r of  ( kept before r  +  kept by r  +  work of one pass of r )

    kept by a recursion of R passes:  none: all of R passes     pass: R inputs     nested: fewer inputs
                                      reversible: two streams   truncated:k: all of k passes

None of these numbers is guessed: a thin model of the same parts runs forward and backward, piece by piece, at a few
batch sizes, while every tensor that comes into being is counted until it is freed. What kernels take for themselves is
not seen, nor what an allocator leaves between tensors, which for small models and lean policies may be as much again.
"""

import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sret.config import ModelConfig
from sret.layers import Recursion
from sret.layers.memory import Memory
from sret.model import SReT, Stage
from sret.optim import make_optimizer
from sret.recipe import TrainConfig

Precision = Callable[[], AbstractContextManager[Any]]  # such as an accelerator's autocast

FEW, MANY = 2, (8, 32)  # pictures that are tried: of few, weights take the most; BatchNorm needs more than one value


class Live(TorchDispatchMode):
    """Within this context the bytes of all tensors made since its beginning: those alive `now`, and their `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), is_new=False)  # what was there before, such as a weight whose view is taken
        answer = func(*args, **(kwargs or {}))
        self._note(answer, is_new=True)
        return answer

    def _note(self, tree: Any, is_new: bool) -> None:
        for x in tree_leaves(tree):
            if isinstance(x, Tensor) and (key := (storage := x.untyped_storage())._cdata) not in self._known:
                num_bytes = storage.nbytes() if is_new else 0
                self._known.add(key)
                self.now += num_bytes
                weakref.finalize(storage, self._free, key, num_bytes)
        self.peak = max(self.peak, self.now)

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


class Curve(NamedTuple):
    """Bytes as a function of the pictures in a batch: measured ones, and straight lines through neighbours.

    A peak is the largest of several sums, each a line, so that the curve can only bend upwards: the highest line is it.
    """

    batches: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, batch: int) -> float:
        lines = pairwise(zip(self.batches, self.sizes, strict=True))
        return max(y0 + (y1 - y0) * (batch - x0) / (x1 - x0) for (x0, y0), (x1, y1) in lines)


class Piece(NamedTuple):
    """What a piece of a model keeps for backward, its answer included, and the peak of its forward and backward."""

    kept: Curve
    work: Curve


def thinned(model: SReT) -> SReT:
    """A new model with the parts of this one: one block for a stage, one pass for each number of slices, one more.

    `model` may be sharded, compiled or listened to, and is left alone.
    """
    stages = []
    for stage in model.config.stages:
        kinds = tuple(dict.fromkeys(stage.groups))
        stages.append(replace(stage, num_blocks=1, groups=(*kinds, kinds[0])[: stage.num_passes]))
    thin = SReT(replace(model.config, stages=tuple(stages), memory=leanest(model.config)))
    for name, parameter in thin.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return thin


def measure(thin: SReT, batch: int, autocast: Precision = nullcontext) -> dict[Any, Piece]:
    """The pieces of a model: "stem", (stage, "pool"), (stage, "input"), (stage, kind of memory, slices), "head".

    `batch` is the largest that is tried, if it is not larger than others that tell enough.
    """
    batches = tuple(sorted({FEW, *(min(max(batch, 2 * FEW), many) for many in MANY)}))
    runs = [_run(thin, n, autocast) for n in batches]
    return {key: Piece(*(Curve(batches, y) for y in zip(*(r[key] for r in runs), strict=True))) for key in runs[0]}


def _run(thin: SReT, batch: int, autocast: Precision) -> dict[Any, tuple[int, int]]:
    """(bytes kept, bytes at the peak) of each piece."""
    found: dict[Any, tuple[int, int]] = {}
    device = thin.pos_embed.weight.device

    def run(key: Any, piece: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with Live() as live:
            with autocast():
                y = piece(x)
            kept = live.now
            if y.requires_grad:
                y.backward(torch.ones_like(y))
        found[key] = (kept, live.peak)
        thin.zero_grad()
        return y.detach().requires_grad_(y.requires_grad)

    shape = (batch, thin.in_chans, *thin.config.input_size)
    x = run("stem", lambda _: thin.pos_embed(thin.stem(torch.zeros(shape, device=device))), torch.empty(0))
    for i, (stage, (H, W)) in enumerate(zip(thin.stages, thin.config.grids(), strict=True)):
        assert isinstance(stage, Stage)
        x = run((i, "pool"), lambda x, stage=stage: stage.tokens(x)[0], x)  # type: ignore[misc]
        found[i, "input"] = (x.nbytes, x.nbytes)
        (recursion,) = stage.recursions
        assert isinstance(recursion, Recursion)
        for j, num_groups in enumerate(recursion.groups):
            one = type(recursion)(recursion.block, (num_groups,), [recursion.projections[j]])
            drawn = thin.permuter(H * W, num_groups, device, is_training=True) if recursion.is_permuted(j) else None
            for kind in ("none", leanest(thin.config)):
                one.memory = Memory.parse(kind)
                y = run((i, kind, num_groups), lambda x, one=one, drawn=drawn: one(x, [drawn]), x)  # type: ignore[misc]
        x = y.transpose(1, 2).unflatten(2, (H, W)).detach().requires_grad_(y.requires_grad)
    run("head", thin.forward_head, x)
    return found


def leanest(config: ModelConfig) -> str:
    """The kind of memory that keeps least of one pass."""
    return "reversible" if config.reversible else "nested"


def needed(model: SReT, pieces: Mapping[Any, Piece], policy: str, batch: int) -> float:
    """Bytes that forward and backward of a batch take at their peak, under a policy of memory."""
    memory, lean = Memory.parse(policy), leanest(model.config)
    held = peak = 0.0

    def step(kept: float, work: float) -> None:
        nonlocal held, peak
        held += kept
        peak = max(peak, held + work)

    def whole(piece: Piece) -> None:
        step(piece.kept(batch), piece.work(batch) - piece.kept(batch))

    whole(pieces["stem"])
    for i, stage in enumerate(model.stages):
        assert isinstance(stage, Stage)
        whole(pieces[i, "pool"])
        for recursion in stage.recursions:
            assert isinstance(recursion, Recursion)
            kind = "none" if memory.kind in ("none", "truncated") else lean
            passes = [pieces[i, kind, num_groups] for num_groups in recursion.groups[-(memory.passes or 0) :]]
            kept = [piece.kept(batch) for piece in passes]
            work = max(piece.work(batch) - piece.kept(batch) for piece in passes)
            if kind == "none":
                step(sum(kept), work)
            elif kind == "reversible":
                step(max(kept), work)
            else:
                size = pieces[i, "input"].kept(batch)
                step(memory.slots(len(passes), int(size), recursion.memory_share) * size, work + max(kept))
    whole(pieces["head"])
    return peak


def state_per_byte(thin: SReT, config: TrainConfig) -> float:
    """Bytes that the optimizer takes in its first step, most of which it keeps, for each byte that is trained."""
    trained = [parameter for parameter in thin.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(thin, config)
    with Live() as live:
        optimizer.step()
    thin.zero_grad()
    return live.peak / sum(parameter.nbytes for parameter in trained)
