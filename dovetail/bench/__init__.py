"""Measuring: what is compared, in turns, on made-up data, through the engine or over HTTP."""
