"""Mutation testing: change one expression of a file at a time and see whether its tests notice.

    python scripts/mutate.py                                   every file of TESTS, every mutant
    python scripts/mutate.py dovetail/core/pages.py            one file
    python scripts/mutate.py --sample 300 dovetail/core        300 mutants of a folder, chosen by --seed

Prints the mutants that survive, then caught / all, without those that scripts/equivalent_mutants.txt explains. A
mutant lives in memory only: nothing is written to the tree. The tests are collected once, and run in a fork for
each mutant, with the examples of `make check`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.abc
import importlib.util
import inspect
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "scripts/equivalent_mutants.txt"
TESTS = {  # a file or folder -> its tests; one of the same name goes first
    "dovetail/core": ["tests/core"],
    "dovetail/text/detokenizer.py": ["tests/text/test_detokenizer.py"],
    "dovetail/text/conversation.py": ["tests/text/test_conversation.py"],
    "dovetail/text/traits.py": ["tests/text/test_traits.py", "tests/text/test_conversation.py"],
    "dovetail/tools": ["tests/tools"],
    "dovetail/runtime/sampler.py": ["tests/runtime/test_sampler.py", "tests/runtime/test_native_sampler.py"],
    "dovetail/session.py": ["tests/test_session_host.py"],
    "dovetail/outputs.py": ["tests/test_outputs.py", "tests/test_session_host.py"],
}
CPU_SECONDS = 30  # a mutant that needs more, or many times what the tests take, is in an endless loop
WALL_SECONDS = 240  # one that waits for ever
MEMORY = 2 << 30  # bytes of address space beyond what the libraries took

BOTH_WAYS = (
    (ast.Eq, ast.NotEq), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Is, ast.IsNot), (ast.In, ast.NotIn),
    (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv), (ast.BitAnd, ast.BitOr), (ast.LShift, ast.RShift),
    (ast.And, ast.Or),
)  # fmt: skip
ONE_WAY = (ast.Div, ast.Mult), (ast.Mod, ast.FloorDiv), (ast.Pow, ast.Mult), (ast.BitXor, ast.BitAnd)
SWAPS: dict[type[ast.AST], type[ast.AST]] = dict([*BOTH_WAYS, *(p[::-1] for p in BOTH_WAYS), *ONE_WAY])
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "takewhile": "dropwhile"}


@dataclass(frozen=True)
class Mutant:
    path: str
    place: str  # function and line
    change: str  # statement before -> after
    code: CodeType  # of its module
    original: CodeType

    @property
    def key(self) -> str:
        return f"{self.path} {self.place.partition(':')[0]}: {self.change}"


# -- making mutants ---------------------------------------------------------------------------------------


def replacements(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node, one change each."""
    match node:
        case ast.operator() | ast.cmpop() | ast.boolop() if type(node) in SWAPS:
            yield SWAPS[type(node)]()
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=(int() | float()) as number):
            yield ast.Constant(number + 1)
        case ast.Constant(value=str(text)) if not isinstance(parent, ast.Expr):  # else a docstring
            yield ast.Constant(text + "X")
        case ast.Name(id=name) if name in NAMES and isinstance(parent, ast.Call) and node is parent.func:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(attr=name) if name in NAMES:
            yield ast.Attribute(node.value, NAMES[name], ast.Load())
        case ast.Return(value=ast.expr() as given) if ast.unparse(given) != "None":
            yield ast.Return(None)
        case ast.Break():
            yield ast.Continue()
        case ast.Continue():
            yield ast.Break()
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Delete() | ast.Raise():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript(), *_]):
            yield ast.Pass()
    tested = [parent.test] if isinstance(parent, (ast.If, ast.While, ast.IfExp)) else getattr(parent, "ifs", [])
    if node in tested and isinstance(node, (ast.Name, ast.Attribute, ast.Call, ast.NamedExpr)):
        yield ast.UnaryOp(ast.Not(), node)


def children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(holder, field, index, child) of a node's code that runs: no annotations, decorators, messages."""
    skipped = {"annotation", "returns", "decorator_list", "bases"}
    if isinstance(node, ast.Raise):
        for keyword in node.exc.keywords if isinstance(node.exc, ast.Call) else ():
            yield from children(keyword)
    elif not isinstance(node, ast.JoinedStr):
        if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: a check that always holds
            return
        for name, value in ast.iter_fields(node):
            if name not in skipped and isinstance(value, ast.AST):
                yield node, name, None, value
            elif name not in skipped and isinstance(value, list):
                yield from ((node, name, i, item) for i, item in enumerate(value) if isinstance(item, ast.AST))


def mutants(path: str) -> Iterator[Mutant]:
    tree = ast.parse((ROOT / path).read_text())
    original = compile(tree, path, "exec")

    def walk(node: ast.AST, where: str, statement: ast.AST) -> Iterator[Mutant]:
        for holder, field, index, child in children(node):
            inner, own = where, statement
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{where}.{child.name}".lstrip(".")
            elif isinstance(child, (ast.stmt, ast.arguments)) and not isinstance(node, ast.Lambda):
                own = child
            before = brief(own)
            for new in replacements(child, holder):
                put(holder, field, index, ast.copy_location(new, child))
                after = brief(new if own is child else own)
                code = compile(ast.fix_missing_locations(tree), path, "exec")
                put(holder, field, index, child)
                place = f"{inner or 'module'}:{getattr(own, 'lineno', getattr(node, 'lineno', 0))}"
                yield Mutant(path, place, f"{before} -> {after}", code, original)
            if not is_slots(child):
                yield from walk(child, inner, own)

    yield from walk(tree, "", tree)


def is_slots(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__slots__", "__all__")


def put(holder: ast.AST, field: str, index: int | None, value: ast.AST) -> None:
    if index is None:
        setattr(holder, field, value)
    else:
        getattr(holder, field)[index] = value


def brief(statement: ast.AST) -> str:
    """The first line of a statement: its head, where it has a body."""
    return ast.unparse(statement).partition("\n")[0]


# -- running them -----------------------------------------------------------------------------------------


def functions(code: CodeType) -> dict[str, CodeType]:
    """The functions in a module's code, those inside others left out."""
    found: dict[str, CodeType] = {}
    for inner in (c for c in code.co_consts if isinstance(c, CodeType)):
        if inner.co_flags & inspect.CO_OPTIMIZED:
            found[inner.co_qualname] = inner
        else:  # a class
            found |= functions(inner)
    return found


def swap(mutant: Mutant) -> bool:
    """Give the mutant's code to the function as it is loaded; False if what differs is not in a function."""
    name = mutant.place.partition(":")[0]
    new, old = (functions(code).get(name) for code in (mutant.code, mutant.original))
    if new is None or new == old:
        return False
    found: Any = importlib.import_module(module_name(mutant.path))
    for part in name.split("."):
        found = vars(found)[part]
    found = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", None) or found)
    found.__code__ = new
    return True


class Forks:
    """A pytest plugin: the tests are collected once, and run in a fork for each mutant."""

    def __init__(self, mutants: Sequence[Mutant], alive: Path) -> None:
        self.mutants, self.alive = mutants, alive

    def pytest_runtestloop(self, session: object) -> bool | None:
        """None in a fork: pytest goes on and runs the tests."""
        seconds = CPU_SECONDS
        for index, mutant in enumerate([None, *self.mutants]):
            pid = os.fork()
            if pid == 0:
                if mutant is not None and not swap(mutant):
                    os._exit(0)  # for `survives` to decide
                limit(seconds)
                return None
            if passed(pid):
                with self.alive.open("a") as file:
                    print(index, file=file)
            if mutant is None:
                seconds = min(seconds, 3 + 2 * int(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime))
        return True

    def pytest_runtest_makereport(self, item: object, call: Any) -> None:
        """The first failure is enough, and nobody reads how it came about."""
        if call.excinfo is not None and call.excinfo.typename != "Skipped":
            os._exit(1)


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module the mutant's code when it is imported."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != module_name(self.mutant.path):
            return None
        return importlib.util.spec_from_file_location(name, ROOT / self.mutant.path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(self.mutant.code, module.__dict__)


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def pytest_in_fork(tests: Sequence[str], log: Path, *plugins: object) -> int:
    """The process of a fork of this one that runs tests."""
    pid = os.fork()
    if pid:
        return pid
    import pytest

    if not plugins:
        limit()
    with log.open("a") as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--capture=sys"]
        options += ["--tb=no", "--hypothesis-profile=mutants", "-p", "no:timeout", "-o", "markers=timeout"]
        code = pytest.main([*options, *tests], plugins=plugins)
        out.flush()
    os._exit(code)


def survives(mutant: Mutant, tests: Sequence[str], log: Path) -> bool:
    """Whether the tests pass where the mutant is there before anything is imported."""
    sys.meta_path.insert(0, Loader(mutant))
    try:
        return passed(pytest_in_fork(tests, log))
    finally:
        del sys.meta_path[0]


def limit(seconds: int = CPU_SECONDS) -> None:
    """Let this process end if it takes more of the machine than tests do."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def passed(pid: int) -> bool:
    """Wait for a process; False if it fails, or hangs."""
    end = time.monotonic() + WALL_SECONDS
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def survivors(mutants: Sequence[Mutant], tests: Sequence[str], log: Path) -> list[Mutant]:
    """Those that the tests do not notice. RuntimeError if the tests fail without any."""
    with tempfile.NamedTemporaryFile("r") as alive:
        os.waitpid(pytest_in_fork(tests, log, Forks(mutants, Path(alive.name))), 0)
        indices = [int(line) for line in alive.read().split()]
    if 0 not in indices:
        raise RuntimeError(f"{' '.join(tests)} fail without a mutant, see --log")
    return [m for m in (mutants[i - 1] for i in indices if i) if survives(m, tests, log)]


def tests_of(path: str) -> list[str]:
    tests = next(tests for owned, tests in TESTS.items() if path == owned or path.startswith(owned + "/"))
    same = [f"{folder}/test_{Path(path).name}" for folder in tests]
    return [*(name for name in same if (ROOT / name).exists()), *tests]


def files(names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        path = ROOT / name
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [str(p.relative_to(ROOT)) for p in found]


def explained() -> dict[str, str]:
    """Mutants that change nothing anybody could see, with the reason."""
    text = EQUIVALENT.read_text() if EQUIVALENT.exists() else ""
    entries = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {key: reason.strip() for key, reason in zip(entries[::2], entries[1::2], strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS))
    parser.add_argument("--sample", type=int, help="so many mutants, chosen at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="file for what the tests print")
    parser.add_argument("--list", action="store_true", help="print the mutants instead of running them")
    options = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    reasons = explained()
    found = [m for path in files(options.files) for m in mutants(path)]
    chosen = random.Random(options.seed).sample(found, options.sample) if options.sample else found
    chosen = [m for m in chosen if m.key not in reasons]
    if options.list:
        print(*(m.key for m in chosen), sep="\n")
        return 0
    preload(chosen)
    left = []
    for path in sorted({m.path for m in chosen}):
        mine, started = [m for m in chosen if m.path == path], time.monotonic()
        alive = survivors(mine, tests_of(path), options.log)
        print(*(f"{path} {m.place}: {m.change}" for m in alive), sep="\n", end="\n" * bool(alive))
        print(f"# {path}: {len(mine) - len(alive)} of {len(mine)}, {time.monotonic() - started:.0f} s", flush=True)
        left += alive
    caught = len(chosen) - len(left)
    print(f"{caught} of {len(chosen)} caught ({caught / max(1, len(chosen)):.1%}), of {len(found)} mutants")
    return 1 if left else 0


def preload(chosen: Sequence[Mutant]) -> None:
    """Load what takes long and is no part of Dovetail, once."""
    import hypothesis
    import hypothesis.strategies
    import numpy
    import pytest

    loaded: list[ModuleType] = [hypothesis, numpy, pytest]
    if any(not m.path.startswith("dovetail/core/") for m in chosen):
        import tokenizers
        import torch

        torch.set_num_threads(1)  # a fork would wait for the others
        loaded += [tokenizers, torch]


if __name__ == "__main__":
    sys.exit(main())
