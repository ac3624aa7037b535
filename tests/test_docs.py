"""Run the Python blocks of README and documentation with fewer time steps, and check that their lists are complete."""

import inspect
import re
from pathlib import Path

import pytest
from stable_baselines3 import PPO

from sb3_adaptive_kl import HELD, AdaptiveKLPPO
from tests.conftest import CASES, logged

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCKS = {path.name: re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL) for path in PAGES}


# The guide includes the README's
@pytest.mark.parametrize(("page", "timesteps"), [("guide.md", 4096), ("coming_from.md", 0), ("continuing.md", 0)])
def test_python_blocks_run(page, timesteps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    included = BLOCKS["README.md"] if page == "guide.md" else []
    for block in included + BLOCKS[page]:
        exec(re.sub(r"learn\(\d+_000", "learn(4096", block), namespace)
    assert namespace["model"].num_timesteps == timesteps
    if page == "guide.md":  # it prints the settings that the name stands for
        assert {name: namespace[name] for name in HELD} == HELD


def test_no_page_with_python_blocks_is_left_out():
    assert {page for page, blocks in BLOCKS.items() if blocks} == {"README.md", "guide.md", "coming_from.md", "continuing.md"}


def test_all_arguments_are_documented():
    documented = re.findall(r"^\s*:param (\w+):", inspect.getdoc(AdaptiveKLPPO), flags=re.MULTILINE)
    assert documented == list(inspect.signature(AdaptiveKLPPO).parameters)


def test_log_key_table_is_complete():
    reference = CASES["discrete"].build(PPO, n_steps=64).policy
    options = {"kl_ceiling": 1.5, "learning_rate_rule": "balanced", "reference_policy": reference}
    ours = CASES["discrete"].build(AdaptiveKLPPO, n_steps=64, **options).learn(64)
    theirs = CASES["discrete"].build(PPO, n_steps=64).learn(64)
    table = (REPOSITORY / "docs" / "logs.md").read_text()
    for key in logged(ours).keys() - logged(theirs).keys():
        assert re.search(rf"^\| .*`{key}`.* \|", table, flags=re.MULTILINE), key


WRAPPED = (
    "README.md",
    "index.md",
    "guide.md",
    "continuing.md",
    "logs.md",
    "coming_from.md",
    "results.md",
    "zoo.md",
    "compare.md",
)


@pytest.mark.parametrize("page", WRAPPED)
def test_code_fits_the_sites_column(page):
    path = next(path for path in PAGES if path.name == page)
    for kind, block in re.findall(r"^```(.*?)\n(.*?)^```", path.read_text(), flags=re.DOTALL | re.MULTILINE):
        assert kind.startswith("{") or max(map(len, block.splitlines())) <= 84, block


def test_relative_links_lead_somewhere():
    for path in PAGES:
        for picture in re.findall(r'(?:src|srcset)="([^"]+)"|^```{image} (.+)$', path.read_text(), flags=re.MULTILINE):
            assert (path.parent / "".join(picture)).exists(), f"{path.name}: {picture}"
        for target, anchor in re.findall(r"\]\((?!https?:|#)([^)#\s]+)#?([^)\s]*)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", (path.parent / target).read_text(), flags=re.MULTILINE)
                # As MyST makes them
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{path.name}: {target}#{anchor}"
