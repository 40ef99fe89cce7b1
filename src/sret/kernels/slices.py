"""How a sequence of N tokens is cut into G slices."""

from sret.errors import InputError


def slice_lengths(num_tokens: int, num_groups: int) -> list[tuple[int, int]]:
    """How `num_tokens` are cut into `num_groups` slices: `[(slices, tokens in each), ...]`, one or two entries.

    Lengths differ by one token at most, the longer slices come first. Raises `InputError` if a slice would be empty.
    """
    if not 1 <= num_groups <= num_tokens:
        raise InputError(
            f"{num_tokens} token(s) cannot form {num_groups} slices; try at most {num_tokens}, or a larger image"
        )
    length, longer = divmod(num_tokens, num_groups)
    cuts = [(longer, length + 1), (num_groups - longer, length)]
    return [cut for cut in cuts if cut[0]]
