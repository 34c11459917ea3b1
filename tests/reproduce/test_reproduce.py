"""The list of systems, the runner and what the command reports, on made-up claims."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import dovetail.reproduce
from dovetail import cli
from dovetail.bench.rounds import Ratio
from dovetail.bench.verdict import Decision, Interval, Verdict, decide_exact
from dovetail.core.errors import ConfigError
from dovetail.reproduce import SYSTEMS, System, system
from dovetail.reproduce.claim import Claim, Experiment
from dovetail.reproduce.runner import measure

NAMES = [
    "flashinfer", "quest", "shadowkv", "infinigen", "atom", "tender", "bf16", "fiddler", "monde",
    "duplex", "blendserve", "smartspec", "cachecraft", "kvshare", "recursive", "hasco",
]  # fmt: skip


MET = decide_exact("at least 1", True)
MISSED = Decision("at least 1", Verdict.MISSED, "0.4 to 0.6 after 15 rounds", Interval(0.4, 0.6))
UNDECIDED = Decision("at least 1", Verdict.UNDECIDED, "this machine is too noisy", Interval(0.9, 1.1))


def claim(name: str, **more) -> Claim:
    return Claim(name, "two toys", "twice as fast (table 1)", "1.50 times as fast", "toys are small", **more)


def invoke(*arguments: object):
    return CliRunner().invoke(cli.build(["reproduce"]), ["reproduce", *map(str, arguments)])


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    """A system `toy` of one experiment that announces `names` and yields `claims`; records its efforts."""

    def make(names: list[str], claims: list[Claim]) -> list[str]:
        efforts: list[str] = []
        module = ModuleType("toy_claims")
        module.EFFORTS = {effort: effort for effort in ("quick", "default", "full")}  # type: ignore[attr-defined]

        def experiments(effort: str) -> list[Experiment]:
            efforts.append(effort)
            return [Experiment("toys", tuple(names), lambda: iter(claims))]

        module.experiments = experiments  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "toy_claims", module)
        monkeypatch.setitem(SYSTEMS, "toy", System("toy", "Toy: a system", "no paper", "toy_claims"))
        return efforts

    return make


def test_all_systems_are_listed_with_their_state() -> None:
    done = invoke()
    assert done.exit_code == 0
    lines = done.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == NAMES
    for line in lines:
        assert ("available" in line) != ("not built yet" in line)
    assert "available" in lines[0]
    listed = json.loads(invoke("--json", "-").stdout.splitlines()[-1])["systems"]
    assert [entry["name"] for entry in listed] == NAMES
    assert [entry["state"] for entry in listed] == [s.state for s in SYSTEMS.values()]


def test_available_systems_have_a_module_with_every_effort() -> None:
    ready = [s for s in SYSTEMS.values() if s.module is not None]
    assert ready
    for s in ready:
        module = import_module(str(s.module))
        assert list(module.EFFORTS) == ["quick", "default", "full"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nothing",), "the known ones are flashinfer, quest"),
        (("hasco",), "not built yet; available: flashinfer, quest, shadowkv, infinigen, atom, tender, bf16"),
        (("flashinfer", "--quick", "--full"), "exclude each other"),
        (("--quick",), "need the NAME"),
        (("--plot", "x.png"), "need the NAME"),
        (("flashinfer", "--plot", "x.txt"), "must end in"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(arguments, says) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(("flags", "effort"), [((), "default"), (("--quick",), "quick"), (("--full",), "full")])
def test_met_bars_and_claims_without_one_succeed(toy, flags, effort) -> None:
    ratio = Ratio(1.5, 1.25, 1.75)
    efforts = toy(["a", "b"], [claim("a", bar=MET), claim("b", ratio=ratio, paper_ratio=(2.0, 2.0))])
    done = invoke("toy", *flags, "--json", "-")
    assert done.exit_code == 0
    assert efforts == [effort]
    assert "1 of 1 bars met" in done.stdout
    for part in (
        "two toys",
        "twice as fast (table 1)",
        "1.50 times as fast",
        "toys are small",
        "1.50 (1.25-1.75)",
    ):
        assert part in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"system", "claims", "machine", "versions", "commit", "date"} <= set(found)
    assert (found["system"], found["effort"]) == ("toy", effort)
    a, b = found["claims"]
    assert set(a) == set(b) == {
        "name", "setting", "paper", "ours", "kind", "meets", "why", "bar", "needs", "ratio", "paper_ratio",
        "verdict", "interval", "verdict_why",
    }  # fmt: skip
    assert (a["meets"], a["bar"], a["needs"], a["ratio"]) == (True, True, "at least 1", None)
    assert (b["meets"], b["bar"], b["needs"], b["kind"]) == (None, False, None, "run")
    assert b["ratio"] == {"median": 1.5, "low": 1.25, "high": 1.75} and b["paper_ratio"] == [2.0, 2.0]


def test_a_missed_bar_is_exit_1_and_named(toy, tmp_path: Path) -> None:
    missed = claim("slow", ratio=Ratio(0.5, 0.4, 0.6), bar=MISSED)
    toy(["slow", "fine"], [missed, claim("fine", bar=MET)])
    done = invoke("toy", "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png")
    assert done.exit_code == 1
    assert "1 of 2 bars met, 1 missed" in done.stdout
    assert "slow: 1.50 times as fast [at least 1: MISSED (0.4 to 0.6 after 15 rounds)]" in done.stderr
    assert "fine: 1.50 times as fast [at least 1: met (exact)]" in done.stderr
    claims = json.loads((tmp_path / "out.json").read_text())["claims"]
    assert [c["meets"] for c in claims] == [False, True]
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_an_undecided_bar_is_no_failure_and_is_shown_with_its_interval(toy, tmp_path: Path) -> None:
    toy(["near", "fine"], [claim("near", ratio=Ratio(1.0, 0.5, 1.5), bar=UNDECIDED), claim("fine", bar=MET)])
    done = invoke("toy", "--json", "-", "--plot", tmp_path / "out.png")
    assert done.exit_code == 0
    assert "1 of 2 bars met, 1 undecided" in done.stdout
    assert "at least 1: undecided (this machine is too noisy)" in done.stdout and "0.9 to 1.1" in done.stdout
    near, fine = json.loads(done.stdout.splitlines()[-1])["claims"]
    assert (near["bar"], near["meets"], near["verdict"]) == (True, None, "undecided")
    assert (near["interval"], near["verdict_why"]) == ([0.9, 1.1], "this machine is too noisy")
    assert (fine["bar"], fine["meets"], fine["verdict"], fine["interval"]) == (True, True, "met", None)


@pytest.mark.parametrize(
    ("announced", "yielded", "says"),
    [
        (["a", "b"], ["a"], "not measured: b"),
        (["a"], ["b"], "'b' was measured, but not announced"),
        (["a"], ["a", "a"], "'a' was measured"),
        (["a", "a"], ["a"], "same name"),
    ],
)
def test_every_announced_claim_is_measured_once(announced, yielded, says) -> None:
    with pytest.raises(RuntimeError, match=says):
        measure([Experiment("toys", tuple(announced), lambda: [claim(name) for name in yielded])])


def test_a_claim_is_shown_before_the_next_is_measured(capsys: pytest.CaptureFixture) -> None:
    shown = []

    def claims():
        yield claim("first")
        shown.append(capsys.readouterr().err)
        yield claim("second")

    assert [c.name for c in measure([Experiment("toys", ("first", "second"), claims)])] == ["first", "second"]
    assert "first: 1.50 times as fast" in shown[0] and "second" not in shown[0]


def test_ratios_are_of_the_same_round() -> None:
    ratio = Ratio.of([2.0, 9.0, 4.0], [1.0, 3.0, 4.0])
    assert ratio == Ratio(2.0, 1.0, 3.0)
    assert str(ratio) == "2.00 (1.00-3.00)"


def test_systems_by_name() -> None:
    assert system("flashinfer").state == "available"
    with pytest.raises(ConfigError):
        system("Quest")
    assert dovetail.reproduce.SYSTEMS["hasco"].module is None
