"""The selector: makes the selection of one product of one layer or call, at the ratio and switch of the moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fx_approx.core.candidates import Role
from fx_approx.ops.base import OPS, ProductOp
from fx_approx.ops.grad_norm_ema import new_running
from fx_approx.ops.gradient_selection import BackwardDrawn, Choice, ForwardDrawn, Rule
from fx_approx.runtime.rng import Draw, draw
from fx_approx.runtime.sharding import refuse_shard
from fx_approx.sampling.base import Selection, get_sampler
from fx_approx.sampling.scores import get_score
from fx_approx.sampling.spec import SamplerConfig


class Selector(nn.Module):
    """Makes the selection of one product of one site, or None where that product is to be exact.

    A selector has no parameters and is no submodule of the model. It is a module because integers of modules are
    compile-time constants: ``k`` is baked into the compiled graph, and one more value is one more compilation.

    Attributes:
        spec: Sampler and ratio.
        role: Which of the three products.
        site: Number of the selector; all draw independently.
        count: Uniforms that a forward draws for it beforehand, at ``offset`` of ``Draw.numbers``.
        k: Pairs to keep per group; 0 where the number of pairs is not known before the call.
        pairs: Column-row pairs per group, where known.
        enabled: False makes the site exact.
        shared: The graph makes the selection elsewhere; only calls of the layer outside the graph ask this selector.
        last_count: Pairs drawn by the last eager call; None if they are drawn in the backward pass.
        running: Running norms of the gradient, for scores that learn them; filled by backward passes.
    """

    running: Tensor | None

    def __init__(
        self,
        kind: str,
        op_kwargs: Mapping[str, Any],
        spec: SamplerConfig,
        site: int,
        pairs: int | None,
        owner: nn.Module,
        groups: int = 1,
        role: Role = Role.OUTPUT,
    ) -> None:
        super().__init__()
        self.kind, self.op_kwargs, self.site, self.role = kind, dict(op_kwargs), site, role
        self.pairs, self.groups = pairs, groups
        self.enabled = True
        self.last_count: int | None = None
        self._guard_epoch = 0  # Dynamo guards on it: compiled code sees that the ratio was changed
        self.offset = 0
        self.owner = (owner,)  # in a tuple: not a submodule
        self.shared = False
        self.register_buffer("running", None, persistent=False)
        self.set_spec(spec)

    def set_spec(self, spec: SamplerConfig) -> None:
        """Takes another sampler or ratio from the next call on."""
        self.spec = spec
        self.sampler, self.score = get_sampler(spec.name), get_score(spec.scores)
        self.epsilon = spec.effective_epsilon
        self.keeps_all = spec.ratio == 1  # the ratio itself would be a guard of compiled code
        self.k = spec.count(self.pairs) if self.pairs else 0
        self.count = self._uniforms(self.pairs, self.k, self.groups) if self.k and self.pairs else 0
        # Where k is not known beforehand it is computed from the ratio, a float, which guards may reuse stale
        # (pytorch#194976); the integer makes them see the change.
        self._guard_epoch += 1

    @property
    def active(self) -> bool:
        """Whether the next call samples: enabled, and the layer that owns the site is in training mode."""
        return self.enabled and self.owner[0].training

    @property
    def exact(self) -> bool:
        """Whether the ratio keeps all pairs."""
        return self.keeps_all or (self.pairs is not None and self.k >= self.pairs)

    @property
    def ahead(self) -> bool:
        """Whether the selection can be made before the input exists."""
        return self.role is Role.OUTPUT and self.spec.ahead

    def _uniforms(self, pairs: int, k: int, groups: int) -> int:
        return groups * self.sampler.uniforms(pairs, k) if self.sampler.random and k < pairs else 0

    def _numbers(self, pairs: int, k: int, groups: int, given: Draw | None) -> Tensor | None:
        """``[groups, n]`` uniforms, a slice of the forward's own where those were drawn for this count."""
        if not self.sampler.random:
            return None
        assert given is not None
        count = self._uniforms(pairs, k, groups)
        if count == self.count and k == self.k and not self.shared:
            numbers = given.numbers[self.offset : self.offset + count]
        else:
            numbers = draw(given.key, [self.site], [count])
        return numbers.view(groups, -1)

    def forward(self, lhs: Tensor | None, rhs: Tensor, given: Draw | None) -> Choice:
        """The selection for operands ``lhs`` and ``rhs``.

        Args:
            lhs: Left operand (None for scores that do not read it, if ``ahead``).
            rhs: Right operand.
            given: The randomness of this forward; None if no sampler of the model is random.

        Returns:
            A :class:`Selection` for the output; for a gradient what the backward pass makes one of, if its scores read
            the gradient. None if the product is exact, or autograd will not run it.

        Raises:
            RuntimeError: ``rhs`` is a part of a sharded weight.
        """
        op = OPS[self.kind]
        refuse_shard(rhs)
        if not self.active or not rhs.is_floating_point() or rhs.layout is not torch.strided:
            return None
        if lhs is not None and (lhs.layout is not torch.strided or not op.fits(lhs, rhs, self.op_kwargs)):
            return None
        apart = self.role is not Role.OUTPUT or self.spec.per_batch
        if lhs is None or not apart:
            groups, pairs = self.groups, op.pairs(lhs, rhs, self.op_kwargs)
        elif op.pairs(lhs, rhs, self.op_kwargs) == 0 or not self._runs(lhs, rhs):
            return None
        else:
            groups, pairs = op.roles.count(self.role, lhs, rhs, self.op_kwargs, self.spec)
        k = self.k if self.k and pairs == self.pairs else self._count(pairs)
        if k >= pairs or groups == 0:
            return None
        with torch.no_grad(), torch.autocast(rhs.device.type, enabled=False):
            numbers = self._numbers(pairs, k, groups, given)
            if self.role is not Role.OUTPUT and not self.score.early:
                return BackwardDrawn(self._rule(k), numbers)
            if lhs is None or not apart:
                # Without a graph there are no running norms of inputs: the weight's alone decide.
                kind = get_score("weight") if self.score.learns else self.score
                scores = op.scores(lhs, rhs, kind, self.op_kwargs)
            else:
                self._learn(op, lhs, rhs)
                scores = op.roles.scores(self.role, lhs, rhs, self.op_kwargs, self.spec, self.running)
            fixed_shape = torch.compiler.is_compiling()
            selection = self.sampler.draw(scores, k, numbers, epsilon=self.epsilon, fixed_shape=fixed_shape)
        if not fixed_shape:
            self.last_count = selection.indices.shape[1]
        return selection if self.role is Role.OUTPUT else ForwardDrawn(selection, self.spec.positions, self.running)

    def blind(self, given: Draw | None) -> Selection | None:
        """The selection of a call whose operands are not known, by scores that read none; None if it is exact.

        Args:
            given: The randomness of the forward.
        """
        if not self.active or self.exact:
            return None
        assert self.pairs is not None and not self.score.reads
        numbers = self._numbers(self.pairs, self.k, self.groups, given)
        scores = torch.ones(self.groups, self.pairs, device=None if numbers is None else numbers.device)
        return self.sampler.draw(scores, self.k, numbers, epsilon=self.epsilon, fixed_shape=False)

    def _runs(self, lhs: Tensor, rhs: Tensor) -> bool:
        """Whether autograd will run this product."""
        if self.role is Role.OUTPUT:
            return True
        return torch.is_grad_enabled() and (rhs if self.role is Role.GRAD_WEIGHT else lhs).requires_grad

    def _rule(self, k: int) -> Rule:
        reads = self.score.reads
        other = "weight" if self.role is Role.GRAD_INPUT else "input"
        spec = self.spec
        return Rule(spec.name, k, self.epsilon, True, other in reads, spec.positions, spec.per_batch)

    def _learn(self, op: ProductOp, lhs: Tensor, rhs: Tensor) -> None:
        """Makes room for the running norms, anew where the number of positions has changed."""
        if not self.score.learns:
            return
        positions = op.roles.positions(lhs, rhs, self.op_kwargs, self.spec)
        if self.running is not None and self.running.shape[0] == positions:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"scores={self.spec.scores!r} keep running norms for {positions} positions, which are not there yet: "
                "run one eager training step on inputs of this size before torch.compile"
            )
        self.running = new_running(positions, rhs.device)

    def _count(self, pairs: int) -> int:
        # The epoch is never 0: it is read so that compiled code is guarded on it.
        return self.spec.count(pairs) if self._guard_epoch else 0

    def extra_repr(self) -> str:
        """Kind, role, sampler and count."""
        spec = self.spec
        return f"{self.kind} {self.role.value}, {spec.name}:{spec.ratio:g}, scores={spec.scores}, k={self.k or '?'}"


class DrawSource(Protocol):
    """Gives a layer that is called outside the graph the randomness of its sample."""

    def draw_for(self, selector: Selector, inputs: list[Tensor]) -> Draw | None:
        """The randomness for this call, or None if the sampler needs none."""
        ...


class Site(NamedTuple):
    """ProductSampling one layer is sampled: a selector for each of its products, None for an exact one."""

    selectors: Mapping[Role, Selector]
    straight_through: bool
    source: DrawSource
