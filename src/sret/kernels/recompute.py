"""Recomputation: the gradient of a chain of steps from few kept inputs, by running steps again in backward.

Which inputs are kept says `sret.kernels.checkpointing`. The chain is one function to autograd, so that no graph grows
with its length, and the gradients of shared weights are summed here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from sret.kernels.checkpointing import kept_steps, split
from sret.kernels.conditions import autocast_dtype, is_transformed


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


class RNGState:
    """The state of torch's generators, of the CPU and of a tensor's device."""

    def __init__(self, x: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = get_device_states(x)

    def current(self, x: Tensor) -> "RNGState":
        """The state now: this object itself, if nothing was drawn since."""
        later = RNGState(x)
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
        rng_state = RNGState(x)
        try:
            yield
        finally:
            rng_state.restore()
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
    """Whether computing again makes sense: not for torch.func, nor for fake tensors, whose generators have no state."""
    return type(x) in (Tensor, nn.Parameter) and not is_transformed()


@torch.compiler.disable  # a backward that runs forwards cannot be traced; the steps may be compiled
def recomputed(chain: Chain, num_kept: int, x: Tensor) -> Tensor:
    """The chain's answer; its backward has kept `num_kept` inputs of steps, and computes the rest again.

    Random numbers are drawn as they were in forward. It can be differentiated only once.
    """
    return cast(Tensor, _Recomputed.apply(chain, num_kept, x, *chain.trained()))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, num_kept: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.replay, ctx.num_kept, ctx.kept = Replay(chain, x), num_kept, []
        keep, first = set(kept_steps(len(chain), num_kept)), x
        for i in range(len(chain)):
            if i in keep:
                ctx.kept.append((i, x, ctx.kept[-1][2].current(x) if ctx.kept else RNGState(x)))
            x = chain.step(i, x)
        ctx.save_for_backward(first, *weights)  # torch notices if they are changed in place
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        replay, _ = ctx.replay, ctx.saved_tensors
        if not ctx.kept:
            raise RuntimeError(SPENT)

        def back(start: int, end: int, num_kept: int, x: Tensor, rng_state: RNGState, grad: Tensor) -> Tensor | None:
            """The gradient of x, the input of step `start`, from that of the input of step `end`."""
            while end - start > 1:
                middle = start + (split(end - start, num_kept) if num_kept > 1 else end - start - 1)
                rng_state.restore()
                y = x
                with replay.autocast():
                    for i in range(start, middle):
                        y = replay.chain.step(i, y)
                later = back(middle, end, num_kept - 1, y, RNGState(y), grad)
                if later is None:
                    return None
                end, grad = middle, later
            rng_state.restore()
            return replay.step(start, x, grad, is_wanted=start > 0 or ctx.needs_input_grad[2])[1]

        end = len(replay.chain)
        gradient: Tensor | None = grad
        with replay.started(grad):
            while ctx.kept and gradient is not None:
                start, x, rng_state = ctx.kept.pop()
                gradient = back(start, end, ctx.num_kept - len(ctx.kept), x, rng_state, gradient)
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
