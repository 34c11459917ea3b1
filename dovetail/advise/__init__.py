"""Which setting of a model is best for a workload on this machine, measured. Imports bench and evals; imported by
cli."""
