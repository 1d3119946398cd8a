"""Nothing is timed that is not right."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from minibble.quantize.errors import MinibbleError
from minibble.runtime.bench.gpu import poisoned, relative_error

BOUND = 3e-3  # of our kernels against a float64 product; rounding the result to bfloat16 is 1.7e-3 of it
PEER_BOUND = 1e-2  # of others', which may round scales or intermediate results to 16 bits


class WrongResult(MinibbleError):
    """A kernel computes something else than it should: its times would mean nothing."""


def checked(kernel: str, call: Callable[[], Tensor], expected: Tensor, bound: float = BOUND) -> float:
    """The relative error of `call()`, run on memory full of NaN; WrongResult if it is over the bound."""
    with poisoned():
        error = relative_error(call(), expected)
    if not error <= bound:  # NaN is over every bound
        raise WrongResult(f"{kernel} is off by {error:.1e} on {tuple(expected.shape)}, at most {bound:.0e} allowed")
    return float(f"{error:.3g}")


@contextmanager
def kernels(which: str) -> Iterator[None]:
    """The kernels that `MINIBBLE_KERNELS=which` chooses."""
    before = os.environ.get("MINIBBLE_KERNELS")
    os.environ["MINIBBLE_KERNELS"] = which
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINIBBLE_KERNELS"]
        else:
            os.environ["MINIBBLE_KERNELS"] = before
