"""`dovetail doctor`: what this machine offers and what would run on it."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

from dovetail.cli.result import JsonOption, write_json

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "fastapi", "uvicorn")


def command(json_file: JsonOption = None) -> None:
    """Show what this machine offers.

    That is processor, threads, memory and its speed, packages, GPU, kernels and caches.

    \b
    Examples:
      dovetail doctor
      dovetail doctor --json machine.json
    """
    report = examine()
    _show(report)
    write_json(json_file, report)


def examine() -> dict[str, Any]:
    """Everything that the command prints; sizes in bytes, bandwidth in bytes per second."""
    return {
        "cpu": _cpu(),
        "memory": _memory(),
        "gpu": _gpus(),
        "kernels": _kernels(),
        "packages": _packages(),
        "caches": _caches(),
    }


def _cpu() -> dict[str, Any]:
    from dovetail.host import machine

    cores = machine.cores()
    return {
        "model": machine.cpu_model(),
        "architecture": platform.machine(),
        "isa": list(machine.isa()),
        "threads": cores.budget,
        "affinity": cores.affinity,
        "cgroup_quota": cores.quota,
        "physical_cores": cores.physical,
        "logical_cpus": cores.logical,
    }


def _memory() -> dict[str, Any]:
    from dovetail.host import machine

    memory = machine.memory()
    # Several times the last-level cache, and never so much that measuring pushes something else out.
    size = min(max(256 << 20, 4 * machine.last_level_cache()), max(memory.available // 4, 16 << 20))
    return {
        "total": memory.total,
        "available": memory.available,
        "cgroup_limit": memory.limit,
        "read_bandwidth": round(machine.read_bandwidth(machine.cpu_budget(), size)),
    }


def _gpus() -> list[dict[str, Any]]:
    from dovetail.host.lazy_torch import cuda_devices, torch

    found = []
    for index in range(cuda_devices()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        found.append({"name": name, "capability": f"{major}.{minor}", "total": total, "free": free})
    return found


def _kernels() -> dict[str, Any]:
    """The native library, the instruction sets that it runs here, best first."""
    library, problem, isas, emulated = None, None, [], []
    try:
        from dovetail import _native

        library, isas, emulated = _native.__file__, _native.isas(), _native.emulated()
    except ImportError as error:
        problem = str(error)
    return {"native": library, "problem": problem, "isas": isas, "emulated": emulated}


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("dovetail-llm", *_PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _caches() -> dict[str, Any]:
    from huggingface_hub import constants

    from dovetail.host.files import free_bytes, home, tree_bytes

    return {
        "home": str(home()),
        "home_bytes": tree_bytes(home()),
        "home_free": free_bytes(home()),
        "hugging_face": constants.HF_HUB_CACHE,
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Not a terminal: no frame of its width, so that nothing is cut off in a log.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200)
    for title, rows in _tables(report):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for key, value in rows:
            table.add_row(key, value)
        console.print(table, markup=False)
        console.print()


def _tables(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    from dovetail.host.units import format_size

    cpu, memory, caches = report["cpu"], report["memory"], report["caches"]
    quota = "none" if cpu["cgroup_quota"] is None else f"{cpu['cgroup_quota']:g} cores"
    limit = memory["cgroup_limit"]
    gpus = [
        (
            gpu["name"],
            f"capability {gpu['capability']}, {format_size(gpu['free'])} of {format_size(gpu['total'])} free",
        )
        for gpu in report["gpu"]
    ]
    return [
        (
            "Processor",
            [
                ("model", f"{cpu['model']} ({cpu['architecture']})"),
                ("instructions", " ".join(cpu["isa"]) or "none of those looked for"),
                (
                    "threads",
                    f"{cpu['threads']} = least of affinity {cpu['affinity']}, cgroup quota {quota}, "
                    f"physical cores {cpu['physical_cores']}",
                ),
            ],
        ),
        (
            "Memory",
            [
                ("total", format_size(memory["total"])),
                ("available", format_size(memory["available"])),
                ("cgroup limit", "none" if limit is None else format_size(limit)),
                (
                    "read bandwidth",
                    f"{memory['read_bandwidth'] / 1e9:.1f} GB/s with {cpu['threads']} threads",
                ),
            ],
        ),
        ("GPU", gpus or [("none", "torch is not installed, or sees no CUDA device")]),
        ("Kernels", _kernel_rows(report["kernels"])),
        ("Packages", [(name, version or "not installed") for name, version in report["packages"].items()]),
        (
            "Caches",
            [
                (
                    "dovetail",
                    f"{caches['home']} ({format_size(caches['home_bytes'])}, "
                    f"{format_size(caches['home_free'])} free on its disk)",
                ),
                ("hugging face", caches["hugging_face"]),
            ],
        ),
    ]


def _kernel_rows(kernels: dict[str, Any]) -> list[tuple[str, str]]:
    isas = ", ".join(kernels["isas"]) + " (best first)" if kernels["isas"] else "none"
    if kernels["emulated"]:
        isas += f"; for tests {', '.join(kernels['emulated'])}"
    return [
        ("native library", kernels["native"] or f"none, torch's operations instead ({kernels['problem']})"),
        ("instruction sets", isas),
    ]
