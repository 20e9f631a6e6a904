"""Time as it is measured: every product at its own sizes, and the rest of the step as what is left of the exact one."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fx_approx.core.candidates import CallShapes, ProductFacts, Role
from fx_approx.core.flops import Kept, executed_flops
from fx_approx.core.plan import Cost
from fx_approx.core.step_cost import Model, ProductWork, StepWorkload
from fx_approx.ops.base import OPS
from fx_approx.policies.cost_roofline import RooflineModel, slicing_seconds
from fx_approx.policies.cost_update import update_seconds
from fx_approx.sampling.base import Selection
from fx_approx.utils.disk_cache import DiskCache, cache_folder
from fx_approx.utils.timing import device_key, time_calls

_VERSION = 1
_TOGETHER = 8  # products timed in turn
_CHOICE = {False: 6e-5, True: 1.5e-5}  # seconds to sort and draw, for each sampled layer, eager and compiled


@dataclasses.dataclass
class MeasuredModel:
    """Times each product forward and backward on the device, exact and as it is left, and the exact step as a whole.

    What the products leave of the exact step is taken to shrink with the bytes that its operations put out. Each
    measurement is repeated until its quartiles lie within 5 per cent, 25 times at most, and is kept on disk by device,
    number of threads, torch's version, sizes, dtype and memory format; models of other shapes are measured anew.

    Not modelled: what the compiler makes of a product together with its neighbours, caches that a whole step leaves
    cold, gradients that are sampled apart (they are taken to shrink as their operations do).

    Attributes:
        compiled: The step is to be compiled. The exact step is then compiled once to time it, which takes as long as
            the user's own first step.
        progress: Show a bar where there is something to measure (with tqdm, on a terminal).
    """

    compiled: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        self._cache = DiskCache(cache_folder())
        self._rest = RooflineModel(self.compiled)
        self._whole: dict[str, float | None] = {}
        self._times: dict[Any, float] = {}

    @property
    def omits(self) -> str:
        """What it does not model."""
        return "fusion across products, cold caches, gradients sampled apart, an optimiser if none is given"

    def step(self, work: StepWorkload, model: Model) -> Cost:
        """Operations and seconds of a training step."""
        exact = work.exact
        times = self._products([*work.products, *exact.products])
        own, before = (sum(times[_key(p)] for p in one.products if _key(p) in times) for one in (work, exact))
        device = self._rest.device_of(work)
        whole = self.exact_step(model)
        if whole is None:
            unmeasured = dataclasses.replace(exact, products=(), update=None)
            rest = self._rest.step(dataclasses.replace(unmeasured, operations=work.operations), model).seconds or 0.0
        else:
            rest = max(0.0, whole - before)
        share = work.moved / work.moved_exact if work.moved_exact else 1.0
        chosen = sum(1 for product in work.products if product.roles)
        seconds = own + rest * share + chosen * _CHOICE[self.compiled]
        seconds += (4 * work.gathered + 2 * work.selection_flops) / device.bandwidth + slicing_seconds(work, device)
        seconds += update_seconds(work.update)
        return Cost(flops=work.flops + work.selection_flops, seconds=seconds)

    def exact_step(self, model: Model) -> float | None:
        """Seconds of the exact step; None where the model has no example inputs to run."""
        name = model.fingerprint
        if name not in self._whole:
            facts = next((c.facts for c in model.candidates if c.facts is not None), None)
            device = torch.device("cpu" if facts is None else facts.device)
            key = {"what": "step", "version": _VERSION, **device_key(device), "model": name, "compiled": self.compiled}

            def measure() -> float:
                return model.with_tokens(None).time([], compiled=self.compiled)[0].seconds

            self._whole[name] = self._cache.get(key, measure) if model.runs else None
        return self._whole[name]

    def _products(self, products: Iterable[ProductWork]) -> dict[Any, float]:
        """Seconds of each, by what it is."""
        wanted = {key: product for product in products if (key := _key(product)) is not None}
        missing = []
        for key, product in wanted.items():
            if key not in self._times and _operands(product) is None:  # as its operations
                facts = product.candidate.facts
                assert facts is not None
                whole = ProductWork(product.candidate, Kept(), {})
                share = executed_flops(facts, product.kept).total / max(1, facts.flops.total)
                self._times[key] = share * self._products([whole])[_key(whole)]
            elif key not in self._times:
                missing.append((key, product))
        self._time(missing)
        return {key: self._times[key] for key in wanted}

    def _time(self, products: Sequence[tuple[Any, ProductWork]]) -> None:
        for start in self._bar(range(0, len(products), _TOGETHER)):
            together = products[start : start + _TOGETHER]
            run = functools.cache(functools.partial(self._run, [product for _, product in together]))
            for place, (key, product) in enumerate(together):
                one = functools.partial(_one_of, run, place)
                self._times[key] = self._cache.get(self._disk_key(product), one)

    def _run(self, products: Sequence[ProductWork]) -> list[float]:
        made = [_training(product, self.compiled) for product in products]
        facts = products[0].candidate.facts
        assert facts is not None
        return [one.seconds for one in time_calls(made, torch.device(facts.device))]

    def _disk_key(self, product: ProductWork) -> dict[str, Any]:
        facts = product.candidate.facts
        assert facts is not None
        key: dict[str, Any] = {"what": "product", "version": _VERSION, **device_key(torch.device(facts.device))}
        return {**key, "product": repr(_key(product)), "channels_last": _channels_last(facts, self.compiled)}

    def _bar(self, batches: range) -> Iterable[int]:
        if not self.progress or len(batches) < 2 or importlib.util.find_spec("tqdm") is None:
            return batches
        tqdm = importlib.import_module("tqdm").tqdm
        bar: Iterable[int] = tqdm(batches, desc="products", leave=False, disable=None)
        return bar


def _one_of(run: Callable[[], list[float]], place: int) -> float:
    """Of what was timed together, which is run once, and only if some of it is not known."""
    return run()[place]


def _key(product: ProductWork) -> Any:
    """What the time of a product depends on, beside device and memory format; None where it is not known."""
    facts = product.candidate.facts
    if facts is None or facts.call is None or facts.shape is None:
        return None
    roles = tuple(sorted((role.value, repr(spec)) for role, spec in product.roles.items()))
    gathers = product.kept.output is not None and not product.hoisted
    need = facts.flops.grad_input > 0, facts.flops.grad_weight > 0
    apart = roles if set(product.roles) - {Role.OUTPUT} or product.kept.straight_through else ()
    return product.candidate.kind, facts.call, facts.dtype, facts.device, need, product.kept, gathers, apart


def _channels_last(facts: ProductFacts, compiled: bool) -> bool:
    """Compiled for CPUs, convolutions are laid out channels last whatever the model's layout."""
    call = facts.call
    assert call is not None
    convolution = len(call.rhs) == 4 and len(call.lhs) == 4
    return call.channels_last or (compiled and convolution and facts.device.startswith("cpu"))


def _operands(product: ProductWork) -> CallShapes | None:
    """The shapes that are multiplied; None where that is not one smaller product of the same kind."""
    facts, kept = product.candidate.facts, product.kept
    assert facts is not None and facts.call is not None and facts.shape is not None
    call, shape = facts.call, facts.shape
    if kept == Kept():
        return call
    there, of_all = kept.tokens
    layer = product.candidate.kind == "linear" or (product.candidate.kind.startswith("conv") and there == of_all)
    if not layer or kept.straight_through or set(product.roles) - {Role.OUTPUT}:
        return None
    axis = len(call.lhs) - 1 if product.candidate.kind == "linear" else len(call.lhs) - len(call.rhs) + 1
    some, of = kept.share
    groups = shape.groups * some // of
    pairs = shape.pairs if kept.output is None else kept.output
    columns = shape.n if kept.columns is None else kept.columns
    lhs = (*call.lhs[:axis], pairs * groups, *call.lhs[axis + 1 :])
    if there < of_all:
        lhs = (math.prod(call.lhs[:-1]) * there // of_all, pairs)
    rhs = (columns * groups, pairs, *call.rhs[2:])
    op_kwargs = tuple((name, groups if name == "groups" else value) for name, value in call.op_kwargs)
    return CallShapes(lhs, rhs, op_kwargs, call.channels_last)


def _training(product: ProductWork, compiled: bool) -> Callable[[], Any]:
    """Forward and backward of a product as it is left."""
    facts, call = product.candidate.facts, _operands(product)
    assert facts is not None and facts.call is not None and facts.shape is not None and call is not None
    op, op_kwargs, kept = OPS[product.candidate.kind], dict(call.op_kwargs), product.kept
    options: dict[str, Any] = {}
    if kept.output is not None and not product.hoisted:  # both operands are gathered
        places = torch.linspace(0, facts.shape.pairs - 1, kept.output, device=facts.device).long()
        options["selection"] = Selection(places.expand(facts.shape.groups, -1).contiguous(), None)
        everything = dataclasses.replace(product, kept=dataclasses.replace(kept, output=None), roles={})
        call = _operands(everything)
        assert call is not None
    dtype = getattr(torch, facts.dtype.removeprefix("torch."))
    x, w = (torch.randn(shape, device=facts.device).to(dtype) for shape in (call.lhs, call.rhs))
    if _channels_last(facts, compiled):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        w = w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w
    need = facts.flops.grad_input > 0, facts.flops.grad_weight > 0
    wanted = [operand.requires_grad_() for operand, needed in zip((x, w), need, strict=True) if needed]

    def forward() -> Tensor:
        return op.function(**{op.lhs: x, op.rhs: w}, **op_kwargs, **options)

    if not wanted:
        return forward
    grad = torch.ones_like(forward())
    return lambda: torch.autograd.grad(forward(), wanted, grad)
