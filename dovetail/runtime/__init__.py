"""Device side: batches, KV storage, execution, sampling."""
