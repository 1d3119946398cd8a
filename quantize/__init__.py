"""What a 4-bit checkpoint is and how weights become one.

The package can be called: `minibble.quantize(source, out, ...)` is `minibble.quantize.job.quantize_checkpoint`
(docs/adr/0001-callable-package.md).
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from minibble.quantize.job import quantize_checkpoint

        return quantize_checkpoint(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
