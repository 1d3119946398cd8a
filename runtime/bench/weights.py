"""Random 4-bit matrices of any size, made on the device in no time: codes at random, scales that weights could have."""

from math import prod

import torch
from torch import Tensor

from minibble.quantize.formats import Format
from minibble.quantize.nf4_math import level_table
from minibble.quantize.tensors import QuantizedTensor

_ROWS = 8192  # of a tensor at a time
_SPREAD = 0.2  # scales lie within so much of their mean


def random_matrix(
    shape: tuple[int, int], format: Format, device: torch.device, generator: torch.Generator
) -> QuantizedTensor:
    """A matrix [N, K] on `device` whose weights have about the standard deviation 1/sqrt(K)."""
    blocks = -(-prod(shape) // format.block_size)
    spread = 1 + _SPREAD * (2 * torch.rand(blocks, generator=generator, device=device) - 1)
    scales = spread * (shape[1] ** -0.5 / float(level_table(format.levels).std(correction=0)))
    codes = torch.randint(0, 256, (-(-prod(shape) // 2),), dtype=torch.uint8, generator=generator, device=device)
    return format.assemble(shape, codes, scales, torch.bfloat16)


def random_tensor(shape: tuple[int, ...], std: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """Normal numbers, bfloat16, made where the generator is, a part at a time: the result may be in host memory."""
    result = torch.empty(shape, dtype=torch.bfloat16, device=device)
    for part in result.split(_ROWS):
        part.copy_(
            torch.randn(part.shape, dtype=torch.bfloat16, device=generator.device, generator=generator).mul_(std)
        )
    return result


def generator_on(device: torch.device, seed: int) -> torch.Generator:
    """A generator of `device`, seeded."""
    return torch.Generator(device).manual_seed(seed)
