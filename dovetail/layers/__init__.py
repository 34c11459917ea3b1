"""Building blocks of models. Imports core, ops and runtime only."""
