"""`dovetail advise`: candidates, their processes, tables, errors."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dovetail.advise import candidates as candidates_module
from dovetail.advise import run as run_module
from dovetail.advise.candidates import Candidate, candidates
from dovetail.advise.worker import Failed, Worker
from dovetail.core.errors import ConfigError
from dovetail.host.machine import Memory
from dovetail.models import open_checkpoint
from dovetail.options import Options
from dovetail.setting import Setting
from tests.helpers.hf_models import save_model
from tests.helpers.program import SMALL, call

BASE = Setting("plain", (), Options(kv_memory=4 << 20, threads=1))
ASKED: Counter[tuple[str, str]] = Counter()
OPEN: list[str] = []
MOST_OPEN = [0]


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    ASKED.clear()
    OPEN.clear()
    MOST_OPEN[0] = 0


# -- candidates ------------------------------------------------------------------------------------------


def names(checkpoint, sweep=(), also=()) -> list[str]:
    return [c.name for c in candidates("MODEL", checkpoint, BASE, sweep, also)]


def test_an_unquantized_checkpoint_is_tried_in_every_format_of_weights(tiny_model):
    found = names(open_checkpoint(tiny_model))
    assert found[0] == "plain" and "w8a8-int8" in found and "w8a8-fp8" in found
    assert "kv-cache-dtype=int8" in found
    assert not {"quest", "ngram", "sink-window"} & set(found)


def test_groups_divide_the_layers(tmp_path):
    save_model(
        tmp_path / "wide", hidden_size=64, intermediate_size=192, num_attention_heads=4, num_hidden_layers=1
    )
    assert "w4a16:group=64" in names(open_checkpoint(tmp_path / "wide"))


def test_a_quantized_checkpoint_is_tried_with_all_activations(tiny_model, monkeypatch):
    monkeypatch.setattr(candidates_module, "stored_format", lambda checkpoint: "Q4_K")
    found = names(open_checkpoint(tiny_model))
    assert found[0] == "activations=exact" and "activations=int8" in found
    assert "activations=int8+kv-cache-dtype=int8" in found
    assert not any("w4" in name for name in found)


def test_given_settings_replace_the_others_but_the_least_rounded(tiny_model, tmp_path):
    also = tmp_path / "other"
    found = candidates("MODEL", open_checkpoint(tiny_model), BASE, ["w8a8-int8:head=asis,int8"], [also])
    assert [(c.name, c.model) for c in found] == [
        ("plain", "MODEL"), ("w8a8-int8:head=asis", "MODEL"), ("w8a8-int8:head=int8", "MODEL"),
        ("other", str(also)),
    ]  # fmt: skip
    assert found[1].setting.use == ("w8a8-int8:head=asis",) and found[1].setting.options == BASE.options
    with pytest.raises(ConfigError, match="'plain' is the name of another setting"):
        names(open_checkpoint(tiny_model), also=[tmp_path / "plain"])


# -- workers ---------------------------------------------------------------------------------------------


def test_a_worker_measures_a_candidate_and_survives_what_fails(tiny_model, monkeypatch):
    worker = Worker(Candidate("int8", str(tiny_model), Setting("int8", ("w8a8-int8",), BASE.options)))
    try:
        assert worker.loaded["context"] == 4096 and worker.loaded["uncounted"] is None
        assert worker.loaded["config"]["use"] == ["w8a8-int8:head=asis"]
        assert worker.prompt(20) > 0
        worker.fill(16, 3)
        found = worker.decode(2)
        assert found["rate"] > 0 and found["batch"] == 3
        assert found["bytes"] > 0 and 0 < found["memory_share"] <= 1
        with pytest.raises(Failed, match="nothing"):
            worker.loss("nothing", None, 1)
        drained = worker.drain()
        assert drained["memory"] > 1 << 20 and drained["activity"]["w8a8-int8"] > 0
        assert worker.run([(8, 3), (9, 2), (10, 1)], 2) > 0
        assert worker.loss("pydoc", None, 2)["windows"] == 2
    finally:
        worker.close()


def test_a_worker_that_cannot_load_says_why(tiny_model):
    with pytest.raises(Failed, match="int3"):
        Worker(Candidate("bad", str(tiny_model), Setting("bad", (), Options(kv_cache_dtype="int3"))))
    with pytest.raises(Failed, match="nowhere"):
        Worker(Candidate("bad", str(tiny_model / "nowhere"), BASE))


def test_a_worker_that_dies_says_so(tiny_model, monkeypatch):
    monkeypatch.setattr("dovetail.advise.worker._CHILD", "import sys; sys.exit('out of luck')")
    with pytest.raises(Failed, match="its process ended with 1: out of luck"):
        Worker(Candidate("bad", str(tiny_model), BASE))


def test_a_whole_run_of_the_command(tiny_model, tmp_path):
    words = ("--prompt-tokens", 24, "--output-tokens", 4, "--concurrency", 2, "--rounds", 1, "--windows", 1)
    done = call(
        "advise", tiny_model, *words, "--sweep", "w8a8-int8", "--max-loss", "90%", *SMALL,
        "--check", "--json", "-", "--plot", tmp_path / "advice.png",
    )  # fmt: skip
    assert done.exit_code in (0, 1), done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [s["setting"] for s in found["settings"]] == ["plain", "w8a8-int8"]
    assert [s["state"] for s in found["settings"]] == ["measured"] * 2
    (load,) = found["workloads"]
    assert (load["requests"], load["prompt_tokens"], load["concurrency"]) == (2, 24, 2)
    for setting in load["settings"]:
        assert setting["predicted_s"] > 0 and setting["measured_s"] > 0 and setting["bytes_per_step"] > 0
    assert load["check"]["meets"] == (done.exit_code == 0) and load["recommended"] in ("plain", "w8a8-int8")
    assert (tmp_path / "advice.png").stat().st_size > 1000


# -- the command, with processes that only pretend ---------------------------------------------------------


class Fake:
    """A worker whose speed and loss follow from the name of its setting."""

    speeds: dict[str, float] = {"plain": 10.0, "w8a8-int8": 20.0, "w8a8-fp8": 5.0, "other": 40.0}
    losses: dict[str, float] = {"w8a8-int8": 0.005, "w8a8-fp8": 0.002, "other": 0.05}
    runs: dict[str, float] = {}
    fails: dict[str, str] = {}

    def __init__(self, candidate: Candidate) -> None:
        self.name = candidate.name
        self._do("load")
        OPEN.append(self.name)
        MOST_OPEN[0] = max(MOST_OPEN[0], len(OPEN))
        self.loaded = {
            "vocabulary": 99 if self.name != "odd" else 98,
            "context": 2048,
            "uncounted": None,
            "config": {},
        }

    def _do(self, what: str) -> None:
        ASKED[self.name, what] += 1
        if self.fails.get(self.name) == what:
            raise Failed(f"no {what} today")

    def loss(self, corpus, data, windows) -> dict[str, Any]:
        self._do("loss")
        value = 10 * (1 + self.losses.get(self.name, 0.0))
        return {"perplexity": value, "window_perplexity": [value] * windows}

    def prompt(self, tokens) -> float:
        self._do("prompt")
        return 10 * self.speeds[self.name]

    def fill(self, context, streams) -> None:
        self._do("fill")

    def decode(self, steps) -> dict[str, Any]:
        self._do("decode")
        return {"rate": self.speeds[self.name], "batch": 1, "bytes": 1e6, "memory_share": 0.7}

    def drain(self) -> dict[str, Any]:
        self._do("drain")
        return {"memory": 1 << 30, "activity": {}}

    def run(self, requests, concurrency) -> float:
        self._do("run")
        return self.runs.get(self.name, 100 / self.speeds[self.name])

    def close(self) -> None:
        OPEN.remove(self.name)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(run_module, "Worker", Fake)
    monkeypatch.setattr(Fake, "fails", {})
    monkeypatch.setattr(Fake, "runs", {})
    monkeypatch.setattr(run_module.machine, "memory", lambda: Memory(1 << 40, 1 << 40, None))


def advise(model: Path, *words: object):
    sweep = ("--sweep", "w8a8-int8", "--sweep", "w8a8-fp8")
    done = call("advise", model, *sweep, *words, *SMALL, "--json", "-")
    found = json.loads(done.stdout.splitlines()[-1]) if done.exit_code in (0, 1) else {}
    return done, found


@pytest.mark.usefixtures("fake")
def test_three_workloads_are_advised_on_by_default(tiny_model):
    done, found = advise(tiny_model, "--rounds", 3)
    assert [w["workload"] for w in found["workloads"]] == ["chat", "summarise", "batch"]
    assert {w["recommended"] for w in found["workloads"]} == {"w8a8-int8"}
    assert done.stdout.count("recommended, on the front") == 3
    assert "w8a8-fp8: it takes 2.00 times the time of plain" in done.stdout
    assert ASKED["plain", "prompt"] == ASKED["plain", "decode"] == 9 and ASKED["plain", "fill"] == 3
    assert ASKED["plain", "run"] == 0 and OPEN == [] and MOST_OPEN == [3]


@pytest.mark.usefixtures("fake")
def test_the_loss_that_is_taken_decides(tiny_model, tmp_path):
    (tmp_path / "other").mkdir()
    for most, best in (("0.4%", "plain"), ("1%", "w8a8-int8"), ("0.1", "other")):
        _, found = advise(tiny_model, "--workload", "chat", "--also", tmp_path / "other", "--max-loss", most)
        assert found["workloads"][0]["recommended"] == best
    assert found["settings"][3]["loss"] == pytest.approx(0.05)


@pytest.mark.usefixtures("fake")
def test_a_setting_that_cannot_run_is_named_and_the_others_go_on(tiny_model, monkeypatch):
    for what in ("load", "loss", "fill", "decode"):
        monkeypatch.setattr(Fake, "fails", {"w8a8-int8": what})
        done, found = advise(tiny_model, "--workload", "chat", "--fresh")
        assert done.exit_code == 0 and found["workloads"][0]["recommended"] == "plain"
        assert found["workloads"][0]["refused"] == {"w8a8-int8": f"no {what} today"}
        assert f"no {what} today" in done.stderr and "left out" in done.stdout and OPEN == []
    assert found["settings"][1]["state"] == "measured"  # its loss is known, only this workload is not


@pytest.mark.usefixtures("fake")
def test_where_nothing_can_run_that_is_an_error(tiny_model, monkeypatch):
    monkeypatch.setattr(Fake, "fails", dict.fromkeys(Fake.speeds, "load"))
    done, _ = advise(tiny_model, "--workload", "chat")
    assert done.exit_code == 2 and "no setting can run chat; plain: no load today" in done.stderr
    monkeypatch.setattr(Fake, "fails", {})
    done, _ = advise(tiny_model, "--prompt-tokens", 2000, "--output-tokens", 100)
    assert done.exit_code == 2 and "it needs 2100 tokens of context, and 2048 are there" in done.stderr


@pytest.mark.usefixtures("fake")
def test_another_vocabulary_cannot_be_compared(tiny_model, tmp_path):
    done, found = advise(tiny_model, "--workload", "chat", "--also", tmp_path / "odd")
    assert "has 98 tokens and the first one's 99" in found["settings"][3]["why"]
    assert done.exit_code == 0


@pytest.mark.usefixtures("fake")
def test_settings_run_one_after_the_other_where_memory_does_not_hold_them(tiny_model, monkeypatch):
    monkeypatch.setattr(run_module.machine, "memory", lambda: Memory(1 << 40, (2 << 30) - 1, None))
    done, found = advise(tiny_model, "--workload", "chat")
    assert MOST_OPEN == [1] and "one after the other" in done.stderr
    assert found["workloads"][0]["recommended"] == "w8a8-int8"


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("seconds", "code", "words"), [(5.0, 0, "as predicted"), (10.4, 0, "within 5 %"), (20.0, 1, "MISSED")]
)
def test_the_recommendation_is_checked(tiny_model, monkeypatch, seconds, code, words):
    monkeypatch.setattr(Fake, "runs", {"w8a8-int8": seconds})
    done, found = advise(tiny_model, "--workload", "batch", "--check")
    assert done.exit_code == code and words in done.stdout
    assert found["workloads"][0]["check"]["meets"] is (code == 0)
    assert ASKED["plain", "run"] == 2


@pytest.mark.usefixtures("fake")
def test_losses_of_an_interrupted_run_are_kept(tiny_model, monkeypatch):
    def interrupted(self, steps):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(Fake, "decode", interrupted)
        done, _ = advise(tiny_model, "--workload", "chat")
        assert done.exit_code == 130 and OPEN == []
    done, _ = advise(tiny_model, "--workload", "chat")
    assert "3 losses are an interrupted run's" in done.stderr and ASKED["plain", "loss"] == 1
    advise(tiny_model, "--workload", "chat")
    assert ASKED["plain", "loss"] == 2


@pytest.mark.usefixtures("fake")
def test_more_requests_at_once_than_usual_get_room(tiny_model, monkeypatch):
    asked: list[Options] = []
    load = Fake.__init__

    def spy(self, candidate):
        asked.append(candidate.setting.options)
        load(self, candidate)

    monkeypatch.setattr(Fake, "__init__", spy)
    advise(tiny_model, "--prompt-tokens", 8, "--output-tokens", 8, "--concurrency", 100)
    advise(tiny_model, "--workload", "batch")
    assert [o.max_num_seqs for o in asked] == [100] * 3 + [None] * 3


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--workload", "nothing.csv"), "none of chat, summarise, batch, and there is no such file"),
        (("--max-loss", "much"), "write a share from 0 to below 1"),
        (("--max-loss", "1"), "as in 1% or 0.01"),
        (("--max-loss", "-1%"), "write a share"),
        (("--max-loss", "1%5"), "write a share"),
        (("--workload", "chat", "--prompt-tokens", 5, "--output-tokens", 5), "exclude each other"),
        (("--prompt-tokens", 5), "are given together"),
        (("--prompt-tokens", 0, "--output-tokens", 5), "--prompt-tokens must be at least 1"),
        (("--concurrency", 5), "--concurrency is for a trace"),
        (("--requests", 5), "--requests is for a trace"),
        (("--sweep", "bogus"), "technique 'bogus' is unknown"),
        (("--use", "bogus"), "technique 'bogus' is unknown"),
        (("--also", "plain"), "rename the folder"),
    ],
)
def test_wrong_usage_is_refused_before_anything_runs(tiny_model, words, why):
    done, _ = advise(tiny_model, *words)
    assert done.exit_code == 2 and why in done.stderr
    assert not ASKED


@pytest.mark.usefixtures("fake")
def test_a_trace_that_is_none_is_refused(tiny_model, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("no trace")
    done, _ = advise(tiny_model, "--workload", file)
    assert done.exit_code == 2 and "no trace is recognised" in done.stderr
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "\n".join(
            json.dumps({"timestamp": i, "input_length": 40 + i, "output_length": 9, "hash_ids": []})
            for i in range(9)
        )
    )
    done, found = advise(tiny_model, "--workload", trace, "--concurrency", 2, "--requests", 5)
    load = found["workloads"][0]
    assert (load["workload"], load["requests"], load["prompt_tokens"], load["concurrency"]) == (
        "trace.jsonl",
        5,
        42,
        2,
    )
    assert os.path.basename(trace) in done.stdout
