"""Loops for the CPU, compiled by numba on first use and kept in its cache. numba is optional."""

import importlib.util
from functools import cache
from typing import Any


@cache
def available() -> bool:
    """True where numba is installed."""
    return importlib.util.find_spec("numba") is not None


@cache
def compiled(function: Any) -> Any:
    """`function` compiled for this CPU; it holds no lock, and NaN and infinity keep their meaning."""
    import numba

    return numba.njit(cache=True, nogil=True, boundscheck=False, fastmath={"reassoc", "contract", "nsz"})(function)
