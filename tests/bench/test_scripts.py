"""Every script of bench/ runs, with the smallest settings, and says what arithmetic it measured."""

from __future__ import annotations

import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dovetail.ops.cpu import isas

BENCH = Path(__file__).parents[2] / "bench"
SCRIPTS = sorted(path.name for path in BENCH.glob("*.py"))
native = pytest.mark.skipif(not isas(), reason="the native kernels were not built")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path):
    """Run a script in this process; what it printed, and the JSON at its end."""
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))

    def run(name: str, *arguments: object):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(BENCH / name), run_name="__main__")
        out = capsys.readouterr().out
        return out, json.loads(out.splitlines()[-1]) if "--json" in arguments else None

    return run


def test_no_script_hides_a_standard_module() -> None:
    """Workers start in this folder, and torch imports much."""
    assert not {Path(name).stem for name in SCRIPTS} & sys.stdlib_module_names


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(script, name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        script(name, "--help")
    assert left.value.code == 0
    assert f"bench/{name}" in capsys.readouterr().out


@pytest.mark.parametrize("kernels", ["torch", pytest.param("auto", marks=native)])
def test_engine(script, tiny_model: Path, kernels: str) -> None:
    out, found = script("engine.py", tiny_model, "--tokens", 2, "--rounds", 1, "--kernels", kernels, "--json")
    used = "torch" if kernels == "torch" else isas()[0]
    assert f"float32, exact activations, float32 KV, {used} kernels" in out
    assert (found["dtype"], found["activations"], found["kernels"]) == ("float32", "exact", used)
    assert sorted(found["streams"]) == ["1", "32", "8"]


def test_host(script) -> None:
    given = ("--streams", 1, 3, "--rounds", 1, "--tokens", 8, "--use", "ngram", "--profile", "--json")
    found = script("host.py", *given)[1]
    assert found["tokenizer"] == "bytes"
    assert set(found["streams"]["3"]) == {"plan", "commit", "text", "all"}


@native
@pytest.mark.parametrize(
    "only", ["gemv.Q4_1.int8 1536", "gemm.BF16.bf16 1536", "gemv.ATOM.atom 1536", "decode.bf16 9/3 d64 1024"]
)
def test_ops(script, only: str) -> None:
    found = script("ops.py", "--only", only, "--rounds", 1, "--threads", 1, "--megabytes", 1, "--json")[1]
    assert found["kernels"] and all(row["us"] > 0 for row in found["kernels"])


@native
def test_profile(script, tiny_model: Path) -> None:
    given = (tiny_model, "--points", "3,0,1", "1,20,2", "--repeats", 2, "--threads", 1, "--json")
    out, found = script("step.py", *given)
    assert f"exact activations, float32 KV, {isas()[0]} kernels" in out
    assert [p["streams"] for p in found["points"]] == [1, 2]
    for p in found["points"]:
        assert {"embed", "attend", "head"} < set(p["figures"])
        other = ("all", "run", "median", "MB", "GB/s", "roofline")
        assert sum(ms for name, ms in p["figures"].items() if name not in other) == pytest.approx(
            p["figures"]["all"]
        )
        assert p["figures"]["roofline"] > 0 and 0 < p["figures"]["run"] <= p["figures"]["median"]
    with pytest.raises(SystemExit):
        script("step.py", tiny_model, "--kernels", "torch")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch):
    """bench/ as the workers' processes see it."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in [n for n in sys.modules if n in ("workers", "peers") or n.startswith("workers.")]:
        del sys.modules[name]


def test_our_worker(workers, tiny_model: Path) -> None:
    load, measure = workers("workers.dovetail").load, workers("workers.protocol").measure
    engine = load({"model": str(tiny_model), "threads": 1, "options": {}})
    shown = engine.facts["config"]
    assert (shown["dtype"], shown["activations"]) == ("float32", "exact")
    assert shown["kernels"] == (isas() or ("torch",))[0]
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4, 5]]):
        (run,) = engine.ways(prompts).values()
        found = measure(run, prompts, 4)
        assert found["first"] > 0 and found["rate"] > 0


def test_workers_build_the_settings_that_are_asked_for(workers) -> None:
    protocol = workers("workers.protocol")
    built: list[str] = []

    def way(name: str):
        return lambda: built.append(name) or (lambda prompts, tokens: [(0.0, [tokens])])

    ways = {name: way(name) for name in ("a", "b", "c")}
    assert list(protocol.build(ways, {"settings": ["c", "a"]})) == built == ["c", "a"]
    assert list(protocol.build(ways, {"settings": []})) == ["a", "b", "c"]
    with pytest.raises(RuntimeError, match=r"no setting \['d'\]; there are \['a', 'b', 'c'\]"):
        protocol.build(ways, {"settings": ["a", "d"]})


def test_peers_with_another_checkout(
    workers, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The other checkout's own code runs: its version is another one."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("dovetail", "bench"):
        shutil.copytree(BENCH.parent / name, other / name, ignore=shutil.ignore_patterns("__pycache__"))
    init = other / "dovetail" / "__init__.py"
    init.write_text(init.read_text() + '\n__version__ = "another"\n')
    peers = workers("peers")
    monkeypatch.setattr(peers, "figures", lambda quick, only=(): [peers.Figure("decode_16", 16, 2)])
    given = ("--peer", "dovetail", "--path", str(other), "--model", str(tiny_model), "--threads", "1",
             "--theirs", "max_num_seqs=3", "--rounds", "2", "--quick")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["peers.py", *given])
    monkeypatch.setattr(peers.signal, "signal", lambda *_: None)
    assert peers.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["versions"]["theirs"]["dovetail"] == "another" != found["versions"]["ours"]["dovetail"]
    assert found["settings"] == {"ours": {"decode_16": "defaults"}, "theirs": {"decode_16": "as asked"}}
    assert all(len(v) == 2 and min(v) > 0 for v in found["samples"]["decode_16"].values())
    assert found["commits"]["theirs"] is None  # no repository there


@pytest.mark.parametrize(
    "given, told",
    [
        (("--peer", "dovetail"), "--path DIR, the other checkout"),
        (("--peer", "openvino", "--path", "."), "go together"),
        (("--peer", "openvino", "--theirs", "a=1"), "--theirs is for --peer dovetail"),
        (("--peer", "dovetail", "--path", "tests"), "is no checkout of this project"),
        (("--peer", "dovetail", "--path", ".", "--setting", "x"), "--setting is for other peers"),
        (("--peer", "llama-cpp", "--converted", "."), "--converted is for --peer openvino"),
        (("--peer", "openvino", "--converted", "tests"), "has no openvino_model.xml"),
        (("--peer", "openvino", "--figures", "decode_16,x"), "there is no x; there are prefill_512, decode_16"),
    ],
)
def test_peers_usage(script, capsys: pytest.CaptureFixture, given: tuple[str, ...], told: str) -> None:
    with pytest.raises(SystemExit) as left:
        script("peers.py", *given)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_peers_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Made-up rounds whose ratio of medians, 1, is not the median of their ratios."""
    peers = SimpleNamespace(**runpy.run_path(str(BENCH / "peers.py")))
    config = {"dtype": "float32", "activations": "int8", "kernels": "scalar"}
    found = {
        "facts": {"ours": {"versions": {"dovetail": "0"}, "config": config}, "theirs": {"versions": {"x": "1"}}},
        "settings": {name: {"decode_16": "a setting"} for name in ("ours", "theirs")},
        "samples": {"decode_16": {"ours": [1.0, 2.0, 3.0], "theirs": [0.5, 3.0, 2.0]}},
        "read_bandwidth": [30.0, None, 31.0],
    }
    args = SimpleNamespace(peer="x", path=None, threads=1, rounds=3, quick=False)
    result = peers.report(args, "model.gguf", found)
    assert result["ratios"] == {"decode_16": 1.5}
    assert result["intervals"] == {"decode_16": None}
    peers.show(result)
    out = capsys.readouterr().out
    assert "dtype float32, activations int8, kernels scalar" in out
    assert "median of the rounds' ratios, not the ratio of the medians" in out
    assert "too few rounds" in out
    shown = [peers.verdict(interval) for interval in (None, [1.1, 1.2], [0.8, 0.9], [0.9, 1.1])]
    assert shown == ["too few rounds", "1.1 to 1.2 faster", "0.8 to 0.9 slower", "0.9 to 1.1"]
