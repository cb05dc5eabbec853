from __future__ import annotations

import pytest
import torch

from lightning_koopman.demo.__main__ import main
from lightning_koopman.demo.cnn import PaperCNN
from lightning_koopman.demo.data import load


def test_the_demo_prints_a_summary_and_draws_figures(tmp_path, capsys):
    options = ["--epochs", "7", "--n-train", "200", "--output", str(tmp_path / "out"), "--accelerator", "cpu"]
    figures = main(options)
    printed = capsys.readouterr().out
    assert "epochs   1 to   4  warming up" in printed
    assert "Koopman spectrum of weights" in printed
    assert len(figures) == 3
    for path in figures:
        assert path.is_file()
        assert str(path) in printed


def test_data_that_cannot_be_had_are_one_line_that_says_where_to_put_them(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision").datasets

    def fails(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(datasets.MNIST, "download", fails)
    for command in (["--dataset", "mnist"], ["reproduce", "--figure", "2", "--output", str(tmp_path)]):
        option = "--data" if "reproduce" in command else "--data-root"
        with pytest.raises(SystemExit, match=r"MNIST is not in .*raw and cannot be downloaded \(no network\)") as told:
            main([*command, option, str(tmp_path)])
        assert "\n" not in str(told.value)
        assert "train-images-idx3-ubyte" in str(told.value)
        assert ("--figure 4 5" if "reproduce" in command else "'digits'") in str(told.value)


@pytest.mark.mnist
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_the_demo_runs_on_mnist(mnist_root, tmp_path, capsys, optimizer):
    options = ["--dataset", "mnist", "--data-root", mnist_root, "--n-train", "300", "--epochs", "3"]
    options += ["--optimizer", optimizer, "--initialization", "xavier", "--output", str(tmp_path)]
    main([*options, "--accelerator", "cpu"])
    assert "300 images of mnist" in capsys.readouterr().out


def test_the_network_is_the_papers():
    model = PaperCNN()
    assert sum(parameter.numel() for parameter in model.parameters()) == 65_558
    assert [tuple(p.shape) for p in model.parameters() if p.ndim > 1] == [
        (16, 1, 5, 5),
        (32, 16, 5, 5),
        (100, 512),
        (10, 100),
    ]


@pytest.mark.parametrize(("scheme", "std"), [("he", (2 / 512) ** 0.5), ("xavier", (2 / 612) ** 0.5), ("normal", 1.0)])
def test_initialisations_have_their_standard_deviation(scheme, std):
    torch.manual_seed(0)
    weight = PaperCNN(scheme).network[7].weight
    assert float(weight.detach().std()) == pytest.approx(std, rel=0.03)


def test_digits_need_no_network_and_look_like_mnist():
    data = load("digits", n_train=50)
    images, labels = data.train[:]
    assert images.shape == (50, 1, 28, 28)
    assert images.min() >= 0
    assert images.max() <= 1
    assert labels.dtype == torch.int64
    assert len(data.test) == 297
    assert len(load("digits").train) == 1500


def test_shuffling_is_reproducible():
    data = load("digits", n_train=50)
    first, second = ([labels.tolist() for _, labels in data.loaders(seed=3)[0]] for _ in range(2))
    assert first == second


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="dataset must be one of"):
        load("cifar")
    with pytest.raises(ValueError, match="n_train must be at least 1"):
        load("digits", n_train=0)
    with pytest.raises(ValueError, match="initialization must be one of"):
        PaperCNN("orthogonal")
    with pytest.raises(ValueError, match="optimizer must be one of"):
        PaperCNN(optimizer="lbfgs")
    with pytest.raises(SystemExit):
        main(["--epochs", "0"])
