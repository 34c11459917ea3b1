"""InfiniGen (Lee et al., arXiv 2406.19707, OSDI 2024): speculative fetching of KV. What its guesses are worth
here: `prediction`."""
