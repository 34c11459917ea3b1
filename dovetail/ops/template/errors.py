"""Errors that say why a variant has no kernel. Every message ends with what happens instead."""

from __future__ import annotations

from dovetail.core.errors import DovetailError


class TemplateError(DovetailError):
    """A variant that only the torch reference can compute here."""


class TraceError(TemplateError):
    """A definition that is outside of the subset of Python that can be traced."""


class CompileError(TemplateError):
    """No compiler, one that fails, or a result that cannot be kept or loaded."""
