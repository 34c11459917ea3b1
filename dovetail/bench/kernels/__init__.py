"""Speed of attention kernels without a model. Imports core, ops and runtime only."""
