"""Measuring: what is compared, in turns, on made-up data or through the engine."""
