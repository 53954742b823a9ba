"""Tiny families and awkward rules in float64, shared by the tests of the engine."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt import Execution, InnerLoop, InnerObjective, Proximal, TaskFamily, Tasks, Theta, UpdateRule, optimizers
from learnedopt.core.group import Group
from learnedopt.core.tree import Params

FLOAT = torch.float64
EIGENVALUES = (0.5, 0.8, 1.2, 1.7, 2.5)


def newcomers(group: Group, listed: Collection[Any], *options: Any, besides: Collection[str] = ()) -> dict[str, Any]:
    """Return one of each registered class that nobody has listed an instance of: its line in the registry enrols it.

    Args:
        group: the registry.
        listed: the instances that a test walks over.
        options: what one is made with by default; whoever needs others is listed.
        besides: names that the test leaves out on purpose.
    """
    kinds = [type(each) for each in listed]
    new = [kind for kind in group if isinstance(kind, type) and kind not in kinds and kind.__name__ not in besides]
    return {kind.__name__: kind(*options) for kind in new}


class Quadratic(TaskFamily):
    """``x'Hx/2 - c'x + 9`` on x = (w, b) in five dimensions; c differs by split, and drifts with the step."""

    def __init__(self, drift: float = 0.3, eigenvalues: tuple[float, ...] = EIGENVALUES) -> None:
        self.drift, self.eigenvalues = drift, torch.tensor(eigenvalues, dtype=FLOAT)

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        def normal(*shape: int) -> Tensor:
            return torch.randn(num_tasks, *shape, generator=generator, dtype=FLOAT)

        q = torch.linalg.qr(normal(5, 5)).Q
        hessian = q @ torch.diag(self.eigenvalues) @ q.mT
        return {"hessian": (hessian + hessian.mT) / 2, "c": normal(2, 5), "x": normal(5), "features": normal(6, 5)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w": tasks["x"][:, :4].reshape(-1, 2, 2), "b": tasks["x"][:, 4:]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        wave = self.drift * torch.sin(torch.arange(5, dtype=FLOAT) + step)
        c = tasks["c"][:, int(split == "valid")] + wave
        return {"hessian": tasks["hessian"], "c": c, "features": tasks["features"]}

    def loss(self, params: Params, batch: Any) -> Tensor:
        x = join(params)
        return 0.5 * x @ (batch["hessian"] @ x) - batch["c"] @ x + 9

    def outputs(self, params: Params, batch: Any) -> Tensor:
        return (batch["features"] @ join(params)).reshape(2, 3)

    def metrics(self, params: Params, batch: Any) -> dict[str, Tensor]:
        return {"length": join(params).norm()}


class TanhMLP(TaskFamily):
    """Cross-entropy of a two-layer tanh network with 3 units on 5 points with 2 features and 2 classes."""

    normalize = False

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        shapes = {"x": (5, 2), "w1": (2, 3), "w2": (3, 2)}
        tasks = {k: torch.randn(num_tasks, *s, generator=generator, dtype=FLOAT) for k, s in shapes.items()}
        return {**tasks, "y": torch.randint(2, (num_tasks, 5), generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w1": tasks["w1"], "b1": 0.1 * tasks["w1"][:, 0], "w2": tasks["w2"]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        wave = 0.5 * torch.sin(torch.arange(10, dtype=FLOAT) + step).reshape(5, 2)
        return {"x": tasks["x"] * (1.3 if split == "valid" else 1.0) + wave, "y": tasks["y"]}

    def outputs(self, params: Params, batch: Any) -> Tensor:
        hidden = batch["x"] @ params["w1"] + params["b1"]
        return (functional.layer_norm(hidden, (3,), eps=0.3) if self.normalize else hidden).tanh() @ params["w2"]

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(self.outputs(params, batch), batch["y"])


class LayerNormMLP(TanhMLP):
    """The same with layer normalisation, whose second derivatives not every mode of torch gets right."""

    normalize = True

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return super().batch(tasks, 0, split)  # one batch, so that there is a solution


class Labelled(TaskFamily):
    """Two logits of 8 points with 3 features, the first of them 0; what inner objectives of examples read is there."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        x = torch.randn(num_tasks, 2, 8, 3, generator=generator, dtype=FLOAT)
        start = torch.randn(num_tasks, 4, generator=generator, dtype=FLOAT)
        return {"x": x, "start": start, "y": torch.randint(2, (num_tasks, 8), generator=generator)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w": tasks["start"][:, :3], "b": tasks["start"][:, 3:]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        wave = 0.3 * torch.sin(torch.arange(24, dtype=FLOAT) + step).reshape(8, 3)
        order = torch.tensor([3, 0, 4, 7, 1, 6, 2, 5]).expand(len(tasks["y"]), 8)
        return {"inputs": tasks["x"][:, int(split == "valid")] + wave, "targets": tasks["y"], "index": order}

    def outputs(self, params: Params, batch: Any) -> Tensor:
        logits = batch["inputs"] @ params["w"] + params["b"]
        return torch.stack([torch.zeros_like(logits), logits], dim=-1)

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.cross_entropy(self.outputs(params, batch), batch["targets"])


class Logistic(TaskFamily):
    """Logistic regression on 6 points with 3 features; not regularised: a rule does that."""

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        x = torch.randn(num_tasks, 2, 6, 3, generator=generator, dtype=FLOAT)
        return {"x": x, "y": torch.randint(2, (num_tasks, 2, 6), generator=generator).to(FLOAT)}

    def init_params(self, tasks: Tasks) -> Params:
        return {"w": 0.1 * tasks["x"][:, 0, 0]}

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        return {k: v[:, int(split == "valid")] for k, v in tasks.items()}

    def loss(self, params: Params, batch: Any) -> Tensor:
        return functional.binary_cross_entropy_with_logits(batch["x"] @ params["w"], batch["y"])


class Mix(TaskFamily):
    """Tasks of several families of different shapes: a member's number and a seed each."""

    def __init__(self, *members: TaskFamily) -> None:
        self._members = members

    @property
    def families(self) -> tuple[TaskFamily, ...]:
        return self._members

    def sample(self, num_tasks: int, generator: torch.Generator) -> Tasks:
        drawn = torch.randint(len(self._members), (num_tasks,), generator=generator)
        return {"member": drawn, "seed": torch.randint(2**31, (num_tasks,), generator=generator)}

    def split(self, tasks: Tasks) -> list[tuple[TaskFamily, Tasks, list[int]]]:
        found = []
        for i, family in enumerate(self._members):
            places = [j for j, member in enumerate(tasks["member"].tolist()) if member == i]
            each = [family.sample(1, torch.Generator().manual_seed(int(tasks["seed"][j]))) for j in places]
            if places:
                found.append((family, {k: torch.cat([x[k] for x in each]) for k in each[0]}, places))
        return found

    def init_params(self, tasks: Tasks) -> Params:
        raise ValueError("tasks of different shapes cannot be run together")

    def batch(self, tasks: Tasks, step: int, split: str) -> Any:
        raise ValueError("tasks of different shapes cannot be run together")

    def loss(self, params: Params, batch: Any) -> Tensor:
        raise ValueError("tasks of different shapes cannot be run together")


class Scheduled(UpdateRule):
    """Momentum whose rate falls over the horizon; its meta-parameters are on different scales."""

    reads_horizon = True

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {k: torch.tensor(x, dtype=FLOAT) for k, x in (("log_lr", -2.5), ("slope", 0.4), ("logit", 0.2))}

    def theta_scale(self) -> dict[str, float | Tensor]:
        return {"log_lr": 0.25, "slope": 3.0}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {k: torch.zeros_like(p) for k, p in params.items()}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor, *, progress: Tensor) -> Any:
        slow = {k: theta["logit"].sigmoid() * state[k] + g for k, g in grads.items()}
        rate = (theta["log_lr"] - theta["slope"] * progress).exp()
        return {k: -rate * m for k, m in slow.items()}, slow


class Anchored(UpdateRule):
    """Descent pulled towards the learned start, which only the state remembers; handed on untouched and reordered.

    The state is a dict whose order changes at each step, with a leaf that is passed through as it is, a flag and a
    count: what segments, step maps and vmap must all carry.
    """

    def init_theta(self, generator: torch.Generator) -> Theta:
        start = torch.linspace(-1, 1, 5, dtype=FLOAT)
        return {"start": start, "pull": torch.tensor(0.4, dtype=FLOAT), "decay": torch.tensor(0.5, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        start = {"w": theta["start"][:4].reshape(2, 2), "b": theta["start"][4:]}
        zeros = {k: torch.zeros_like(p) for k, p in params.items()}
        return start, {"anchor": start, "slow": zeros, "begun": torch.tensor(False), "seed": torch.tensor(7)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        slow = {k: theta["decay"] * state["slow"][k] + g for k, g in grads.items()}
        deltas = {k: -0.1 * (slow[k] + theta["pull"] * (p - state["anchor"][k])) for k, p in params.items()}
        ones = torch.ones_like(state["begun"])
        return deltas, {"seed": state["seed"], "begun": ones, "slow": slow, "anchor": state["anchor"]}


class Skewed(UpdateRule):
    """``delta = -A (g + decay x)`` with a fixed non-symmetric A: a step map without symmetry, and no state at all."""

    matrix = 0.2 * torch.eye(5, dtype=FLOAT) + 0.05 * torch.triu(torch.ones(5, 5, dtype=FLOAT), 1)

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"decay": torch.linspace(0.2, 0.6, 5, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, None

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        delta = -self.matrix @ (join(grads) + theta["decay"] * join(params))
        return {"w": delta[:4].reshape(2, 2), "b": delta[4:]}, None


class Sensitive(UpdateRule):
    """Descent at a rate that reads the loss: what a tape says about losses shows in it."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"rate": torch.tensor(0.05, dtype=FLOAT), "gain": torch.tensor(0.4, dtype=FLOAT)}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return params, {"last": torch.ones((), dtype=FLOAT)}

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        rate = theta["rate"] * (1 + theta["gain"] * (loss / state["last"]).log())
        return {k: -rate * g for k, g in grads.items()}, {"last": loss}


class FromStart(UpdateRule):
    """Descent from a learned start, for any family."""

    def __init__(self, template: Params, lr: float = 0.3) -> None:
        self.template, self.lr = template, lr

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {f"start/{k}": p.detach().clone() for k, p in self.template.items()}

    def init(self, theta: Theta, params: Params) -> tuple[Params, Any]:
        return {k: theta[f"start/{k}"] for k in params}, ()

    def update(self, theta: Theta, grads: Params, state: Any, params: Params, loss: Tensor) -> tuple[Params, Any]:
        return {k: -self.lr * g for k, g in grads.items()}, state


class Tied(InnerObjective):
    """``loss + strength/2 |x - start|^2`` with the start of ``FromStart``: a loss of a user's own, and no penalty."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"strength": torch.tensor(0.8, dtype=FLOAT)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        squares = [(p - theta[f"start/{k}"]).square().sum() for k, p in params.items()]
        return family.loss(params, batch) + 0.5 * theta["strength"] * torch.stack(squares).sum()


class Both(InnerObjective):
    """Theta in what is descended and, otherwise, in what is read: nothing of one is the other."""

    def init_theta(self, generator: torch.Generator) -> Theta:
        return {"gain": torch.tensor(0.2, dtype=FLOAT), "tilt": torch.tensor([0.3, -0.2], dtype=FLOAT)}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return theta["gain"].exp() * family.loss(params, batch) + theta["tilt"][0] * self._squares(params)

    def outer_loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Any) -> Tensor:
        return (1 + theta["tilt"][1] ** 2) * family.loss(params, batch) + theta["gain"] ** 2 * self._squares(params)

    def _squares(self, params: Params) -> Tensor:
        return 0.5 * torch.stack([p.square().sum() for p in params.values()]).sum()


def tied_loop(family: TaskFamily, execution: Execution = Execution(), lr: float = 0.3) -> InnerLoop:  # noqa: B008
    """Return descent from a learned start that is pulled to it by an inner objective of a user's own."""
    return InnerLoop(family, FromStart(template(family), lr), execution, Tied())


def imaml_loop(
    family: TaskFamily, execution: Execution = Execution(), *, lr: float = 0.1, strength: float = 1.0,  # noqa: B008
    per: Any = "scalar", learn: bool = False,
) -> InnerLoop:  # fmt: skip
    """Return iMAML: MAML's rule on a proximal inner objective."""
    like = template(family)
    objective = Proximal(like, strength, per=per, learn=learn)
    return InnerLoop(family, optimizers.make("maml", template=like, lr=lr), execution, objective)


def join(params: Params) -> Tensor:
    """Return x = (w, b) as one vector, whatever the order of the dict."""
    return torch.cat([params["w"].reshape(-1), params["b"]])


def sample(family: TaskFamily, num_tasks: int = 2, seed: int = 5) -> Tasks:
    """Draw tasks with a seed of the test's own."""
    return family.sample(num_tasks, torch.Generator().manual_seed(seed))


def template(family: TaskFamily, seed: int = 11) -> Params:
    """Return one task's parameters, for rules that own tensors of theta."""
    return {k: p[0] for k, p in family.init_params(sample(family, 1, seed)).items()}


def generic_theta(owner: UpdateRule | InnerLoop, seed: int = 3) -> Theta:
    """Return a theta without special values: known hyperparameters at moderate ones, everything else perturbed."""
    moderate = {"lr": 0.06, "momentum": 0.7, "beta1": 0.8, "beta2": 0.9, "alpha": 0.85, "eps": 0.05}
    moderate |= {"weight_decay": 0.1, "dampening": 0.2, "strength": 1.3}
    moderate |= {"log_lr": -2.8, "logit_momentum": 0.8, "log_weight_decay": -2.3}
    generator = torch.Generator().manual_seed(seed)
    theta = {k: v.to(FLOAT) for k, v in owner.init_theta(generator).items()}
    for key, value in theta.items():
        name = key.rsplit("/", 1)[-1]
        noise = 0.05 * torch.randn(value.shape, generator=generator, dtype=FLOAT)
        theta[key] = torch.full_like(value, moderate[name]) if name in moderate and not value.ndim else value + noise
    return theta


def one_by_one(tasks: Tasks) -> list[Tasks]:
    """Return batched trees of one task each."""
    count = len(next(iter(tasks.values())))
    return [{k: v[i : i + 1] for k, v in tasks.items()} for i in range(count)]
