"""Configuration of the documentation, which `make docs` builds."""

from sb3_adaptive_kl import __version__

project = "sb3_adaptive_kl"
author = "The sb3_adaptive_kl maintainers"
copyright = "2026, The sb3_adaptive_kl maintainers"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Markdown. Links to headings, as in guide.md#save-and-load, need anchors
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# The notebook is executed when its outputs are not in the cache
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_in_temp = True

# Docstrings in the style of Stable-Baselines3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"

html_theme = "furo"
html_title = f"sb3_adaptive_kl {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
