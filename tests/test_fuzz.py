"""tests/fuzz.py: a few cases of every operator, and what it reports for a wrong operator."""

from __future__ import annotations

from typing import Any

import fuzz
import pytest
import torch

import segkernels


@pytest.mark.parametrize("op", fuzz.OPERATORS)
def test_drawn_calls_agree_with_the_reference(op: str) -> None:
    _, failures = fuzz.run(op, cases=20)
    assert not failures, "\n".join(map(str, failures))


@pytest.mark.parametrize("op", ["interpolate", "permutohedral_filter", "unpool_bed_of_nails"])
def test_a_wrong_value_is_reported(
    op: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = getattr(segkernels, op)
    monkeypatch.setattr(segkernels, op, lambda *args, **kwargs: right(*args, **kwargs) + 1e-2)
    assert fuzz.main(["--op", op, "--cases", "4"]) == 1
    report = capsys.readouterr().out
    assert "output 0: " in report
    assert "bound" in report
    assert f"python tests/fuzz.py --op {op} --cases 1 --seed " in report
    monkeypatch.undo()
    assert fuzz.main(["--op", op, "--cases", "4"]) == 0


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * 1.01


def test_a_wrong_gradient_and_other_bits_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right = segkernels.unpool_nearest
    monkeypatch.setattr(
        segkernels, "unpool_nearest", lambda x, k: right(_WrongGradient.apply(x), k)
    )
    _, failures = fuzz.run("unpool_nearest", cases=10)
    assert any("gradient of input: " in problem for f in failures for problem in f.problems)
    by_threads = lambda x, k: right(x, k) * (1 + (torch.get_num_threads() - 1) * 1e-2)  # noqa: E731
    monkeypatch.setattr(segkernels, "unpool_nearest", by_threads)
    _, failures = fuzz.run("unpool_nearest", cases=10)
    assert any("with 2 thread" in problem for f in failures for problem in f.problems)


def test_a_case_depends_only_on_its_seed() -> None:
    for op in fuzz.OPERATORS:
        first, again = (fuzz.Draw(op, 7) for _ in range(2))
        a, b = fuzz.OPERATORS[op](first), fuzz.OPERATORS[op](again)
        assert first.shown == again.shown
        assert list(a.inputs) == list(b.inputs)
        for x, y in zip(a.inputs.values(), b.inputs.values(), strict=True):
            assert fuzz.same_bits(x.detach(), y.detach())
