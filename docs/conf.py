# SPDX-License-Identifier: Apache-2.0
"""Builds the documentation: ``sphinx-build -W -b html docs build/docs``."""

import os

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
# Links of pages outside of docs/, which are included here, and to folders.
suppress_warnings = ["myst.xref_missing"]

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_custom_sections = ["Shapes", "Sharding", "Differentiation", "Memory"]
