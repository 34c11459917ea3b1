"""Fillers of seams that can act inside a recorded program."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.core.seams import Codec, Selector

if TYPE_CHECKING:
    from dovetail.runtime.recorder import Recorder


class RecordedSelector(Selector):
    """A selector that says what `select` does as operations of a native program."""

    def record(self, layer: int, to: Recorder) -> bool:
        """Record what chooses the pages of `layer`, before its attention. False: its rows read everything."""
        raise NotImplementedError

    def record_ahead(self, layer: int, to: Recorder) -> bool:
        """Record what guesses the pages of `layer`, behind the attention of the layer before it: `to.x` still is
        the input of that. False: there is no guess."""
        return False


class RecordedCodec(Codec):
    """A codec whose aliases a native program can read, where pages move between tiers."""

    def record(self, to: Recorder) -> None:
        """Say how their keys are rebuilt (`Recorder.rebuild`)."""
        raise NotImplementedError
