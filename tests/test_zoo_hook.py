"""The start-up hook: a distribution of its own, which must never stand in the way of Python or of the zoo."""

import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import sb3_adaptive_kl_zoo as hook

from sb3_adaptive_kl import zoo
from sb3_adaptive_kl.zoo import REGISTRIES
from tests.test_zoo import run


def test_hook_lists_the_registries_of_the_package():
    assert sorted(hook.REGISTRIES) == sorted(REGISTRIES)


def test_hook_start_file_names_its_entry_point():
    """For Python 3.15; the `.pth` file has the same entry point."""
    files = Path(hook.__file__).parent
    assert pkgutil.resolve_name((files / "sb3_adaptive_kl_zoo.start").read_text().strip()) is hook.install
    assert (files / "sb3_adaptive_kl_zoo.pth").read_text().strip().endswith("; sb3_adaptive_kl_zoo.install()")


def test_hook_imports_nothing_else_at_interpreter_start(tmp_path):
    started = run(tmp_path, "-c", "import sys; print('sb3_adaptive_kl_zoo' in sys.modules, 'sb3_adaptive_kl' in sys.modules)")
    assert started.split() == ["True", "False"]
    code = f"""
import os, sys
before = set(sys.modules)
sys.path.insert(0, {str(Path(hook.__file__).parent)!r})
import sb3_adaptive_kl_zoo
sb3_adaptive_kl_zoo.install()
print(sys.modules.keys() - before)
"""
    assert run(tmp_path, "-S", "-c", code).strip() == "{'sb3_adaptive_kl_zoo'}"  # -S: the hook has not run before


def test_broken_installation_leaves_the_zoo_working(tmp_path):
    code = """
import sys
sys.modules["sb3_adaptive_kl.ppo"] = None
import rl_zoo3.exp_manager
print(sorted(rl_zoo3.ALGOS))
"""
    output = run(tmp_path, "-W", "always::UserWarning", "-c", code)
    assert output.count("could not register with rl-zoo3: ModuleNotFoundError(") == 1
    assert "'ppo'" in output
    assert "'ppo_kl'" not in output


def test_hook_is_silent_without_the_package(monkeypatch):
    """It is a distribution of its own, and stays when only the package is uninstalled. A warning fails this test."""
    monkeypatch.setitem(sys.modules, "sb3_adaptive_kl", None)
    registry = ModuleType("rl_zoo3.utils")
    hook.complete(registry)
    assert not hasattr(registry, "ALGOS")


def test_failures_in_nested_imports_leave_the_zoo_working(monkeypatch):
    """One registry of the zoo imports another, and a future zoo may have changed both."""
    monkeypatch.setattr(zoo, "complete_registry", None)
    others = [finder for finder in sys.meta_path if finder is not hook.RegistryFinder]
    monkeypatch.setattr(sys, "meta_path", [hook.RegistryFinder, *others])
    for name in ("rl_zoo3.utils", "rl_zoo3.exp_manager"):
        with pytest.warns(UserWarning, match="could not register with rl-zoo3"):
            hook.complete(ModuleType(name))
    assert sys.meta_path == others
