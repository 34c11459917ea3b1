"""The drafter that wraps others: it asks them as far as that pays, and passes on what is worth verifying.

A drafter that costs little is asked in every step. What it guessed is compared with the tokens that came, verified
or not, so it goes on being judged while nothing of it is used. For a costly one (a model) the lengths are chosen
before it is asked, by what its guesses were worth so far. When that does not pay, its KV is left behind, and it is
asked now and then: at most for a hundredth of the time, and less and less often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dovetail.core.cost import Load
from dovetail.core.seams import NO_GUESS, WALL_CLOCK, Drafter, Guess, Outcome, Room
from dovetail.core.types import Request, StepPlan
from dovetail.techniques.smartspec.choice import Draft, Verify, ahead, lengths
from dovetail.techniques.smartspec.draft_time import Ask, DraftTime
from dovetail.techniques.smartspec.side import Offer, Probe, Side
from dovetail.techniques.smartspec.step_time import StepTime

DEPTH = 16  # tokens that a costly drafter is asked for at most
LEARN = 12  # first calls of a costly drafter, for which it is asked whatever is known
PROBES = 0.01  # of all time, for guesses that do not seem to pay
RESTS = 16, 32, 48  # steps in vain after which another step between two is left alone
WORTH = 0.15  # tokens that a step must gain, net, not to be in vain: what the controller's own work may cost
STEPS = 32  # steps over which catching up must pay
LEAST_ROW = 0.01  # of what a row takes on average: what another takes at least, on the host
FADE = 0.98  # of the weight of earlier steps in the gain, for each step


class _Step:
    """The step that is planned: its requests, and what more rows would cost."""

    def __init__(
        self, time: StepTime, between: float, requests: Sequence[Request], room: Room, gain: float
    ) -> None:
        rows = len(requests) + room.others
        sizes = [len(r.tokens) for r in requests]
        context = sum(sizes)
        self.time, self.first, self.room = time, rows, room.tokens
        self.fixed = between + time.context(context, context)
        self.plain = self.fixed + time.rows(rows)
        self.row = time.rows(rows + 1) - time.rows(rows)
        self.price = gain * rows / self.plain if self.plain > 0 else 0.0
        key, least = time.speed * time.pairs, LEAST_ROW * time.rows(rows) / rows
        self.each = [least + key * n for n in sizes]

    def verify(self, tokens: int) -> Verify:
        tokens = min(tokens, self.room)
        rows, fixed, first = self.time.rows, self.fixed, self.first
        return Verify([fixed + rows(first + b) for b in range(tokens + 1)], self.each)


class SmartSpec(Drafter):
    """fixed: a length for all guesses; below 0, lengths are chosen by goodput. now: the time in seconds."""

    def __init__(self, sides: Sequence[Side], fixed: int = -1, now: Callable[[], float] = WALL_CLOCK.now) -> None:
        self.sides = sides
        self.fixed = fixed
        self.now = now
        self.writes = any(side.drafter.writes for side in sides)
        self.time = StepTime()
        self.learn = LEARN
        self.gain = 1.0  # goodput, times that of the same steps without guesses
        self.guessed = 0  # tokens that drafters guessed
        self.predicted = self.measured = self.off = 0.0  # seconds of steps; of the differences
        self._offers: list[Offer] = []
        self._step: _Step | None = None
        self._worth = self._spent = 0.0
        self._drafting = self._budget = self._between = 0.0
        self._ended: float | None = None
        self._probe = Probe()
        self._vain = self._left = self._requests = 0
        self._resting = False

    # -- proposing -----------------------------------------------------------------------------------

    def propose(self, requests: Sequence[Request], limits: Sequence[int], room: Room) -> Sequence[Guess]:
        self._resting = self.fixed < 0 and self._rests(len(requests))
        if self._resting:
            return [NO_GUESS] * len(requests)
        begun = self.now()
        if self._ended is not None:
            gap = begun - self._ended
            if gap < self._between + 0.2 * self.time.rows(1):  # longer gaps are waits for requests
                self._between += 0.1 * (gap - self._between)
        offers = self._offers = [Offer(r, len(r.tokens)) for r in requests]
        if self.fixed >= 0:
            return self._alike(limits, room)
        step = self._step = _Step(self.time, self._between, requests, room, self.gain)
        if self.time.unseen(step.first):  # else the time without guesses would never be known
            return [NO_GUESS] * len(requests)
        for side in self.sides:
            cost = side.cost(step.plain, step.row)
            if side.cheap(len(requests), step.plain):
                self._ask(side, offers, limits, room)
            else:
                self._ask_ahead(side, cost, step, limits)
        self._drafting = self.now() - begun
        return self._pick(offers, step)

    def _rests(self, requests: int) -> bool:
        """Whether to leave this step alone: little was gained for long, and as many requests run as before."""
        if requests != self._requests:
            self._vain, self._left, self._requests = 0, 0, requests
        if self._left:
            self._left -= 1
            return True
        self._vain += 1
        self._left = sum(self._vain > n for n in RESTS)
        return False

    def _alike(self, limits: Sequence[int], room: Room) -> list[Guess]:
        """Guesses of the fixed length, from the first drafter that has one."""
        limits = [min(n, self.fixed) for n in limits]
        for side in self.sides if self.fixed else ():
            side.cost(0.0, 0.0)
            empty = [i for i, o in enumerate(self._offers) if not o.guess.tokens]
            if empty:
                self._ask(side, [self._offers[i] for i in empty], [limits[i] for i in empty], room)
        return [o.guess for o in self._offers]

    def _ask(
        self, side: Side, offers: Sequence[Offer], limits: Sequence[int], room: Room, ahead: bool = False
    ) -> None:
        """Ask a drafter, and take its guesses where they are worth more than what is offered already."""
        assert side.time is not None
        requests = [o.request for o in offers]
        behind = sum(map(side.behind, requests)) if ahead else 0
        begun = self.now()
        guesses = side.drafter.propose(requests, limits, room)
        seconds = self.now() - begun
        if len(guesses) != len(requests):
            raise ValueError(f"{side.name} gave {len(guesses)} guesses for {len(requests)} requests")
        tokens = depth = 0
        for offer, limit, guess in zip(offers, limits, guesses, strict=True):
            n = min(len(guess.tokens), limit)
            tokens += n
            depth = max(depth, n)
            if n:
                odds = guess.odds if len(guess.odds) == len(guess.tokens) else ()
                curve = side.right.curve(offer.request.id, guess.source, odds, n)
                worth = sum(curve)
                if offer.side is None or worth > offer.worth:
                    offer.side, offer.curve, offer.worth = side, curve, worth
                    offer.guess = (
                        guess if n == len(guess.tokens) else Guess(guess.tokens[:n], odds[:n], guess.source)
                    )
            if ahead and (offer.side is None or offer.side is side):
                caught_up = n or side.behind(offer.request) <= 1  # else it had no chance to guess
                offer.side, offer.asked = side, limit if caught_up else 0
        self.guessed += tokens
        ask = (
            Ask(len(requests), sum(limits), max(limits), behind) if ahead else Ask(len(requests), tokens, depth, 0)
        )
        side.time.observe(ask, seconds)

    def _ask_ahead(self, side: Side, cost: DraftTime, step: _Step, limits: Sequence[int]) -> None:
        """Ask a costly drafter for as many tokens as pay by what is known before it guesses."""
        offers = self._offers
        curves, starts = [], []
        for offer, limit in zip(offers, limits, strict=True):
            r = offer.request
            curve = side.blind.curve(r.id, "", (), min(limit, DEPTH))
            curves.append(curve if sum(curve) > offer.worth else ())
            steps = max(1, min(STEPS, (r.max_total - offer.at) // 2))
            starts.append(cost.parts[1] + cost.parts[4] * side.behind(r) / steps)
        rest = [o.curve if not c else () for o, c in zip(offers, curves, strict=True)]
        verify = step.verify(sum(map(len, curves)) + sum(len(o.curve) for o in offers))
        draft = Draft(cost.parts[0], cost.parts[2], cost.parts[3], starts)
        chosen, value = ahead(curves, verify, draft, step.price)
        if any(o.curve for o in offers):  # what the others have guessed for these requests is not lost without it
            without = lengths([o.curve for o in offers], verify, step.price)[1]
            value += lengths(rest, verify, step.price)[1] - without
        if value <= 0:
            chosen = self._try(side, cost, limits)
        else:
            side.probe.reset()
        asked = [i for i, n in enumerate(chosen) if n]
        if asked:
            wanted = [chosen[i] for i in asked]
            self._ask(side, [offers[i] for i in asked], wanted, Room(step.room), ahead=True)

    def _try(self, side: Side, cost: DraftTime, limits: Sequence[int]) -> list[int]:
        """A probe: two tokens of the request that costs least to catch up with, the latest of equals.

        The first calls are not counted as probes. They ask for four tokens, because neither what a call takes
        nor how often it is right is known from one call that had a whole prompt to catch up with.
        """
        chosen = [0] * len(limits)
        open_ = [
            (side.behind(o.request), -i) for i, o in enumerate(self._offers) if limits[i] and not o.guess.tokens
        ]
        if open_:
            behind, i = min(open_)
            price = cost(Ask(1, 2, 2, behind))
            if cost.calls < self.learn:
                chosen[-i] = min(4, limits[-i])
            elif side.probe.due(price <= self._budget):
                self._budget -= price
                chosen[-i] = min(2, limits[-i])
        return chosen

    def _pick(self, offers: Sequence[Offer], step: _Step) -> list[Guess]:
        """Cut the guesses to what is worth verifying."""
        curves = [o.curve for o in offers]
        many = sum(map(len, curves))
        if not many or not step.room:
            return [NO_GUESS] * len(offers)
        verify = step.verify(many)
        chosen, value = lengths(curves, verify, step.price)
        if value > WORTH * len(offers):
            self._vain = self._left = 0
        if any(chosen):
            self._probe.reset()
        else:
            price = verify.seconds[1] - verify.seconds[0]
            if self._probe.due(price <= self._budget):
                self._budget -= price
                chosen[max(range(len(offers)), key=lambda i: offers[i].worth)] = 1
        found = []
        for offer, n in zip(offers, chosen, strict=True):
            tokens, odds, source = offer.guess
            found.append(Guess(tokens[:n], odds[:n], source) if n else NO_GUESS)
        return found

    # -- learning ------------------------------------------------------------------------------------

    def observe(self, outcomes: Sequence[Outcome], plan: StepPlan, seconds: float) -> None:
        if self._resting:
            self._budget = min(1.0, self._budget + PROBES * seconds)
            self._ended = None
            for side in self.sides:
                side.drafter.observe(outcomes, plan, seconds)
            return
        load = Load.of(plan)
        predicted = self.time.observe(load, seconds)
        if predicted:
            self.predicted += predicted
            self.measured += seconds
            self.off += abs(predicted - seconds)
        if self.fixed < 0:
            self._judge()
            self._weigh(outcomes, load)
        self._budget = min(1.0, self._budget + PROBES * seconds)
        for side in self.sides:
            side.drafter.observe(self._own(side, outcomes), plan, seconds)
        self._offers, self._step, self._drafting = [], None, 0.0
        self._ended = self.now()

    def _own(self, side: Side, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """The outcomes as they concern one of several drafters."""
        if len(self.sides) == 1:
            return outcomes
        mine = {o.request.id for o in self._offers if o.side is side}
        return [o if o.request.id in mine else Outcome(o.request, (), 0) for o in outcomes]

    def _judge(self) -> None:
        """Compare what was guessed with what came, as far as it came."""
        for offer in self._offers:
            side, guess = offer.side, offer.guess
            if side is None:
                continue
            came = offer.request.tokens[offer.at :]
            if not came:
                continue
            right = []
            for guessed, token in zip(guess.tokens, came, strict=False):
                right.append(guessed == token)
                if guessed != token:
                    break
            name = offer.request.id
            if right:
                odds = guess.odds if len(guess.odds) == len(guess.tokens) else ()
                side.right.observe(name, guess.source, odds, right)
            if offer.asked:
                if len(right) == len(guess.tokens) < min(offer.asked, len(came)) and all(right):
                    right.append(False)  # asked for, and not guessed
                side.blind.observe(name, "", (), right)

    def _weigh(self, outcomes: Sequence[Outcome], load: Load) -> None:
        """How much faster this step was than the same work without guesses."""
        if self._step is None or not outcomes:
            return
        guessed = sum(len(o.drafts) for o in outcomes)
        plain_rows = load.rows - guessed
        keys = self._between + self.time.context(load.read(), load.read())
        plain = keys + self.time.rows(plain_rows)
        tokens = plain_rows + sum(o.accepted for o in outcomes)
        self._worth = FADE * self._worth + plain * tokens / plain_rows
        self._spent = FADE * self._spent + keys + self.time.rows(load.rows) + self._drafting
        if self._spent > 0:
            self.gain = max(1.0, self._worth / self._spent)

    def forget(self, request: Request) -> None:
        for side in self.sides:
            side.right.forget(request.id)
            side.blind.forget(request.id)
            side.drafter.forget(request)
