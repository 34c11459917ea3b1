"""litellm: a completion, a stream and a function call.

pip install litellm
dovetail serve MODEL
python examples/clients/litellm_tools.py [BASE_URL]
"""

import sys

import httpx
import litellm

base = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
name = httpx.get(f"{base}/models").json()["data"][0]["id"]
common = {"model": f"openai/{name}", "api_base": base, "api_key": "none", "temperature": 0, "max_tokens": 100}
tools = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city now.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
print("answer:", litellm.completion(messages=question, **common).choices[0].message.content)
print(
    "stream:",
    "".join(
        c.choices[0].delta.content or "" for c in litellm.completion(messages=question, stream=True, **common)
    ),
)
question = [{"role": "user", "content": "What is the weather in Paris?"}]
print("call:", litellm.completion(messages=question, tools=tools, **common).choices[0].message.tool_calls)
