"""The guard: its state machine on made-up losses, and learned rules that fail, with and without it."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from learnedopt import Guard, LearnedOptimizer, UpdateRule
from learnedopt.core.tree import Params, Theta
from learnedopt.optimizers import Clip, Partition, make
from learnedopt.plug_in.fallback import Fallback, adamw
from learnedopt.plug_in.guard_state import packed, unpacked
from learnedopt.plug_in.levels import level
from learnedopt.plug_in.phases import Action, Phase, Reason
from learnedopt.plug_in.watch import Watch

WINDOW = 8


class Line(UpdateRule):
    """Steps of ``rate`` against the gradient; from step ``turns`` on, of ``later`` times the rate."""

    def __init__(self, rate: float, turns: int = 10**6, later: float = 1.0) -> None:
        self.rate, self.turns, self.later = rate, turns, later

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"rate": torch.tensor(self.rate)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"step": torch.zeros(())}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        rate = torch.where(state["step"] >= self.turns, self.later * theta["rate"], theta["rate"])
        return {k: -rate.to(g.dtype) * g for k, g in grads.items()}, {"step": state["step"] + 1}


class Told(Line):
    """The same, told how far the run is."""

    reads_horizon = True

    def update(self, *arguments: Any, progress: Tensor) -> tuple[Params, Any]:
        return super().update(*arguments)


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Linear(6, 1)


def loss_of(net: nn.Module, step: int) -> Tensor:
    """A batch of noisy regression."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(32, 6, generator=generator)
    return ((net(inputs).squeeze(1) - inputs.sum(1) + 0.1 * torch.randn(32, generator=generator)) ** 2).mean()


def ruled(net: nn.Module, rule: UpdateRule, **options: Any) -> LearnedOptimizer:
    theta = rule.init_theta(torch.Generator().manual_seed(0))
    return LearnedOptimizer(net.named_parameters(), (rule, theta), **options)


def sgd(groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.02, momentum=0.5)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range, told: bool = True) -> list[float]:
    losses = []
    for step in steps:
        loss = loss_of(net, step)
        optimizer.zero_grad()
        loss.backward()
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.step(loss=loss if told else None)
        else:
            optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def feed(watch: Watch, losses: Iterable[float]) -> list[Action]:
    return [watch.after(loss, 1.0) for loss in losses]


def zigzag(mean: float, noise: float, count: int = WINDOW) -> list[float]:
    return [mean + noise * (-1) ** i for i in range(count)]


def won(watch: Watch) -> None:
    """Have the learned rule win the first trial, far ahead of a fallback that hardly moves."""
    assert feed(watch, zigzag(1.0, 0.01))[-1] is Action.SWAP
    assert watch.phase is Phase.TRIAL
    assert not watch.learned_moves
    assert feed(watch, zigzag(5.0, 0.01))[-1] is Action.SWAP  # the snapshot is the fallback's own end
    assert watch.phase is Phase.LEARNED
    assert watch.probation


def test_a_level_is_the_mean_the_slope_and_the_noise_of_neighbours() -> None:
    found = level([3.0, 2.0, 1.0, 0.0])
    assert found.mean == 1.5
    assert found.slope == pytest.approx(-1.0)
    assert found.variance == pytest.approx(3 / 6 / 4, rel=1e-6)
    assert found.ahead(2) == pytest.approx(-0.5)
    assert level([0.0, 1.0]).ahead(5) == 0.5  # what rises is not looked ahead of


def test_the_first_trial_goes_to_the_better_leg_and_a_draw_to_the_fallback() -> None:
    watch = Watch(WINDOW)
    won(watch)
    draw = Watch(WINDOW)
    feed(draw, zigzag(1.0, 0.1))
    assert feed(draw, zigzag(1.0, 0.1))[-1] is Action.FORGET
    assert draw.phase is Phase.FALLBACK
    assert [(h.to_learned, h.reason) for h in draw.handed] == [(False, Reason.WORSE)]


def test_a_fallback_that_is_on_its_way_past_gets_another_leg() -> None:
    watch = Watch(WINDOW)
    feed(watch, zigzag(1.0, 0.001))
    falling = [3.0 - 0.2 * i for i in range(2 * WINDOW)]
    actions = feed(watch, falling)
    assert actions[WINDOW - 1] is Action.NONE
    assert watch.phase is Phase.FALLBACK
    assert watch.trials == 1


def test_a_leg_that_rises_is_broken_off() -> None:
    watch = Watch(WINDOW)
    actions = feed(watch, [1.0, 1.01, 2.0, 3.0, 4.0, 5.0])
    assert Action.RESTORE in actions
    assert watch.handed[0].reason is Reason.CLIMBS
    assert watch.handed[0].step <= 6


def test_after_a_stall_the_fallback_goes_on_from_its_own_end_and_wins_if_it_passes() -> None:
    watch = Watch(WINDOW)
    won(watch)
    actions: list[Action] = []
    while watch.phase is Phase.LEARNED:
        actions += feed(watch, zigzag(0.9, 0.01))
    assert set(actions) == {Action.NONE, Action.SWAP}  # no other snapshot is saved: it is the fallback's own end
    assert actions[-1] is Action.SWAP
    assert Action.FORGET in feed(watch, [1.1 - 0.05 * i for i in range(2 * WINDOW)])
    assert watch.phase is Phase.FALLBACK


def test_a_rule_that_has_fallen_as_far_as_it_goes_is_left_after_one_more_window() -> None:
    watch = Watch(WINDOW)
    feed(watch, [30.0] * (WINDOW // 2) + zigzag(2.3, 0.01, WINDOW - WINDOW // 2))
    feed(watch, zigzag(20.0, 0.01))
    assert watch.phase is Phase.LEARNED
    assert feed(watch, zigzag(2.3, 0.01))[-1] is Action.SWAP  # its first leg ended there: nothing was gained
    assert watch.phase is Phase.TRIAL


def test_a_return_that_leaps_is_broken_off_however_wild_it_is() -> None:
    watch = Watch(WINDOW)
    feed(watch, zigzag(1.0, 0.1, 2 * WINDOW))
    while watch.phase is Phase.FALLBACK:
        watch.after(1.0 + 0.01 * (-1) ** watch.step, 1.0)
    before = watch.step
    while watch.phase is Phase.RETURN_TRY:
        action = watch.after(20.0 + 15.0 * (-1) ** watch.step, 1.0)
    assert watch.phase is Phase.FALLBACK
    assert action is Action.RESTORE
    assert watch.step == before + 5


def test_the_learned_rule_does_not_come_back_while_the_fallback_gains() -> None:
    watch = Watch(WINDOW)
    feed(watch, zigzag(1.0, 0.1, 2 * WINDOW))
    for i in range(40):
        feed(watch, zigzag(1.0 - 0.02 * i, 0.001))
    assert watch.phase is Phase.FALLBACK
    assert watch.step > watch.due
    feed(watch, zigzag(0.22, 0.001, 2 * WINDOW))
    assert watch.phase is Phase.RETURN_TRY


def test_a_rule_that_passed_is_not_handed_over_while_it_falls_and_is_where_it_climbs() -> None:
    watch = Watch(WINDOW)
    won(watch)
    losses = iter([0.9, 0.8, 0.7, 0.6])
    while watch.phase is Phase.LEARNED:
        feed(watch, zigzag(next(losses), 0.01))
    assert feed(watch, zigzag(5.0, 0.01))[-1] is Action.RESTORE
    assert not watch.probation
    assert feed(watch, zigzag(0.5, 0.01))[-1] is Action.SAVE
    assert Action.RESTORE in feed(watch, zigzag(0.9, 0.01, 2 * WINDOW))
    assert watch.handed[-1].reason is Reason.CLIMBS
    assert watch.count == 1


def test_the_learned_rule_comes_back_if_it_does_better_and_stays_away_after_two_strikes() -> None:
    watch = Watch(WINDOW)
    feed(watch, zigzag(1.0, 0.1))
    feed(watch, zigzag(1.0, 0.1))
    back, away = copy.deepcopy(watch), watch
    for each in (back, away):
        while each.phase is Phase.FALLBACK:
            each.after(1.0 + 0.01 * (-1) ** each.step, 1.0)
        assert each.phase is Phase.RETURN_TRY
        assert each.step == 4 * 2 * WINDOW
    feed(back, zigzag(0.5, 0.01))
    assert back.phase is Phase.LEARNED
    assert back.handed[-1].reason is Reason.BETTER
    feed(away, zigzag(1.0, 0.01))
    assert away.phase is Phase.FALLBACK
    feed(away, zigzag(1.0, 0.01, 1000))
    assert away.trials == 2


def test_without_losses_there_is_no_trial_and_exploding_gradients_hand_over() -> None:
    watch = Watch(WINDOW)
    for _ in range(5 * WINDOW):
        watch.after(None, 1.0)
    assert watch.phase is Phase.LEARNED
    assert watch.trials == 0
    actions = [watch.after(None, 1e4) for _ in range(2 * WINDOW)]
    assert actions[-1] is Action.RESTORE
    assert watch.handed[0].reason is Reason.EXPLODED


def test_a_watch_goes_through_numbers_and_back() -> None:
    watch = Watch(WINDOW, anneals=True)
    won(watch)
    feed(watch, zigzag(0.9, 0.01, WINDOW + 3))
    numbers, rows = packed(watch)
    assert unpacked(numbers, rows) == watch
    fresh = packed(Watch(WINDOW))
    assert (len(fresh[0]), len(fresh[1])) == (len(numbers), len(rows))


def test_without_a_guard_the_rule_is_bare_to_the_bit() -> None:
    bare, plain = model(), model()
    train(bare, ruled(bare, Line(0.05), guard=False), range(50))
    for step in range(50):
        plain.zero_grad()
        loss_of(plain, step).backward()
        for p in plain.parameters():
            p.data += -torch.tensor(0.05) * p.grad  # pyright: ignore
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), plain.parameters(), strict=True))


def test_a_guarded_rule_that_is_better_is_the_bare_one_but_for_the_fallbacks_legs() -> None:
    net, bare = model(), model()
    optimizer = ruled(net, Line(0.1), guard=Guard(window=WINDOW))
    train(net, optimizer, range(WINDOW))
    train(net, optimizer, range(1000, 1000 + WINDOW))  # the fallback's
    train(net, optimizer, range(WINDOW, 2 * WINDOW))
    train(bare, ruled(bare, Line(0.1), guard=False), range(2 * WINDOW))
    assert optimizer.guard_report().hand_overs == 0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), bare.parameters(), strict=True))


FAULTY: dict[str, Callable[[], UpdateRule]] = {
    "climbs from the start": lambda: Line(-0.05),
    "explodes": lambda: Line(1e6),
    "not finite": lambda: Line(math.nan),
    "climbs later": lambda: Line(0.1, 60, -0.2),
    "explodes later": lambda: Line(0.1, 60, 1e30),
    "not finite later": lambda: Line(0.1, 60, math.nan),
    "stalls at once": lambda: Line(0.0),
    "stalls later": lambda: Line(0.01, 30, 0.0),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_a_rule_that_fails_ends_where_the_fallback_does(kind: str) -> None:
    steps = range(250)
    alone, net, bare = model(), model(), model()
    train(alone, sgd([{"params": [*alone.parameters()]}]), steps)
    optimizer = ruled(net, FAULTY[kind](), guard=Guard(sgd, window=WINDOW))
    train(net, optimizer, steps)
    train(bare, ruled(bare, FAULTY[kind](), guard=False), steps)
    with torch.no_grad():
        ends = [sum(float(loss_of(each, 10_000 + i)) for i in range(20)) / 20 for each in (alone, net, bare)]
    assert ends[1] <= 1.05 * ends[0]
    assert not ends[2] <= 1.5 * ends[0]  # the bare rule does fail
    report = optimizer.guard_report()
    assert report.in_control == "the fallback"
    assert report.hand_overs == 1 == len(report.history)


@pytest.mark.parametrize("kind", ["explodes", "not finite", "explodes later", "not finite later"])
def test_without_the_loss_what_explodes_is_replaced_and_the_report_says_what_is_not_seen(kind: str) -> None:
    net = model()
    optimizer = ruled(net, FAULTY[kind](), guard=Guard(sgd, window=WINDOW))
    train(net, optimizer, range(100), told=False)
    report = optimizer.guard_report()
    assert report.history[0].reason in (Reason.EXPLODED, Reason.NOT_FINITE)
    assert all(p.isfinite().all() for p in net.parameters())
    assert report.without_loss > 0
    assert "whether the loss falls" in str(report)


def test_every_hand_over_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    net = model()
    with caplog.at_level(logging.WARNING, "learnedopt"):
        optimizer = ruled(net, Line(-0.05), guard=Guard(sgd, window=WINDOW))
        train(net, optimizer, range(60))
    assert len(caplog.records) == optimizer.guard_report().hand_overs == 1
    assert "the fallback moves the parameters: the loss climbs" in caplog.text


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    net = model()
    optimizer = ruled(net, make("adam"), guard=Guard(window=WINDOW))
    train(net, optimizer, range(3))
    before = copy.deepcopy((net.state_dict(), [dict(x) for x in optimizer.state.values()]))
    loss = loss_of(net, 3)
    loss.backward()
    next(net.parameters()).grad.view(-1)[0] = math.nan  # pyright: ignore
    optimizer.step(loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), net.state_dict().values(), strict=True))
    assert str(before[1]) == str([dict(x) for x in optimizer.state.values()])
    assert optimizer.guard_report().skipped == 1
    train(net, optimizer, range(4, 8))
    assert all(p.isfinite().all() for p in net.parameters())


def test_gradients_that_are_never_finite_move_nothing_and_raise_nothing() -> None:
    net = model()
    optimizer = ruled(net, make("adam"), guard=Guard(window=WINDOW))
    before = copy.deepcopy(net.state_dict())
    for step in range(5):
        optimizer.zero_grad()
        loss = loss_of(net, step)
        (loss * math.nan).backward()
        optimizer.step(loss=loss)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    report = optimizer.guard_report()
    assert (report.in_control, report.skipped) == ("the fallback", 5)
    assert report.history[0].reason is Reason.NOT_FINITE


PHASES = {"first try": 3, "first trial": 11, "probation": 19, "later": 120}


@pytest.mark.parametrize("after", PHASES)
@pytest.mark.parametrize("kind", ["good", "stalls later", "climbs from the start"])
@pytest.mark.parametrize("how", ["state dict", "pickle", "deepcopy"])
def test_training_goes_on_to_the_bit_from_every_phase(after: str, kind: str, how: str) -> None:
    def made(net: nn.Module) -> LearnedOptimizer:
        rule = make("adam", lr=0.05) if kind == "good" else FAULTY[kind]()
        return ruled(net, rule, guard=Guard(window=WINDOW))

    net = model()
    optimizer = made(net)
    train(net, optimizer, range(PHASES[after]))
    if how == "state dict":
        file = io.BytesIO()
        torch.save((net.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        values, state = torch.load(file, weights_only=True)
        other = model()
        other.load_state_dict(values)
        resumed = made(other)
        resumed.load_state_dict(state)
    elif how == "pickle":
        other, resumed = pickle.loads(pickle.dumps((net, optimizer)))
    else:
        other, resumed = copy.deepcopy((net, optimizer))
    rest = range(PHASES[after], PHASES[after] + 40)
    assert train(net, optimizer, rest) == train(other, resumed, rest)
    assert optimizer.guard_report() == resumed.guard_report()


def test_a_state_dict_is_not_changed_by_later_steps() -> None:
    net = model()
    optimizer = ruled(net, Line(0.1), guard=Guard(window=WINDOW))
    train(net, optimizer, range(WINDOW + 2))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    train(net, optimizer, range(40))
    assert str(saved) == str(before)


def test_a_rate_of_zero_moves_nothing_and_a_factor_is_the_fallbacks_too() -> None:
    net, half, whole = model(), model(), model()
    start = copy.deepcopy(net.state_dict())
    train(net, ruled(net, Line(0.1), lr=0.0), range(30))
    assert all(torch.equal(a, b) for a, b in zip(start.values(), net.state_dict().values(), strict=True))
    train(half, ruled(half, Line(math.nan), lr=0.5, guard=Guard(sgd, warm_up=1)), range(3))
    # The first step is lost, and the next two are SGD's at half its rate.
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.01, momentum=0.5)
    train(whole, optimizer, range(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(half.parameters(), whole.parameters(), strict=True))


def test_groups_can_be_added_and_parameters_without_a_gradient_stay() -> None:
    first, second = model(), model()
    optimizer = ruled(first, Line(math.nan), guard=Guard(sgd, window=WINDOW))
    optimizer.add_param_group({"params": [("second." + k, p) for k, p in second.named_parameters()]})
    before = copy.deepcopy(second.state_dict())
    for step in range(20):
        optimizer.zero_grad()
        loss = loss_of(first, step)
        loss.backward()
        optimizer.step(loss=loss)
    assert optimizer.guard_report().in_control == "the fallback"
    assert all(torch.equal(a, b) for a, b in zip(before.values(), second.state_dict().values(), strict=True))


def test_a_rate_of_zero_does_not_let_what_is_not_finite_into_the_memory() -> None:
    net = model()
    optimizer = ruled(net, make("adam"), lr=0.0, guard=Guard(window=WINDOW))  # as a warm-up begins
    loss = loss_of(net, 0)
    (loss * math.inf).backward()
    optimizer.step(loss=loss)
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 1.0
    train(net, optimizer, range(1, 4))
    assert optimizer.guard_report().hand_overs == 0


@pytest.mark.parametrize("huge", ["gradient", "parameter", "loss"])
def test_doubles_whose_squares_are_none_are_infinite(huge: str) -> None:
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    rule = Line(1e199 if huge == "parameter" else 0.1)
    optimizer = LearnedOptimizer([param], (rule, {"rate": torch.tensor(rule.rate, dtype=torch.float64)}))
    loss = torch.tensor(1e200 if huge == "loss" else 1.0, dtype=torch.float64)
    for _ in range(6):
        param.grad = torch.full_like(param, 1e200 if huge == "gradient" else 10.0)
        optimizer.step(loss=loss)
    assert optimizer.guard_report().history[0].reason is Reason.NOT_FINITE
    assert float(param.detach()) < 2


def test_lazy_parameters_may_get_their_shapes_in_the_midst_of_a_trial() -> None:
    net = nn.ModuleDict({"first": model(), "late": nn.LazyLinear(1)})
    optimizer = ruled(net, make("adam", lr=0.3), guard=Guard(sgd, window=WINDOW))
    for step in range(4 * WINDOW):
        optimizer.zero_grad()
        loss = loss_of(net["first"], step) + (loss_of(net["late"], step) if step >= 3 else 0)
        loss.backward()
        optimizer.step(loss=loss)
    assert optimizer.guard_report().trials >= 1
    assert all(p.isfinite().all() for p in net.parameters())


def test_what_is_lazy_cannot_be_moved_until_it_has_a_shape() -> None:
    net = nn.ModuleDict({"first": model(), "late": nn.LazyLinear(1)})
    optimizer = ruled(net, make("adam", lr=0.3))
    rail = optimizer._rail
    assert rail is not None
    for _ in range(2):
        assert [p.numel() for p in rail._seen(optimizer.param_groups)] == [6, 1]
    net["late"](torch.zeros(2, 3))
    for _ in range(2):
        assert [p.numel() for p in rail._seen(optimizer.param_groups)] == [6, 1, 3, 1]


def test_parameters_that_begin_at_zero_do_not_explode_by_their_first_steps() -> None:
    net = model()
    for p in net.parameters():
        nn.init.zeros_(p)
    optimizer = ruled(net, make("sgd", lr=0.1), guard=Guard(sgd, window=WINDOW))
    train(net, optimizer, range(WINDOW))
    assert optimizer.guard_report().hand_overs == 0


def test_the_fallback_takes_off_the_weight_decay_of_the_groups() -> None:
    net = model()
    optimizer = ruled(net, Line(math.nan), weight_decay=0.1, guard=Guard(sgd, warm_up=1))
    train(net, optimizer, range(1))
    alone = copy.deepcopy(net)
    plain = sgd([{"params": [*alone.parameters()]}])

    def decay(*_: Any) -> None:
        for p in alone.parameters():
            p.data.mul_(1 - 0.1)

    plain.register_step_pre_hook(decay)
    train(net, optimizer, range(1, 6))
    train(alone, plain, range(1, 6))
    for mine, its in zip(net.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("at", [2, WINDOW + 2, 3 * WINDOW + 2], ids=["first leg", "trial", "probation"])
def test_a_parameter_that_is_put_in_another_s_place_is_watched_and_comes_back(at: int) -> None:
    net = model()
    optimizer = ruled(net, make("sgd", lr=0.1), guard=Guard(sgd, window=WINDOW))
    train(net, optimizer, range(at))
    rail = optimizer._rail
    assert rail is not None and optimizer.guard_report().hand_overs == 0
    other = nn.Parameter(torch.randn(1, 6, generator=torch.Generator().manual_seed(1)))
    net.weight = optimizer.param_groups[0]["params"][0] = other
    begun = other.detach().clone()
    step = at
    while rail.watch.learned_controls:
        before = other.detach().clone()
        optimizer.param_groups[0]["lr"] = 1e4 if rail.watch.learned_moves else 1.0
        train(net, optimizer, range(step, step + 1))
        step += 1
    assert optimizer.guard_report().history[0].reason is Reason.EXPLODED
    assert any(torch.equal(other, kept) for kept in (begun, before))


def test_a_group_that_the_fallback_refuses_leaves_no_trace() -> None:
    net = model()
    optimizer = ruled(net, Line(0.1), guard=Guard(lambda groups: torch.optim.Rprop(groups), window=WINDOW))
    optimizer._rail.fallback.optimizer.param_groups[0].pop("maximize")  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ValueError, match="which the guard's fallback cannot do"):
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2)))], "maximize": True})
    assert len(optimizer.param_groups) == 1
    train(net, optimizer, range(3))


def test_a_rule_that_had_no_guard_goes_on_under_one_from_the_step_that_it_is_at() -> None:
    first, net = model(), model()
    bare = LearnedOptimizer(first.named_parameters(), "normalised-mlp-mnist", num_steps=60, guard=False)
    train(first, bare, range(40))
    optimizer = LearnedOptimizer(net.named_parameters(), "normalised-mlp-mnist", num_steps=60)
    optimizer.load_state_dict(bare.state_dict())
    train(net, optimizer, range(1))
    assert optimizer.guard_report().steps == 41
    train(net, optimizer, range(41, 62))
    assert optimizer.guard_report().in_control == "the fallback"  # past the horizon


@pytest.mark.parametrize("around", ["clip", "partition"])
def test_clocks_inside_other_rules_count_the_steps_of_the_fallback_too(around: str) -> None:
    net = model()
    rule = Clip(Told(0.1), 100.0) if around == "clip" else Partition({"all": ("*", Told(0.1))})
    hardly = Guard(lambda groups: torch.optim.SGD(groups, lr=1e-6), window=WINDOW)
    optimizer = ruled(net, rule, num_steps=400, guard=hardly)
    train(net, optimizer, range(2 * WINDOW + 1))
    assert optimizer.guard_report().in_control == "the learned rule"
    horizons = [(entry, key) for entry in optimizer.state.values() for key in entry if key.endswith(".horizon")]
    assert [int(entry[key.removesuffix("horizon") + "step"]) for entry, key in horizons] == [2 * WINDOW + 1]


def test_a_closure_is_called_once_and_its_loss_is_seen() -> None:
    net, calls = model(), []
    optimizer = ruled(net, Line(-0.05), guard=Guard(sgd, window=WINDOW))

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = loss_of(net, len(calls))
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    assert len(calls) == 20
    assert optimizer.guard_report().history[0].reason is Reason.CLIMBS
    assert optimizer.guard_report().without_loss == 0


def test_past_its_horizon_a_rule_that_reads_it_gives_way() -> None:
    net = model()
    optimizer = LearnedOptimizer(net.named_parameters(), "normalised-mlp-mnist", num_steps=60)
    train(net, optimizer, range(70), told=False)  # no trial hands over before
    assert [tuple(h) for h in optimizer.guard_report().history] == [(60, False, Reason.HORIZON)]
    assert optimizer.guard_report().in_control == "the fallback"


@pytest.mark.parametrize(
    ("fallback", "error", "words"),
    [
        (lambda groups: "adam", TypeError, "no torch.optim.Optimizer"),
        (lambda groups: torch.optim.SGD(model().parameters(), lr=0.1), ValueError, "moves other parameters"),
        (torch.optim.LBFGS, TypeError, "must have a closure"),
    ],
    ids=["no optimizer", "other parameters", "closure"],
)
def test_a_fallback_that_cannot_be_one_is_refused(fallback: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ruled(model(), Line(0.1), guard=Guard(fallback))


@pytest.mark.parametrize(
    "options", [{"warm_up": 0}, {"window": 2}, {"window": 8.5}], ids=["warm-up", "window", "float"]
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not a count"):
        Guard(**options)


@pytest.mark.parametrize("guard", [None, 5, "yes", Guard], ids=["none", "number", "text", "class"])
def test_what_is_no_guard_is_refused(guard: Any) -> None:
    with pytest.raises(TypeError, match="is no guard; pass True, False, or"):
        ruled(model(), Line(0.1), guard=guard)


def test_there_is_no_report_without_a_guard() -> None:
    with pytest.raises(ValueError, match="guard=False"):
        ruled(model(), Line(0.1), guard=False).guard_report()


def test_a_state_saved_under_the_fallback_is_refused_without_a_guard() -> None:
    net = model()
    optimizer = ruled(net, Line(math.nan))
    train(net, optimizer, range(5))
    with pytest.raises(ValueError, match="guard=True"):
        ruled(model(), Line(0.1), guard=False).load_state_dict(optimizer.state_dict())


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "watch": lambda entry: entry.update({"guard.watch": entry["guard.watch"][1:]}),
    "history": lambda entry: entry.pop("guard.history"),
    "snapshot": lambda entry: entry.update({"guard.snapshot": torch.zeros(2)}),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused_and_nothing_is_changed(what: str) -> None:
    net = model()
    optimizer = ruled(net, Line(0.1), guard=Guard(sgd, window=WINDOW))
    train(net, optimizer, range(WINDOW + 2))
    before, damaged = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    DAMAGE[what](damaged["state"][0])
    with pytest.raises(ValueError, match=r"damaged|snapshot in this state"):
        optimizer.load_state_dict(damaged)
    assert str(optimizer.state_dict()) == str(before)


def test_moments_of_another_fallback_are_refused() -> None:
    net = model()
    optimizer = ruled(net, Line(math.nan), guard=Guard(sgd, window=WINDOW))
    train(net, optimizer, range(5))
    with pytest.raises(ValueError, match="another fallback than the guard's AdamW"):
        ruled(model(), Line(0.1)).load_state_dict(optimizer.state_dict())


def test_moments_are_taken_to_where_the_parameters_are() -> None:
    param = nn.Parameter(torch.zeros(3, device="meta"))
    fallback = Fallback(adamw, [{"params": [param]}], 1)
    fallback.recall(param, {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)})
    found = fallback.optimizer.state[param]
    assert {k: x.device.type for k, x in found.items()} == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


def one_of_two(rank: int, file: str) -> None:
    """Train on this process's own batches, with gradients averaged; say where that ends, and what the guard did."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    net = model()
    optimizer = ruled(net, Line(0.1, 30, -2.0), guard=Guard(sgd, window=WINDOW))
    for step in range(100):
        loss = loss_of(net, 2 * step + rank)
        optimizer.zero_grad()
        loss.backward()
        for p in net.parameters():
            distributed.all_reduce(p.grad)
            p.grad /= 2  # pyright: ignore
        optimizer.step(loss=loss)
    report = optimizer.guard_report()
    ends = [p.detach() for p in net.parameters()]
    torch.save([ends, [tuple(h) for h in report.history], report.trials], f"{file}.{rank}")
    distributed.destroy_process_group()


def test_processes_with_losses_of_their_own_decide_alike(tmp_path: Path) -> None:
    multiprocessing.spawn(one_of_two, (str(tmp_path / "meet"),), nprocs=2)  # pyright: ignore
    first, second = (torch.load(tmp_path / f"meet.{rank}", weights_only=False) for rank in range(2))
    assert first[1:] == second[1:]
    assert first[1]
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
