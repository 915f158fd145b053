"""Symmetric matrices in half the room: LAPACK's rectangular full packed format (Gustavson et al., 2010).

Of a matrix [n, n] the left half of the lower triangle stands where it is, and the right half's, turned, in the place of
what is missing above it. Nothing but the triangle is stored, so what is read back is symmetric whatever the file holds.
"""

from __future__ import annotations

from torch import Tensor


def packed_shape(n: int) -> tuple[int, int]:
    """Of a packed matrix [n, n]: n (n + 1) / 2 numbers."""
    return (n + 1, n // 2) if n % 2 == 0 else (n, (n + 1) // 2)


def pack(matrix: Tensor) -> Tensor:
    """The lower triangle of `matrix` [n, n], as a new tensor."""
    n = len(matrix)
    rows, half = packed_shape(n)
    packed = matrix.new_empty(rows, half)
    packed[rows - n :] = matrix[:, :half]
    corner = _corner(packed, n)
    corner.copy_(corner.tril(-1) + matrix[half:, half:].triu())
    return packed


def unpack(packed: Tensor, n: int) -> Tensor:
    """The matrix [n, n] of which `packed` is the half."""
    rows, half = packed_shape(n)
    left, corner = packed[rows - n :], _corner(packed, n)
    matrix = packed.new_empty(n, n)
    top = left[:half].tril()
    matrix[:half, :half] = top + top.tril(-1).T
    matrix[half:, :half] = left[half:]
    matrix[:half, half:] = left[half:].T
    rest = corner.triu()
    matrix[half:, half:] = rest + rest.triu(1).T
    return matrix


def _corner(packed: Tensor, n: int) -> Tensor:
    """The square whose upper triangle is the right half's; below its diagonal is the left half."""
    rows, half = packed_shape(n)
    return packed[: n - half, 1 - (rows - n) :]
