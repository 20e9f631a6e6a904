"""The command line: ``python -m fx_approx COMMAND``; ``--help`` lists the commands."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from fx_approx.cli.arguments import WrongArgumentError, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Those after the program's name; by default the process's own.

    Returns:
        The exit code: 0; 1 where ``verify`` finds another number; 2 for a wrong argument, which one line on stderr
        names; 3 for an error that no one has foreseen, of the model or of this package, with its traceback on stderr.
    """
    # Torch says so when it is imported without NumPy, which nothing here needs.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        options = parse(arguments)
        if options.command == "demo":
            return _demo(options)
        commands = importlib.import_module("fx_approx.cli.commands")  # torch takes seconds, which help does not need
        recipe = None
        if options.command == "recipe":
            recipe = getattr(importlib.import_module("fx_approx.recipes"), options.recipe)
        text, code, said = commands.run(options, recipe)
    except WrongArgumentError as error:
        print(f"fx_approx: error: {error}", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 3
    for warning in said:
        print(f"fx_approx: warning: {warning}", file=sys.stderr)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


def _demo(options: argparse.Namespace) -> int:
    demo = importlib.import_module("fx_approx.demo.run")
    training = demo.Options(options.epochs, options.width, options.ratio, options.compile, options.seed)
    try:
        demo.run(options.networks, options.html, options.data, options.limit, training, options.json)
    except (OSError, ValueError) as error:
        # A file of the user's; what else may be wrong, the arguments have been checked for.
        if options.data is None and not isinstance(error, OSError):
            raise
        raise WrongArgumentError(f"demo: {error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
