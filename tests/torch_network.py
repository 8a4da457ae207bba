"""A ResNet in PyTorch with torchvision's names, narrow as `narrow.Narrow`."""

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        if stride != 1 or c_in != c_out:
            self.downsample = shortcut(c_in, c_out, stride)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class Bottleneck(nn.Module):
    def __init__(self, c_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if stride != 1 or c_in != 4 * width:
            self.downsample = shortcut(c_in, 4 * width, stride)

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


def shortcut(c_in, c_out, stride):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))


class ResNet(nn.Module):
    """`depth` blocks a layer; `head`: `(features) -> module`, by default linear to 3 classes."""

    def __init__(
        self, *, depth=1, bottleneck=False, concat_pool=False, head=lambda c: nn.Linear(c, 3)
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c = 8
        for number, (width, stride) in enumerate([(8, 1), (8, 2), (16, 2), (16, 2)], 1):
            blocks = []
            for _ in range(depth):
                blocks.append((Bottleneck if bottleneck else Block)(c, width, stride))
                c, stride = 4 * width if bottleneck else width, 1
            setattr(self, f"layer{number}", nn.Sequential(*blocks))
        self.concat_pool = concat_pool
        self.fc = head(2 * c if concat_pool else c)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        pooled = x.mean((2, 3))
        if self.concat_pool:
            pooled = torch.cat([functional.adaptive_max_pool2d(x, 1).flatten(1), pooled], 1)
        return self.fc(pooled)
