"""Load and abuse a server for any length of time, then see that it answers as before and holds nothing.

    .venv/bin/python bench/soak.py [MODEL] [--seconds 3600] [--clients 256] [--seed 0] [--json FILE]

Without MODEL, a random tiny one. Clients send requests one after the other: completions and chats, whole and
streamed, several choices, log-probabilities, stops, tools, answers held to JSON schemas or expressions. 20 % leave
in the middle, 5 % send what is malformed and 2 % read slowly. One in ten is a canary, whose text is known.

Rules, any of which fails the run: a valid request is answered and ends exactly once; canaries keep their text;
what is malformed is refused with a 4xx; calls and structured answers are valid; the server logs no traceback. At
the end no page of KV is held, and descriptors and threads are as many as after the warm-up. Memory grows by less
than 1 MiB for 10,000 requests once the pool is full; it is judged after 100,000. Exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from dovetail.bench.serving.client import session
from dovetail.bench.serving.server_process import ServerProcess, serving
from dovetail.checkpoint.random_model import write_random
from dovetail.core.model import ModelConfig
from dovetail.host.files import replacing
from dovetail.models import MODELS
from dovetail.provenance import provenance
from dovetail.show.table import table

ABORTING, MALFORMED, SLOW, CANARIES = 0.20, 0.05, 0.02, 0.10
SCHEMAS = 60  # the cache of grammars is full soon
SLOPE = 1.0  # MiB for 10,000 requests
JUDGED_AFTER = 100_000  # requests: the allocator takes a few MiB at once, which is no slope
WARM_SECONDS = 4.0
SETTLE_SECONDS = 30.0  # for the server to let go of everything
REQUEST_SECONDS = 300.0
OPTIONS = ["--threads", "1", "--kv-memory", "24MiB", "--max-num-seqs", "32", "--max-queue", "1024"]
TINY = ModelConfig(
    architecture="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, max_position_embeddings=8192,
)  # fmt: skip


# -- what clients ask -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ask:
    """A request: its kind in the report, path and body, and what checks the choices of its answer."""

    kind: str
    path: str
    body: dict[str, Any] | bytes
    valid: Callable[[list[dict[str, Any]]], str] = lambda choices: ""

    @property
    def streamed(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def choices(self) -> int:
        return int(self.body.get("n", 1)) if isinstance(self.body, dict) else 0


WORDS = (
    "the",
    "a",
    "cat",
    "dog",
    "house",
    "runs",
    "sees",
    "under",
    "river",
    "stone",
    "and",
    "then",
    "never",
    "of",
)
SYSTEM = "You are a careful assistant who answers in one sentence and never guesses. " * 4


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def ordinary(rng: random.Random) -> Ask:
    """A completion or a chat with options of all kinds. One in twelve has a long prompt."""
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "temperature": rng.choice((0, 0.7, 1.0))}
    options: dict[str, Any] = {
        "n": rng.randint(2, 3), "seed": rng.randrange(1000), "stop": [rng.choice(WORDS), "\n"], "top_p": 0.9,
        "top_k": 20, "presence_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"65": 5, "70": -100},
        "ignore_eos": True, "stream": True, "cache_salt": rng.choice("ab"), "min_tokens": 1,
    }  # fmt: skip
    for name in rng.sample(sorted(options), rng.randint(0, 4)):
        body[name] = options[name]
    if body.get("stream") and rng.random() < 0.5:
        body["stream_options"] = {"include_usage": True}
    text = words(rng, 1200 if rng.random() < 1 / 12 else 40)
    if rng.random() < 0.5:
        body |= {"prompt": (SYSTEM if rng.random() < 0.3 else "") + text}
        body |= {"logprobs": 3} if rng.random() < 0.2 else {}
        body |= {"echo": True} if rng.random() < 0.1 else {}
        return Ask("completion", "/v1/completions", body)
    body["messages"] = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    body |= {"logprobs": True, "top_logprobs": 2} if rng.random() < 0.2 else {}
    return Ask("chat", "/v1/chat/completions", body)


def structured(rng: random.Random) -> Ask:
    """An answer held to one of SCHEMAS schemas, or to an expression."""
    body: dict[str, Any] = {"temperature": 1.0, "max_tokens": 160, "stream": rng.random() < 0.5}
    if rng.random() < 0.3:
        body |= {"prompt": words(rng, 10), "structured_outputs": {"regex": "[0-9]{1,3}(,[0-9]{1,3}){0,2}"}}
        return Ask("structured", "/v1/completions", body, lambda choices: _each(choices, _is_numbers))
    name = f"field_{rng.randrange(SCHEMAS)}"
    fields = {name: {"enum": ["red", "green", "blue"]}, "ok": {"type": "boolean"}}
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    body |= {"messages": [{"role": "user", "content": words(rng, 10)}], "response_format": form}
    return Ask("structured", "/v1/chat/completions", body, lambda choices: _each(choices, _has(set(fields))))


def _each(choices: list[dict[str, Any]], check: Callable[[str], bool]) -> str:
    """What is wrong with choices that were not cut off."""
    wrong = [c["text"] for c in choices if c["finish_reason"] == "stop" and not check(c["text"])]
    return f"is not of its form: {wrong[0][:200]!r}" if wrong else ""


def _is_numbers(text: str) -> bool:
    return re.fullmatch("[0-9]{1,3}(,[0-9]{1,3}){0,2}", text) is not None


def _has(names: set[str]) -> Callable[[str], bool]:
    def check(text: str) -> bool:
        with contextlib.suppress(ValueError):
            value = json.loads(text)
            return isinstance(value, dict) and set(value) == names
        return False

    return check


def tools(rng: random.Random) -> Ask:
    """A call that is required, or tools that may be used."""
    parameters = {
        "type": "object", "properties": {"unit": {"enum": ["c", "f"]}, "days": {"type": "integer"}},
        "required": ["unit"],
    }  # fmt: skip
    offered = [
        {"type": "function", "function": {"name": name, "description": "Look it up.", "parameters": parameters}}
        for name in ("weather", "forecast")
    ]
    choice = rng.choice(("auto", "required", "none", {"type": "function", "function": {"name": "weather"}}))
    body = {
        "messages": [{"role": "user", "content": words(rng, 10)}], "tools": offered, "tool_choice": choice,
        "max_tokens": 120, "temperature": 1.0, "stream": rng.random() < 0.5,
    }  # fmt: skip
    return Ask("tools", "/v1/chat/completions", body, _valid_calls)


def _valid_calls(choices: list[dict[str, Any]]) -> str:
    for choice in choices:
        for call in choice["calls"] if choice["finish_reason"] == "tool_calls" else ():
            try:
                good = call["name"] in ("weather", "forecast") and isinstance(json.loads(call["arguments"]), dict)
            except ValueError:
                good = False
            if not good:
                return f"calls {call['name']!r} with {call['arguments'][:200]!r}"
    return ""


HI = [{"role": "user", "content": "hi"}]
BYTES = (b"", b"{", b"[1]", b'{"prompt": "\xff"}', b"[" * 50_000)
WRONG_COMPLETIONS: tuple[dict[str, Any], ...] = (
    {"temperature": -1}, {"temperature": "hot"}, {"max_tokens": 2**63}, {"n": 10**9}, {"top_p": 0},
    {"stop": [5]}, {"logit_bias": {"-1": 1}}, {"logprobs": 999}, {"prompt_logprobs": -1}, {"prompt": []},
    {"prompt": "x" * 300_000}, {"structured_outputs": {"regex": "(("}}, {"stream_options": {}},
    {"structured_outputs": {"json": {"type": "nothing"}}}, {"cache_salt": ""}, {"seed": 2**70},
)  # fmt: skip
WRONG_CHATS: tuple[dict[str, Any], ...] = (
    {"messages": []}, {"messages": [{"role": 5}]}, {"tools": [{}]}, {"tool_choice": "required"},
    {"response_format": {"type": "json_schema"}}, {"chat_template_kwargs": {"messages": 1}},
)  # fmt: skip
BROKEN: list[tuple[str, dict[str, Any] | bytes]] = [
    *(("/v1/completions", body) for body in BYTES),
    *(("/v1/completions", {"prompt": "x", **wrong}) for wrong in WRONG_COMPLETIONS),
    *(("/v1/chat/completions", {"messages": HI, **wrong}) for wrong in WRONG_CHATS),
]
CANARY = [
    Ask("canary", "/v1/completions", {"prompt": "The first canary sings", "max_tokens": 16, "temperature": 0}),
    Ask("canary", "/v1/completions", {"prompt": SYSTEM, "max_tokens": 12, "temperature": 0, "stream": True}),
    Ask("canary", "/v1/chat/completions", {"messages": HI, "max_tokens": 12, "seed": 5, "temperature": 1.0}),
]  # fmt: skip


# -- one request ------------------------------------------------------------------------------------------


class Broken(Exception):
    """A rule that a reply broke."""


@dataclass
class Tally:
    """What happened, by kind; what was wrong, with an example of each; and the requests so far."""

    counts: Counter[str] = field(default_factory=Counter)
    refused: int = 0  # with 503 and retried
    wrong: dict[str, list[str]] = field(default_factory=dict)
    requests: int = 0
    begun: float = field(default_factory=time.monotonic)

    def blame(self, kind: str, what: str) -> None:
        """Note what was wrong, and when: faults of one moment have another cause than faults of all hours."""
        self.wrong.setdefault(kind, []).append(f"[{time.monotonic() - self.begun:.1f} s] {what[:500]}")


class Browser:
    """Sends requests to a server and reads what comes back."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self.http, self.url = http, url

    @contextlib.asynccontextmanager
    async def post(self, ask: Ask) -> AsyncIterator[aiohttp.ClientResponse]:
        data = ask.body if isinstance(ask.body, bytes) else json.dumps(ask.body).encode()
        timeout = aiohttp.ClientTimeout(total=REQUEST_SECONDS)
        headers = {"Content-Type": "application/json"}
        async with self.http.post(self.url + ask.path, data=data, headers=headers, timeout=timeout) as response:
            yield response

    async def whole(self, ask: Ask, pause: float = 0.0) -> list[dict[str, Any]] | None:
        """The choices of an answer that was read to its end; None if the queue is full. Broken if a rule was."""
        async with self.post(ask) as response:
            if response.status == 503:
                return None
            if response.status != 200:
                raise Broken(f"HTTP {response.status}: {(await response.text())[:300]}")
            if not ask.streamed:
                return [_choice(c) for c in (await response.json())["choices"]]
            data = b""
            async for piece in response.content.iter_any():
                data += piece
                if pause:
                    await asyncio.sleep(pause)
        return added_up(data, ask.choices)

    async def leave(self, ask: Ask, rng: random.Random) -> None:
        """Go away: before anything came, or after some of it."""
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(rng.choice((0.0, 0.01, 0.05, 0.2, 1.0))), self.post(ask) as response:
                for _ in range(rng.randint(0, 6)):
                    if not await response.content.readany():
                        return
                response.close()

    async def malformed(self, ask: Ask) -> None:
        async with self.post(ask) as response:
            text = await response.text()
            if not 400 <= response.status < 500:
                raise Broken(f"{str(ask.body)[:100]}: HTTP {response.status}: {text[:200]}")
            if not json.loads(text)["error"]["message"]:
                raise Broken(f"{str(ask.body)[:100]}: an error without a message")


def _choice(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a whole answer, as those of streams are added up."""
    message = choice.get("message") or {"content": choice.get("text")}
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return {"text": message.get("content") or "", "calls": calls, "finish_reason": choice["finish_reason"]}


def added_up(data: bytes, count: int) -> list[dict[str, Any]]:
    """The choices of a stream. Broken unless it, and each choice, ended exactly once."""
    lines = [line for line in data.decode().split("\n\n") if line and not line.startswith(":")]
    if not lines or lines[-1] != "data: [DONE]" or lines.count("data: [DONE]") != 1:
        raise Broken(f"a stream ended with {lines[-1:]}")
    found: list[dict[str, Any]] = [{"text": "", "calls": [], "finish_reason": None} for _ in range(count)]
    for line in lines[:-1]:
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise Broken(f"a stream said {event['error']}")
        for part in event["choices"]:
            _add(found[part["index"]], part)
    if not all(choice["finish_reason"] for choice in found):
        raise Broken("a choice of a stream did not end")
    return found


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    if choice["finish_reason"]:
        raise Broken("a choice went on behind its end")
    delta = part.get("delta") or {"content": part.get("text")}
    choice["text"] += delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        if call["index"] == len(choice["calls"]):
            choice["calls"].append({"name": "", "arguments": ""})
        for name in ("name", "arguments"):
            choice["calls"][call["index"]][name] += call["function"].get(name) or ""
    choice["finish_reason"] = part["finish_reason"]


# -- many clients -----------------------------------------------------------------------------------------


class Crowd:
    """Clients that send one request after the other until the time is over."""

    def __init__(self, songs: list[list[dict[str, Any]]], seed: str) -> None:
        self.songs, self.seed = songs, seed
        self.tally = Tally()

    async def client(self, browser: Browser, number: int, end: float) -> None:
        rng = random.Random(f"{self.seed} {number}")
        while time.monotonic() < end:
            await self.once(browser, rng)

    async def once(self, browser: Browser, rng: random.Random) -> None:
        drawn = rng.random()
        kind, ask = "", rng.choices((ordinary, structured, tools), (0.7, 0.15, 0.15))[0](rng)
        try:
            if drawn < ABORTING:
                kind = "leaves"
                await browser.leave(ask, rng)
            elif drawn < ABORTING + MALFORMED:
                kind = "malformed"
                await browser.malformed(Ask("malformed", *rng.choice(BROKEN)))
            elif drawn < ABORTING + MALFORMED + SLOW:
                kind = "slow"
                body = ask.body if isinstance(ask.body, dict) else {}
                await self._answered(browser, Ask("slow", ask.path, body | {"stream": True}, ask.valid), pause=0.3)
            elif drawn < ABORTING + MALFORMED + SLOW + CANARIES:
                kind, number = "canary", rng.randrange(len(CANARY))
                found = await self._answered(browser, CANARY[number])
                if found is not None and found != self.songs[number]:
                    self.tally.blame(kind, f"canary {number} sang {found}, it was {self.songs[number]}")
            else:
                kind = ask.kind
                await self._answered(browser, ask)
        except Broken as error:
            self.tally.blame(kind, str(error))
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
            if kind != "leaves":
                self.tally.blame(kind, f"{type(error).__name__}: {error}")
        self.tally.counts[kind] += 1
        self.tally.requests += 1

    async def _answered(self, browser: Browser, ask: Ask, pause: float = 0.0) -> list[dict[str, Any]] | None:
        found = await browser.whole(ask, pause)
        if found is None:
            self.tally.refused += 1
            await asyncio.sleep(0.5)
        elif wrong := ask.valid(found):
            raise Broken(wrong)
        return found


# -- the server from outside ------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What a process holds: descriptors, threads, bytes of memory, and its children's."""

    descriptors: int
    threads: int
    memory: int


def state_of(process: int) -> State:
    """Of a process and its children."""
    family = [process, *_children(process)]
    return State(
        sum(len(os.listdir(f"/proc/{p}/fd")) for p in family),
        sum(_status(p, "Threads") for p in family),
        sum(_status(p, "VmRSS") for p in family) << 10,
    )


def opened(process: int) -> dict[str, int]:
    """What the descriptors of a process are, to see which kind there are more of."""
    kinds: Counter[str] = Counter()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            kinds[os.readlink(entry).partition(":")[0]] += 1
    return dict(kinds)


def _children(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def _status(process: int, name: str) -> int:
    text = Path(f"/proc/{process}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0


async def settled(url: str, process: int, wanted: State | None = None) -> tuple[State, dict[str, float]]:
    """What the server holds once it is idle and as small as `wanted`, or after SETTLE_SECONDS."""
    end = time.monotonic() + SETTLE_SECONDS
    while True:
        await asyncio.sleep(0.5)
        state = state_of(process)  # first: the server may not have closed the connection of `gauges` yet
        held = await gauges(url)
        small = wanted is None or (state.descriptors <= wanted.descriptors and state.threads <= wanted.threads)
        if (small and not any(held.values())) or time.monotonic() > end:
            return state, held


async def gauges(url: str) -> dict[str, float]:
    """Requests that run and wait, and the share of pages that requests hold. Leaves no connection open."""
    async with session() as http, http.get(url + "/metrics") as response:
        text = await response.text()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)[0]) for name in names}


@dataclass
class Watch:
    """(seconds, requests, state), once a second."""

    samples: list[tuple[float, int, State]] = field(default_factory=list)

    async def follow(self, process: int, tally: Tally) -> None:
        begun = time.monotonic()
        while True:
            with contextlib.suppress(OSError):
                self.samples.append((time.monotonic() - begun, tally.requests, state_of(process)))
            await asyncio.sleep(1.0)

    def slope(self) -> float | None:
        """MiB of memory for 10,000 requests: a line through the second half, when the pool has long been full."""
        half = self.samples[len(self.samples) // 2 :]
        requests = [r for _, r, _ in half]
        if len(half) < 5 or requests[-1] == requests[0]:
            return None
        return float(np.polyfit(requests, [s.memory for *_, s in half], 1)[0]) * 10_000 / (1 << 20)


# -- the whole --------------------------------------------------------------------------------------------


async def soak(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run it all. The report's `failures` is empty if every rule held."""
    async with serving(model, OPTIONS + options.server) as server:
        process = server.process.pid
        async with session() as http:
            songs = [await Browser(http, server.url).whole(ask) or [] for ask in CANARY]
        await load(server, Crowd(songs, f"{options.seed} warm-up"), options.clients, WARM_SECONDS)
        before, _ = await settled(server.url, process)
        first = opened(process)
        crowd, watch = Crowd(songs, str(options.seed)), Watch()
        watching = asyncio.create_task(watch.follow(process, crowd.tally))
        took = await load(server, crowd, options.clients, options.seconds)
        watching.cancel()
        after, held = await settled(server.url, process, before)
        last = opened(process)
        async with session() as http:
            for number, ask in enumerate(CANARY):
                if await Browser(http, server.url).whole(ask) != songs[number]:
                    crowd.tally.blame("canary", f"canary {number} sings another text at the end")
    report = {
        "seconds": took, "clients": options.clients, "seed": options.seed, "model": options.model or "random",
        "requests": crowd.tally.requests, "kinds": dict(crowd.tally.counts), "refused": crowd.tally.refused,
        "wrong": {kind: [len(found), *found[:3]] for kind, found in crowd.tally.wrong.items()},
        "before": vars(before), "after": vars(after), "held": held,
        "open": {"before": first, "after": last}, "slope_mib_per_10k": watch.slope(),
        "exit_code": server.process.returncode, "log": list(server.log),
        "samples": [[round(t), n, s.memory >> 20, s.descriptors, s.threads] for t, n, s in watch.samples],
        **provenance(),
    }  # fmt: skip
    return report | {"failures": failures(report)}


async def load(server: ServerProcess, crowd: Crowd, clients: int, seconds: float) -> float:
    """Let so many clients ask for so many seconds. Returns how long it took until the last was answered."""
    begun = time.monotonic()
    async with session() as http:
        browser = Browser(http, server.url)
        await asyncio.gather(*(crowd.client(browser, i, begun + seconds) for i in range(clients)))
    return time.monotonic() - begun


def failures(report: dict[str, Any]) -> list[str]:
    """The rules that were broken, in words."""
    found = [f"{kind}: {n} times, as {example}" for kind, (n, example, *_) in report["wrong"].items()]
    before, after = report["before"], report["after"]
    found += [
        f"{after[name]} {name} at the end, {before[name]} before"
        for name in ("descriptors", "threads")
        if after[name] > before[name]
    ]
    found += [f"{name} is {value:g} at the end" for name, value in report["held"].items() if value]
    slope = report["slope_mib_per_10k"]
    if report["requests"] >= JUDGED_AFTER and slope is not None and slope > SLOPE:
        found.append(f"memory grows by {slope:.2f} MiB for 10,000 requests")
    found += [f"the log has {line!r}" for line in report["log"] if "Traceback" in line or "Error:" in line]
    if report["exit_code"]:
        found.append(f"the server ended with {report['exit_code']}")
    return found


def shown(report: dict[str, Any]) -> str:
    """The report as a table, and in words what was wrong."""
    wrong = report["wrong"]
    kinds = sorted(report["kinds"].items(), key=lambda item: -item[1])
    lines = [table(["kind", "requests", "wrong"], [[k, n, wrong.get(k, [0])[0]] for k, n in kinds]), ""]
    before, after = report["before"], report["after"]
    rows = [[name, before[name], after[name]] for name in ("descriptors", "threads")]
    rows.append(["memory, MiB", before["memory"] >> 20, after["memory"] >> 20])
    lines += [table(["the server's", "before", "after"], rows), ""]
    slope = report["slope_mib_per_10k"]
    rate = report["requests"] / report["seconds"]
    lines.append(
        f"{report['requests']} requests in {report['seconds']:.0f} s ({rate:.0f}/s), {report['refused']} 503"
    )
    judged = "" if report["requests"] >= JUDGED_AFTER else f" (not judged below {JUDGED_AFTER} requests)"
    lines.append(f"memory: {'-' if slope is None else f'{slope:.2f}'} MiB for 10,000 requests{judged}")
    return "\n".join([*lines, *(f"FAILED: {text}" for text in report["failures"] or ())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="default: a random tiny model")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--server", nargs=argparse.REMAINDER, default=[], help="more options of dovetail serve")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        model = options.model or f"{folder}/tiny.gguf"
        if not options.model:
            write_random(MODELS["llama"], TINY, Path(model), format="Q8_0")
        report = asyncio.run(soak(model, options))
    print(shown(report))
    if options.json:
        with replacing(Path(options.json)) as file:
            file.write(json.dumps(report, indent=1).encode())
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
