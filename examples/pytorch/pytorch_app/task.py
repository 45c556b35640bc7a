"""The model, the data, a pass of training and of evaluation."""

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchvision.datasets import MNIST

Example = tuple[Tensor, ...]


class Net(nn.Module):
    """A small convolutional network for 28 x 28 gray images."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(16 * 4 * 4, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.convolutions(images))


@lru_cache
def load_mnist(data_dir: str, train: bool) -> TensorDataset:
    """Load MNIST once per process; torchvision downloads it where it is not there yet."""
    mnist = MNIST(data_dir, train=train, download=True)
    images = (mnist.data.unsqueeze(1) / 255 - 0.1307) / 0.3081
    return TensorDataset(images, mnist.targets)


def load_data(
    data_dir: str, partition_id: int, num_partitions: int, batch_size: int
) -> tuple[DataLoader[Example], DataLoader[Example]]:
    """Return a client's own examples, 80 % to train on and 20 % to evaluate on."""
    everything = load_mnist(data_dir, train=True)
    shuffled = torch.randperm(len(everything), generator=torch.Generator().manual_seed(42))
    own = Subset(everything, shuffled[partition_id::num_partitions].tolist())
    parts = random_split(own, [0.8, 0.2], generator=torch.Generator().manual_seed(42))
    return DataLoader(parts[0], batch_size, shuffle=True), DataLoader(parts[1], batch_size)


def train(
    net: nn.Module,
    examples: DataLoader[Example],
    epochs: int,
    learning_rate: float,
    device: torch.device,
) -> float:
    """Train the network; return the average loss."""
    net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate, momentum=0.9)
    total = 0.0
    for _ in range(epochs):
        for images, labels in examples:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(examples))


def test(
    net: nn.Module, examples: DataLoader[Example], device: torch.device
) -> tuple[float, float]:
    """Return loss and accuracy of the network."""
    net.to(device).eval()
    loss, correct, count = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in examples:
            outputs, wanted = net(images.to(device)), labels.to(device)
            loss += nn.functional.cross_entropy(outputs, wanted, reduction="sum").item()
            correct += int((outputs.argmax(1) == wanted).sum())
            count += len(wanted)
    return loss / count, correct / count
