"""A queue for early exit that keeps batches full: newcomers fill the places of the images that left.

Images wait in front of each part of the model. A call of `step` runs one part on a full batch, the deepest part that
has one, so images of different ages share batches. All images of a batch are at the same part. This is exact: passes of
a block share its weights, but each pass has a projection and a number of slices of its own, so that a batch of images
at different passes would have to be divided after each block.

Source of the idea: continuous depth batching of recursive language models, arXiv:2608.09444.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sret.elastic.batches import Waiting, advance, check_evaluates, checked_parts
from sret.elastic.policy import ExitPolicy
from sret.errors import InputError
from sret.models.sret import SReT
from sret.ranges import PositiveInt, check_number


@dataclass(frozen=True)
class Result:
    """The prediction for one image.

    Attributes:
        number: which image, counted from 0 in the order of `submit`.
        logits: (K,).
        exit: the number of the exit, from 0.
    """

    number: int
    logits: Tensor
    exit: int


class Server:
    """Predicts a stream of images with early exit, in full batches.

    Args:
        model: a model with exits, in evaluation mode.
        policy: when images leave.
        batch_size: images per batch. At most twice as many wait in front of each part but the first.

    It is for one thread; several need a server and a copy of the model each. Its weights, passes and mode must not
    change while images wait.

    Raises `InputError` for a model without exits, or in training mode, and for a policy of another model.
    """

    def __init__(self, model: SReT, policy: ExitPolicy, batch_size: int = 256) -> None:
        check_number("batch_size", batch_size, PositiveInt)
        self.model, self.policy, self.batch_size = model, policy, batch_size
        self.submitted = 0
        self._begin()

    @property
    def pending(self) -> int:
        """How many images wait."""
        return sum(map(self._length, range(len(self.parts))))

    def submit(self, images: Tensor) -> range:
        """Adds normalised images (B, in_chans, H, W) of the model's size to the queue; returns their numbers.

        The images are not copied; they must not change until they have left.

        Raises `InputError` for images of another shape, type or device than the model takes, and as `step` does.
        """
        self._check_model()
        wanted = (self.model.in_chans, *self.model.config.input_size)
        if tuple(images.shape[1:]) != wanted:
            sizes = ", ".join(map(str, wanted))
            raise InputError(f"images of shape {tuple(images.shape)}; this server takes (batch, {sizes})")
        weight = self.model.head.weight
        if (images.dtype, images.device) != (weight.dtype, weight.device):
            raise InputError(
                f"images of {images.dtype} on {images.device}; this server takes {weight.dtype} on {weight.device}"
            )
        numbers = range(self.submitted, self.submitted + len(images))
        if len(images):
            self.waiting[0].append(Waiting(images, torch.tensor(numbers, device=images.device), None))
            self.submitted = numbers.stop
        return numbers

    @torch.inference_mode()
    def step(self, is_final: bool = False) -> list[Result]:
        """Runs one part on one batch, and returns the results of the images that left.

        Without a full batch nothing runs, unless `is_final`: then the shallowest part with images runs, because its
        images can join those that wait further on. If an error stops a step, its images stay in the queue.

        Raises `InputError` for a model in training mode, and for passes that the policy does not fit, or that were set
        while images wait.
        """
        self._check_model()
        lengths = [self._length(k) for k in range(len(self.parts))]
        full = [k for k, length in enumerate(lengths) if length >= self.batch_size]
        some = [k for k, length in enumerate(lengths) if length] if is_final else []
        if not (full or some):
            return []
        k = full[-1] if full else some[0]
        taken = Waiting.joined(self.waiting[k])
        batch, rest = taken.of(slice(self.batch_size)), taken.of(slice(self.batch_size, None))
        after, numbers, logits = advance(self.parts, k, batch, self.policy)
        self.waiting[k] = [rest] if len(rest.numbers) else []
        if after is not None:
            self.waiting[k + 1].append(after)
        return [Result(number, row, k) for number, row in zip(numbers.tolist(), logits, strict=True)]

    def predict(self, batches: Iterable[Tensor]) -> Iterator[Result]:
        """Predicts all images of some batches of any sizes; results come in the order in which images leave.

        Images are taken from `batches` as places become free, so that an endless stream needs little memory.
        """
        for images in batches:
            self.submit(images)
            while any(self._length(k) >= self.batch_size for k in range(len(self.parts))):
                yield from self.step()
        while self.pending:
            yield from self.step(is_final=True)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "parts"}  # these are bound to the model

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bind()

    def _check_model(self) -> None:
        """Begins again after the model's passes were set. Raises `InputError` if the model cannot go on."""
        check_evaluates(self.model)
        if self.model.passes != self._passes:
            if self.pending:
                raise InputError(
                    f"the model's passes were set to {self.model.passes} while {self.pending} images wait; set "
                    f"{self._passes} again, and finish these first"
                )
            self._begin()

    def _begin(self) -> None:
        self._bind()
        self.waiting: list[list[Waiting]] = [[] for _ in self.parts]

    def _bind(self) -> None:
        none = torch.empty(0, self.model.in_chans, *self.model.config.input_size)
        self.parts = checked_parts(self.model, none, self.policy)
        self._passes = self.model.passes

    def _length(self, k: int) -> int:
        return sum(len(waiting.numbers) for waiting in self.waiting[k])
