"""Kinds of tensors, told from the names and shapes of real torch modules."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from learnedopt.optimizers.bases.kinds import Kind, TensorKind, kinds_of

FIRST, MIDDLE, LAST, EMBEDDING = Kind.FIRST, Kind.MIDDLE, Kind.LAST, Kind.EMBEDDING
HIDDEN_BIAS, LAST_BIAS, GAIN = Kind.HIDDEN_BIAS, Kind.LAST_BIAS, Kind.GAIN


def kinds(module: nn.Module) -> dict[str, Kind]:
    return {name: each.kind for name, each in kinds_of(dict(module.named_parameters())).items()}


def test_an_mlp():
    mlp = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    assert kinds_of(dict(mlp.named_parameters())) == {
        "0.weight": TensorKind(FIRST, 7, 5, 0.0),
        "0.bias": TensorKind(HIDDEN_BIAS, 1, 5, 0.0),
        "2.weight": TensorKind(MIDDLE, 5, 4, 0.5),
        "2.bias": TensorKind(HIDDEN_BIAS, 1, 4, 0.5),
        "4.weight": TensorKind(LAST, 4, 3, 1.0),
        "4.bias": TensorKind(LAST_BIAS, 1, 3, 1.0),
    }


def test_a_single_matrix_is_the_last_one_at_depth_0():
    assert kinds_of(dict(nn.Linear(7, 5).named_parameters())) == {
        "weight": TensorKind(LAST, 7, 5, 0.0),
        "bias": TensorKind(LAST_BIAS, 1, 5, 0.0),
    }


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c)], ids=["batch", "group"])
def test_a_conv_net_with_norms(norm):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 5, bias=False), norm(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 6, (3, 2)), norm(6)
            self.fc = nn.Linear(6, 2)
            self.unused = norm(2)  # a norm behind the head has a bias that is not the head's

    net = Net()
    assert kinds(net) == {
        "conv1.weight": FIRST, "bn1.weight": GAIN, "bn1.bias": HIDDEN_BIAS,
        "conv2.weight": MIDDLE, "conv2.bias": HIDDEN_BIAS, "bn2.weight": GAIN, "bn2.bias": HIDDEN_BIAS,
        "fc.weight": LAST, "fc.bias": LAST_BIAS, "unused.weight": GAIN, "unused.bias": HIDDEN_BIAS,
    }  # fmt: skip
    found = kinds_of(dict(net.named_parameters()))
    assert (found["conv2.weight"].fan_in, found["conv2.weight"].fan_out) == (4 * 3 * 2, 6)
    assert found["bn2.weight"] == TensorKind(GAIN, 1, 6, 0.5)


@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM], ids=["rnn", "gru", "lstm"])
def test_a_recurrent_net_with_a_head(cell):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.rnn, self.head = nn.Embedding(9, 4), cell(4, 5, num_layers=2), nn.Linear(5, 9)

    names = {f"rnn.{kind}_{end}_l{i}" for kind in ("weight", "bias") for end in ("ih", "hh") for i in (0, 1)}
    expected = {
        name: FIRST if name == "rnn.weight_ih_l0" else HIDDEN_BIAS if "bias" in name else MIDDLE for name in names
    }
    assert kinds(Net()) == expected | {"embedding.weight": EMBEDDING, "head.weight": LAST, "head.bias": LAST_BIAS}
    assert kinds_of(dict(Net().named_parameters()))["embedding.weight"] == TensorKind(EMBEDDING, 4, 9, 0.0)


def test_the_last_layer_of_a_recurrent_net_without_a_head_has_the_last_biases():
    found = kinds(nn.LSTM(4, 5, num_layers=2))
    assert found["weight_hh_l1"] is LAST and found["weight_hh_l0"] is MIDDLE
    assert found["bias_ih_l0"] is found["bias_hh_l0"] is HIDDEN_BIAS
    assert found["bias_ih_l1"] is found["bias_hh_l1"] is LAST_BIAS


def test_a_transformer():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(9, 4), nn.Embedding(6, 4)
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2)])
            self.head, self.final_norm = nn.Linear(4, 9, bias=False), nn.LayerNorm(4)

    found = kinds(Net())
    assert found["wte.weight"] is found["wpe.weight"] is EMBEDDING
    assert found["layers.0.self_attn.in_proj_weight"] is FIRST
    assert found["layers.0.self_attn.in_proj_bias"] is HIDDEN_BIAS
    assert found["layers.1.linear2.weight"] is MIDDLE and found["head.weight"] is LAST
    assert {found[f"layers.{i}.norm{j}.weight"] for i in (0, 1) for j in (1, 2)} == {GAIN}
    assert LAST_BIAS not in found.values(), "the head has no bias, and the norm behind it is not the head's"


@pytest.mark.parametrize(
    "name", ["position", "tokens.embed", "token_embedding.weight", "pos_embed", "Embedding_0.table"]
)
def test_embeddings_by_name(name):
    shapes = {name: (8, 4), "a.weight": (4, 4), "b.weight": (2, 4)}
    found = kinds_of({k: torch.zeros(shape) for k, shape in shapes.items()})
    assert [each.kind for each in found.values()] == [EMBEDDING, FIRST, LAST]


def test_a_convolution_is_no_embedding_whatever_it_is_called():
    shapes = {"embeddings.patch_embeddings.projection.weight": (8, 3, 4, 4), "embeddings.position": (1, 5, 8),
              "head.weight": (2, 8)}  # fmt: skip
    found = kinds_of({k: torch.zeros(shape) for k, shape in shapes.items()})
    assert [each.kind for each in found.values()] == [FIRST, EMBEDDING, LAST]


def test_what_is_no_embedding():
    found = kinds_of({"superposition.weight": torch.zeros(3, 2), "wter.weight": torch.zeros(2, 3)})
    assert [each.kind for each in found.values()] == [FIRST, LAST]


def test_biases_before_their_matrices():
    found = kinds_of({"a/bias": torch.zeros(3), "a/kernel": torch.zeros(3, 2), "b/bias": torch.zeros(4),
                      "b/kernel": torch.zeros(4, 3)})  # fmt: skip
    assert [(each.kind, each.depth) for each in found.values()] == [
        (HIDDEN_BIAS, 0.0), (FIRST, 0.0), (LAST_BIAS, 1.0), (LAST, 1.0)]  # fmt: skip


def test_without_names_order_and_shape_tell_and_the_default_is_logged_once(caplog):
    shapes = [(5, 7), (5,), (5,), (5,), (3, 5), (3,), ()]
    params = {str(i): torch.zeros(shape) for i, shape in enumerate(shapes)}
    with caplog.at_level(logging.WARNING, "learnedopt"):
        found = [each.kind for each in kinds_of(params).values()]
        kinds_of(params)
    assert found == [FIRST, HIDDEN_BIAS, HIDDEN_BIAS, HIDDEN_BIAS, LAST, LAST_BIAS, LAST_BIAS]
    (record,) = caplog.records
    assert "what 2, 3 are" in record.getMessage() and "model.named_parameters()" in record.getMessage()


def test_names_that_tell_are_not_logged(caplog):
    with caplog.at_level(logging.WARNING, "learnedopt"):
        kinds_of({"w1": torch.zeros(8, 3), "b1": torch.zeros(8), "w2": torch.zeros(2, 8), "b2": torch.zeros(2)})
    assert not caplog.records


def test_a_net_without_matrices_has_biases_alone(caplog):
    with caplog.at_level(logging.WARNING, "learnedopt"):
        assert kinds_of({"weight": torch.zeros(11)}) == {"weight": TensorKind(HIDDEN_BIAS, 1, 11, 0.0)}
    assert len(caplog.records) == 1


def test_under_vmap_one_task_is_seen():
    def depths(params):
        found = kinds_of(params)
        assert found["weight"] == TensorKind(LAST, 3, 2, 0.0) and found["bias"].kind is LAST_BIAS
        return params["bias"].sum() + found["weight"].fan_in

    torch.func.vmap(depths)({"weight": torch.zeros(4, 2, 3), "bias": torch.zeros(4, 2)})
