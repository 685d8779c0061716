"""Settings of the documentation, which `make docs` builds."""

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sb3_softsac  # noqa: E402

project = "sb3-softsac"
author = "The sb3-softsac authors"
copyright = "2026, the sb3-softsac authors"
release = version = sb3_softsac.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "SoftSAC"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sourcelink = False

myst_heading_anchors = 3

autodoc_mock_imports = ["ray"]  # an extra
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
# Names of the arguments are in the signature, one to a line; the rest is below it
maximum_signature_line_length = 88
python_use_unqualified_type_names = True


def mend(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if name == "sb3_softsac.SoftSAC":  # autodoc would show the type of the attribute with that name
        lines.append(":type policy: str | type[SoftSACPolicy]")
    if lines and lines[0].startswith("Alias for field number"):  # of a NamedTuple
        lines.clear()


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", mend)
