"""The command line: ``python -m fx_approx COMMAND MODULE:CALLABLE --input SHAPE --policy POLICY``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fx_approx.cli.arguments import WrongArgumentError, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: Those after the program's name; by default the process's own.

    Returns:
        The exit code: 0; 1 where ``verify`` finds another number; 2 for a wrong argument, which one line on stderr
        names.
    """
    try:
        options = parse(arguments)
        commands = importlib.import_module("fx_approx.cli.commands")  # torch takes seconds, which help does not need
        text, code, said = commands.run(options)
    except WrongArgumentError as error:
        print(f"fx_approx: error: {error}", file=sys.stderr)
        return 2
    for warning in said:
        print(f"fx_approx: warning: {warning}", file=sys.stderr)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough; Python would complain again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
