"""A new kind of attention, defined and used: python examples/variant.py [MODEL]

Each head reads a window of its own, and no score is above 50. docs/attention.md says what a definition may use.
"""

import sys
from dataclasses import dataclass

from dovetail import LLM, SamplingParams, Technique
from dovetail.core.seams import Variant
from dovetail.ops.template import tanh


@dataclass(frozen=True)
class HeadWindows(Variant):
    windows: tuple[int, ...]

    def score(self, score, q_pos, k_pos, head):
        return 50 * tanh(score / 50)

    def mask(self, q_pos, k_pos, head):
        return k_pos > q_pos - self.windows[head]


def build(site):
    return {"variant": HeadWindows(tuple(32 << head % 4 for head in range(site.geometry.num_heads)))}


model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m"
llm = LLM(model, use=Technique("head-windows", ("variant",), build))
params = SamplingParams(temperature=0, max_tokens=40)
for output in llm.generate(["Once upon a time, in a small village,"], params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
