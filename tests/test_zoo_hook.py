"""The start-up hook: a distribution of its own, which must never stand in the way of Python or of the zoo."""

import pkgutil
from pathlib import Path

import sb3_adaptive_kl_zoo as hook

from sb3_adaptive_kl.zoo import REGISTRIES
from tests.test_zoo import run


def test_hook_lists_the_registries_of_the_package():
    assert sorted(hook.REGISTRIES) == sorted(REGISTRIES)


def test_hook_start_file_names_its_entry_point():
    """For Python 3.15; the `.pth` file has the same entry point."""
    files = Path(hook.__file__).parent
    assert pkgutil.resolve_name((files / "sb3_adaptive_kl_zoo.start").read_text().strip()) is hook.install
    assert (files / "sb3_adaptive_kl_zoo.pth").read_text().strip().endswith("; sb3_adaptive_kl_zoo.install()")


def test_hook_takes_less_than_a_millisecond_and_imports_nothing_else(tmp_path):
    """At interpreter start. The best of three runs counts, because the machine is shared."""
    times = []
    for _ in range(3):
        lines = run(tmp_path, "-X", "importtime", "-c", "pass").splitlines()
        assert not [line for line in lines if line.rsplit("|")[-1].strip() in ("sb3_adaptive_kl", "torch", "typing")]
        (cost,) = [line for line in lines if line.endswith("sb3_adaptive_kl_zoo")]
        times.append(int(cost.split("|")[1]))
    assert min(times) < 1000  # microseconds, nested imports included


def test_broken_installation_leaves_the_zoo_working(tmp_path):
    code = "import sys; sys.modules['sb3_adaptive_kl.ppo'] = None; import rl_zoo3; print(sorted(rl_zoo3.ALGOS))"
    output = run(tmp_path, "-W", "always::UserWarning", "-c", code)
    assert output.count("could not register with rl-zoo3") == 1
    assert "'ppo'" in output
    assert "ppo_kl" not in output.splitlines()[-1]


def test_hook_gets_along_with_another_that_asks_all_finders(tmp_path):
    """As that of version 0.1.0 does, if it was left behind."""
    code = """
import sys
class Asking:
    @classmethod
    def find_spec(cls, *arguments):
        others = (finder for finder in sys.meta_path if finder is not cls)
        return next(filter(None, (finder.find_spec(*arguments) for finder in others)), None)
sys.meta_path.insert(0, Asking)
import rl_zoo3
print("ppo_kl" in rl_zoo3.ALGOS)
"""
    assert "True" in run(tmp_path, "-c", code).splitlines()


def test_hook_is_silent_without_the_package(tmp_path):
    """It is a distribution of its own, and stays when only the package is uninstalled."""
    code = "import sys; sys.modules['sb3_adaptive_kl'] = None; import rl_zoo3.exp_manager; print('ppo_kl' in rl_zoo3.ALGOS)"
    output = run(tmp_path, "-W", "always::UserWarning", "-c", code)
    assert "False" in output.splitlines()
    assert "could not register" not in output


def test_failures_in_nested_imports_leave_the_zoo_working(tmp_path):
    """rl_zoo3.exp_manager imports rl_zoo3.hyperparams_opt; a future zoo may have changed both."""
    code = """
import rl_zoo3
from sb3_adaptive_kl import zoo
zoo.complete_registry = None
import rl_zoo3.exp_manager
print("imported")
"""
    output = run(tmp_path, "-W", "always::UserWarning", "-c", code)
    assert output.count("could not register with rl-zoo3") == 2
    assert "imported" in output
