"""Plots: refused before work is done, and whole files."""

import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.core.errors import ConfigError
from dovetail.show.plot import checked_destination, figure, save


@pytest.mark.parametrize("name", ["heat.png", "heat.svg", "heat.pdf"])
def test_a_plot_is_written_whole(tmp_path: Path, name: str):
    drawn = figure()
    drawn.subplots().plot([1, 2], [3, 4])
    save(drawn, tmp_path / name)
    assert (tmp_path / name).stat().st_size > 1000
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("name", "why"), [("heat.txt", "must end in"), ("missing/heat.png", "no folder")])
def test_impossible_files_are_refused_first(tmp_path: Path, name: str, why: str):
    with pytest.raises(ConfigError, match=why):
        checked_destination(tmp_path / name)


def test_without_matplotlib_the_way_to_get_it_is_named():
    code = (
        "import sys; sys.modules['matplotlib.figure'] = None\n"
        "from dovetail.show.plot import figure\n"
        "try: figure()\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'dovetail-llm[plot]'" in done.stdout
