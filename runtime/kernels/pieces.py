"""Pieces of a record copied by the engine that copies: torch would first make one stretch of them, on the CPU."""

import torch
from torch import Tensor

from minibble.runtime.kernels.nvrtc import check
from minibble.runtime.kernels.tiles import Rectangle


def copy_piece(record: Tensor, source: Tensor, piece: Rectangle, stream: torch.cuda.Stream) -> None:
    """Issue the copy of a piece of `source`, uint8 in pinned host memory, to the same place of `record` on the current
    CUDA device. KernelError where the driver refuses."""
    from cuda.bindings import driver

    copy = driver.CUDA_MEMCPY2D()
    copy.srcMemoryType, copy.srcHost = driver.CUmemorytype.CU_MEMORYTYPE_HOST, source.data_ptr() + piece.start
    copy.dstMemoryType, copy.dstDevice = driver.CUmemorytype.CU_MEMORYTYPE_DEVICE, record.data_ptr() + piece.start
    copy.srcPitch = copy.dstPitch = piece.pitch or piece.width
    copy.WidthInBytes, copy.Height = piece.width, piece.height
    check(driver.cuMemcpy2DAsync(copy, stream.cuda_stream), f"copy of {piece} to {record.device}")


def view(record: Tensor, piece: Rectangle) -> Tensor:
    """The piece of a record, uint8 [height, width]."""
    return record.as_strided((piece.height, piece.width), (piece.pitch, 1), record.storage_offset() + piece.start)
