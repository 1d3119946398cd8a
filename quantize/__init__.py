"""What a 4-bit checkpoint is and how weights become one.

The package can be called: `minibble.quantize(source, out, ...)` is `minibble.calibrate.job.quantize`
(docs/adr/0001-callable-package.md).
"""
