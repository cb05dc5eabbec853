"""Fine-tune a small transformer with LoRA adapters, and stop when they have converged.

Run with ``python examples/fine_tune_lora.py``.  It needs peft and transformers, no network, and takes under a minute.
The texts are modules of Python's standard library, read byte by byte.  The task is to tell from 64 bytes which module
they come from.
"""

import argparse
import calendar
import difflib
import inspect
import logging
import warnings
from types import ModuleType

import pytorch_lightning as pl
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from lightning_koopman import EarlyStopOnUnitEigenvalues, KoopmanSpectrumMonitor

LENGTH = 64  # bytes in a sample


def samples(module: ModuleType, count: int) -> torch.Tensor:
    text = inspect.getsource(module).encode("ascii", "replace")
    return torch.tensor(list(text[: count * LENGTH])).reshape(count, LENGTH)


class Learner(pl.LightningModule):
    def __init__(self, network: torch.nn.Module, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = self.network(input_ids=batch[0], labels=batch[-1]).loss
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=self.lr)


def train(network: torch.nn.Module, lr: float, data: TensorDataset, epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Learner(network, lr), DataLoader(data, batch_size=20, shuffle=True))
    return trainer


warnings.filterwarnings("ignore")
pl.seed_everything(0, verbose=False)
config = GPT2Config(
    vocab_size=128, n_positions=LENGTH, n_embd=48, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    num_labels=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
language = GPT2LMHeadModel(config)
first = train(language, 3e-3, TensorDataset(torch.cat([samples(argparse, 600), samples(logging, 400)])), 3)
print(f"pretrained: loss {first.callback_metrics['train_loss']:.2f}")

classifier = GPT2ForSequenceClassification(config)
classifier.transformer.load_state_dict(language.transformer.state_dict())
adapted = get_peft_model(classifier, LoraConfig(TaskType.SEQ_CLS, r=4, target_modules=["c_attn", "c_fc"]))
adapted.print_trainable_parameters()
texts, labels = torch.cat([samples(calendar, 60), samples(difflib, 60)]), torch.arange(2).repeat_interleave(60)
monitor, stop = KoopmanSpectrumMonitor(), EarlyStopOnUnitEigenvalues()  # they watch the trainable parameters only
last = train(adapted, 5e-3, TensorDataset(texts, labels), 120, monitor, stop)
print(f"fine-tuned: loss {last.callback_metrics['train_loss']:.4f} after {last.current_epoch} epochs")
print(stop.message)
