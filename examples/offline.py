"""Complete several prompts at once: python examples/offline.py [MODEL]"""

import sys

from dovetail import LLM, SamplingParams

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40)
for output in llm.generate(["The capital of France is", "Once upon a time"], params):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
