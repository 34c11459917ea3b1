"""pydantic-ai: an agent with a tool and an output type.

pip install pydantic-ai-slim[openai]
dovetail serve MODEL
python examples/clients/pydantic_ai_agent.py [BASE_URL]
"""

import sys

import httpx
from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

base = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
name = httpx.get(f"{base}/models").json()["data"][0]["id"]
model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=base, api_key="none"))
settings = {"temperature": 0, "max_tokens": 150}


class City(BaseModel):
    name: str
    country: str


agent = Agent(model, output_type=City, model_settings=settings)
print("output:", agent.run_sync("Which city is the capital of France?").output)

helper = Agent(model, model_settings=settings)


@helper.tool_plain
def weather(city: str) -> str:
    """The weather in a city now."""
    return f"In {city} it is 21 degrees and clear."


print("answer:", helper.run_sync("What is the weather in Paris?").output)
