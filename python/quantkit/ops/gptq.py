"""GPTQ: the factor of the Gram matrix, and the sweep that rounds a weight column by column with it.

With g = R R^T, R an upper triangle, the squared error of d = w - q is |d R|^2, whose term c has the columns up to c
only. So each column is rounded to nearest after it has made up for those before it, by d_j R_jc / R_cc each. That is
what GPTQ does with the factor R^-1 of g^-1, without an inverse. R belongs to the input alone: Linears that share an
input share it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from ._library import check_code_range, declare
from .fp4 import E4M3_MAX, FP4_MAX
from .scale import _asymmetric_reference, _check_scale_dtype, _symmetric_reference

_INDEFINITE = "not positive definite"


def _check_factor(g: Tensor, dampening: float) -> None:
    op = "gptq_factor"
    torch._check(
        g.dim() in (2, 3) and g.shape[-1] == g.shape[-2] and g.dtype in (torch.float32, torch.float64),
        lambda: f"quantkit::{op}: g must be float32 [K, K] or [B, K, K], got {g.dtype} {list(g.shape)}",
    )
    torch._check(dampening >= 0, lambda: f"quantkit::{op}: dampening must be >= 0, got {dampening}")


def _factor_fake(g: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    _check_factor(g, dampening)
    return g.new_empty(g.shape), g.new_empty(g.shape[:-1], dtype=torch.bool)


def _factor_reference(g: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    """All of a batch at once; a device is waited for but once, to see whether anything is wrong."""
    _check_factor(g, dampening)
    diagonal = g.diagonal(dim1=-2, dim2=-1)
    unusable = ~(diagonal.isfinite() & (diagonal >= 0))
    dead = diagonal == 0
    h = g.flip(-2, -1)
    if g.shape[-1]:
        damped = h.diagonal(dim1=-2, dim2=-1)
        damped.add_(dampening * diagonal.mean(-1, keepdim=True))
        damped.masked_fill_(damped == 0, 1.0)  # a dead column is tied to no other one: any positive number will do
    lower, info = torch.linalg.cholesky_ex(h)
    if bool(unusable.any() | (info != 0).any()):
        _refuse_factor(g, dampening, unusable, info)
    # With J the reversal, J chol(J H J) J is the upper R with R R^T = H, the inverse of chol(H^-1).
    return lower.flip(-2, -1), dead


def _refuse_factor(g: Tensor, dampening: float, unusable: Tensor, info: Tensor) -> None:
    """Raises for the first matrix that has no factor."""
    for b in range(g.shape[0] if g.dim() == 3 else 1):
        name = f"g[{b}]" if g.dim() == 3 else "g"
        bad, minor = (unusable[b], int(info[b])) if g.dim() == 3 else (unusable, int(info))
        if bool(bad.any()):
            raise RuntimeError(
                f"quantkit::gptq_factor: {int(bad.sum())} of {g.shape[-1]} diagonal elements of {name} are NaN, "
                f"infinite or negative, the first at column {int(bad.nonzero()[0])}: look for NaN in the activations"
            )
        if minor != 0:
            raise LinAlgError(
                f"quantkit::gptq_factor: {name} + {dampening:g} * mean(diag({name})) is {_INDEFINITE} (minor {minor} "
                f"of {g.shape[-1]}): raise the dampening, or give more calibration tokens"
            )


def _check_sweep(
    w: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    g_idx: Tensor | None,
    search_range: float,
    search_steps: int,
    signs: bool = False,
    float_bits: int = 0,
) -> tuple[int, ...]:
    """Shape of the scales; says what is wrong with the arguments in the words of the compiled kernel."""
    op = "gptq_sweep"
    torch._check(
        w.dim() in (2, 3) and w.dtype == torch.float32,
        lambda: f"quantkit::{op}: w must be torch.float32 [rows, K] or [B, rows, K], got {w.dtype} {list(w.shape)}",
    )
    cols = w.shape[-1]
    own = w.dim() == 3 and tuple(factor.shape) == (w.shape[0], cols, cols)
    torch._check(
        (own or tuple(factor.shape) == (cols, cols)) and factor.dtype == w.dtype,
        lambda: (
            f"quantkit::{op}: factor must be torch.float32 [{cols}, {cols}], or as many as w has matrices, "
            f"got {factor.dtype} {list(factor.shape)}"
        ),
    )
    torch._check(
        group_size == -1 or group_size > 0,
        lambda: f"quantkit::{op}: group_size must be positive, or -1 for the whole row, got {group_size}",
    )
    check_code_range(op, q_min, q_max)
    _check_scale_dtype(op, scale_dtype)
    torch._check(
        search_steps >= 0 and 0 <= search_range < 1,
        lambda: (
            f"quantkit::{op}: search_steps must be >= 0 and search_range in [0, 1), "
            f"got {search_steps} and {search_range:g}"
        ),
    )
    torch._check(
        not signs or (symmetric and scale is None and q_min < 0),
        lambda: (
            f"quantkit::{op}: signs are for symmetric codes with a negative q_min, and scales that are computed here"
        ),
    )
    torch._check(
        float_bits in (0, 4, 8),
        lambda: f"quantkit::{op}: float_bits must be 0 (integers), 4 or 8, got {float_bits}",
    )
    torch._check(
        float_bits == 0 or (scale is not None and zero_point is None),
        lambda: f"quantkit::{op}: float_bits go with a given scale and no zero_point",
    )
    size = max(cols, 1) if group_size == -1 else group_size
    shape = (*w.shape[:-1], -(-cols // size))
    if scale is not None:
        torch._check(
            tuple(scale.shape) == shape and scale.dtype == torch.float32,
            lambda: f"quantkit::{op}: scale must be torch.float32 {list(shape)}, got {scale.dtype} {list(scale.shape)}",
        )
    else:
        torch._check(
            zero_point is None and g_idx is None,
            lambda: f"quantkit::{op}: zero_point and g_idx go with a given scale; without one they are computed",
        )
    if zero_point is not None:
        torch._check(
            tuple(zero_point.shape) == shape and zero_point.dtype == torch.int8,
            lambda: f"quantkit::{op}: zero_point must be torch.int8 {list(shape)}",
        )
    if g_idx is not None:
        torch._check(
            tuple(g_idx.shape) == (cols,) and g_idx.dtype == torch.int32,
            lambda: f"quantkit::{op}: g_idx must be torch.int32 [{cols}], got {g_idx.dtype} {list(g_idx.shape)}",
        )
    return shape


def _sweep_fake(
    w: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    g_idx: Tensor | None,
    search_range: float,
    search_steps: int,
    signs: bool = False,
    float_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = _check_sweep(
        w,
        factor,
        scale,
        zero_point,
        group_size,
        q_min,
        q_max,
        symmetric,
        scale_dtype,
        g_idx,
        search_range,
        search_steps,
        signs,
        float_bits,
    )
    without = symmetric if scale is None else zero_point is None
    return (
        w.new_empty(w.shape, dtype=torch.int8),
        w.new_empty(shape),
        w.new_empty((0,) if without else shape, dtype=torch.int8),
        w.new_empty(w.shape[:-1]),
    )


@dataclasses.dataclass(frozen=True)
class _Rounding:
    """How the sweep's reference finds a group's scale, and the codes with it."""

    q_min: int
    q_max: int
    symmetric: bool
    divisor: float
    scale_dtype: torch.dtype
    shrinks: tuple[float, ...]
    signs: bool
    float_bits: int

    def codes(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.float_bits:
            return self._float_values(w * (1.0 / scale))
        # As quantize_int: the inverse of the scale, clamped before it is rounded. Less the zero point.
        return torch.round((w * (1.0 / scale)).clamp(self.q_min - zero, self.q_max - zero))

    def _float_values(self, x: Tensor) -> Tensor:
        mantissa, least, most = (1, 0, FP4_MAX) if self.float_bits == 4 else (3, -6, E4M3_MAX)
        x = x.clamp(-most, most)
        exponent = (torch.frexp(x).exponent - 1).clamp(min=least) - mantissa
        return torch.ldexp(torch.round(torch.ldexp(x, -exponent)), exponent)

    def bytes(self, codes: Tensor, zero: Tensor) -> Tensor:
        """What is stored of `codes`."""
        return codes.to(torch.float8_e4m3fn).view(torch.int8) if self.float_bits else (codes + zero).to(torch.int8)

    def range_scale(self, group: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            scale = _symmetric_reference(group.abs().amax(1) * shrink, self.divisor, self.scale_dtype)
            return scale, torch.zeros_like(scale, dtype=torch.int8)
        low, high = group.amin(1).clamp(max=0.0) * shrink, group.amax(1).clamp(min=0.0) * shrink
        return _asymmetric_reference(low, high, self.q_min, self.q_max, self.scale_dtype)

    def error(self, group: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, in_turn: bool) -> Tensor:
        """Per row, what the group costs: its columns rounded alone, or each after it made up for those before it."""
        scale, zero = scale[:, None], zero[:, None].float()
        if not in_turn:
            rounded = self.codes(group, scale, zero) * scale
            return ((rounded - group) * factor.diagonal()).square().sum(1)
        values, total = group.clone(), group.new_zeros(len(group))
        for c in range(group.shape[1]):
            rounded = self.codes(values[:, c : c + 1], scale, zero) * scale
            total += ((rounded[:, 0] - values[:, c]) * factor[c, c]).square()
            values[:, c + 1 :] += (group[:, c : c + 1] - rounded) * (factor[c, c + 1 :] / factor.diagonal()[c + 1 :])
        return total

    def fit(self, group: Tensor, factor: Tensor, in_turn: bool) -> tuple[Tensor, Tensor]:
        """Scale and zero point per row, of the candidate with the least error, the first of equals."""
        scale, zero = self.range_scale(group, 1.0)
        candidates = [(shrink, sign) for sign in ((1, -1) if self.signs else (1,)) for shrink in self.shrinks]
        if len(candidates) == 1:
            return scale, zero
        best = torch.full_like(scale, torch.inf)
        for shrink, sign in candidates:
            step, offset = self.range_scale(group, shrink)
            step = step * sign
            error = self.error(group, factor, step, offset, in_turn)
            better = error < best
            best = torch.where(better, error, best)
            scale, zero = torch.where(better, step, scale), torch.where(better, offset, zero)
        return scale, zero


def _sweep_one(
    w: Tensor,
    factor: Tensor,
    group_size: int,
    rounding: _Rounding,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor | None,
    fit: bool,
) -> tuple[Tensor, Tensor]:
    """Codes and loss; fills in the scales and zero points if they are to be found."""
    size = w.shape[1] if group_size == -1 else group_size
    codes = torch.empty_like(w, dtype=torch.int8, memory_format=torch.contiguous_format)
    loss = w.new_zeros(w.shape[0])
    before = w.clone()
    for c in range(w.shape[1]):
        g = c // size if g_idx is None else int(g_idx[c])
        if fit and c % size == 0:
            part = slice(c, c + size)
            # What the group's weights would be if none of them were rounded: they make up for one another too.
            moved = (w[:, part] - before[:, part]) * factor.diagonal()[part]
            moved = torch.linalg.solve_triangular(factor[part, part], moved, upper=True, left=False)
            scales[:, g], zeros[:, g] = rounding.fit(before[:, part] + moved, factor[part, part], group_size != -1)
        step, zero = scales[:, g], zeros[:, g].float()
        code = rounding.codes(w[:, c], step, zero)
        codes[:, c] = rounding.bytes(code, zero)
        error = (w[:, c] - code * step) * factor[c, c]
        loss += 0.5 * error * error
        fell = before[:, c] - code * step
        w[:, c + 1 :] += fell[:, None] * (factor[c, c + 1 :] / factor.diagonal()[c + 1 :])
    return codes, loss


def _sweep_reference(
    w: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale_dtype: torch.dtype,
    g_idx: Tensor | None,
    search_range: float,
    search_steps: int,
    signs: bool = False,
    float_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = _check_sweep(
        w,
        factor,
        scale,
        zero_point,
        group_size,
        q_min,
        q_max,
        symmetric,
        scale_dtype,
        g_idx,
        search_range,
        search_steps,
        signs,
        float_bits,
    )
    _check_values(w, g_idx, shape[-1])
    without = symmetric if scale is None else zero_point is None
    shrinks = tuple(1.0 - search_range * i / search_steps if i else 1.0 for i in range(search_steps + 1))
    rounding = _Rounding(q_min, q_max, symmetric, -q_min if signs else divisor, scale_dtype, shrinks, signs, float_bits)
    scales = w.new_empty(shape) if scale is None else scale.clone()
    zeros = torch.zeros(shape, dtype=torch.int8, device=w.device) if zero_point is None else zero_point.clone()
    codes = torch.empty_like(w, dtype=torch.int8, memory_format=torch.contiguous_format)
    loss = w.new_zeros(w.shape[:-1])

    def sweep(w: Tensor, factor: Tensor, scales: Tensor, zeros: Tensor, codes: Tensor, loss: Tensor) -> None:
        found = _sweep_one(w.clone(), factor, group_size, rounding, scales, zeros, g_idx, scale is None)
        codes.copy_(found[0])
        loss.copy_(found[1])

    if w.dim() == 2:
        sweep(w, factor, scales, zeros, codes, loss)
    else:
        for b in range(w.shape[0]):
            sweep(w[b], factor[b] if factor.dim() == 3 else factor, scales[b], zeros[b], codes[b], loss[b])
    if not bool(loss.isfinite().all()):
        raise RuntimeError(
            "quantkit::gptq_sweep: the loss is not finite: factor holds NaN or infinities, or a scale does"
        )
    return codes, scales, w.new_empty((0,), dtype=torch.int8) if without else zeros, loss


def _check_values(w: Tensor, g_idx: Tensor | None, groups: int) -> None:
    if not bool(w.isfinite().all()):
        raise RuntimeError("quantkit::gptq_sweep: w holds NaN or infinities: is the checkpoint damaged?")
    if g_idx is not None and g_idx.numel() and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < groups:
        raise RuntimeError(f"quantkit::gptq_sweep: g_idx must lie in [0, {groups})")


_factor = declare(
    "gptq_factor(Tensor g, float dampening) -> (Tensor, Tensor)",
    fake=_factor_fake,
    reference=_factor_reference,
    kernels=("CPU",),
)
_sweep = declare(
    "gptq_sweep(Tensor w, Tensor factor, Tensor? scale, Tensor? zero_point, int group_size, int q_min, int q_max, "
    "bool symmetric, float divisor, ScalarType scale_dtype, Tensor? g_idx, float search_range, int search_steps, "
    "bool signs=False, int float_bits=0) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_sweep_fake,
    reference=_sweep_reference,
)


def gptq_factor(g: Tensor, dampening: float = 0.01) -> tuple[Tensor, Tensor]:
    """The factor R and the dead columns of a Gram matrix g [K, K], or of one per expert [B, K, K], fp32.

    R is the upper triangle, diagonal positive, with R R^T = g + dampening * mean(diag(g)) * I: all that `gptq_sweep`
    needs, and the inverse of the factor that the paper takes of g^-1. Dead columns, bool [K] or [B, K], are those whose
    input was always zero: nothing ties them to others, so the sweep rounds them to nearest. RuntimeError if g's
    diagonal holds NaN, infinities or negative numbers; torch.linalg.LinAlgError if the damped g is not positive
    definite. fp64 is served too, by the reference; on CUDA that is torch's batched Cholesky (cuSOLVER) and one wait for
    the device.
    """
    if g.dtype == torch.float64:
        return _factor_reference(g, dampening)
    try:
        return _factor(g, dampening)
    except RuntimeError as error:
        if _INDEFINITE in str(error) and not isinstance(error, LinAlgError):
            raise LinAlgError(str(error)) from None  # the compiled kernel knows no such type
        raise


def factor_with_retry(g: Tensor, dampening: float = 0.01, limit: float = 1.0) -> tuple[Tensor, Tensor, float]:
    """`gptq_factor` with ten times the dampening after each failure, up to `limit`: R, dead, the dampening used."""
    while True:
        try:
            return *gptq_factor(g, dampening), dampening
        except LinAlgError:
            if dampening >= limit:
                raise
            dampening = min(max(10.0 * dampening, 1e-4), limit)


def gptq_sweep(
    w: Tensor,
    factor: Tensor,
    *,
    q_min: int = -128,
    q_max: int = 127,
    group_size: int = -1,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    symmetric: bool = True,
    divisor: float = 0.0,
    scale_dtype: torch.dtype = torch.float32,
    g_idx: Tensor | None = None,
    search_range: float = 0.0,
    search_steps: int = 0,
    signs: bool = False,
    float_bits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes int8 [R, K], scale fp32 [R, groups], zero point int8 (empty if symmetric) and loss fp32 [R] of w [R, K].

    w is fp32 and stays as it is; `factor` is `gptq_factor`'s R. Without `scale`, each group of `group_size` columns
    (-1: the row) gets its scale when the sweep reaches it, from the weights as updated by then, like `symmetric_scale`
    with `divisor` or `asymmetric_scale`; the last group may be shorter. With `scale` (and `zero_point`) these are used,
    and `g_idx` int32 [K] names each column's group: for columns in another order, permute w and the factor's g and pass
    it. `loss` is half the squared error of a row under the damped Gram matrix. RuntimeError if w is not finite.

    With `search_steps` n > 0, a scale that is computed here is the best of n + 1: those of the group's range times
    1 - search_range * i / n, i = 0 to n. The best makes the least loss in the group's own columns, each of which makes
    up for those before it; of a whole row (group_size -1), where that would be a sweep for each candidate, the least
    sum of ((w - q) * R_cc)^2 with columns rounded alone. The first of equals wins. `signs` (symmetric codes): the whole
    range is max|w| = -q_min steps instead of `divisor`, and after all positive scales the same ones negated are tried,
    so that either tail of a group may be the one that reaches q_min; scales may then be negative.

    `float_bits` 8 or 4 rounds to the values of FP8 (e4m3fn) or FP4 (e2m1) instead of integers, with a given scale;
    codes are then float8_e4m3fn [R, K], which holds FP4's values, too. q_min and q_max mean nothing there.

    w may also be [B, R, K], say experts of one shape, with a factor [B, K, K], or [K, K] for all of them; all results
    then have B in front.

    Beyond 512 columns a CPU with dot products of bf16 pairs sums what stripes of columns leave to later ones from
    numbers rounded to bf16, an error of 2^-9 in what is itself an error: some codes differ from elsewhere, none worse.
    """
    codes, scales, zeros, loss = _sweep(
        w,
        factor,
        scale,
        zero_point,
        group_size,
        q_min,
        q_max,
        symmetric,
        divisor,
        scale_dtype,
        g_idx,
        search_range,
        search_steps,
        signs,
        float_bits,
    )
    return codes.view(torch.float8_e4m3fn) if float_bits else codes, scales, zeros, loss
