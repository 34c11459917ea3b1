"""Dovetail: an LLM inference engine that touches only the bytes that matter."""
