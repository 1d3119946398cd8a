"""What all parts of a calibration share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minibble.calibrate.plan import CalibrationPlan
from minibble.calibrate.solver import SolverSettings
from minibble.quantize.config import ModelConfig
from minibble.quantize.formats import Format


@dataclass(frozen=True)
class Setup:
    """Fixed for a whole job. `dtype` is that of activations; `where` names file and tensor of a weight.

    With `router_weights` a token counts in an expert's Hessian by the square of the weight that its output will get.
    """

    config: ModelConfig
    format: Format
    solver: SolverSettings
    plan: CalibrationPlan
    seq_len: int
    device: torch.device
    dtype: torch.dtype
    strict: bool
    router_weights: bool
    where: Callable[[str], str]
