"""How many examples a property test tries."""

from __future__ import annotations

from hypothesis import settings

NORMAL = 100  # what Hypothesis tries where a test says nothing


def examples(count: int) -> settings:
    """`count` in the whole suite; in another profile (tests/conftest.py) as many times fewer as that one says."""
    return settings(max_examples=max(1, count * settings.default.max_examples // NORMAL))
