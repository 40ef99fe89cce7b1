"""Replays the gradients of a training step as one CUDA graph, so that no kernel waits for its launch.

A graph repeats kernels with the same addresses. What changes from step to step is therefore copied into memory of its
own before a replay: the inputs here, permutations by `StaticPermuter`. Random numbers of dropout come from the device's
default generator, whose state a replay reads and advances as the kernels would.
"""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from sret.errors import InputError

WARM_UP = 3  # calls before the graph is captured: libraries allocate workspaces and choose kernels in them

Function = Callable[..., tuple[Tensor, ...]]


class Capture(Protocol):
    """Records a call of a function; returns what repeats it, and its outputs, which each repetition overwrites."""

    def __call__(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]: ...


def capture(function: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Records the kernels of a call as a CUDA graph; the call computes nothing yet.

    Raises `InputError` if that fails. The process should then end: CUDA may stay in an undefined state.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # The thread that pins the memory of loaded images goes on; only calls of this thread are recorded or refused.
        with torch.cuda.graph(graph, stream=side_stream(), capture_error_mode="thread_local"):
            outputs = function()
    except RuntimeError as error:
        first = error.__context__ or error  # the end of the capture fails too, and hides why
        reason = textwrap.shorten(str(first), 300)
        raise InputError(f"a step could not be recorded as a CUDA graph ({reason}); set cuda_graph to false") from error
    return graph.replay, outputs


@cache
def side_stream() -> "torch.cuda.Stream":
    """The stream of warm-up calls and of the capture; one for both, since memory is reserved for each stream."""
    return torch.cuda.Stream()


@contextmanager
def on_side_stream() -> Iterator[None]:
    """Within this context kernels are on the side stream, as before a capture; without a GPU it changes nothing."""
    if not torch.cuda.is_available():
        yield
        return
    side_stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream()):
        yield
    torch.cuda.current_stream().wait_stream(side_stream())


class GraphedGradients:
    """Calls a function that computes gradients, after `WARM_UP` calls by replaying a graph of it.

    The function must only start kernels, and compute the gradients of `parameters` anew: they are None before a call.
    Tensors that it returns are overwritten by the next call.

    Args:
        record: `capture`, or another way to repeat a call, for tests.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], record: Capture = capture) -> None:
        self.parameters, self.record = parameters, record
        self.reset()

    def reset(self) -> None:
        """Forgets the graph: the function will compute something else."""
        self.calls = 0
        self.replay: Callable[[], None] | None = None
        self.inputs: tuple[Tensor, ...] = ()
        self.outputs: tuple[Tensor, ...] = ()
        self.gradients: list[Tensor | None] = []

    def __call__(self, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `function` returns for these inputs, whose shapes and dtypes must not change."""
        self.calls += 1
        if self.calls <= WARM_UP:
            with on_side_stream():
                return function(*inputs)
        if self.replay is None:
            self.inputs = tuple(torch.empty_like(x) for x in inputs)
            self.replay, self.outputs = self.record(lambda: function(*self.inputs))
            self.gradients = [parameter.grad for parameter in self.parameters]
        for static, x in zip(self.inputs, inputs, strict=True):
            static.copy_(x)
        self.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.outputs
