"""A conversation, streamed: python examples/chat.py [MODEL]

Each question is asked with everything said before it; the prefix cache makes that cheap.
"""

import sys

from dovetail import LLM

llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
params = llm.default_params(temperature=0.0, max_tokens=60)
messages = []
for question in ("What is the capital of France?", "And what is it famous for?"):
    print(f"> {question}")
    messages.append({"role": "user", "content": question})
    text = ""
    for output in llm.stream(llm.chat_tokens(messages), params):
        print(output.outputs[0].text[len(text) :], end="", flush=True)
        text = output.outputs[0].text
    print(f"\n({len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them cached)")
    messages.append({"role": "assistant", "content": text})
