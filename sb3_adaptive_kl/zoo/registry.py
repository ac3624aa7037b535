"""
Registration of the algorithms with the zoo.

The zoo has no plugin point. Its registries are dictionaries in `rl_zoo3.utils` and `rl_zoo3.hyperparams_opt`, which are
changed in place because other modules import them by name. `ExperimentManager` in `rl_zoo3.exp_manager` finds the yml file of
an algorithm and knows which arguments can be schedules; two of its methods are wrapped.
"""

from importlib import import_module
from types import ModuleType

from sb3_adaptive_kl.zoo.hyperparameters import use_packaged_hyperparameters
from sb3_adaptive_kl.zoo.programs import provide_programs, record_training_is_running
from sb3_adaptive_kl.zoo.search_space import penalty_sampler
from sb3_adaptive_kl.zoo.torchrun import join_group
from sb3_adaptive_kl.zoo.trust_region_strings import accept_trust_region_strings

# Lower case, since the zoo's plot scripts lower-case folder names
ALGORITHMS = {"ppo_kl": "AdaptiveKLPPO", "ppo_kl_lstm": "RecurrentAdaptiveKLPPO"}
# The zoo's algorithm whose search space each of them extends
HOSTS = {"ppo_kl": "ppo", "ppo_kl_lstm": "ppo_lstm"}
# The start-up hook has a copy, because it must not import this package at interpreter start
REGISTRIES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")


def complete_registry(module: ModuleType) -> None:
    """
    Add the algorithms to one of the zoo's modules. Call it once per module. A name that the zoo already has is not replaced.

    :param module: one of ``REGISTRIES``, already executed
    :raises ValueError: if it is another module
    """
    if module.__name__ == "rl_zoo3.utils":
        for algo, class_name in ALGORITHMS.items():
            module.ALGOS.setdefault(algo, getattr(import_module("sb3_adaptive_kl"), class_name))
        # All scripts import this module first, record_training included
        if record_training_is_running():
            provide_programs()
        join_group(tuple(ALGORITHMS))
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        for algo, host in HOSTS.items():
            module.HYPERPARAMS_SAMPLER.setdefault(algo, penalty_sampler(module.HYPERPARAMS_SAMPLER[host]))
            module.HYPERPARAMS_CONVERTER.setdefault(algo, module.HYPERPARAMS_CONVERTER[host])
    elif module.__name__ == "rl_zoo3.exp_manager":
        use_packaged_hyperparameters(module.ExperimentManager)
        accept_trust_region_strings(module.ExperimentManager)
    else:
        raise ValueError(f"module={module.__name__} is not a registry of the zoo: pass one of {', '.join(REGISTRIES)}")
