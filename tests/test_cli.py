"""The command `sb3-adaptive-kl`: which missing modules are explained by an extra."""

import runpy
import sys
from importlib.metadata import packages_distributions, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sb3_adaptive_kl import cli
from tests.test_zoo import run


def test_missing_extra_is_named(tmp_path):
    code = """
import sys
from sb3_adaptive_kl.cli import main
sys.modules["rl_zoo3"] = None
for command in ("zoo", "compare"):
    sys.argv = ["sb3-adaptive-kl", command, "train"]
    try:
        main()
    except SystemExit as error:
        print(error)
"""
    for command, line in zip(("zoo", "compare"), run(tmp_path, "-c", code).splitlines(), strict=True):
        assert f"pip install '.[{command}]' in the clone" in line


@pytest.mark.filterwarnings("ignore")  # of runpy, which runs modules that are imported already
@pytest.mark.parametrize("module", ["sb3_adaptive_kl.cli zoo", "sb3_adaptive_kl.zoo"])
def test_missing_module_of_the_user_keeps_its_error(monkeypatch, module):
    name, *arguments = f"{module} train --algo ppo_kl --gym-packages typo".split()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'typo'$"):
        runpy.run_module(name, run_name="__main__", alter_sys=True)


@pytest.mark.parametrize("missing", ["typo", "rl_zoo3_typo", None])
def test_missing_module_in_a_comparison_keeps_its_error(monkeypatch, missing):
    def compare():
        raise ModuleNotFoundError("an import failed", name=missing)

    monkeypatch.setattr("sb3_adaptive_kl.compare.cli.main", compare)
    monkeypatch.setattr(sys, "argv", ["sb3-adaptive-kl", "compare"])
    with pytest.raises(ModuleNotFoundError, match="an import failed"):
        cli.main()


def test_unknown_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sb3-adaptive-kl", "compar"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.splitlines()[-1] == "sb3-adaptive-kl: unknown command 'compar', did you mean 'compare'?"


def test_every_requirement_of_the_extras_is_known():
    modules: dict[str, set[str]] = {}
    for module, distributions in packages_distributions().items():
        for distribution in distributions:
            modules.setdefault(canonicalize_name(distribution), set()).add(module)
    requirements = [Requirement(text) for text in requires("sb3-adaptive-kl") or []]
    extras = [
        requirement.name
        for requirement in requirements
        if requirement.marker and any(requirement.marker.evaluate({"extra": extra}) for extra in ("contrib", "zoo", "compare"))
    ]
    assert "loky" in extras
    # gymnasium's extras are not named by it when they are missing, and it is always there itself
    for name in set(extras) - {"gymnasium", "sb3-adaptive-kl", "sb3-adaptive-kl-zoo"}:
        assert modules[canonicalize_name(name)] & cli.EXTRAS, name
