"""How Sphinx builds the pages; `make docs`."""

import json
import pathlib
import re
import tomllib
from typing import Any

from docutils import nodes
from latex2mathml import converter

project = "bilora_jax"
author = "The bilora_jax authors"
project_copyright = f"2026, {author}"

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.intersphinx",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
# Notebooks are shown as `make notebooks` leaves them.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Links to files outside of docs/; the tests see that each leads to one.
suppress_warnings = ["myst.xref_missing"]

html_theme = "sphinx_book_theme"
html_title = project
html_theme_options: dict[str, Any] = {"navbar_persistent": []}
# Sphinx takes notebooks/ for a folder of docs/, and the button leads to the
# repository's. There is no button while pyproject.toml names no repository.
_ROOT = pathlib.Path(__file__).parents[1]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
if _REPOSITORY := _PROJECT.get("urls", {}).get("Repository"):
  html_theme_options |= {
    "repository_url": _REPOSITORY,
    "repository_branch": "main",
    "path_to_docs": "",
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
  }
html_context = {"default_mode": "auto"}
html_static_path = ["_static"]
html_css_files = ["site.css"]

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
# What is said of a field stands in its class's docstring.
napoleon_use_ivar = True
# Links to other projects need a network; what has none is not linked.
intersphinx_mapping = {}

# A formula is MathML, which browsers read: no server of others is asked for a
# script or a font, and none of it waits for JavaScript.
html_math_renderer = "mathml"


def _inline(translator: Any, node: nodes.math) -> None:
  translator.body.append(converter.convert(node.astext()))
  raise nodes.SkipNode


def _block(translator: Any, node: nodes.math_block) -> None:
  # latex2mathml does not know `aligned`.
  text = node.astext().replace("{aligned}", "{align*}")
  if "&" in text and "\\begin" not in text:
    text = f"\\begin{{align*}}{text}\\end{{align*}}"
  formula = converter.convert(text, display="block")
  translator.body.append(f'<div class="math">{formula}</div>')
  raise nodes.SkipNode


_QUALIFIED = re.compile(r"~?\b(?:[A-Za-z_]\w*\.)+([A-Za-z_]\w*)")
# What jax.typing.ArrayLike stands for.
_ARRAY_LIKE = re.compile(
  r"Array \| ndarray \| bool \| number \| bool \| int \| float \| complex"
)


def _short(app: Any, what: str, name: str, thing: Any, options: Any, *parts):
  """A signature with `Array` in place of `jax.jaxlib._jax.Array`."""
  del app, what, name, thing, options
  return tuple(
    part and _ARRAY_LIKE.sub("ArrayLike", _QUALIFIED.sub(r"\1", part))
    for part in parts
  )


def _copy_notebooks(app: Any, config: Any) -> None:
  """Puts the notebooks where Sphinx reads; git ignores these copies."""
  del config
  folder = pathlib.Path(app.srcdir) / "notebooks"
  folder.mkdir(exist_ok=True)
  for path in (_ROOT / "notebooks").glob("*.ipynb"):
    # Links from there: a page is one folder away, other files are two.
    text = path.read_text().replace("](../", "](../../")
    notebook = json.loads(text.replace("](../../docs/", "](../"))
    # A page has the theme's button, and asks no other server for a badge.
    notebook["cells"] = [x for x in notebook["cells"] if x["id"] != "colab"]
    (folder / path.name).write_text(json.dumps(notebook))


def _link_notebooks(app: Any, name: str, source: list[str]) -> None:
  """The guides' links to notebooks lead to their pages."""
  del app, name
  source[0] = source[0].replace("](../notebooks/", "](notebooks/")


def setup(app: Any) -> None:
  app.connect("config-inited", _copy_notebooks)
  app.connect("source-read", _link_notebooks)
  app.connect("autodoc-process-signature", _short)
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
