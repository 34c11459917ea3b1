"""The replay is deterministic and fair, and smartspec's claims are all there."""

from __future__ import annotations

import numpy as np
import pytest

from dovetail.reproduce.runner import measure
from dovetail.reproduce.smartspec import EFFORTS, Effort, experiments
from dovetail.reproduce.smartspec.limits import tree_gain, useless
from dovetail.reproduce.smartspec.policies import run
from dovetail.reproduce.smartspec.replay import Job, Machine, Model
from dovetail.reproduce.smartspec.sweep import SETUPS
from dovetail.reproduce.smartspec.workloads import CODER, DRAFT, LOOKUP, SMALL

QUIET = Machine("quiet", ((1, 1.0), (2, 1.1), (17, 2.6)), 0.0, 0.0, noise=0.0)


def stream(right: float, tokens: int = 400) -> list[Job]:
    return [Job(0.0, 8, np.full(tokens, right), np.ones(tokens), 1)]


def test_a_replay_gives_the_same_times_every_time() -> None:
    setup = SETUPS[0]
    load = setup.changing(Effort(10))
    first, again = (setup.run("smartspec", load) for _ in range(2))
    assert first == again and len(first.latencies) == 20


def test_without_guesses_a_step_gives_a_token_and_certain_guesses_give_all() -> None:
    none = run("none", stream(1.0), QUIET, Model(0.0))
    assert none.steps == 400 and none.seconds == pytest.approx(399 + QUIET.seconds(8, 0))
    fixed = run("8", stream(1.0), QUIET, Model(0.0))
    assert fixed.steps == 1 + -(-399 // 9)
    wrong = run("8", stream(0.0), QUIET, Model(0.0))
    assert wrong.steps == 400 and wrong.drafted > 3000


def test_smartspec_is_near_the_best_of_the_limits() -> None:
    certain = run("smartspec", stream(1.0), QUIET, Model(0.0))
    assert certain.seconds < 1.15 * run("oracle", stream(1.0), QUIET, Model(0.0)).seconds
    hopeless = run("smartspec", stream(0.0), QUIET, Model(0.0))
    assert hopeless.seconds < 1.01 * run("none", stream(0.0), QUIET, Model(0.0)).seconds
    dear = Model(0.0, 5.0, 0.1, writes=True)
    assert run("oracle", stream(0.0), QUIET, dear).drafted == 0
    assert run("oracle", stream(1.0), QUIET, dear).drafted == 0  # a draft takes longer than a step


def test_a_useless_drafter_costs_at_most_a_fiftieth() -> None:
    for setup, skipped in zip(SETUPS, (100, 500), strict=True):
        assert useless(setup, skipped, 500) <= 1.02


def test_a_second_branch_gains_nothing_where_the_first_is_always_right() -> None:
    for machine, model in ((SMALL, LOOKUP), (CODER, DRAFT)):
        assert tree_gain(machine, model, 1.0) <= 1


def test_every_claim_says_everything() -> None:
    found = measure(experiments(Effort(4, 100)))
    assert len(found) == sum(len(e.claims) for e in experiments(EFFORTS["quick"]))
    for claim in found:
        assert all((claim.setting, claim.paper, claim.ours, claim.why)) and claim.kind == "simulated"
