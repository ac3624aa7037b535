"""
Register `ppo_kl` and its variants with rl-zoo3 as soon as the zoo is imported, so that its own commands know them in every
process.

The zoo has no plugin point, evaluates `choices=list(ALGOS)` before it imports any user code, and starts child processes that
inherit nothing from their parent. So the interpreter imports this module when it starts (by a `.pth` line, or a `.start` file
on Python 3.15). The module puts a finder on `sys.meta_path` and does nothing else until one of the zoo's registries is
imported. Only then is `sb3_adaptive_kl` imported. `SB3_ADAPTIVE_KL_ZOO=0` in the environment switches the hook off.
"""

import os
import sys

TYPE_CHECKING = False  # importing it from typing would slow down every interpreter start
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# A copy of sb3_adaptive_kl.zoo.REGISTRIES, which must not be imported at interpreter start
REGISTRIES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})


class RegistryFinder:
    """Find each of the zoo's registries on its path, as Python does, and complete it after it was executed."""

    @staticmethod
    def find_spec(
        fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in REGISTRIES:
            return None
        from importlib.machinery import PathFinder  # not at interpreter start

        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                complete(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def complete(module: "ModuleType") -> None:
    """
    Add our algorithms to a registry. If this fails, warn: a broken installation of ours must leave the zoo working. If
    `sb3_adaptive_kl` is not installed (any more), do nothing.
    """
    try:
        from importlib.util import find_spec

        if find_spec("sb3_adaptive_kl") is None:
            return
        from sb3_adaptive_kl.zoo import complete_registry

        complete_registry(module)
    except Exception as error:
        import warnings

        warnings.warn(f"sb3_adaptive_kl could not register with rl-zoo3: {error!r}", stacklevel=2)
        if RegistryFinder in sys.meta_path:  # not if an import nested in this one has failed before
            sys.meta_path.remove(RegistryFinder)  # one warning is enough


def install() -> None:
    """Put the finder on ``sys.meta_path``. Called at interpreter start."""
    if os.environ.get("SB3_ADAPTIVE_KL_ZOO") != "0" and RegistryFinder not in sys.meta_path:
        sys.meta_path.insert(0, RegistryFinder)
