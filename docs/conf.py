"""The settings of the documentation: `sphinx-build -W docs build/docs`."""

import importlib
import pkgutil

import medssl

# autodoc imports with TYPE_CHECKING set, which pydantic's own models do not bear.
for _module in pkgutil.walk_packages(medssl.__path__, "medssl."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)

project = "medssl"
author = "The medssl contributors"
version = release = medssl.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
apidoc_modules = [
    {
        "path": "../medssl",
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"  # the others stand in the signature
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"medssl {release}"
html_show_copyright = False


def _skip_fields(app, what, name, member, skip, options):
    """Leave out the fields of named tuples, which their docstrings describe."""
    return True if type(member).__name__ == "_tuplegetter" else skip


def setup(app):
    """Connect what is left out."""
    app.connect("autodoc-skip-member", _skip_fields)
