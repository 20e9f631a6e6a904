"""Docstrings for mkdocstrings: their cross-references become links, where the reference has what they name."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")
CODE_FOLLOWS = re.compile(r"(?<=\S)[ ]?::(?=\n\s*\n)|^::(?=\n\s*\n)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites what docstrings have of reStructuredText."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites one."""
        docstring = obj.docstring
        if docstring is None:
            return

        def link(found: re.Match[str]) -> str:
            name = found[2]
            shown = name.rpartition(".")[2] if found[1] else name
            target = name if name.startswith(("fx_approx", "torch")) else _resolved(obj, name)
            return f'<autoref identifier="{target}" optional><code>{shown}</code></autoref>'

        if obj.is_function and any(one.kind is griffe.ParameterKind.var_keyword for one in obj.parameters):
            # what is documented one by one, and handed on as **keywords
            unknown = {"warn_unknown_params": False, "warn_missing_types": False}
            docstring.parser_options = {**docstring.parser_options, **unknown}
        text = CODE_FOLLOWS.sub(lambda found: ":" if found.start() and found[0] != "::" else "", docstring.value)
        docstring.value = ROLE.sub(link, text)


def _resolved(obj: griffe.Object, name: str) -> str:
    """The full path of a name that a docstring of ``obj`` uses."""
    for place in (obj, obj.parent, obj.module):
        if place is None:
            continue
        if name.partition(".")[0] in place.members:
            return f"{place.path}.{name}"
    try:
        return obj.resolve(name)
    except griffe.NameResolutionError:
        return name
