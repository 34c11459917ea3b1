"""dovetail/_native.pyi says what the compiled module takes and gives, as nanobind's own signatures have it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import dovetail
from dovetail.ops.cpu import native

STUB = Path(dovetail.__file__).with_name("_native.pyi")
MODULE = "dovetail._native"
NO_DEFAULT = object()


class Argument(NamedTuple):
    name: str  # its place, where it cannot be named
    type: str
    default: Any


class Signature(NamedTuple):
    arguments: list[Argument]
    result: str


def signature(function: ast.stmt) -> Signature:
    assert isinstance(function, ast.FunctionDef)
    found = function.args
    assert not (found.vararg or found.kwonlyargs or found.kwarg), ast.unparse(function)
    args = [*found.posonlyargs, *found.args]
    defaults = [NO_DEFAULT] * (len(args) - len(found.defaults)) + [ast.literal_eval(d) for d in found.defaults]
    text = lambda annotation: ast.unparse(annotation) if annotation else ""  # noqa: E731
    named = [
        Argument(f"argument {i}" if a in found.posonlyargs else a.arg, text(a.annotation), default)
        for i, (a, default) in enumerate(zip(args, defaults, strict=True), args[0].arg != "self" if args else 0)
        if a.arg != "self"
    ]
    return Signature(named, text(function.returns))


def compiled(thing: Any) -> list[Signature]:
    """Of a compiled function, method or property, in the stub's words; one for each overload."""
    found = []
    function = thing.fget if isinstance(thing, property) else thing
    for text, _, defaults in function.__nb_signature__:
        for index, value in enumerate(defaults or ()):
            text = text.replace(f"\\{index}", repr(value))
        text = text.replace("collections.abc.Sequence", "list").replace(f"{MODULE}.", "")
        text = re.sub(r"numpy\.ndarray\[dtype=(\w+)\]", r"NDArray[np.\1]", text).replace("def (", "def get(")
        found.append(signature(ast.parse(f"{text}: ...").body[0]))
    return found


def agree(said: str, real: str) -> bool:
    """A compiled `list` or `tuple` that says nothing of its items may be any such type in the stub."""
    return said == real or (real in ("list", "tuple", "dict") and said.startswith(f"{real}["))


def mismatch(said: Signature, real: Signature) -> str:
    """How the stub's signature differs from the compiled one, or ""."""
    names = [[a.name for a in s.arguments] for s in (said, real)]
    if names[0] != names[1]:
        return f"takes {names[1]}, the stub says {names[0]}"
    for mine, other in zip(said.arguments, real.arguments, strict=True):
        if not agree(mine.type, other.type):
            return f"{mine.name} is {other.type}, the stub says {mine.type}"
        same = other.default is not NO_DEFAULT if mine.default is ... else mine.default == other.default
        if not same:
            return f"{mine.name} has another default than the stub says"
    return "" if agree(said.result, real.result) else f"gives {real.result}, the stub says {said.result}"


def differences(body: Sequence[ast.stmt], real: Mapping[str, Any], where: str = "") -> list[str]:
    """Every name that a module or class has and the stub lacks, or the other way round, or describes otherwise."""
    said: dict[str, list[Any]] = {}
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            said.setdefault(node.name, []).append(node)
    own = {n: v for n, v in real.items() if n == "__init__" or not n.startswith("__")}
    out = [f"{where}{name} is not in the stub" for name in sorted(own.keys() - said.keys())]
    out += [f"{where}{name} is only in the stub" for name in sorted(said.keys() - own.keys())]
    for name in sorted(own.keys() & said.keys()):
        nodes, thing = said[name], own[name]
        if isinstance(nodes[0], ast.ClassDef):
            out += differences(nodes[0].body, vars(thing), f"{where}{name}.")
            continue
        both = [signature(n) for n in nodes], compiled(thing)
        if isinstance(thing, property) != any(map(is_property, nodes)):
            out.append(f"{where}{name} is a property on one side only")
        elif len(both[0]) != len(both[1]):
            out.append(f"{where}{name} has {len(both[1])} overloads, the stub {len(both[0])}")
        else:
            out += [f"{where}{name} {text}" for pair in zip(*both, strict=True) if (text := mismatch(*pair))]
    return out


def is_property(function: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "property" for d in function.decorator_list)


@pytest.mark.skipif(native() is None, reason="the native kernels were not built")
def test_the_stub_agrees_with_the_compiled_module() -> None:
    found = differences(ast.parse(STUB.read_text()).body, vars(native()))
    assert not found, "\n".join(found)


class Compiled:
    """Stands for what nanobind makes of a function."""

    def __init__(self, signature: str, *defaults: Any) -> None:
        self.__nb_signature__ = [(signature, None, defaults)]


class Box:
    n = property(Compiled("def (self) -> int"))  # type: ignore[arg-type]
    put = Compiled("def put(self, arg0: int, arg1: collections.abc.Sequence[int], /) -> None")
    get = Compiled("def get(self, at: tuple, wide: bool = \\0) -> numpy.ndarray[dtype=float32]", False)


SAYS = """
def formats() -> list[str]: ...
class Box:
    @property
    def n(self) -> int: ...
    def put(self, page: int, heads: list[int], /) -> None: ...
    def get(self, at: tuple[int, int], wide: bool = False) -> NDArray[np.float32]: ...
"""


@pytest.mark.parametrize(
    ("said", "instead", "difference"),
    [
        ("", "", None),
        ("bool = False", "bool = ...", None),
        ("formats", "format", "formats is not in the stub; format is only in the stub"),
        ("class Box:", "class Packed:", "Box is not in the stub; Packed is only in the stub"),
        ("def put", "def add", "Box.put is not in the stub; Box.add is only in the stub"),
        ("    @property\n", "", "Box.n is a property on one side only"),
        ("def put", "@property\n    def put", "Box.put is a property on one side only"),
        (
            "page: int, heads: list[int], /",
            "page: int, heads: list[int]",
            "Box.put takes ['argument 1', 'argument 2']",
        ),
        ("page: int, heads", "heads", "Box.put takes ['argument 1', 'argument 2']"),
        ("list[int], /", "list[str], /", "Box.put argument 2 is list[int], the stub says list[str]"),
        ("at: tuple", "place: tuple", "Box.get takes ['at', 'wide'], the stub says ['place', 'wide']"),
        ("tuple[int, int]", "list[int]", "Box.get at is tuple, the stub says list[int]"),
        (", wide: bool = False", "", "Box.get takes ['at', 'wide'], the stub says ['at']"),
        ("bool = False", "bool = True", "Box.get wide has another default than the stub says"),
        ("bool = False", "bool", "Box.get wide has another default than the stub says"),
        ("np.float32", "np.int32", "Box.get gives NDArray[np.float32], the stub says NDArray[np.int32]"),
        ("def formats", "def formats() -> int: ...\ndef formats", "formats has 1 overloads, the stub 2"),
    ],
)
def test_a_stub_that_differs_is_seen(said: str, instead: str, difference: str | None) -> None:
    real = {"Box": Box, "formats": Compiled("def formats() -> list[str]"), "__name__": MODULE}
    found = differences(ast.parse(SAYS.replace(said, instead, 1)).body, real)
    assert "; ".join(found).startswith(difference) if difference else not found
