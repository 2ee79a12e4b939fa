"""A small residual network with batch norm, for images of any size (He et al. 2016, section 4.2)."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: subsample, pad channels with 0)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.new_channels:  # else nothing to do, and F.pad would copy x
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return F.relu(y + x)


class ResNet(nn.Module):
    """ResNet-(6 blocks + 2): a stem, three stages of widths w, 2w and 4w, average pooling, one linear layer.

    Input (n, channels, height, width), output logits (n, classes); in float32, whatever the weights are. With one
    channel, ten classes, width 8 and one block a stage (ResNet-8) it has 19,074 parameters.
    """

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 8, blocks: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        layers: list[nn.Module] = []
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            for index in range(blocks):
                layers.append(Block(inputs, outputs, stride=2 if stage > 0 and index == 0 else 1))
                inputs = outputs
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015: less spread between seeds than torch's default
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x.to(self.stem.weight.dtype))))
        return self.head(self.layers(x).mean(dim=(2, 3))).float()
