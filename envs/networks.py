"""The networks of the generated inner tasks: small, and of the kinds that people train.

Each is an ordinary module that draws its own initial weights, and all of them can be trained in a stack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

T = TypeVar("T")

ACTIVATIONS: Mapping[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
CELLS: Mapping[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class Dropout(nn.Module):
    """Dropout at a rate that is drawn with the initial weights: 0 in half of the networks, else uniform to `most`."""

    rate: Tensor

    def __init__(self, most: float) -> None:
        super().__init__()
        if not 0 <= most < 1:
            raise ValueError(f"dropout must be a rate in [0, 1), got {most}")
        self.register_buffer("rate", most * torch.rand(()) * torch.randint(2, ()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand_like(x) >= self.rate
        return x * kept / (1 - self.rate)


class Rescaled(nn.Module):
    """A linear layer that trains its weights and biases in a unit of their own, each drawn with the initial weights.

    It computes what the layer does; but a step of SGD is the square of the unit as large, one of Adam the unit, so that
    layers want learning rates of their own, as they do in many networks. In half of the networks all units are 1. From
    Metz et al. (2022), "VeLO: Training Versatile Learned Optimizers by Scaling Up".
    """

    units: Tensor

    def __init__(self, linear: nn.Linear, most: float = 3.0) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("units", torch.exp(math.log(most) * (2 * torch.rand(2) - 1) * torch.randint(2, ())))
        with torch.no_grad():
            linear.weight.div_(self.units[0])
            linear.bias.div_(self.units[1])

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.units[0] * self.linear.weight, self.units[1] * self.linear.bias)


class MLP(nn.Sequential):
    """A perceptron with He-normal weights.

    Args:
        inputs, hidden, outputs: the widths, from the first to the last.
        activation: "relu", "tanh" or "gelu".
        layer_norm: normalise before each activation.
        dropout: the most that is dropped after an activation, see `Dropout`.
        rescaled: whether each layer is `Rescaled`.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        activation: str = "relu",
        layer_norm: bool = False,
        dropout: float = 0.0,
        rescaled: bool = False,
    ) -> None:
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ValueError(f"inputs, hidden and outputs must be widths of at least 1, got {widths}")
        kind = _one_of("activation", ACTIVATIONS, activation)
        scaled: Callable[[nn.Linear], nn.Module] = Rescaled if rescaled else lambda linear: linear
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths[:-1]):
            layers += [scaled(_linear(fan_in, fan_out))]
            layers += [nn.LayerNorm(fan_out)] if layer_norm else []
            layers += [kind()]
            layers += [Dropout(dropout)] if dropout else []
        super().__init__(*layers, scaled(_linear(widths[-2], outputs)))


class TwoHeads(nn.Module):
    """A shared trunk with a head that classifies and one that predicts a number: outputs (points, classes + 1)."""

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int, *, activation: str = "relu") -> None:
        super().__init__()
        *first, last = hidden
        self.trunk = nn.Sequential(MLP(inputs, first, last, activation=activation), ACTIVATIONS[activation]())
        self.classify, self.predict = _linear(last, classes), _linear(last, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x)
        return torch.cat([self.classify(x), self.predict(x)], -1)


class ConvNet(nn.Sequential):
    """3 × 3 convolutions, each of which halves the sides of an image (points, channels, size, size); then a linear
    layer."""

    def __init__(
        self, channels: int, size: int, widths: Sequence[int], classes: int, *, batch_norm: bool = False
    ) -> None:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise([channels, *widths]):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride=2, padding=1, bias=not batch_norm)]
            layers += [nn.BatchNorm2d(fan_out)] if batch_norm else []
            layers += [nn.ReLU()]
            size = (size + 1) // 2
        super().__init__(*layers, nn.Flatten(), nn.Linear(size * size * widths[-1], classes))


class Recurrent(nn.Module):
    """A language model: tokens (points, length) → embedding → "rnn", "gru" or "lstm" → logits of the next tokens."""

    def __init__(self, tokens: int, width: int, *, cell: str = "gru") -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.cell = _one_of("cell", CELLS, cell)(width, width, batch_first=True)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.embedding(x))[0])


class Transformer(nn.Module):
    """A language model: tokens (points, length) → causal self-attention, pre-norm → logits of the next tokens."""

    def __init__(self, tokens: int, length: int, width: int, *, heads: int = 2, layers: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.position[: x.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        # Written out: on a CPU, matrix products over a stack of networks are faster than the fused attention.
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))


class NoisyQuadratic(nn.Module):
    """½ Σ hᵢ (Rθ − x)ᵢ², with a power-law spectrum h of a drawn exponent, a drawn rotation R, and noise x as input.

    The model of Zhang et al. (2019), "Which Algorithmic Choices Matter at Which Batch Sizes?". Outputs are the terms of
    the sum, (points, dimension). The rotation is there because an optimizer that works by coordinates would otherwise
    find the axes of the quadratic ready for it.
    """

    root: Tensor
    rotation: Tensor

    def __init__(self, dimension: int, exponent: tuple[float, float] = (0.5, 2.0)) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, dimension))
        power = torch.empty(()).uniform_(*exponent)
        spectrum = torch.arange(1, dimension + 1) ** -power
        self.register_buffer("root", (spectrum / spectrum.sum()).sqrt())
        self.register_buffer("rotation", torch.linalg.qr(torch.randn(dimension, dimension)).Q)

    def forward(self, x: Tensor) -> Tensor:
        return (self.root * (self.position @ self.rotation - x)).square() / 2


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _one_of(name: str, known: Mapping[str, T], given: str) -> T:
    if given not in known:
        raise ValueError(f"{name} must be one of {sorted(known)}, got {given!r}")
    return known[given]
