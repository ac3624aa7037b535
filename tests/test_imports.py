"""A plain install stays light, and the modules build only on those below them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_adaptive_kl
from sb3_adaptive_kl.training import KLPenaltyTraining

PACKAGE = Path(sb3_adaptive_kl.__file__).parent


def test_import_pulls_in_no_optional_dependency():
    names = ("rl_zoo3", "sb3_contrib", "matplotlib", "pandas", "torch._dynamo", "torch._inductor")
    code = f"import sys, sb3_adaptive_kl; print([name for name in {names} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    return set(names)


# Each module, and those of this package that it may build on
LAYERS = {
    "penalty": set(),
    "divergences": set(),
    "losses": set(),
    "guard": set(),
    "metrics": set(),
    "minibatches": set(),
    "acceleration": set(),
    "optimization": set(),
    "lean": set(),
    "distributions": {"divergences"},
    "collection": {"acceleration", "lean"},
    "evaluation": {"distributions", "divergences", "minibatches"},
    "arguments": {"penalty", "evaluation"},
}


@pytest.mark.parametrize("module", LAYERS)
def test_layers(module):
    own = {name for name in imports(module) if name.startswith("sb3_adaptive_kl")}
    assert own <= {f"sb3_adaptive_kl.{below}" for below in LAYERS[module]}


def test_the_mathematics_is_free_of_the_framework():
    assert imports("penalty") <= {"math", "dataclasses", "typing"}
    for module in ("divergences", "losses"):
        assert imports(module) <= {"torch", "torch.nn"}


@pytest.mark.parametrize("name", ["MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO"])
def test_variant_without_contrib_names_the_extra(name):
    """In a fresh interpreter where sb3-contrib cannot be imported: the package works, the variant says what to install."""
    code = f"""
import sys
sys.modules["sb3_contrib"] = None
from sb3_adaptive_kl import *
import sb3_adaptive_kl
from sb3_adaptive_kl.training import KLPenaltyTraining
try:
    from sb3_adaptive_kl import {name}
except ImportError as error:
    print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == f"{name} needs sb3-contrib: pip install 'sb3-adaptive-kl[contrib]'"


def test_one_train_step():
    """The three algorithms share it; none has its own."""
    trains = [path.stem for path in PACKAGE.glob("*.py") if "def train(" in path.read_text()]
    assert trains == ["training"]
    for name in ("AdaptiveKLPPO", "MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO"):
        assert getattr(sb3_adaptive_kl, name).train is KLPenaltyTraining.train


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'AdaptiveKLTRPO'"):
        _ = sb3_adaptive_kl.AdaptiveKLTRPO


def test_public_names_exist():
    assert all(hasattr(sb3_adaptive_kl, name) for name in sb3_adaptive_kl.__all__)
    assert (PACKAGE / "py.typed").exists()
