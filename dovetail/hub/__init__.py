"""Fetches models and keeps them: aliases, the Hugging Face hub, local paths. Imports core, host and show only."""

from dovetail.hub.models import CachedModel, architecture, list_models, models_home, remove, resolve, verify

__all__ = ["CachedModel", "architecture", "list_models", "models_home", "remove", "resolve", "verify"]
