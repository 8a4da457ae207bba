"""Networks in PyTorch as narrow as those of `narrow.narrowed`.

A ResNet with torchvision's names, a vision transformer and a ConvNeXt with timm's.
"""

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
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
                blocks.append((Bottleneck if bottleneck else BasicBlock)(c, width, stride))
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


class Branch(nn.Module):
    """Submodules by name, applied in order."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return x


def norm(c):
    return nn.LayerNorm(c, eps=1e-6)


def mlp(c):
    return Branch(fc1=nn.Linear(c, 4 * c), act=nn.GELU(), fc2=nn.Linear(4 * c, c))


class Attention(nn.Module):
    def __init__(self, c, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Scale(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(c))

    def forward(self, x):
        return x * self.gamma


class TransformerBlock(nn.Module):
    def __init__(self, c, layer_scale):
        super().__init__()
        self.norm1, self.attn = norm(c), Attention(c, heads=2)
        self.norm2, self.mlp = norm(c), mlp(c)
        self.ls1, self.ls2 = (Scale(c) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class ViT(nn.Module):
    """For images of 33 pixels; `layer_scale` as in DINOv2."""

    def __init__(self, *, depth=2, layer_scale=False, c=16):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, 10, c))
        self.patch_embed = Branch(proj=nn.Conv2d(3, c, 11, 11))
        self.blocks = nn.Sequential(*(TransformerBlock(c, layer_scale) for _ in range(depth)))
        self.norm = norm(c)
        self.head = nn.Linear(c, 3)

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of `[b c h w]`."""

    def __init__(self, c):
        super().__init__(c, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ConvNeXtBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv_dw, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), norm(c)
        self.mlp, self.gamma = mlp(c), nn.Parameter(torch.ones(c))

    def forward(self, x):
        y = self.gamma * self.mlp(self.norm(self.conv_dw(x).movedim(1, -1)))
        return x + y.movedim(-1, 1)


class ConvNeXt(nn.Module):
    """One block a stage."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), ChannelNorm(8))
        stages, c_in = [], 8
        for c in (8, 8, 16, 16):
            down = nn.Sequential(ChannelNorm(c_in), nn.Conv2d(c_in, c, 2, 2))
            blocks = nn.Sequential(ConvNeXtBlock(c))
            stages.append(Branch(downsample=down if stages else nn.Identity(), blocks=blocks))
            c_in = c
        self.stages = nn.Sequential(*stages)
        self.head = Branch(norm=norm(c_in), fc=nn.Linear(c_in, 3))

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))
