"""Turns what our docstrings share with Sphinx, roles and formulas, into what the site shows: links and MathML."""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

import lightning_koopman

MATH = re.compile(r"^( *)\.\. math:: (.*(?:\n\1 +.*)*)", re.MULTILINE)
ROLE = re.compile(r":(attr|class|data|func|meth):`~?([\w.]+)`")


def translate(text: str) -> str:
    """A docstring in Markdown."""
    text = MATH.sub(lambda found: _block(found[1], found[2]), text)
    text = re.sub(r":math:`(.*?)`", lambda found: f"`#!math {' '.join(found[1].split())}`", text, flags=re.DOTALL)
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
    return ROLE.sub(lambda found: _link(found[1], found[2]), text)


def _block(indent: str, formula: str) -> str:
    return f"{indent}```math\n{indent}{' '.join(formula.split())}\n{indent}```"


def _link(role: str, name: str) -> str:
    owner = name.partition(".")[0]
    target = owner if role == "attr" else name  # attributes are listed with their class
    return f"[`{name}`][lightning_koopman.{target}]" if owner in lightning_koopman.__all__ else f"`{name}`"


class Docstrings(griffe.Extension):
    """Translates each docstring when it is loaded."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = translate(obj.docstring.value)


def inline(source: str, *_: Any, **__: Any) -> str:
    """A formula in a line."""
    return str(convert(source))


def block(source: str, *_: Any, **__: Any) -> str:
    """A formula of its own."""
    return str(convert(source, display="block"))


def on_config(config: Any) -> Any:
    """Called by MkDocs: formulas are drawn by the browser, without a script."""
    config.markdown_extensions.append("pymdownx.inlinehilite")
    config.mdx_configs["pymdownx.inlinehilite"] = {
        "custom_inline": [{"name": "math", "class": "math", "format": inline}]
    }
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [{"name": "math", "class": "math", "format": block}]}
    return config
