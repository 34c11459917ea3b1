"""Makes low-precision checkpoints: calibrates a model on text, layer by layer, and writes codes and scales.

`run.quantize` is the entry. It needs torch: blocks run through the engine's own reference operations, in float32.
"""
