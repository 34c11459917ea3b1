"""Calls of functions: what a request offers, how each family of models writes calls, and how they are read."""
