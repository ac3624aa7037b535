"""Configuration of the documentation, which `make docs` builds."""

import ast
import dataclasses
import inspect
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

from sb3_adaptive_kl import __version__
from sb3_adaptive_kl.algorithm import PENALTY_ARGUMENTS

project = "sb3_adaptive_kl"
author = "The sb3_adaptive_kl maintainers"
copyright = "2026, The sb3_adaptive_kl maintainers"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]

# Markdown. Links to headings, as in guide.md#save-and-load, need anchors
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
# Browsers show MathML themselves, also without a network; Sphinx's default loads MathJax from another server
html_math_renderer = "mathml"

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
autodoc_preserve_defaults = True  # 1 / 1.5 instead of 0.6666666666666666

html_theme = "furo"
pygments_dark_style = "monokai"  # furo's default underlines the names of modules
html_title = f"sb3_adaptive_kl {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]


def show_math(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def own_arguments_first(app, what, name, obj, options, lines):
    """Describe the penalty's arguments before those of PPO, each with an anchor and its default."""
    if name != "sb3_adaptive_kl.AdaptiveKLPPO":
        return
    docstring = "\n".join(lines)
    own = [".. rubric:: Arguments of this package", ""]
    for argument in sorted(PENALTY_ARGUMENTS, key=lambda argument: argument != "target_kl"):
        field = re.search(rf":param {argument}:(.*?)(?=^:)", docstring, flags=re.DOTALL | re.MULTILINE)
        docstring = docstring.replace(field[0], "")
        default = inspect.signature(obj).parameters[argument].default
        description = " ".join(field[1].split())
        own += [f".. confval:: {argument}", f"   :default: ``{default!r}``", "", f"   {description}", ""]
    introduction, others = docstring.split(":param ", maxsplit=1)
    lines[:] = [*introduction.split("\n"), *own, ".. rubric:: Arguments of PPO", "", *f":param {others}".split("\n")]


def written_defaults(app, what, name, obj, options, signature, return_annotation):
    """Do what autodoc_preserve_defaults does, for dataclasses: their constructors do not have a source to read."""
    if what == "class" and dataclasses.is_dataclass(obj):
        written = {
            node.target.id: ast.unparse(node.value)
            for node in ast.parse(inspect.getsource(obj)).body[0].body
            if isinstance(node, ast.AnnAssign) and node.value
        }
        for argument, default in written.items():
            signature = signature.replace(f"{argument}={getattr(obj, argument)!r}", f"{argument}={default}")
    return signature, return_annotation


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (show_math, None), (show_math, None))
    app.connect("autodoc-process-docstring", own_arguments_first)
    app.connect("autodoc-process-signature", written_defaults)
