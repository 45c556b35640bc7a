"""A frozen transformer with LoRA adapters, the data, a pass of training and of evaluation."""

import math
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

PATCHES, PATCH = 16, 4
"""An image of 8 x 8 is a sequence of 16 patches of 2 x 2."""


class LoRA(nn.Module):
    """A frozen bfloat16 layer and the product of two small matrices beside it (Hu et al., 2021)."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, layer.in_features, dtype=torch.bfloat16))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, dtype=torch.bfloat16))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output with the adapter's added."""
        return self.layer(inputs) + F.linear(F.linear(inputs, self.down), self.up)


class Block(nn.Module):
    """Attention and a feed-forward layer, all of their matrices with adapters."""

    def __init__(self, width: int, heads: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in "ab"])
        self.qkv = LoRA(nn.Linear(width, 3 * width), rank)
        self.out = LoRA(nn.Linear(width, width), rank)
        self.wide = LoRA(nn.Linear(width, 4 * width), rank)
        self.narrow = LoRA(nn.Linear(4 * width, width), rank)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what follows from (batch, tokens, width)."""
        batch, tokens, width = hidden.shape
        split = self.qkv(self.norms[0](hidden)).view(batch, tokens, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return hidden + self.narrow(F.gelu(self.wide(self.norms[1](hidden))))


class Transformer(nn.Module):
    """A small transformer of bfloat16 weights; those without adapters are the same everywhere.

    They stand for a pretrained model that all nodes have. Here they come from a seed.
    """

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, rank: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2021)
            self.embedding = nn.Linear(PATCH, width).requires_grad_(False)
            self.places = nn.Parameter(0.5 * torch.randn(PATCHES, width), requires_grad=False)
            self.blocks = nn.ModuleList([Block(width, heads, rank) for _ in range(depth)])
            self.head = nn.Linear(width, 10)
        self.to(torch.bfloat16)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, float32, of images (batch, 16, 4)."""
        hidden = self.embedding(images.to(torch.bfloat16)) + self.places
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1)).float()


def adapters(net: nn.Module) -> dict[str, Tensor]:
    """Return what is trained, in float32: an ArrayRecord holds no bfloat16, and nothing is lost."""
    trained = {name: value for name, value in net.named_parameters() if value.requires_grad}
    return {name: value.detach().float() for name, value in trained.items()}


def set_adapters(net: nn.Module, values: dict[str, Tensor]) -> None:
    """Set what is trained; torch rounds to bfloat16."""
    net.load_state_dict(values, strict=False)


@lru_cache
def split_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return patches and labels to train on and to test on (every fifth)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 8 - 1
    patches = images.view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, PATCHES, PATCH)
    labels = torch.from_numpy(digits.target).long()
    tested = torch.arange(len(labels)) % 5 == 0
    return (patches[~tested], labels[~tested]), (patches[tested], labels[tested])


def train(net: nn.Module, part: tuple[Tensor, Tensor], steps: int, learning_rate: float) -> float:
    """Train the adapters with Adam; return the average loss."""
    images, labels = part
    trained = [value for value in net.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    total = 0.0
    for _ in range(steps):
        chosen = torch.randint(len(labels), (32,))
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


def test(net: nn.Module, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return loss and accuracy of the network."""
    images, labels = part
    with torch.no_grad():
        outputs = net(images)
    loss = F.cross_entropy(outputs, labels).item()
    return loss, float((outputs.argmax(1) == labels).double().mean())
