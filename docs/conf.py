"""Sphinx: the pages of this folder and the reference from the docstrings, without a network (make docs)."""

import re

import amn_kernels

project = "amn-kernels"
author = "The amn-kernels authors"
copyright = "The amn-kernels authors, Apache-2.0"
release = version = amn_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = []
# Names in single backticks become links where they are documented.
default_role = "py:obj"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True

html_theme = "furo"
html_title = f"amn-kernels {version}"
html_show_sourcelink = False


def _keep_norms(app, what, name, obj, options, lines):
    """Outside of literals Sphinx takes |p| for the name of a substitution; in these docstrings it is a norm."""
    lines[:] = [re.sub(r"(``.*?``|`[^`]*`)|\|", lambda match: match[1] or r"\|", line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _keep_norms, priority=400)
