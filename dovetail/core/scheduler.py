"""Who runs in the next step, and on which pages: admission, token budget, preemption."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dovetail.core.errors import CapacityError, RequestError
from dovetail.core.pages import PagePool, pages_for
from dovetail.core.prefix import RadixPrefix
from dovetail.core.seams import NO_GUESS, Backlog, Guess, Outcome, Reuse, Room, Seams
from dovetail.core.types import UNLIMITED, Request, Sealed, Span, StepPlan, Stored

MAX_DRAFTS = 32  # per request and step; longer guesses are hardly ever right
LOOKAHEAD = 64  # waiting requests that are considered in a step


@dataclass(frozen=True)
class Limits:
    """What a step and a request may use."""

    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    prefix_caching: bool = True
    vocab_size: int = UNLIMITED


@dataclass
class SchedulerStats:
    preemptions: int = 0
    drafts: int = 0  # guesses, of one token or more
    drafted: int = 0  # their tokens
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)  # by position in the guess
    lengths: list[int] = field(default_factory=lambda: [0] * (MAX_DRAFTS + 1))  # how often so many were drafted
    emitted: int = 0  # tokens of all those steps of requests, with and without drafts
    forced: int = 0  # tokens that the form of an answer left no choice about
    failures: int = 0  # of the drafter
    cached_tokens: int = 0
    queried_tokens: int = 0

    def count(self, drafted: int, accepted: int) -> None:
        """A step of a request: a guess of so many tokens or none, and how many of them were right."""
        self.lengths[min(drafted, MAX_DRAFTS)] += 1
        self.emitted += accepted + 1
        if not drafted:
            return
        self.drafts += 1
        self.drafted += drafted
        self.accepted += accepted
        for position in range(min(accepted, MAX_DRAFTS)):
            self.accepted_at[position] += 1


@dataclass(slots=True)
class _Step:
    """The plan under construction."""

    left: int
    spans: list[Span] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Decides which requests run in a step of at most `max_num_batched_tokens` tokens, and on which pages.

    Requests that take their next token come first; the policy shares out what they leave. The oldest running
    request always advances. When pages run out, the youngest request is preempted: it gives its pages back, keeps
    its tokens, and waits at the head of the queue. A request that does not fit the pool alone is refused at once.
    """

    def __init__(self, pool: PagePool, seams: Seams, limits: Limits, num_stages: int = 1) -> None:
        self.pool = pool
        self.seams = seams
        self.limits = limits
        self.num_stages = num_stages
        self.waiting: dict[Request, None] = {}  # in order; any of them can leave at no cost for the others
        self.running: list[Request] = []
        self.stats = SchedulerStats()
        self.reuse: Reuse = seams.reuse or RadixPrefix(pool)
        pool.evict = self.reuse.evict
        self._released: list[str] = []
        self._sealed: list[Sealed] = []

    # -- entering and leaving ------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises CapacityError or RequestError if it can never run."""
        n, limit = len(request.prompt), self.limits.max_model_len
        if n == 0:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if request.max_total > limit or n >= limit:
            raise RequestError(
                f"the prompt has {n} tokens and asks for {max(request.max_total - n, 1)} more, "
                f"but the context holds {limit}; shorten the prompt or lower max_tokens",
                param="prompt" if n >= limit else "max_tokens",
            )
        need = pages_for(request.max_total, self.pool.page_size)
        if need > self.pool.num_pages:
            raise CapacityError(
                f"{request.max_total} tokens need {need} pages of KV, the pool has {self.pool.num_pages} of "
                f"{self.pool.page_size} tokens; raise --kv-memory or lower max_tokens"
            )
        self.waiting[request] = None

    def leave(self, request: Request) -> None:
        """Take a request out in whatever state it is; its pages are free at once."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.pop(request, None)
        self._let_go(request)

    def owners(self) -> Iterator[list[int]]:
        """Every holder of pages, for `PagePool.check`."""
        for r in (*self.running, *self.waiting):
            yield list(r.table.ids)
        yield from (list(p) for p in self.reuse.held)

    # -- planning ------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """The next plan. It has no spans when there is nothing to do. If it raises, every request starts over."""
        step = _Step(self.limits.max_num_batched_tokens)
        try:
            self._plan(step)
        except BaseException:  # pages may have moved, and nobody would copy them
            self._start_over()
            raise
        if not step.spans:  # `sealed` and the rest wait for the next plan that runs
            return StepPlan(())
        plan = StepPlan(
            tuple(step.spans), tuple(step.copies), tuple(self._sealed), tuple(self.pool.reopened),
            tuple(self._released),
        )  # fmt: skip
        self._sealed, self._released, self.pool.reopened = [], [], []
        return plan

    def _plan(self, step: _Step) -> None:
        """Fill the step: spans between two stages, running requests, those that are admitted."""
        caught_up = self._draft(step)
        for request in self.running:
            if request.stage:  # in the middle of the program: its rows and pages are fixed
                self._span(request, request.computed + request.flying, step)
        shares = self._shares(step.left) if self.waiting or not caught_up else {}
        i, preemptions = 0, self.stats.preemptions
        while i < len(self.running) and step.left > 0:
            request = self.running[i]
            most = shares.pop(request, step.left)
            i += request.stage > 0 or most <= 0 or self._advance(request, step, most)
        if self.stats.preemptions == preemptions:  # else an admission could take the pages that were just freed
            self._admit(shares, step)

    def _start_over(self) -> None:
        """Take all requests back to where nothing of them is computed."""
        for request in reversed(self.running.copy()):
            self._reset(request)
        for request in self.waiting:  # the one that was about to begin
            request.table.clear()
            request.computed = 0

    def undo(self, plan: StepPlan) -> None:
        """Take back a plan that failed. Its requests start over; what it says about pages goes into the next
        plan."""
        self._sealed = [*plan.sealed, *self._sealed]
        self._released = [*plan.released, *self._released]
        self.pool.reopened = [*plan.reopened, *self.pool.reopened]
        for span in reversed(plan.spans):
            if span.request in self.running:
                self._reset(span.request)
        targets = {target for _, target in plan.copies}
        for request in reversed(self.running.copy()):  # those that were given a page to guess on, and no span
            if targets.intersection(request.table.ids):
                self._reset(request)

    def _shares(self, left: int) -> dict[Request, int]:
        """How many of `left` tokens each request takes that has more to compute than its next token.

        Those that run come first, then those that may be admitted, in order.
        """
        backlogs, others = [], 0
        for r in self.running:
            n = len(r.tokens) - r.computed
            if r.stage or n == 1:
                others += 1
                left -= 0 if r.stage else n + len(r.drafts)
            else:
                backlogs.append(Backlog(r, n))
        running, waiting = len(backlogs), self._candidates()
        if running + len(waiting) == 1:  # its length is compared with no other
            backlogs += [Backlog(r, len(r.tokens)) for r in waiting]
        else:
            backlogs += [Backlog(r, len(r.tokens) - self._expected(r)) for r in waiting]
        if not backlogs:
            return {}
        amounts = list(self.seams.policy.shares(backlogs, max(1, left), others))
        if running or not others:
            amounts[0] = max(1, amounts[0])  # the oldest always advances
        shares = enumerate(zip(backlogs, amounts, strict=True))
        return {backlog.request: n for i, (backlog, n) in shares if n > 0 or i < running}

    def _advance(self, request: Request, step: _Step, most: int) -> bool:
        """Plan a span of at most so many tokens of a running request. False if the request was preempted."""
        stop = self._stop(request, step.left, most)
        copies = request.table.grow(request.computed, stop)
        while copies is None:
            victim = next(r for r in reversed(self.running) if not r.stage)
            self._preempt(victim)
            if victim is request:
                return False
            copies = request.table.grow(request.computed, stop)
        step.copies += copies
        self._span(request, stop, step)
        return True

    def _span(self, request: Request, stop: int, step: _Step) -> None:
        start, stage, accepted = request.computed, request.stage, len(request.tokens)
        if stage == 0:
            if stop < accepted + len(request.drafts):
                request.drafts = request.drafts[: max(0, stop - accepted)]
            request.flying = stop - start
        sample = stop - accepted + 1 if stop >= accepted and stage + 1 == self.num_stages else 0
        step.spans.append(Span(request, start, stop, stage, sample))
        step.left -= stop - start

    def _stop(self, request: Request, left: int, most: int) -> int:
        """Where the next span of a request ends, which takes at most `most` of the step's `left` tokens."""
        start, stop = request.computed, len(request.tokens) + len(request.drafts)
        if stop - start > 1:
            stop = min(stop, start + most, start + left)
            window = self.seams.selector.window
            if window < UNLIMITED:  # the dense part, and a row's droppable pages, must be sealed before the step
                stop = min(stop, request.dense_until if start < request.dense_until else start + window)
        return stop

    def _draft(self, step: _Step) -> bool:
        """Ask the drafter for guesses, for every request whose accepted tokens are computed except the last.
        Returns whether no other has tokens to compute."""
        ready = [r for r in self.running if r.stage == 0 and r.computed == len(r.tokens) - 1 and not r.drafts]
        behind = (r for r in self.running if r.stage == 0 and r.computed < len(r.tokens) - 1)
        caught_up = len(ready) == len(self.running) or not any(behind)
        if not ready:
            return caught_up
        spare = self.limits.max_num_batched_tokens
        if self.waiting or not caught_up:
            spare //= 2  # the other half is for prompts
        spare = max(0, spare - len(self.running))
        cap = min(MAX_DRAFTS, self.seams.selector.window - 1)
        limits = [cap if (n := r.max_total - len(r.tokens) - 1) > cap else max(0, n) for r in ready]
        if self.seams.drafter.writes:
            limits = [self._prepare(r, n, step) for r, n in zip(ready, limits, strict=True)]
        room = Room(spare, self._others(caught_up))
        for r, limit, guess in zip(ready, limits, self._guesses(ready, limits, room), strict=True):
            known = list(itertools.takewhile(lambda t: 0 <= t < self.limits.vocab_size, guess.tokens[:limit]))
            if r.constraint is not None and limit:
                guessed = known
                known = r.constraint.drafts(guessed)
                r.forced = known != guessed[: len(known)]
            if known:
                r.drafts = known[: min(limit, spare)]
                spare -= len(r.drafts)
        return caught_up

    def _guesses(self, ready: Sequence[Request], limits: Sequence[int], room: Room) -> Sequence[Guess]:
        """What the drafter proposes. One that fails costs speed only."""
        try:
            found = self.seams.drafter.propose(ready, limits, room)
            if len(found) == len(ready):
                return found
            why = f"it gave {len(found)} guesses for {len(ready)} requests"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        self._failed(why)
        return [NO_GUESS] * len(ready)

    def _failed(self, why: str) -> None:
        """The drafter failed. Said once: it may fail in every step."""
        if not self.stats.failures:
            warnings.warn(f"the drafter failed, so nothing was guessed: {why}", stacklevel=2)
        self.stats.failures += 1

    def observe(self, outcomes: Sequence[Outcome], plan: StepPlan, seconds: float) -> None:
        """Tell the drafter what became of its guesses."""
        try:
            self.seams.drafter.observe(outcomes, plan, seconds)
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")

    def _prepare(self, request: Request, limit: int, step: _Step) -> int:
        """Give a request pages for a guess of `limit` tokens, to which the drafter may write at once. Returns how
        many tokens it may guess: none if there are too few pages, or while a page of it is still to be copied."""
        size, held = self.pool.page_size, len(request.table)
        if pages_for(len(request.tokens) + limit, size) - held > self.pool.num_free - len(self.running):
            limit = max(0, min(limit, held * size - len(request.tokens)))  # no guess drives out what is needed
        copies = request.table.grow(request.computed, len(request.tokens) + limit) if limit else []
        step.copies += copies or []
        return 0 if copies is None or copies else limit

    def _others(self, caught_up: bool) -> int:
        """How many tokens of prompts the next step computes beside those that have caught up, at most."""
        if caught_up and not self.waiting:
            return 0
        backlogs = [len(r.tokens) - r.computed for r in self.running if r.stage == 0]
        backlogs += [len(r.tokens) for r in itertools.islice(self.waiting, LOOKAHEAD)]
        return sum(min(n, self.seams.policy.crowded) for n in backlogs if n > 1)

    # -- admission and preemption --------------------------------------------------------------------

    def _candidates(self) -> list[Request]:
        """The first of those that wait and could begin in this step, in the policy's order."""
        if not self.waiting or len(self.running) >= self.limits.max_num_seqs:
            return []
        order = self.seams.policy.order(list(self.waiting))
        ready = (r for r in order if not self._must_wait_for_fork(r))
        return list(itertools.islice(ready, LOOKAHEAD))

    def _expected(self, request: Request) -> int:
        """How many tokens of a waiting request need not be computed, as far as is known before it begins."""
        if request.fork_of is not None:
            return self._fork_point(request.fork_of)
        if request.expected < 0:
            pages, request.expected = self._stored(request)
            self.pool.release(pages)
        return request.expected

    def _admit(self, shares: dict[Request, int], step: _Step) -> None:
        """Admit those that have a share, in this order. Nobody overtakes one for which there are too few pages."""
        for request, most in shares.items():
            if step.left <= 0 or len(self.running) >= self.limits.max_num_seqs:
                break
            if not self._start(request, step, most):
                break

    def _must_wait_for_fork(self, request: Request) -> bool:
        parent = request.fork_of
        if parent is None:
            return False
        if parent.finish_reason is None and parent.computed < len(parent.prompt) - 1:
            return True
        if parent.finish_reason is not None or parent not in self.running:
            request.fork_of = None
        return False

    def _start(self, request: Request, step: _Step, most: int) -> bool:
        """Admit a waiting request: take what is stored of it, give it pages for all its tokens, plan a first span
        of at most `most` tokens.

        False if there are too few pages, or if the codec has no room for it. Then nothing has changed.
        """
        if self._dense_pages(*self.running, request) > self.seams.codec.capacity:
            return False
        parent = request.fork_of
        if parent is not None:
            request.computed = self._fork_point(parent)
            request.table.share(parent.table, request.computed)
        else:
            pages, request.computed = self._stored(request)
            request.table.append(pages)
        stop = self._stop(request, step.left, most)
        copies = request.table.grow(request.computed, len(request.tokens))
        if copies is None or not self._headroom():
            request.table.clear()
            request.computed = 0
            if not self.running:
                raise RuntimeError("a request that was admitted as fitting does not fit the empty pool")
            return False
        if request.cached_tokens < 0:
            request.cached_tokens = request.computed
            if parent is None:
                self.stats.cached_tokens += request.computed
                self.stats.queried_tokens += len(request.prompt)
        request.fork_of = None
        del self.waiting[request]
        self.running.append(request)
        step.copies += copies
        self._span(request, stop, step)
        return True

    def _fork_point(self, parent: Request) -> int:
        """How many tokens a fork takes over: all but the last of the prompt, whose row yields its first token.

        The last token's page is copied when the fork writes to it. A sealed page is never copied, because it may
        lie in the slow tier and would have to come back. If that page is sealed, the fork computes it again.
        """
        size, point = self.pool.page_size, len(parent.prompt) - 1
        return point if parent.computed < (point // size + 1) * size else point // size * size

    def _headroom(self) -> bool:
        """Whether every running request could take another page. Otherwise an admission would lead to
        preemption."""
        pages = self.pool.allocate(len(self.running))
        if pages is None:
            return not self.running
        self.pool.release(pages)
        return True

    def _dense_pages(self, *requests: Request) -> int:
        return sum(min(r.dense_until, r.max_total) // self.pool.page_size for r in requests)

    def _stored(self, request: Request) -> Stored:
        most = min(len(request.tokens) - 1, self._reusable(request))
        if request.params.prompt_logprobs is not None:  # rows that are scored must be computed
            most = min(most, request.scored)
        if not self.limits.prefix_caching or most == 0:
            return Stored([], 0)
        return self.reuse.match(request, most)

    def _preempt(self, request: Request) -> None:
        """Take a running request's pages away. It keeps its tokens and waits at the head of the queue."""
        self.store(request)
        self._reset(request)
        request.preemptions += 1
        self.stats.preemptions += 1

    def _reset(self, request: Request) -> None:
        self.running.remove(request)
        request.drafts, request.forced = [], False
        request.computed = request.stage = request.flying = 0
        request.expected = -1
        self._let_go(request)
        self.waiting = {request: None, **self.waiting}

    def _let_go(self, request: Request) -> None:
        request.table.clear()
        self.seams.drafter.forget(request)
        self._released.append(request.id)

    # -- committing ----------------------------------------------------------------------------------

    def commit(self, request: Request, computed: int) -> None:
        """Make the KV of the first `computed` tokens final: seal the pages that are complete, offer them for
        reuse."""
        size = self.pool.page_size
        first, last = request.computed // size, computed // size
        request.computed = computed
        if len(request.table) * size >= len(request.tokens) + size:  # pages that only rejected drafts needed
            request.table.trim(pages_for(len(request.tokens), size))
        if last > first:
            self._sealed.append(Sealed(request.id, first, tuple(request.table.ids[first:last])))
            if computed <= len(request.prompt):
                self.store(request)

    def store(self, request: Request) -> None:
        """Offer the committed whole pages of a request for reuse."""
        if self.limits.prefix_caching:
            self.reuse.store(request, min(request.computed, self._reusable(request)))

    def distrust(self, request: Request) -> None:
        """Drop from reuse everything that this request may have read."""
        self.reuse.evict(request)

    def _reusable(self, request: Request) -> int:
        """How many tokens have KV that other requests may share. A row that left pages unread has KV of its
        own."""
        return request.dense_until if self.seams.selector.window < UNLIMITED else len(request.tokens)
