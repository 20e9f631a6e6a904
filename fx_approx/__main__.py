"""The command line: ``python -m fx_approx explain MODULE:CALLABLE --input SHAPE --policy POLICY``."""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import os
import re
import runpy
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from fx_approx._compat import FakeTensorMode
from fx_approx.compiler.transform import explain
from fx_approx.core.plan import Policy
from fx_approx.core.version import VERSION
from fx_approx.errors import AlreadyTransformedError, CaptureError, ShapesRequiredError
from fx_approx.policies.parse import parse_policy
from fx_approx.policies.uniform import DEFAULT_POLICY
from fx_approx.savings.report import SavingsReport
from fx_approx.utils.tables import COLUMNS

_DESCRIPTION = """\
What fx_approx.transform would sample in a model, layer by layer, without doing it.

  python -m fx_approx explain torchvision.models:resnet50 --input 32x3x224x224 --policy topk:0.5
  python -m fx_approx explain mymodels:Net.small --kwarg classes=10 --input 8x128:int64 --format md
"""
_INPUT = re.compile(r"([1-9][0-9]*(?:x[1-9][0-9]*)*)(?::(\w+))?")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_TABLES = ("text", "md", "html")
_MODEL = "argument MODULE:CALLABLE"
_TORCHVISION = (
    ". This torchvision was built for another torch (its usual wheel belongs to CUDA builds): install the two "
    "together for one platform, or give --setup FILE with a Python file that defines the missing operators"
)


_Input = tuple[tuple[int, ...], torch.dtype]


class _WrongArgument(Exception):
    """The message names the argument and what would be right."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongArgument(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Those after the program's name; by default the process's own.

    Returns:
        The exit code: 0, or 2 for a wrong argument, which one line on stderr names.
    """
    try:
        options = _parser().parse_args(arguments)
        report, said = _explain(options)
    except _WrongArgument as error:
        print(f"fx_approx: error: {error}", file=sys.stderr)
        return 2
    for warning in said:
        print(f"fx_approx: warning: {warning}", file=sys.stderr)
    try:
        print(_rendered(report, options), flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> _Parser:
    parser = _Parser(prog="python -m fx_approx", description="Looks at models as fx_approx sees them.")
    parser.add_argument("--version", action="version", version=f"fx_approx {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "explain",
        help="what transform would sample, layer by layer",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "model",
        type=_argument(_split_model),
        metavar="MODULE:CALLABLE",
        help="returns the model; the part after the colon may be dotted",
    )
    command.add_argument(
        "--input",
        action="append",
        type=_argument(_parse_input),
        metavar="SHAPE[:DTYPE]",
        help="shape of a positional argument of the model, such as 32x3x224x224 or 8x128:int64, once for each; "
        "without any, the report has no shapes",
    )
    command.add_argument(
        "--policy",
        type=_argument(parse_policy),
        default=DEFAULT_POLICY,
        help="exact, paper[:RATIO], or SAMPLER[:RATIO[:SCORES[:SCOPE]]] for every layer; by default that of "
        "fx_approx.transform",
    )
    command.add_argument(
        "--kwarg",
        action="append",
        type=_argument(_parse_keyword),
        default=[],
        metavar="NAME=VALUE",
        help="for the callable; a Python literal, or else text",
    )
    command.add_argument(
        "--format", choices=("text", "md", "csv", "json", "html"), default="text", help="(%(default)s)"
    )
    command.add_argument(
        "--columns",
        type=_argument(_parse_columns),
        metavar="NAME,...",
        help=f"of {', '.join(_TABLES)}, out of: {', '.join(COLUMNS)} (what fits the terminal, if there is one)",
    )
    command.add_argument(
        "--setup",
        type=Path,
        metavar="FILE",
        help="a Python script to run before the model's module is imported, for example to define operators",
    )
    return parser


def _argument(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """``convert`` for argparse, which keeps the message of no other error."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(_without_name(error)) from None

    return converted


def _split_model(text: str) -> tuple[str, str]:
    module, colon, path = text.partition(":")
    if not colon or not _PATH.fullmatch(module) or not _PATH.fullmatch(path):
        raise ValueError(f"expected module:callable such as torchvision.models:resnet50, got {text!r}")
    return module, path


def _parse_input(text: str) -> _Input:
    match = _INPUT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected positive sizes such as 32x3x224x224 or 8x128:int64, got {text!r}")
    name = match[2] or "float32"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype of torch such as float32, bfloat16 or int64, got {text!r}")
    return tuple(map(int, match[1].split("x"))), dtype


def _parse_keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"expected NAME=VALUE such as num_classes=10, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _parse_columns(text: str) -> list[str]:
    columns = text.split(",")
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ValueError(f"expected names from {', '.join(COLUMNS)}, got {', '.join(map(repr, unknown))}")
    return columns


def _explain(options: argparse.Namespace) -> tuple[SavingsReport, list[str]]:
    """The report, and what there is to warn of."""
    if options.columns and options.format not in _TABLES:
        raise _WrongArgument(f"argument --columns: only for --format {', '.join(_TABLES)}, got {options.format}")
    module, path = options.model
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
        if options.setup is not None:
            _run_setup(options.setup)
        model = _build(module, path, dict(options.kwarg))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            report = _report(f"{module}:{path}", model, options.policy, _example(model, options.input or []))
    return report, [str(warning.message) for warning in said]


def _example(model: nn.Module, inputs: Sequence[_Input]) -> tuple[torch.Tensor, ...] | None:
    """Inputs on the model's device that take no memory, however large."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    try:
        with FakeTensorMode():
            return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs) or None
    except (RuntimeError, OverflowError) as error:
        raise _WrongArgument(f"argument --input: {error}") from None


def _report(name: str, model: nn.Module, policy: Policy, example: tuple[torch.Tensor, ...] | None) -> SavingsReport:
    try:
        return explain(model, policy, example).report
    except ShapesRequiredError as error:
        raise _WrongArgument(f"argument --input: {error}") from None
    except AlreadyTransformedError as error:
        raise _WrongArgument(f"{_MODEL}: {name}: {_without_name(error)}") from None
    except ValueError as error:
        raise _WrongArgument(f"argument --input: {_without_name(error)}") from None
    except CaptureError as error:
        raise _WrongArgument(f"{_MODEL}: {name}: {_without_name(error)}") from None


def _run_setup(path: Path) -> None:
    if not path.is_file():
        raise _WrongArgument(f"argument --setup: {path} is no file")
    try:
        runpy.run_path(str(path), run_name="__main__")
    except Exception as error:
        raise _WrongArgument(f"argument --setup: {path} failed: {_described(error)}") from None


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # an import runs anything
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise _WrongArgument(f"{_MODEL}: there is no module {missing!r} (is it installed here?)") from None
        hint = _TORCHVISION if "torchvision::" in str(error) else ""
        raise _WrongArgument(f"{_MODEL}: import {name} failed: {_described(error)}{hint}") from None


def _build(module: str, path: str, kwargs: dict[str, Any]) -> nn.Module:
    found, parent = _import(module), module
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found))
            close = f"; it has {', '.join(near)}" if near else ""
            raise _WrongArgument(f"{_MODEL}: {parent} has no {part!r}{close}")
        found, parent = getattr(found, part), f"{parent}.{part}"
    if not callable(found):
        raise _WrongArgument(f"{_MODEL}: {parent} is not callable, it is a {type(found).__name__}")
    if isinstance(found, nn.Module):
        if kwargs:
            raise _WrongArgument(f"argument --kwarg: {parent} is a model already, there is nothing to call")
        return found
    call = f"{parent}({', '.join(f'{name}={value!r}' for name, value in kwargs.items())})"
    try:
        model = found(**kwargs)
    except Exception as error:  # the user's own code
        raise _WrongArgument(f"{_MODEL}: {call} failed: {_described(error)}") from None
    if not isinstance(model, nn.Module):
        raise _WrongArgument(f"{_MODEL}: {call} returned a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _without_name(error: Exception) -> str:
    """The message without the library's name for the argument."""
    return re.sub(r"^(model|policy|example_inputs): ", "", str(error))


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _rendered(report: SavingsReport, options: argparse.Namespace) -> str:
    if options.format == "text":
        fits = shutil.get_terminal_size().columns if sys.stdout.isatty() and not options.columns else None
        return report.to_text(options.columns, width=fits)
    if options.format == "md":
        return report.to_markdown(options.columns)
    if options.format == "html":
        return report.to_html(options.columns)
    return (report.to_csv() if options.format == "csv" else report.to_json()).rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
