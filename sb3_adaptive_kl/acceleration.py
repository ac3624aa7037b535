"""A compiled loss where torch can compile it, the same loss in eager mode where it cannot."""

import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch as th

P = ParamSpec("P")
T = TypeVar("T")


def compiled(function: Callable[P, T]) -> Callable[P, T]:
    """
    ``function`` through ``torch.compile``: the same values up to rounding. Its first call compiles (seconds).

    Where it cannot be compiled (no C++ compiler, a policy that torch cannot trace), one warning says why, and it runs as is.

    :param function: pure in its tensors
    :return: a function with the same signature
    """
    # Importing torch's compiler takes a second, which only those who use it should wait for
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    fast: Callable[P, T] | None = th.compile(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal fast
        if fast is not None:
            try:
                return fast(*args, **kwargs)
            except (TorchDynamoException, InductorError) as error:
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"compile=True: torch.compile failed, training goes on uncompiled. {reason}", stacklevel=2)
                fast = None
        return function(*args, **kwargs)

    return call
