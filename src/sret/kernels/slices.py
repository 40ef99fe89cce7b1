"""Cuts a sequence of N tokens into G slices."""

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
