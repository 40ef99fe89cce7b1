"""Early exit: images leave a model as soon as a prediction is good enough."""

from sret.elastic.batches import EarlyExit, predict_with_exits
from sret.elastic.policy import ExitPolicy
from sret.elastic.server import Result, Server

__all__ = ["EarlyExit", "ExitPolicy", "Result", "Server", "predict_with_exits"]
