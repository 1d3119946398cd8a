"""Operations of the model, each a folder: a plain reference beside the paths for CPU and CUDA.

Callers use an operation's package; it alone chooses the path. `MINIBBLE_KERNELS=reference` forces the references.
"""

import os


def reference_forced() -> bool:
    """True where the environment asks for the slow, obvious implementations."""
    return os.environ.get("MINIBBLE_KERNELS") == "reference"
