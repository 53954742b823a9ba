"""Meta-training on a GPU against the CPU: every recipe's meta-gradient, in the precision that is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.results_gpu import distance, gradient, meta_trainings
from learnedopt import Execution, recipes, run
from learnedopt.core.modes import outside_inference_mode, recording_gradients, whole_float32
from learnedopt.training.tracking import Tracking

by_operation = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="torch before 2.9 has one flag")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("name", meta_trainings())
def test_a_meta_gradient_is_the_cpus(name: str) -> None:
    assert distance(gradient(name, "cuda", "float64"), gradient(name, "cpu", "float64")) < 1e-6


@needs_gpu
@pytest.mark.parametrize("name", ["maml-omniglot", "imaml-omniglot"])
def test_convolutions_multiply_whole_float32_numbers(name: str) -> None:
    assert distance(gradient(name, "cuda", "float32"), gradient(name, "cpu", "float32")) < 1e-3


@needs_gpu
def test_a_study_runs_there(tmp_path: Path) -> None:
    study = recipes.smoke(replace(recipes.make("bmg-quadratic"), execution=Execution(device="cuda")))
    run.train(study, tmp_path / "study", Tracking("disabled"))
    assert (tmp_path / "study" / f"{study.name}.png").exists()


@pytest.mark.parametrize("wrapped", [outside_inference_mode, recording_gradients])
@pytest.mark.parametrize(("asked", "inside"), [("highest", False), ("high", True)])
def test_tf32_in_convolutions_follows_matrix_products(
    wrapped, asked: str, inside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: asked)
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    assert wrapped(lambda: torch.backends.cudnn.allow_tf32)() is inside
    with pytest.raises(ZeroDivisionError):
        wrapped(lambda: 1 / 0)()
    assert torch.backends.cudnn.allow_tf32


def test_calls_of_two_threads_leave_tf32_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    first, second = whole_float32(), whole_float32()
    with first:
        second.__enter__()
    assert not torch.backends.cudnn.allow_tf32, "the second is still inside"
    second.__exit__(None, None, None)
    assert torch.backends.cudnn.allow_tf32


@by_operation
@pytest.mark.parametrize(
    ("everywhere", "in_products", "inside"),
    [("none", "tf32", "tf32"), ("tf32", "tf32", "tf32"), ("tf32", "ieee", "ieee")],
)
def test_tf32_by_the_settings_of_torch_2_9(
    everywhere: str, in_products: str, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    products, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = products.fp32_precision
    try:
        torch.backends.fp32_precision, products.fp32_precision = everywhere, in_products
        assert recording_gradients(lambda: convolution.fp32_precision)() == inside
        assert convolution.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision, products.fp32_precision = "none", before
        torch.backends.cudnn.allow_tf32 = True
    assert torch.get_float32_matmul_precision() == "highest"


@by_operation
def test_settings_by_operation_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    try:
        torch.backends.cudnn.rnn.fp32_precision = "ieee"  # the flag for both cannot say this
        assert recording_gradients(lambda: convolution.fp32_precision)() == "ieee"
        assert convolution.fp32_precision == before
    finally:
        torch.backends.cudnn.allow_tf32 = True
