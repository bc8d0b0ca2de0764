"""Sphinx: `make docs` builds site/ out of the Markdown pages of this folder."""

from __future__ import annotations

project = "bitfold"
author = "the bitfold authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository outside docs/
autodoc_typehints = "signature"
html_theme = "furo"
html_title = "bitfold"
