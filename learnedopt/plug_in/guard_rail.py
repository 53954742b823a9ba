"""The guard of a learned optimizer: the learned rule and a safe fallback take turns, by what a watch says."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from learnedopt.core import tree
from learnedopt.core.counts import require_count
from learnedopt.plug_in.fallback import Fallback, MakeOptimizer, adamw
from learnedopt.plug_in.norms import norm_of
from learnedopt.plug_in.phases import WHY, Action, HandOver, Phase, Reason
from learnedopt.plug_in.shards import local
from learnedopt.plug_in.watch import Watch

LOGGER = logging.getLogger("learnedopt")
EXPLODED, SMALL = 30.0, 0.1
"""Parameters that have grown to so many times their norm, or that of ``SMALL`` a coordinate, have exploded."""
INFINITE = 1e100
"""What is no less is as good as infinite: its square, which the watch takes of losses, is near the end of floats."""

BLIND = (
    "whether the loss falls: it was not passed; only what is not finite and exploding parameters or gradients are "
    "seen. Pass step(loss=loss) or a closure"
)
SIGHTED = "the loss on other data than the steps', and who would be ahead in the long run: trials are short"


@final
@dataclass(frozen=True)
class Guard:
    """How a learned optimizer is watched.

    Guarantee: with the loss passed, parameters are finite after every step of the learned rule; one that stalls,
    climbs, explodes or does worse than the fallback from the same point gives way to it, and the run then goes on as
    the fallback's, a few percent of its steps late. Trials are short and losses noisy: docs/guard.md has what was
    measured.
    Without the loss, only what is not finite and what explodes is replaced: whether the loss falls is not seen, and the
    report says so. The fallback itself is trusted.

    The state machine is ``Watch``. On top of the rule's memory it needs one number a parameter, and while the fallback
    moves in a trial the fallback's moments.

    Args:
        fallback: makes the safe optimizer from parameter groups, ``lambda params: torch.optim.SGD(params, lr=0.1)``;
            None is AdamW of rate 1e-3, without weight decay.
        warm_up: steps in which the fallback's rate grows to its own, whenever it starts.
        window: steps of a trial, and over which losses are averaged. None is 1/40 of ``num_steps``, from 8 to 32, and
            16 where that is not given.
        collective: whether processes agree where ``torch.distributed`` is set up: they sum the norms and average the
            losses at every step, so all of them must step together. False is for trainings that go on side by side.

    Raises:
        ValueError: ``warm_up`` or ``window`` is too small.
    """

    fallback: MakeOptimizer | None = None
    warm_up: int = 10
    window: int | None = None
    collective: bool = True

    def __post_init__(self) -> None:
        require_count("warm_up", self.warm_up, least=1)
        if self.window is not None:
            require_count("window", self.window, least=6)

    def window_for(self, num_steps: int | None) -> int:
        """Return the steps of a trial in a run of so many steps."""
        return self.window or (16 if num_steps is None else min(32, max(8, num_steps // 40)))


@final
@dataclass(frozen=True)
class GuardReport:
    """What a guard did so far.

    ``hand_overs`` counts all; ``history`` holds the last 16, each ``step, to_learned, reason``. ``skipped`` are steps
    that were not taken, because the gradient or the loss was not finite.
    """

    in_control: str
    trial: bool
    steps: int
    hand_overs: int
    history: tuple[HandOver, ...]
    trials: int
    skipped: int
    without_loss: int
    cannot_see: str

    def __str__(self) -> str:
        """Say it in lines."""
        lines = [
            f"{self.in_control} is in control after {self.steps} steps, {self.hand_overs} hand-overs, {self.trials} "
            f"trials, {self.skipped} steps skipped" + (", in a trial" if self.trial else ""),
            *(
                f"step {h.step}: to the {'learned rule' if h.to_learned else 'fallback'}, {WHY[h.reason]}"
                for h in self.history
            ),
            f"not seen: {self.cannot_see}",
        ]
        return "\n".join(lines)


class Learned(NamedTuple):
    """What a rail asks of the learned rule."""

    step: Callable[[], None]
    """Takes a step."""
    forget: Callable[[], None]
    """Drops the memory: the next step is a first one."""
    at_step: Callable[[int], None]
    """Sets the rule's clock, where it has one: so many steps are behind, its own and others'."""


class Rail:
    """Has every step taken by the learned rule or by the fallback, and keeps a snapshot of the parameters.

    Args:
        guard: the options.
        groups: the optimizer's groups, as they are at present.
        horizon: the steps that the rule was told, where it reads them.
        num_steps: steps of the training, where they are known.
        trusted: whether the rule is known to gain at the end of such a horizon, so that it may stall before.
    """

    def __init__(
        self,
        guard: Guard,
        groups: list[dict[str, Any]],
        horizon: int | None,
        num_steps: int | None,
        *,
        trusted: bool = False,
    ) -> None:
        self.collective: bool = guard.collective
        self.horizon = horizon
        self.fallback: Fallback = Fallback(guard.fallback or adamw, groups, guard.warm_up)
        self.watch: Watch = Watch(guard.window_for(num_steps), trusted)
        self.snapshot: dict[Tensor, Tensor] | None = None
        self.norm: float | None = None
        """The parameters' norm after the last step of the learned rule."""
        self.base: float = 0.0
        """The snapshot's norm."""
        self._before: list[Tensor] = []
        """The groups' parameters in the last step, where all of them can be moved."""
        self._size = 0
        """How many numbers they have here."""

    def add(self, group: dict[str, Any]) -> None:
        """Take over a group that was added."""
        self.fallback.add(group)
        self._take_in(self.movable(group["params"]))

    def step(self, groups: list[dict[str, Any]], loss: Any, learned: Learned) -> None:
        """Take one step, where any process has a gradient; one that has none, or no parameters, is asked as well.

        Args:
            groups: the optimizer's groups.
            loss: the loss before the step, or None.
            learned: the learned rule.
        """
        params, watch = self._seen(groups), self.watch
        before, moved = watch.count, watch.learned_moves
        seen = None if loss is None or _opposed(groups) else _sign(groups) * float(loss)
        seen, size, count = self._agreed(seen, params)
        if not count:
            return
        if self.horizon is not None and watch.step >= self.horizon:
            self._act(watch.past_horizon(), params)
        if not (size < INFINITE and (seen is None or abs(seen) < INFINITE)):
            action = watch.skip()
        elif watch.learned_moves:
            action = self._learned_step(params, seen, size, learned)
        else:
            self.fallback.step(groups)
            self.norm = None
            action = watch.after(seen, size)
        self._act(action, params)
        if watch.phase is Phase.FALLBACK and (moved or before != watch.count):
            learned.forget()
        if watch.phase is Phase.LEARNED and (not moved or before != watch.count):
            self.fallback.cool()
            learned.at_step(watch.step)
        for each in watch.handed[len(watch.handed) - (watch.count - before) :]:
            LOGGER.warning(
                "after step %d the %s moves the parameters: %s", each.step, _NAMES[each.to_learned], WHY[each.reason]
            )

    def finite(self, groups: list[dict[str, Any]]) -> bool:
        """Return whether the gradients are, for all processes the same."""
        return self._agreed(None, self._seen(groups))[1] < INFINITE

    def _learned_step(self, params: list[Tensor], loss: float | None, size: float, learned: Learned) -> Action:
        if self.snapshot is None:
            self._act(Action.SAVE, params)
        learned.step()
        norm, limit = self._norm(params)
        if not math.isfinite(norm):
            return self._unsound(Reason.NOT_FINITE)
        self.norm = norm
        return self._unsound(Reason.EXPLODED) if norm > limit else self.watch.after(loss, size)

    def _unsound(self, reason: Reason) -> Action:
        self.watch.step += 1
        return self.watch.failed(reason)

    def _seen(self, groups: list[dict[str, Any]]) -> list[Tensor]:
        """Return what can be moved of the groups; what is new is taken in."""
        params = [p for group in groups for p in group["params"]]
        taken_in = self.snapshot is None or len(self.snapshot) == len(params)
        if not taken_in or len(params) != len(self._before) or not all(map(operator.is_, params, self._before)):
            found = self.movable(params)
            self._take_in(found)
            # What is lazy may get its shape at any time, and is the same object then.
            self._before = params if len(found) == len(params) else []
            self._size = sum(local(p).numel() for p in found)
            return found
        return params

    def _take_in(self, params: list[Tensor]) -> None:
        """Put into the snapshot what is new, such as lazy parameters that have got their shapes, as it begins."""
        if self.snapshot is not None:
            self.snapshot |= {p: p.detach().clone() for p in params if p not in self.snapshot}

    def _act(self, action: Action, params: list[Tensor]) -> None:
        """Do with parameters and snapshot what the watch says."""
        if action is not Action.NONE:
            with torch.no_grad():
                self._put(action, params)

    def _put(self, action: Action, params: list[Tensor]) -> None:
        if action is Action.SAVE:
            if self.snapshot is None:
                self.snapshot = {p: p.detach().clone() for p in params}
            else:
                for param, saved in self.snapshot.items():
                    saved.copy_(param)
            self.base = self._norm(params)[0] if self.norm is None else self.norm
        elif action in (Action.SWAP, Action.RESTORE) and self.snapshot is not None:
            # Before the learned rule's first step there is none, and nothing to bring back.
            left = {p: p.detach().clone() for p in params} if action is Action.SWAP else self.snapshot
            for param, saved in self.snapshot.items():
                param.copy_(saved)
            self.snapshot, self.norm = left, None
        if action in (Action.RESTORE, Action.FORGET) and self.watch.phase is Phase.FALLBACK:
            self.snapshot = None

    def _agreed(self, loss: float | None, params: list[Tensor]) -> tuple[float | None, float, float]:
        """Return the loss, the gradients' norm and how many there are, for all processes the same."""
        grads = [grad for p in params if (grad := p.grad) is not None]
        size, given = norm_of([g for g in grads if g.layout is torch.strided]), 0.0 if loss is None else loss
        square, count = size * size, float(len(grads))  # infinite where ** would raise
        given, square, share, count = self._sums([given, square, 1.0, count], params)
        return None if loss is None else given / share, math.sqrt(square), count

    def _norm(self, params: list[Tensor]) -> tuple[float, float]:
        """Return the parameters' norm, and above which one they have exploded."""
        here = norm_of(params)
        square, size = self._sums([here * here, float(self._size)], params)
        return math.sqrt(square), EXPLODED * max(self.base, SMALL * math.sqrt(size))

    def _sums(self, numbers: list[float], params: list[Tensor]) -> list[float]:
        if not self.collective or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return numbers
        found = torch.tensor(numbers, dtype=torch.float32, device=_device(params))
        dist.all_reduce(found)  # pyright: ignore[reportUnknownMemberType] - torch gives it no types
        return tree.numbers(found)

    @staticmethod
    def movable(params: list[Tensor]) -> list[Tensor]:
        """Return the parameters that can be moved, as the snapshot has them."""
        return [p for p in params if not is_lazy(p) and p.is_floating_point()]

    def report(self) -> GuardReport:
        """Return what happened so far."""
        watch = self.watch
        return GuardReport(
            in_control="the learned rule" if watch.learned_controls else "the fallback",
            trial=watch.phase in (Phase.FIRST_TRY, Phase.TRIAL, Phase.RETURN_TRY),
            steps=watch.step,
            hand_overs=watch.count,
            history=tuple(watch.handed),
            trials=watch.trials,
            skipped=watch.skipped,
            without_loss=watch.blind,
            cannot_see=BLIND if watch.blind else SIGHTED,
        )


_NAMES = {True: "learned rule", False: "fallback"}


def _sign(groups: list[dict[str, Any]]) -> float:
    return -1.0 if groups[0].get("maximize") else 1.0


def _opposed(groups: list[dict[str, Any]]) -> bool:
    return len({bool(group.get("maximize")) for group in groups}) > 1


def _device(params: list[Tensor]) -> torch.device:
    """Return where processes can sum numbers; one of ``ZeroRedundancyOptimizer`` may have no parameters."""
    if params:
        return params[0].device
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
