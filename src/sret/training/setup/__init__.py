"""Creates the objects of a training run before its first step: data, model, optimizer, teacher."""

from sret.training.setup.create import prepare
from sret.training.setup.model import EveryExit, fitting_model
from sret.training.setup.objects import Setup

__all__ = ["EveryExit", "Setup", "fitting_model", "prepare"]
