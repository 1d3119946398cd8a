"""Work on pieces of a matrix by several threads."""

import pytest
import torch

from minibble.quantize.int4 import Int4
from minibble.quantize.nf4_math import decode


@pytest.mark.parametrize("inference", [False, True])
def test_threads_work_in_the_callers_mode(inference: bool) -> None:
    """Models do without gradients in inference mode, whose tensors other threads could not write to."""
    threads = torch.get_num_threads()
    q = Int4(128).encode(torch.randn(512, 1024))  # more than one piece
    alone = decode(q)
    try:
        torch.set_num_threads(3)
        with torch.inference_mode(inference):
            together = decode(q)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together) and together.is_inference() == inference
