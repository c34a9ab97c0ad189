"""How Sphinx builds these pages: sphinx-build -W docs docs/_build/html."""

project = "segtrain"
html_title = "segtrain"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False

# Links lead to headings by the names that GitHub gives them.
myst_heading_anchors = 4
# The notebook is shown as it is stored; tests/test_docs.py runs it.
nb_execution_mode = "off"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
