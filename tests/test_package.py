from __future__ import annotations

import doctest
import inspect
import os
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import lightning_koopman

OPTIONAL = (
    "matplotlib",
    "torchvision",
    "tensorboard",
    "mlflow",
    "wandb",
    "hypothesis",
    "jsonargparse",
    "lightning",
    "pydmd",
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_the_core_imports_without_optional_packages():
    code = f"""
import sys
import pytorch_lightning  # its own dependencies use optional packages where they are installed
for name in [m for m in sys.modules if m.partition(".")[0] in {OPTIONAL!r}] + list({OPTIONAL!r}):
    sys.modules[name] = None  # from here on, importing it raises ModuleNotFoundError
from lightning_koopman import *
import lightning_koopman.demo.cnn, lightning_koopman.demo.data
KoopmanSpectrumMonitor()
lightning_koopman.demo.data.load("digits", n_train=3)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("root", ["pytorch_lightning", "lightning.pytorch"])
def test_importing_it_leaves_messages_to_the_users_root_and_the_demo_aside(root):
    code = f"""
import sys, {root}, lightning_koopman
from lightning_utilities.core import rank_zero
print(rank_zero.log.name, [name for name in sys.modules if "koopman.demo" in name])
"""
    assert python(code).stdout.strip() == f"{root}.utilities.rank_zero []"


def test_public_names_are_listed_once_and_importable():
    assert len(set(lightning_koopman.__all__)) == len(lightning_koopman.__all__)
    for name in lightning_koopman.__all__:
        assert hasattr(lightning_koopman, name)


@pytest.mark.parametrize("name", lightning_koopman.__all__)
def test_every_public_name_has_an_executed_example(name):
    documented = inspect.getdoc(getattr(lightning_koopman, name))
    assert documented
    assert doctest.DocTestParser().get_examples(documented), f"{name} has no example"


def test_the_package_is_typed_and_leaves_out_compromised_releases():
    assert (Path(lightning_koopman.__file__).parent / "py.typed").is_file()
    assert version("lightning_koopman") == lightning_koopman.__version__
    (lightning,) = [line for line in requires("lightning_koopman") if line.startswith("pytorch-lightning")]
    assert "!=2.6.2" in lightning
    assert "!=2.6.3" in lightning
