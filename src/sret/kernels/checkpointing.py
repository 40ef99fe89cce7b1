"""Activation checkpointing policies: what forward keeps of a recursion, and which passes backward recomputes.

    none         keeps everything; recomputes nothing
    pass         keeps the input of every pass; recomputes each pass once
    nested       keeps the inputs of about the square root of the passes; recomputes most passes twice
    reversible   keeps the outputs: a two-stream recursion computes its inputs from them (`sret.layers.reversible`)
    truncated:k  keeps everything of the last k passes of each recursion, and nothing of the earlier ones

All policies but `truncated` give the same gradients. `truncated` gives another gradient: it treats what the earlier
passes add to the stream as constant.

`nested` chooses the inputs by binomial checkpointing, which recomputes the fewest passes for a given number of kept
inputs. Source: Griewank, Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26 (1), 2000.
`pass` is the case with as many kept inputs as passes.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from math import comb

from sret.errors import InputError, did_you_mean

EXACT = ("none", "pass", "nested", "reversible")
KINDS = (*EXACT, "truncated")

# Under `nested`, at most so many runs of a pass, the one in forward included, before the run that gradients flow
# through. With 2 a step takes about 1.3 times as long as with `pass`, and keeps sqrt(2 x passes) inputs.
REPEATS = 2


@dataclass(frozen=True)
class CheckpointPolicy:
    """What forward keeps of a recursion for backward.

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
            is_reversible: whether the model has two streams.

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
                "memory 'reversible' needs a two-stream model, which is another architecture: set reversible to true, "
                "or use 'nested', which keeps the least in a one-stream model"
            )
        if is_reversible and kind not in ("none", "reversible"):
            raise InputError(
                f"memory {text!r} is for one-stream models; with reversible=true set memory to 'reversible' or 'none'"
            )
        return cls(kind, int(argument) if argument else None)

    def num_kept(self, num_passes: int) -> int:
        """How many inputs a recursion keeps under "pass" or "nested"."""
        return num_passes if self.kind == "pass" else min_kept(num_passes, REPEATS)


@lru_cache(maxsize=1024)
def min_kept(num_steps: int, repeats: int) -> int:
    """The least number of kept inputs with which no step runs more than `repeats` times before its last run."""
    kept = 1
    while comb(kept + repeats, repeats) < num_steps:
        kept += 1
    return min(kept, num_steps)


@lru_cache(maxsize=65536)
def split(num_steps: int, num_kept: int) -> int:
    """The number of steps from the first input, which is kept already, to the next input to keep.

    Let `repeats` be the least r with C(num_kept + r, r) >= num_steps. The split is one for which the fewest steps are
    recomputed in both parts.
    """
    repeats = 1
    while comb(num_kept + repeats, repeats) < num_steps:
        repeats += 1
    # The second part has one input less and may be repeated as often. The first part may be repeated once less, because
    # its steps run once to reach the second. If it were shorter than two repeats less allow, inputs would be unused.
    longest_second, longest_first = comb(num_kept + repeats - 1, repeats), comb(num_kept + repeats - 1, repeats - 1)
    shortest_first = comb(num_kept + repeats - 2, repeats - 2) if repeats > 1 else 1
    return min(max(num_steps - longest_second, shortest_first), longest_first, num_steps - 1)


def kept_steps(num_steps: int, num_kept: int) -> list[int]:
    """The indices of the steps whose inputs forward keeps."""
    found, start = [0], 0
    while len(found) < num_kept and num_steps - start > 1:
        start += split(num_steps - start, num_kept - len(found) + 1)
        found.append(start)
    return found
