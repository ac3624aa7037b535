"""What the built distributions contain."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from sb3_adaptive_kl import __version__
from sb3_adaptive_kl.cli import main

REPOSITORY = Path(__file__).parents[1]

pytestmark = pytest.mark.xdist_group("packaging")  # they share a wheel


def build(folder: Path, out: Path) -> zipfile.ZipFile:
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, folder], check=True)
    (wheel,) = out.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(REPOSITORY, tmp_path_factory.mktemp("wheel"))


def test_plain_installation_adds_nothing_to_interpreter_startup(wheel):
    """Only the extra zoo, and what includes it, requires the distribution with the hook."""
    assert not [name for name in wheel.namelist() if name.endswith((".pth", ".start"))]
    (metadata,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    requirements = Parser().parsestr(wheel.read(metadata).decode()).get_all("Requires-Dist")
    hooks = [requirement for requirement in requirements if requirement.startswith("sb3-adaptive-kl-zoo")]
    assert any(requirement.endswith("extra == 'zoo'") for requirement in hooks)
    assert all("; extra == " in requirement for requirement in hooks)


def test_wheel_has_the_hyperparameters_and_the_report_templates(wheel):
    hyperparameters = {f"sb3_adaptive_kl/hyperparams/{path.name}" for path in (REPOSITORY / "hyperparams").glob("*.yml")}
    templates = {f"sb3_adaptive_kl/compare/templates/report.{suffix}" for suffix in ("html", "md")}
    assert len(hyperparameters) == 2
    assert (hyperparameters | templates) < set(wheel.namelist())


def test_hook_is_in_the_root_of_its_wheel(tmp_path):
    """Python reads .pth and .start files only in site-packages itself."""
    names = build(REPOSITORY / "zoo_hook", tmp_path).namelist()
    assert {f"sb3_adaptive_kl_zoo.{suffix}" for suffix in ("py", "pth", "start")} < set(names)


def test_command_prints_its_version(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sb3-adaptive-kl", "--version"])
    main()
    assert capsys.readouterr().out == f"{__version__}\n"
