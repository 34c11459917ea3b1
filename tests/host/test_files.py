import contextlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dovetail.core.errors import ModelError
from dovetail.host.files import replacing
from dovetail.host.json_file import read_bytes


def test_a_failed_write_leaves_the_old_file(tmp_path):
    target = tmp_path / "result.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    with replacing(target) as file:
        file.write(b"new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o400


@pytest.mark.parametrize("size", [0, 1, 5000, (2 << 20) - 1])
def test_files_and_pipes_are_read_within_a_limit(tmp_path: Path, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "file").write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "pipe"):
        for limit in (size, size + 7, max(0, size - 1)):
            with ThreadPoolExecutor(1) as pool:
                if name == "pipe":
                    pool.submit(_write, tmp_path / name, data)
                if limit < size:
                    with pytest.raises(ModelError, match=f"longer than {limit}"):
                        read_bytes(tmp_path / name, limit)
                else:
                    assert read_bytes(tmp_path / name, limit) == data


def _write(path: Path, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader has seen enough
        path.write_bytes(data)
