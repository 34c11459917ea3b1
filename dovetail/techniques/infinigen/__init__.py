"""InfiniGen: its selector, its guesses and their calibration, and pools with eviction."""

from dovetail.techniques.infinigen.selector import infinigen

__all__ = ["infinigen"]
