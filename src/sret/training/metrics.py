"""What happened in the last steps, the same for every process, looked at about once a second.

Reading a number off a GPU makes it wait, and asking all processes costs a message. So losses stay where they are
computed until a look is due; the look names the very step at which one was not finite.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from signal import Signals

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sret.data.dataset import Unreadable
from sret.training.signals import StopRequest

SECONDS_BETWEEN_LOOKS = 1.0
MOST_STEPS_BETWEEN_LOOKS = 50


@dataclass(frozen=True)
class Look:
    """Of the steps since the last look: loss and share of right answers of each; seconds of all; a signal to stop."""

    losses: list[float]
    accuracies: list[float]
    seconds: float
    signal: Signals | None


@dataclass
class Monitor:
    """Gathers the steps of this process between looks; `look` shares them with all processes."""

    accelerator: Accelerator
    unreadable: Unreadable
    stop: StopRequest
    interval: int = 1  # steps; the same in all processes, since they agree on the seconds
    _losses: list[Tensor] = field(default_factory=list)
    _accuracies: list[Tensor] = field(default_factory=list)
    _errors: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)

    def restart(self) -> None:
        """What went by was no step: the clock starts anew."""
        self._started = time.perf_counter()

    def add(self, loss: Tensor, accuracy: Tensor, errors: Iterable[str]) -> None:
        """One step of this process: its mean loss and share of right answers, and images it could not read."""
        self._losses.append(loss)
        self._accuracies.append(accuracy)
        self._errors += [error for error in errors if error]

    def agreed_signal(self) -> Signals | None:
        """The signal that all processes obey, if one of them got one; every process asks at the same time."""
        numbers = torch.tensor(self.stop.as_numbers(), device=self.accelerator.device)
        return StopRequest.from_numbers(*self.accelerator.reduce(numbers, "sum").tolist())

    @property
    def is_due(self) -> bool:
        is_alone = self.accelerator.num_processes == 1
        return len(self._losses) >= self.interval or (is_alone and (self.stop.is_made or bool(self._errors)))

    def look(self) -> Look:
        """Every process calls this after the same steps. Raises `InputError` past the limit of unreadable images."""
        steps = len(self._losses)
        mine = [time.perf_counter() - self._started, len(self._errors), *self.stop.as_numbers()]
        numbers = [*self._losses, *self._accuracies, *torch.tensor(mine, device=self.accelerator.device)]
        *scores, seconds, errors, interrupts, terminations = self.accelerator.reduce(
            torch.stack(numbers), "mean"
        ).tolist()
        if errors:
            self.unreadable.note(gather_object(self._errors), is_quiet=not self.accelerator.is_main_process)
        self.interval = min(MOST_STEPS_BETWEEN_LOOKS, max(1, int(SECONDS_BETWEEN_LOOKS * steps / seconds)))
        self._losses, self._accuracies, self._errors = [], [], []
        self.restart()
        return Look(scores[:steps], scores[steps:], seconds, StopRequest.from_numbers(interrupts, terminations))
