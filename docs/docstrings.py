"""How docstrings become pages: their references become links, and their examples code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|meth|func|attr|mod):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites what Sphinx and doctest read into what mkdocstrings reads."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is None:
            return
        scope = obj if obj.is_class or obj.is_module else obj.parent

        def link(match: re.Match[str]) -> str:
            short, name = match.groups()
            full = name if name.startswith("eggroll_trainer") or scope is None else f"{scope.path}.{name}"
            text = name.rsplit(".", 1)[-1] if short else name
            # Optional: what has no page of its own stays plain text.
            return f'<autoref identifier="{full}" optional><code>{text}</code></autoref>'

        text = _ROLE.sub(link, obj.docstring.value)
        # griffe knows this section by its plural alone.
        text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"``([^`]+)``", r"`\1`", text)
