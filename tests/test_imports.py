"""A plain install stays light, and the modules build only on those below them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sb3_adaptive_kl

PACKAGE = Path(sb3_adaptive_kl.__file__).parent


def test_import_pulls_in_no_optional_dependency():
    """Nor does that of the zoo's registration: the launcher must be importable without the extra, to name it."""
    names = (
        "rl_zoo3",
        "optuna",
        "imageio_ffmpeg",
        "sb3_contrib",
        "matplotlib",
        "pandas",
        "torch._dynamo",
        "torch._inductor",
        "sb3_adaptive_kl.distributed",
    )
    code = f"""
import sys
import sb3_adaptive_kl
print([name for name in {names} if name in sys.modules])
import sb3_adaptive_kl.zoo
print([name for name in {names[:3]} if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["[]", "[]"]


def imports(module: str) -> set[str]:
    """Modules that a module imports, at its top or in a function; not those that only types need."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level > 0], "relative import"
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    # `from sb3_adaptive_kl import step` imports a module of ours by its name
    names += [
        f"sb3_adaptive_kl.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "sb3_adaptive_kl"
        for alias in node.names
        if not alias.name[0].isupper()
    ]
    return set(names) - {"sb3_adaptive_kl"}


# From the bottom up: a module may import those of the layers below it
LAYERS = (
    ("messages", "presets", "penalty", "learning_rate", "clip_range", "divergences"),
    ("objective", "control", "rollout.distributions"),
    ("arguments", "rollout.evaluation"),
    ("reference", "rollout.minibatches", "fast.compilation", "maskable_recurrent.buffers", "maskable_recurrent.masks"),
    ("rollout.reference", "fast.sequences"),
    ("rollout.old_policy",),
    ("step", "metrics"),
    ("snapshot", "fast.eager"),
    ("step_back", "fast.compiled"),
    ("algorithm",),
    ("training",),
    ("maskable_recurrent.evaluation", "maskable_recurrent.policies"),
    ("maskable_recurrent.ppo",),
    ("ppo", "ppo_contrib"),
    ("distributed.ranks", "distributed.callbacks", "distributed.synchronization", "distributed.gradients"),
    ("distributed.data_parallel",),
    ("distributed.contrib",),
)


@pytest.mark.parametrize("module", [module for layer in LAYERS for module in layer])
def test_modules_import_only_the_layers_below(module):
    height = next(i for i, layer in enumerate(LAYERS) if module in layer)
    below = {f"sb3_adaptive_kl.{name}" for layer in LAYERS[:height] for name in layer}
    if module.startswith("distributed."):  # one floor, whose modules build on each other
        below |= {f"sb3_adaptive_kl.{name}" for layer in LAYERS[:-1] for name in layer} | {"sb3_adaptive_kl.distributed.ranks"}
    assert {name for name in imports(module) if name.startswith("sb3_adaptive_kl")} <= below


def test_every_module_has_its_layer():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    modules |= {
        f"{folder}.{path.stem}"
        for folder in ("rollout", "fast", "distributed", "maskable_recurrent")
        for path in PACKAGE.glob(f"{folder}/*.py")
    }
    modules -= {"cli"} | {module for module in modules if module.endswith("__init__")}
    assert modules == {module for layer in LAYERS for module in layer}


def test_the_mathematics_is_free_of_the_framework():
    assert imports("penalty") | imports("learning_rate") <= {"math", "numbers", "dataclasses", "typing", "collections.abc"}
    for module in ("divergences", "objective"):
        foreign = {name for name in imports(module) if not name.startswith("sb3_adaptive_kl.")}
        assert foreign <= {"torch", "torch.nn", "typing", "collections.abc"}


def test_only_fast_knows_torchs_compiler():
    for path in PACKAGE.rglob("*.py"):
        if "fast" not in path.parts:
            assert "_dynamo" not in path.read_text(), path
            assert "th.compile" not in path.read_text(), path


def test_compare_uses_only_public_names_of_the_core():
    """No attribute with a leading underscore is taken from one of our modules, nor from an object they return."""
    for path in (PACKAGE / "compare").glob("*.py"):
        tree = ast.parse(path.read_text())
        imported = [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sb3_adaptive_kl")
            for alias in node.names
        ]
        assert not [name for name in imported if name.startswith("_")], path
    ruler = ast.parse((PACKAGE / "compare" / "ruler.py").read_text())
    private = {
        node.attr
        for node in ast.walk(ruler)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and getattr(node.value, "id", "") != "self"
    }
    assert private == {"__init__", "_current_progress_remaining"}  # SB3's


def test_variants_without_contrib_say_what_to_install():
    """In a fresh interpreter where sb3-contrib cannot be imported, the package works."""
    variants = ["MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO", "MaskableRecurrentAdaptiveKLPPO"]
    code = f"""
import sys
sys.modules["sb3_contrib"] = None
from sb3_adaptive_kl import *
import sb3_adaptive_kl
from sb3_adaptive_kl.training import KLPenaltyTraining
for name in {variants}:
    try:
        getattr(sb3_adaptive_kl, name)
    except ImportError as error:
        print(error)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    remedy = "needs sb3-contrib: pip install '.[contrib]' in the clone, or pip install sb3-contrib"
    assert output.splitlines() == [f"{name} {remedy}" for name in variants]


def test_the_algorithms_share_one_train_step():
    for name in ("AdaptiveKLPPO", "MaskableAdaptiveKLPPO", "RecurrentAdaptiveKLPPO", "MaskableRecurrentAdaptiveKLPPO"):
        algorithm = getattr(sb3_adaptive_kl, name)
        assert next(base.__name__ for base in algorithm.__mro__ if "train" in vars(base)) == "KLPenaltyTraining"


def test_only_the_distributed_folder_and_the_zoo_know_ranks():
    for path in PACKAGE.rglob("*.py"):
        if not {"distributed", "zoo"} & set(path.relative_to(PACKAGE).parts):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            assert not [name for name in imports(module) if "distributed" in name], path


def test_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'AdaptiveKLTRPO'"):
        _ = sb3_adaptive_kl.AdaptiveKLTRPO


def test_public_names_exist():
    assert all(hasattr(sb3_adaptive_kl, name) for name in sb3_adaptive_kl.__all__)
    assert (PACKAGE / "py.typed").exists()
