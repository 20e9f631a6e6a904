"""Python that asks traced values for lengths, sizes and types: traced from the example inputs, and guarded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.policies import Uniform
from tests.helpers.models import same, train_step

VALUE = Uniform(0.5)


class Net(nn.Module):
    """Layers of several widths, and a forward that is given."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 8)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def chunks(net: Any, x: Tensor) -> Tensor:
    halves = [net.c(half.repeat(1, 1, 2)) for half in net.b(net.a(x)).chunk(2, -1)]
    return net.d(halves[0] + halves[1])


def pieces(net: Any, x: Tensor) -> Tensor:
    parts = list(net.a(x).split([4, 8, 4], dim=-1))
    parts.append(parts.pop(0))
    return net.d(torch.cat(parts, -1))


def starred(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    sizes = hidden.size()[:-1] + (4, 4)  # noqa: RUF005
    heads = hidden.view(*sizes).transpose(1, 2)
    return net.d(heads.transpose(1, 2).reshape(*x.shape[:-1], 16))


def unpacked(net: Any, x: Tensor) -> Tensor:
    first, *rest = net.a(x).unbind(1)
    return net.d(first + sum(rest))


def counted(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    if hidden.dim() == 3 and len(hidden.shape) == 3 and isinstance(hidden, Tensor) and torch.is_tensor(x):
        hidden = hidden.relu()
    if hidden.shape[-1] == 16 and hidden.shape != x.shape:
        hidden = hidden * 2
    return net.d(hidden)


def listed(net: Any, x: Any) -> Tensor:
    """As densely connected networks do: a tensor or a list of them."""
    before = [x] if isinstance(x, Tensor) else x
    return net.d(net.a(torch.cat([*before], -1)).relu())


def steps(net: Any, x: Tensor) -> Tensor:
    hidden = torch.zeros(x.size(0), 16)
    for step in range(x.size(1)):
        hidden = torch.tanh(net.a(x[:, step]) + hidden)
    return net.d(hidden)


def assigned(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    before = hidden.clone()
    hidden[..., :4] = net.c(x)[..., 4:8]
    hidden[hidden < 0] = 0
    hidden[:, 0] += 1
    return net.d(hidden) + before.sum()


def filled(net: Any, x: Tensor) -> Tensor:
    hidden = torch.zeros(x.size(0), x.size(1), 16)
    hidden[:, 1:] = net.a(x)[:, 1:]
    return net.d(hidden * 2)


def through_a_view(net: Any, x: Tensor) -> Tensor:
    hidden = net.a(x)
    view = hidden[..., 2:6]
    view[..., 0] = net.c(x)[..., 0]
    return net.d(hidden)


BODIES = [chunks, pieces, starred, unpacked, counted, listed, steps, assigned, filled, through_a_view]
each_body = pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)


def inputs(batch: int = 4, length: int = 6) -> Tensor:
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(batch))


@each_body
def test_it_is_traced_and_exact_where_sampling_is_off(body: Any) -> None:
    model = Net(body)
    approx = fx_approx.transform(model, VALUE, inputs())  # a CaptureWarning would be an error here
    assert approx._fx_approx.program.graph is not None
    fx_approx.set_sampling(approx, enabled=False)
    for batch in (4, 3, 1, 7):  # no batch size is in the graph
        x = inputs(batch)
        assert same(train_step(approx.train(), x), train_step(model.train(), x))
        assert same(approx.eval()(x), model.eval()(x))


@each_body
def test_not_computing_what_no_one_reads_changes_no_number(body: Any) -> None:
    model = Net(body)
    models = [fx_approx.transform(model, VALUE, inputs(), prune_unread=demand) for demand in (True, False)]
    (one, grads), (other, others) = (train_step(approx, inputs()) for approx in models)
    torch.testing.assert_close(one, other)
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name])


@pytest.mark.parametrize("body", [chunks, starred, assigned, filled], ids=lambda body: body.__name__)
def test_it_compiles(body: Any) -> None:
    approx = fx_approx.transform(Net(body), VALUE, inputs())
    with fx_approx.reuse_selection(approx):
        expected = train_step(approx, inputs())
        torch._dynamo.reset()
        found = train_step(torch.compile(approx, backend="aot_eager"), inputs())
    torch.testing.assert_close(found[0], expected[0])
    for found_grad, grad in zip(found[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(found_grad, grad)


@pytest.mark.parametrize("body", [steps, unpacked], ids=lambda body: body.__name__)
def test_another_length_runs_the_models_own_python(body: Any) -> None:
    model = Net(body)
    approx = fx_approx.transform(model, VALUE, inputs())
    fx_approx.set_sampling(approx, enabled=False)
    shorter = inputs(4, 5)
    assert same(approx(shorter), model(shorter))
    fx_approx.set_sampling(approx, enabled=True)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="axis 1 of input x is not 6 long"):
        approx(shorter)


def test_a_length_that_does_not_matter_is_free() -> None:
    approx = fx_approx.transform(Net(chunks), VALUE, inputs())
    approx(inputs(4, 5))  # a warning would be an error here


def test_pieces_of_the_batch_are_guarded_by_the_batch() -> None:
    def halves(net: Any, x: Tensor) -> Tensor:
        return torch.stack([net.d(net.a(row)) for row in x.unbind(0)])

    model = Net(halves)
    approx = fx_approx.transform(model, VALUE, inputs(4))
    with pytest.warns(fx_approx.errors.CaptureWarning, match="axis 0 of input x is not 4 long"):
        assert approx(inputs(3)).shape[0] == 3


def test_a_loop_over_the_batch_is_not_unrolled() -> None:
    def rows(net: Any, x: Tensor) -> Tensor:
        return torch.stack([net.d(net.a(row)) for row in x])

    with pytest.warns(fx_approx.errors.CaptureWarning, match="it depends on the size of the batch"):
        fx_approx.transform(Net(rows), VALUE, inputs(4))


@pytest.mark.parametrize("example", [1, 4])
def test_a_branch_that_asks_for_the_batch_is_not_frozen(example: int) -> None:
    def single(net: Any, x: Tensor) -> Tensor:
        return net.d(net.a(x)) * (2 if x.shape[0] == 4 else 1)

    model = Net(single)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="batch"):
        approx = fx_approx.transform(model, VALUE, inputs(example)).eval()
    for batch in (1, 2, 4):
        assert torch.equal(approx(inputs(batch)), model.eval()(inputs(batch)))


def test_squeeze_sees_a_batch_of_one() -> None:
    def squeezed(net: Any, x: Tensor) -> Tensor:
        hidden = net.d(net.a(x)).squeeze()
        return hidden.sum(0) if hidden.dim() == 3 else hidden

    model = Net(squeezed)
    approx = fx_approx.transform(model, VALUE, inputs(4))
    fx_approx.set_sampling(approx, enabled=False)
    for batch in (4, 1, 2):
        assert torch.equal(approx(inputs(batch)), model(inputs(batch)))


def test_a_slice_that_clamps_is_guarded() -> None:
    def head(net: Any, x: Tensor) -> Tensor:
        return sum(net.d(net.a(one)) for one in x[:, :5].unbind(1))  # type: ignore[return-value]

    model = Net(head)
    approx = fx_approx.transform(model, VALUE, inputs(4, 6))
    fx_approx.set_sampling(approx, enabled=False)
    for length in (6, 12, 3):
        assert torch.equal(approx(inputs(4, length)), model(inputs(4, length)))


def test_data_types_that_were_asked_for_are_guarded() -> None:
    def typed(net: Any, x: Tensor) -> Tensor:
        hidden = net.a(x)
        return net.d(hidden * 2 if hidden.dtype == torch.float32 else hidden)

    model = Net(typed)
    approx = fx_approx.transform(model, VALUE, inputs())
    fx_approx.set_sampling(approx, enabled=False)
    assert torch.equal(approx(inputs()), model(inputs()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(approx(inputs()), model(inputs()))
    model.double(), approx.double()
    assert torch.equal(approx(inputs().double()), model(inputs().double()))


def test_containers_of_inputs_are_what_they_are() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 8)

        def forward(self, features: Any) -> Tensor:
            values = features.values() if isinstance(features, dict) else features
            return self.b(sum(self.a(one) for one in values).relu())

    for example in ({"x": inputs(), "y": inputs(4) * 2}, [inputs(), inputs() + 1, inputs() - 1]):
        model = Fused()
        approx = fx_approx.transform(model, VALUE, (example,))
        fx_approx.set_sampling(approx, enabled=False)
        assert torch.equal(approx(example), model(example))
        more: Any = {**example, "z": inputs()} if isinstance(example, dict) else [*example, inputs()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fx_approx.errors.CaptureWarning)
            assert torch.equal(approx(more), model(more))


def test_without_example_inputs_nothing_is_known() -> None:
    with pytest.warns(fx_approx.errors.CaptureWarning, match="without example_inputs"):
        fx_approx.transform(Net(starred), Uniform(0.5, scores="online"))
