"""Files of requests, answered together, in OpenAI's batch format. Imports the engine and server's request shapes.

`rows` reads requests, `call` turns one into answers and a response body, `journal` keeps what is finished,
`runner` feeds the engine.
"""
