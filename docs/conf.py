"""Settings of Sphinx for this documentation.

``tox -e docs`` builds the pages, and fails on every warning.  A build needs no network: the pages load nothing from
other hosts, and no reference leads to the inventory of another project.
"""

from __future__ import annotations

from pybreaker_redis import __version__

project = "pybreaker_redis"
author = "the pybreaker_redis developers"
release = version = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Docstrings have names in single backquotes.
default_role = "code"
# Options of commands keep their two hyphens.
smartquotes = False

# -- references --------------------------------------------------------------------------------------------------------

# A reference without a target is a warning, and a warning ends the build.
nitpicky = True
nitpick_ignore_regex = [
    # Names of other packages in signatures.  Links to them need the network during the build.
    # tests/project/test_docs.py permits no such name in a role of a page.
    (r"py:.*", r"(?!pybreaker_redis\.).*"),
    # Private types in signatures, as the type variables of decorators.
    (r"py:.*", r"pybreaker_redis\.(.*\.)?(_\w+|[PT])(\..*)?"),
]

# -- docstrings --------------------------------------------------------------------------------------------------------

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# Attributes of dataclasses are a list below the class, and not a second entry beside the one of autodoc.
napoleon_use_ivar = True

# -- pages -------------------------------------------------------------------------------------------------------------

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_title = f"pybreaker_redis {release}"
html_show_copyright = False
html_show_sphinx = False
html_copy_source = False
html_show_sourcelink = False
# The theme follows the reader's system, and has a switch.
pygments_style = "tango"
pygments_dark_style = "monokai"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0b5fa5", "color-brand-content": "#0b5fa5"},
    "dark_css_variables": {"color-brand-primary": "#7cb7ff", "color-brand-content": "#7cb7ff"},
    "navigation_with_keys": True,
}
