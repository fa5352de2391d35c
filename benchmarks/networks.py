"""Networks of the zoo. They take normalized inputs; `--arch benchmarks.networks:NAME` builds one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.datasets import statistics
from secure_export.errors import PolicyError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, fig. 5 left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, outputs, H/stride, W/stride]."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet(nn.Module):
    """ResNet-18 for 32x32 images: 3x3 stem, no max-pool, `width` to 8 x `width` channels."""

    def __init__(self, width: int, classes: int, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage in range(1, 5):
            outputs = width * 2 ** (stage - 1)
            first = BasicBlock(inputs, outputs, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, BasicBlock(outputs, outputs, 1)))
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of normalized images [N, 3, H, W]."""
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Keywords(nn.Module):
    """Spoken words: log power of `bands` frequencies every 16 ms of an 8 kHz signal, then a small ResNet."""

    basis: Tensor

    def __init__(self, bands: int, classes: int) -> None:
        super().__init__()
        time = torch.arange(256) / 256
        angle = 2 * torch.pi * torch.arange(1, bands + 1)[:, None] * time * (128 / bands)
        window = torch.hann_window(256)
        basis = torch.cat([torch.cos(angle), torch.sin(angle)]) * window / window.sum()
        self.register_buffer("basis", basis.view(2 * bands, 1, 1, 256))
        self.resnet = ResNet(8, classes, channels=1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of normalized signals [N, 1, 1, T]."""
        real, imaginary = F.conv2d(x, self.basis, stride=(1, 128)).chunk(2, dim=1)
        power = (real.square() + imaginary.square()).transpose(1, 2)
        logits: Tensor = self.resnet(torch.log(power + 1e-4) / 4 + 1)
        return logits


def keywords(classes: int = 10) -> Keywords:
    """Network for signals [N, 1, 1, T]: 64 bands, ResNet-18 of an eighth of the usual width."""
    return Keywords(64, classes)


def resnet18_w16(classes: int = 10) -> ResNet:
    """ResNet-18 of a quarter of the usual width: 0.7 M parameters, 80 s an epoch on two CPU cores."""
    return ResNet(16, classes)


def resnet18_w8(classes: int = 10) -> ResNet:
    """ResNet-18 of an eighth of the usual width: 0.2 M parameters, for quick trials."""
    return ResNet(8, classes)


def resnet18(classes: int = 10) -> ResNet:
    """ResNet-18 at its usual width: 11 M parameters, for a GPU."""
    return ResNet(64, classes)


def cnn(classes: int = 10) -> nn.Module:
    """Three convolutions with BatchNorm, 32 to 128 channels: 0.1 M parameters, for trials by the dozen."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def vgg16(classes: int = 10) -> nn.Module:
    """VGG-16 with BatchNorm (configuration D) and one linear layer, as usual at 32x32: 15 M parameters."""
    widths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    layers: list[nn.Module] = []
    inputs = 3
    for stage in widths:
        for outputs in stage:
            conv = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def mobilenetv2(classes: int = 10) -> nn.Module:
    """timm's MobileNetV2; stem and second stage keep the size, so that 32x32 ends at 4x4."""
    import timm

    model: nn.Module = timm.create_model("mobilenetv2_100", num_classes=classes)
    for name in ("conv_stem", "blocks.1.0.conv_dw"):
        conv = model.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"timm's {name} is no convolution any more")
        conv.stride = (1, 1)
    return model


def vit_small(classes: int = 10) -> nn.Module:
    """timm's ViT-small on patches of 4x4 of a 32x32 image: 64 tokens, 21 M parameters."""
    import timm

    model: nn.Module = timm.create_model(
        "vit_small_patch16_224", img_size=32, patch_size=4, num_classes=classes
    )
    return model


def named(name: str, classes: int = 10) -> nn.Module:
    """A network of this file, channels last in memory.

    Raises:
        PolicyError: no such network.
    """
    builders = (resnet18_w16, resnet18_w8, resnet18, cnn, vgg16, mobilenetv2, vit_small, keywords)
    known = {builder.__name__: builder for builder in builders}
    if name not in known:
        raise PolicyError(f"no network {name!r}", hint=f"known: {', '.join(known)}")
    model: nn.Module = known[name](classes)
    return model.to(memory_format=torch.channels_last)


class Normalized(nn.Module):
    """A network behind its normalization: images in [0, 1] in, logits out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.network = network
        mean, std = statistics(channels)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, classes] of images [N, 3, H, W] in [0, 1]."""
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits
