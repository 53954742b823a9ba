"""A loss that is itself a small network, and learned."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.nn import functional

from learnedopt.core.inner_objective import InnerObjective
from learnedopt.core.task import Batch, TaskFamily
from learnedopt.core.tree import Params, Theta
from learnedopt.inner_objectives.bases import arguments

Activation: TypeAlias = Literal["tanh", "softplus"]
Targets: TypeAlias = Literal["classes", "values"]


@final
@dataclass(frozen=True)
class LearnedLoss(InnerObjective):
    """``base · family.loss + 1/n Σ_i net(output_i, target_i)``, with a network of theta; the mean is over examples.

    Bechtle et al. (2021), "Meta-learning via learned loss", without its softplus at the end. The network is an MLP with
    smooth activations, as its second derivatives enter the meta-gradient. Its last layer starts at zero, so that
    meta-training starts at ``base · family.loss``; that layer has no bias, which would move no parameter. Outside, the
    family's loss counts alone.

    The family's batch must be a dict with ``"targets"``, and ``family.outputs`` must return (n, num_outputs), or (n,)
    where that is 1.

    Args:
        num_outputs: of the family's model for one example.
        targets: "classes": integers (n,), which the network sees one-hot; "values": numbers, as many as outputs.
        hidden: the widths of the hidden layers.
        activation: after each hidden layer.
        base: how much of the family's own loss is in it; with 0 the network is all there is, and since it starts at
            zero, the first inner steps of meta-training do not move.

    Theta: ``loss/layer0.weight`` (hidden[0], 2 num_outputs), ``loss/layer0.bias``, ... as ``nn.Linear`` has them and
    draws them.

    Raises:
        TypeError: ``base`` is not a number.
        ValueError: an option is out of its range; at use, the batch or the outputs are not as said above.

    Example:
        >>> objective = LearnedLoss(num_outputs=10, hidden=(32,))
        >>> {k: tuple(v.shape) for k, v in objective.init_theta(torch.Generator()).items()}
        {'loss/layer0.weight': (32, 20), 'loss/layer0.bias': (32,), 'loss/layer1.weight': (1, 32)}
    """

    num_outputs: int
    targets: Targets = "classes"
    hidden: tuple[int, ...] = (16,)
    activation: Activation = "tanh"
    base: float = 1.0

    def __post_init__(self) -> None:
        arguments.require_count("LearnedLoss", "num_outputs", self.num_outputs)
        arguments.require_choice("LearnedLoss", "targets", self.targets, Targets)
        arguments.require_choice("LearnedLoss", "activation", self.activation, Activation)
        arguments.require_number("LearnedLoss", "base", self.base)
        if not isinstance(cast("object", self.hidden), tuple) or not self.hidden:
            raise ValueError(f"LearnedLoss: hidden={self.hidden!r} is not a tuple of widths; pass one such as (16,)")
        for i, width in enumerate(self.hidden):
            arguments.require_count("LearnedLoss", f"hidden[{i}]", width)

    def init_theta(self, generator: torch.Generator) -> Theta:
        """Draw the hidden layers from U(±1/√fan_in); the last one is zero."""
        theta: Theta = {}
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise((2 * self.num_outputs, *self.hidden))):
            for name, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
                uniform = 2 * torch.rand(shape, generator=generator, device=generator.device) - 1
                theta[f"loss/layer{i}.{name}"] = uniform / math.sqrt(fan_in)
        last = torch.zeros(1, self.hidden[-1], device=generator.device)
        return {**theta, f"loss/layer{len(self.hidden)}.weight": last}

    def loss(self, theta: Theta, family: TaskFamily, params: Params, batch: Batch) -> Tensor:
        """Return the task's share plus the network's mean over the batch's examples."""
        learned = self._network(theta, self._features(family.outputs(params, batch), batch)).mean()
        return self.base * family.loss(params, batch) + learned if self.base else learned

    def _features(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return each example's outputs and targets side by side: (n, 2 num_outputs)."""
        targets = arguments.entry("LearnedLoss", batch, "targets", "what each example should give")
        expected = outputs.shape[:1] if self.targets == "classes" else outputs.shape
        whole = self.targets == "classes" and (targets.is_floating_point() or targets.dtype == torch.bool)
        scalars = outputs.ndim == 1 and self.num_outputs == 1
        if not (scalars or outputs.shape[1:] == (self.num_outputs,)) or targets.shape != expected or whole:
            what = "integer classes (n,)" if self.targets == "classes" else "values of the outputs' shape"
            raise ValueError(
                f"LearnedLoss(num_outputs={self.num_outputs}) needs outputs (n, {self.num_outputs}) and as targets "
                f"{what}, got outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} of {targets.dtype}; "
                "set num_outputs, or targets='classes' or 'values', to suit the family"
            )
        if self.targets == "classes":
            targets = targets.unsqueeze(-1) == torch.arange(self.num_outputs, device=targets.device)
        return torch.cat([x.to(outputs.dtype).reshape(-1, self.num_outputs) for x in (outputs, targets)], dim=1)

    def _network(self, theta: Theta, features: Tensor) -> Tensor:
        """Return (n, 1)."""
        layers = {k.removeprefix("loss/"): v.to(features.dtype) for k, v in theta.items() if k.startswith("loss/")}
        for i in range(len(self.hidden)):
            features = functional.linear(features, layers[f"layer{i}.weight"], layers[f"layer{i}.bias"])
            features = torch.tanh(features) if self.activation == "tanh" else functional.softplus(features)
        return functional.linear(features, layers[f"layer{len(self.hidden)}.weight"])
