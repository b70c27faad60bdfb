"""A tiny UNet of ADM (arXiv 2105.05233, section 3 and appendix A) in plain PyTorch, whose tensors are called as in OpenAI's layout, and
EDM on it (arXiv 2206.00364, Table 1), with the time of the networks that were published with Consistency Models."""

import math

import torch
from torch import nn
from torch.nn import functional as F


LEVELS = (32, 64)  # channels
HEAD = 16


class Residual(nn.Module):
    """BigGAN's residual block: with `change` 2 or 0.5 it changes the resolution, of its input and of its way around."""

    def __init__(self, before, after, width, change=1, scale_shift=True):
        super().__init__()
        self.change, self.scale_shift = change, scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(width, after * (1 + scale_shift)))
        out = nn.Conv2d(after, after, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, after), nn.SiLU(), nn.Dropout(0.0), out)
        self.skip_connection = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def resized(self, x):
        if self.change == 1:
            return x
        return F.avg_pool2d(x, 2) if self.change < 1 else x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.resized(act(norm(x))))
        told = self.emb_layers(emb)[:, :, None, None]
        norm, act, drop, conv = self.out_layers
        if self.scale_shift:  # adaptive group normalisation
            scale, shift = told.chunk(2, 1)
            h = norm(h) * (scale + 1) + shift
        else:
            h = norm(h + told)
        return self.skip_connection(self.resized(x)) + conv(drop(act(h)))


class Attention(nn.Module):
    """Each pixel sees all others, in heads of `HEAD` channels."""

    def __init__(self, channels, order):
        super().__init__()
        self.order, self.heads = order, channels // HEAD
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb):
        rows = self.qkv(self.norm(x).flatten(2))  # [B, 3 C, pixels]
        seen = []
        for head in range(self.heads):
            first = [head * HEAD + part * x.shape[1] for part in range(3)]
            if self.order == "legacy":
                first = [(3 * head + part) * HEAD for part in range(3)]
            query, key, value = (rows[:, one : one + HEAD] for one in first)
            weight = (query.transpose(1, 2) @ key / math.sqrt(HEAD)).softmax(-1)  # [B, pixels, pixels]
            seen.append(value @ weight.transpose(1, 2))
        return x + self.proj_out(torch.cat(seen, 1)).unflatten(2, x.shape[2:])


class Chain(nn.Sequential):
    def forward(self, x, emb):
        for part in self:
            x = part(x) if isinstance(part, nn.Conv2d) else part(x, emb)
        return x


class Adm(nn.Module):
    """`F(x, time, label)`, `[B, 3, H, W]`.

    Args:
        classes (`int`, *optional*): Of labels.
        order (`str`): Of queries, keys and values.
        scale_shift (`bool`): Whether the time scales and shifts, as on ImageNet, or is added, as on LSUN.
        layers (`int`): Residual blocks of a level.
        levels (`tuple[int]`): Channels.
        attending (`int`): The first level that attends.
    """

    def __init__(self, classes=None, order="new", scale_shift=True, layers=1, levels=LEVELS, attending=1, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        first, width = levels[0], 4 * levels[0]
        self.time_embed = nn.Sequential(nn.Linear(first, width), nn.SiLU(), nn.Linear(width, width))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, width)

        def block(before, after, change=1):
            return Residual(before, after, width, change, scale_shift)

        self.input_blocks = nn.ModuleList([Chain(nn.Conv2d(3, first, 3, padding=1))])
        stack, now = [first], first
        for level, channels in enumerate(levels):
            for _ in range(layers):
                parts, now = [block(now, channels)], channels
                self.input_blocks.append(Chain(*parts, *[Attention(now, order)] * (level >= attending)))
                stack.append(now)
            if level < len(levels) - 1:
                self.input_blocks.append(Chain(block(now, now, 0.5)))
                stack.append(now)
        self.middle_block = Chain(block(now, now), Attention(now, order), block(now, now))
        self.output_blocks = nn.ModuleList()
        for level, channels in reversed(list(enumerate(levels))):
            for layer in range(layers + 1):
                parts, now = [block(now + stack.pop(), channels)], channels
                parts += [Attention(now, order)] * (level >= attending)
                parts += [block(now, now, 2)] * (level > 0 and layer == layers)
                self.output_blocks.append(Chain(*parts))
        self.out = nn.Sequential(nn.GroupNorm(32, first), nn.SiLU(), nn.Conv2d(first, 3, 3, padding=1))

    def forward(self, x, time, label=None):
        half = self.time_embed[0].in_features // 2
        angles = time[:, None] * torch.exp(-math.log(10_000) * torch.arange(half) / half)
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], 1))
        if label is not None:
            emb = emb + self.label_emb(label)
        passed = []
        for one in self.input_blocks:
            x = one(x, emb)
            passed.append(x)
        x = self.middle_block(x, emb)
        for one in self.output_blocks:
            x = one(torch.cat([x, passed.pop()], 1), emb)
        return self.out(x)

    @torch.no_grad()
    def denoise(self, x_t, sigma, label=None, data=0.5):
        """E[x0 | x_t] of one noise level."""
        total = sigma**2 + data**2
        time = torch.full((len(x_t),), 1000 * math.log(sigma) / 4)
        output = self(x_t / math.sqrt(total), time, label)
        return data**2 / total * x_t + sigma * data / math.sqrt(total) * output


def euler(denoise, noise, steps, highest=80.0, lowest=0.002, rho=7):
    """EDM's deterministic sampler of first order (Algorithm 1 without its second evaluation)."""
    ends = [level ** (1 / rho) for level in (highest, lowest)]
    sigmas = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)] + [0.0]
    x = noise * highest
    for sigma, below in zip(sigmas, sigmas[1:], strict=False):
        x = x + (below - sigma) * (x - denoise(x, sigma)) / sigma
    return x
