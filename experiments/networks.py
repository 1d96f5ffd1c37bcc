"""The networks of the studies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu, scaled_dot_product_attention

Hidden = Tensor | tuple[Tensor, Tensor]  # of a GRU, or of an LSTM
CONVOLUTIONS: dict[int, tuple[Callable[..., nn.Module], Callable[[int], nn.Module]]] = {
    1: (nn.Conv1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.BatchNorm2d),
}


def perceptron(
    *widths: int,
    activation: Callable[[], nn.Module] = nn.ReLU,
    norm: Callable[[int], nn.Module] | None = None,
    bias: bool = True,
) -> nn.Sequential:
    """A perceptron with torch's own initialisation, as users have it; a norm stands before each activation."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths[:-1]):
        layers += [nn.Linear(fan_in, fan_out, bias)]
        layers += [] if norm is None else [norm(fan_out)]
        layers += [activation()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias))


class RecurrentLanguageModel(nn.Module):
    """As in pytorch/examples, word_language_model: embedding, recurrent layers, dropout."""

    def __init__(
        self,
        vocabulary: int,
        width: int = 96,
        *,
        cell: Callable[..., nn.RNNBase] = nn.LSTM,
        layers: int = 2,
        rate: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.cells = cell(width, width, layers, dropout=rate if layers > 1 else 0.0, batch_first=True)
        self.dropout = nn.Dropout(rate)
        self.decoder = nn.Linear(width, vocabulary)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        output, hidden = self.cells(self.dropout(self.embedding(tokens)), hidden)
        return self.decoder(self.dropout(output)), hidden


class TransformerLanguageModel(nn.Module):
    """As in pytorch/examples, word_language_model: sines for the places, norms behind the blocks, dropout."""

    def __init__(self, vocabulary: int, width: int = 64, longest: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(0.2)
        block = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.2, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, vocabulary)
        self.register_buffer("places", sines(longest, width))
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Tensor, hidden: None = None) -> tuple[Tensor, None]:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        inputs = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim) + self.get_buffer("places")[:length]
        return self.decoder(self.blocks(self.dropout(inputs), mask, is_causal=True)), None


class GPT(nn.Module):
    """As nanoGPT: norms before the blocks, learned places, the decoder's weights are the embedding's, no biases."""

    def __init__(self, vocabulary: int, length: int, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = math.sqrt(2 * depth) if name.endswith("out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 / scale)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.tokens.weight.T


class GPTBlock(nn.Module):
    """Attention and a perceptron, each behind a norm and beside the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.attention(self.attention_norm(x)).split(width, -1)
        )
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.out(nn.functional.gelu(self.hidden(self.norm(x))))


class Sorter(nn.Module):
    """A small transformer, as a demonstration has it, that reads a sequence and writes one of the same length."""

    def __init__(self, symbols: int, length: int, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.places = nn.Embedding(length, width)
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.blocks(self.embedding(tokens) + self.places.weight))


class CNN(nn.Module):
    """As in pytorch/examples, mnist, for images of 8 by 8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3)
        self.hidden, self.out = nn.Linear(32 * 2 * 2, 64), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = relu(self.second(relu(self.first(images))))
        x = dropout(nn.functional.max_pool2d(x, 2).flatten(1), 0.25, self.training)
        return self.out(dropout(relu(self.hidden(x)), 0.5, self.training))


class ResNet(nn.Module):
    """Residual blocks with batch norm on images, or on sequences of vectors; each but the first halves the sides.

    Args:
        widths: of the blocks.
        channels: of the input.
        classes: of the output.
        dimensions: 1 for (points, channels, length), 2 for (points, channels, height, width).
    """

    def __init__(
        self, widths: Sequence[int] = (8, 16, 32), channels: int = 1, classes: int = 10, dimensions: int = 2
    ) -> None:
        super().__init__()
        convolution, norm = CONVOLUTIONS[dimensions]
        self.stem = nn.Sequential(convolution(channels, widths[0], 3, 1, 1, bias=False), norm(widths[0]), nn.ReLU())
        first = ResidualBlock(widths[0], widths[0], 1, dimensions)
        self.blocks = nn.Sequential(first, *(ResidualBlock(*each, 2, dimensions) for each in pairwise(widths)))
        self.out = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(images)).flatten(2).mean(-1))


class ResidualBlock(nn.Module):
    """Two convolutions with batch norm, beside an identity or a projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, dimensions: int = 2) -> None:
        super().__init__()
        convolution, norm = CONVOLUTIONS[dimensions]
        self.body = nn.Sequential(
            convolution(inputs, outputs, 3, stride, 1, bias=False),
            norm(outputs),
            nn.ReLU(),
            convolution(outputs, outputs, 3, 1, 1, bias=False),
            norm(outputs),
        )
        self.beside: nn.Module = nn.Identity()
        if stride > 1:
            self.beside = nn.Sequential(convolution(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + self.beside(x))


class VAE(nn.Module):
    """As in pytorch/examples, vae; by default for images of 8 by 8."""

    def __init__(self, width: int = 128, latent: int = 8, pixels: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(width, latent), nn.Linear(width, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(images)
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(code), mean, log_variance


def sines(length: int, width: int) -> Tensor:
    """Sines and cosines (length, width) of the place at wavelengths up to 10,000."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)
