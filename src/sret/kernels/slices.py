"""Cuts a sequence of N tokens into G slices."""

from collections.abc import Sequence

from sret.errors import InputError, plural


def slice_lengths(num_tokens: int, num_groups: int) -> list[tuple[int, int]]:
    """Sizes of the slices of a sequence: `[(number of slices, tokens in each), ...]`, one or two entries.

    Lengths differ by at most one token, longer slices first. Raises `InputError` if a slice would be empty.
    """
    if not 1 <= num_groups <= num_tokens:
        tokens = f"{num_tokens} {plural('token', num_tokens)}"
        raise InputError(f"{tokens} cannot form {num_groups} slices; try at most {num_tokens}, or a larger image")
    length, longer = num_tokens // num_groups, num_tokens % num_groups  # divmod does not support traced sizes
    cuts = [(longer, length + 1), (num_groups - longer, length)]
    return [cut for cut in cuts if cut[0]]


def merged_lengths(num_tokens: int, groups: Sequence[int], merge: Sequence[int]) -> list[int]:
    """Tokens before each layer of a stage and after the last, if layer i merges `merge[i]` tokens in each slice.

    Layers beyond the end of `merge` merge none. Raises `InputError` for more than half the tokens of a slice.
    """
    found = [num_tokens]
    for i, num_groups in enumerate(groups):
        r = merge[i] if i < len(merge) else 0
        length = slice_lengths(found[-1], num_groups)[-1][1]
        if r > length // 2:
            raise InputError(
                f"merge {r} in layer {i + 1}, whose slices have {length} {plural('token', length)}, is more than half "
                f"of them; use at most {length // 2}"
            )
        found.append(found[-1] - r * num_groups)
    return found
