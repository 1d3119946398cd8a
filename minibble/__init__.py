"""minibble: MiniMax-Text-01 and M1 in 4 bits, in a chosen amount of memory.

`minibble.load` runs a checkpoint, `minibble.quantize` makes a 4-bit one, `minibble.memory_report` says where the
bytes go. Importing this touches neither torch nor a GPU.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "memory_report", "quantize"]

if TYPE_CHECKING:
    from minibble.runtime.loading import load
    from minibble.runtime.report import memory_report

_HOMES = {"load": "minibble.runtime.loading", "memory_report": "minibble.runtime.report"}


class _CallablePackage(ModuleType):
    """`minibble.quantize` is a package and a function (docs/adr/0001-callable-package.md)."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from minibble.calibrate.job import quantize

        return quantize(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'minibble' has no attribute {name!r}")


import_module("minibble.quantize").__class__ = _CallablePackage
