"""
AdaptiveKLPPO in RL Baselines3 Zoo (https://github.com/DLR-RM/rl-baselines3-zoo): `--algo ppo_kl` and `--algo ppo_kl_lstm`.

The start-up hook (`startup/`) registers both as soon as the zoo is imported. Where it is switched off or not wanted,

    python -m sb3_adaptive_kl.zoo train --algo ppo_kl --env CartPole-v1

runs the zoo's scripts (those that start no child processes: train, enjoy, record_video, the plots) with both registered.
"""

import atexit
import os
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

# The zoo's names are lower case: its plot scripts lower-case folder names
ALGORITHMS = {"ppo_kl": "AdaptiveKLPPO", "ppo_kl_lstm": "RecurrentAdaptiveKLPPO"}
HOSTS = {"ppo_kl": "ppo", "ppo_kl_lstm": "ppo_lstm"}
# The hook has them as well: it must not import this module to know them
REGISTRIES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
LAUNCHER = "python -m sb3_adaptive_kl.zoo"

Sampler = Callable[[Any, int, int, dict[str, Any]], dict[str, Any]]


def complete_registry(module: ModuleType) -> None:
    """
    Add the algorithms to one of the zoo's registries; a name that the zoo has is left to it. To be called once per module.

    :param module: one of ``REGISTRIES``, executed
    :raises ValueError: if it is another module
    """
    if module.__name__ == "rl_zoo3.utils":
        for algo, class_name in ALGORITHMS.items():
            module.ALGOS.setdefault(algo, getattr(import_module("sb3_adaptive_kl"), class_name))
        if _started_as("rl_zoo3.record_training"):
            provide_programs()
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        for algo in ALGORITHMS:
            host = HOSTS[algo]
            module.HYPERPARAMS_SAMPLER.setdefault(algo, penalty_sampler(module.HYPERPARAMS_SAMPLER[host]))
            module.HYPERPARAMS_CONVERTER.setdefault(algo, module.HYPERPARAMS_CONVERTER[host])
    elif module.__name__ == "rl_zoo3.exp_manager":
        _find_hyperparameters(module.ExperimentManager)
        _understand_linear_target(module.ExperimentManager)
    else:
        raise ValueError(f"module={module.__name__} is no registry of the zoo: {', '.join(REGISTRIES)} are")


def hyperparameter_file(algo: str) -> Path:
    """
    The tuned hyperparameters that come with the package.

    :param algo: a name in ``ALGORITHMS``
    :return: the file in the installed package, or in the repository if that is where the package is imported from
    """
    package = Path(__file__).parent
    folder = package / "hyperparams"
    return (folder if folder.is_dir() else package.parent / "hyperparams") / f"{algo}.yml"


class _WithoutClipRange:
    """An Optuna trial that does not let the zoo's PPO sampler suggest a clip range."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trial, name)

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        return None if name == "clip_range" else self._trial.suggest_categorical(name, choices)


def penalty_sampler(sample_ppo_params: Sampler) -> Sampler:
    """
    The search space of the zoo's PPO, with the KL penalty in the place of the clip range.

    :param sample_ppo_params: the zoo's sampler for PPO
    :return: a sampler for PPO with the penalty. Its parameters pass the zoo's converter under their own names.
    """

    def sample_ppo_kl_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
        hyperparams = sample_ppo_params(_WithoutClipRange(trial), n_actions, n_envs, additional_args)
        del hyperparams["clip_range"]
        hyperparams["target_kl"] = trial.suggest_float("target_kl", 0.003, 0.1, log=True)
        hyperparams["init_kl_coef"] = trial.suggest_float("init_kl_coef", 0.1, 10.0, log=True)
        hyperparams["kl_factor"] = trial.suggest_float("kl_factor", 1.2, 2.0)
        hyperparams["kl_rule"] = trial.suggest_categorical("kl_rule", ["adaptive", "proportional", "fixed"])
        return hyperparams

    return sample_ppo_kl_params


def _find_hyperparameters(manager: Any) -> None:
    """The zoo looks for hyperparams/<algo>.yml in its own package only."""
    init = manager.__init__

    @wraps(init)
    def __init__(self: Any, args: Any, algo: str, *positional: Any, **kwargs: Any) -> None:
        init(self, args, algo, *positional, **kwargs)
        if algo in ALGORITHMS and not Path(self.config).exists() and not kwargs.get("config"):
            self.config = str(hyperparameter_file(algo))

    manager.__init__ = __init__


def _understand_linear_target(manager: Any) -> None:
    """The zoo makes schedules of "lin_x" for the arguments that it knows, and target_kl is none of them."""
    preprocess = manager._preprocess_schedules

    def preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        target_kl = hyperparams.get("target_kl")
        if isinstance(target_kl, str) and target_kl.startswith("lin_"):
            if not re.fullmatch(r"lin_\d*\.?\d+([eE][-+]?\d+)?", target_kl) or float(target_kl[4:]) == 0:
                raise ValueError(f"target_kl={target_kl!r}: a linear schedule is written lin_0.02, with a number above 0")
            schedule = preprocess({"learning_rate": target_kl})["learning_rate"]
            hyperparams = {**hyperparams, "target_kl": schedule}
        return preprocess(hyperparams)  # type: ignore[no-any-return]

    manager._preprocess_schedules = staticmethod(preprocess_schedules)


def _started_as(module: str) -> bool:
    """Whether this is `python -m module`, which imports the module's package before `__main__` says what is run."""
    arguments = sys.orig_argv
    return f"-m{module}" in arguments or ("-m" in arguments and arguments[arguments.index("-m") + 1 :][:1] == [module])


def provide_programs() -> None:
    """
    Put `python` and `ffmpeg` on the PATH of this process and its children: record_training calls them by these names.

    :raises SystemExit: if the system has no ffmpeg and imageio-ffmpeg brings none, which record_training would notice only
        after it has recorded everything
    """
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    if shutil.which("ffmpeg"):
        return
    try:
        bundled = import_module("imageio_ffmpeg").get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        sys.exit(f"record_training joins its videos with ffmpeg, which is not here ({error}): pip install imageio-ffmpeg")
    folder = tempfile.mkdtemp(prefix="ffmpeg-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "ffmpeg").symlink_to(bundled)
    os.environ["PATH"] += os.pathsep + folder


def main() -> None:
    """Run a script of the zoo, with its arguments, in this process."""
    scripts = (
        "train",
        "enjoy",
        "record_video",
        "plots.plot_train",
        "plots.all_plots",
        "plots.plot_from_file",
    )
    if len(sys.argv) < 2 or sys.argv[1] not in scripts:
        sys.exit(f"usage: {LAUNCHER} SCRIPT [the script's own arguments]\nSCRIPT is one of {', '.join(scripts)}")
    try:
        registries = [import_module(name) for name in REGISTRIES]
    except ModuleNotFoundError as error:
        sys.exit(f"{error}: pip install 'sb3-adaptive-kl[zoo]'")
    if "ppo_kl" not in registries[0].ALGOS:  # the start-up hook is off
        for module in registries:
            complete_registry(module)
    script = f"rl_zoo3.{sys.argv.pop(1)}"
    runpy.run_module(script, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
