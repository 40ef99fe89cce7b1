"""Activation checkpointing: which inputs of passes are kept for backward, and which passes are computed again.

    none         everything is kept; no pass is computed twice
    pass         the input of every pass
    nested       the inputs of about the square root of the passes; most other passes are computed twice
    reversible   the outputs: a two-stream recursion computes its inputs from them (`sret.layers.reversible`)
    truncated:k  everything of the last k passes of each recursion, and nothing of those before

All but the last give the same gradients. `truncated` is another gradient: that of a recursion whose first passes add
constants to the stream.

`nested` keeps inputs where binomial checkpointing places them, which needs the fewest passes for a number of inputs
kept. Source: Griewank, Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26 (1), 2000.
`pass` is its case of as many inputs as passes.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from sret.errors import InputError, did_you_mean

EXACT = ("none", "pass", "nested", "reversible")
KINDS = (*EXACT, "truncated")

# How often `nested` runs a pass at most before the run that gradients flow through: about 1.3 times the time of `pass`,
# for the square root of twice the number of passes in inputs kept.
REPEATS = 2


@dataclass(frozen=True)
class CheckpointPolicy:
    """What backward keeps of a recursion.

    Attributes:
        kind: one of `KINDS`.
        passes: for "truncated", the passes of each recursion that gradients flow through.
    """

    kind: str = "none"
    passes: int | None = None

    @classmethod
    def parse(cls, text: str, is_reversible: bool = False) -> "CheckpointPolicy":
        """The policy that `text` names: "none", "pass", "nested", "reversible" or "truncated:4".

        Args:
            is_reversible: whether it is for a model of two streams.

        Raises `InputError` for any other text, and for a policy that does not fit the model.
        """
        kind, _, argument = str(text).partition(":")
        if kind not in KINDS:
            raise InputError(
                f"memory {text!r} is not a policy; use none, pass, nested, reversible or truncated:4"
                f"{did_you_mean(kind, KINDS)}"
            )
        if kind == "truncated" and not re.fullmatch(r"[1-9]\d*", argument):
            raise InputError(f"memory {text!r} needs a number of passes, at least 1, such as 'truncated:4'")
        if kind != "truncated" and str(text) != kind:
            raise InputError(f"memory {text!r}: {kind!r} takes no argument")
        if kind == "reversible" and not is_reversible:
            raise InputError(
                "memory 'reversible' needs a model of two streams, which is another architecture: set reversible to "
                "true, or use 'nested', which keeps least for one stream"
            )
        if is_reversible and kind not in ("none", "reversible"):
            raise InputError(
                f"memory {text!r} is for models of one stream; with reversible=true set memory to 'reversible' or "
                "'none'"
            )
        return cls(kind, int(argument) if argument else None)

    def num_kept(self, num_passes: int) -> int:
        """How many inputs a recursion keeps under "pass" or "nested"."""
        return num_passes if self.kind == "pass" else fewest_kept(num_passes, REPEATS)


@lru_cache(maxsize=1024)
def fewest_kept(num_steps: int, repeats: int) -> int:
    """How many inputs must be kept so that no step is computed more than `repeats` times before its last run."""
    kept = 1
    while comb(kept + repeats, repeats) < num_steps:
        kept += 1
    return min(kept, num_steps)


@lru_cache(maxsize=65536)
def split(num_steps: int, num_kept: int) -> int:
    """After how many of the steps the next input is kept, the first one being kept already.

    With `repeats` the least r for which C(num_kept + r, r) >= num_steps, both parts can be reversed with the fewest
    steps.
    """
    repeats = 1
    while comb(num_kept + repeats, repeats) < num_steps:
        repeats += 1
    # The second part, which has one input less, may be repeated as often; the first, whose steps are run once to get
    # there, once less. A first part shorter than what two repeats less can do would waste its inputs.
    longest_second, longest_first = comb(num_kept + repeats - 1, repeats), comb(num_kept + repeats - 1, repeats - 1)
    shortest_first = comb(num_kept + repeats - 2, repeats - 2) if repeats > 1 else 1
    return min(max(num_steps - longest_second, shortest_first), longest_first, num_steps - 1)


def kept_steps(num_steps: int, num_kept: int) -> list[int]:
    """The steps whose inputs the first sweep keeps."""
    found, start = [0], 0
    while len(found) < num_kept and num_steps - start > 1:
        start += split(num_steps - start, num_kept - len(found) + 1)
        found.append(start)
    return found
