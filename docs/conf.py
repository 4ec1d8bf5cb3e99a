"""How Sphinx builds the pages; `make docs`."""

project = "bilora_jax"
author = "The bilora_jax authors"
project_copyright = f"2026, {author}"

extensions = [
  "myst_parser",
  "sphinx.ext.autodoc",
  "sphinx.ext.intersphinx",
  "sphinx.ext.mathjax",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Links to files outside of docs/; the tests see that each leads to one.
suppress_warnings = ["myst.xref_missing"]

html_theme = "sphinx_book_theme"
html_title = project

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
# What is said of a field stands in its class's docstring.
napoleon_use_ivar = True
# Links to other projects need a network; what has none is not linked.
intersphinx_mapping = {}
