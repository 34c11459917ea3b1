"""The OpenAI-compatible HTTP server. Imports the engine; imported by the command line, and by batch for
the shapes of requests.

One thread owns the engine (`engine_thread`). The event loop reads requests, gives them to that thread as jobs
(`job`) and writes the replies (`exchange`). Before that stand `connections` (how many, and for how long),
`guard` (keys, sizes) and `gate` (places, and the end). The other modules are shapes: `protocol` of requests,
`chat`, `completions` and `tokens` of replies, `metrics` and `timings` of what happened.
"""
