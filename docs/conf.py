# SPDX-License-Identifier: Apache-2.0
"""Builds the documentation: ``sphinx-build -W -b html docs build/docs``."""

import os
import re
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax_smfree

project = "jax_smfree"
author = "the jax_smfree authors"
version = release = jax_smfree.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["README.md", "examples"]
html_theme = "furo"
html_title = f"jax_smfree {version}"

myst_heading_anchors = 3

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_custom_sections = ["Shapes", "Sharding", "Differentiation", "Memory"]


def links_of_the_site(app: Any, docname: str, content: list[str]) -> None:
    """What GitHub shows and the site has elsewhere: the protocol, results, and anchors in HTML."""
    text = content[0].replace("(../csrc/protocol/PROTOCOL.md", "(protocol.md")
    text = re.sub(r"\((\.\./benchmarks/results/[\w.-]+\.md)\)", r"(path:\1)", text)
    content[0] = re.sub(r'<a id="([\w-]+)"></a>\n*', r"(\1)=\n", text)


def setup(app: Any) -> None:
    app.connect("source-read", links_of_the_site)
    app.connect("include-read", lambda app, path, parent, text: links_of_the_site(app, "", text))
