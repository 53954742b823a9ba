"""A Lightning module in which one line changes: the optimizer that it configures.

Fashion-MNIST is found under LEARNEDOPT_DATA or in the user's cache, else downloaded.
"""

import logging
import tempfile
import warnings

import lightning
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from learnedopt import LearnedOptimizer
from learnedopt.tasks.data import images

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", ".*does not have many workers")  # the images are in memory
warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's own


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(28 * 28, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, _):
        pixels, labels = batch
        return functional.cross_entropy(self.net(pixels), labels)

    def test_step(self, batch, _) -> None:
        pixels, labels = batch
        self.log("held-out loss", functional.cross_entropy(self.net(pixels), labels))

    def configure_optimizers(self):
        # return torch.optim.AdamW(self.parameters(), lr=1e-3)
        # Lightning knows the number of steps, and hands step() a closure that returns the loss.
        num_steps = int(self.trainer.estimated_stepping_batches)
        return LearnedOptimizer(self.named_parameters(), "general", num_steps=num_steps)


def batches(meta_split: images.MetaSplit, num_images: int) -> DataLoader:
    pixels, labels = images.load("fashion-mnist", meta_split)
    data = TensorDataset(pixels[:num_images] / 255, labels[:num_images])
    return DataLoader(data, batch_size=128, shuffle=meta_split == "train")


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=2, accelerator="cpu", default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model = Classifier()
        trainer.fit(model, batches("train", 12_800))
        (found,) = trainer.test(model, batches("valid", 5_000), verbose=False)
    print(f"held-out loss after {trainer.global_step} steps: {found['held-out loss']:.3f}")
