"""What backward keeps of a recursion: everything, some passes' inputs, or less; the rest is computed again.

    none         everything; no pass is computed twice
    pass         the input of every pass
    nested       the inputs of few passes; between them passes are computed again, most of them twice
    reversible   the outputs: a two-stream recursion computes its inputs from them (`sret.layers.reversible`); and the
                 state of the dice, 5 KB, at every turn at which some were cast
    truncated:k  everything of the last k passes of each recursion, and nothing of those before

All but the last give the same gradients. `truncated` is another gradient: that of a recursion whose first passes add
constants to the stream.

`nested` keeps inputs where binomial checkpointing has them, which needs the fewest passes for a number of inputs kept.
Source: Griewank, Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26 (1), 2000. `pass` is
its case of as many inputs as passes.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from sret.errors import InputError, nearest
from sret.layers.context import autocast_dtype, is_transformed

MemoryKind = Literal["none", "pass", "nested", "reversible", "truncated"]
EXACT: tuple[str, ...] = ("none", "pass", "nested", "reversible")

# How often `nested` runs a pass at most before the run that gradients go through, if no budget says otherwise: about
# 1.3 times the time of `pass`, and the square root of twice the number of passes kept.
REPEATS = 2
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class Memory:
    """A policy: its kind, and what belongs to it.

    Attributes:
        passes: for "truncated", the passes of each recursion that gradients go through.
        budget: for "nested", the bytes that all inputs kept in a model may take together; None is the square root.
    """

    kind: MemoryKind = "none"
    passes: int | None = None
    budget: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Memory":
        """The policy of a word: "none", "pass", "nested", "nested:512MiB", "reversible" or "truncated:4".

        Raises `InputError` for any other, with the nearest that there is.
        """
        kind, colon, argument = str(text).partition(":")
        if kind not in get_args(MemoryKind):
            raise InputError(f"memory {text!r} is not a policy; {_POLICIES}{nearest(kind, get_args(MemoryKind))}")
        if kind == "truncated":
            if not re.fullmatch(r"[1-9]\d*", argument):
                raise InputError(f"memory {text!r} needs a number of passes, at least 1, such as 'truncated:4'")
            return cls("truncated", passes=int(argument))
        if kind == "nested" and colon:
            found = re.fullmatch(r"([1-9]\d*) ?(KiB|MiB|GiB)", argument)
            if not found:
                raise InputError(f"memory {text!r} needs a whole number and KiB, MiB or GiB, such as 'nested:512MiB'")
            return cls("nested", budget=int(found[1]) * UNITS[found[2]])
        if colon:
            raise InputError(f"memory {text!r}: {kind!r} stands alone")
        return cls(cast(MemoryKind, kind))

    def slots(self, num_passes: int, num_bytes: int, share: float = 1.0) -> int:
        """How many inputs of `num_bytes` a recursion keeps; `share` of a budget is its own.

        Raises `InputError` if a budget is too small for a number of repetitions that ends.
        """
        if self.kind == "pass":
            return num_passes
        if self.budget is None:
            return fewest_slots(num_passes, REPEATS)
        slots = min(num_passes, int(self.budget * share) // num_bytes)
        least = least_slots(num_passes)
        if slots < least:
            needed = -(-least * num_bytes / share // UNITS["MiB"])
            raise InputError(
                f"memory 'nested:{_size(self.budget)}' holds {slots} inputs of a recursion of {num_passes} passes, "
                f"which needs {least} at least; the nearest that can be is 'nested:{needed:.0f}MiB', or a smaller batch"
            )
        return slots


_POLICIES = "there are 'none', 'pass', 'nested', 'nested:512MiB', 'reversible', 'truncated:4'"


def _size(num_bytes: int) -> str:
    unit = max((u for u in UNITS if num_bytes % UNITS[u] == 0), key=lambda u: UNITS[u])
    return f"{num_bytes // UNITS[unit]}{unit}"


# binomial checkpointing ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def fewest_slots(num_steps: int, repeats: int) -> int:
    """How many inputs must be kept so that no step is computed more than `repeats` times before its last one."""
    slots = 1
    while comb(slots + repeats, repeats) < num_steps:
        slots += 1
    return min(slots, num_steps)


def least_slots(num_passes: int) -> int:
    """What a budget must hold at least: fewer inputs than the logarithm of the passes would take too many repeats."""
    return fewest_slots(num_passes, num_passes.bit_length())


@lru_cache(maxsize=65536)
def split(num_steps: int, slots: int) -> int:
    """After how many of the steps the next input is kept, the first one being kept already.

    With `repeats` the least r for which C(slots + r, r) >= num_steps, both parts can be reversed with the fewest steps.
    """
    repeats = 1
    while comb(slots + repeats, repeats) < num_steps:
        repeats += 1
    # The second part, of one slot less, may be repeated as often; the first, whose steps are run once to get there,
    # once less. A first part shorter than what two repeats less can do would leave the worth of its slots unused.
    longest_second, longest_first = comb(slots + repeats - 1, repeats), comb(slots + repeats - 1, repeats - 1)
    shortest_first = comb(slots + repeats - 2, repeats - 2) if repeats > 1 else 1
    return min(max(num_steps - longest_second, shortest_first), longest_first, num_steps - 1)


def places(num_steps: int, slots: int) -> list[int]:
    """Before which steps the first sweep keeps an input."""
    found, start = [0], 0
    while len(found) < slots and num_steps - start > 1:
        start += split(num_steps - start, slots - len(found) + 1)
        found.append(start)
    return found


# recomputation -------------------------------------------------------------------------------------------------------


class Chain:
    """Steps one after the other.

    Args:
        step: what a step makes of its input.
        list_weights: tells which weights each step uses; asked again in backward, to notice that they are others.
        owner: whose mode, training or evaluation, must be the same in backward.
    """

    def __init__(
        self,
        step: Callable[[int, Tensor], Tensor],
        list_weights: Callable[[], Sequence[Sequence[nn.Parameter]]],
        owner: nn.Module,
    ) -> None:
        self.step, self.list_weights, self.owner = step, list_weights, owner
        self.weights = list_weights()

    def __len__(self) -> int:
        return len(self.weights)

    def trained(self, steps: slice = slice(None)) -> list[nn.Parameter]:
        """The weights of some steps that are trained, each once."""
        return _trained(self.weights[steps])


def _trained(weights: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    return list(dict.fromkeys(weight for used in weights for weight in used if weight.requires_grad))


class Dice:
    """The state of torch's generators, of the CPU and of a tensor's device."""

    def __init__(self, x: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = get_device_states(x)

    def now(self, x: Tensor) -> "Dice":
        """The state now: these dice themselves, if none was cast since."""
        later = Dice(x)
        same = torch.equal(self.cpu, later.cpu) and all(map(torch.equal, self.devices[1], later.devices[1]))
        return self if same else later

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)


class Replay:
    """What a backward needs to run steps once more as forward ran them, and where it collects gradients.

    Made in forward. The weights must still be the chain's in backward.
    """

    def __init__(self, chain: Chain, x: Tensor) -> None:
        self.chain, self.weights = chain, chain.trained()
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.used: set[nn.Parameter] = set()
        self.is_training = chain.owner.training
        self._device, self._dtype = x.device.type, autocast_dtype(x)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it stood in forward, without its cache, which would outlive a step."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, self._dtype, cache_enabled=False)

    @contextmanager
    def started(self, x: Tensor) -> Iterator[None]:
        """Around all of a backward: the weights are compared, and the generators left as they were."""
        now = _trained(self.chain.list_weights())
        if len(self.weights) != len(now) or any(a is not b for a, b in zip(self.weights, now, strict=True)):
            raise RuntimeError(
                "the weights of a recursion were replaced, frozen or freed between forward and backward, so that its "
                "passes cannot be computed again; use memory 'none'"
            )
        if self.chain.owner.training != self.is_training:
            raise RuntimeError(
                "a recursion went from training to evaluation, or back, between forward and backward, so that its "
                "passes would be others when computed again; use memory 'none'"
            )
        # All at once: between the activations of passes they would keep the allocator from using those again (a
        # thousand layers then took three times the memory).
        self.sums = {weight: torch.zeros_like(weight) for weight in self.weights}
        # Hooks of weights are for their whole gradient, which autograd hands them after this backward.
        hooks = [(weight, weight._backward_hooks) for weight in self.weights if weight._backward_hooks]
        for weight, _ in hooks:
            weight._backward_hooks = None
        dice = Dice(x)
        try:
            yield
        finally:
            dice.restore()
            for weight, hook in hooks:
                weight._backward_hooks = hook

    def step(self, i: int, x: Tensor, grad: Tensor, is_wanted: bool = True) -> tuple[Tensor, Tensor | None]:
        """Step i with its gradient: what it answers, and the gradient of x from that of the answer, if wanted."""
        with torch.enable_grad(), self.autocast():
            x = x.detach().requires_grad_(is_wanted)
            y = self.chain.step(i, x)
        weights = self.chain.trained(slice(i, i + 1))
        if not y.requires_grad:
            return y, None
        self._check_leaves(y, x)
        found = torch.autograd.grad(y, [*weights, *([x] if is_wanted else [])], grad, allow_unused=True)
        self._add(weights, found[: len(weights)])
        return y.detach(), found[-1] if is_wanted else None

    def _check_leaves(self, y: Tensor, x: Tensor) -> None:
        """Raises `RuntimeError` for a step on what is no weight of the recursion, which would get no gradient."""
        known, seen, left = {id(x), *map(id, self.weights)}, set(), [y.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise RuntimeError(
                    f"a pass uses a tensor of shape {tuple(leaf.shape)} that wants a gradient and is no parameter of "
                    "the recursion, so that it would get none; make it one, or use memory 'none'"
                )
            left += [function for function, _ in node.next_functions]

    def _add(self, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        found = [(w, gradient) for w, gradient in zip(weights, gradients, strict=True) if gradient is not None]
        if found:
            self.used.update(weight for weight, _ in found)
            torch._foreach_add_([self.sums[weight] for weight, _ in found], [gradient for _, gradient in found])

    def gradients(self) -> list[Tensor | None]:
        """In the order of the weights; None for one that no step has used. They are let go: autograd copies others."""
        sums, self.sums = self.sums, {}
        return [sums[weight] if weight in self.used else None for weight in self.weights]


def is_replayable(x: Tensor) -> bool:
    """Whether computing again makes sense: not for torch.func, nor for fake tensors, whose dice have no state."""
    return type(x) in (Tensor, nn.Parameter) and not is_transformed()


@torch.compiler.disable  # a backward that runs forwards cannot be traced; the steps may be compiled
def recomputed(chain: Chain, slots: int, x: Tensor) -> Tensor:
    """The chain's answer; its backward has kept `slots` inputs of steps, and computes the rest again.

    Dice fall as they fell. It can be differentiated once: neither twice over nor a second time.
    """
    return cast(Tensor, _Recomputed.apply(chain, slots, x, *chain.trained()))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, slots: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.replay, ctx.slots, ctx.kept = Replay(chain, x), slots, []
        keep, first = set(places(len(chain), slots)), x
        for i in range(len(chain)):
            if i in keep:
                ctx.kept.append((i, x, ctx.kept[-1][2].now(x) if ctx.kept else Dice(x)))
            x = chain.step(i, x)
        ctx.save_for_backward(first, *weights)  # torch notices if they are changed in place
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        replay, _ = ctx.replay, ctx.saved_tensors
        if not ctx.kept:
            raise RuntimeError(SPENT)

        def back(start: int, end: int, slots: int, x: Tensor, dice: Dice, grad: Tensor) -> Tensor | None:
            """The gradient of x, the input of step `start`, from that of the input of step `end`."""
            while end - start > 1:
                middle = start + (split(end - start, slots) if slots > 1 else end - start - 1)
                dice.restore()
                y = x
                with replay.autocast():
                    for i in range(start, middle):
                        y = replay.chain.step(i, y)
                later = back(middle, end, slots - 1, y, Dice(y), grad)
                if later is None:
                    return None
                end, grad = middle, later
            dice.restore()
            return replay.step(start, x, grad, is_wanted=start > 0 or ctx.needs_input_grad[2])[1]

        end = len(replay.chain)
        gradient: Tensor | None = grad
        with replay.started(grad):
            while ctx.kept and gradient is not None:
                start, x, dice = ctx.kept.pop()
                gradient = back(start, end, ctx.slots - len(ctx.kept), x, dice, gradient)
                end = start
        return None, None, gradient, *replay.gradients()


SPENT = "a recursion lets go of its inputs in backward, so that it cannot run a second time; use memory 'none'"


# truncation ----------------------------------------------------------------------------------------------------------


@torch.compiler.disable
def without_gradient(chain: Chain, num_steps: int, x: Tensor) -> Tensor:
    """The first steps of a chain, as if they added constants: the gradient of their output is that of their input."""
    with torch.no_grad():
        y = x
        for i in range(num_steps):
            y = chain.step(i, y)
    later = set(chain.trained(slice(num_steps, None)))
    unused = [weight for weight in chain.trained(slice(num_steps)) if weight not in later]
    return cast(Tensor, _Added.apply(x, y, *unused))


class _Added(torch.autograd.Function):
    """y in the place of x. The unused weights have a gradient, zero: one process and several treat them alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *map(torch.zeros_like, ctx.saved_tensors)
