"""What data-parallel training sends: predicted from the plan, and as it was sent."""

from __future__ import annotations

from collections.abc import Mapping

from tabulate import tabulate
from torch import nn

from fx_approx.core.plan_effects import Axis, entries
from fx_approx.distributed.hook import SliceHook
from fx_approx.distributed.slices import Sliced
from fx_approx.runtime.approx_module import ApproxModule


class Traffic:
    """Bytes of gradients in a backward pass, before what the inner hook saves; by layer, predicted and sent.

    An all-reduce moves each byte several times, by its algorithm: a ring 2 (n - 1) / n times over n ranks. The shares
    are the same.
    """

    def __init__(
        self,
        model: ApproxModule,
        sliced: Mapping[nn.Parameter, Sliced],
        whole: Mapping[str, str],
        hook: SliceHook | None = None,
    ) -> None:
        """A report on ``hook``; without one, on what would be sent."""
        self._model, self._sliced, self._whole, self._hook = model, sliced, whole, hook

    @property
    def dense(self) -> int:
        """What sending all gradients whole would take."""
        return sum(p.nbytes for p in self._model.parameters() if p.requires_grad)

    @property
    def predicted(self) -> int:
        """Of what is sent at the present ratios, where every layer samples."""
        saved = sum(p.nbytes - self._share(p) for p in self._sliced)
        return self.dense - saved

    @property
    def sent(self) -> int | None:
        """In the last backward pass; None before the first."""
        return self._hook.sent if self._hook is not None and self._hook.steps else None

    def _share(self, parameter: nn.Parameter) -> int:
        own, shape = self._sliced[parameter], parameter.shape
        rows = self._kept(own.rows) if own.rows else shape[0]
        columns = self._kept(own.columns) if own.columns else shape[1]
        return parameter.nbytes * rows * columns // (shape[0] * shape[1])

    def _kept(self, axis: Axis) -> int:
        resample = self._model._fx_approx.resample
        assert resample is not None
        return entries(axis, [min(one.k, one.pairs) * one.groups for one in resample.each()])

    def __str__(self) -> str:
        lines = []
        for parameter, own in self._sliced.items():
            dense, share = parameter.nbytes, self._share(parameter)
            sent = None if self._hook is None else self._hook.by_layer.get(own.layer)
            lines.append(
                [own.name, f"{dense / 1024:.1f}", f"{share / 1024:.1f}", "" if sent is None else f"{sent / 1024:.1f}"]
            )
        table = tabulate(lines, ["gradient", "KiB", "predicted", "sent"], disable_numparse=True)
        reasons = "".join(f"\n{name}: whole, {reason}" for name, reason in self._whole.items())
        total = f"all gradients {self.dense / 2**20:.2f} MiB, predicted {self.predicted / 2**20:.2f}"
        if self.sent is not None:
            total += f", sent {self.sent / 2**20:.2f} ({100 * (1 - self.sent / self.dense):.1f} % less)"
        return f"{table}{reasons}\n{total}"
