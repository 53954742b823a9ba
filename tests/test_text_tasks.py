"""Character text and the models on it, against torch's own layers."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from learnedopt.core import tree
from learnedopt.core.task import Split
from learnedopt.tasks import TextRNN, TextTransformer, make
from learnedopt.tasks.data import text

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # torch's own forward mode
]

TOLERANCE = 1e-12
SPLITS: tuple[Split, Split] = ("train", "valid")
SMALL = {
    "text-transformer": {"dim": 6, "num_heads": 3, "batch_size": 3, "context": 5},
    "text-rnn": {"width": 4, "num_layers": 2, "batch_size": 3, "context": 5},
    "text-rnn lstm": {"cell": "lstm", "width": 4, "batch_size": 3, "context": 5},
}
every_model = pytest.mark.parametrize("model", list(SMALL))


def made(model: str, **options: Any) -> Any:
    return make(model.split()[0], **SMALL[model], **options)


def one_task(family: Any, seed: int = 0) -> Any:
    """Return the parameters, moved off their special starts, and the first batch of one task."""
    tasks = family.sample(1, torch.Generator().manual_seed(seed))
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))
    noise = torch.Generator().manual_seed(seed + 1)
    return {k: p + 0.3 * torch.randn(p.shape, generator=noise) for k, p in params.items()}, batch


# The text.


def test_symbols_are_the_characters_of_the_librarys_files() -> None:
    assert len({*text.CHARACTERS}) == len(text.CHARACTERS) == 63 == text.NUM_SYMBOLS - 1
    source = (Path(sysconfig.get_path("stdlib")) / "bisect.py").read_text("ascii")
    expected = "".join(c if c in text.CHARACTERS else "\ufffd" for c in source)
    assert expected in text.as_text(text.load(text.split_of("bisect.py"))) and "\ufffd" in expected
    own = text.load("test")
    assert own.dtype == torch.uint8 and int(own.max()) == 63
    assert float((own == 63).double().mean()) < 0.02  # so the fixed characters are the frequent ones
    counts = own.bincount(minlength=64)
    assert int(counts.min()) > 0


def test_each_file_is_in_one_split_and_has_its_last_tenth_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A library of made files: each is one character of its own, so that the text tells which files it is from.
    (tmp_path / "package" / "test").mkdir(parents=True)
    names = [f"{folder}{i}.py" for folder in ("", "package/") for i in range(100)]
    for i, name in enumerate([*names, "package/test/left_out.py", "package/read_me.txt"]):
        (tmp_path / name).write_text(chr(97 + i % 26) * (100 + i) if name in names else "#" * 1000)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    load = text.load.__wrapped__
    parts = {split: load(split) for split in ("train", "valid", "test")}
    expected = {name: chr(97 + i % 26) * (100 + i) for i, name in enumerate(names)}
    for split, symbols in parts.items():
        own = sorted(name for name in names if text.split_of(name) == split)
        assert text.as_text(symbols) == "".join(expected[name] for name in own)
        kept, held_out = (text.as_text(load(split, part)) for part in ("kept", "held-out"))
        ends = [len(expected[name]) // 10 for name in own]
        assert held_out == "".join(expected[name][-end:] for name, end in zip(own, ends, strict=True))
        assert kept == "".join(expected[name][:-end] for name, end in zip(own, ends, strict=True))
    shares = [sum(text.split_of(name) == split for name in names) / len(names) for split in parts]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.06)
    assert sum(map(len, parts.values())) == sum(map(len, expected.values()))


def test_split_of_a_file_is_fixed() -> None:
    assert [text.split_of(name) for name in ("bisect.py", "json/decoder.py", "abc.py", "heapq.py")] == [
        "train",
        "test",
        "valid",
        "train",
    ]


def test_the_text_is_the_same_in_another_process() -> None:
    code = (
        "from learnedopt.tasks.data import text; import zlib; print(zlib.crc32(text.load('valid').numpy().tobytes()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == zlib.crc32(text.load("valid").numpy().tobytes())


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "python311.zip"))
    with pytest.raises(FileNotFoundError, match=r"python311.zip holds 0 of them.*with sources"):
        text.load.__wrapped__("train")


def test_batches_are_sequences_of_the_text_and_targets_the_next_characters() -> None:
    family = TextRNN(batch_size=20, context=40, meta_split="valid")
    tasks = family.sample(2, torch.Generator().manual_seed(0))
    whole = text.as_text(text.load("valid"))
    seen = set()
    for split, step, task in itertools.product(SPLITS, (0, 1), (0, 1)):
        batch = family.batch(tasks, step, split)
        assert torch.equal(batch["inputs"][..., 1:], batch["targets"][..., :-1])
        for inputs, targets in zip(batch["inputs"][task], batch["targets"][task], strict=True):
            sequence = text.as_text(inputs) + text.as_text(targets[-1:])
            assert sequence in whole
            seen.add(sequence)
    assert len(seen) > 150  # of 160: each split, step and task draws its own


def test_held_out_text_is_not_trained_on() -> None:
    family = TextRNN(batch_size=50, context=60, meta_split="test", held_out=True)
    tasks = family.sample(2, torch.Generator().manual_seed(0))
    parts = {part: text.load("test", part).numpy().tobytes() for part in ("kept", "held-out")}
    for split, (own, other) in zip(SPLITS, (("kept", "held-out"), ("held-out", "kept")), strict=True):
        found = [bytes(row) for row in family.batch(tasks, 3, split)["inputs"].flatten(0, 1).tolist()]
        assert all(sequence in parts[own] for sequence in found)
        assert sum(sequence in parts[other] for sequence in found) < 10  # of 100: lines that programs repeat


# The models.


class Block(nn.Module):
    """What ``TextTransformer`` computes, of torch's own layers."""

    def __init__(self, family: TextTransformer) -> None:
        super().__init__()
        dim, wide = family.dim, family.mlp_ratio * family.dim
        self.activation = {"gelu": nn.GELU(), "relu": nn.ReLU()}[family.activation]
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, family.num_heads, bias=family.bias, batch_first=True)
        self.wide, self.narrow = nn.Linear(dim, wide, bias=family.bias), nn.Linear(wide, dim, bias=family.bias)

    def forward(self, x: Tensor) -> Tensor:
        later = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=later, need_weights=False)[0]
        return x + self.narrow(self.activation(self.wide(self.norm2(x))))


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False, "activation": "relu", "mlp_ratio": 2}],
    ids=["gelu with biases", "relu without"],
)
def test_the_transformer_is_that_of_torchs_layers(options: dict[str, Any]) -> None:
    family: TextTransformer = made("text-transformer", **options)
    params, batch = one_task(family)
    blocks = nn.ModuleList([Block(family) for _ in range(family.num_layers)])
    torchs = {"attention.qkv.": "attention.in_proj_", "attention.out.": "attention.out_proj.", "mlp.in.": "wide."}
    state = {}
    for name, p in params.items():
        if name.startswith("layer"):
            for ours, theirs in (torchs | {"mlp.out.": "narrow."}).items():
                name = name.replace(ours, theirs)
            state[name.removeprefix("layer")] = p
    blocks.load_state_dict(state)
    x = params["embedding.weight"][batch["inputs"]] + params["position.weight"]
    for block in blocks:
        x = block(x)
    x = functional.layer_norm(x, (family.dim,), params["norm.weight"], params["norm.bias"])
    logits = x @ params["head.weight"].T
    assert family.outputs(params, batch).shape == (3, 5, 64)
    torch.testing.assert_close(family.outputs(params, batch), logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert_loss_is_that_of(logits, family, params, batch)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_recurrent_network_is_torchs(cell: Any) -> None:
    family = TextRNN(cell=cell, width=4, num_layers=2, batch_size=3, context=5)
    params, batch = one_task(family)
    module = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](4, 4, num_layers=2, batch_first=True)
    kinds = {
        "input.weight": "weight_ih",
        "input.bias": "bias_ih",
        "hidden.weight": "weight_hh",
        "hidden.bias": "bias_hh",
    }
    module.load_state_dict(
        {f"{kinds[name[7:]]}_l{name[5]}": p for name, p in params.items() if name.startswith("layer")}
    )
    hidden, _ = module(params["embedding.weight"][batch["inputs"]])
    logits = hidden @ params["head.weight"].T + params["head.bias"]
    torch.testing.assert_close(family.outputs(params, batch), logits, rtol=TOLERANCE, atol=TOLERANCE)
    assert_loss_is_that_of(logits, family, params, batch)


def assert_loss_is_that_of(logits: Tensor, family: Any, params: Any, batch: Any) -> None:
    likely = logits.log_softmax(-1).gather(-1, batch["targets"].unsqueeze(-1))
    torch.testing.assert_close(family.loss(params, batch), -likely.mean(), rtol=TOLERANCE, atol=TOLERANCE)
    right = (logits.argmax(-1) == batch["targets"]).double().mean()
    assert float(family.metrics(params, batch)["accuracy"]) == pytest.approx(float(right))


@every_model
def test_no_place_sees_a_later_one(model: str) -> None:
    family = made(model)
    params, batch = one_task(family)
    before = family.outputs(params, batch)
    other = {**batch, "inputs": batch["inputs"].clone()}
    other["inputs"][:, 3] = (other["inputs"][:, 3] + 1) % 64
    moved = (family.outputs(params, other) - before).abs().amax((0, 2))
    assert float(moved[:3].max()) == 0 and float(moved[3:].min()) > 1e-4


@every_model
def test_second_derivatives_agree_in_every_order_of_differentiation(model: str) -> None:
    family = made(model)
    params, batch = one_task(family)
    noise = torch.Generator().manual_seed(7)
    along = {k: torch.randn(p.shape, generator=noise) for k, p in params.items()}

    def loss(params: Any) -> Tensor:
        return family.loss(params, batch)

    def slope(params: Any) -> Tensor:
        return torch.func.jvp(loss, (params,), (along,))[1]

    def product(params: Any) -> Tensor:
        grads = torch.func.grad(loss)(params)
        return sum(((grads[k] * along[k]).sum() for k in grads), torch.zeros(()))

    forward_over_reverse = torch.func.jvp(torch.func.grad(loss), (params,), (along,))[1]
    found = {
        "reverse over reverse": torch.func.grad(product)(params),
        "reverse over forward": torch.func.grad(slope)(params),
    }
    for products in found.values():
        torch.testing.assert_close(products, forward_over_reverse, rtol=1e-9, atol=1e-11)
    step = 1e-5
    ahead, behind = (
        torch.func.grad(loss)({k: p + sign * step * along[k] for k, p in params.items()}) for sign in (1, -1)
    )
    difference = {k: (ahead[k] - behind[k]) / (2 * step) for k in params}
    torch.testing.assert_close(forward_over_reverse, difference, rtol=1e-5, atol=1e-7)


@every_model
def test_particles_of_several_tasks_run_under_vmap_within_vmap(model: str) -> None:
    family = made(model)
    tasks = family.sample(2, torch.Generator().manual_seed(0))
    params, batch = family.init_params(tasks), family.batch(tasks, 0, "train")
    scales = torch.tensor([0.5, 1.0, 2.0])
    particles = {k: torch.stack([s * p for s in scales], dim=1) for k, p in params.items()}
    gradient = torch.func.grad_and_value(family.loss)
    found = torch.func.vmap(torch.func.vmap(gradient, in_dims=(0, None)))(particles, batch)
    for task, i in itertools.product(range(2), range(3)):
        alone = gradient(*tree.tree_map(lambda x, t=task: x[t], ({k: p[:, i] for k, p in particles.items()}, batch)))
        same = tree.tree_map(lambda x, t=task, i=i: x[t, i], found)
        torch.testing.assert_close(same, alone, rtol=1e-10, atol=TOLERANCE)


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@every_model
def test_models_run_where_their_parameters_lie(model: str, device: str) -> None:
    family = made(model)
    params, batch = one_task(family)
    there = torch.func.grad_and_value(family.loss)(*tree.to((params, batch), torch.device(device), None))
    torch.testing.assert_close(
        tree.to(there, torch.device("cpu"), None), torch.func.grad_and_value(family.loss)(params, batch)
    )


@every_model
def test_models_start_near_chance(model: str) -> None:
    options: dict[str, Any] = {"cell": "lstm"} if "lstm" in model else {}
    family = make(model.split()[0], **options)
    tasks = family.sample(1, torch.Generator().manual_seed(0))
    params, batch = tree.squeeze((family.init_params(tasks), family.batch(tasks, 0, "train")))
    assert float(family.loss(params, batch)) == pytest.approx(math.log(64), abs=0.4)


def test_transformers_start_as_their_docstring_says() -> None:
    family = TextTransformer(dim=64, num_layers=3)
    params = family.init_params({"seed": torch.arange(3)})
    spread = {name: float(p.std()) for name, p in params.items()}
    assert spread["embedding.weight"] == pytest.approx(0.088, rel=0.05)  # N(0, 0.1²), cut off: 0.88 of its deviation
    assert spread["layer1.attention.qkv.weight"] == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert spread["layer2.mlp.out.weight"] == pytest.approx(1 / 16 / 3**0.5 / 6**0.5, rel=0.05)
    assert bool((params["norm.weight"] == 1).all()) and bool((params["norm.bias"] == 0).all())


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("text-transformer", {"dim": 30, "num_heads": 4}, ValueError, "num_heads=4 does not divide dim=30"),
        ("text-transformer", {"num_layers": 0}, ValueError, "num_layers=0"),
        ("text-transformer", {"activation": "glu"}, ValueError, "activation='glu'.*'gelu'"),
        ("text-transformer", {"bias": 1}, TypeError, "bias=1"),
        ("text-transformer", {"batch_size": 0}, ValueError, "batch_size=0"),
        ("text-rnn", {"cell": "rnn"}, ValueError, "cell='rnn'"),
        ("text-rnn", {"width": 2.5}, TypeError, "width=2.5"),
        ("text-rnn", {"held_out": "yes"}, TypeError, "held_out='yes'"),
        ("text-rnn", {"meta_split": "all"}, ValueError, "meta_split='all'"),
        ("lasso", {"density": 1.5}, ValueError, "density=1.5 is no share"),
        ("lasso", {"strength": -1.0}, ValueError, "strength=-1.0"),
        ("rastrigin", {"height": -1.0}, ValueError, "height=-1.0"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(name, **options)


def test_a_context_longer_than_the_text_is_refused() -> None:
    family = TextRNN(context=10**8)
    with pytest.raises(ValueError, match="context=100000000 is longer than the text"):
        family.batch(family.sample(1, torch.Generator()), 0, "train")
