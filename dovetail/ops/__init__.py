"""One file per operation: formula, torch reference, cost, kernels."""
