"""
Registration of the algorithms with the zoo.

The zoo has no plugin point. Its registries are dictionaries in `rl_zoo3.utils` and `rl_zoo3.hyperparams_opt`, which are
changed in place because other modules import them by name. `ExperimentManager` in `rl_zoo3.exp_manager` reads the yml file of
an algorithm.
"""

import sys
from functools import wraps
from types import ModuleType

import sb3_adaptive_kl
from sb3_adaptive_kl.zoo.hyperparameters import extend_manager
from sb3_adaptive_kl.zoo.masks import asking_for_masks, offer_masks
from sb3_adaptive_kl.zoo.programs import provide_programs
from sb3_adaptive_kl.zoo.search_space import penalty_sampler

# Lower case, since the zoo's plot scripts lower-case folder names
ALGORITHMS = {
    "ppo_kl": "AdaptiveKLPPO",
    "ppo_kl_lstm": "RecurrentAdaptiveKLPPO",
    "ppo_kl_mask": "MaskableAdaptiveKLPPO",
    "ppo_kl_mask_lstm": "MaskableRecurrentAdaptiveKLPPO",
}
# The start-up hook has a copy, because it must not import this package at interpreter start
REGISTRIES = ("rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager")
# Set to its specification in a module that knows the algorithms: the launcher comes after the hook. A reload makes another
COMPLETED = "_has_sb3_adaptive_kl"


def complete_registry(module: ModuleType) -> None:
    """
    Add the algorithms to one of the zoo's modules, once. A name that it already has is not replaced.

    :param module: one of ``REGISTRIES``, already executed
    """
    if vars(module).get(COMPLETED, False) is module.__spec__:
        return
    if module.__name__ == "rl_zoo3.utils":
        for algo, class_name in ALGORITHMS.items():
            # The user may have registered an algorithm of this name
            module.ALGOS.setdefault(algo, asking_for_masks(getattr(sb3_adaptive_kl, class_name)))
        create_test_env = module.create_test_env
        offered = wraps(create_test_env)(lambda *args, **kwargs: offer_masks(create_test_env(*args, **kwargs)))
        for each in (module, sys.modules["rl_zoo3"]):  # without the hook, the package has already imported it by name
            if vars(each).get("create_test_env") is create_test_env:
                each.create_test_env = offered  # type: ignore[attr-defined]
        # All scripts import this module first. __main__ cannot tell yet which one runs: Python imports the package before it
        if "rl_zoo3.record_training" in " ".join(sys.orig_argv):
            provide_programs()
    elif module.__name__ == "rl_zoo3.hyperparams_opt":
        for algo in ALGORITHMS:
            host = algo.replace("_kl", "").replace("_mask", "")  # the zoo's algorithm whose search space ours extends
            module.HYPERPARAMS_SAMPLER.setdefault(algo, penalty_sampler(module.HYPERPARAMS_SAMPLER[host]))
            module.HYPERPARAMS_CONVERTER.setdefault(algo, module.HYPERPARAMS_CONVERTER[host])
    elif module.__name__ == "rl_zoo3.exp_manager":
        extend_manager(module.ExperimentManager, ALGORITHMS)
    setattr(module, COMPLETED, module.__spec__)
