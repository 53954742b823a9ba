"""Training frameworks drive a learned optimizer as they drive torch's: a run that is resumed goes on to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from learnedopt import LearnedOptimizer

NUM_STEPS = 8  # two epochs of four batches
RULES = {"general": {"num_steps": NUM_STEPS}, "lstm-mnist": {}}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs, targets = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), batch_size=8)


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def framework(name: str) -> Any:
    return pytest.importorskip(name, reason=f"needs {name}: pip install 'learnedopt[frameworks]'")


@pytest.fixture
def generators() -> Iterator[None]:
    """Put torch's generator back: the frameworks seed it."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


@pytest.mark.usefixtures("generators")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")
@pytest.mark.parametrize("rule", RULES)
def test_lightning_resumes_to_the_bit(rule: str, tmp_path: Path) -> None:
    lightning = framework("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = net(), []

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss = functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> LearnedOptimizer:
            return LearnedOptimizer(self.named_parameters(), rule, **RULES[rule])

    def fit(max_epochs: int, resumed: bool) -> tuple[Any, Any]:
        model = Module()
        trainer = lightning.Trainer(
            max_epochs=max_epochs, accelerator="cpu", logger=False, default_root_dir=tmp_path, gradient_clip_val=0.5,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, batches(), ckpt_path=tmp_path / "half.ckpt" if resumed else None)
        return trainer, model

    _, whole = fit(2, resumed=False)
    trainer, first = fit(1, resumed=False)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second = fit(2, resumed=True)
    assert len(whole.losses) == NUM_STEPS
    assert first.losses + second.losses == whole.losses
    assert torch.equal(values(second), values(whole))
    assert not torch.equal(values(first), values(whole))


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("rule", RULES)
def test_accelerate_resumes_to_the_bit(rule: str, tmp_path: Path) -> None:
    accelerate = framework("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared() -> tuple[Any, Any, Any]:
        model = net()
        return accelerator.prepare(model, LearnedOptimizer(model.named_parameters(), rule, **RULES[rule]), batches())

    def epoch(model: Any, optimizer: Any, data: Any) -> list[float]:
        losses = []
        for inputs, targets in data:
            loss = functional.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step(lambda loss=loss: loss)
            losses.append(loss.item())
        return losses

    whole = prepared()
    losses = epoch(*whole) + epoch(*whole)
    accelerator.free_memory()
    half = prepared()
    first = epoch(*half)
    accelerator.save_state(str(tmp_path))
    accelerator.free_memory()
    resumed = prepared()
    accelerator.load_state(str(tmp_path))
    assert first + epoch(*resumed) == losses
    assert torch.equal(values(resumed[0]), values(whole[0]))
    assert not torch.equal(values(half[0]), values(whole[0]))


@pytest.mark.usefixtures("generators")
@pytest.mark.parametrize("rule", RULES)
def test_hugging_face_s_trainer_resumes_to_the_bit(rule: str, tmp_path: Path) -> None:
    transformers = framework("transformers")
    told = []

    def trainer(name: str) -> Any:
        transformers.set_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
        optimizer = LearnedOptimizer(model.named_parameters(), rule, **RULES[rule])
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), max_steps=NUM_STEPS, per_device_train_batch_size=4, use_cpu=True, logging_steps=1,
            save_steps=NUM_STEPS // 2, lr_scheduler_type="constant", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        symbols = torch.randint(8, (32, 8), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": row, "labels": row} for row in symbols]
        made = Told(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {**kwargs, "loss": made.told}))
        optimizer.register_step_post_hook(lambda _, args, kwargs: told.append(kwargs["loss"]))
        return made

    class Told(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            self.told = (found[0] if isinstance(found, tuple) else found).detach()
            return found

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    assert len({float(loss) for loss in told}) == NUM_STEPS
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{NUM_STEPS // 2}"))
    losses = [[row["loss"] for row in each.state.log_history if "loss" in row] for each in (whole, resumed)]
    assert len(told) == NUM_STEPS + NUM_STEPS // 2
    assert losses[0] == losses[1]
    assert torch.equal(values(resumed.model), values(whole.model))
