"""
Registers `ppo_kl` with rl-zoo3 the moment the zoo is imported, so that the zoo's own commands know it in every process.

The zoo has no plugin point, evaluates `choices=list(ALGOS)` before it imports anything of the user's, and starts child
processes that know nothing of their parent. So this module is imported at interpreter start (by a `.pth` line, or a `.start`
file on Python 3.15), puts a finder on `sys.meta_path`, and does nothing else until one of the zoo's registries is imported.
Only then is `sb3_adaptive_kl` imported. `SB3_ADAPTIVE_KL_ZOO=0` in the environment switches it off.
"""

import os
import sys

TYPE_CHECKING = False  # typing's own would have to be imported, at every start of every interpreter
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

# Those of sb3_adaptive_kl.zoo, which is not to be imported for it
REGISTRIES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})


class RegistryFinder:
    """Finds what the other finders find, and has the zoo's registries completed after they were executed."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if fullname not in REGISTRIES:
            return None
        others = (finder for finder in sys.meta_path if finder is not cls and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: "ModuleType") -> None:
                execute(module)
                complete(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def complete(module: "ModuleType") -> None:
    """A broken installation of ours must leave the zoo working: it gets a warning instead of a traceback."""
    try:
        from sb3_adaptive_kl.zoo import complete_registry

        complete_registry(module)
    except Exception as error:
        import warnings

        warnings.warn(f"sb3_adaptive_kl could not register with rl-zoo3: {error!r}", stacklevel=2)
        sys.meta_path.remove(RegistryFinder)  # one warning is enough


def install() -> None:
    """Called at interpreter start."""
    if os.environ.get("SB3_ADAPTIVE_KL_ZOO") != "0" and RegistryFinder not in sys.meta_path:
        sys.meta_path.insert(0, RegistryFinder)
