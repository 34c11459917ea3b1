"""`dovetail reproduce`: published claims beside what is measured here."""

from __future__ import annotations

from typing import Annotated

import typer

from dovetail.cli.result import JsonOption, write_json
from dovetail.core.errors import ConfigError
from dovetail.show.plot import PlotOption, save


def command(
    name: Annotated[str | None, typer.Argument(help="The system; without it, all are listed.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The fewest settings and rounds: 3 minutes.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Every setting, and many rounds.")] = False,
    json_file: JsonOption = None,
    plot_file: PlotOption = None,
) -> None:
    """Measure the claims of a paper beside its published figures.

    Ours and theirs are ratios to each one's own baseline. Some claims have a bar here, judged by an interval: exit
    status 1 means that one was missed. One that this machine is too noisy to decide is no failure. The default
    takes under 15 minutes on 2 cores. Use an idle machine.

    \b
    Examples:
      dovetail reproduce
      dovetail reproduce flashinfer --quick
      dovetail reproduce flashinfer --json result.json --plot ratios.png
    """
    if quick and full:
        raise ConfigError("--quick and --full exclude each other")
    if name is None:
        if quick or full or plot_file is not None:
            raise ConfigError("--quick, --full and --plot need the NAME of a system")
        _list(json_file)
        return
    from dovetail.reproduce import system

    wanted = system(name)
    from dovetail.provenance import provenance
    from dovetail.reproduce import report
    from dovetail.reproduce.runner import reproduce

    done = reproduce(wanted, "quick" if quick else "full" if full else "default")
    print(report.text(done))
    if plot_file is not None:
        save(report.draw(done), plot_file)
    write_json(json_file, report.result(done) | provenance())
    if done.missed:
        raise typer.Exit(1)


def _list(json_file: str | None) -> None:
    from dovetail.reproduce import SYSTEMS, report

    print(report.listing())
    write_json(json_file, {"systems": [report.listed(system) for system in SYSTEMS.values()]})
