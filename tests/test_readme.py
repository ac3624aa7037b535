"""Run the README's Python blocks with fewer time steps, and check that its tables are complete."""

import inspect
import re
from pathlib import Path

from stable_baselines3 import PPO

from sb3_adaptive_kl import AdaptiveKLPPO
from tests.conftest import CASES, logged

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 5
    namespace: dict = {}
    timesteps = []
    for block in blocks:
        exec(re.sub(r"learn\(\d+_000", "learn(4096", block), namespace)
        timesteps.append(namespace["model"].num_timesteps)
    assert timesteps == [4096, 2 * 4096, 4096, 4096, 4096]
    assert "train/" in capsys.readouterr().out


def test_argument_table_is_complete():
    theirs = inspect.signature(PPO).parameters
    for name, parameter in inspect.signature(AdaptiveKLPPO).parameters.items():
        if name not in theirs or parameter.default != theirs[name].default:
            default = str(parameter.default).replace("'", '"')
            assert re.search(rf"^\| `{name}` \| `\"?{re.escape(default)}\"?` \|", README, flags=re.MULTILINE), name


def test_log_key_table_is_complete():
    options = {"kl_ceiling": 1.5, "learning_rate_rule": "adaptive"}
    ours = CASES["discrete"].build(AdaptiveKLPPO, n_steps=64, **options).learn(64)
    theirs = CASES["discrete"].build(PPO, n_steps=64).learn(64)
    for key in logged(ours).keys() - logged(theirs).keys():
        assert re.search(rf"^\| .*`{key}`.* \|", README, flags=re.MULTILINE), key
