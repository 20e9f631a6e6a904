"""What a trace is told of values: lengths, sizes, types, checks, guarded where a graph rests on them; packages."""

from __future__ import annotations

import collections.abc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fx_approx
from fx_approx.capture.containers import tensors
from fx_approx.policies import Uniform
from tests.helpers.models import same, train_step
from tests.helpers.modules import made_of
from tests.helpers.quick import thinned
from tests.helpers.torchvision_compat import import_torchvision

# ---- lengths, sizes and types, from the example inputs


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


@pytest.mark.parametrize("body", thinned(BODIES), ids=lambda body: body.__name__)
def test_it_is_traced_exact_where_sampling_is_off_and_narrowed_without_another_number(body: Any) -> None:
    model = Net(body)
    approx = fx_approx.transform(model, VALUE, inputs())  # a CaptureWarning would be an error here
    assert approx._fx_approx.program.graph is not None
    fx_approx.set_sampling(approx, enabled=False)
    for batch in (4, 3, 1, 7):  # no batch size is in the graph
        x = inputs(batch)
        assert same(train_step(approx.train(), x), train_step(model.train(), x))
        assert same(approx.eval()(x), model.eval()(x))
    fx_approx.set_sampling(approx.train(), enabled=True)
    whole = fx_approx.transform(model.train(), VALUE, inputs(), prune_unread=False)
    torch.testing.assert_close(train_step(approx, inputs()), train_step(whole, inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("body", [assigned], ids=lambda body: body.__name__)
def test_it_compiles(body: Any) -> None:
    approx = fx_approx.transform(Net(body), VALUE, inputs())
    with fx_approx.reuse_selection(approx):
        expected = train_step(approx, inputs())
        torch._dynamo.reset()
        found = train_step(torch.compile(approx, backend="aot_eager"), inputs())
    torch.testing.assert_close(found[0], expected[0])
    for found_grad, grad in zip(found[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(found_grad, grad)


@pytest.mark.parametrize("length", [5, 8])
@pytest.mark.parametrize("body", [steps, unpacked], ids=lambda body: body.__name__)
def test_another_length_runs_the_models_own_python(body: Any, length: int) -> None:
    model = Net(body)
    approx = fx_approx.transform(model, VALUE, inputs())
    fx_approx.set_sampling(approx, enabled=False)
    other = inputs(4, length)
    assert same(approx(other), model(other))
    fx_approx.set_sampling(approx, enabled=True)
    with pytest.warns(fx_approx.errors.CaptureWarning, match="axis 1 of input x is not 6 long"):
        approx(other)


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
    @made_of(lambda: {"a": nn.Linear(12, 16), "b": nn.Linear(16, 8)})
    def Fused(self: Any, features: Any) -> Tensor:
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


# ---- checks of values: they stay in the graph, and raise what the forward raises


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


# ---- what isinstance says of a traced value; torch's own functions are not told the same


@made_of(lambda: {"enter": nn.Linear(6, 16), "leave": nn.Linear(16, 4)})
def Asks(self: Any, x: Tensor) -> Tensor:
    """Takes a branch by the class of a value, as many forwards do that take tensors or containers."""
    y = self.enter(x).relu()
    if isinstance(y, (list, tuple, collections.abc.Mapping, nn.Parameter)):
        return x
    if not (isinstance(y, Tensor) and torch.is_tensor(y)):
        return x * 2
    if not isinstance(y.chunk(2, 1), tuple) or not isinstance(y.shape, torch.Size):
        return x * 3
    # Overloads that try a number first: a value that says in C++ that it is a tensor ends the process there.
    y = torch.remainder(y, 0.9) + torch.remainder(2.0, y + 3) + torch.pow(2.0, y) + torch.where(y > 0, 1.0, y)
    return self.leave(y)


def test_the_class_of_a_traced_value_is_told_to_the_model_only() -> None:
    torch.manual_seed(0)
    model, x = Asks().double(), torch.randn(4, 6, dtype=torch.float64)
    approx = fx_approx.transform(model, Uniform(1.0), x)
    assert approx._fx_approx.program.graph is not None
    assert torch.equal(approx(x), model(x))


def test_isinstance_is_what_it_was() -> None:
    before = isinstance
    fx_approx.transform(Asks(), Uniform(0.5), torch.randn(4, 6))
    assert isinstance is before


# ---- sizes that tensors of the model and of the forward take


Use = Callable[[Tensor, int, int], Tensor]

# Of a parameter [1, 1, 8]; n and t are sizes of the input.
USES: dict[str, Use] = {
    "expand": lambda token, n, t: token.expand(n, -1, -1),
    "expand, second": lambda token, n, t: token.expand(2, t, -1),
    "expand to a tuple": lambda token, n, t: token.expand((n, -1, -1)),
    "expand to numbers": lambda token, n, t: token.expand(2, 1, 8),
    "repeat": lambda token, n, t: token.repeat(n, 1, 1),
    "view": lambda token, n, t: token.view(-1, 1, 8).expand(n, t, 8),
    "new_ones": lambda token, n, t: token.new_ones(n, t, 8) * token,
    "new_zeros": lambda token, n, t: token.new_zeros(n, 1, 8) + token,
    "new_empty": lambda token, n, t: token.new_empty(n, 1, 8).fill_(2.0) * token,
    "made here": lambda token, n, t: torch.arange(8.0, dtype=torch.float64).view(1, 1, 8).expand(n, -1, -1) + token,
}


class Prompted(nn.Module):
    """Puts what ``use`` makes of a parameter before its input."""

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use = (use,)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, t = x.shape[0], x.size(1)
        made: Tensor = self.layer(torch.cat((self.use[0](self.token, n, t), x), 1))
        return made


@pytest.mark.parametrize("name", USES)
def test_sizes_are_traced(name: str) -> None:
    model = Prompted(USES[name]).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    approx = fx_approx.transform(model, Uniform(1.0, scores="online"), x)
    assert approx._fx_approx.program.graph is not None
    batches = [x] if "numbers" in name or "second" in name else [x, torch.randn(5, 3, 8, dtype=torch.float64)]
    for batch in batches:
        result, expected = approx(batch), model(batch)
        assert torch.equal(result, expected)
        grads = torch.autograd.grad(result.square().sum(), list(approx.parameters()))
        others = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        assert all(map(torch.equal, grads, others))


def test_the_methods_of_tensors_are_left_as_they_were() -> None:
    methods = {name: getattr(Tensor, name) for name in ("expand", "new_empty", "new_ones", "new_zeros")}
    fx_approx.transform(Prompted(USES["expand"]).double(), Uniform(0.5, scores="online"), torch.randn(2, 3, 8).double())
    assert all(getattr(Tensor, name) is method for name, method in methods.items())
    assert not set(methods) & set(vars(Tensor))


# ---- einops, and torchvision's segmentation models


def tokens(batch: int = 4, length: int = 6) -> Tensor:
    return torch.randn(batch, length, 12, generator=torch.Generator().manual_seed(batch))


class Attention(nn.Module):
    """Heads, pooling and repetition by einops' functions."""

    def __init__(self, einops: Any) -> None:
        super().__init__()
        self.qkv, self.out, self.einops = nn.Linear(12, 48), nn.Linear(16, 8), einops.__name__

    def forward(self, x: Tensor) -> Tensor:
        import einops

        q, k, v = (einops.rearrange(one, "b t (h d) -> b h t d", h=4) for one in self.qkv(x).chunk(3, dim=-1))
        scores = einops.einsum(q, k, "b h i d, b h j d -> b h i j").softmax(-1)
        mixed = einops.rearrange(scores @ v, "b h t d -> b t (h d)")
        return einops.reduce(self.out(mixed), "b t c -> b c", "mean") + einops.repeat(
            x[:, 0, :2], "b c -> b (c r)", r=4
        )


def layered(einops: Any) -> nn.Module:
    from einops.layers.torch import Rearrange, Reduce

    return nn.Sequential(
        nn.Linear(12, 16),
        Rearrange("b t (h d) -> b h t d", h=4),
        nn.ReLU(),
        Rearrange("b h t d -> b t (h d)"),
        nn.Linear(16, 8),
        Reduce("b t c -> b c", "max"),
    )


@pytest.mark.parametrize("build", [Attention, layered], ids=["functions", "layers"])
def test_einops_is_traced_for_any_batch(build: Any) -> None:
    model = build(pytest.importorskip("einops"))
    approx = fx_approx.transform(model, VALUE, tokens())  # a CaptureWarning would be an error here
    fx_approx.set_sampling(approx, enabled=False)
    for batch, length in ((4, 6), (2, 6), (1, 6), (4, 5)):
        assert same(train_step(approx, tokens(batch, length)), train_step(model, tokens(batch, length)))
    assert same(approx.eval()(tokens(3)), model.eval()(tokens(3)))
    fx_approx.set_sampling(approx.train(), enabled=True)
    whole = fx_approx.transform(model.train(), VALUE, tokens(), prune_unread=False)
    torch.testing.assert_close(train_step(approx, tokens())[0], train_step(whole, tokens())[0])


@pytest.mark.parametrize(
    "name",
    [
        "lraspp_mobilenet_v3_large",
        *(pytest.param(f"{n}_resnet50", marks=pytest.mark.slow) for n in ("fcn", "deeplabv3")),
    ],
)
def test_segmentation_models_are_traced_as_a_whole(name: str) -> None:
    model = import_torchvision().models.get_model(name, weights=None, weights_backbone=None, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    approx = fx_approx.transform(model, VALUE, x)  # a CaptureWarning would be an error here
    total = fx_approx.report(approx).totals
    assert total.saved > 0.6
    found, expected = approx.eval()(x[:1]), model.eval()(x[:1])
    assert type(found) is type(expected) and list(found) == list(expected)
    assert same(tensors(found), tensors(expected))
