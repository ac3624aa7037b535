"""Functions compiled by torch where it can, and run uncompiled, after one warning, where it cannot."""

import inspect
import re
import time
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Generic, ParamSpec, TypeVar

import torch as th
from torch.distributions import Distribution

from sb3_adaptive_kl.messages import warn_user

P = ParamSpec("P")
T = TypeVar("T")

# How torch names the globals of these packages; G['name'] belongs to the module whose function is compiled
_KNOWN_GLOBALS = re.compile(
    r"G\['(?!__import_|___unnamed)|G\['__import_(torch|stable_baselines3|sb3_contrib|sb3_adaptive_kl)(_dot_|')"
)


class NotCompiled(Exception):
    """The function that was called could not be compiled, and has not been run."""


class Compilation:
    """
    Keeps account of what torch compiles for one model. The first failure, or a torch that is too old, ends it for all
    functions, with one warning.

    torch's compiler is imported inside the methods: it takes a second, which only users of ``compile=True`` should pay.
    """

    def __init__(self) -> None:
        self.failed = False
        self.seconds = 0.0  # spent compiling since they were logged
        # `_compile` passes this argument, which torch has since 2.13
        if "isolate_recompiles" not in inspect.signature(th.compile).parameters:
            self.failed = True
            self.warn(f"torch 2.13 or newer is needed, and this is {th.__version__}; training runs uncompiled")

    def give_up(self, error: Exception | str) -> None:
        """Compile nothing more for this model, and warn with the reason."""
        self.failed = True
        reason = " ".join(str(error).split("\n")[:2])
        self.warn(f"torch.compile failed, training goes on without it. {reason}")

    def warn(self, message: str) -> None:
        """Warn, with the name of the argument in front."""
        warn_user(f"compile=True: {message}")


class Compiled(Generic[P, T]):
    """
    Run a function through ``torch.compile``: the same values up to rounding. The first call compiles, which takes seconds, and
    so does the first call with other shapes.

    :param function: pure in its tensors, without Python that depends on their values
    :param compilation: the model's compilation state
    :raises NotCompiled: by the call at which compiling fails; later calls run the function uncompiled
    """

    def __init__(self, function: Callable[P, T], compilation: Compilation) -> None:
        self.function = function
        self.compilation = compilation
        self.fast: Callable[P, T] | None = None

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        # It may be called from a function that is being compiled
        if self.compilation.failed or th.compiler.is_compiling():
            return self.function(*args, **kwargs)
        if self.fast is None:
            self.fast = _compile(self.function)
            if th._dynamo.config.disable:  # torch would run the function first, and only then say that it was not compiled
                self.compilation.give_up("TORCH_COMPILE_DISABLE is set")
                raise NotCompiled
        counters = th._dynamo.utils.counters
        start, n_graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            result = self.fast(*args, **kwargs)
        except Exception as error:
            if not _is_from_compiler(error):
                raise
            too_often = isinstance(error, th._dynamo.exc.FailOnRecompileLimitHit)
            self.compilation.give_up(
                "Recompiled too often for new shapes or attributes; TORCH_LOGS=recompiles shows which" if too_often else error
            )
            raise NotCompiled from error
        if counters["stats"]["unique_graphs"] > n_graphs:
            self.compilation.seconds += time.perf_counter() - start
        return result

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not run the code compiled for the original
        return {**vars(self), "fast": None}


def _compile(function: Callable[P, T]) -> Callable[P, T]:
    options = {
        "guard_filter_fn": _guards_to_keep,
        # Skip Inductor's checks of the sizes of its own buffers
        "size_asserts": False,
        # Draw the random numbers that the uncompiled function draws
        "fallback_random": True,
    }
    # At the first compilation in a process torch turns the validation of all its distributions off, forever
    checks = Distribution._validate_args
    try:
        # torch limits recompilations per call of th.compile(), if told so, and per code object, counting models that are gone.
        # Each model has a code object of its own
        plain: Any = function
        parts = plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
        own: Any = FunctionType(plain.__code__.replace(), *parts)
        # Static shapes: a buffer gives full minibatches and a shorter last one
        kwargs = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "options": options}
        return th.compile(own, **kwargs)  # type: ignore[call-overload,no-any-return]
    finally:
        Distribution.set_default_validate_args(checks)


def _guards_to_keep(guards: Sequence[Any]) -> list[bool]:
    """
    Filter torch.compile's guards, which take a good part of the time of small networks: skip globals of torch, SB3,
    sb3-contrib and this package; keep tensors, attributes, and globals of the user's code.
    """
    return [not (guard.is_global and _KNOWN_GLOBALS.match(guard.name)) for guard in guards]


def _is_from_compiler(error: Exception) -> bool:
    """Whether torch's compiler, or the disk it writes to, raised the error, and not the function."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | FailOnRecompileLimitHit | InductorError | OSError)
