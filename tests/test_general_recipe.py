"""What the general rule is meta-trained on, and what it is judged on, share no architecture and no test data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from learnedopt import recipes
from learnedopt.evaluation.nets import GROWTH, UNSEEN, Net

SHAPE = {
    "image-mlp": ("hidden", "activation"),
    "image-conv": ("channels", "norm", "residual"),
    "image-autoencoder": ("widths",),
    "text-transformer": ("dim", "num_layers"),
    "text-rnn": ("cell",),
}
"""Family -> the options that make its architecture."""


def members() -> Iterator[dict[str, Any]]:
    stage: recipes.Recipe | None = recipes.meta_training("general")
    while stage is not None:
        for _, rescaled in stage.family.options["members"]:
            yield rescaled["options"]["family"]
        stage = stage.after


def architecture(family: str, options: Any) -> tuple[Any, ...]:
    return family, *(options.get(name) for name in SHAPE[family])


def widths(options: Any) -> tuple[Any, ...]:
    return tuple(options.get(name) for name in ("hidden", "channels", "dim") if options.get(name))


@pytest.mark.parametrize("net", (*UNSEEN, *GROWTH), ids=lambda net: net.name)
def test_no_net_of_the_suites_is_meta_trained_on(net: Net) -> None:
    seen = {architecture(m["name"], m["options"]) for m in members()}
    linear = net.family == "image-mlp" and net.options["hidden"] == ()
    if linear:  # there is only one logistic regression: another number of inputs is what can differ
        sizes = {m["options"].get("size") for m in members() if m["options"].get("hidden") == ()}
        assert net.options.get("size") not in sizes
        return
    assert architecture(net.family, net.options) not in seen
    assert widths(net.options) not in {widths(m["options"]) for m in members()} - {()}


def test_a_third_of_the_nets_is_on_data_that_no_meta_training_touches() -> None:
    datasets = {m["options"].get("dataset") for m in members()}
    splits = {m["options"].get("meta_split", "train") for m in members()}
    assert splits == {"train"}
    untouched = [
        net for net in UNSEEN
        if net.options.get("meta_split") == "test" and net.options.get("dataset") not in datasets - {None}
    ]  # fmt: skip
    assert len(untouched) >= len(UNSEEN) / 3
    assert len(UNSEEN) >= 12
