"""What becomes of JSON schemas that others wrote: how many compile, what is refused, and what answers are worth.

    .venv/bin/python bench/schema_suite.py FOLDER ... [--walks N] [--json]

A folder holds schemas, one a file, or the tests of the official JSON-Schema-Test-Suite (the source distribution of
`jsonschema` ships them in json/tests/draft2020-12). Every schema is compiled as that of a request would be. Where
that succeeds, random answers are written over a vocabulary of bytes, and `jsonschema` validates them. The official
tests also say which instances are valid: an invalid one must not be writable; a valid one should be, but may have
another order or form than the grammar.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema

from dovetail import StructuredOutputs
from dovetail.core.errors import RequestError
from dovetail.structured.cache import Grammars
from dovetail.structured.compiler import Compiler
from dovetail.structured.grammar import Grammar
from dovetail.structured.vocabulary import Vocabulary

END = 256
LONGEST = 3000  # bytes of a random answer
ANSWERS = {True: "answers valid", False: "answers invalid", None: "answers that jsonschema cannot judge"}
CLOSING = frozenset(b'"}]')


class Case(NamedTuple):
    """A schema, and instances with whether they are valid."""

    name: str
    schema: Any
    instances: list[tuple[Any, bool]]


def cases(folder: Path) -> Iterator[Case]:
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if isinstance(found, list):
            for group in found:
                tests = [(t["data"], t["valid"]) for t in group["tests"]]
                yield Case(f"{path.stem}: {group['description']}", group["schema"], tests)
        else:
            yield Case(path.name, found, [])


def writable(grammar: Grammar, text: str) -> bool:
    matcher, complete = grammar.matcher([END]), False
    for byte in text.encode():
        complete = matcher.commit(byte)
        if matcher.error is not None:
            return False
    return complete or bool(matcher.masks([])[0][END // 32] & 1)


def walk(grammar: Grammar, seed: int) -> str | None:
    """A random answer, closed as soon as may be after 60 bytes. None if it is not complete in time."""
    matcher, chance, written = grammar.matcher([END]), random.Random(seed), bytearray()
    while len(written) < LONGEST:
        mask = matcher.masks([])[0]
        options = [t for t in range(END) if mask[t // 32] >> (t % 32) & 1]
        if mask[END // 32] & 1 and (not options or len(written) > 60 or chance.random() < 0.3):
            return written.decode()
        if not options:
            return None
        closing = [t for t in options if t in CLOSING] if len(written) > 60 else []
        written.append(chance.choice(closing or [t for t in options if 32 <= t < 127] or options))
        if matcher.commit(written[-1]):
            return written.decode()
    return None


def valid(schema: Any, text: str) -> bool | None:
    """None if the schema itself is not valid, or needs what is not there."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
        return bool(kind(schema, format_checker=kind.FORMAT_CHECKER).is_valid(json.loads(text)))
    except Exception:  # jsonschema has many ways to say so
        return None


def reason(error: RequestError) -> str:
    """The kind of a refusal: its first words, without what is particular to the schema."""
    text = str(error).removeprefix("structured_outputs: ").removeprefix("json: ")
    return text.split(";")[0].split(" '")[0].split("regex parse error")[-1][:60] or "regex parse error"


def judge(folder: Path, grammars: Grammars, walks: int) -> dict[str, Any]:
    found: collections.Counter[str] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    wrong = []
    for case in cases(folder):
        found["schemas"] += 1
        try:
            grammar = grammars.compile(StructuredOutputs(json=case.schema))
        except RequestError as error:
            refused[reason(error)] += 1
            continue
        found["compile"] += 1
        for seed in range(walks):
            text = walk(grammar, seed)
            judged = None if text is None else valid(case.schema, text)
            found["answers cut off" if text is None else ANSWERS[judged]] += 1
            if judged is False:
                wrong.append(f"{case.name}: wrote {str(text)[:100]}")
        for data, good in case.instances:
            kind = "valid" if good else "invalid"
            found[f"{kind} instances"] += 1
            if writable(grammar, json.dumps(data, ensure_ascii=False)):
                found[f"{kind} instances writable"] += 1
                if not good:
                    wrong.append(f"{case.name}: takes {json.dumps(data)[:100]}")
    return {"folder": folder.name, **found, "refused": dict(refused.most_common()), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--walks", type=int, default=3, help="random answers for each schema")
    parser.add_argument("--json", action="store_true", help="also print a line of JSON")
    args = parser.parse_args()
    vocabulary = Vocabulary([bytes([b]) for b in range(256)] + [b"<end>"], [END])
    grammars = Grammars(lambda: Compiler(vocabulary))
    results = [judge(folder, grammars, args.walks) for folder in args.folders]
    for result in results:
        print("\n".join(f"{name}: {value}" for name, value in result.items() if isinstance(value, (str, int))))
        print("\n".join(f"  refused {count}: {why}" for why, count in result["refused"].items()))
        print("\n".join(f"  wrong: {what}" for what in result["wrong"]))
    if args.json:
        print(json.dumps(results))
    grammars.close()


if __name__ == "__main__":
    main()
