"""The tuned hyperparameters, one yml file for each algorithm, and how the zoo reads them."""

from collections.abc import Collection
from functools import wraps
from pathlib import Path
from typing import Any

from sb3_adaptive_kl.zoo.masks import require_masks
from sb3_adaptive_kl.zoo.torchrun import join_ranks
from sb3_adaptive_kl.zoo.trust_region_strings import TRUST_REGION, parse_trust_region


def hyperparameter_file(algo: str) -> Path:
    """
    Return the path of the tuned hyperparameters that come with this package.

    :param algo: name of the algorithm in the zoo, such as ``ppo_kl``; masks do not change the hyperparameters
    :return: the file in the installed package, or in the repository if the package is imported from there
    """
    package = Path(__file__).parents[1]
    root = package if (package / "hyperparams").is_dir() else package.parent
    return root / "hyperparams" / f"{algo.replace('_mask', '')}.yml"


def extend_manager(manager: Any, algorithms: Collection[str]) -> None:
    """
    Let the zoo find our yml files, which it looks for in its own package only, and parse what is in them.

    :param manager: the zoo's ``ExperimentManager``, modified in place. For other algorithms it behaves as before.
    :param algorithms: names of ours in the zoo
    """
    init = manager.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if self.algo not in algorithms:
            return
        # Not if the user names a file (--conf-file), or the zoo ever has one
        if not kwargs.get("config") and not Path(self.config).exists():
            self.config = str(hyperparameter_file(self.algo))
        preprocess = self._preprocess_schedules

        def preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
            parsed = parse_trust_region(hyperparams)
            # The zoo would reject None, and what has been parsed
            trust_region = {name: parsed.pop(name) for name in TRUST_REGION if name in parsed}
            return {**preprocess(parsed), **trust_region}

        self._preprocess_schedules = preprocess_schedules
        if "_mask" in self.algo:
            create_envs = self.create_envs
            self.create_envs = lambda *args, **kwargs: require_masks(create_envs(*args, **kwargs), self.algo)
        join_ranks(self)

    manager.__init__ = __init__
