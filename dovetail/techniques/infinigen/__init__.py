"""InfiniGen: its selector, the guesses, their calibration, and pools with eviction."""

from dovetail.techniques.infinigen.selector import infinigen

__all__ = ["infinigen"]
