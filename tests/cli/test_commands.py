import json
import os
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from dovetail import cli, hub
from dovetail.cli import serve
from dovetail.core.errors import ModelError
from dovetail.host.units import format_size
from dovetail.hub import aliases
from dovetail.llm import LLM

HEAVY = {"torch", "numpy", "rich", "huggingface_hub", "fastapi", "transformers", "tokenizers"}
PROGRAM = "import sys; from dovetail.cli import main; sys.argv[0] = 'dovetail'; main()"


def invoke(*arguments):
    return CliRunner().invoke(cli.build(), arguments)


def run(*arguments, **settings):
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **settings)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DOVETAIL_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    return tmp_path / "home"


def test_help_is_light():
    program = f"import sys; from dovetail import cli; cli.build(); print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = "import sys; from dovetail.cli import main\n"
    code += "try:\n main()\nfinally:\n print(sorted(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert not [
        m for m in ("torch", "numpy", "fastapi", "tokenizers", "huggingface_hub") if f"'{m}'" in done.stderr
    ]


def every_command():
    """The words of each command and of each group."""
    for name in cli.COMMANDS:
        yield (name,)
        found = cli.command(name)
        if isinstance(found, typer.Typer):
            yield from ((name, own.name) for own in found.registered_commands)


@pytest.mark.parametrize("words", list(every_command()), ids=" ".join)
def test_every_command_shows_an_example(words):
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output
    assert f"dovetail {' '.join(words)}" in result.output


def test_version():
    assert invoke("--version").output == "dovetail 0.1.0\n"


def test_a_mistyped_command_names_the_nearest():
    done = run("docter")
    assert done.returncode == 2
    assert "doctor" in done.stderr
    assert done.stdout == ""


def test_missing_argument_is_wrong_usage():
    assert run("pull").returncode == 2


def test_errors_are_one_line_on_stderr():
    done = run("pull", "no-such-model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dovetail: unknown model 'no-such-model'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ModelError("bad bytes at 7"), 2, "dovetail: bad bytes at 7"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(home, monkeypatch, capsys, error, status, says):
    def fail(*unused, **also_unused):
        raise error

    monkeypatch.setattr(hub, "resolve", fail)
    monkeypatch.setattr(sys, "argv", ["dovetail", "pull", "x"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == status
    assert says in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error(home):
    command = [sys.executable, "-c", PROGRAM, "list", "--json", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert "Error" not in process.stderr.read()
    assert process.returncode == 0


@pytest.mark.parametrize("arguments", [("list", "--json", "-"), ("list", "--help"), ("--help",), ("--version",)])
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_stdout_that_cannot_be_written(home, arguments, redirection, unbuffered):
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-c", PROGRAM, *arguments]
    settings = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=settings)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dovetail: stdout ")
    assert "Traceback" not in done.stderr


def test_help_does_not_cut_summaries():
    assert "..." not in invoke("--help").stdout.partition("Commands:")[2]


def test_help_lists_techniques_and_types():
    text = " ".join(invoke("run", "--help").stdout.split())
    assert "Switch on draft, infinigen, ngram, quest, self-draft, shadowkv, sink-window" in text
    assert "auto, float32, bf16, float16, fp8, int8 or int4." in text


def test_pull_list_rm(home, monkeypatch, tmp_path):
    model = tmp_path / "some.gguf"
    model.write_bytes(b"GGUF")
    result = invoke("pull", str(model), "--json", "-")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == str(model)
    assert json.loads(lines[-1])["bytes"] == 4

    alias = aliases.ALIASES["smollm2-135m"]
    path = aliases.location(alias, hub.models_home())
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(alias.size)
    listed = invoke("list", "--all", "--json", str(tmp_path / "list.json"))
    assert "smollm2-135m  93.8MiB" in listed.stdout
    assert "not pulled" in listed.stdout
    assert json.loads((tmp_path / "list.json").read_text())["models"][0]["name"] == "smollm2-135m"

    assert "93.8MiB freed" in invoke("rm", "smollm2-135m").stdout
    assert not path.exists()
    assert invoke("list").stdout == ""
    assert invoke("rm", "smollm2-135m").exit_code == 2


def test_json_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("list", "--json", str(tmp_path / "file" / "x.json"))
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


@pytest.mark.parametrize(("name", "says"), [("no/x.json", "there is no folder"), ("", "it is a folder")])
def test_json_is_checked_before_any_work(home, tmp_path, name, says):
    result = invoke("run", "no-such-model", "Hi", "--json", f"{tmp_path}/{name}")
    assert result.exit_code == 2
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_to_a_pipe_does_not_replace_it(home, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert invoke("list", "--json", str(pipe)).exit_code == 0
        assert "models" in json.loads(os.read(reader, 1 << 16))
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_serve_shows_sizes_and_no_techniques_for_reading(tiny_model):
    llm = LLM(tiny_model, kv_memory=4 << 20, threads=1)
    shown = serve.settings_text(llm.config).splitlines()
    assert "use: none" in shown
    assert f"kv_memory: {format_size(llm.config.kv_memory)}" in shown


def test_export_reads_its_options_first():
    result = invoke("export", "somewhere", "out", "--dtype", "int3")
    assert result.exit_code == 2
    assert "bf16" in result.stderr


def test_doctor(home, monkeypatch, tmp_path):
    monkeypatch.setattr("dovetail.host.machine.read_bandwidth", lambda threads, size: 12.3e9)
    result = invoke("doctor", "--json", str(tmp_path / "machine.json"))
    assert result.exit_code == 0, result.output
    assert "12.3 GB/s" in result.stdout
    report = json.loads((tmp_path / "machine.json").read_text())
    assert report["cpu"]["threads"] >= 1
    assert report["memory"]["read_bandwidth"] == 12300000000
    assert report["packages"]["torch"]
    assert report["caches"]["home"] == str(home)
    assert report["kernels"]["native"]
    assert report["kernels"]["isas"][-1] == "scalar"


def test_doctor_without_the_native_library(home, monkeypatch):
    monkeypatch.setattr("dovetail.host.machine.read_bandwidth", lambda threads, size: 12.3e9)
    monkeypatch.setitem(sys.modules, "dovetail._native", None)
    monkeypatch.delattr("dovetail._native", raising=False)
    result = invoke("doctor")
    assert result.exit_code == 0, result.output
    assert "torch's operations instead" in result.stdout


def test_the_listed_commands_exist():
    for name in cli.COMMANDS:
        assert callable(cli.command(name))


def test_random_writes_a_model_that_runs(home, tmp_path):
    path = tmp_path / "m.gguf"
    result = invoke(
        "random", "qwen2", str(path), "--layers", "1", "--vocab", "300", "--format", "Q8_0", "--json", "-"
    )
    assert result.exit_code == 0
    first, last = result.stdout.splitlines()
    assert first == str(path)
    found = json.loads(last)
    assert found["bytes"] == path.stat().st_size
    assert (found["layers"], found["architecture"], found["format"], found["seed"]) == (1, "qwen2", "Q8_0", 0)
    assert found["formats"] == {"Q8_0": 9, "F32": 6}
    answer = LLM(str(path), threads=1).generate("hello")
    assert answer[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("llama", "m.bin"), "m.bin: the file's name must end in .gguf"),
        (("llama", "there.gguf"), "there.gguf exists; delete it, or choose another name"),
        (("llama", "folder.gguf"), "folder.gguf exists"),
        (("gpt2", "m.gguf"), "unknown architecture 'gpt2'; known are llama, mistral"),
        (("llama", "m.gguf", "--like", "qwen3-8b"), "qwen3-8b is a qwen3 model, not a llama one"),
        (("llama", "m.gguf", "--like", "llama-5"), "unknown shape 'llama-5'; known are smollm2-135m"),
        (("llama", "m.gguf", "--format", "Q9"), "unknown format 'Q9'; random weights come in F32"),
        (("llama", "m.gguf", "--vocab", "100"), "a vocabulary of 100 is too small"),
        (("llama", "m.gguf", "--hidden", "40"), "a row of 40 is not a multiple of Q4_0's 32 values"),
        (("llama", "there.gguf/m.gguf"), "cannot write m.gguf to there.gguf: "),
        (("llama", "m.gguf", "--layers", "0"), "Invalid value for '--layers'"),
    ],
)
def test_random_refuses(tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.gguf").write_text("mine")
    (tmp_path / "folder.gguf").mkdir()
    monkeypatch.setattr(sys, "argv", ["dovetail", "random", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.gguf", "there.gguf"]
    assert (tmp_path / "there.gguf").read_text() == "mine"


def test_random_lists_what_there_is():
    from dovetail.checkpoint.random_model import FORMATS
    from dovetail.models import MODELS
    from dovetail.models.shapes import SHAPES

    words = set(re.findall(r"[\w.-]*\w", invoke("random", "--help").stdout))
    assert {*FORMATS, *MODELS, *SHAPES} <= words
