"""Functions compiled by torch where it can, and run uncompiled, after one warning, where it cannot."""

import inspect
import re
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch as th
from torch.distributions import Distribution

from sb3_adaptive_kl.messages import warn_user

# How torch names the globals of these packages; G['name'] belongs to the module whose function is compiled
_KNOWN_GLOBALS = re.compile(
    r"G\['(?!__import_|___unnamed)|G\['__import_(torch|stable_baselines3|sb3_contrib|sb3_adaptive_kl)(_dot_|')"
)


class NotCompiled(Exception):
    """The function that was called could not be compiled, and has not been run."""


class Compilation:
    """
    Runs functions of one model through ``torch.compile``. The first failure, or a torch that is too old, ends it for all of
    them, with one warning.

    torch's compiler is imported inside the methods: it takes a second, which only users of ``compile=True`` should pay.
    """

    def __init__(self) -> None:
        self.failed = False
        self.seconds = 0.0  # spent compiling since they were logged
        self.compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        # `_compile` passes this argument, which torch has since 2.13
        if "isolate_recompiles" not in inspect.signature(th.compile).parameters:
            self.give_up(f"torch 2.13 or newer is needed, and this is {th.__version__}")

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Run a function compiled: the same values up to rounding. The first call compiles, which takes seconds, and so does the
        first call with other shapes.

        :param function: of a module, without defaults, pure in its tensors, without Python that depends on their values
        :raises NotCompiled: if compiling fails, or has failed before
        """
        if not self.failed and function not in self.compiled:
            self.compiled[function] = _compile(function)
            if th._dynamo.config.disable:  # torch would run the function first, and only then say that it was not compiled
                self.give_up("TORCH_COMPILE_DISABLE is set")
        if self.failed:
            raise NotCompiled
        counters = th._dynamo.utils.counters
        start, n_graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            result = self.compiled[function](*args, **kwargs)
        # OSError: of the disk that the compiler writes to
        except (th._dynamo.exc.TorchDynamoException, th._dynamo.exc.FailOnRecompileLimitHit, OSError) as error:
            too_often = "Recompiled too often for new shapes or attributes; TORCH_LOGS=recompiles shows which"
            self.give_up(too_often if isinstance(error, th._dynamo.exc.FailOnRecompileLimitHit) else error)
            raise NotCompiled from error
        if counters["stats"]["unique_graphs"] > n_graphs:
            self.seconds += time.perf_counter() - start
        return result

    def give_up(self, error: Exception | str) -> None:
        """Compile nothing more for this model, and warn with the reason."""
        self.failed = True
        reason = " ".join(str(error).split("\n")[:2])
        warn_user(f"compile=True: torch.compile cannot be used, training goes on without it. {reason}")

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not run the code compiled for the original
        return {**vars(self), "compiled": {}}


def _compile(function: Any) -> Callable[..., Any]:
    options = {
        "guard_filter_fn": _guards_to_keep,
        # Skip Inductor's checks of the sizes of its own buffers
        "size_asserts": False,
        # Draw the random numbers that the uncompiled function draws
        "fallback_random": True,
    }
    # torch limits recompilations per call of th.compile(), if told so, and per code object, counting models that are gone.
    # Each model has a code object of its own
    own: Any = FunctionType(function.__code__.replace(), function.__globals__)
    checks = Distribution._validate_args
    # Static shapes: a buffer gives full minibatches and a shorter last one
    kwargs: Any = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "options": options}
    compiled = th.compile(own, **kwargs)
    # At the first compilation in a process torch has turned the validation of all its distributions off, forever
    Distribution.set_default_validate_args(checks)
    return compiled


def _guards_to_keep(guards: Sequence[Any]) -> list[bool]:
    """
    Filter torch.compile's guards, which take a good part of the time of small networks: skip globals of torch, SB3,
    sb3-contrib and this package; keep tensors, attributes, and globals of the user's code.
    """
    return [not (guard.is_global and _KNOWN_GLOBALS.match(guard.name)) for guard in guards]
