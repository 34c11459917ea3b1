"""Architectures by the name that checkpoints give them. Imports no technique and no engine."""

from dovetail.models.llama import Llama, Loader, Stage, facts, geometry

MODELS = {"llama": Llama, "mistral": Llama, "qwen2": Llama, "qwen3": Llama}

__all__ = ["MODELS", "Llama", "Loader", "Stage", "facts", "geometry"]
