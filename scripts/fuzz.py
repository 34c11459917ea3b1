"""Mutation fuzzing of model files: whatever is in them is loaded or is a ModelError, soon and in little memory.

    python scripts/fuzz.py                                 a minute, every kind of file
    python scripts/fuzz.py --seconds 3600 --kinds gguf-bpe,index --seed 7
    python scripts/fuzz.py --seed 7 --case index:123       one case again, with its traceback

A case changes one file of a small valid model, opens the model, builds its tokenizer, uses both, and reads the
weights. One of eight that load also answers a prompt. A case fails if it raises anything but an error of this
project (opening: anything but a ModelError), ends its process, takes over a second of CPU time, or allocates more
than twice the size of its files and 16 MiB. Cases run in a child process, so that one that ends its process is
found too. Failures are kept in a folder with what was wrong. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dovetail.checkpoint.export import export  # noqa: E402
from dovetail.checkpoint.gguf_writer import NewTensor, write_gguf  # noqa: E402
from dovetail.checkpoint.random_model import write_random  # noqa: E402
from dovetail.core.errors import DovetailError, ModelError  # noqa: E402
from dovetail.core.model import ModelConfig  # noqa: E402
from dovetail.models import MODELS, open_checkpoint  # noqa: E402

CPU_SECONDS = 1.0  # of one case
ALLOWANCE = 16 << 20  # bytes a case may allocate beyond twice its files
WALL_SECONDS = 20  # after which a case hangs
ADDRESS_SPACE = 1 << 30  # bytes that a child may map beyond what its libraries take
CHILD_SECONDS = 300.0  # after which another child goes on, so that leaks do not add up
ANSWERED = 8  # one of so many cases that load also answers a prompt

CONFIG = ModelConfig(
    architecture="llama", vocab_size=264, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=8, max_position_embeddings=128, bos_token_id=256, eos_token_ids=(257,),
)  # fmt: skip
Load = Callable[[Path, random.Random], None]


# -- valid models -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A folder with a valid model: what is opened, which file is changed, and how."""

    folder: Path
    opened: str
    changed: str
    change: Callable[[random.Random, bytes], bytes]


def kinds(root: Path) -> dict[str, Kind]:
    """Write a valid model for every kind of file into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    bpe = _folder(root, "gguf-bpe")
    write_random(MODELS["llama"], CONFIG, bpe / "model.gguf", format="Q8_0")
    spm = _folder(root, "gguf-spm")
    _write_sentencepiece(spm / "model.gguf")
    split = _folder(root, "gguf-split")
    _write_parts(split)
    one, several = root / "safetensors", root / "index"
    export(open_checkpoint(bpe / "model.gguf"), one, "float32")
    export(open_checkpoint(bpe / "model.gguf"), several, "float32", shard_bytes=64 << 10)
    found = {
        "gguf-bpe": Kind(bpe, "model.gguf", "model.gguf", change_gguf),
        "gguf-spm": Kind(spm, "model.gguf", "model.gguf", change_gguf),
        "gguf-split": Kind(split, "m-00001-of-00002.gguf", "m-00002-of-00002.gguf", change_gguf),
        "safetensors": Kind(one, ".", "model.safetensors", change_safetensors),
        "index": Kind(several, ".", "model.safetensors.index.json", change_json),
    }
    for name in ("config", "generation_config", "tokenizer", "tokenizer_config"):
        folder = Path(shutil.copytree(one, root / name))
        found[name] = Kind(folder, ".", f"{name}.json", change_json)
    return found


def _folder(root: Path, name: str) -> Path:
    (root / name).mkdir()
    return root / name


def _parts(path: Path) -> tuple[dict[str, Any], list[NewTensor], Callable[[NewTensor], list[bytes]]]:
    """Metadata, tensors and bytes of a GGUF file, as its writer takes them."""
    from dovetail.checkpoint.gguf import GGUFFile

    file = GGUFFile(path)
    metadata = {key: _plain(file.metadata[key]) for key in file.metadata}
    tensors = [NewTensor(t.name, t.format, t.shape) for t in file.tensors.values()]
    return metadata, tensors, lambda tensor: [file.tensor(tensor.name).data.tobytes()]


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _write_sentencepiece(path: Path) -> None:
    write_random(MODELS["llama"], CONFIG, path, format="Q4_0")
    metadata, tensors, data = _parts(path)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "ab", "\u2581a"]
    metadata = {key: value for key, value in metadata.items() if not key.startswith("tokenizer.ggml")}
    metadata |= {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    write_gguf(path, metadata, tensors, data)


def _write_parts(folder: Path) -> None:
    whole = folder / "whole.gguf"
    write_random(MODELS["llama"], CONFIG, whole, format="F16")
    metadata, tensors, data = _parts(whole)
    half = len(tensors) // 2
    for number, (keys, mine) in enumerate(((metadata, tensors[:half]), ({}, tensors[half:]))):
        split = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        write_gguf(folder / f"m-0000{number + 1}-of-00002.gguf", {**keys, **split}, mine, data)
    whole.unlink()


# -- changes ----------------------------------------------------------------------------------------------

INTERESTING = (
    0, 1, 2, 4, 31, 127, 128, 255, 256, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32,
    1 << 40, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
TEXTS = (
    "",
    "\0",
    "../x",
    "/etc/passwd",
    "\u202e",
    "\ud800",
    "x" * 5000,
    "<|eos|>",
    "{{ 1 }}",
    "{% for %}",
    "[gMASK]",
)
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 257, 1 << 31, 1 << 63, 10**30, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), [], {}, [[]], [None], {"": 0}, "true", "12", "llama", "yarn", "dynamic", [0, 1], [1.0, -1.0],
    {"type": "yarn", "factor": 1e9}, {"rope_type": "longrope"}, *TEXTS,
)  # fmt: skip


def change_bytes(rng: random.Random, data: bytes, most: int = 0) -> bytes:
    """A few bytes are changed, lost, added or repeated, all before `most`."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(max(1, min(most or len(changed), len(changed))))
        match rng.randrange(7):
            case 0:
                changed[at : at + 1] = bytes([changed[at] ^ 1 << rng.randrange(8)]) if changed else b"\0"
            case 1:
                changed[at : at + 1] = bytes([rng.choice((0, 1, 127, 128, 255))])
            case 2:
                changed[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING))
            case 3:
                changed[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING) & 0xFFFFFFFF)
            case 4:
                del changed[at : at + rng.randrange(1, 17)]
            case 5:
                changed[at:at] = rng.randbytes(rng.randrange(1, 17))
            case _:
                other = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + rng.randrange(1, 200)]
    return bytes(changed)


def numbers_of(data: bytes) -> Iterator[tuple[int, int]]:
    """Offset and size of every count, length, type, dimension and offset of a valid GGUF header."""

    def u64(at: int) -> int:
        return int(struct.unpack_from("<Q", data, at)[0])

    def u32(at: int) -> int:
        return int(struct.unpack_from("<I", data, at)[0])

    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    tensors, keys, at = u64(8), u64(16), 24
    yield from ((4, 4), (8, 8), (16, 8))
    for _ in range(keys):
        yield at, 8
        at += 8 + u64(at)
        kind = u32(at)
        yield at, 4
        at += 4
        count = 1
        if kind == 9:
            kind, count = u32(at), u64(at + 4)
            yield from ((at, 4), (at + 4, 8))
            at += 12
        for _ in range(count if kind == 8 else 0):
            yield at, 8
            at += 8 + u64(at)
        if kind != 8:
            yield at, sizes[kind]
            at += sizes[kind] * count
    for _ in range(tensors):
        yield at, 8
        at += 8 + u64(at)
        dimensions = u32(at)
        yield from ((at, 4), *((at + 4 + 8 * i, 8) for i in range(dimensions)))
        at += 4 + 8 * dimensions
        yield from ((at, 4), (at + 4, 8))
        at += 12
    yield at, 0  # where the header ends


def change_gguf(rng: random.Random, data: bytes) -> bytes:
    """Fields of the header, bytes of the header, or bytes of the whole file."""
    *fields, (end, _) = numbers_of(data)
    if rng.random() < 0.1:
        return change_bytes(rng, data)
    if rng.random() < 0.4:
        return change_bytes(rng, data, end)
    changed = bytearray(data)
    for at, size in rng.choices(fields, k=rng.choice((1, 1, 1, 2, 3))):
        value = int.from_bytes(changed[at : at + size], "little")
        value = rng.choice((*INTERESTING, value + 1, value - 1, value * 2, -value, rng.getrandbits(64)))
        changed[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(changed)


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header's JSON with its length put right, or bytes of the file."""
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.3:
        return change_bytes(rng, data, 8 + length)
    header = change_json(rng, data[8 : 8 + length])
    wrong = rng.choice((0, 0, 0, 0, 1, -1))
    return struct.pack("<Q", max(0, len(header) + wrong)) + header + data[8 + length :]


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Values of a JSON document are replaced, lost, moved, repeated or nested; or bytes are changed."""
    if rng.random() < 0.15:
        return change_bytes(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(rng, value)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    left, right = rng.choice((("[", "]"), ('{"a":', "}")))
    text = re.sub('"nested ([0-9]+)"', lambda found: left * int(found[1]) + "0" + right * int(found[1]), text)
    if rng.random() < 0.1:
        at = text.find(",", rng.randrange(max(1, len(text))))
        text = text[: at + 1] + text[1:-1] + text[at:] if at > 0 else text * 2  # keys twice
    return text.encode("utf-8", "surrogatepass")


def _changed(rng: random.Random, document: Any) -> Any:
    holder: list[Any] = [copy.deepcopy(document)]
    places = list(_places(holder))
    where, key = rng.choice(places[:1] if rng.random() < 0.02 else places)
    value = where[key]
    match rng.randrange(8):
        case 0 | 1 | 2:
            where[key] = copy.deepcopy(rng.choice(NASTY))
        case 3 if where is not holder:
            del where[key]
        case 4:
            other, name = rng.choice(places)
            where[key] = copy.deepcopy(other[name])
        case 5:
            where[key] = f"nested {rng.choice((1, 3, 30, 1000, 10**5))}"
        case 6 if isinstance(value, int | float):
            where[key] = rng.choice((value + 1, value - 1, -value, value * 2, value / 3, str(value)))
        case 6 if isinstance(value, list) and value:
            where[key] = rng.choice((value * 3, value[:-1], [*value, value[0]], rng.sample(value, len(value))))
        case _ if isinstance(where, dict):
            where[rng.choice((*TEXTS, key.upper(), key + "_", *where))] = where.pop(key)
        case _:
            where[key] = rng.choice(NASTY)
    return holder[0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(holder, key) of everything in a document."""
    stack = [value]
    while stack:
        holder = stack.pop()
        for key, item in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            yield holder, key
            if isinstance(item, dict | list):
                stack.append(item)


# -- one case ---------------------------------------------------------------------------------------------


class Failed(Exception):
    """A case that must not happen; the message says which rule it broke."""


def load(path: Path, rng: random.Random) -> None:
    """Open a model, build its tokenizer, use both, read the weights, and sometimes answer a prompt."""
    checkpoint = open_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    tracemalloc.stop()  # what follows allocates by design
    try:
        tokenizer.decode(tokenizer.encode("hello <|eos|> 123 \u2603")[:50])
        if tokenizer.templates:
            tokenizer.apply_chat_template([{"role": "user", "content": "hi <|eos|>"}])
        for name in checkpoint.names():
            checkpoint.tensor(name).values()
        if rng.randrange(ANSWERED) == 0:
            answer(path)
    except DovetailError:
        pass


def answer(path: Path) -> None:
    from dovetail import LLM, SamplingParams

    llm = LLM(path, threads=1, kv_memory=1 << 20, max_num_seqs=2, packed_cache="off")
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3), progress=False)


def check(path: Path, size: int, rng: random.Random, load: Load) -> bool:
    """Load a model whose files have `size` bytes, and return whether it was opened. Failed if a rule is broken."""
    opened = True
    tracemalloc.start()
    begun = time.process_time()
    try:
        load(path, rng)
    except ModelError:
        opened = False
    except MemoryError as error:
        raise Failed(f"more than {ADDRESS_SPACE} bytes of address space") from error
    except BaseException as error:
        raise Failed(f"{type(error).__name__} instead of a ModelError: {error}") from error
    finally:
        peak = tracemalloc.get_traced_memory()[1] if tracemalloc.is_tracing() else 0
        tracemalloc.stop()
    spent = time.process_time() - begun
    if peak > 2 * size + ALLOWANCE:
        raise Failed(f"{peak} bytes allocated for files of {size}")
    if spent > CPU_SECONDS:
        raise Failed(f"{spent:.1f} s of CPU time")
    return opened


def run_case(name: str, kind: Kind, number: int, seed: int, load: Load) -> bool:
    """Change, load, and put the valid file back. Returns whether the model was opened."""
    rng = random.Random(f"{seed} {name} {number}")
    target = kind.folder / kind.changed
    valid = target.read_bytes()
    size = sum(path.stat().st_size for path in kind.folder.iterdir())
    target.write_bytes(kind.change(rng, valid))
    opened = check(kind.folder / kind.opened, max(size, target.stat().st_size), rng, load)
    target.write_bytes(valid)
    return opened


# -- many cases -------------------------------------------------------------------------------------------


def child(options: argparse.Namespace) -> None:
    """Run cases until the time is over, and print a line of JSON for each: its number, or what was wrong."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    load = find_loader(options.load)
    valid = kinds(Path(options.child))
    names = options.kinds or list(valid)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    end = time.monotonic() + options.seconds
    for number in itertools.count(options.first):
        if time.monotonic() > end:
            print(json.dumps({"whole": True}), flush=True)
            break
        name = names[number % len(names)]
        print(json.dumps({"case": name, "number": number}), flush=True)
        signal.alarm(WALL_SECONDS)
        try:
            if run_case(name, valid[name], number, options.seed, load):
                print(json.dumps({"opened": name}), flush=True)
        except Failed as error:
            print(json.dumps({"wrong": str(error), "trace": traceback.format_exc()[-3000:]}), flush=True)
            break  # what is left in the folder is the evidence; another child goes on
        finally:
            signal.alarm(0)


def find_loader(name: str) -> Load:
    """`module:function` as a loader."""
    module, _, function = name.partition(":")
    found: Load = getattr(importlib.import_module(module), function) if function else load
    return found


@dataclass(frozen=True)
class Finding:
    case: str
    number: int
    wrong: str
    trace: str
    kept: str


@dataclass
class Report:
    """How many cases ran, how many of them were opened, and those that broke a rule."""

    ran: int = 0
    opened: int = 0
    findings: list[Finding] = field(default_factory=list)


def fuzz(options: argparse.Namespace) -> Report:
    """Children run cases one after the other; the next one begins behind the case that ended the last."""
    end = time.monotonic() + options.seconds
    first, report = options.first, Report()
    while not report.ran or (time.monotonic() < end and len(report.findings) < options.most):
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            seconds = min(CHILD_SECONDS, max(0.1, end - time.monotonic()))
            first = run_child(options, Path(folder) / "models", (first, seconds), report)
    return report


def run_child(options: argparse.Namespace, folder: Path, part: tuple[int, float], report: Report) -> int:
    """Run cases from a number on, for so many seconds or until one fails. Returns the number of the next case."""
    command = [
        sys.executable,
        __file__,
        "--child",
        str(folder),
        "--first",
        str(part[0]),
        "--seconds",
        str(part[1]),
    ]
    command += ["--seed", str(options.seed), "--load", options.load]
    command += ["--kinds", ",".join(options.kinds)] if options.kinds else []
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    cases = [line for line in lines if "case" in line]
    if not cases:
        raise SystemExit(f"no case ran (exit {done.returncode}): {done.stderr[-2000:]}")
    report.ran += len(cases)
    report.opened += sum("opened" in line for line in lines)
    name, number = cases[-1]["case"], cases[-1]["number"]
    if "whole" not in lines[-1]:
        wrong, trace = how_it_ended(done.returncode), done.stderr[-3000:]
        if "wrong" in lines[-1]:
            wrong, trace = lines[-1]["wrong"], lines[-1]["trace"]
        kept = keep(folder / name, options.out, f"{name}-{number}")
        report.findings.append(Finding(name, number, wrong, trace, kept))
    return number + 1


def how_it_ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else "ended in the middle of a case"


def keep(folder: Path, out: str, name: str) -> str:
    target = Path(out) / name
    if not out or not folder.exists():
        return ""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return str(target)


def replay(options: argparse.Namespace) -> None:
    name, _, number = options.case.partition(":")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        run_case(name, kinds(Path(folder) / "models")[name], int(number), options.seed, find_loader(options.load))
    print("passes")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="default: all")
    parser.add_argument("--out", default="fuzz-findings", help="folder for failures; nothing is made without any")
    parser.add_argument("--most", type=int, default=20, help="end after so many failures")
    parser.add_argument("--case", metavar="KIND:NUMBER", help="run this case in this process")
    parser.add_argument("--load", default="", help="MODULE:FUNCTION that loads a path, to try out this program")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        child(options)
        return 0
    if options.case:
        replay(options)
        return 0
    report = fuzz(options)
    for finding in report.findings:
        print(f"\n{finding.case}:{finding.number}: {finding.wrong}\n{finding.trace}\n{finding.kept}")
    print(f"{report.ran} cases, {report.opened} opened, {len(report.findings)} failures (seed {options.seed})")
    return 1 if report.findings else 0


if __name__ == "__main__":
    os.environ.setdefault("DOVETAIL_PACKED_CACHE", "off")
    sys.exit(main())
