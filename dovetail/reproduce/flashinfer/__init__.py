"""FlashInfer (Ye et al., arXiv 2501.01005, MLSys 2025): an attention engine for serving. Four of its claims:

1. Load-balanced scheduling keeps kernels busy whatever the lengths (sections 3.3.1, 4.2 and G.3): `balance`.
2. Composable formats read a shared prefix once (sections 3.1.2, 4.4 and G.2): `prefix` for attention alone, and
   `parallel` for the whole engine.
3. A variant of attention is a few lines, compiled into the kernel (sections 3.2.3, 4.3 and G.1): `variants`.
4. Sparse pages cost next to nothing against contiguous KV (appendix B): `pages`.

Everything is run, nothing simulated: this project's planner and kernels on this CPU, on random KV. KV is not in
the caches, except where sharing is the claim. Parallel generation is the whole engine on a real model. The paper
has A100 and H100 GPUs in fp16, so both sides are ratios to their own baselines. Its figures against SGLang's
Triton backend (section 4.1) and vLLM (G.4) are left out, because they compare other projects' GPU kernels.
"""

from __future__ import annotations

from dovetail.reproduce.claim import Experiment
from dovetail.reproduce.flashinfer import balance, pages, parallel, prefix, variants
from dovetail.reproduce.flashinfer.effort import EFFORTS, Effort
from dovetail.reproduce.runner import native_kernels

__all__ = ["EFFORTS", "Effort", "experiments"]


def experiments(effort: Effort) -> list[Experiment]:
    """What measures the claims. ConfigError without native kernels."""
    kernels = native_kernels("flashinfer")
    parts = (balance, prefix, parallel, variants, pages)
    return [part.experiment(effort, kernels) for part in parts]
