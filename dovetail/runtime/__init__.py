"""Device side: batches, KV storage, execution, sampling. Imports core, host and ops; no model, no technique."""
