"""Models that are cut into several GGUF files, written by the gguf package."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from ggufs import tensors, write

from dovetail.checkpoint.gguf import GGUFFile
from dovetail.checkpoint.gguf_split import open_gguf
from dovetail.checkpoint.identity import identity
from dovetail.core.errors import ModelError
from dovetail.host.files import FilePart, file_part, model_bytes
from dovetail.models import open_checkpoint


def parts_of(first: Path) -> list[Path]:
    return sorted(first.parent.glob("*.gguf"))


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """The first of the parts of a tiny model, alone in a folder."""
    (tmp_path / "split").mkdir()
    return write(tmp_path / "split" / "m.gguf", split=8)


@pytest.mark.parametrize(("most", "tensors_in_first", "count"), [(1, True, 20), (8, True, 3), (8, False, 4)])
def test_parts_are_read_as_one_model(most: int, tensors_in_first: bool, count: int, tmp_path: Path) -> None:
    whole = open_checkpoint(write(tmp_path / "whole.gguf"))
    folder = tmp_path / "split"
    folder.mkdir()
    first = write(folder / "m.gguf", split=most, tensors_in_first=tensors_in_first)
    assert first.name == f"m-00001-of-{count:05d}.gguf"
    for path in (first, folder):
        joined = open_checkpoint(path)
        assert joined.path == first
        assert joined.config == whole.config
        assert joined.names() == whole.names()
        for name in whole.names():
            a, b = np.asarray(joined.tensor(name).data), np.asarray(whole.tensor(name).data)
            assert a.tobytes() == b.tobytes()
        assert joined.tokenizer().encode("hello 12") == whole.tokenizer().encode("hello 12")
        assert identity(joined) == identity(whole)
        assert joined.bytes == model_bytes(first) == sum(part.stat().st_size for part in parts_of(first))


def test_a_missing_part_is_named(split: Path) -> None:
    parts_of(split)[1].unlink()
    with pytest.raises(ModelError, match=r"its part m-00002-of-00003\.gguf is missing"):
        open_checkpoint(split)


def test_a_later_part_names_the_first(split: Path) -> None:
    with pytest.raises(ModelError, match=r"is part 3 of 3; give the first, m-00001-of-00003\.gguf"):
        open_checkpoint(parts_of(split)[2])


def test_parts_in_the_wrong_order(split: Path) -> None:
    _, second, third = parts_of(split)
    shutil.copy(third, second)
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: split\.no is 2 .* mixed up"):
        open_checkpoint(split)


def test_a_part_of_a_model_cut_otherwise(split: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "m.gguf", split=12)
    shutil.copy(other.with_name("m-00002-of-00002.gguf"), parts_of(split)[1])
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf: split\.no is 1 and split\.count 2"):
        open_checkpoint(split)


def test_a_part_with_tensors_of_another(split: Path, tmp_path: Path) -> None:
    weights = tensors()
    order = {name: weights[name] for name in [*list(weights)[8:], *list(weights)[:8]]}
    other = write(tmp_path / "m.gguf", weights=order, split=8)
    shutil.copy(other.with_name("m-00003-of-00003.gguf"), parts_of(split)[2])
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: tensor '.*' is also in m-0000[12]-of-00003"):
        open_checkpoint(split)


def test_fewer_tensors_than_announced(split: Path, tmp_path: Path) -> None:
    weights = dict(list(tensors().items())[:-1])
    other = write(tmp_path / "m.gguf", weights=weights, split=8)
    shutil.copy(other.with_name("m-00003-of-00003.gguf"), parts_of(split)[2])
    with pytest.raises(ModelError, match=r"split\.tensors\.count is 20, but the 3 parts hold 19"):
        open_checkpoint(split)


def test_a_part_of_another_architecture(split: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "m.gguf", {"split.no": 1, "split.count": 3}, {}, architecture="qwen2")
    shutil.copy(other, parts_of(split)[1])
    with pytest.raises(ModelError, match="is of a 'qwen2' model, the first part of a 'llama'"):
        open_checkpoint(split)


def test_a_renamed_part(split: Path) -> None:
    split.rename(split.with_name("model.gguf"))
    with pytest.raises(ModelError, match=r"is part 1 of 3 .*ends in -00001-of-00003\.gguf"):
        open_checkpoint(split.with_name("model.gguf"))


def test_a_count_is_needed(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", {"split.no": 0, "split.count": 2})
    write(tmp_path / "m-00002-of-00002.gguf", {"split.no": 1, "split.count": 2}, {})
    with pytest.raises(ModelError, match=r"split\.tensors\.count is missing"):
        open_checkpoint(first)


def test_a_shrunken_part_is_noticed(split: Path) -> None:
    checkpoint = open_checkpoint(split)
    last = parts_of(split)[2]
    with open(last, "r+b") as file:
        file.truncate(last.stat().st_size // 2)
    with pytest.raises(ModelError, match=r"m-00003-of-00003\.gguf: shrank"):
        checkpoint.tensor("model.norm.weight")


def test_one_part_alone_is_a_file(tmp_path: Path) -> None:
    """`split.count` 1 means a whole file, whatever its name says."""
    path = write(tmp_path / "m.gguf", {"split.count": 1, "split.no": 0})
    assert type(open_gguf(path)) is GGUFFile
    assert open_gguf(write(tmp_path / "n-00001-of-00004.gguf")).tensors


def test_two_models_in_a_folder(split: Path) -> None:
    write(split.with_name("other.gguf"))
    with pytest.raises(ModelError, match="holds 4 GGUF files"):
        open_checkpoint(split.parent)


def test_names_of_parts() -> None:
    part = file_part("a/b-00002-of-00003.gguf")
    assert part == FilePart("a/b", 2, 3, ".gguf")
    assert part.names() == [f"a/b-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for name in ("b.gguf", "b-00004-of-00003.gguf", "b-00000-of-00003.gguf", "b-1-of-3.gguf"):
        assert file_part(name) is None
