"""The threads of the native library: many small regions, several callers, forked children, refused threads."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

native = pytest.importorskip("dovetail._native")

ROOT = Path(__file__).parents[2]
K = 64


class Product:
    """A program with one product, of float32 weights with 200 columns."""

    def __init__(self, threads: int) -> None:
        self.weights = np.random.default_rng(0).standard_normal((200, K)).astype(np.float32)
        packed = native.Packed("F32", self.weights.ctypes.data, 4 * K, 200, K, threads)
        self.program = native.Program("scalar", threads, True, True)
        self.x, self.y = self.program.slot(K, False), self.program.slot(200, False)
        self.program.linear(self.x, self.y, [packed], "exact", [], 1e-5, [], False, "", False)
        self.program.shape(1, "NHD", "float32", (0, 0, 0, 0), (1, 4096, 1, 2, 0))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        rows = len(x)
        self.program.clear()
        self.program.add(0, rows, [0] * rows, [], [0], 0, 0)
        self.program.run(0, 0)
        self.program.view(self.x, rows)[:, :K] = x
        self.program.run(0, 1)
        return self.program.view(self.y, rows)[:, :200].copy()


X = np.random.default_rng(1).standard_normal((6, K)).astype(np.float32)


def subprocess_prints(code: str) -> str:
    code = f"from tests.ops.test_workers import *\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_every_piece_is_done_once_and_phases_follow_each_other(tmp_path: Path) -> None:
    """Random numbers of threads, pieces and phases; four callers at once; a fork in the midst of them."""
    sources = [Path(__file__).with_name("stress_team.cpp"), ROOT / "csrc/workers.cpp"]
    build = ["g++", "-std=c++17", "-O1", "-pthread", "-I", ROOT / "csrc", *sources, "-o", tmp_path / "stress"]
    subprocess.run(build, check=True, timeout=100)
    done = subprocess.run([tmp_path / "stress", "4", "2000"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500_000


def test_any_number_of_threads_gives_the_same_bits() -> None:
    want = Product(1)(X)
    products = [Product(threads) for threads in (2, 3, 7, 16)]
    for _ in range(100):
        assert np.array_equal(random.choice(products)(X), want)


def test_two_python_threads_at_once() -> None:
    want, wrong = Product(1)(X), []

    def caller(threads: int) -> None:
        product = Product(threads)
        wrong.extend(i for i in range(300) if not np.array_equal(product(X), want))

    callers = [threading.Thread(target=caller, args=(threads,)) for threads in (2, 3)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    assert not wrong


def test_one_thread_starts_none_and_two_start_one() -> None:
    code = (
        "def tasks(): return len(os.listdir('/proc/self/task'))\n"
        "before = tasks(); Product(1)(X); one = tasks(); p = Product(2); p(X); p(X)\n"
        "print(one - before, tasks() - before)"
    )
    assert subprocess_prints(code) == "0 1"


def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
want = Product(3)(X)
child = os.fork()
if child == 0:
    right = all(np.array_equal(Product(3)(X), want) for _ in range(20))
    print(right, len(os.listdir('/proc/self/task')) >= 3, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(np.array_equal(Product(3)(X), want))
"""
    assert subprocess_prints(code).split() == ["True", "True", "True"]


def test_threads_that_the_system_refuses_are_not_missed() -> None:
    """No room is left in the address space for another thread's stack."""
    code = """
import resource
product, want = Product(4), Product(1)(X)
used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (4 << 20), -1))
threading.stack_size(8 << 20)
before = len(os.listdir('/proc/self/task'))
print(np.array_equal(product(X), want), len(os.listdir('/proc/self/task')) - before)
"""
    assert subprocess_prints(code) == "True 0"


def test_the_process_ends_while_threads_wait() -> None:
    assert subprocess_prints("Product(8)(X)\nprint('last line')") == "last line"
