"""Checks timm's augmentation policies, such as "rand-m9-mstd0.5-inc1", and makes their operations safe.

timm ignores an unknown section, so that a misspelt policy would train without it. And its increasing "Posterize" keeps
0 bits at the highest level, which Pillow 13 refuses; before Pillow 13 the image became black.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

from sret.errors import InputError, did_you_mean

_NUMBER = r"\d+(\.\d+)?"
_NOISE = {"mstd0.5": f"mstd{_NUMBER}"}  # more than 100: uniform
# Per kind: an example of each section, and what matches it.
SECTIONS = {
    "rand": {
        "m9": r"m\d+",
        "n2": r"n\d+",
        "p0.5": f"p{_NUMBER}",
        **_NOISE,
        "mmax10": r"mmax\d+",
        "inc1": "inc[01]",
        "tweights": "t(weights|3aw?)",
    },
    "augmix": {
        "m3": r"m\d+",
        "w3": r"w[1-9]\d*",
        "d2": r"d\d+",
        "a1": rf"a(?!0*\.?0*$){_NUMBER}",
        "b1": "b[01]",
        **_NOISE,
    },
    **dict.fromkeys(("v0", "v0r", "original", "originalr", "3a"), _NOISE),
}


def check_policy(policy: str, name: str = "auto_augment") -> None:
    """Raises `InputError` with the nearest known name if timm does not know the policy or one of its sections."""
    kind, *sections = policy.split("-")
    if kind not in SECTIONS:
        raise InputError(
            f"{name} is {policy!r}; no policy is called {kind!r}{did_you_mean(kind, SECTIONS)}; there are "
            f"{', '.join(SECTIONS)}, with options such as rand-m9-mstd0.5-inc1"
        )
    known = SECTIONS[kind]
    for section in sections:
        if not any(re.fullmatch(pattern, section) for pattern in known.values()):
            raise InputError(
                f"{name} is {policy!r}; {kind} has no section {section!r}{did_you_mean(section, known)}; its sections "
                f"are, for example, {', '.join(known)}"
            )


def make_safe(policy: Any) -> Any:
    """Changes a policy's transform: its operations work at every level, and their errors name the operation."""
    for operation in operations(policy):
        if not isinstance(operation.aug_fn, _Named):
            operation.aug_fn = _Named(operation.name, operation.aug_fn)
    return policy


def operations(policy: Any) -> Iterator[Any]:
    """timm's `AugmentOp`s in one of its transforms; none if the transform is not a policy."""
    yield from getattr(policy, "ops", ())
    for operations in getattr(policy, "policy", ()):
        yield from operations


class _Named:
    """An operation of a policy. Raises `InputError` with its name if it fails."""

    def __init__(self, name: str, function: Callable[..., Image.Image]) -> None:
        self.name, self.function = name, function

    def __call__(self, image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
        if self.name.startswith("Posterize") and args[0] < 1:
            return Image.new(image.mode, image.size)
        try:
            return self.function(image, *args, **kwargs)
        except Exception as error:
            raise InputError(f"{self.name}({', '.join(map(str, args))}) failed: {error}") from error
