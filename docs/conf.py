"""Settings of the documentation, which `make docs` builds."""

import sys
from pathlib import Path

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
html_show_sourcelink = False

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
# Names of the arguments are in the signature, one to a line; the rest is below it
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
