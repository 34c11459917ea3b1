"""Retrieval tasks in the manner of RULER (arXiv 2404.06654, section 3). Needles are sentences that give magic
numbers. The question is a text to be completed with some of them.

`single`: one needle with one number. `multikey`: every needle has its own key, and one key is asked for; the
others distract. `multivalue`: all needles have the same key, and all its numbers are asked for. `multiquery`:
every needle has its own key, and all keys are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

VARIANTS = ("single", "multikey", "multivalue", "multiquery")
KEYS = (
    "anchor", "apple", "arrow", "basket", "bell", "bottle", "bridge", "brush", "bucket", "button", "candle",
    "carpet", "castle", "chair", "clock", "cloud", "coat", "copper", "cotton", "crown", "desk", "diamond",
    "drum", "engine", "feather", "fence", "flute", "forest", "garden", "glove", "hammer", "harbor", "helmet",
    "island", "jacket", "kettle", "ladder", "lamp", "lantern", "lemon", "marble", "meadow", "mirror",
    "mountain", "ocean", "orange", "paper", "pencil", "pepper", "piano", "pillow", "pocket", "ribbon", "river",
    "rocket", "saddle", "silver", "spoon", "stone", "table", "tiger", "violin", "window", "wheel",
)  # fmt: skip


@dataclass(frozen=True)
class Retrieval:
    """needles: paragraphs for the context; the first is the one whose depth is measured. question: what follows
    the context. values: the numbers that complete it."""

    needles: tuple[str, ...]
    question: str
    values: tuple[str, ...]


def retrieval(variant: str, count: int, random: Random) -> Retrieval:
    """A task of one of VARIANTS with `count` needles, at most len(KEYS). `single` has one needle."""
    values = tuple(str(n) for n in random.sample(range(100_000, 1_000_000), count))
    keys = random.sample(KEYS, count)
    if variant == "single":
        texts, asked = ["The special magic number is"], "The special magic number is"
    elif variant == "multivalue":
        texts = [f"One of the special magic numbers for {keys[0]} is"] * count
        asked = f"The {count} special magic numbers for {keys[0]} are"
    else:
        texts = [f"The special magic number for {key} is" for key in keys]
        asked = texts[0]
        if variant == "multiquery":
            asked = f"The special magic numbers for {', '.join(keys[:-1])} and {keys[-1]} are"
    needles = tuple(f"\n{text} {value}.\n" for text, value in zip(texts, values, strict=True))
    return Retrieval(needles, f"\n\n{asked}", values[:1] if variant == "multikey" else values)


def recall(values: Sequence[str], answer: str) -> float:
    """The share of `values` that occur in an answer as whole numbers."""
    said = set(re.findall(r"\d+", answer))
    return sum(value in said for value in values) / len(values)
