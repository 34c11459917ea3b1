"""Loads a model and answers a prompt while the n-th large allocation or the n-th read of its files fails.

    LD_PRELOAD=failing_system.so python failing_system.py MODEL KIND FIRST STEP ALWAYS

KIND is 1 for allocations, 2 for reads. n is FIRST, FIRST + STEP and so on, each in a fork, until a run goes to its
end without a failure. Prints a line of JSON for each: n, how many calls failed, and what was raised or answered.
Then the same process does it again without failures, which must give the right answer.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys

from dovetail import LLM, SamplingParams
from dovetail.core.errors import DovetailError

PROMPT = [1, 2, 3, 4, 5]
SECONDS = 60  # after which a run hangs


def answer(model: str) -> list[int]:
    llm = LLM(model, threads=2, kv_memory=2 << 20, max_num_seqs=4, packed_cache="off")
    found = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True), progress=False)
    return found[0].outputs[0].token_ids


def attempt(system: ctypes.CDLL, model: str, kind: int, n: int, always: bool) -> dict[str, object]:
    outcome: dict[str, object] = {"n": n}
    system.arm(kind, n, always, os.path.realpath(model).encode())
    try:
        outcome["answer"] = answer(model)
    except (DovetailError, MemoryError, SystemError) as error:  # numpy forgets to say MemoryError in one place
        outcome["raised"] = f"{type(error).__name__}: {error}"
    except BaseException as error:
        outcome["wrong"] = f"{type(error).__name__}: {error}"
    finally:
        outcome["failed"] = system.disarm()
    if "raised" in outcome or "wrong" in outcome:
        outcome["again"] = answer(model)
    return outcome


def main() -> None:
    model, kind, first, step, always = sys.argv[1], *map(int, sys.argv[2:6])
    system = ctypes.CDLL(None)
    print(json.dumps({"right": answer(model)}), flush=True)
    for n in itertools.count(first, step):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            os.write(write, json.dumps(attempt(system, model, kind, n, bool(always))).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as lines:
            text = lines.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcome = json.loads(text) if text else {"n": n, "wrong": f"ended with {status}"}
        print(json.dumps(outcome), flush=True)
        if outcome.get("failed") == 0:
            break


if __name__ == "__main__":
    main()
