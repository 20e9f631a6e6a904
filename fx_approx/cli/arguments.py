"""What the command line understands; knows nothing of torch, so that help and wrong arguments answer at once."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fx_approx.cli.demo_arguments import add_demo
from fx_approx.core.policy_names import POLICIES, SAMPLERS, form, split_policy
from fx_approx.core.version import VERSION
from fx_approx.utils.tables import COLUMNS, FEW, NARROWEST, WIDTH

MODEL = "argument MODULE:CALLABLE"

_DESCRIPTION = """\
Looks at models as fx_approx sees them.

  python -m fx_approx explain torchvision.models:resnet50 --input 32x3x224x224 --policy topk:0.5
  python -m fx_approx predict torchvision.models:resnet50 --input 32x3x224x224 --check
  python -m fx_approx verify mymodels:Net.small --kwarg classes=10 --input 8x128:int64
  python -m fx_approx recipe finetune torchvision.models:resnet18 --input 32x3x64x64
  python -m fx_approx demo
"""
_EXPLAIN = """\
What fx_approx.transform would sample in a model, layer by layer, without doing it.

  python -m fx_approx explain torchvision.models:resnet50 --input 32x3x224x224 --policy topk:0.5
  python -m fx_approx explain mymodels:Net.small --kwarg classes=10 --input 8x128:int64 --rows all
"""
_PREDICT = """\
What a training step will take in time, exact and with the policy, as a cost model
predicts it. A device that it has not seen is measured for some seconds once.
"""
_VERIFY = """\
Transforms the model and runs a training step twice on random inputs, with and without
computing what no one reads, and compares all numbers. Integers and truth values are 0
and 1. The exit code is 1 where numbers differ.
"""
_RECIPE = """\
What a recipe would choose for the model, and why, and how much faster a step of training is on this machine. Nothing is
trained: steps are timed on random inputs.

  python -m fx_approx recipe finetune torchvision.models:resnet18 --input 32x3x64x64
  python -m fx_approx recipe transformer torchvision.models:vit_b_16 --input 2x3x224x224 --steps 500
"""
_RECIPES = {"finetune": 0.5, "pretrain": 0.65, "transformer": 0.5}
_INPUT = re.compile(r"([1-9][0-9]*(?:x[1-9][0-9]*)*)(?::(\w+))?")
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_TABLES = ("text", "md", "html")
_DTYPES = (
    *("float32", "float64", "float16", "bfloat16", "complex64", "complex128"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)

Input = tuple[tuple[int, ...], str]
"""Shape and name of the data type."""


class WrongArgumentError(Exception):
    """The message names the argument and what would be right."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise WrongArgumentError(message)


def line_width() -> int:
    """Characters of a line: those of the terminal, and :data:`fx_approx.utils.tables.WIDTH` where there is none."""
    return max(NARROWEST, shutil.get_terminal_size((WIDTH, 24)).columns)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked as far as that can be done without torch.

    Raises:
        WrongArgumentError: Something is missing or wrong.
        SystemExit: Help or the version was asked for, and printed.
    """
    options = _parser().parse_args(arguments)
    if options.command == "demo":
        return options
    top = options.model[0].partition(".")[0]
    if options.setup is None and top not in sys.modules and importlib.util.find_spec(top) is None:
        raise WrongArgumentError(f"{MODEL}: there is no module {top!r} (is it installed here?)")
    if options.command == "explain":
        if options.columns and options.format not in _TABLES:
            raise WrongArgumentError(
                f"argument --columns: only for --format {', '.join(_TABLES)}, got {options.format}"
            )
        if options.rows and options.format != "text":
            raise WrongArgumentError(f"argument --rows: only for --format text, got {options.format}")
    elif not options.input:
        raise WrongArgumentError(
            f"argument --input: {options.command} needs the shapes of one training batch, such as --input 32x3x224x224"
        )
    return options


def _parser() -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="python -m fx_approx", description=_DESCRIPTION, epilog=_policies(), formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fx_approx {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    explain = commands.add_parser(
        "explain",
        help="what transform would sample, layer by layer",
        description=_EXPLAIN,
        epilog=_policies(),
        formatter_class=raw,
    )
    _add_model(explain, "without any, the report has no shapes")
    explain.add_argument("--time", action="store_true", help="predict the time of a step, too; see predict")
    explain.add_argument(
        "--format", choices=("text", "md", "csv", "json", "html"), default="text", help="(%(default)s)"
    )
    explain.add_argument(
        "--columns",
        type=_argument(_parse_columns),
        metavar="NAME,...",
        help=f"of {', '.join(_TABLES)}, out of: {', '.join(COLUMNS)} ({','.join(FEW)})",
    )
    explain.add_argument(
        "--rows",
        choices=("all", "folded"),
        help="of text: every row, or those that say the same as one (folded where there are many)",
    )
    predict = commands.add_parser(
        "predict",
        help="what a training step will take in time",
        description=_PREDICT,
        epilog=_policies(),
        formatter_class=raw,
    )
    _add_model(predict, "needed")
    predict.add_argument("--compiled", action="store_true", help="the step will be compiled")
    predict.add_argument("--check", action="store_true", help="time steps on random inputs, too")
    verify = commands.add_parser(
        "verify",
        help="whether leaving out what no one reads changes a number",
        description=_VERIFY,
        epilog=_policies(),
        formatter_class=raw,
    )
    _add_model(verify, "needed")
    recipe = commands.add_parser(
        "recipe",
        help="what a recipe would choose and gain, without training",
        description=_RECIPE,
        formatter_class=raw,
    )
    recipe.add_argument("recipe", choices=list(_RECIPES), help="the function of fx_approx.recipes")
    _add_model(recipe, "needed", policy=False)
    shares = ", ".join(f"{ratio:g} of {name}" for name, ratio in _RECIPES.items())
    recipe.add_argument("--ratio", type=float, help=f"share that is computed ({shares})")
    recipe.add_argument("--steps", type=int, default=1000, help="of the whole training (%(default)s)")
    recipe.add_argument("--compile", action="store_true", help="the training will be compiled")
    add_demo(commands)
    return parser


def _add_model(command: argparse.ArgumentParser, without: str, policy: bool = True) -> None:
    command.add_argument(
        "model",
        type=_argument(_split_model),
        metavar="MODULE:CALLABLE",
        help="returns the model; the part after the colon may be dotted",
    )
    command.add_argument(
        "--input",
        action="append",
        default=[],
        type=_argument(_parse_input),
        metavar="SHAPE[:DTYPE]",
        help="shape of a positional argument of the model, such as 32x3x224x224 or 8x128:int64, once for each; "
        f"{without}",
    )
    if policy:
        command.add_argument(
            "--policy", type=_argument(_checked_policy), help="see below; by default that of fx_approx.transform"
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
        "--setup",
        type=Path,
        metavar="FILE",
        help="a Python script to run before the model's module is imported, for example to define operators",
    )


def _policies() -> str:
    """A line for each policy."""
    names = [(form(name), said) for name, (_, said) in POLICIES.items()]
    samplers = list(SAMPLERS.items())
    wide = max(len(name) for name, _ in (*names, *samplers)) + 4

    def lines(pairs: Sequence[tuple[str, str]]) -> list[str]:
        width = min(line_width(), WIDTH)
        return [
            textwrap.fill(f"  {name:{wide - 2}}{said}", width, subsequent_indent=" " * wide) for name, said in pairs
        ]

    head = "SAMPLER[:ratio[:scores[:scope]]], such as topk:0.5:weight:value, for every layer that can be sampled:"
    return "\n".join(["policies:", *lines(names), "", textwrap.fill(head, min(line_width(), WIDTH)), *lines(samplers)])


def _argument(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """``convert`` for argparse, which keeps the message of no other error."""

    def converted(text: str) -> Any:
        try:
            return convert(text)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(without_name(error)) from None

    return converted


def without_name(error: Exception) -> str:
    """The message without the library's name for the argument."""
    return re.sub(r"^(model|policy|example_inputs|batch): ", "", str(error))


def _split_model(text: str) -> tuple[str, str]:
    module, colon, path = text.partition(":")
    if not colon or not _PATH.fullmatch(module) or not _PATH.fullmatch(path):
        raise ValueError(f"expected module:callable such as torchvision.models:resnet50, got {text!r}")
    return module, path


def _parse_input(text: str) -> Input:
    match = _INPUT.fullmatch(text)
    if match is None:
        raise ValueError(f"expected positive sizes such as 32x3x224x224 or 8x128:int64, got {text!r}")
    name = match[2] or "float32"
    if name not in _DTYPES:
        raise ValueError(f"expected a dtype of torch out of {', '.join(_DTYPES)}, got {text!r}")
    return tuple(map(int, match[1].split("x"))), name


def _checked_policy(text: str) -> str:
    split_policy(text)
    return text


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
