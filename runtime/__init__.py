"""How a checkpoint runs: the model's mathematics, kernels, memory, state and generation."""
