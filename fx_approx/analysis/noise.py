"""Measures the noise of sampling: how far sampled products, and the gradient of a step, are from the exact ones."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fx_approx._compat import buffers_of, in_backward, set_parameters
from fx_approx.analysis.noise_report import NoiseReport, ProductNoise, Tally, noise_of, sampled_text
from fx_approx.capture.containers import copied
from fx_approx.capture.module_snapshot import AttributeSnapshot
from fx_approx.capture.records import META_KEY
from fx_approx.capture.trace import kept_random_state
from fx_approx.core.candidates import Role
from fx_approx.errors import CaptureWarning
from fx_approx.ops.base import OPS, SAMPLING_ARGUMENTS
from fx_approx.ops.gradient_selection import ProductSampling
from fx_approx.runtime.approx_module import find, unwrapped
from fx_approx.runtime.graph_runtime import Runtime
from fx_approx.runtime.layers import SampledLayer
from fx_approx.runtime.rng import SEED, SELECTION_INTERVAL, STEP, Draw, further
from fx_approx.runtime.selector import Selector

_EXACT = ProductSampling()


@torch.inference_mode(False)
def gradient_noise(
    model: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None = None, *, draws: int = 16
) -> NoiseReport:
    """How far sampling takes this training step from the exact one, layer by layer and as a whole.

    For each call of each candidate that the plan samples, and for its output, its gradient of the input and its
    gradient of the weight: relative error √(E‖Ĉ − C‖²) / ‖C‖, bias ‖E Ĉ − C‖ / ‖C‖ and signal-to-noise ratio
    ‖C‖² / E‖Ĉ − C‖², the expectations over the random samples. Each product is taken by itself: its operands and the
    gradient that comes in are those of the exact step, so that errors of other layers do not mix in. Then the same for
    the gradient of the loss by all parameters, with all layers sampled as in training.

    The samples are those that the next ``draws`` forwards would take. All runs start from the same random states of
    torch, Python and numpy, so that dropout masks are the same. Nothing of the model changes, nor ``.grad``, BatchNorm
    statistics, the sampling state or random states.

    It costs an exact step, ``draws`` sampled steps, and each sampled product ``draws`` times more, forward and
    backward; where nothing is random, as with ``topk``, one draw is enough and is all that is made. In memory it takes,
    beside a step, copies of the operands and output gradients of all sampled products, then three times the parameters.
    Parts under ``torch.compile`` run eagerly.

    Args:
        model: A transformed model in training mode, or what wraps it.
        batch: The model's input, or a tuple of positional arguments, or a dict of keyword arguments.
        loss: Takes the model's output and returns a scalar tensor. By default the output itself if it is a scalar, or
            its ``loss`` attribute or entry. Scale it yourself where float16 gradients would vanish.
        draws: How often to draw. The noise floor of the bias falls as 1 / √draws.

    Returns:
        The report; ``print`` it, ``plot()`` it.

    Raises:
        TypeError: ``draws`` is no integer, or ``loss`` cannot be called.
        ValueError: ``model`` is not transformed, in ``eval()``, or all frozen; ``draws`` is below 1; the loss is no
            scalar, or depends on no parameter.
        RuntimeError: From torch, for a model with a checkpoint with ``use_reentrant=True``: those need ``backward()``,
            which would write into ``.grad``.
    """
    if isinstance(draws, bool) or not isinstance(draws, int):
        raise TypeError(f"draws: expected an integer, got {draws!r}")
    if draws < 1:
        raise ValueError(f"draws: expected at least 1, got {draws}")
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function of the model's output, or None, got {loss!r}")
    approx = find(model)
    name, runtime = approx.exact_class.__name__, approx._fx_approx
    if not approx.training:
        raise ValueError(f"model: {name} is in eval(), where nothing is sampled; call model.train() first")
    target = unwrapped(model)
    parameters = {path: p for path, p in target.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"model: no parameter of {name} requires a gradient, so there is no step to measure")
    gradients = functools.partial(_gradients, target, batch, loss, list(parameters.values()))
    random = runtime.draws
    snapshot = _Snapshot(target, runtime)
    recorder = _Recorder(runtime)
    with torch.compiler.set_stance("force_eager"), torch.enable_grad():
        with snapshot.undone():
            recorder.attach(approx)
            exact = gradients()
        with snapshot.undone():
            rows = tuple(_measured(runtime, call, draws) for call in recorder.calls)
        recorder.calls.clear()
        tallies = {path: Tally(grad) for path, grad in zip(parameters, exact, strict=True) if grad is not None}
        for number in range(draws if random else 1):
            with snapshot.undone(), warnings.catch_warnings():
                warnings.simplefilter("ignore", CaptureWarning)  # training says it
                state = runtime.state
                state[STEP] = (state[STEP] // state[SELECTION_INTERVAL] + number) * state[SELECTION_INTERVAL]
                for path, grad in zip(parameters, gradients(), strict=True):
                    if path in tallies:
                        tallies[path].add(grad)
    whole = noise_of(list(tallies.values()), random)
    each = {path: noise_of([tally], random, whole.norm) for path, tally in tallies.items()}
    note = "Nothing here is random, so one draw says it all: the error is the bias."
    note = note if runtime.samples else "Nothing is sampled at present."
    return NoiseReport(name, draws, whole, each, rows, () if random else (note,))


def _scalar(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    value: Any
    if loss is not None:
        value = loss(output)
    elif isinstance(output, Tensor):
        value = output
    else:
        value = getattr(output, "loss", None)
        if value is None and isinstance(output, Mapping):
            value = output.get("loss")
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        if loss is not None:
            raise ValueError(f"loss: expected it to return a scalar tensor, got {what}")
        what = what if isinstance(output, Tensor) else f"{type(output).__name__} without a scalar loss"
        raise ValueError(f"loss: the model's output is {what}; give loss=lambda output: ... that makes a scalar of it")
    return value


def _autocast(device: str, enabled: bool, dtype: torch.dtype) -> torch.autocast:
    """An autocast that keeps no cast weights, which would outlive the gradients computed from them."""
    return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)


def _gradients(
    target: nn.Module, batch: Any, loss: Callable[[Any], Tensor] | None, parameters: list[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """The loss's gradient by each parameter, None where it does not depend on it; ``.grad`` is not touched."""
    # Copies: a forward may change its input, and is known by it (fx_approx.runtime.rng.fingerprint).
    kwargs = copied(dict(batch)) if isinstance(batch, Mapping) else {}
    args = () if isinstance(batch, Mapping) else copied(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))
    device = parameters[0].device.type
    dtype = torch.get_autocast_dtype(device)
    with _autocast(device, torch.is_autocast_enabled(device), dtype):
        value = _scalar(target(*args, **kwargs), loss)
    with _autocast(device, False, dtype):
        found = torch.autograd.grad(value, parameters, allow_unused=True) if value.requires_grad else ()
    if all(grad is None for grad in found):
        raise ValueError("loss: it depends on no parameter that requires a gradient")
    return found


class _Snapshot:
    """All that a forward may change, of the model and of its runtime; to run from the same start again and again."""

    def __init__(self, target: nn.Module, runtime: Runtime) -> None:
        self.modules = list(dict.fromkeys((*target.modules(), *runtime.modules())))
        self.attributes = AttributeSnapshot((*self.modules, *runtime.parts))

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Takes back what is done inside: attributes, hooks, buffers, random states.

        Inside, buffers and other tensors of modules are copies: nobody who holds the originals sees a change.
        """
        with kept_random_state(), self.attributes.kept():
            copies: dict[int, Tensor] = {}
            for module in self.modules:
                for place in (vars(module), buffers_of(module)):
                    for name, value in list(place.items()):
                        if isinstance(value, Tensor):
                            place[name] = copies.setdefault(id(value), copied(value))
            yield


@dataclasses.dataclass
class _Call:
    """A sampled product of the exact step: what is needed to compute it again.

    Attributes:
        name: Name of the candidate.
        op: Its kind.
        number: How many calls of the candidate were before this one.
        multiply: Computes it from its operands, without a bias.
        lhs: Left operand, a leaf that requires a gradient if autograd computed one.
        rhs: Right operand, likewise.
        selectors: Those of the candidate.
        straight_through: As in the plan.
        autocast: Device, switch and dtype that it was computed under.
        grad: Gradient of its output, once the backward pass has been there; None if that does not get there.
    """

    name: str
    op: str
    number: int
    multiply: Callable[[Tensor, Tensor, ProductSampling], Tensor]
    lhs: Tensor
    rhs: Tensor
    selectors: Mapping[Role, Selector]
    straight_through: bool
    autocast: tuple[str, bool, torch.dtype]
    grad: Tensor | None = None

    def choose(self, given: Draw | None) -> ProductSampling:
        """Selections for all products that are sampled at present."""
        chosen: dict[Role, Any] = {
            role: selector(None if selector.ahead else self.lhs, self.rhs, given)
            for role, selector in self.selectors.items()
        }
        output, grad_input, grad_weight = map(chosen.get, Role)
        return ProductSampling(output, grad_input, grad_weight, self.straight_through)

    def compute(self, how: ProductSampling) -> dict[Role, Tensor]:
        """Output and gradients, as far as autograd computed them."""
        with _autocast(*self.autocast):
            output = self.multiply(self.lhs, self.rhs, how)
        found = {Role.OUTPUT: output}
        wanted = {Role.GRAD_INPUT: self.lhs, Role.GRAD_WEIGHT: self.rhs}
        wanted = {role: operand for role, operand in wanted.items() if operand.requires_grad}
        if self.grad is not None and wanted:
            with _autocast(self.autocast[0], False, self.autocast[2]):
                grads = torch.autograd.grad(output, list(wanted.values()), self.grad, materialize_grads=True)
            found.update(zip(wanted, grads, strict=True))
        return found


class _Recorder:
    """Writes down the sampled products of a step."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.calls: list[_Call] = []
        self.candidates = {candidate.name: candidate for candidate in runtime.record.candidates}
        self.selectors: dict[str, dict[Role, Selector]] = {}
        for (name, role), selector in runtime.selectors.items():
            self.selectors.setdefault(name, {})[role] = selector

    def attach(self, root: nn.Module) -> None:
        """Makes the model exact and reports its calls here; to be undone by a :class:`_Snapshot`."""
        for one in self.runtime.switches:
            one.enabled = False
        program = self.runtime.program
        if program.plain is not None:
            program.serve(program.plain, self._interpreted)
        names = {selector: name for (name, _), selector in self.runtime.selectors.items()}
        for module in root.modules():
            if isinstance(module, SampledLayer) and module.site is not None and module.site.selectors:
                name = names[next(iter(module.site.selectors.values()))]
                module.register_forward_hook(functools.partial(self._hook, name), with_kwargs=True)

    def _interpreted(self, graph: fx.Graph) -> Callable[..., Any]:
        return lambda root, *values: _Interpreter(root, graph, self).run(*values)

    def _hook(self, name: str, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
        inputs = (*args, *kwargs.values())
        if len(inputs) == 1:  # calls by the graph have more
            self.layer(name, module, inputs[0], output)

    def layer(self, name: str, module: nn.Module, lhs: Tensor, output: Tensor) -> None:
        """A sampled layer was called."""
        twin: Any = copy.copy(module)  # to be called with another weight, and without the hooks

        def multiply(lhs: Tensor, rhs: Tensor, how: ProductSampling) -> Tensor:
            set_parameters(twin, {"weight": rhs, "bias": None})
            result: Tensor = twin.forward(lhs, *how)
            return result

        weight: Any = module.weight
        self._add(name, multiply, lhs, weight, output)

    def function(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """A functional product was called."""
        op = OPS[self.candidates[name].kind]
        bound = op.bind(args, {key: value for key, value in kwargs.items() if key not in SAMPLING_ARGUMENTS})

        def multiply(lhs: Tensor, rhs: Tensor, how: ProductSampling) -> Tensor:
            call = {key: torch.zeros_like(v) if isinstance(v, Tensor) else v for key, v in bound.items()}
            call |= {op.lhs: lhs, op.rhs: rhs, **dict(zip(SAMPLING_ARGUMENTS, how, strict=True))}
            return op.function(**call)

        self._add(name, multiply, bound[op.lhs], bound[op.rhs], output)

    def _add(
        self,
        name: str,
        multiply: Callable[[Tensor, Tensor, ProductSampling], Tensor],
        lhs: Tensor,
        rhs: Tensor,
        output: Tensor,
    ) -> None:
        if in_backward():  # a checkpoint recomputes a call that is known
            return
        device = lhs.device.type
        call = _Call(
            name=name,
            op=self.candidates[name].kind,
            number=sum(call.name == name for call in self.calls),
            multiply=multiply,
            lhs=_operand(lhs, output),
            rhs=_operand(rhs, output),
            selectors=self.selectors[name],
            straight_through=self.runtime.record.plan[name].straight_through,
            autocast=(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)),
        )
        self.calls.append(call)
        if output.requires_grad:
            output.register_hook(functools.partial(setattr, call, "grad"))


def _operand(tensor: Tensor, output: Tensor) -> Tensor:
    """An operand cut off from its graph; a copy, since what follows may change an activation in place."""
    own = tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    return own.requires_grad_(tensor.requires_grad and output.requires_grad)


class _Interpreter(fx.Interpreter):
    """Runs the model's graph and reports the candidates in it."""

    def __init__(self, root: nn.Module, graph: fx.Graph, recorder: _Recorder) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False  # errors are to read as they do in training
        self.recorder = recorder

    def run_node(self, node: fx.Node) -> Any:
        """As the base class; then tells the recorder."""
        result = super().run_node(node)
        for name in node.meta.get(META_KEY, ()):
            if name in self.recorder.selectors and self.recorder.candidates[name].node:
                args, kwargs = self.fetch_args_kwargs_from_env(node)
                if node.op == "call_module":
                    self.recorder.layer(name, self.module.get_submodule(str(node.target)), args[0], result)
                else:
                    self.recorder.function(name, args, kwargs, result)
        return result

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's output as generated code returns it, in plain lists and dicts."""
        return _plain(super().output(target, args, kwargs))


def _plain(value: Any) -> Any:
    if isinstance(value, immutable_dict):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, immutable_list):
        return [_plain(element) for element in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value


def _measured(runtime: Runtime, call: _Call, draws: int) -> ProductNoise:
    """Computes a product exactly and with ``draws`` samples."""
    running = {selector: selector.running for selector in call.selectors.values()}
    tallies = {role: Tally(tensor) for role, tensor in call.compute(_EXACT).items()}
    random, text = False, "exact"
    for number in range(draws):
        for selector, norms in running.items():
            selector.running = None if norms is None else norms.clone()
        how = call.choose(_drawn(runtime, number, call.number) if runtime.draws else None)
        own = {role: call.selectors[role] for role, choice in zip(Role, how, strict=False) if choice is not None}
        follows = Role.OUTPUT in own and not call.straight_through
        estimates = call.compute(how)
        for role, tally in tallies.items():
            if role in own or follows:
                tally.add(estimates[role])
        random = any(selector.sampler.random for selector in own.values())
        text = sampled_text({role: selector.spec for role, selector in own.items()})
        if not random:
            break
    noise = {role: noise_of([tally], random) for role, tally in tallies.items()}
    output, others = noise[Role.OUTPUT], (noise.get(Role.GRAD_INPUT), noise.get(Role.GRAD_WEIGHT))
    return ProductNoise(call.name, call.number + 1, call.op, text, output, *others)


def _drawn(runtime: Runtime, number: int, call: int) -> Draw:
    """The randomness of the ``number``-th of the next forwards, for a layer that was called ``call`` times before."""
    state = runtime.state
    key = further(torch.stack((state[SEED], state[STEP] // state[SELECTION_INTERVAL] + number)), call)
    return runtime.randomness.of(key)
