"""Files of requests, answered together: OpenAI's batch format in and out.

`rows` reads requests, `call` turns one into answers and a response body, `journal` keeps what is finished,
`runner` feeds the engine.
"""
