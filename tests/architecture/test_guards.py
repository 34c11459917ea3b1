"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dovetail
from dovetail.core.seams import SEAMS, Seams
from dovetail.techniques import MODULES, technique
from tests.tiny import NEEDED

ROOT = Path(dovetail.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
TECHNIQUES = ROOT / "techniques"
TECHNIQUE_FILES = sorted(p for p in TECHNIQUES.rglob("*.py") if p != TECHNIQUES / "__init__.py")

# Who may import whom: every folder and loose module may import what stands before it, never what stands behind it.
# docs/design.md has the same list, with a line for each.
FLOORS = (
    "core", "host", "show", "text", "tools", "structured", "hub", "ops", "checkpoint", "runtime", "layers",
    "models", "techniques", "options", "config", "build", "outputs", "session", "llm", "setting", "provenance",
    "server", "batch", "bench", "evals", "advise", "quantize", "reproduce", "cli",
)  # fmt: skip


def floor_of(module: str) -> str:
    """`dovetail.ops.cpu` -> `ops`; nothing for the package itself, which anybody may ask for its version."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def owner(path: Path) -> str:
    """The technique that a file belongs to: its folder or its own name."""
    return path.relative_to(TECHNIQUES).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module or ""}
    return found


def known(module: str) -> bool:
    """Whether a name that is imported is a folder or module of this package, not what a module defines."""
    first = ROOT / floor_of(module)
    return module.startswith("dovetail.") and (first.is_dir() or first.with_suffix(".py").is_file())


def test_every_folder_and_loose_module_has_its_floor() -> None:
    found = {
        p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert found - {"__init__", "__main__"} == set(FLOORS)


def test_the_design_lists_the_floors() -> None:
    text = (ROOT.parent / "docs/design.md").read_text()
    table = text.split("## Folders and floors", 1)[1].split("\n## ", 1)[0]
    assert tuple(re.findall(r"^\| `(\w+)` \| \S", table, re.MULTILINE)) == FLOORS


def test_imports_only_go_down() -> None:
    wrong = []
    for path in FILES:
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if own not in FLOORS:
            continue
        for module in sorted(filter(known, imports(path))):
            if FLOORS.index(floor_of(module)) > FLOORS.index(own):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_no_two_modules_import_each_other() -> None:
    names = {
        ".".join(p.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES
    }
    edges = {name: {m for m in imports(path) if m in names and m != name} for name, path in names.items()}
    packages = {name for name, path in names.items() if path.name == "__init__.py"}
    circles = sorted(
        f"{a} <-> {b}" for a, bs in edges.items() for b in bs if a < b and a in edges[b] and not {a, b} & packages
    )
    assert not circles


def test_torch_is_imported_in_one_place_and_only_when_it_is_used() -> None:
    """Reference operations import it through `host.lazy_torch`, and core not at all."""
    direct = {str(p.relative_to(ROOT)) for p in FILES if {m for m in imports(p) if m.split(".")[0] == "torch"}}
    only_for_types = {p for p in direct if not _imported(ROOT / p)}
    assert direct - only_for_types == set()
    core = {p.name for p in (ROOT / "core").glob("*.py") if "dovetail.host.lazy_torch" in imports(p)}
    assert not core


def _imported(path: Path) -> bool:
    """Whether a file imports torch anywhere but under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in found if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in found if isinstance(n, ast.ImportFrom)}
    return any(name.split(".")[0] == "torch" for name in names)


def test_importing_everything_imports_no_torch() -> None:
    modules = [".".join(p.relative_to(ROOT.parent).with_suffix("").parts) for p in FILES if p.stem[0] != "_"]
    code = f"""import importlib, sys
for name in {modules}:
    importlib.import_module(name)
assert "torch" not in sys.modules, "torch"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


@pytest.mark.parametrize("path", TECHNIQUE_FILES, ids=lambda p: str(p.relative_to(TECHNIQUES)))
def test_techniques_never_import_each_other(path: Path) -> None:
    others = {m for m in imports(path) if m.startswith("dovetail.techniques.")}
    assert not {m for m in others if m.split(".")[2] != owner(path)}


def test_what_one_technique_alone_uses_lives_in_it() -> None:
    """A module of a lower floor that techniques import is used by two of them, or by a floor that all stand on.

    `ops` are left out: they are the definitions of native operations, which have neutral names whoever asks first.
    """
    users: dict[str, set[str]] = {}
    for path in FILES:
        for module in filter(known, imports(path)):
            if (ROOT.parent / (module.replace(".", "/") + ".py")).is_file():
                inside = path.is_relative_to(TECHNIQUES)
                users.setdefault(module, set()).add(f"techniques.{owner(path)}" if inside else "elsewhere")
    alone = {
        module: who
        for module, who in users.items()
        if len(who) == 1 and "elsewhere" not in who and floor_of(module) not in ("techniques", "ops")
    }
    assert not alone


def test_core_runtime_and_layers_name_no_technique() -> None:
    names = {n for pair in MODULES.items() for n in pair} - {"draft"}  # a noun of the core
    later = "quest shadowkv infinigen smartspec fiddler monde duplex blendserve cachecraft kvshare"
    names |= set(later.split())
    pattern = re.compile(r"\b(" + "|".join(re.escape(n) for n in names) + r")\b", re.IGNORECASE)
    for folder in ("core", "runtime", "layers"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not pattern.search(path.read_text()), path


def test_no_function_is_longer_than_a_screen() -> None:
    long = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.name} {lines}")
    assert not long


def test_the_loop_and_the_techniques_stay_small() -> None:
    assert len((ROOT / "core/engine.py").read_text().splitlines()) <= 150
    for path in TECHNIQUE_FILES:
        assert len(path.read_text().splitlines()) <= 300, path
    for folder in (p for p in TECHNIQUES.iterdir() if p.is_dir() and p.name != "__pycache__"):
        assert sum(len(p.read_text().splitlines()) for p in folder.glob("*.py")) <= 900, folder


def test_seams_have_at_most_three_methods_of_at_most_four_arguments() -> None:
    tree = ast.parse((ROOT / "core/seams.py").read_text())
    for cls in [n for n in tree.body if isinstance(n, ast.ClassDef)]:
        methods = [
            m for m in cls.body if isinstance(m, ast.FunctionDef) and not any(map(_is_property, m.decorator_list))
        ]
        assert len(methods) <= 3, cls.name
        for m in methods:
            assert len(m.args.args) - 1 <= 4, f"{cls.name}.{m.name}"


def _is_property(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "property"


def test_no_pickle_and_no_eval_anywhere() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text())
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec", "__import__"}, path
        assert not {m for m in imports(path) if m.split(".")[0] in ("pickle", "marshal", "shelve")}, path
        assert "torch.load" not in path.read_text(), path


def test_every_seam_has_a_default_or_is_given_by_the_device_side() -> None:
    seams = Seams()
    missing = {name for name in SEAMS if getattr(seams, name) is None}
    assert missing == {"reuse", "format", "executor"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_technique_can_be_named_by_the_spec_it_prints(name: str) -> None:
    built = technique(NEEDED.get(name, name))
    assert built.name == name
    assert built.lossless or built.exact_at or built.fills == ("format",)  # which rounds at every setting
    assert technique(built.spec).spec == built.spec
    assert (technique(built.spec).options, built.fills) == (built.options, technique(built.spec).fills)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("quest2", "ngram, quest, self-draft, shadowkv, sink-window"),
        ("ngram:speed=3", "tokens"),
        ("ngram:tokens", "key=value"),
        ("ngram:tokens=x", "int"),
        ("ngram:tokens=0", "tokens >= 1"),
        ("ngram:tokens=2,tokens=3", "twice"),
        ("sink-window:window=0", "window >= 1"),
    ],
)
def test_wrong_specs_say_what_is_known(spec: str, words: str) -> None:
    with pytest.raises(dovetail.ConfigError, match=words):
        technique(spec)


def test_tests_use_what_everybody_may_use() -> None:
    """No test reaches into what a class or a module keeps to itself."""
    found = []
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
                owner = ast.unparse(node.value)
                if owner not in ("self", "cls", "os") and (owner, node.attr) != ("dovetail", "_native"):
                    found.append(f"{path.name}:{node.lineno}: {owner}.{node.attr}")
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dovetail"):
                names = [a.name for a in node.names if re.match("_[a-z]", a.name) and a.name != "_native"]
                found += [f"{path.name}:{node.lineno}: {name} of {node.module}" for name in names]
    assert not found, "\n".join(found)
