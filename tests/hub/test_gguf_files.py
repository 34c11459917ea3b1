"""Which GGUF file of a repository is taken, and that all its parts come from a hub and are found without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from fake_hub import FakeHub
from ggufs import write

from dovetail import hub
from dovetail.core.errors import ModelError
from dovetail.host.files import model_bytes
from dovetail.hub.gguf_files import first_files, with_tag, without_tag
from dovetail.models import open_checkpoint

REPO = "org/tiny-GGUF"
NAMES = [
    "README.md", "tiny-Q8_0.gguf", "tiny.q4_k_m.gguf", "tiny-UD-Q4_K_XL.gguf", "mmproj-F16.gguf", "imatrix.gguf",
    "BF16/tiny-00001-of-00002.gguf", "BF16/tiny-00002-of-00002.gguf",
    "tiny-Q6_K-00001-of-00002.gguf", "tiny-Q6_K-00002-of-00002.gguf",
    "tiny-Q3_K_M-00002-of-00002.gguf",
]  # fmt: skip


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "tiny.q4_k_m.gguf"),
        ("q8_0", "tiny-Q8_0.gguf"),
        ("UD-Q4_K_XL", "tiny-UD-Q4_K_XL.gguf"),
        ("q4_k_xl", "tiny-UD-Q4_K_XL.gguf"),
        ("bf16", "BF16/tiny-00001-of-00002.gguf"),
        ("Q6_K", "tiny-Q6_K-00001-of-00002.gguf"),
        ("Q3_K_M", "tiny-Q3_K_M-00001-of-00002.gguf"),
    ],
)
def test_tags(tag: str, file: str) -> None:
    assert with_tag(REPO, tag, NAMES) == file


@pytest.mark.parametrize("tag", ["Q4_K", "Q4", "M", "_M", "tin", "F16", "imatrix", "0", "gguf", "00001-of-00002"])
def test_tags_that_match_nothing_list_the_files(tag: str) -> None:
    listed = r"it has BF16/tiny-00001-of-00002\.gguf, tiny-Q3_K_M-00001-of-00002\.gguf, .*, tiny\.q4_k_m\.gguf$"
    with pytest.raises(ModelError, match=f"no GGUF file whose name ends in '{tag}'; {listed}"):
        with_tag(REPO, tag, NAMES)


def test_tags_that_match_several_list_them() -> None:
    names = ["a-Q4_K_M.gguf", "b/Q4_K_M/b.gguf", "c-Q8_0.gguf"]
    with pytest.raises(
        ModelError, match=r"may mean a-Q4_K_M\.gguf, b/Q4_K_M/b\.gguf; name one as org/tiny-GGUF:F"
    ):
        with_tag(REPO, "Q4_K_M", names)
    with pytest.raises(ModelError, match="has no GGUF file, so none"):
        with_tag(REPO, "Q4_K_M", ["model.safetensors", "mmproj-Q4_K_M.gguf"])


def test_without_a_tag() -> None:
    assert without_tag(REPO, NAMES) == "tiny.q4_k_m.gguf"
    assert without_tag(REPO, ["any.gguf", "mmproj-any.gguf"]) == "any.gguf"
    assert without_tag(REPO, ["t-Q8_0.gguf", "t-F16.gguf", "t-Q5_K_M.gguf"]) == "t-Q5_K_M.gguf"
    for names in (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "a-Q8_0.gguf"], ["a-IQ2_XS.gguf", "a-IQ1_S.gguf"]):
        with pytest.raises(ModelError, match=f"TAG or {REPO}:FILE, of {names[0]}|{REPO}:FILE, of a-IQ1_S"):
            without_tag(REPO, names)


def test_long_lists_are_cut() -> None:
    names = [f"{n:02}.gguf" for n in range(20)]
    assert first_files(names) == names
    with pytest.raises(ModelError, match=r"11\.gguf and 8 more$"):
        without_tag(REPO, names)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A repository with a whole file, and a model in three parts in a folder."""
    (tmp_path / "made" / "Q8_0").mkdir(parents=True)
    write(tmp_path / "made" / "tiny-Q4_K_M.gguf")
    write(tmp_path / "made" / "Q8_0" / "tiny.gguf", split=8)
    made = tmp_path / "made"
    return {path.relative_to(made).as_posix(): path.read_bytes() for path in made.rglob("*.gguf")}


@pytest.fixture
def fake(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    fake = FakeHub(REPO, files)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", fake.endpoint)
    url = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    yield fake
    fake.close()


def test_all_parts_are_fetched_and_found_again_without_the_hub(fake: FakeHub, files: dict[str, bytes]) -> None:
    path = hub.resolve(f"{REPO}:q8_0")
    assert path.name == "tiny-00001-of-00003.gguf"
    assert model_bytes(path) == sum(len(data) for name, data in files.items() if name.startswith("Q8_0/"))
    assert open_checkpoint(path).bytes == model_bytes(path)
    assert not any("Q4_K_M" in asked for asked in fake.asked)
    fake.close()
    asked = len(fake.asked)
    for name in (f"{REPO}:Q8_0", f"{REPO}:Q8_0/tiny-00001-of-00003.gguf", f"{REPO}/Q8_0/tiny-00001-of-00003.gguf"):
        assert hub.resolve(name) == path
    assert len(fake.asked) == asked


def test_no_tag_takes_the_usual_one_and_says_so(
    fake: FakeHub, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = hub.resolve(REPO)
    assert path.read_bytes() == files["tiny-Q4_K_M.gguf"]
    assert f"taking tiny-Q4_K_M.gguf; {REPO}:TAG" in capsys.readouterr().err
    fake.close()
    assert hub.resolve(REPO) == path
    assert "taking tiny-Q4_K_M.gguf, which is in the cache" in capsys.readouterr().err


def test_a_part_that_the_cache_lost_is_fetched_again(fake: FakeHub) -> None:
    path = hub.resolve(f"{REPO}:Q8_0")
    second = path.with_name("tiny-00002-of-00003.gguf")
    second.resolve().unlink()
    assert hub.resolve(f"{REPO}:Q8_0") == path
    assert second.is_file()


def test_a_part_that_the_hub_lacks_is_named(fake: FakeHub, files: dict[str, bytes]) -> None:
    del files["Q8_0/tiny-00002-of-00003.gguf"]
    with pytest.raises(ModelError, match=r"lacks a part of Q8_0/tiny-00001.*: Q8_0/tiny-00002-of-00003\.gguf$"):
        hub.resolve(f"{REPO}:Q8_0")
    with pytest.raises(ModelError, match=r"is part 3 of 3; name the first, Q8_0/tiny-00001-of-00003\.gguf"):
        hub.resolve(f"{REPO}:Q8_0/tiny-00003-of-00003.gguf")


def test_errors_of_tags_reach_the_user(fake: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"it has Q8_0/tiny-00001-of-00003\.gguf, tiny-Q4_K_M\.gguf"):
        hub.resolve(f"{REPO}:Q5_0")
    with pytest.raises(ModelError, match=r"no file other\.gguf; it has Q8_0/tiny"):
        hub.resolve(f"{REPO}:other.gguf")
    with pytest.raises(ModelError, match=f"single files: `dovetail rm {REPO}`"):
        hub.remove(f"{REPO}:Q8_0")
