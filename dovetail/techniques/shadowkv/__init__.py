"""ShadowKV: its codec and selector, and the low-rank keys of prompts."""

from dovetail.techniques.shadowkv.codec import shadowkv

__all__ = ["shadowkv"]
