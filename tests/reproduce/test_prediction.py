"""What is said about guesses: on a model whose guesses are right, and on one whose guesses are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dovetail.core.sampling import SamplingParams
from dovetail.reproduce.infinigen.prediction import likeness, report, watching
from tests.tiny import TinyCheckpoint, calibration, run_all, tiny_config, tiny_engine

PROMPT = tuple(i * 7 % 61 for i in range(90))
PARAMS = SamplingParams(temperature=0, max_tokens=12)
DEEP = TinyCheckpoint(tiny_config(num_layers=4))


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_HOME", str(tmp_path_factory.mktemp("home")))
        yield


def still() -> TinyCheckpoint:
    """Layers that add nothing: the input of each is that of the one before."""
    checkpoint = TinyCheckpoint(tiny_config(num_layers=4))
    for i in range(4):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            checkpoint.tensor(f"model.layers.{i}.{name}.weight").data[:] = 0
    return checkpoint


def watched(checkpoint: TinyCheckpoint, *rules: str) -> tuple[Any, list[list[int]]]:
    engine = tiny_engine(watching(rules), checkpoint=checkpoint)
    texts = run_all(engine, [PROMPT, PROMPT[5:]], PARAMS)
    return engine.seams.selector, texts


def test_right_guesses_find_everything() -> None:
    selector, _ = watched(still(), "infinigen:alpha=3,partial=1,skip_layers=1")
    found = selector.predictions[0].to_dict()
    assert found["found"] == found["found_of_best"] == pytest.approx(1)
    assert found["weight_found"] == pytest.approx(1)
    assert list(found["by_layer"]) == [1, 2, 3]
    assert likeness(selector.site, calibration("")) == pytest.approx([1, 1, 1])


def test_wrong_guesses_do_not_and_all_rules_see_the_same_rows() -> None:
    rules = ["infinigen:alpha=2,skip_layers=2", "infinigen:alpha=2,skip_layers=2,partial=1", "infinigen:alpha=inf"]
    selector, texts = watched(DEEP, *rules)
    assert texts == run_all(tiny_engine(checkpoint=DEEP), [PROMPT, PROMPT[5:]], PARAMS)  # nothing is left unread
    some, whole, everything = [p.to_dict() for p in selector.predictions]
    assert 0 < some["found"] < 1 and 0 < some["found_of_best"] < 1 and 0 < whole["found"] < 1
    assert whole["found"] == pytest.approx(whole["found_of_best"])
    assert some["read"] < 1
    assert everything["read"] == everything["found"] == everything["weight_found"] == 1
    assert set(some["by_layer"]) == {2, 3}
    assert all(0 < x < 1 for x in likeness(selector.site, calibration("")))
    lines = report(selector.predictions).splitlines()
    assert len(lines) == 1 + len(rules)
    assert lines[-1].split() == ["infinigen:alpha=inf", "100.0", "100.0", "100.0", "100.0", "100.0"]
