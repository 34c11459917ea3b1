"""What this machine is: cores it may use, instruction sets, memory, how fast it reads.

Functions that read /proc and /sys take the root folder of both, so that a test can describe another machine.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# As Linux spells them; the ones some kernel may be built for.
_ISA = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
# A v1 group without a limit reports a number near 2^63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Cores:
    """What bounds the threads: CPUs in the affinity mask, cgroup quota in cores, distinct physical cores."""

    logical: int
    affinity: int
    quota: float | None
    physical: int

    @property
    def budget(self) -> int:
        """Threads worth starting; at least one."""
        quota = self.affinity if self.quota is None else int(self.quota)
        return max(1, min(self.affinity, quota, self.physical))


@dataclass(frozen=True)
class Memory:
    """Bytes: installed, usable now, and the cgroup's limit if there is one below what is installed."""

    total: int
    available: int
    limit: int | None


def cpu_budget(root: Path = ROOT) -> int:
    """Threads for compute: the least of affinity, whole cores of cgroup quota, and physical cores."""
    return cores(root).budget


def cores(root: Path = ROOT) -> Cores:
    """Count the cores this process may use."""
    allowed = _affinity()
    return Cores(os.cpu_count() or 1, len(allowed), cpu_quota(root), physical_cores(root, allowed))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of time that the tightest enclosing cgroup grants, None without a limit."""
    quotas: list[float] = []
    for group in _groups(root, "cpu"):
        quota_text, _, period_text = _read(group / "cpu.max").strip().partition(" ")
        quota = _integer(quota_text or _read(group / "cpu.cfs_quota_us"))
        period = _integer(period_text or _read(group / "cpu.cfs_period_us"))
        if quota is not None and period is not None and quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)


def physical_cores(root: Path = ROOT, allowed: frozenset[int] | None = None) -> int:
    """Distinct cores behind the CPUs in `allowed` (default: this process' own): hyperthreads count once."""
    allowed = _affinity() if allowed is None else allowed
    seen = set()
    for cpu in allowed:
        topology = root / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        seen.add(siblings.strip() or _core_in_cpuinfo(root, cpu) or str(cpu))
    return max(1, len(seen))


def cpu_model(root: Path = ROOT) -> str:
    """The processor's name, or the architecture where Linux gives none."""
    for key in ("model name", "Hardware", "cpu model"):
        if name := next(_cpuinfo(root, key), ""):
            return name
    return platform.machine()


def processor(root: Path = ROOT) -> str:
    """All that the system says of the processor's kind: code made for it runs wherever this is the same."""
    keys = ("vendor_id", "cpu family", "model", "model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *(next(_cpuinfo(root, key), "") for key in keys)])


def isa(root: Path = ROOT) -> tuple[str, ...]:
    """Instruction sets that kernels care about and this processor has."""
    flags = set(next(_cpuinfo(root, "flags"), "").split()) | set(next(_cpuinfo(root, "Features"), "").split())
    return tuple(name for name in _ISA if name in flags)


def memory(root: Path = ROOT) -> Memory:
    """Installed and usable memory; page cache that the kernel would give back counts as usable."""
    fields = _table(r"^(\w+):\s+(\d+) kB", _read(root / "proc/meminfo"))
    total = int(fields.get("MemTotal", "0")) * 1024
    available = int(fields.get("MemAvailable", fields.get("MemFree", "0"))) * 1024
    limit = None
    for group in _groups(root, "memory"):
        allowed, used = _memory_use(group)
        if allowed is None or allowed >= min(total or _NO_LIMIT, _NO_LIMIT):
            continue
        limit = min(allowed, limit or allowed)
        available = min(available, max(0, allowed - used))
    return Memory(total, available, limit)


def read_bandwidth(threads: int, size: int = 256 << 20, seconds: float = 0.5) -> float:
    """Bytes per second that `threads` threads together read from memory: the best of the passes in `seconds`.

    `size` bytes (at least a few times the last-level cache) are allocated for it.
    """
    import numpy as np

    words = np.empty(max(size // 8, threads), np.int64)
    slices = np.array_split(words, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        # Untouched pages all map to one page of zeros, which would be read from the cache.
        list(pool.map(lambda part: part.fill(1), slices))
        started = time.perf_counter()
        while not best or time.perf_counter() - started < seconds:
            before = time.perf_counter()
            list(pool.map(np.sum, slices))
            best = max(best, words.nbytes / (time.perf_counter() - before))
    return best


def last_level_cache(root: Path = ROOT) -> int:
    """Bytes of the largest cache that the first CPU sees, 0 if Linux does not say."""
    largest = 0
    for index in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(index).strip()
        if text[-1:] in ("K", "M") and (count := _integer(text[:-1])):
            largest = max(largest, count << (10 if text[-1] == "K" else 20))
    return largest


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """This process' cgroup folders for `controller`, innermost first, v1 and v2, up to each mount.

    Inside a container the path may be the host's and not exist here; its ancestors up to the mount still do.
    """
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:
            mounts = [base, base / "unified"]
        elif controller in controllers.split(","):
            mounts = [base / controllers, base / controller]
        else:
            continue
        pieces = [piece for piece in path.split("/") if piece not in ("", ".", "..")]
        for mount in mounts:
            for depth in range(len(pieces), -1, -1):
                yield mount.joinpath(*pieces[:depth])


def _memory_use(group: Path) -> tuple[int | None, int]:
    """The group's limit (None without one) and the bytes in use that cannot be reclaimed."""
    limit = _integer(_read(group / "memory.max")) or _integer(_read(group / "memory.limit_in_bytes"))
    used = _integer(_read(group / "memory.current")) or _integer(_read(group / "memory.usage_in_bytes")) or 0
    stat = _table(r"^(\w+) (\d+)$", _read(group / "memory.stat"))
    cache = int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))
    return limit, max(0, used - cache)


def _core_in_cpuinfo(root: Path, cpu: int) -> str:
    for block in _read(root / "proc/cpuinfo").split("\n\n"):
        fields = _table(r"^([\w ]+?)\s*:\s*(.*)$", block)
        if fields.get("processor") == str(cpu) and "core id" in fields:
            return f"{fields.get('physical id', '0')}/{fields['core id']}"
    return ""


def _cpuinfo(root: Path, key: str) -> Iterator[str]:
    for match in re.finditer(rf"^{re.escape(key)}\s*:\s*(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE):
        yield match[1].strip()


def _table(pattern: str, text: str) -> dict[str, str]:
    return {match[1]: match[2] for match in re.finditer(pattern, text, re.MULTILINE)}


def _integer(text: str) -> int | None:
    text = text.strip()
    return int(text) if re.fullmatch(r"-?\d{1,20}", text, re.ASCII) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
