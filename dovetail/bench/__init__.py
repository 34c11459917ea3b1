"""Speed: what is compared, in turns, on made-up data. Imported by evals, reproduce and cli only."""
