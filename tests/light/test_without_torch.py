"""Every command and technique on a CPU, in an environment in which torch is not installed."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path

import pytest

from tests.light.conftest import Light, dependencies, package_files

SMALL = ("--kv-memory", "16MiB", "--threads", "1")
GREEDY = ("--temperature", "0", "--max-tokens", "6", "--ignore-eos")
TEXT = "The quick brown fox jumps over the lazy dog, and the dog looks at the fox. " * 12

TECHNIQUES = {
    "ngram": "ngram:tokens=2,min_n=1",
    "quest": "quest:budget=64,skip_layers=1",
    "sink-window": "sink-window:window=64,sink=16",
    "suffix": "suffix:min_odds=0",
}
WITH_A_SLOW_TIER = {
    "infinigen": "infinigen:budget=64,skip_layers=1",  # calibrates itself first
    "shadowkv": "shadowkv:budget=128,rank=8,outliers=1",  # factorises the prompt's keys
}


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompt.txt"
    file.write_text(TEXT)
    return file


def test_the_package_requires_no_torch_and_less_than_200_megabytes() -> None:
    """What pip installs for users, without pip and setuptools; compiled Python files are a fifth on top."""
    sizes = {
        name: sum(source.stat().st_size for source, _ in package_files(distribution) if source.exists())
        for name, distribution in dependencies().items()
    }
    assert "torch" not in sizes
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
    assert sum(sizes.values()) * 1.2 < 200e6, largest


def test_run_answers_and_imports_no_torch(light: Light, tiny_model: Path) -> None:
    found = json.loads(light.dovetail("run", tiny_model, "Hello", *SMALL, *GREEDY, "--json", "-"))
    assert found["completion_tokens"] == 6


def test_log_probabilities(light: Light, tiny_model: Path) -> None:
    found = json.loads(light.dovetail("run", tiny_model, "Hi", *SMALL, *GREEDY, "--logprobs", 3, "--json", "-"))
    assert len(found["logprobs"]) == 6
    assert all(3 <= len(entry) <= 4 for entry in found["logprobs"])


@pytest.mark.parametrize(
    "sampling",
    [
        "--temperature 0.8 --seed 3",
        "--temperature 1 --top-k 5 --seed 1",
        "--temperature 1 --top-p 0.9 --seed 1",
        "--temperature 1 --min-p 0.1 --seed 1",
        "--temperature 0.9 --top-k 20 --top-p 0.8 --repetition-penalty 1.2 --presence-penalty 0.5",
    ],
)
def test_samplers(light: Light, tiny_model: Path, sampling: str) -> None:
    found = json.loads(
        light.dovetail(
            "run", tiny_model, "Hi", *SMALL, *sampling.split(), "--max-tokens", 6, "--ignore-eos", "--json", "-"
        )
    )
    assert found["completion_tokens"] == 6


def acts(light: Light, model: Path, prompt: Path, *arguments: object) -> None:
    done = light.run(
        "-m", "dovetail", "run", model, "-", "--raw", *SMALL, *GREEDY, "--max-tokens", 24, *arguments,
        stdin=prompt.read_text(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "never acted" not in done.stderr


@pytest.mark.parametrize("use", TECHNIQUES.values(), ids=TECHNIQUES)
def test_techniques_act(light: Light, tiny_model: Path, prompt: Path, use: str) -> None:
    acts(light, tiny_model, prompt, "--use", use)


@pytest.mark.parametrize("backend", ["disk", "host"])
@pytest.mark.parametrize("use", WITH_A_SLOW_TIER.values(), ids=WITH_A_SLOW_TIER)
def test_techniques_with_a_slow_tier(light: Light, tiny_model: Path, prompt: Path, use: str, backend: str) -> None:
    slow = ("--kv-offloading-size", "4MiB", "--kv-offloading-backend", backend)
    acts(light, tiny_model, prompt, "--use", use, *slow)


def test_chat(light: Light, tiny_model: Path) -> None:
    assert light.dovetail("chat", tiny_model, *SMALL, *GREEDY, stdin="Hello\nAnd again\n").count("\n") >= 2


def test_serve(light: Light, tiny_model: Path) -> None:
    server = light.start("serve", tiny_model, *SMALL, "--port", "0")
    try:
        assert server.stderr is not None
        address = next(m[0] for line in server.stderr if (m := re.search(r"http://[\d.:]+", line)))
        body = {"model": str(tiny_model), "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
        asked = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode in (0, -15)


def test_batch(light: Light, tiny_model: Path, tmp_path: Path) -> None:
    body = {"model": "m", "prompt": "Hi", "max_tokens": 4, "ignore_eos": True}
    rows = [{"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    light.dovetail("batch", tiny_model, tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *SMALL)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [a["custom_id"] for a in answers] == ["0", "1", "2"]
    assert all(a["response"]["status_code"] == 200 for a in answers)


def test_doctor_and_list(light: Light) -> None:
    assert "not installed" in light.dovetail("doctor")
    light.dovetail("list")


def test_export(light: Light, tiny_model: Path, tmp_path: Path) -> None:
    light.dovetail("export", tiny_model, tmp_path / "out", "--dtype", "bf16")
    light.dovetail("run", tmp_path / "out", "Hello", *SMALL, *GREEDY)


def test_bench_model(light: Light, tiny_model: Path, tmp_path: Path) -> None:
    light.dovetail(
        "bench", "model", tiny_model, "--quick", "--rounds", 1, *SMALL, "--json", tmp_path / "bench.json"
    )
    assert json.loads((tmp_path / "bench.json").read_text())


SUITES = {
    "perplexity": ("--window", 256, "--windows", 1),
    "divergence": ("--window", 256, "--windows", 1, "--against", "kv-cache-dtype=int8"),
    "similarity": ("--tokens", 8, "--limit", 2, "--against", "kv-cache-dtype=int8"),
    "needle": ("--lengths", 512, "--depths", 50, "--trials", 1),
    "jsonl": ("--data", "TASK", "--tokens", 4),
    "multiple-choice": ("--data", "CHOICES"),
}


@pytest.mark.parametrize("suite", SUITES)
def test_eval(light: Light, tiny_model: Path, prompt: Path, tmp_path: Path, suite: str) -> None:
    (tmp_path / "TASK").write_text('{"question": "One and one?", "answer": "2"}\n')
    (tmp_path / "CHOICES").write_text('{"question": "One and one?", "choices": ["1", "2"], "answer": 1}\n')
    (tmp_path / "prompts").write_text("Once upon a time\nThe sea is\n")
    words = [str(tmp_path / word) if word in ("TASK", "CHOICES") else word for word in SUITES[suite]]
    if suite in ("perplexity", "divergence"):
        words += ["--corpus", prompt]
    if suite == "similarity":
        words += ["--prompts", tmp_path / "prompts"]
    light.dovetail("eval", tiny_model, "--suite", suite, *words, *SMALL, "--json", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())


def test_what_needs_torch_says_so_in_one_sentence(light: Light, tiny_model: Path) -> None:
    pool = (
        "--use",
        "infinigen:budget=64,skip_layers=1,pool=256",
        "--kv-offloading-size",
        "4MiB",
    )  # acts in Python
    odd = ("--block-size", "8", "--use", "quest:budget=64,skip_layers=0")  # pages that fill no tile
    for arguments in (("--kernels", "torch"), ("--device", "cuda"), ("--dtype", "float16"), pool, odd):
        done = light.run("-m", "dovetail", "run", tiny_model, "Hi", *SMALL, *arguments)
        assert done.returncode == 2, done.stderr
        assert "pip install" in done.stderr
        assert "dovetail-llm[torch]" in done.stderr
        assert "Traceback" not in done.stderr


def test_quantizing_needs_torch(light: Light, tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = light.run("-m", "dovetail", "quantize", tiny_model, out, "--format", "w8a8-fp8")
    assert done.returncode == 2, done.stderr
    assert "dovetail-llm[torch]" in done.stderr and "Traceback" not in done.stderr and not out.exists()


@pytest.mark.timeout(300)
def test_the_default_model_answers(light: Light) -> None:
    """Real weights: fetched by `pull` in the light environment, or found in the repository's cache."""
    home = Path(__file__).parents[2] / ".cache"
    real = Light(light.python, home)
    home.mkdir(exist_ok=True)
    assert real.dovetail("pull", "smollm2-135m", seconds=280).strip()
    question = "Name the capital of France."
    assert "Paris" in real.dovetail("run", "smollm2-135m", question, "--temperature", 0, "--max-tokens", 12)
    real.dovetail(
        "eval", "smollm2-135m", "--suite", "perplexity", "--window", 256, "--windows", 1, "--corpus", "pydoc"
    )
