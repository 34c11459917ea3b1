"""How long a new process takes to its first token, and how much memory it then holds."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from dovetail.core.errors import DovetailError
from dovetail.host.interrupts import uninterrupted
from dovetail.host.process import peak_rss, since_start

if TYPE_CHECKING:
    from dovetail.setting import Setting

# -P and the path of this process make the child import what this process would, in any folder.
_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from dovetail.bench.engine.startup import main; main()"
)


def start(model: str, setting: Setting) -> dict[str, float]:
    """startup_s: seconds from the beginning of a process to its first token. peak_rss: bytes, after a prompt of
    512 tokens and a short answer. DovetailError if the model cannot be run.
    """
    asked = {"model": model, "use": setting.use, "options": vars(setting.options)}
    command = [sys.executable, "-P", "-c", _CHILD, json.dumps(sys.path), json.dumps(asked)]
    status, out, errors = _run(command)
    if status:
        last = "\n".join(errors.splitlines()[-10:])
        raise DovetailError(f"the process that start-up is measured in ended with {status}:\n{last}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    if "error" in found:
        raise DovetailError(str(found["error"]))
    return found


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a process that does not outlive an interrupt."""
    process = None
    try:
        with uninterrupted():  # after an interrupt in between, nobody would know the new process
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)
        out, errors = process.communicate()
    except BaseException:
        if process is not None:
            process.kill()
            process.wait()
        raise
    return process.returncode, out, errors


def main() -> None:
    """What the child does: load, answer one token, then more. Prints the figures, or the `error`, as one line."""
    asked = json.loads(sys.argv[2])
    try:
        line = json.dumps(_measure(asked))
    except DovetailError as error:
        line = json.dumps({"error": str(error)})
    print(line)


def _measure(asked: dict) -> dict[str, float]:
    from dovetail.bench.engine.points import exercise, measure
    from dovetail.llm import LLM

    llm = LLM(asked["model"], use=asked["use"], **asked["options"])
    measure(llm, [[1]], 1)
    seconds = since_start()
    exercise(llm)
    return {"startup_s": seconds, "peak_rss": peak_rss()}
