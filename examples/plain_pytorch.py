"""Read a training, average its weights and keep masks in a plain PyTorch loop, without Lightning's Trainer.

Run with ``python examples/plain_pytorch.py``.  It needs no network and takes under a minute.
"""

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_koopman import MaskSet, Trajectory, averaged_weights, prunable_parameters, read_training
from lightning_koopman.demo.data import load

torch.manual_seed(0)
train, test = load("digits", n_train=600).loaders()
network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
trajectory = Trajectory(sum(each.numel() for each in network.parameters()), capacity=30)
losses, reading = [], None


def accuracy() -> float:
    with torch.no_grad():
        right = torch.cat([network(images).argmax(1) == labels for images, labels in test])
    return float(right.float().mean())


for epoch in range(1, 41):
    total = 0.0
    for images, labels in train:
        noisy = torch.where(torch.rand(len(labels)) < 0.2, torch.randint(10, labels.shape), labels)  # a noisy loss
        loss = nn.functional.cross_entropy(network(images), noisy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(labels)
    trajectory.append(parameters_to_vector(network.parameters()).detach())
    losses.append(total / len(train.dataset))
    reading = read_training(trajectory, losses, before=reading)
    if epoch % 10 == 0:
        print(f"epoch {epoch}: loss {losses[-1]:.3f}, {reading.phase.value}, test accuracy {accuracy():.1%}")

average = averaged_weights(trajectory)
vector_to_parameters(average.values.to(torch.float32), network.parameters())
print(f"average of the last {average.length} epochs: test accuracy {accuracy():.1%}")

masks = MaskSet.from_scores(prunable_parameters(network), sparsity=0.75)  # by magnitude
masks.pin(network, optimizer)  # from here on pruned weights stay zero
print(f"{masks.sparsity:.0%} of the weights pruned: test accuracy {accuracy():.1%}")
