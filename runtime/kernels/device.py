"""What launches ask of a GPU, asked once."""

from functools import cache

import torch

from minibble.runtime.kernels.nvrtc import check


@cache
def multiprocessors(device: torch.device) -> int:
    """How many blocks run at once, if one fills a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_limit(device: torch.device) -> int:
    """Bytes of shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def reads_host(device: torch.device) -> bool:
    """Whether kernels find pinned host memory where the host does. KernelError where the driver will not say."""
    from cuda.bindings import driver

    asked = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM
    gpu = check(driver.cuDeviceGet(device.index or 0), f"{device}")
    return bool(check(driver.cuDeviceGetAttribute(asked, gpu), f"an attribute of {device}"))
