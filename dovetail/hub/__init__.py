"""Fetches models and keeps them: aliases, the Hugging Face hub, local paths. Imports core, host and show only."""

from dovetail.hub.models import CachedModel, list_models, models_home, place, remove, resolve, verify

__all__ = ["CachedModel", "list_models", "models_home", "place", "remove", "resolve", "verify"]
