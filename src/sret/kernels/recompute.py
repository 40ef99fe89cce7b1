"""Recomputes a chain of steps in backward, so that forward keeps only a few of their inputs.

`sret.kernels.checkpointing` decides which inputs are kept. The chain is a single autograd function, so that the graph
does not grow with its length, and the gradients of shared weights are summed here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from sret.kernels.checkpointing import kept_steps, split
from sret.kernels.conditions import autocast_dtype, is_transformed
from sret.kernels.second_order import RECOMPUTED, first_order


class Chain:
    """Steps that run one after the other.

    Args:
        step: `step(i, x)` computes step i.
        list_weights: lists the weights of each step; called again in backward, to detect replaced weights.
        owner: the module whose mode, training or evaluation, must be the same in backward.
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

    def trainable(self, steps: slice = slice(None)) -> list[nn.Parameter]:
        """The weights of some steps that require a gradient, each once."""
        return _trainable(self.weights[steps])


def _trainable(weights: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
    return list(dict.fromkeys(weight for used in weights for weight in used if weight.requires_grad))


class RNGState:
    """The state of torch's random number generators: of the CPU and of a tensor's device."""

    def __init__(self, x: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = get_device_states(x)

    def current(self, x: Tensor) -> "RNGState":
        """The state now; this object itself if no random number was drawn since."""
        later = RNGState(x)
        same = torch.equal(self.cpu, later.cpu) and all(map(torch.equal, self.devices[1], later.devices[1]))
        return self if same else later

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(*self.devices)


class Recomputation:
    """Runs steps in backward as forward ran them, and sums the gradients of their weights.

    Created in forward. In backward the chain must still have the same weights.
    """

    def __init__(self, chain: Chain, x: Tensor) -> None:
        self.chain, self.weights = chain, chain.trainable()
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.used: set[nn.Parameter] = set()
        self.is_training = chain.owner.training
        self._device, self._dtype = x.device.type, autocast_dtype(x)

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast as it was in forward, without its cache, which would outlive a step."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device, self._dtype, cache_enabled=False)

    @contextmanager
    def backward(self, x: Tensor) -> Iterator[None]:
        """The context of one backward: checks the weights first, and restores the RNG state at the end."""
        now = _trainable(self.chain.list_weights())
        if len(self.weights) != len(now) or any(a is not b for a, b in zip(self.weights, now, strict=True)):
            raise RuntimeError(
                "the weights of a recursion were replaced, frozen or unfrozen between forward and backward, so its "
                "passes cannot be recomputed; use memory 'none'"
            )
        if self.chain.owner.training != self.is_training:
            raise RuntimeError(
                "a recursion was switched between training and evaluation mode after forward, so its recomputed passes "
                "would differ; use memory 'none'"
            )
        # Allocated all at once: allocated between the activations of passes, they would keep the allocator from reusing
        # that memory (1,000 layers then took three times as much).
        self.sums = {weight: torch.zeros_like(weight) for weight in self.weights}
        # Hooks of weights must see the summed gradient, which autograd passes to them after this backward.
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
        """Recomputes step i. Returns its output, and the gradient of x, if wanted, for the output's gradient `grad`."""
        with torch.enable_grad(), self.autocast():
            x = x.detach().requires_grad_(is_wanted)
            y = self.chain.step(i, x)
        weights = self.chain.trainable(slice(i, i + 1))
        if not y.requires_grad:
            return y, None
        self._check_leaves(y, x)
        found = torch.autograd.grad(y, [*weights, *([x] if is_wanted else [])], grad, allow_unused=True)
        self._add(weights, found[: len(weights)])
        return y.detach(), found[-1] if is_wanted else None

    def back(
        self, steps: tuple[int, int], num_kept: int, x: Tensor, rng_state: RNGState, grad: Tensor, is_wanted: bool
    ) -> Tensor | None:
        """The gradient of x, the input of the first of some steps, from that of the input of the step after the last.

        Keeps the inputs of `num_kept` steps. The gradient of the chain's own input is computed if it is wanted.
        """
        start, end = steps
        while end - start > 1:
            middle = start + (split(end - start, num_kept) if num_kept > 1 else end - start - 1)
            rng_state.restore()
            y = x
            with self.autocast():
                for i in range(start, middle):
                    y = self.chain.step(i, y)
            later = self.back((middle, end), num_kept - 1, y, RNGState(y), grad, is_wanted)
            if later is None:
                return None
            end, grad = middle, later
        rng_state.restore()
        return self.step(start, x, grad, is_wanted=start > 0 or is_wanted)[1]

    def _check_leaves(self, y: Tensor, x: Tensor) -> None:
        """Raises `RuntimeError` for a tensor that requires a gradient but is no weight of the recursion."""
        known, seen, left = {id(x), *map(id, self.weights)}, set(), [y.grad_fn]
        while left:
            node = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise RuntimeError(
                    f"a pass uses a tensor of shape {tuple(leaf.shape)} that requires a gradient but is not a "
                    "parameter of the recursion, so it would get none; make it a parameter, or use memory 'none'"
                )
            left += [function for function, _ in node.next_functions]

    def _add(self, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        found = [(w, gradient) for w, gradient in zip(weights, gradients, strict=True) if gradient is not None]
        if found:
            self.used.update(weight for weight, _ in found)
            torch._foreach_add_([self.sums[weight] for weight, _ in found], [gradient for _, gradient in found])

    def gradients(self) -> list[Tensor | None]:
        """The sums, in the order of the weights; None for a weight that no step used.

        Frees the sums: autograd then takes these tensors over, and does not copy them.
        """
        sums, self.sums = self.sums, {}
        return [sums[weight] if weight in self.used else None for weight in self.weights]


def is_recomputable(x: Tensor) -> bool:
    """Whether recomputation is possible: not under torch.func, nor for fake tensors, whose generators have no state."""
    return type(x) in (Tensor, nn.Parameter) and not is_transformed()


@torch.compiler.disable  # a backward that runs forward passes cannot be traced; the steps may be compiled
def recomputed(chain: Chain, num_kept: int, x: Tensor) -> Tensor:
    """The output of the chain; forward keeps the inputs of `num_kept` steps, and backward recomputes the rest.

    Recomputed steps use the random numbers of forward. Backward can run only once.
    """
    return cast(Tensor, _Recomputed.apply(chain, num_kept, x, *chain.trainable()))


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chain: Chain, num_kept: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.recomputation, ctx.num_kept, ctx.kept = Recomputation(chain, x), num_kept, []
        keep, first = set(kept_steps(len(chain), num_kept)), x
        for i in range(len(chain)):
            if i in keep:
                ctx.kept.append((i, x, ctx.kept[-1][2].current(x) if ctx.kept else RNGState(x)))
            x = chain.step(i, x)
        ctx.save_for_backward(first, *weights)  # torch notices if they are changed in place
        return x

    @staticmethod
    @first_order(RECOMPUTED)
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        recomputation, _ = ctx.recomputation, ctx.saved_tensors
        if not ctx.kept:
            raise RuntimeError(SECOND_BACKWARD)

        end = len(recomputation.chain)
        gradient: Tensor | None = grad
        with recomputation.backward(grad):
            while ctx.kept and gradient is not None:
                start, x, rng_state = ctx.kept.pop()
                num_kept = ctx.num_kept - len(ctx.kept)
                gradient = recomputation.back((start, end), num_kept, x, rng_state, gradient, ctx.needs_input_grad[2])
                end = start
        return None, None, gradient, *recomputation.gradients()


SECOND_BACKWARD = "a recursion frees its inputs in backward, so backward cannot run a second time; use memory 'none'"


# truncation ----------------------------------------------------------------------------------------------------------


@torch.compiler.disable
def without_gradient(chain: Chain, num_steps: int, x: Tensor) -> Tensor:
    """Runs the first steps of a chain as if they added a constant: input and output have the same gradient."""
    with torch.no_grad():
        y = x
        for i in range(num_steps):
            y = chain.step(i, y)
    later = set(chain.trainable(slice(num_steps, None)))
    unused = [weight for weight in chain.trainable(slice(num_steps)) if weight not in later]
    return cast(Tensor, _Added.apply(x, y, *unused))


class _Added(torch.autograd.Function):
    """Returns y with the gradient of x. Unused weights get a gradient of zero, with one process as with several."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *unused: Tensor) -> Tensor:
        ctx.save_for_backward(*unused)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, *map(torch.zeros_like, ctx.saved_tensors)
