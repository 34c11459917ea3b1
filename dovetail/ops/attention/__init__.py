"""Attention over paged KV.

For a query at position p with head group g: softmax over the readable keys t of score(q.k_t / sqrt(d)),
times V. "Readable" is the variant's mask and t <= p. Softmax runs in float32, or float64 for float64 queries.
"""

from dovetail.ops.attention.reference import Keys, ReadSpans, Rows, attend_dense, attend_pages

__all__ = ["Keys", "ReadSpans", "Rows", "attend_dense", "attend_pages"]
