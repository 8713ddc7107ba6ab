"""A Markdown extension: equations become MathML, which browsers and screen readers know without any script."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

_MARKED = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<latex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)


class _ToMathML(Postprocessor):
    def run(self, text: str) -> str:
        return _MARKED.sub(_mathml, text)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match["tag"] == "div" else "inline"
    made = convert(html.unescape(match["latex"]).strip(), display=display)
    # A long equation scrolls sideways on a phone; whoever has no pointer has to be able to reach it.
    return made.replace("<math ", '<math tabindex="0" ', 1) if display == "block" else made


class MathML(Extension):
    """Replaces what ``pymdownx.arithmatex`` marks."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Run after everything else."""
        md.postprocessors.register(_ToMathML(md), "mathml", -10)


def makeExtension(**options: Any) -> MathML:  # noqa: N802
    """Return the extension, as Markdown asks for it."""
    return MathML(**options)
