"""Techniques as records: what they say of themselves, and how several are put together or refused."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.errors import ConfigError
from dovetail.core.seams import SEAMS, Drafter, Geometry, Policy, Seams, Selector, Site
from dovetail.core.technique import Beside, Technique, compose, idle

SHAPE = Geometry(2, 4, 2, 8, 100)
SITE = Site(SHAPE, 4, None)


def part(name: str, seam: str = "policy", **more: Any) -> Technique:
    return Technique(name, (seam,), lambda site: {seam: (name, site)}, **more)


def refused(words: str, *parts: Technique, facts: frozenset[str] = frozenset()) -> None:
    with pytest.raises(ConfigError, match=words):
        compose(*parts, facts=facts)


def test_a_spec_names_the_technique_with_its_options() -> None:
    assert part("one").spec == "one"
    assert part("one", options={"budget": 64, "score": "codes"}).spec == "one:budget=64,score=codes"
    assert compose(part("one"), part("two", "codec", options={"a": 1})).specs == ["one", "two:a=1"]


def test_a_record_says_nothing_that_it_is_not_told() -> None:
    t = part("one")
    assert not t.lossless and not t.needs and not t.options and t.exact_at == {}
    assert t.activity(Seams()) == 0
    assert t.beside(SHAPE, 4, 2) == Beside() == Beside(0, 0, ())


def test_techniques_that_never_acted() -> None:
    assert idle({"one": 0, "two": 3, "three": 0}) == ["one", "three"]
    assert idle({}) == []


def test_seams_are_filled_by_those_that_say_so_and_by_defaults() -> None:
    seams = compose(part("one"), part("two", "codec")).build(SITE)
    assert seams.policy == ("one", SITE) and seams.codec == ("two", SITE)
    assert type(seams.drafter) is Drafter and type(seams.selector) is Selector
    assert type(compose().build(SITE).policy) is Policy


def test_a_technique_that_fills_other_seams_than_it_says_is_refused() -> None:
    wrong = Technique("one", ("policy",), lambda site: {"codec": 1})
    with pytest.raises(ConfigError, match=r"one says it fills \['policy'\] but built \['codec'\]"):
        compose(wrong).build(SITE)


def test_what_is_kept_beside_is_the_sum_with_the_names_of_those_that_keep_any() -> None:
    asked = []

    def keeps(page: int, request: int) -> Any:
        return lambda *about: asked.append(about) or Beside(page, request)

    parts = part("one", beside=keeps(3, 5)), part("two", "codec"), part("three", "rows", beside=keeps(4, 0))
    assert compose(*parts).beside(SHAPE, 16, 2) == Beside(7, 5, ("one", "three"))
    assert asked == [(SHAPE, 16, 2)] * 2
    assert compose().beside(SHAPE, 16, 2) == Beside()


def test_two_that_fill_one_seam_are_refused_by_name() -> None:
    refused("one and two both fill the 'policy' seam", part("one"), part("two"))
    refused("one is given twice", part("one"), part("one"))
    refused("one fills 'colour', which is no seam; the seams are policy, drafter", part("one", "colour"))
    assert "policy" in SEAMS and len(SEAMS) == len(set(SEAMS))


def test_what_a_technique_needs_is_offered_by_the_engine_or_it_is_refused() -> None:
    needy = part("one", needs=frozenset({"a slow tier", "b"}))
    assert compose(needy, facts=frozenset({"a slow tier", "b", "c"})).techniques == (needy,)
    refused(
        "one needs a slow tier, which nothing .*; give its size with --kv-offloading-size$",
        needy,
        facts=frozenset({"b"}),
    )
    refused("one needs b, which nothing here provides$", needy, facts=frozenset({"a slow tier"}))
