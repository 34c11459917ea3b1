"""Machines, models and loads of the replay. Times were measured on two cores of a server with AVX-512."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dovetail.reproduce.smartspec.replay import Job, Machine, Model

MS = 1e-3
SMALL = Machine(
    "SmolLM2 135M",
    tuple((n, ms * MS) for n, ms in (
        (1, 2.4), (2, 2.7), (3, 3.1), (4, 3.4), (5, 3.95), (6, 4.45), (8, 5.5), (12, 8.7), (16, 11.0), (24, 15.5),
        (32, 19.5), (64, 39.0), (512, 300.0))),
    1.4e-6, 0.2 * MS,
)  # fmt: skip
CODER = Machine(
    "Qwen2.5-Coder 1.5B",
    tuple((n, ms * MS) for n, ms in (
        (1, 19.2), (2, 21.5), (3, 23.5), (4, 31.4), (5, 38.8), (6, 45.5), (8, 52.7), (12, 75.6), (16, 92.5),
        (24, 135.7), (32, 178.1), (48, 275.0), (96, 442.0), (192, 847.0), (512, 2236.0))),
    1.5e-6, 0.3 * MS,
)  # fmt: skip
LOOKUP = Model(20e-6)
DRAFT = Model(0.3 * MS, 5.0 * MS, 1.5 * MS, writes=True)  # Qwen2.5-Coder 0.5B with a trimmed head


Kind = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]
"""For an answer of so many tokens: how likely a guess of each is right, and how likely there is one."""


def copying(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Stretches that are copied, of 20 to 60 tokens, and stretches that are new."""
    right, has, at = np.empty(n), np.empty(n), 0
    copied = bool(draw.random() < 0.5)
    while at < n:
        stop = at + int(draw.integers(20, 60))
        right[at:stop], has[at:stop] = (0.93, 0.97) if copied else (0.3, 0.35)
        at, copied = stop, not copied
    return right, has


def chatting(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Little repeats itself."""
    return np.full(n, draw.uniform(0.1, 0.5)), np.full(n, 0.3)


def coding(draw: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """A draft model on code: requests differ."""
    return np.full(n, draw.beta(8, 2.5)), np.ones(n)


def jobs(
    seed: int,
    count: int,
    rate: Callable[[float], float],
    kinds: tuple[Kind, ...],
    sizes: tuple[int, int] = (200, 120),
) -> list[Job]:
    """Poisson arrivals at rate(time) in a second; prompts and answers around `sizes` tokens."""
    draw, time, found = np.random.default_rng(seed), 0.0, []
    for i in range(count):
        time += draw.exponential(1 / rate(time))
        prompt, answer = (max(8, int(draw.lognormal(np.log(n), 0.5))) for n in sizes)
        right, has = kinds[int(draw.integers(len(kinds)))](draw, answer)
        found.append(Job(time, prompt, right, has, seed * 100003 + i))
    return found
