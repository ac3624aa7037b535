"""The tuned hyperparameters, one yml file for each algorithm. The zoo looks for them in its own package only."""

from functools import wraps
from pathlib import Path
from typing import Any


def hyperparameter_file(algo: str) -> Path:
    """
    Return the path of the tuned hyperparameters that come with this package.

    :param algo: name of the algorithm in the zoo, such as ``ppo_kl``
    :return: the file in the installed package, or in the repository if the package is imported from there
    """
    package = Path(__file__).parents[1]
    root = package if (package / "hyperparams").is_dir() else package.parent
    return root / "hyperparams" / f"{algo}.yml"


def use_packaged_hyperparameters(manager: Any) -> None:
    """
    Let the zoo read our yml file where it has none of its own and the user names none (``--conf-file``).

    :param manager: the zoo's ``ExperimentManager``, modified in place
    """
    init = manager.__init__

    @wraps(init)
    def __init__(self: Any, *args: Any, config: str | None = None, **kwargs: Any) -> None:
        init(self, *args, config=config, **kwargs)
        packaged = hyperparameter_file(self.algo)
        if not config and not Path(self.config).exists() and packaged.exists():
            self.config = str(packaged)

    manager.__init__ = __init__
