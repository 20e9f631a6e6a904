"""Peak memory of a whole training step with AdamW: exact, as a subnetwork, and as a narrow network.

    python benchmarks/subnetwork_memory.py --json FILE.json --markdown FILE.md
    python benchmarks/subnetwork_memory.py --models minilm --batch 128

What stands before the step (weights, running statistics, the optimiser's state, the batch) is counted by storage; on
top of it comes the most that is allocated at one time in forward, loss, backward and the optimiser's step, by
torch's profiler: activations, gradients, temporaries. The full model's weights that rest while its subnetwork trains
are counted with the subnetwork, and so are the full moments, where the optimiser was one of the full model
(`narrow_optimizer`; `rest="drop"`, and an optimiser that is made for the subnetwork, have none). Eager; what oneDNN
allocates for itself is not seen.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _header import header, parse_ratio
from _peak import peak_bytes
from _steps import train_step
from _subnetwork_cases import CASES, Case, add_case_options, write
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fx_approx
from fx_approx.subnetworks import extract, narrow_optimizer
from fx_approx.subnetworks.optimizers import full_moments

FRESH, DROP, KEEP = "subnetwork, its own optimizer", 'subnetwork, rest="drop"', "subnetwork, full moments at rest"


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes of one variant.

    Attributes:
        model: Name of the model.
        what: Its scope, or what is sampled.
        batch: Shape of the batch.
        variant: What is trained.
        standing: Weights, running statistics, state of the optimiser and the batch.
        resting: Of these, the full weights, and the full moments where there are any.
        step: The most that a step allocates beside.
    """

    model: str
    what: str
    batch: tuple[int, ...]
    variant: str
    standing: int
    resting: int
    step: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.standing + self.step


def bytes_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages, each once."""
    found = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(found.values())


def held(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def measure_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, resting: Sequence[Tensor] = ()
) -> tuple[int, int, int]:
    """Bytes that stand, of these the resting ones, and the most that a step allocates beside; after two other steps."""
    for _ in range(2):
        train_step(model, inputs, optimizer)
    state = [one for one in tree_leaves([*optimizer.state.values()]) if isinstance(one, Tensor)]
    trained = bytes_of([*held(model), *state, inputs])
    every = bytes_of([*held(model), *state, inputs, *resting])
    return every, every - trained, peak_bytes(lambda: train_step(model, inputs, optimizer), "cpu")


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of all variants."""
    return torch.optim.AdamW(parameters, 1e-4)


def measure(case: Case, ratio: float, min_k: int, batch: int | None = None) -> list[Measured]:
    """All variants of one case."""
    torch.manual_seed(0)
    exact, inputs = case.build()
    if batch is not None:
        inputs = inputs.repeat(-(-batch // len(inputs)), *[1] * (inputs.dim() - 1))[:batch].clone()

    def row(variant: str, numbers: tuple[int, int, int]) -> Measured:
        return Measured(case.model, case.what, tuple(inputs.shape), variant, *numbers)

    model = copy.deepcopy(exact)
    found = [row("exact", measure_step(model, adamw(model.parameters()), inputs))]
    del model
    approx = fx_approx.transform(exact, case.policy(ratio, min_k), inputs)
    full = list(held(approx))
    for variant in (FRESH, DROP, KEEP):
        sub = extract(approx, example_inputs=inputs)
        if variant == FRESH:
            optimizer, moments = adamw(sub.parameters()), []
        else:
            optimizer = adamw(approx.parameters())
            for parameter in approx.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            narrow_optimizer(optimizer, sub, approx, rest="drop" if variant == DROP else "cpu")
            moments = [one for one in tree_leaves(full_moments(optimizer)) if isinstance(one, Tensor)]
        found.append(row(variant, measure_step(sub, optimizer, inputs, [*full, *moments])))
        del sub, optimizer, moments
    narrow = case.narrow()
    found.append(row("narrow, written by hand", measure_step(narrow, adamw(narrow.parameters()), inputs)))
    return found


COLUMNS = ["variant", "standing, MB", "of it at rest", "a step beside, MB", "peak, MB", "of exact"]


def cells(own: Sequence[Measured]) -> list[list[str]]:
    """One line for each variant of one case and batch."""
    exact = own[0].peak
    return [
        [
            one.variant,
            *(f"{number / 1e6:,.1f}" for number in (one.standing, one.resting, one.step, one.peak)),
            f"{one.peak / exact:.2f}",
        ]
        for one in own
    ]


def table(own: Sequence[Measured], style: str) -> str:
    """The variants of one case and batch."""
    return tabulate(cells(own), COLUMNS, style, disable_numparse=True)


def aim(own: Sequence[Measured]) -> str:
    """What is asked for, and whether it is there."""
    asked = next(one.memory for one in CASES if (one.model, one.what) == (own[0].model, own[0].what))
    if asked is None:
        return ""
    shares = {one.variant: one.peak / own[0].peak for one in own}
    said = ", ".join(
        f"{shares[name]:.2f} {'met' if shares[name] <= asked else 'missed'} ({name})" for name in (FRESH, KEEP)
    )
    return f"Aim: at most {asked:g} of exact; {said}."


def grouped(found: Sequence[Measured]) -> dict[str, list[Measured]]:
    """By title, the variants of one case and batch."""
    made: dict[str, list[Measured]] = {}
    for one in found:
        made.setdefault(f"{one.model}, {one.what}, batch {' x '.join(map(str, one.batch))}", []).append(one)
    return made


def markdown(found: Sequence[Measured], about: Mapping[str, Any]) -> str:
    """The page."""
    parts = [
        "# Subnetworks: peak memory of a whole training step",
        "Written by `python benchmarks/subnetwork_memory.py --json docs/results/subnetwork-memory.json --markdown "
        "docs/results/subnetwork-memory.md`, which says how. Ratio 0.5, scores by weight, AdamW, eager, float32.",
        f"{', '.join(f'{name} {value}' for name, value in about.items() if value is not None)}.",
        "*standing*: weights, running statistics, the optimiser's state and the batch; *at rest*: of these, the full "
        "model's weights, and its moments where they are kept. *a step beside*: the most that forward, backward and "
        "the optimiser's step have allocated at one time.",
    ]
    for title, own in grouped(found).items():
        parts += [f"## {title}", table(own, "github"), *filter(None, [aim(own)])]
    return "\n\n".join(parts) + "\n"


def stored(path: Path | None) -> list[Measured]:
    """What a file of results holds."""
    if path is None or not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return [Measured(**{**row, "batch": tuple(row["batch"])}) for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, "examples in a step (that of the model)")
    options = parse_ratio(parser, arguments)
    print(header("Subnetworks: peak memory of a whole training step with AdamW"), flush=True)
    chosen = [c for c in CASES if (c.memory is not None if options.models is None else c.model in options.models)]
    for case in chosen:
        own = measure(case, options.ratio, options.min_k, options.batch)
        ((title, rows),) = grouped(own).items()
        print(f"\n{title}\n{table(rows, 'simple')}\n{aim(rows)}", flush=True)
        every = {**grouped(stored(options.json)), title: rows}
        found = [one for rows in every.values() for one in rows]
        write(options, found, markdown)


if __name__ == "__main__":
    main()
