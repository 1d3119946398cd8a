"""Measuring the kernels on a GPU: what `minibble bench` and the scripts in `benchmarks/` share."""
