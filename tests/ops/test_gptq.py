"""gptq_factor, factor_with_retry and gptq_sweep against the textbook in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit.ops as ops

from .cpu_cases import check_refused

# Not 7.5 and 127.5, which would put the largest weight of every group on a tie.
RANGES = {4: (-8, 7, 7.3), 8: (-128, 127, 127.3)}


def problem(rows: int, cols: int, dead: bool = False) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    x = torch.randn(3 * cols + 8, cols, generator=generator) @ mix
    if dead:
        x[:, :: max(cols // 3, 1)] = 0.0
    g = x.T @ x
    return torch.randn(rows, cols, generator=generator), (g + g.T) / 2


def textbook_factor(g: Tensor, dampening: float) -> Tensor:
    h = g.double()
    h = h + dampening * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def textbook(
    w: Tensor,
    u: Tensor,
    group_size: int,
    q_min: int,
    q_max: int,
    symmetric: bool,
    divisor: float,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    g_idx: Tensor | None = None,
    shrinks: tuple[float, ...] = (1.0,),
    signs: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, zero points, loss, and how far each weight was from a tie, all in fp64."""

    def range_scale(group: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
        if symmetric:
            found = group.abs().amax(1) * shrink / divisor
            return found, torch.zeros_like(found)
        low, high = group.amin(1).clamp(max=0) * shrink, group.amax(1).clamp(min=0) * shrink
        found = (high - low) / (q_max - q_min)
        return found, (q_min - torch.round(low / found)).clamp(q_min, q_max)

    def cost(group: Tensor, step: Tensor, zero: Tensor, u: Tensor) -> Tensor:
        total, group, step, zero = 0.0, group.clone(), step[:, None], zero[:, None]
        for j in range(group.shape[1]):
            column = group[:, j : j + 1]
            rounded = (torch.round((column / step + zero).clamp(q_min, q_max)) - zero) * step
            error = (column - rounded) / u[j, j]
            total = total + error.square()[:, 0]
            if group_size != -1:  # of a whole row, columns are rounded alone
                group[:, j + 1 :] -= error * u[j, j + 1 :]
        return total

    w, u = w.double().clone(), u.double()
    rows, cols = w.shape
    size = cols if group_size == -1 else group_size
    groups = -(-cols // size)
    scales = torch.zeros(rows, groups, dtype=torch.float64) if scale is None else scale.double().clone()
    zeros = torch.zeros_like(scales) if zero_point is None else zero_point.double()
    codes, ties, loss = torch.zeros_like(w), torch.zeros_like(w), torch.zeros(rows, dtype=torch.float64)
    for c in range(cols):
        g = c // size if g_idx is None else int(g_idx[c])
        if scale is None and c % size == 0:
            group = w[:, c : c + size]
            part = slice(c, c + size)
            candidates = [
                (step * sign, zero)
                for sign in ((1, -1) if signs else (1,))
                for step, zero in (range_scale(group, shrink) for shrink in shrinks)
            ]
            costs = torch.stack([cost(group, *candidate, u[part, part]) for candidate in candidates])
            order = costs.sort(dim=0, stable=True)
            for row, i in enumerate(order.indices[0].tolist()):
                scales[row, g], zeros[row, g] = candidates[i][0][row], candidates[i][1][row]
            if len(candidates) > 1:  # two candidates as good as one another are a tie
                even = order.values[1] - order.values[0] <= 1e-3 * order.values[0]
        exact = w[:, c] / scales[:, g] + zeros[:, g]
        codes[:, c] = torch.round(exact.clamp(q_min, q_max))
        ties[:, c] = (exact - exact.floor() - 0.5).abs()
        if scale is None and c % size == 0 and len(candidates) > 1:
            ties[even, c] = 0.0
        error = (w[:, c] - (codes[:, c] - zeros[:, g]) * scales[:, g]) / u[c, c]
        loss += error.square() / 2
        w[:, c + 1 :] -= error[:, None] * u[c, c + 1 :]
    return codes, scales, zeros, loss, ties


def compare(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], symmetric: bool) -> None:
    """Equal row by row up to a tie, which fp32 may break the other way; most rows have none."""
    codes, scale, zero_point, loss = got
    exact_codes, exact_scale, exact_zero, exact_loss, ties = wanted
    clear = (ties > 1e-3).cummin(1).values  # from a tie on, a row may take another course
    assert torch.equal(codes.double()[clear], exact_codes[clear])
    same = (codes == exact_codes).all(1)
    assert same.double().mean() >= 0.9
    torch.testing.assert_close(scale.double()[same], exact_scale[same], rtol=2e-4, atol=0)
    torch.testing.assert_close(loss.double()[same], exact_loss[same], rtol=5e-3, atol=1e-9)
    if symmetric:
        assert zero_point.shape == (0,)
    else:
        assert torch.equal(zero_point.double()[same], exact_zero[same])


def implementations() -> list[Any]:
    return [torch.ops.quantkit.gptq_sweep.default, ops._library.REFERENCES["gptq_sweep"]]


@pytest.mark.parametrize("kernel", implementations(), ids=["kernel", "reference"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "cols", "group"), [(1, 1, -1), (5, 7, -1), (50, 70, 24), (49, 131, 32), (20, 300, 128), (17, 64, 5)]
)
def test_like_the_textbook(kernel: Any, rows: int, cols: int, group: int, bits: int, symmetric: bool) -> None:
    w, g = problem(rows, cols)
    before = w.clone()
    q_min, q_max, divisor = RANGES[bits]
    factor, _ = ops.gptq_factor(g, 0.01)
    got = kernel(w, factor, None, None, group, q_min, q_max, symmetric, divisor, torch.float32, None, 0.0, 0, False)
    assert torch.equal(w, before)
    wanted = textbook(w, textbook_factor(g, 0.01), group, q_min, q_max, symmetric, divisor)
    if rows * bits > 8:  # of a single row, a tie may be all there is
        compare(got, wanted, symmetric)
    else:
        assert (got[0].double() - wanted[0]).abs().max() <= 1


@pytest.mark.parametrize("kernel", implementations(), ids=["kernel", "reference"])
@pytest.mark.parametrize("mode", ["symmetric", "signs", "asymmetric"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "cols", "group"), [(60, 70, 24), (49, 131, 32), (97, 300, 128), (64, 64, -1)])
def test_search_like_the_textbook(kernel: Any, rows: int, cols: int, group: int, bits: int, mode: str) -> None:
    w, g = problem(rows, cols)
    q_min, q_max, divisor = RANGES[bits]
    symmetric, signs = mode != "asymmetric", mode == "signs"
    factor, _ = ops.gptq_factor(g, 0.01)
    got = kernel(w, factor, None, None, group, q_min, q_max, symmetric, divisor, torch.float32, None, 0.4, 5, signs)
    shrinks = tuple(1 - 0.4 * i / 5 for i in range(6))
    exact = textbook_factor(g, 0.01)
    wanted = textbook(
        w, exact, group, q_min, q_max, symmetric, -q_min if signs else divisor, shrinks=shrinks, signs=signs
    )
    assert not signs or 0.2 < (wanted[1] < 0).double().mean() < 0.8
    compare(got, wanted, symmetric)
    plain = kernel(w, factor, None, None, group, q_min, q_max, symmetric, divisor, torch.float32, None, 0.0, 0, False)
    assert not torch.equal(plain[1], got[1]) or bits == 8
    none = kernel(w, factor, None, None, group, q_min, q_max, symmetric, divisor, torch.float32, None, 0.0, 3, False)
    assert all(torch.equal(a, b) for a, b in zip(plain, none, strict=True))


@pytest.mark.parametrize("kernel", implementations(), ids=["kernel", "reference"])
@pytest.mark.parametrize("own", [True, False], ids=["own factors", "shared factor"])
@pytest.mark.parametrize("given", [True, False], ids=["given scales", "found scales"])
@pytest.mark.parametrize(("rows", "group"), [(7, 32), (49, 32), (20, -1)])
def test_batch_is_one_by_one(kernel: Any, own: bool, given: bool, rows: int, group: int) -> None:
    both = [problem(rows + i, 100) for i in range(3)]
    w = torch.stack([w[:rows] for w, _ in both])[:, :, :100]
    factor = torch.stack([ops.gptq_factor(g)[0] for _, g in both])
    zero = None
    found = ops.asymmetric_scale(*ops.minmax(w.view(-1, 100), [1, group]), -8, 7)
    scale, zero = (t.view(3, rows, -1) if given else None for t in found)
    arguments = (-8, 7, False, 7.5, torch.float32, None, 0.3, 4, False)
    got = kernel(w, factor if own else factor[1], scale, zero, group, *arguments)
    for b in range(3):
        one = kernel(
            w[b], factor[b if own else 1], scale[b] if given else None, zero[b] if given else None, group, *arguments
        )
        assert all(torch.equal(x[b], y) for x, y in zip(got, one, strict=True))


def test_search_leaves_less_error() -> None:
    w, g = problem(64, 256)
    factor, _ = ops.gptq_factor(g, 0.01)
    common: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5, "group_size": 64}
    plain = ops.gptq_sweep(w, factor, **common)[3]
    assert ops.gptq_sweep(w, factor, **common, search_range=0.5, search_steps=20)[3].sum() < 0.95 * plain.sum()
    # A row of zeros has candidates without error: the first one counts.
    w[3] = 0.0
    codes, scale, _, loss = ops.gptq_sweep(w, factor, **common, search_range=0.5, search_steps=20)
    assert (codes[3].any().item(), loss[3].item()) == (False, 0.0)
    assert torch.equal(scale[3], ops.gptq_sweep(w, factor, **common)[1][3])


@pytest.mark.parametrize("group", [64, -1])
def test_signs_leave_less_error(group: int) -> None:
    w, g = problem(64, 256)
    w[3] = 0.0
    factor, _ = ops.gptq_factor(g, 0.01)
    common: dict[str, Any] = {"q_min": -8, "q_max": 7, "group_size": group, "search_range": 0.25, "search_steps": 5}
    plain = ops.gptq_sweep(w, factor, divisor=7.5, **common)[3]
    codes, scale, _, loss = ops.gptq_sweep(w, factor, **common, signs=True, scale_dtype=torch.bfloat16)
    assert loss.sum() < 0.95 * plain.sum()
    assert torch.equal(scale, scale.bfloat16().float())
    assert (codes.min(), codes.max()) == (-8, 7)
    assert bool((scale[3] > 0).all())  # equally good either way: the first counts
    assert bool((scale < 0).any())
    # Alone, the sign is a search of two.
    both = {**common, "search_steps": 0}
    chosen = ops.gptq_sweep(w, factor, **both, signs=True)[3]
    assert chosen.sum() < ops.gptq_sweep(w, factor, divisor=8.0, **both)[3].sum()


@pytest.mark.parametrize("kernel", implementations(), ids=["kernel", "reference"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_given_scales_in_another_order(kernel: Any, symmetric: bool) -> None:
    w, g = problem(40, 150)
    order = g.diagonal().argsort(descending=True)
    g_idx = (torch.arange(150) // 32)[order].to(torch.int32)
    zero_point = None
    if symmetric:
        scale = ops.symmetric_scale(ops.absmax(w, [1, 32]), 7.5)
    else:
        scale, zero_point = ops.asymmetric_scale(*ops.minmax(w, [1, 32]), -8, 7)
    w, g = w[:, order].contiguous(), g[order][:, order].contiguous()
    factor, _ = ops.gptq_factor(g, 0.01)
    got = kernel(w, factor, scale, zero_point, 32, -8, 7, symmetric, 7.5, torch.float32, g_idx, 0.0, 0, False)
    u64 = textbook_factor(g, 0.01)
    compare(got, textbook(w, u64, 32, -8, 7, symmetric, 7.5, scale, zero_point, g_idx), symmetric)
    assert torch.equal(got[1], scale)
    assert got[1].data_ptr() != scale.data_ptr()


# All finite numbers of e4m3fn and of e2m1, in their order.
FLOATS = {
    8: torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double(),
    4: torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64),
}


@pytest.mark.parametrize("kernel", implementations(), ids=["kernel", "reference"])
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "cols", "group"), [(40, 70, 24), (49, 131, 32), (60, 300, -1)])
def test_floats_like_the_textbook(kernel: Any, rows: int, cols: int, group: int, bits: int, in_order: bool) -> None:
    w, g = problem(rows, cols)
    numbers = FLOATS[bits]
    width = cols if group == -1 else group
    scale = ops.symmetric_scale(0.8 * ops.absmax(w, [1, group]), float(numbers[-1]))  # the largest saturate
    g_idx = torch.arange(cols, dtype=torch.int32) // width
    if not in_order:
        g_idx = g_idx[torch.randperm(cols, generator=torch.Generator().manual_seed(1))]
    factor, _ = ops.gptq_factor(g, 0.01)
    rest = (-1, 1, True, 0.0, torch.float32, None if in_order else g_idx, 0.0, 0, False, bits)
    codes, found, zero_point, loss = kernel(w, factor, scale, None, group, *rest)
    assert torch.equal(found, scale)
    assert zero_point.shape == (0,)
    values = codes.view(torch.float8_e4m3fn).double()
    assert torch.isin(values.abs(), numbers).all()

    # Column by column: the nearest number, up to ties that fp32 may break the other way, and then on from what it took.
    u, left, exact_loss = textbook_factor(g, 0.01), w.double(), torch.zeros(rows, dtype=torch.float64)
    for c in range(cols):
        step = scale[:, g_idx[c]].double()
        exact = (left[:, c] / step).clamp(-numbers[-1], numbers[-1])
        distance = (exact.abs()[:, None] - numbers).abs().amin(1)
        slack = 1e-4 * exact.abs().clamp(min=1e-2)
        assert ((values[:, c] - exact).abs() <= distance + slack).all()
        error = (left[:, c] - values[:, c] * step) / u[c, c]
        exact_loss += error.square() / 2
        left[:, c + 1 :] -= error[:, None] * u[c, c + 1 :]
    torch.testing.assert_close(loss.double(), exact_loss, rtol=5e-3, atol=1e-9)
    even = torch.tensor([[2.5, -2.5, 3.5, 0.25]])  # alone, ties go to the even one
    alone = kernel(even, torch.eye(4), torch.ones(1, 1), None, -1, *rest[:5], None, 0.0, 0, False, 4)[0]
    assert alone.view(torch.float8_e4m3fn).tolist() == [[2.0, -2.0, 4.0, 0.0]]


def test_floats_with_less_error_than_to_nearest() -> None:
    w, g = problem(64, 256)
    factor, _ = ops.gptq_factor(g, 0.01)
    for bits, most in ((8, 448.0), (4, 6.0)):
        scale = ops.symmetric_scale(ops.absmax(w, [1, 32]), most)
        codes, _, _, loss = ops.gptq_sweep(w, factor, scale=scale, group_size=32, float_bits=bits)
        assert codes.dtype == torch.float8_e4m3fn
        plain = ops.quantize_fp8(w, scale, [1, 32], torch.float8_e4m3fn)
        if bits == 4:
            plain = ops.unpack_fp4(ops.quantize_fp4(w, scale, 32))
        damped = g.double() + 0.01 * g.double().diagonal().mean() * torch.eye(256)
        errors = []
        for q in (codes, plain):
            difference = q.double() * scale.double().repeat_interleave(32, 1) - w
            errors.append(0.5 * ((difference @ damped) * difference).sum(1))
        torch.testing.assert_close(loss.double(), errors[0], rtol=1e-3, atol=0)
        assert errors[0].sum() < 0.7 * errors[1].sum()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"float_bits": 6}, "float_bits must be 0"),
        ({"float_bits": 8}, "float_bits go with a given scale and no zero_point"),
        (
            {"float_bits": 4, "scale": torch.ones(2, 1), "zero_point": torch.zeros(2, 1, dtype=torch.int8)},
            "and no zero",
        ),
    ],
)
def test_floats_refuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=f"quantkit::gptq_sweep: .*{words}"):
        ops.gptq_sweep(torch.ones(2, 4), torch.eye(4), **options)


def test_less_error_than_rounding_to_nearest() -> None:
    w, g = problem(64, 256)
    factor, _ = ops.gptq_factor(g, 0.01)
    codes, scale, _, loss = ops.gptq_sweep(w, factor, q_min=-8, q_max=7, divisor=7.5, group_size=64)
    plain, plain_scale, _ = ops.rtn_int(w, [1, 64], q_min=-8, q_max=7, divisor=7.5)

    def error(q: Tensor, s: Tensor) -> Tensor:
        difference = (q.float() * s.repeat_interleave(64, 1) - w).double()
        damped = g.double() + 0.01 * g.double().diagonal().mean() * torch.eye(256)
        return (difference @ damped * difference).sum(1)

    assert error(codes, scale).sum() < 0.8 * error(plain, plain_scale).sum()
    torch.testing.assert_close(2 * loss.double(), error(codes, scale), rtol=1e-3, atol=0)


def loss_of(w: Tensor, g: Tensor, codes: Tensor, scale: Tensor, group: int) -> Tensor:
    """In fp64, of each row."""
    difference = codes.double() * scale.double().repeat_interleave(group, 1)[:, : w.shape[1]] - w
    damped = g.double() + 0.01 * g.double().diagonal().mean() * torch.eye(len(g))
    return 0.5 * ((difference @ damped) * difference).sum(1)


@pytest.mark.parametrize(("cols", "group"), [(2048, 128), (1111, 37)])
@pytest.mark.parametrize("signs", [False, True])
def test_wide_ones_lose_nothing_by_bf16(cols: int, group: int, signs: bool) -> None:
    w, g = problem(160, cols)
    factor, _ = ops.gptq_factor(g, 0.01)
    steps = (0.25, 5, True) if signs else (0.0, 0, False)
    args = (w, factor, None, None, group, -8, 7, True, 7.5, torch.float32, None, *steps)
    codes, scale, _, loss = torch.ops.quantkit.gptq_sweep(*args)
    found = loss_of(w, g, codes, scale, group)
    # What the sweep believes is without the error of bf16, which hence adds less than this.
    torch.testing.assert_close(loss.double().sum(), found.sum(), rtol=2e-4, atol=0)
    plain_codes, plain_scale, _, _ = ops._library.REFERENCES["gptq_sweep"](*args)
    plain = loss_of(w, g, plain_codes, plain_scale, group)
    assert (codes == plain_codes).double().mean() > 0.8
    # A code that falls the other way changes all after it, for better or worse: rows differ by chance.
    chance = (found - plain).std() * len(w) ** 0.5
    assert abs(found.sum() - plain.sum()) < 1e-3 * plain.sum() + 3 * chance
    assert 3 * chance < 0.01 * plain.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_fit_the_dtype_that_will_hold_them(dtype: torch.dtype) -> None:
    w, g = problem(20, 96)
    factor, _ = ops.gptq_factor(g)
    for group in (32, -1):
        scale = ops.gptq_sweep(w, factor, q_min=-8, q_max=7, divisor=7.5, group_size=group, scale_dtype=dtype)[1]
        assert torch.equal(scale, scale.to(dtype).float())


def test_threads_leave_no_trace() -> None:
    w, g = problem(200, 260)
    factor, _ = ops.gptq_factor(g)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(ops.gptq_sweep(w, factor, q_min=-8, q_max=7, symmetric=False, group_size=32))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


FACTOR_COLS = (1, 5, 16, 47, 96, 97, 300, 700)


@pytest.mark.parametrize("cols", FACTOR_COLS)
def test_factor(cols: int) -> None:
    _, g = problem(1, cols)
    exact = torch.linalg.inv(textbook_factor(g, 0.01))
    factor, dead = ops.gptq_factor(g.double(), 0.01)
    assert not dead.any()
    torch.testing.assert_close(factor, exact, rtol=1e-8, atol=1e-12)
    assert torch.equal(factor, factor.triu())
    factor, dead = ops.gptq_factor(g, 0.01)
    assert not dead.any()
    assert torch.equal(factor, factor.triu())
    plain = ops._library.REFERENCES["gptq_factor"](g, 0.01)[0]
    assert (factor - exact).norm() <= 1.5 * (plain - exact).norm() + 1e-7 * exact.norm()


@pytest.mark.parametrize("cols", FACTOR_COLS)
def test_factors_of_a_batch_are_those_one_by_one(cols: int) -> None:
    wide = torch.stack([problem(seed, cols)[1] for seed in (1, 2, 3)])
    g = torch.zeros(3, cols + 2, cols + 5)[:, 1:-1, 2 : cols + 2].copy_(wide)
    factor, dead = ops.gptq_factor(g, 0.02)
    for b in range(3):
        assert torch.equal(factor[b], ops.gptq_factor(wide[b], 0.02)[0])
    assert (factor.shape, dead.shape, dead.any().item()) == ((3, cols, cols), (3, cols), False)
    reference = ops._library.REFERENCES["gptq_factor"](g, 0.02)
    torch.testing.assert_close(factor, reference[0], rtol=1e-3, atol=1e-4 * float(factor.abs().max()))
    assert torch.equal(dead, reference[1])


def test_factor_threads_leave_no_trace() -> None:
    _, g = problem(1, 500)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(ops.gptq_factor(g)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("minor", [2, 3, 60, 150, 200])
def test_which_minor_is_not_positive(minor: int) -> None:
    g = torch.eye(200)
    g[200 - minor, 200 - minor] = 0.5
    g[-1, 200 - minor] = g[200 - minor, -1] = 1.0
    for function in (ops.gptq_factor, ops._library.REFERENCES["gptq_factor"]):
        with pytest.raises(torch.linalg.LinAlgError, match=rf"not positive definite \(minor {minor} of 200\)"):
            function(g, 0.0)
        with pytest.raises(torch.linalg.LinAlgError, match=rf"g\[1\] \+ 0 .* \(minor {minor} of 200\)"):
            function(torch.stack([torch.eye(200), g]), 0.0)


def test_dead_columns_are_rounded_alone() -> None:
    w, g = problem(30, 90, dead=True)
    before = g.clone()
    factor, dead = ops.gptq_factor(g, 0.01)
    assert torch.equal(g, before)
    assert dead.tolist() == [c % 30 == 0 for c in range(90)]
    assert factor[dead].count_nonzero() == dead.sum()
    codes, scale, _, loss = ops.gptq_sweep(w, factor, q_min=-128, q_max=127, divisor=127.5)
    assert torch.equal(codes[:, dead], ops.quantize_int(w, scale, None, [1, -1], q_min=-128, q_max=127)[:, dead])
    assert loss.isfinite().all()
    factor, dead = ops.gptq_factor(torch.zeros(4, 4), 0.0)
    assert dead.all()
    assert torch.equal(factor, torch.eye(4))


def test_dampening_is_raised_until_it_works() -> None:
    g = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # the least eigenvalue is -0.5
    with pytest.raises(torch.linalg.LinAlgError, match=r"is not positive definite .* raise the dampening"):
        ops.gptq_factor(g, 0.01)
    factor, _, used = ops.factor_with_retry(g, 0.01)
    assert used == 1.0
    assert torch.equal(factor, ops.gptq_factor(g, used)[0])
    with pytest.raises(torch.linalg.LinAlgError):
        ops.factor_with_retry(g, 0.001, limit=0.01)


def test_refuses() -> None:
    w, g = problem(4, 8)
    factor, _ = ops.gptq_factor(g)
    common: dict[str, Any] = {"q_min": -8, "q_max": 7, "divisor": 7.5}
    for value in (float("nan"), float("inf")):
        bad = w.clone()
        bad[2, 3] = value
        with pytest.raises(RuntimeError, match="w holds NaN or infinities"):
            ops.gptq_sweep(bad, factor, **common)
        bad = g.clone()
        bad[3, 3] = value
        with pytest.raises(
            RuntimeError, match=r"of g are NaN.* the first at column 3: look for NaN in the activations"
        ):
            ops.gptq_factor(bad)
        with pytest.raises(RuntimeError, match=r"1 of 8 diagonal elements of g\[1\] are NaN"):
            ops.gptq_factor(torch.stack([g, bad]))
    with pytest.raises(torch.linalg.LinAlgError):
        bad = g.clone()
        bad[3, 1] = bad[1, 3] = float("nan")
        ops.gptq_factor(bad)
    check_refused(
        "gptq_factor", r"g must be float32 \[K, K\] or \[B, K, K\], got torch.float32 \[8, 7\]", g[:, :7], 0.01
    )
    check_refused("gptq_factor", r"dampening must be >= 0, got -1", g, -1.0)
    with pytest.raises(RuntimeError, match="factor's diagonal must be positive and finite"):
        ops.gptq_sweep(w, torch.zeros(8, 8), **common)
    bad = factor.clone()
    bad[0, 1] = float("nan")
    with pytest.raises(RuntimeError, match="the loss is not finite"):
        ops.gptq_sweep(w, bad, **common)
    with pytest.raises(RuntimeError, match=r"factor must be torch.float32 \[8, 8\]"):
        ops.gptq_sweep(w, factor[:4], **common)
    with pytest.raises(RuntimeError, match="zero_point and g_idx go with a given scale"):
        ops.gptq_sweep(w, factor, g_idx=torch.zeros(8, dtype=torch.int32), **common)
    with pytest.raises(RuntimeError, match=r"g_idx must lie in \[0, 1\)"):
        ops.gptq_sweep(w, factor, scale=torch.ones(4, 1), g_idx=torch.ones(8, dtype=torch.int32), **common)
    with pytest.raises(RuntimeError, match=r"or as many as w has matrices"):
        ops.gptq_sweep(w.expand(3, 4, 8), factor.expand(2, 8, 8), **common)
    with pytest.raises(RuntimeError, match=r"search_range in \[0, 1\), got 3 and 1"):
        ops.gptq_sweep(w, factor, **common, search_range=1.0, search_steps=3)
    for wrong in ({"symmetric": False}, {"scale": torch.ones(4, 1)}):
        with pytest.raises(RuntimeError, match="signs are for symmetric codes"):
            ops.gptq_sweep(w, factor, **common, **wrong, signs=True)
    with pytest.raises(RuntimeError, match="scale must be"):
        ops.gptq_sweep(w, factor, scale=torch.ones(4, 2), **common)


def test_empty() -> None:
    codes, scale, _, loss = ops.gptq_sweep(torch.zeros(0, 8), torch.eye(8), q_min=-8, q_max=7, divisor=7.5)
    assert (codes.shape, scale.shape, loss.shape) == ((0, 8), (0, 1), (0,))
    codes, scale, _, loss = ops.gptq_sweep(torch.zeros(0, 3, 8), torch.eye(8), q_min=-8, q_max=7, divisor=7.5)
    assert (codes.shape, scale.shape, loss.shape) == ((0, 3, 8), (0, 3, 1), (0, 3))
    for shape in ((0, 0), (0, 3, 3), (2, 0, 0)):
        factor, dead = ops.gptq_factor(torch.zeros(shape))
        assert (factor.shape, dead.shape) == (shape, shape[:-1])


def test_compiles() -> None:
    w, g = problem(6, 20)
    factor, _ = ops.gptq_factor(g)
    scale = ops.symmetric_scale(ops.absmax(w, [1, 8]), 7.5)
    sweep = torch.ops.quantkit.gptq_sweep.default
    torch.library.opcheck(sweep, (w, factor, None, None, 8, -8, 7, False, 7.5, torch.float32, None, 0.0, 0, False))
    torch.library.opcheck(sweep, (w, factor, scale, None, 8, -8, 7, True, 7.5, torch.float32, None, 0.0, 0, False))
    batch = (
        w.view(2, 3, 20),
        factor.expand(2, 20, 20),
        None,
        None,
        8,
        -8,
        7,
        False,
        7.5,
        torch.float32,
        None,
        0.2,
        3,
        False,
    )
    torch.library.opcheck(sweep, batch)
    torch.library.opcheck(torch.ops.quantkit.gptq_factor.default, (g, 0.01))
    torch.library.opcheck(torch.ops.quantkit.gptq_factor.default, (g.expand(2, 20, 20), 0.01))
