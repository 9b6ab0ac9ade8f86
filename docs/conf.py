"""The site: `sphinx-build -W --keep-going docs build/site`."""

import os
import re
import sys
from pathlib import Path

from sphinx.util import inspect

# The notebooks lay out a mesh over eight devices, as the tests do, and are run in
# processes of their own.
ROOT = str(Path(__file__).parents[1])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
sys.path.insert(0, ROOT)

import bnjax  # noqa: E402

project = "bnjax"
author = "the bnjax authors"
project_copyright = f"2026, {author}"
version = release = bnjax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_math_dollar",
]

# Pages.
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

# Docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_generate = False
default_role = "py:obj"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False
# Fields in one list, as arguments are, and not as entries of the index.
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88

# Look.
# An example ends with an empty line for doctest, which is not shown.
highlight_options = {"python": {"stripnl": True}}
html_theme = "sphinx_book_theme"
html_title = "bnjax"
html_copy_source = False
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the sidebar has the search already
    "show_navbar_depth": 1,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def _readable(_app, what, _name, obj, _options, signature, return_annotation):
    """Write a signature as in the source, without private fields and Flax's own."""
    if what == "class" and signature == "(*args, **kwargs)":
        # That of a metaclass.
        own = inspect.signature(obj.__init__, bound_method=True)
        signature = inspect.stringify_signature(own, show_annotation=False)
    for pattern, replacement in (
        (r", parent=[^,()]*, name=[^,()]*", ""),
        (r", _\w+", ""),
        (r"^\(iterable=\(\), /\)$", ""),
        (r"\bNormalization\(kind='batch', [^()]*\)", "Normalization()"),
        (r"\.<locals>\.\w+", "(...)"),
        (r"<function (?:\w+\.)*([\w().]+)(?: at \w+)?>", r"\1"),
        (r"<PjitFunction of ([\w().]+)>", r"\1"),
        (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
    ):
        signature = re.sub(pattern, replacement, signature or "")
    return signature or None, return_annotation


def setup(app):
    """Connect what this file defines, as Sphinx asks of an extension."""
    app.connect("autodoc-process-signature", _readable)
