"""A compiled loss where torch can compile it, the same loss in eager mode where it cannot."""

import warnings
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch as th

P = ParamSpec("P")
T = TypeVar("T")


class Compiled(Generic[P, T]):
    """
    ``function`` through ``torch.compile``: the same values up to rounding. Its first call compiles (seconds).

    What torch cannot trace within it, torch runs as it is. Where nothing can be compiled (no C++ compiler), one warning says
    why, and from then on the whole function runs as it is.

    :param function: pure in its tensors
    """

    def __init__(self, function: Callable[P, T]) -> None:
        self.function = function
        self.fast: Callable[P, T] | None = None
        self.failed = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.failed:
            return self.function(*args, **kwargs)
        # Importing torch's compiler takes a second, which only those who use it should wait for
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InductorError

        try:
            if self.fast is None:
                self.fast = th.compile(self.function)
            return self.fast(*args, **kwargs)
        except (TorchDynamoException, InductorError) as error:
            reason = " ".join(str(error).split("\n")[:2])
            warnings.warn(f"compile=True: torch.compile failed, training goes on uncompiled. {reason}", stacklevel=2)
            self.failed = True
            return self.function(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model must not run what was compiled for the original
        return {**vars(self), "fast": None}
