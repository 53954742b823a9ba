"""What moves theta: names, the registry, and the list that every optimizer is handed."""

from __future__ import annotations

import pytest
import torch
from problems import Quadratic

from learnedopt import FinalLoss, InnerLoop, MetaTrainer, Unrolled, optimizers
from learnedopt.core.named_tensors import NamedTensors, names_of
from learnedopt.meta_optimizers import registry


def test_a_meta_optimizer_is_handed_names_with_its_tensors() -> None:
    seen = []

    def factory(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        seen.extend(names_of(params, "it"))
        return torch.optim.SGD(params, 0.1)

    loop = InnerLoop(Quadratic(), optimizers.make("momentum", lr=0.1))
    trainer = MetaTrainer(loop, Unrolled(2), FinalLoss(), factory, None)
    assert seen == [*trainer.theta] and len(seen) > 1


def test_a_list_without_names_is_refused() -> None:
    with pytest.raises(TypeError, match="ARUBA tells the tensors of theta apart by name"):
        names_of([torch.zeros(2)], "ARUBA")
    assert NamedTensors({"a": torch.zeros(2)}).names == ["a"]


def test_the_registry_makes_optimizers_by_name() -> None:
    optimizer = registry.make("adam", lr=0.5, betas=(0.5, 0.9))([torch.zeros(2, requires_grad=True)])
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["betas"] == (0.5, 0.9)
    with pytest.raises(ValueError, match="no meta-optimizer 'adm'; did you mean 'adam'"):
        registry.make("adm", lr=0.1)
    with pytest.raises(ValueError, match="'sgd' has no option 'momentun'; did you mean 'momentum'"):
        registry.make("sgd", lr=0.1, momentun=0.9)
