"""Loaders with faults, to see that scripts/fuzz.py finds them: --load tests.helpers.loaders:NAME."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from dovetail.core.errors import ModelError


def refuses(path: Path, rng: random.Random) -> None:
    raise ModelError("no")


def raises(path: Path, rng: random.Random) -> None:
    raise KeyError("block_count")


def aborts(path: Path, rng: random.Random) -> None:
    os.abort()


def exits(path: Path, rng: random.Random) -> None:
    os._exit(0)


def allocates(path: Path, rng: random.Random) -> None:
    bytearray(40 << 20)


def takes_all(path: Path, rng: random.Random) -> None:
    bytearray(40 << 30)


def computes(path: Path, rng: random.Random) -> None:
    begun = time.process_time()
    while time.process_time() < begun + 1.1:
        pass
