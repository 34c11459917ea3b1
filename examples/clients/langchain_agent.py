"""LangChain: `with_structured_output`, `bind_tools`, and an agent's loop.

pip install langchain langchain-openai
dovetail serve MODEL
python examples/clients/langchain_agent.py [BASE_URL]
"""

import sys

import httpx
from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

base = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
name = httpx.get(f"{base}/models").json()["data"][0]["id"]
chat = ChatOpenAI(model=name, base_url=base, api_key="none", temperature=0, max_tokens=150)


class City(BaseModel):
    """A city and its country."""

    name: str
    country: str


@tool
def weather(city: str) -> str:
    """The weather in a city now."""
    return f"In {city} it is 21 degrees and clear."


print("structured:", chat.with_structured_output(City).invoke("Which city is the capital of France?"))
print(
    "structured by a call:",
    chat.with_structured_output(City, method="function_calling").invoke("Which city is the capital of Italy?"),
)
print("call:", chat.bind_tools([weather]).invoke("What is the weather in Paris?").tool_calls)
agent = create_agent(chat, [weather])
result = agent.invoke({"messages": [{"role": "user", "content": "What is the weather in Paris?"}]})
for message in result["messages"]:
    print(f"{message.type}: {message.content or message.tool_calls}")
