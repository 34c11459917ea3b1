"""The OpenAI-compatible HTTP server. Imports the engine; imported by the command line, and by batch for
the shapes of requests.

One thread owns the engine (`engine_thread`); the event loop reads requests, hands them over as jobs (`job`) and
writes what comes back (`exchange`). Everything else is shapes: `protocol` in, `chat` and `completions` out.
"""
