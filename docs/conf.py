"""Settings of the pages: `make docs` builds them into docs/_build/html, without a network."""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert

sys.path.insert(0, str(Path(__file__).parent))

import reference

from diffusion_lab import __version__

project = "diffusion_lab"
author = "diffusion_lab contributors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["style.css"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False  # torch's own are written for its own pages
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_custom_sections = ["Source", "Sources"]
napoleon_use_ivar = True
add_module_names = False
SECTION = re.compile(r"\s*(Arguments|Attributes|Returns|Raises|Yields|Sources?):$")


def plain(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: indented lines are formulas, and | * _ are themselves."""
    out: list[str] = []
    section, formula, ended = "", False, True
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text and indent == 0:
            match = SECTION.match(line)
            section, ended = match[1] if match else "", True
        if text and not section and indent >= 4:
            out += [line] if formula else ["", "::", "", line]
            formula = True
            continue
        formula = formula and not text
        parts = re.split(r"(`[^`]+`)", text)  # names in code, between other text
        parts[1::2] = [f"`{part}`" for part in parts[1::2]]
        parts[::2] = [re.sub(r"([|*\\]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        text = "".join(parts)
        if text and section.startswith("Source") and indent:  # a list: every entry ends in a stop
            text, indent, ended = ("* " if ended else "  ") + text, 4, text.endswith(".")
        out.append(" " * indent + text)
    lines[:] = out


def write_math(self: Any, node: nodes.Node) -> None:
    """MathML, which browsers draw by themselves."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(convert(node.astext(), display=display))
    raise nodes.SkipNode


def links(_app: Any, docname: str, source: list[str]) -> None:
    """What lies outside of docs/ is in the repository, and not among the pages."""
    source[0] = re.sub(r"\[([^]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", source[0])


def setup(app: Any) -> None:
    """Registers the above, and writes the configuration reference."""
    (Path(__file__).parent / "configuration.md").write_text(reference.configuration())
    (Path(__file__).parent / "api.md").write_text(reference.api())
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))
    app.connect("autodoc-process-docstring", plain, priority=100)
    app.connect("source-read", links)
