"""What is measured on a model before the first request: what it sees, and what is kept of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dovetail.checkpoint.identity import identity
from dovetail.core.seams import Site
from dovetail.core.technique import Technique
from dovetail.techniques.infinigen.calibration import kept, layer_inputs
from tests.tiny import CHECKPOINT, TinyCheckpoint, tiny_config, tiny_engine


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))


def site_of(checkpoint: TinyCheckpoint) -> Site:
    sites: list[Site] = []
    tiny_engine(Technique("curious", (), lambda site: sites.append(site) or {}), checkpoint=checkpoint)
    return sites[0]


@pytest.mark.parametrize("windows", [(), (4, None, 7)])
def test_layer_inputs_are_what_the_layers_see(windows: tuple[int | None, ...]) -> None:
    site = site_of(TinyCheckpoint(tiny_config(num_layers=3, sliding_windows=windows)))
    tokens = [i * 5 % 11 for i in range(37)]
    inputs = dict(layer_inputs(site, [tokens]))
    torch.testing.assert_close(inputs[0], site.model.embed(torch.tensor(tokens)))
    for prefix in (1, 20):  # every layer is causal
        for layer, hidden in layer_inputs(site, [tokens[:prefix]]):
            torch.testing.assert_close(hidden, inputs[layer][:prefix])
    assert sorted(inputs) == [0, 1, 2]
    assert len({tuple(x.flatten().tolist()) for x in inputs.values()}) == 3


def test_what_is_ready_is_told_when_model_and_kv_are_there() -> None:
    seen = []

    def build(site: Site) -> dict[str, object]:
        site.ready.append(lambda: seen.append((site.model is not None, site.kv is not None)))
        return {}

    tiny_engine(Technique("curious", (), build))
    assert seen == [(True, True)]


def test_a_measurement_is_kept_and_a_broken_file_is_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def measure() -> dict[str, np.ndarray]:
        calls.append(1)
        return {"a": np.arange(6.0).reshape(2, 3).T, "b": np.ones(1)}

    shapes = {"a": (3, 2), "b": (1,)}

    def get(*key: str) -> None:
        found = kept(key, shapes, measure)
        assert np.array_equal(found["a"], np.arange(6).reshape(2, 3).T)
        assert {a.dtype for a in found.values()} == {np.dtype(np.float32)}

    get("x", "y")
    get("x", "y")
    assert len(calls) == 1
    get("x", "z")
    assert len(calls) == 2
    files = sorted((tmp_path / "calibration").iterdir())
    assert len(files) == 2
    whole = files[0].read_bytes()
    for broken in (
        b"",
        whole[:-3],
        whole[:8] + b"{" * 40,
        b"\xff" * 100,
        files[1].read_bytes()[:-4] + b"\0\0\xc0\x7f",
    ):
        before = len(calls)
        for file in files:
            file.write_bytes(broken)
        get("x", "y")
        assert len(calls) == before + 1
    assert "calibrating again" in capsys.readouterr().err
    assert kept(("x", "y"), {"a": (3, 2)}, lambda: {"a": np.zeros((3, 2))})["a"].sum() == 0


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "file"))
    assert kept(("x",), {"a": (1,)}, lambda: {"a": np.ones(1)})["a"] == 1
    assert "repeated at the next start" in capsys.readouterr().err


def test_a_checkpoint_is_known_by_its_weights_and_its_configuration() -> None:
    same = TinyCheckpoint(tiny_config())
    assert identity(same) == identity(CHECKPOINT)
    others = [TinyCheckpoint(tiny_config(), seed=1), TinyCheckpoint(tiny_config(rms_norm_eps=1e-3))]
    assert len({identity(c) for c in (same, *others)}) == 3
