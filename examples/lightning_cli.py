"""LightningCLI: callbacks from a YAML file, options from the command line.

Run with ``python examples/lightning_cli.py fit --config examples/lightning_cli.yaml``.  It needs jsonargparse, no
network, and takes under a minute.
"""

from pytorch_lightning import LightningDataModule
from pytorch_lightning.cli import LightningCLI
from torch.utils.data import DataLoader

from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load


class Digits(LightningDataModule):
    def __init__(self, n_train: int = 600) -> None:
        super().__init__()
        self.train, self.test = load("digits", n_train=n_train).loaders()

    def train_dataloader(self) -> DataLoader:
        return self.train

    def val_dataloader(self) -> DataLoader:
        return self.test


if __name__ == "__main__":
    cli = LightningCLI(PaperCNN, Digits, seed_everything_default=0, save_config_callback=None)
    monitor, stop = cli.trainer.callbacks[:2]
    print(monitor.summary().splitlines()[0])
    print(stop.message)
