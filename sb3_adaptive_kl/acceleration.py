"""Compiled functions where torch can compile them, the same functions as they are where it cannot."""

import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, ParamSpec, TypeVar

import torch as th
from torch.distributions import Distribution

P = ParamSpec("P")
T = TypeVar("T")

# How torch names globals of these packages: G['name'] is of the module whose function is compiled
_OURS = re.compile(r"G\['(?!__import_|___unnamed)|G\['__import_(torch|stable_baselines3|sb3_contrib|sb3_adaptive_kl)(_dot_|')")


class NotCompiled(Exception):
    """What was called could not be compiled, and has not been run."""


class Compilation:
    """
    What torch compiles for one model. The first failure ends it for all of its functions, with one warning.

    Importing torch's compiler takes a second, which only those who compile should wait for: hence the imports within.
    """

    def __init__(self) -> None:
        self.failed = False
        self.seconds = 0.0  # spent compiling

    def give_up(self, error: Exception | str) -> None:
        self.failed = True
        reason = " ".join(str(error).split("\n")[:2])
        self.warn(f"torch.compile failed, training goes on uncompiled. {reason}")

    def warn(self, message: str) -> None:
        warnings.warn(f"compile=True: {message}", stacklevel=4)

    def seconds_since_last_asked(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    @contextmanager
    def of_gradients(self) -> Iterator[None]:
        """Within, ``th.autograd.grad`` can be compiled: an option of torch's compiler, set for this thread only."""
        import torch._dynamo

        if not self.failed and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            self.give_up(f"torch {th.__version__} cannot compile torch.autograd.grad: a newer one can")
        if self.failed:
            yield
            return
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            yield


class Compiled(Generic[P, T]):
    """
    ``function`` through ``torch.compile``: the same values up to rounding. Its first call compiles, which takes seconds, and
    so does the first one with other shapes.

    :param function: pure in its tensors, without Python that depends on their values
    :param compilation: that of the model
    :raises NotCompiled: by the call at which it turns out that it cannot be compiled; from then on it is called as it is
    """

    def __init__(self, function: Callable[P, T], compilation: Compilation) -> None:
        self.function = function
        self.compilation = compilation
        self.fast: Callable[P, T] | None = None
        self.changes_too_often = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        # It may be a part of something that is being compiled as a whole
        if self.compilation.failed or self.changes_too_often or th.compiler.is_compiling():
            return self.function(*args, **kwargs)
        if self.fast is None:
            self.fast = _compile(self.function)
            if th._dynamo.config.disable:  # where torch would run the function, and then say that it was not compiled
                self.compilation.give_up("TORCH_COMPILE_DISABLE is set")
                raise NotCompiled
        counters = th._dynamo.utils.counters
        start, n_graphs = time.perf_counter(), counters["stats"]["unique_graphs"]
        try:
            result = self.fast(*args, **kwargs)
        except Exception as error:
            if not _says_compiler(error):
                raise
            if _says_too_often(error):
                self.changes_too_often = True
                self.compilation.warn(
                    f"{self.function.__name__.strip('_')}() goes on uncompiled, since it was compiled too often for other "
                    "shapes or attributes: TORCH_LOGS=recompiles tells which"
                )
            else:
                self.compilation.give_up(error)
            raise NotCompiled from error
        if counters["stats"]["unique_graphs"] > n_graphs:
            self.compilation.seconds += time.perf_counter() - start
        return result

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not run what was compiled for the original
        return {**vars(self), "fast": None}


def _compile(function: Callable[P, T]) -> Callable[P, T]:
    options = {
        "guard_filter_fn": _may_change,
        # Nor need it ask whether its own buffers have the sizes it gave them
        "size_asserts": False,
        # Random numbers are those that the function draws when it is not compiled
        "fallback_random": True,
    }
    # When it first compiles something in a process, torch turns the checks of all its distributions off, for ever
    checks = Distribution._validate_args
    try:
        # One set of shapes at a time: a buffer gives full minibatches and a shorter last one. Isolated, since several models
        # would otherwise share the limit of recompilations
        how = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True, "options": options}
        return th.compile(function, **how)  # type: ignore[call-overload,no-any-return]
    finally:
        Distribution.set_default_validate_args(checks)


def _may_change(guards: Sequence[Any]) -> list[bool]:
    """
    Which of its assumptions torch is to check at each call, which for small networks takes a good part of the time: not
    whether modules of torch, SB3, sb3-contrib and of this package still hold the same functions. It does ask of every tensor,
    of every attribute of algorithm and policy, and of the globals of the user's code.
    """
    return [not (guard.is_global and _OURS.match(guard.name)) for guard in guards]


def _says_compiler(error: Exception) -> bool:
    """Whether torch's compiler raised it, or the disk it writes to, and not the function."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError | OSError) or _says_too_often(error)


def _says_too_often(error: Exception) -> bool:
    from torch._dynamo.exc import FailOnRecompileLimitHit

    return isinstance(error, FailOnRecompileLimitHit)
