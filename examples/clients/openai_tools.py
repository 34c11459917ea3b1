"""The openai client: chat, a stream, `.parse` into a model, and a function call with its result.

pip install openai
dovetail serve MODEL
python examples/clients/openai_tools.py [BASE_URL]
"""

import json
import sys

from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1", api_key="none")
model = client.models.list().data[0].id


class City(BaseModel):
    name: str
    country: str


def weather(city: str) -> str:
    return json.dumps({"city": city, "celsius": 21, "sky": "clear"})


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city now.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]

# Structured output.
parsed = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Which city is the capital of France? Answer in JSON."}],
    response_format=City,
    temperature=0,
    max_tokens=60,
)
print("parsed:", parsed.choices[0].message.parsed)

# A function call, whole, and the answer that uses its result.
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
reply = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=100)
message = reply.choices[0].message
for call in message.tool_calls or []:
    print("call:", call.function.name, call.function.arguments)
messages.append(message.model_dump(exclude_none=True))
for call in message.tool_calls or []:
    result = weather(**json.loads(call.function.arguments))
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
final = client.chat.completions.create(model=model, messages=messages, tools=TOOLS, temperature=0, max_tokens=100)
print("answer:", final.choices[0].message.content)

# A required call, streamed.
stream = client.chat.completions.create(
    model=model,
    messages=messages[:1],
    tools=TOOLS,
    tool_choice="required",
    temperature=0,
    max_tokens=100,
    stream=True,
    stream_options={"include_usage": True},
)
name, arguments, reason, usage = "", "", None, None
for chunk in stream:
    usage = chunk.usage or usage
    for choice in chunk.choices:
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or []:
            name += part.function.name or ""
            arguments += part.function.arguments or ""
print("streamed call:", name, json.loads(arguments), reason, usage.completion_tokens, "tokens")
