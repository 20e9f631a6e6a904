"""The commands: what each prints, and its exit code."""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fx_approx.analysis.time_prediction import estimate_step_time
from fx_approx.analysis.verification import verify
from fx_approx.cli.arguments import MODEL, WrongArgumentError, line_width, without_name
from fx_approx.cli.models import build, example, random_inputs, run_setup
from fx_approx.compiler.transform import explain, transform
from fx_approx.core.plan import Policy
from fx_approx.errors import AlreadyTransformedError, CaptureError, ShapesRequiredError
from fx_approx.policies.parse import parse_policy
from fx_approx.policies.uniform import DEFAULT_POLICY
from fx_approx.savings.report import SavingsReport
from fx_approx.utils.tables import wrapped


def run(options: argparse.Namespace, recipe: Callable[..., Any] | None = None) -> tuple[str, int, list[str]]:
    """What a command prints, its exit code, and what there is to warn of.

    Args:
        options: What was parsed.
        recipe: The function of ``fx_approx.recipes`` that the command ``recipe`` names; the room is beside this one.

    Raises:
        WrongArgumentError: Of the model, the inputs or the policy.
    """
    module, path = options.model
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
        if options.setup is not None:
            run_setup(options.setup)
        model = build(module, path, dict(options.kwarg))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with _errors(f"{module}:{path}"):
                if recipe is None:
                    text, code = _COMMANDS[options.command](options, model)
                else:
                    text, code = _answer(recipe, options, model), 0
    return text, code, list(dict.fromkeys(str(warning.message) for warning in said))


def _policy(text: str | None) -> Policy:
    try:
        return DEFAULT_POLICY if text is None else parse_policy(text)
    except (TypeError, ValueError) as error:
        raise WrongArgumentError(f"argument --policy: {without_name(error)}") from None


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Errors of the library in the words of the command line."""
    try:
        yield
    except ShapesRequiredError as error:
        raise WrongArgumentError(f"argument --input: {error}") from None
    except (AlreadyTransformedError, CaptureError) as error:
        raise WrongArgumentError(f"{MODEL}: {name}: {without_name(error)}") from None
    except ValueError as error:
        name, _, rest = str(error).partition(": ")
        if name in ("ratio", "steps"):
            raise WrongArgumentError(f"argument --{name}: {rest}") from None
        argument = "--policy" if name == "budget" else "--input"
        raise WrongArgumentError(f"argument {argument}: {without_name(error)}") from None


def _explain(options: argparse.Namespace, model: nn.Module) -> tuple[str, int]:
    found = explain(model, _policy(options.policy), example(model, options.input), predict=options.time).report
    return _rendered(found, options), 0


def _predict(options: argparse.Namespace, model: nn.Module) -> tuple[str, int]:
    inputs = random_inputs(model, options.input) if options.check else example(model, options.input)
    policy = _policy(options.policy)
    found = estimate_step_time(model, policy, inputs, check=options.check, compiled=options.compiled)
    head = f"{type(model).__name__} under {options.policy or f'the default policy, {policy!r}'}:"
    return f"{wrapped(head, line_width())}\n{wrapped(str(found), line_width())}", 0


def _verify(options: argparse.Namespace, model: nn.Module) -> tuple[str, int]:
    inputs = random_inputs(model, options.input)
    found = verify(transform(model.train(), _policy(options.policy), inputs), inputs)
    return str(found), 0 if found.passed else 1


def _answer(recipe: Callable[..., Any], options: argparse.Namespace, model: nn.Module) -> str:
    """What a recipe says of a model."""
    inputs, given = random_inputs(model.train(), options.input), {"compile": options.compile}
    if options.ratio is not None:
        given["ratio"] = options.ratio
    if options.recipe == "finetune":  # with an optimiser a narrow network trains, which is fastest
        given["optimizer"] = torch.optim.SGD(model.parameters(), momentum=0.9)
    made = recipe(model, inputs, options.steps, **given)
    lines = [wrapped(line, line_width(), "    ") for line in str(made).splitlines()]
    return "\n".join([*lines, "", made.report().to_text(width=line_width())])


_COMMANDS: dict[str, Callable[[argparse.Namespace, nn.Module], tuple[str, int]]] = {
    "explain": _explain,
    "predict": _predict,
    "verify": _verify,
}


def _rendered(report: SavingsReport, options: argparse.Namespace) -> str:
    if options.format == "text":
        return report.to_text(options.columns, rows=options.rows, width=line_width())
    if options.format == "md":
        return report.to_markdown(options.columns)
    if options.format == "html":
        return report.to_html(options.columns)
    return (report.to_csv() if options.format == "csv" else report.to_json()).rstrip("\n")
