"""Checks of values in a forward: they stay in the graph, and raise what the forward raises."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.models import same, train_step

VALUE = Uniform(0.5)


class TooLargeError(ValueError):
    pass


class Checked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.isnan(x).any(), "not a number"
        assert x.shape[-1] == 12 and x.dim() == 2
        assert x.shape[0] % 2 == 0, f"odd batch {x.shape[0]}"
        if x.abs().max() > 100:
            raise TooLargeError(f"{x.abs().max()} is too large")
        torch._check(x.shape[0] < 9)
        hidden = self.a(x).relu()
        torch._assert(hidden.shape[1] == 16, "width")
        return self.b(hidden)


def x(batch: int = 4) -> Tensor:
    return torch.randn(batch, 12, generator=torch.Generator().manual_seed(batch))


def test_the_model_is_traced() -> None:
    model = Checked()
    approx = fx_approx.transform(model, VALUE, x())  # a CaptureWarning would be an error here
    fx_approx.set_sampling(approx, enabled=False)
    for batch in (4, 2, 8):
        assert same(train_step(approx.train(), x(batch)), train_step(model.train(), x(batch)))
        assert same(approx.eval()(x(batch)), model.eval()(x(batch)))


def test_it_is_traced_without_example_inputs() -> None:
    approx = fx_approx.transform(
        nn.Sequential(nn.Linear(12, 12), _Asserts(), nn.Linear(12, 4)), Uniform(0.5, scores="online")
    )
    approx(x())
    with pytest.raises(AssertionError):
        approx(x() / 0)


def test_an_error_that_is_handled_is_no_check() -> None:
    class Handled(Checked):
        def forward(self, x: Tensor) -> Tensor:
            try:
                if x.sum() > 0:
                    raise TooLargeError("positive")
            except TooLargeError:
                x = x * 2
            return self.b(self.a(x))

    model = Handled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
        approx = fx_approx.transform(model, VALUE, x())
    fx_approx.set_sampling(approx, enabled=False)
    for sign in (1, -1):
        assert torch.equal(approx(x().abs() * sign), model(x().abs() * sign))


class _Asserts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all()
        return x


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.full((4, 12), float("nan")), AssertionError),
        (torch.full((4, 12), 1e3), TooLargeError),
        (x(3), AssertionError),
        (x(10), RuntimeError),
        (torch.zeros(4, 1, 12), AssertionError),
    ],
    ids=["nan", "large", "odd", "many", "axes"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_fails_raises(bad: Tensor, error: type[Exception], training: bool) -> None:
    approx = fx_approx.transform(Checked(), VALUE, x()).train(training)
    with warnings.catch_warnings(), pytest.raises(error):
        warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)  # another number of axes is not the graph's
        approx(bad)
    assert bool(approx(x()).isfinite().all())


def test_an_assertion_compiles_in_one_graph() -> None:
    class Asserted(Checked):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.isnan(x).any(), "not a number"
            return self.b(self.a(x).relu())

    approx = fx_approx.transform(Asserted(), VALUE, x())
    torch._dynamo.reset()
    compiled = torch.compile(approx, backend="aot_eager", fullgraph=True)
    with fx_approx.reuse_selection(approx):
        torch.testing.assert_close(compiled(x()), approx(x()))


def test_a_branch_that_computes_is_no_check() -> None:
    class Branch(Checked):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:
                x = x * 2
            return self.b(self.a(x))

    with (
        pytest.warns(fx_approx.errors.CaptureWarning, match="known only in part"),
        pytest.warns(fx_approx.errors.CaptureWarning, match=r"backend=fx_approx\.backend\(policy\)"),
    ):
        fx_approx.transform(Branch(), VALUE, x())
