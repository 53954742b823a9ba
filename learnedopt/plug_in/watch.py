"""Who should move the parameters, told from the losses alone: a state machine that knows no rule and no tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from learnedopt.plug_in.levels import Level, error, level
from learnedopt.plug_in.phases import Action, HandOver, Phase, Reason

MOST_LEGS = 5
"""Legs of a trial of the fallback, at most."""
REACH = 3
"""A trial goes on while the fallback is on its way to pass within so many legs."""
LATER = 4
"""After a trial at step t, the next one is due at this many times t."""
PATIENT = 14
"""Windows without a gain that are suffered of a rule that gains at the end of its horizon: a third of it."""
NEVER = 2**52
STRIKES = 2
"""Times that the learned rule loses control, or a trial that was to bring it back, before it stays away."""
MOST_BAD = 3
"""Steps in a row with a gradient or loss that is not finite, before the parameters are held to be the cause."""
SURGE = 100.0
"""Without the loss: gradients of so many times the smallest norm of a window, two windows long, are an explosion."""
KEPT = 16
"""Hand-overs that are remembered one by one."""


@dataclass
class Watch:
    """Compares legs of the learned rule with legs of the fallback, and watches who is in control.

    ``window`` steps are a leg, and a stretch over which losses are averaged. ``learned_moves`` says whose the next step
    is; after it, ``after`` returns what becomes of the parameters. Losses are those before each step.
    """

    window: int
    anneals: bool = False
    """Whether the learned rule is known to take long steps first, and to gain at the end of its horizon."""
    phase: Phase = Phase.FIRST_TRY
    step: int = 0
    """Steps taken, by whom and to what end ever."""
    updates: int = 0
    """Steps of this leg or window."""
    legs: int = 0
    probation: bool = False
    """Whether the snapshot is where the first trial left the fallback, so that it can go on from there."""
    due: int = 0
    """The step at which a trial is due."""
    patience: int = 3
    """Windows without a new best, until the fallback gets a trial."""
    stalled: int = 0
    strikes: int = 0
    trials: int = 0
    skipped: int = 0
    bad: int = 0
    blind: int = 0
    """Steps without a loss."""
    count: int = 0
    """Hand-overs."""
    surges: int = 0
    size: float = 0.0
    """Sum of this window's norms of gradients."""
    least_size: float = math.inf
    sum_means: float = 0.0
    sum_variances: float = 0.0
    """Both of the windows that stalled."""
    best: Level | None = None
    last: Level | None = None
    """The fallback's leg before."""
    mark: Level | None = None
    """What is to be beaten in a trial: the level of who was in control, looked ahead."""
    losses: list[float] = field(default_factory=list[float])
    handed: list[HandOver] = field(default_factory=list[HandOver])

    @property
    def learned_moves(self) -> bool:
        """Whether the learned rule takes the next step."""
        return self.phase not in (Phase.TRIAL, Phase.FALLBACK)

    @property
    def learned_controls(self) -> bool:
        """Whether control is the learned rule's, be there a trial or not."""
        return self.phase not in (Phase.FALLBACK, Phase.RETURN_TRY)

    def after(self, loss: float | None, size: float) -> Action:
        """Take note of a step.

        Args:
            loss: the loss before the step, or None.
            size: the norm of the gradients.
        """
        self.bad = 0
        self.step += 1
        self.updates += 1
        self.size += size
        if loss is None:
            self.blind += 1
            if self.phase is Phase.FIRST_TRY and not self.losses:
                self.phase = Phase.LEARNED  # there is nothing to compare
        else:
            self.losses.append(loss)
        if self.phase in (Phase.FIRST_TRY, Phase.RETURN_TRY) and self._rises():
            return self.failed(Reason.CLIMBS)
        if self.updates < self.window:
            return Action.NONE
        losses, size, self.losses, self.updates, self.size = self.losses, self.size / self.window, [], 0, 0.0
        if len(losses) < max(4, self.window // 2):
            return self._unseen(size)
        return {
            Phase.FIRST_TRY: self._tried_first,
            Phase.TRIAL: self._tried_fallback,
            Phase.LEARNED: self._learned,
            Phase.FALLBACK: self._fell_back,
            Phase.RETURN_TRY: self._tried_return,
        }[self.phase](losses)

    def skip(self) -> Action:
        """Take note of a step that was not taken: the gradient or the loss was not finite."""
        self.skipped += 1
        self.bad += 1
        if self.bad < MOST_BAD:
            return Action.NONE
        self.bad = 0
        return self.failed(Reason.NOT_FINITE)

    def failed(self, reason: Reason) -> Action:
        """Take note that who moves must not go on from here."""
        if self.phase is Phase.FALLBACK:
            return Action.NONE  # there is nobody else
        if self.phase is Phase.TRIAL:
            return self._learned_stays()
        if self.phase is Phase.RETURN_TRY:
            return self._no_return()
        self._hand_over(False, reason)
        return Action.RESTORE

    def past_horizon(self) -> Action:
        """Take note, before a step, that the learned rule has nothing more to say."""
        self.strikes = STRIKES
        if not self.learned_controls:
            return Action.NONE
        self._hand_over(False, Reason.HORIZON)
        return Action.FORGET

    def cut_short(self) -> None:
        """Take note that the snapshot is lost: who is in control goes on from here, and no end of a trial is known."""
        self.probation = False
        if self.phase in (Phase.FIRST_TRY, Phase.TRIAL, Phase.RETURN_TRY):
            self._enter(Phase.LEARNED if self.learned_controls else Phase.FALLBACK)
            self.due = LATER * self.step

    def _tried_first(self, losses: list[float]) -> Action:
        self.mark = level(losses[len(losses) // 2 :])
        self._try_fallback()
        return Action.SWAP

    def _tried_fallback(self, losses: list[float]) -> Action:
        """Judge the fallback's leg: it wins, loses, or gets another one."""
        now, mark, last = level(losses[len(losses) // 2 :]), self._marked(), self.last
        fall = level(losses).slope if last is None else (now.mean - last.mean) / self.window
        self.legs, self.last = self.legs + 1, now
        noise, leg = error(now, mark), self.window
        # What falls will fall slower: the learned rule is credited with one leg of its slope, the fallback with more.
        target, reached = mark.ahead(leg), now._replace(slope=fall).ahead(leg if self.best is None else REACH * leg)
        if self.best is None:  # the first trial, from one point: the learned rule must be better, and not only level
            wins, passes = now.mean < mark.mean + noise, reached < target
        elif self.probation:  # the fallback goes on from its own end of the first trial
            wins, passes = now.mean < target, reached < target
        else:
            # A cold start from where the learned rule takes long steps gains at once, by shorter ones: not enough, but
            # where the learned rule has stalled, and no end of a schedule is ahead, it need not even gain.
            margin = -2 if self.stalled < 2 else -1 if self.anneals else 1
            wins, passes = self.legs > 1 and now.mean < target + margin * noise, now.mean < target + noise
        if wins:
            self.trials += 1
            self._hand_over(False, Reason.WORSE)
            return Action.FORGET
        return Action.NONE if passes and self.legs < MOST_LEGS else self._learned_stays()

    def _learned(self, losses: list[float]) -> Action:
        """Judge a window of the learned rule: it gains, climbs, or a trial is due."""
        now, action = level(losses), Action.NONE
        if self.best is None or now.mean < self.best.mean - error(now, self.best):
            self.best, action = now, Action.NONE if self.probation else Action.SAVE
            self._go_on()
        else:
            self.stalled += 1
            self.sum_means, self.sum_variances = self.sum_means + now.mean, self.sum_variances + now.variance
            flat = Level(self.sum_means / self.stalled, self.sum_variances / self.stalled**2, 0.0)
            if flat.mean > self.best.mean + (6 if self.stalled == 1 else 3) * error(flat, self.best):
                return self.failed(Reason.CLIMBS)
            now = flat if self.stalled > 1 else now
        if self.stalled < self.patience and self.step < self.due:
            return action
        self.mark = now._replace(slope=min(now.slope + math.sqrt(12 * now.variance) / self.window, 0.0))
        self._try_fallback()
        return Action.SWAP if self.probation else Action.SAVE

    def _try_fallback(self) -> None:
        self.phase, self.legs, self.last = Phase.TRIAL, 0, None

    def _fell_back(self, losses: list[float]) -> Action:
        now = level(losses)
        if self.best is None or now.mean < self.best.mean - error(now, self.best):
            self.best, self.stalled = now, 0
        else:
            self.stalled += 1
        if self.stalled < 2 or self.step < self.due or self.strikes >= STRIKES:
            return Action.NONE
        self.best, self.phase = now, Phase.RETURN_TRY
        self.mark = Level(now.ahead(self.window), now.variance, 0.0)
        return Action.SAVE

    def _tried_return(self, losses: list[float]) -> Action:
        now, mark = level(losses[len(losses) // 2 :]), self._marked()
        if self.strikes >= STRIKES or now.mean > mark.mean - 2 * error(now, mark):
            return self._no_return()
        self.trials += 1
        self._hand_over(True, Reason.BETTER)
        return Action.SAVE

    def _unseen(self, size: float) -> Action:
        """Judge a window with too few losses by its gradients."""
        if self.phase in (Phase.FIRST_TRY, Phase.RETURN_TRY):
            return self.failed(Reason.WORSE)  # not seen to be better
        if self.phase is Phase.TRIAL:
            return self._learned_stays()
        if self.phase is Phase.FALLBACK:
            if self.step < self.due or self.strikes >= STRIKES:
                return Action.NONE
            self._hand_over(True, Reason.WAITED)
            return Action.SAVE
        self.surges = self.surges + 1 if size > SURGE * self.least_size else 0
        self.least_size = min(self.least_size, size)
        if self.surges >= 2:
            return self.failed(Reason.EXPLODED)
        return Action.NONE if self.surges else Action.SAVE

    def _rises(self) -> bool:
        """Whether the last four losses of a leg are clearly above what it began with, so that it need not go on."""
        if len(self.losses) < 5:
            return False
        if self.phase is Phase.FIRST_TRY:
            start, variance = self.losses[0], level(self.losses).variance * len(self.losses)
        else:  # what the fallback had: a leap of the loss must not pass for noise
            start, variance = self._marked().mean, self._marked().variance * self.window
        return sum(self.losses[-4:]) / 4 > start + 3 * math.sqrt(variance)

    def _marked(self) -> Level:
        assert self.mark is not None  # a trial began
        return self.mark

    def _learned_stays(self) -> Action:
        first, self.trials = self.best is None, self.trials + 1
        if first:
            self.best = self._marked()  # what the learned rule must gain on, or the fallback goes on from its own end
        self.patience = 1 if first else PATIENT if self.anneals else 3 if self.probation else 2 * self.patience
        self.due = 2 * self.step if first else NEVER if self.anneals else LATER * self.step
        self.probation = first
        self._enter(Phase.LEARNED)
        return Action.SWAP if first else Action.RESTORE

    def _no_return(self) -> Action:
        self.trials += 1
        self.strikes += 1
        self.due = LATER * self.step
        self._enter(Phase.FALLBACK)
        return Action.RESTORE

    def _hand_over(self, to_learned: bool, reason: Reason) -> None:
        self.count += 1
        self.handed = [*self.handed, HandOver(self.step, to_learned, reason)][-KEPT:]
        self.strikes += not to_learned
        self.due, self.best, self.patience = LATER * self.step, None, 3
        self.surges, self.least_size, self.probation = 0, math.inf, False
        self._enter(Phase.LEARNED if to_learned else Phase.FALLBACK)

    def _enter(self, phase: Phase) -> None:
        self.phase, self.losses, self.updates, self.size = phase, [], 0, 0.0
        self._go_on()

    def _go_on(self) -> None:
        self.stalled, self.sum_means, self.sum_variances = 0, 0.0, 0.0
