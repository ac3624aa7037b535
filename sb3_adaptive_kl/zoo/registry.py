"""
Registration of the algorithms with the zoo.

The zoo has no plugin point. Its registries are dictionaries in `rl_zoo3.utils` and `rl_zoo3.hyperparams_opt`, which are
changed in place because other modules import them by name. `ExperimentManager` in `rl_zoo3.exp_manager` reads the yml file of
an algorithm.
"""

import sys
from types import ModuleType

import sb3_adaptive_kl
from sb3_adaptive_kl.zoo.hyperparameters import extend_manager
from sb3_adaptive_kl.zoo.programs import provide_programs
from sb3_adaptive_kl.zoo.search_space import penalty_sampler

# Lower case, since the zoo's plot scripts lower-case folder names
ALGORITHMS = {"ppo_kl": "AdaptiveKLPPO", "ppo_kl_lstm": "RecurrentAdaptiveKLPPO"}
# The start-up hook has a copy, because it must not import this package at interpreter start
REGISTRIES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


def complete_registry(module: ModuleType) -> None:
    """
    Add the algorithms to one of the zoo's modules. A name that it already has is not replaced.

    :param module: one of ``REGISTRIES``, already executed
    """
    if module.__name__ == "rl_zoo3.utils":
        for algo, class_name in ALGORITHMS.items():
            # The user may have registered an algorithm of this name
            module.ALGOS.setdefault(algo, getattr(sb3_adaptive_kl, class_name))
        # All scripts import this module first. __main__ cannot tell yet which one runs: Python imports the package before it
        if "rl_zoo3.record_training" in " ".join(sys.orig_argv):
            provide_programs()
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        for algo in ALGORITHMS:
            host = algo.replace("_kl", "")  # the zoo's algorithm whose search space ours extends
            module.HYPERPARAMS_SAMPLER.setdefault(algo, penalty_sampler(module.HYPERPARAMS_SAMPLER[host]))
            module.HYPERPARAMS_CONVERTER.setdefault(algo, module.HYPERPARAMS_CONVERTER[host])
    elif module.__name__ == "rl_zoo3.exp_manager":
        extend_manager(module.ExperimentManager, ALGORITHMS)
