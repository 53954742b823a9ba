"""The nets that general rules are judged on: none of these architectures is ever meta-trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from learnedopt.core.registry import nearest
from learnedopt.core.task import TaskFamily

_TEXT = {"batch_size": 16, "context": 32, "meta_split": "test", "held_out": True}
_CHARACTERS: dict[str, Any] = {"dataset": "omniglot-characters", "meta_split": "test", "held_out": True}


@dataclass(frozen=True)
class Net:
    """A net, its data and how long it is trained.

    Args:
        name: as tables show it.
        family: registered name of the task family.
        options: of the family; its "valid" split is held out from training, so that a loss there is a test loss.
        num_steps: T.
        lanes: runs of it that a GPU has room for at once; None where that follows from its parameters alone.
    """

    name: str
    family: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_steps: int = 100
    lanes: int | None = None

    def make(self) -> TaskFamily:
        """Return the task family."""
        from learnedopt import tasks

        return tasks.make(self.family, **self.options)


def _mlp(name: str, num_steps: int, dataset: str, hidden: tuple[int, ...], activation: str, **options: Any) -> Net:
    data = _CHARACTERS if dataset == "omniglot-characters" else {"dataset": dataset, "held_out": True}
    options = {**data, "hidden": hidden, "activation": activation, "batch_size": 128, **options}
    return Net(name, "image-mlp", options, num_steps)


def _conv(name: str, num_steps: int, channels: tuple[int, ...], lanes: int | None = None, **options: Any) -> Net:
    options = {"dataset": "fashion-mnist", "held_out": True, "channels": channels, "batch_size": 64, **options}
    return Net(name, "image-conv", options, num_steps, lanes)


UNSEEN: tuple[Net, ...] = (
    _mlp("mlp 64-64 relu, Fashion", 100, "fashion-mnist", (64, 64), "relu"),
    _mlp("mlp 128-128 relu, Fashion", 500, "fashion-mnist", (128, 128), "relu"),
    _mlp("mlp 5x32 tanh, MNIST", 300, "mnist", (32,) * 5, "tanh"),
    _mlp("logistic, Fashion", 300, "fashion-mnist", (), "relu"),
    _mlp("mlp 96 gelu, Omniglot", 200, "omniglot-characters", (96,), "gelu"),
    _conv("conv 16-32 batch norm, Fashion", 200, (16, 32), norm="batch", size=14),
    _conv("conv 12-24-48 group norm, Omniglot", 200, (12, 24, 48), norm="group", batch_size=32, **_CHARACTERS),
    _conv("residual conv, Fashion", 300, (16, 32), norm="batch", size=14, residual=True),
    Net("GRU 64, text", "text-rnn", {"cell": "gru", "width": 64, **_TEXT}, 300),
    Net("LSTM 64, text", "text-rnn", {"cell": "lstm", "width": 64, **_TEXT}, 300),
    Net("transformer 2x32, text", "text-transformer", {"dim": 32, "num_layers": 2, "num_heads": 2, **_TEXT}, 300),
    Net("transformer 3x48, text", "text-transformer", {"dim": 48, "num_layers": 3, "num_heads": 4, **_TEXT}, 400),
    Net("autoencoder, Omniglot", "image-autoencoder", {"widths": (64, 16), "batch_size": 128, **_CHARACTERS}, 300),
    _mlp("mlp 20 relu, MNIST", 2000, "mnist", (20,), "relu"),
    _mlp("mlp 256 elu, Fashion", 1000, "fashion-mnist", (256,), "elu"),
)
"""Fifteen nets, seven on data that no meta-training reads: Omniglot's evaluation alphabets, and text of other files."""

_LONG_TEXT = {**_TEXT, "context": 48}
GROWTH: tuple[Net, ...] = (
    Net("transformer 3x96, text", "text-transformer", {"dim": 96, "num_layers": 3, "num_heads": 4, **_LONG_TEXT}, 400),
    Net(
        "transformer 3x160, text", "text-transformer", {"dim": 160, "num_layers": 3, "num_heads": 4, **_LONG_TEXT},
        1000, lanes=320,
    ),
    _mlp("mlp 512-256 relu, Fashion", 600, "fashion-mnist", (512, 256), "relu"),
    _conv("conv 64-128-256, Fashion", 300, (64, 128, 256), lanes=96, norm="batch"),
    _mlp("mlp 64-64 relu, Fashion, long", 5000, "fashion-mnist", (64, 64), "relu"),
    _conv("conv 16-32 batch norm, Fashion, long", 5000, (16, 32), norm="batch", size=14),
)  # fmt: skip
"""Larger and longer than what rules are meta-trained on."""

SUITES: Mapping[str, tuple[Net, ...]] = {"unseen": UNSEEN, "growth": GROWTH}


def dealt(nets: Sequence[Net], num_shares: int) -> list[list[Net]]:
    """Return the nets in so many shares, or fewer, that take about as long as each other."""
    shares: list[list[Net]] = [[] for _ in range(min(num_shares, len(nets)))]
    for net in sorted(nets, key=_cost, reverse=True):
        min(shares, key=lambda share: sum(map(_cost, share))).append(net)
    return shares


def _cost(net: Net) -> float:
    """Return about how long a net takes: by its steps, and by how many operations one of them has."""
    return net.num_steps * {"text-rnn": 8.0, "text-transformer": 3.0, "image-conv": 3.0}.get(net.family, 1.0)


def chosen(suite: str, names: Iterable[str] = ()) -> tuple[Net, ...]:
    """Return the nets of a suite, or those of them with these names, or numbers from 1 on.

    Raises:
        ValueError: there is no such suite or net.
    """
    if suite not in SUITES:
        raise ValueError(f"no suite {suite!r}; there are {', '.join(SUITES)}{nearest(suite, SUITES)}")
    nets = {net.name: net for net in SUITES[suite]}
    numbered = {str(i): net for i, net in enumerate(SUITES[suite], start=1)}
    found: list[Net] = []
    for name in names:
        if name not in nets and name not in numbered:
            told = nearest(name, nets) or f"; there are, by number: {'; '.join(nets)}"
            raise ValueError(f"no net {name!r} in {suite}{told}")
        found.append(nets.get(name) or numbered[name])
    return tuple(net for net in SUITES[suite] if net in found) if found else SUITES[suite]
