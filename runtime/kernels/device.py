"""What launches ask of a GPU, asked once."""

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once, if one fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
