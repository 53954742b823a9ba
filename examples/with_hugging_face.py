"""Hugging Face's Trainer with a learned optimizer: a tiny Llama, from a configuration, on Python's own sources."""

import tempfile

from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from learnedopt import LearnedOptimizer
from learnedopt.tasks.data import text

NUM_STEPS, LENGTH = 100, 64
logging.set_verbosity_error()


def windows(meta_split: text.MetaSplit, num_windows: int) -> list[dict]:
    symbols = text.load(meta_split)[: num_windows * LENGTH].long().view(num_windows, LENGTH)
    return [{"input_ids": window, "labels": window} for window in symbols]


if __name__ == "__main__":
    set_seed(0)
    config = LlamaConfig(
        vocab_size=text.NUM_SYMBOLS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = LearnedOptimizer(model.named_parameters(), "general", num_steps=NUM_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=NUM_STEPS, per_device_train_batch_size=16, per_device_eval_batch_size=64, use_cpu=True,
            lr_scheduler_type="constant",  # the rule has its own schedule, and the Trainer's default falls to zero
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            model, arguments, train_dataset=windows("train", 2_000), eval_dataset=windows("valid", 200),
            optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        found = trainer.evaluate()
    print(f"held-out loss after {trainer.state.global_step} steps: {found['eval_loss']:.3f}")
