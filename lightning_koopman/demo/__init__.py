"""The paper's MNIST experiment as a command: ``python -m lightning_koopman.demo``. Never imported by the library."""
