"""D-MAE: masked pre-training of a small ViT under the eye of a large one, in one file.

Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023
(arXiv 2205.14443), on top of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(arXiv 2111.06377). The decoupled variant, D2-MAE, is from Gao et al., IJCV 2025 (arXiv 2404.12210).

    python dmae.py                                    # draws its own images, trains its own teacher
    python dmae.py --teacher mae_base.pth             # a real teacher
    python dmae.py --teacher mae_base.pth --data /path/to/imagenet             # the paper's run

You should see the MAE loss fall below the printed loss of predicting nothing, the attention loss
fall, and the k-NN accuracy of the student's features rise above that of the untrained student.

The first half (to the ruler "Training") is the paper: ViT, MAE, DMAE and the loading of teachers.
It can be imported and used alone. The second half pre-trains.

Shapes in comments and einops patterns: b batch, n patches, k kept (visible) patches, h heads,
d width of a head, c width of the tokens, p side of a patch, s and t heads of student and teacher.
A mask holds 1 where a patch is hidden. Blocks count from 1, as in the paper.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import struct
import sys
import time
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from einops import einsum, rearrange
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import IMAGENET_MEAN, IMAGENET_STD, SETS, InputError, mix, open_data

#                    encoder: width, depth, heads; decoder: width, depth, heads
PRESETS = {
    "nano":  ((64, 4, 4), (32, 1, 2)),           # small students, on a CPU
    "slim":  ((64, 6, 8), (32, 1, 2)),           # the student of experiments/study.py
    "micro": ((96, 4, 6), (48, 1, 3)),           # their teacher on `shapes`
    "mini":  ((128, 6, 8), (64, 1, 4)),          # their teacher on the other small sets
    "tiny":  ((192, 12, 12), (96, 1, 3)),        # the paper's: 12 heads, where DeiT-Tiny has 3
    "small": ((384, 12, 12), (192, 1, 6)),
    "base":  ((768, 12, 12), (512, 8, 16)),      # the MAE release's, with its decoders
    "large": ((1024, 24, 16), (512, 8, 16)),
    "huge":  ((1280, 32, 16), (512, 8, 16)),     # published with --patch-size 14
}

# ============================================================================================== ViT


def sincos_positions(width, grid, swapped=False):
    """Fixed 2-D sine-cosine position table (1, rows * columns, width), row by row.

    The first half of the channels encodes the column, the second the row; in each half sines, then
    cosines, of frequencies 10000^(-i / (width / 4)). `swapped`: row first, as MoCo-v3 has it."""
    if width % 4:
        raise InputError(f"width {width}: sine-cosine positions need a multiple of 4")
    sides = (torch.arange(side, dtype=torch.float64) for side in grid)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    halves = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]       # n c/4 each
    table = [torch.cat([half.sin(), half.cos()], dim=1) for half in halves]
    return torch.cat(table[::-1] if swapped else table, dim=1)[None].float()


def attention_scores(q, k):
    """The attention map before the softmax, in float32 even under autocast.

    q, k: (b, h, n, d) -> (b, h, n, n), q.k / sqrt(d)."""
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise InputError(f"width {width} does not divide into {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, return_scores=False):
        """(b, n, c) -> (b, n, c), and the scores (b, h, n, n) or None.

        The output never depends on `return_scores`: fused attention either way, and the scores are
        a product of their own."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        return self.proj(out), attention_scores(q, k) if return_scores else None

    def scores(self, x):
        """(b, n, c) -> (b, h, n, n), touching neither values nor the output projection."""
        rows = 2 * self.qkv.in_features                                  # q and k come first in qkv
        qk = F.linear(x, self.qkv.weight[:rows], self.qkv.bias[:rows])
        return attention_scores(*rearrange(qk, "b n (two h d) -> two b h n d", two=2, h=self.heads))


class Block(nn.Module):
    """Pre-norm transformer block, MLP ratio 4, exact GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))

    def forward(self, x, return_scores=False):
        update, scores = self.attn(self.norm1(x), return_scores)
        x = x + update
        return x + self.mlp(self.norm2(x)), scores

    def scores(self, x):
        return self.attn.scores(self.norm1(x))


class ViT(nn.Module):
    """Vision transformer: the student's encoder, the teacher, later the classifier.

    Parameter names are those of timm and the MAE release. `image_size` is a side or (height,
    width). `mean` and `std` say how its images are normalised: DMAE translates between two such."""

    def __init__(self, image_size=224, patch_size=16, channels=3, width=192, depth=12, heads=12,
                 mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        if patch_size < 1 or any(side < 1 or side % patch_size for side in sides):
            raise InputError(f"image size {sides[0]} x {sides[1]} is not a multiple of patch size "
                             f"{patch_size}")
        self.config = dict(
            image_size=sides, patch_size=patch_size, channels=channels, width=width, depth=depth,
            heads=heads, mean=list(mean), std=list(std))
        self.grid = (sides[0] // patch_size, sides[1] // patch_size)
        self.width, self.depth = width, depth
        # What a pixel means to this network; not weights, hence in no file of weights.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        table = torch.cat([torch.zeros(1, 1, width), sincos_positions(width, self.grid)], dim=1)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(channels, width, patch_size, stride=patch_size)})
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        initialise(self)

    def patchify(self, images):
        """(b, channels, height, width) -> (b, n, p * p * channels): row, column, then channel."""
        p = self.config["patch_size"]
        return rearrange(images, "b ch (gh p1) (gw p2) -> b (gh gw) (p1 p2 ch)", p1=p, p2=p)

    def unpatchify(self, patches):
        """(b, n, p * p * channels) -> (b, channels, height, width)."""
        p, (rows, columns) = self.config["patch_size"], self.grid
        return rearrange(patches, "b (gh gw) (p1 p2 ch) -> b ch (gh p1) (gw p2)",
                         p1=p, p2=p, gh=rows, gw=columns)

    def embed(self, images, ids_keep=None):
        """Class token and kept patches (None: all), with positions: (b, 1 + k, c)."""
        patches = self.patchify(images)                                               # b n (p p ch)
        positions = self.pos_embed[:, 1:]                                             # 1 n c
        if ids_keep is not None:      # choose first, embed after: a quarter of the work at 75 %
            patches = take(patches, ids_keep)                                         # b k (p p ch)
            positions = positions[0][ids_keep]                                        # b k c
        # The strided convolution, as the matrix product that it is.
        weight = rearrange(self.patch_embed["proj"].weight, "c ch p1 p2 -> c (p1 p2 ch)")
        x = F.linear(patches, weight, self.patch_embed["proj"].bias) + positions      # b k c
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)         # b 1 c
        return torch.cat([cls.to(x.dtype), x], dim=1)                                 # b 1+k c

    def forward(self, images, ids_keep=None, scores=(), tokens=()):
        """Run the blocks as far as asked, and no further.

        images: (b, channels, height, width), normalised. ids_keep: (b, k) visible patches, or None
        for all. Returns ({i: scores of block i, (b, h, 1 + k, 1 + k) float32}, {i: tokens after
        block i, (b, 1 + k, c)}) for the blocks i in `scores` and in `tokens`; tokens 0 are the
        embedding. If the last thing wanted is a block's scores, nothing after them is computed."""
        out_scores, out_tokens = {}, {}
        x = self.embed(images, ids_keep)                                              # b 1+k c
        if 0 in tokens:
            out_tokens[0] = x
        last_scores, last_tokens = max(scores, default=0), max(tokens, default=0)
        for i, block in enumerate(self.blocks[:max(last_scores, last_tokens)], start=1):
            if i > last_tokens and i == last_scores:
                out_scores[i] = block.scores(x)                                       # b h 1+k 1+k
                break
            x, found = block(x, return_scores=i in scores)                            # b 1+k c
            if i in scores:
                out_scores[i] = found
            if i in tokens:
                out_tokens[i] = x
        return out_scores, out_tokens

    def encode(self, images):
        """All tokens after the final norm: (b, 1 + n, c). Nothing is masked, nothing is random.

        (In D2-MAE that norm has learnt on the block that the decoder reads, not on the last.)"""
        return self.norm(self(images, tokens=[self.depth])[1][self.depth])

    def resize_grid(self, grid):
        """Bring the position table to another grid (rows, columns), in place.

        A sine-cosine table (either order of its halves) is computed anew, a learnt one interpolated
        bicubically; the class token's row stays."""
        if tuple(grid) == self.grid:
            return self
        stored = self.pos_embed.detach()
        for swapped in (False, True):
            fixed = sincos_positions(self.width, self.grid, swapped).to(stored)
            if (stored[:, 1:] - fixed).abs().max() < 1e-4:
                patches = sincos_positions(self.width, grid, swapped).to(stored)
                break
        else:
            table = rearrange(stored[:, 1:], "1 (gh gw) c -> 1 c gh gw", gh=self.grid[0])
            table = F.interpolate(table, size=tuple(grid), mode="bicubic", antialias=True)
            patches = rearrange(table, "1 c gh gw -> 1 (gh gw) c")
        self.pos_embed = nn.Parameter(torch.cat([stored[:, :1], patches], dim=1),
                                      requires_grad=self.pos_embed.requires_grad)
        self.grid = tuple(grid)
        self.config["image_size"] = [g * self.config["patch_size"] for g in grid]
        return self


def take(x, ids):
    """x: (b, n, c), ids: (b, k) -> (b, k, c), the rows `ids` of each sample."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def initialise(module):
    """Xavier-uniform for every Linear and for the patch embedding, biases 0, tokens N(0, 0.02)."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
            nn.init.zeros_(m.bias)
    for name, p in module.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(p, std=0.02)


# ============================================================================================== MAE


class MAE(nn.Module):
    """Masked autoencoder: an encoder of the visible patches and a light decoder of all.

    `decode_after`: the block, from 1, whose output the decoder reads; default the last (D2-MAE
    reads an earlier one). Decoder names are those of the MAE release."""

    def __init__(self, encoder, decoder_width=96, decoder_depth=1, decoder_heads=3, mask_ratio=0.75,
                 norm_pix=True, decode_after=None):
        super().__init__()
        patches = math.prod(encoder.grid)
        self.kept = int(patches * (1 - mask_ratio) + 1e-9) if math.isfinite(mask_ratio) else 0
        if not 1 <= self.kept < patches:
            raise InputError(f"mask ratio {mask_ratio} keeps {self.kept} of {patches} patches: "
                             "at least one must be visible and one hidden")
        if decoder_depth < 0 or decoder_heads < 1 or decoder_width < 1:
            raise InputError("the decoder's width and heads must be 1 or more, its depth 0 or more")
        if decoder_width % 4 or decoder_width % decoder_heads:
            raise InputError(f"decoder width {decoder_width}: must be a multiple of 4, and divide "
                             f"into {decoder_heads} heads")
        self.encoder, self.norm_pix = encoder, norm_pix
        self.decode_after = decode_after or encoder.depth
        self.config = dict(
            decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
            mask_ratio=mask_ratio, norm_pix=norm_pix, decode_after=self.decode_after)

        numbers = encoder.config["patch_size"] ** 2 * encoder.config["channels"]
        self.decoder_embed = nn.Linear(encoder.width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        table = [torch.zeros(1, 1, decoder_width), sincos_positions(decoder_width, encoder.grid)]
        self.decoder_pos_embed = nn.Parameter(torch.cat(table, dim=1), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder_width, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, numbers)
        for name, part in self.named_children():
            if name != "encoder":
                initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, ids_keep=None):
        """images: (b, channels, height, width), normalised; ids_keep: (b, k) visible patches, drawn
        at random if None -> {"loss": what to minimise, "mae": its only term}."""
        if ids_keep is None:
            ids_keep = self.choose_at_random(images)
        _, tokens = self.encoder(images, ids_keep, tokens=[self.decode_after])
        prediction = self.decode(tokens[self.decode_after], ids_keep)
        mae = self.reconstruction_loss(images, prediction, ids_keep)
        return {"loss": mae, "mae": mae}

    def choose(self, noise):
        """noise: (b, n) -> ids_keep (b, k), the patches of the smallest noise."""
        return noise.argsort(dim=1)[:, :self.kept]

    def choose_at_random(self, images):
        noise = torch.rand(len(images), math.prod(self.encoder.grid), device=images.device)
        return self.choose(noise)

    def decode(self, tokens, ids_keep):
        """tokens: (b, 1 + k, c) of block `decode_after` -> prediction (b, n, p * p * channels)."""
        x = self.decoder_embed(self.encoder.norm(tokens))                             # b 1+k c
        hidden = self.mask_token.to(x.dtype).expand(len(x), math.prod(self.encoder.grid), -1)
        index = ids_keep[..., None].expand(-1, -1, x.shape[-1])                       # b k c
        patches = hidden.scatter(1, index, x[:, 1:])                                  # b n c
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed            # b 1+n c
        for block in self.decoder_blocks:
            x, _ = block(x)                                                           # b 1+n c
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                         # b n (p p ch)

    def target(self, images):
        """To be predicted, (b, n, p * p * channels); each patch's mean and deviation, (b, n, 1)."""
        target = self.encoder.patchify(images.float())
        mean, std = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (target - mean) / std if self.norm_pix else target, mean, std

    def reconstruction_loss(self, images, prediction, ids_keep):
        """Mean squared error over the hidden patches alone (MAE, section 3), in float32."""
        error = (prediction.float() - self.target(images)[0]).square().mean(dim=-1)   # b n
        mask = torch.ones_like(error).scatter(1, ids_keep, 0)                         # 1 is hidden
        return (error * mask).sum() / mask.sum()


# ============================================================================================ D-MAE


class Scores(nn.Module):
    """D2-MAE's extra block: norm1, queries and keys. (b, n, c) -> scores (b, h, n, n)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qk = nn.Linear(width, 2 * width)
        initialise(self)

    def forward(self, x):
        qk = self.qk(self.norm1(x))
        return attention_scores(*rearrange(qk, "b n (two h d) -> two b h n d", two=2, h=self.heads))


class DMAE(nn.Module):
    """A masked autoencoder whose attention is pulled towards a frozen teacher's.

    student: MAE. teacher: ViT, any width, depth, heads, patch size and normalisation; it is
    changed: frozen, and its position table brought to the student's grid. alpha: weight of the
    distillation loss. layers: pairs (student block, teacher block) counted from 1, default the last
    of each; one mixer M per pair, losses summed. match: what is compared,

        scores   the attention maps before the softmax, class token included (the paper's L_attn)
        probs    the same after the softmax
        hidden   the blocks' output tokens

    decoupled: D2-MAE. An extra block of the student meets the teacher's last; build the student's
    MAE with an earlier `decode_after`. Raises InputError for settings that do not fit."""

    def __init__(self, student, teacher, layers=None, match="scores", alpha=1.0, decoupled=False):
        super().__init__()
        encoder = student.encoder
        if match not in ("scores", "probs", "hidden"):
            raise InputError(f"match {match}: choose scores, probs or hidden")
        if decoupled and (layers or match == "hidden"):
            raise InputError("the decoupled variant matches the scores of its extra block: "
                             "not together with layers or with match hidden")
        channels = encoder.config["channels"], teacher.config["channels"]
        if channels[0] not in (1, channels[1]):
            raise InputError(f"a student of {channels[0]}-channel images cannot feed a teacher of "
                             f"{channels[1]}-channel ones")
        self.layers = list(layers or [(encoder.depth + decoupled, teacher.depth)])
        for i, j in self.layers:
            if not (1 <= i <= encoder.depth + decoupled and 1 <= j <= teacher.depth):
                raise InputError(f"layers {i}:{j}: the student has blocks 1 to {encoder.depth}, "
                                 f"the teacher 1 to {teacher.depth}")
        if len(set(self.layers)) < len(self.layers):
            raise InputError("layers: a pair is given twice")
        self.student, self.match, self.alpha = student, match, alpha
        self.extra = Scores(encoder.width, encoder.config["heads"]) if decoupled else None
        # Past nn.Module's registry: thus the teacher is in no optimizer, no state_dict and no DDP,
        # and .train() does not reach it. `_apply` below lets it follow .to(device).
        teacher.resize_grid(encoder.grid).requires_grad_(False).eval()
        self.__dict__["teacher"] = teacher
        sizes = ((teacher.width, encoder.width) if match == "hidden"
                 else (teacher.config["heads"], encoder.config["heads"]))
        self.mixers = nn.ParameterDict(                                               # (t, s) each
            {f"{i}:{j}": nn.Parameter(torch.empty(sizes)) for i, j in self.layers})
        for mixer in self.mixers.values():
            nn.init.kaiming_uniform_(mixer, a=5**0.5)      # PyTorch's default for a 1x1 convolution

    def _apply(self, *args, **kwargs):               # what .to(), .cuda(), .float() go through
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def forward(self, images, ids_keep=None):
        """images: (b, channels, height, width), normalised for the student; ids_keep: (b, k)
        visible patches, drawn at random if None -> {"loss": total, and its terms by name}."""
        student, encoder = self.student, self.student.encoder
        if ids_keep is None:
            ids_keep = student.choose_at_random(images)
        kind = "tokens" if self.match == "hidden" else "scores"
        mine, theirs = zip(*self.layers)

        wanted = {"scores": [], "tokens": [student.decode_after]}
        wanted[kind] = wanted[kind] + [i for i in mine if i <= encoder.depth]
        if self.extra is not None:
            wanted["tokens"].append(encoder.depth)
        scores, tokens = encoder(images, ids_keep, **wanted)
        if self.extra is not None:
            scores[encoder.depth + 1] = self.extra(tokens[encoder.depth])
        prediction = student.decode(tokens[student.decode_after], ids_keep)
        mae = student.reconstruction_loss(images, prediction, ids_keep)

        with torch.no_grad():                          # same image, same visible patches
            t_scores, t_tokens = self.teacher(
                self.teacher_images(images), ids_keep, **{kind: theirs})
        ours, targets = (tokens, t_tokens) if kind == "tokens" else (scores, t_scores)
        distance = sum(self.distance(ours[i], targets[j], self.mixers[f"{i}:{j}"])
                       for i, j in self.layers)
        return {"loss": mae + self.alpha * distance, "mae": mae,
                "hidden" if self.match == "hidden" else "attn": distance}

    def distance(self, ours, theirs, M):
        """L_attn = MSE(A_T, M A_S), the mean over everything, in float32.

        ours, theirs: scores (b, s, 1 + k, 1 + k) and (b, t, 1 + k, 1 + k); M: (t, s), no bias."""
        with torch.autocast(ours.device.type, enabled=False):
            if self.match == "hidden":    # tokens (b, 1 + k, c) each; M: (teacher's c, student's c)
                ours, theirs = (F.layer_norm(x.float(), x.shape[-1:]) for x in (ours, theirs))
                return F.mse_loss(F.linear(ours, M), theirs)
            if self.match == "probs":
                ours, theirs = ours.softmax(dim=-1), theirs.softmax(dim=-1)
            return F.mse_loss(einsum(M, ours, "t s, b s q k -> b t q k"), theirs)

    def teacher_images(self, images):
        """The student's batch as the teacher wants it: its size, channels and normalisation."""
        ours, theirs = self.student.encoder, self.teacher
        settings = ("image_size", "channels", "mean", "std")
        if all(ours.config[k] == theirs.config[k] for k in settings):
            return images
        images = images.float() * ours.std + ours.mean                     # pixels, 0 to 1
        images = images.expand(-1, theirs.config["channels"], -1, -1)      # grey: the same thrice
        size = theirs.config["image_size"]
        if size != ours.config["image_size"]:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        return (images - theirs.mean) / theirs.std


# ================================================================================= loading teachers

# Where the state dict lies in a file, in this order; DINO's `teacher` stands beside a `student`.
CONTAINERS = ("model", "state_dict", "teacher")
# Stripped from names, in any nesting.
PREFIXES = ("module.", "_orig_mod.", "model.", "base_encoder.", "backbone.", "vit.")
# Hugging Face's names, of its files and of transformers 5 in memory, to timm's.
RENAMINGS = [(re.compile(pattern), name) for pattern, name in (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.", lambda m: f".attn.{m[1][0]}."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"^layernorm\.", "norm."),
)]
# Beginnings of names that are no part of the encoder, and what to call them.
UNUSED = {
    "mask_token": "decoder", "decoder": "decoder", "head": "head", "tch_model.": "teacher",
    "attn_adapter.": "mixer", "momentum_encoder.": "momentum encoder", "predictor.": "predictor"}


def read_weights(path):
    """The content of a .pth or .safetensors file, on the CPU; no code in it is ever run."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file of weights in it")
    if not path.exists():
        raise InputError(
            f"no file {path}; the usual teacher, a ViT-Base by MAE, is "
            "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth")
    damaged = InputError(f"{path} cannot be read as weights, it may be truncated: fetch it again")
    if path.suffix == ".safetensors":
        try:
            import safetensors.torch
        except ImportError as error:
            raise InputError(f"{path}: to read it, pip install safetensors") from error
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise damaged from error
    try:
        # The MAE release's training states hold their command line as a Namespace: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds code or other things than weights, or is no "
                         "PyTorch file; give one that holds a plain state_dict()") from error
    # How damaged files have been seen to fail.
    except (OSError, EOFError, RuntimeError, LookupError, ValueError, TypeError, AttributeError,
            AssertionError, struct.error) as error:
        raise damaged from error


def load_vit(path, heads=None):
    """A plain ViT from any of the files that are around: a `ViT` with its weights.

    path: .pth or .safetensors of this project, the MAE release, the D-MAE authors, timm, Hugging
    Face, MoCo-v3, DINO (its teacher) or DeiT. Sizes come from the tensors. Heads are in no tensor
    and come from the first of these that knows:

        1. our own file's config
        2. the D-MAE authors' files: 12
        3. the width: 768 has 12, 1024 and 1280 have 16
        4. the caller: `heads`, or written behind the path, "x.pth:3"

    A caller who contradicts 1 to 3 is refused. `description` of the result says what was read;
    `head` holds the tensors of a classifier on the mean of its patches, fc_norm and head, if the
    file is one's (its fc_norm is also the result's `norm`), else nothing; `classes` their names, if
    our own file says them, else None.
    Raises InputError with the reason for anything that is no plain ViT: every tensor must be one
    of the encoder's, or of a kind known to be unused."""
    path, heads = split_heads(path, heads)
    content = read_weights(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict, but a {type(content).__name__}")
    if {"images", "optimizer"} <= content.keys():
        raise InputError(f"{path} is a checkpoint to resume from: give the student.pth or "
                         "model.pth beside it, which knows its heads and images")
    container = next((k for k in CONTAINERS if isinstance(content.get(k), dict)), None)

    # 1. Names: strip prefixes, rename, sort out what is not the encoder's.
    state, head, prefixes, ignored, unknown, renamed = {}, {}, set(), [], [], False
    for key, tensor in (content[container] if container else content).items():
        name, prefix = str(key), ""
        while begin := next((p for p in PREFIXES if name.startswith(p)), ""):
            name, prefix = name.removeprefix(begin), prefix + begin
        old = name
        for pattern, new in RENAMINGS:
            name = pattern.sub(new, name)
        if use := next((UNUSED[u] for u in UNUSED if name.startswith(u)), None):
            ignored.append(use)
            if name in ("head.weight", "head.bias") and isinstance(tensor, torch.Tensor):
                head[name] = tensor.float()
        elif not isinstance(tensor, torch.Tensor):
            unknown.append(name)
        elif name in state:
            raise InputError(f"{path} holds {name} twice, under different prefixes")
        else:
            state[name] = tensor.float()
            prefixes.add(prefix.replace("_orig_mod.", ""))
            renamed |= name != old
    ignored += [str(k) for k in content if container and k not in (container, "config")]

    # 2. What differs between layouts.
    if "dist_token" in state:
        raise InputError(f"{path} is a distilled DeiT: a plain ViT has no place for its second "
                         "class token (dist_token); take the model without distillation")
    for name in [n for n in state if ".attn.q." in n]:            # Hugging Face: three tensors
        parts = [name.replace(".attn.q.", f".attn.{x}.") for x in "qkv"]
        if all(part in state for part in parts):
            joined = torch.cat([state.pop(part) for part in parts])
            state[name.replace(".attn.q.", ".attn.qkv.")] = joined
    if "norm.weight" in state or "fc_norm.weight" not in state:
        head = {}                                                 # none, or on the class token
    else:                                                         # fine-tuned: its only norm
        head |= {n: t for n, t in state.items() if n.startswith("fc_norm.")}
        state = {re.sub(r"^fc_norm\.", "norm.", n): t for n, t in state.items()}
    numbers = [int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", n) for n in state) if m]
    depth = max(numbers, default=-1) + 1
    last = [n for n in state if n.startswith(f"blocks.{depth - 1}.")]
    if last and all(n.split(".", 2)[2].startswith(("norm1.", "attn.qkv.")) for n in last):
        state = {n: t for n, t in state.items() if n not in last}            # D2-MAE's extra block
        depth, ignored = depth - 1, ignored + ["extra block"]

    # 3. Sizes.
    for name, dimensions in (("cls_token", 3), ("pos_embed", 3), ("patch_embed.proj.weight", 4),
                             ("blocks.0.norm1.weight", 1)):
        if name not in state or state[name].ndim != dimensions or not state[name].numel():
            some = ", ".join([*state, *unknown][:3]) or "none"
            raise InputError(f"{path} holds no plain ViT: no {name} of {dimensions} dimensions "
                             f"among its tensors ({some}, ...)")
    width, positions = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    channels, patch_size = state["patch_embed.proj.weight"].shape[1:3]
    config = dict(patch_size=patch_size, channels=channels, width=width, depth=depth,
                  image_size=math.isqrt(positions) * patch_size)

    # 4. Heads and normalisation.
    own = content.get("config")
    if not isinstance(own, dict) or not {"heads", "image_size", "mean", "std"} <= own.keys():
        own = {}
    authors = "module.model." in prefixes or (
        container == "model" and "module.base_encoder." in prefixes)
    if own:
        layout, known, why = "this project", own["heads"], "its own config"
    elif authors:
        layout, known, why = "D-MAE authors", 12, "being the D-MAE authors'"
    else:
        known, why = {768: 12, 1024: 16, 1280: 16}.get(width), f"its width, {width}"
        layout = ("MoCo-v3" if "module.base_encoder." in prefixes
                  else "DINO" if any("backbone." in prefix for prefix in prefixes)
                  else "Hugging Face" if renamed else "timm" if container is None
                  else "DeiT" if "head" in ignored else "MAE release")
    if known is None and heads is None:
        raise InputError(f"{path}: a ViT {width} wide may have any number of heads and the file "
                         "does not say (DeiT-Tiny has 3, MAE-Tiny 12): write it behind the name, "
                         f"{path.name}:12")
    if known is not None and heads not in (None, known):
        raise InputError(f"{path} has {known} heads by {why}, not {heads}")
    config |= dict(heads=known or heads) | {k: own[k] for k in ("image_size", "mean", "std") if own}
    if not own and channels != 3:
        raise InputError(f"{path} takes images of {channels} channels and does not say how they "
                         "are normalised: only this project's own files may have other than 3")

    # 5. Every tensor in its place, or an error.
    if width < 1 or config["heads"] < 1 or width % config["heads"]:
        raise InputError(f"{path}: width {width} does not divide into {config['heads']} heads")
    vit = ViT(**config)
    shapes = {n: t.shape for n, t in vit.state_dict().items()}
    wrong = ([f"{n} is missing" for n in shapes if n not in state]
             + [f"{n} does not belong to one" for n in [*state, *unknown] if n not in shapes]
             + [f"{n} is {tuple(state[n].shape)}, not {tuple(shape)}" for n, shape in shapes.items()
                if n in state and state[n].shape != shape])
    if wrong:
        raise InputError(f"{path} ({layout}) holds no plain ViT: {wrong[0]}"
                         + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))
    vit.load_state_dict(state)
    vit.head, vit.classes = head, own.get("classes")
    vit.description = (
        f"ViT {width} wide, {depth} blocks, {config['heads']} heads, patch {patch_size}, "
        f"grid {vit.grid[0]}x{vit.grid[1]}, from {path.name} ({layout})"
        + (f", {', '.join(dict.fromkeys(ignored))} ignored" if ignored else ""))
    return vit


def split_heads(path, heads=None):
    """"x.pth:3" -> Path("x.pth"), 3. A file that is really called so stays whole."""
    match = re.fullmatch(r"(.+):(\d+)", str(path))
    if match and not os.path.exists(path):
        if heads not in (None, int(match[2])):
            raise InputError(f"{path}, and {heads} heads: give one number")
        return Path(match[1]), int(match[2])
    return Path(path), heads


# ========================================================================================= Training

DEFAULTS = dict(
    data="shapes", data_dir="data", train_images=None, mask_ratio=0.75, norm_pix=True, layers=None,
    match="scores", alpha=1.0, decoupled=False, micro_batch=None, weight_decay=0.05, seed=0,
    workers=min(8, os.cpu_count() or 1), resume=False, overwrite=False)
# What a run leaves in its folder; nothing else is ever overwritten.
RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pth", "student.pth", "reconstruction.png",
             "attention.png")
# Free to differ in `--resume`.
FREE = {"out", "resume", "overwrite", "workers", "data_dir"}
# Without meaning for plain MAE.
DISTILLING = ("layers", "match", "alpha", "decoupled")
# What the teacher's run of `--teacher self` takes over from the student's.
FROM_STUDENT = ("data", "data_dir", "train_images", "image_size", "patch_size", "crop_scale",
                "mask_ratio", "norm_pix", "epochs", "warmup_epochs", "batch_size", "micro_batch",
                "blr", "weight_decay", "seed", "workers", "device", "amp", "compile")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def make_parser():
    parser = Parser(
        prog="dmae.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Pre-train a small ViT as a masked autoencoder, distilling a teacher's "
                    "attention.",
        epilog="[set]: from the data set's row of SETS in data.py, printed at the start.")
    add = parser.add_argument
    add("--teacher", metavar="FILE", help="weights of a ViT, x.pth or x.pth:3 to give its heads; "
        "none: plain MAE; self: pre-train one first, into OUT/teacher [self for shapes]")
    add("--data", metavar="DIR|NAME", help="a folder of images (train/ and val/, or any tree), or "
        f"{', '.join(n for n in SETS if n != 'folder')} [shapes]")
    add("--train-images", type=int, metavar="N", help="use only N: shortens any run [all]")
    add("--student", choices=PRESETS, help="size of the student [set]")
    add("--image-size", type=int, metavar="N", help="side of the student's images [set]")
    add("--patch-size", type=int, metavar="N", help="side of its patches; image / patch is the "
        "token grid that student and teacher share [set]")
    add("--crop-scale", type=float, metavar="X", help="least area of a random crop: the paper has "
        "0.08, the MAE release 0.2; small images want more [set]")
    add("--mask-ratio", type=float, metavar="X", help="share of patches hidden; lower is slower "
        "and makes the task easier [0.75]")
    add("--no-norm-pix", dest="norm_pix", action="store_false", help="predict plain pixels, not "
        "each patch's normalised ones: nicer pictures, usually poorer features")
    add("--layers", metavar="S:T,...", help="student and teacher blocks to match, from 1; try a "
        "middle one against the last, which the paper found best [the last of each]")
    add("--match", choices=("scores", "probs", "hidden"), help="attention before the softmax, "
        "after it (a much smaller loss: raise --alpha), or the blocks' output tokens [scores]")
    add("--alpha", type=float, metavar="X", help="weight of the distillation loss; at 0 it is "
        "logged without effect, a check on any difference you see [1]")
    add("--decoupled", action="store_true", help="D2-MAE: the decoder reads an earlier block, an "
        "extra one is matched; the last third learns from the teacher alone")
    add("--decoder-width", type=int, metavar="N", help="half the encoder's is enough [preset]")
    add("--decoder-depth", type=int, metavar="N", help="1 is enough for small students [preset]")
    add("--decoder-heads", type=int, metavar="N", help="must divide its width [preset]")
    add("--epochs", type=int, metavar="N", help="0 writes an untrained student, a control [set]")
    add("--warmup-epochs", type=float, metavar="X", help="of linear warm-up; more if the loss "
        "jumps early [a tenth of the epochs]")
    add("--batch-size", type=int, metavar="N", help="images an update, over all processes [set]")
    add("--blr", type=float, metavar="X", help="the learning rate is blr * batch / 256 [set]")
    add("--weight-decay", type=float, metavar="X", help="none on biases and norms [0.05]")
    add_machine_flags(add)
    return parser


def add_machine_flags(add):
    """The flags that every program here has: where things are, how to compute them."""
    add("--data-dir", metavar="DIR", help="where named sets lie, or are downloaded to [data]")
    add("--seed", type=int, metavar="N", help="of everything random; vary it for error bars [0]")
    add("--micro-batch", type=int, metavar="N", help="images at a time on a device, when memory is "
        "short; the update is the same [all]")
    add("--workers", type=int, metavar="N", help="processes decoding image files; results do "
        "not depend on it [cores, at most 8]")
    add("--device", help="cpu, cuda, cuda:1, ... [cuda if there is one]")
    add("--amp", choices=("off", "bf16", "fp16"), help="autocast; fp16 comes with a gradient "
        "scaler [cuda: bf16, or fp16 on cards without it; else off]")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: waits a minute, "
        "then runs faster [on for cuda]")
    add("--out", metavar="DIR", help="the run's folder [the next number under runs/]")
    add("--resume", action="store_true", help="go on after the last finished epoch of --out, with "
        "its settings")
    add("--overwrite", action="store_true", help="start anew in an --out that holds a run")


def main(argv=None):
    """The command line; returns the run's folder. Bad input: a line on stderr, exit status 2."""
    parser = make_parser()
    given, settings = vars(parser.parse_args(argv)), {}
    with one_line_errors(parser, settings):
        teacher = resolve(given, settings)
        return pretrain(settings, teacher)


@contextlib.contextmanager
def one_line_errors(parser, settings):
    """Around a whole program: what the user can mend ends it in one line. settings: the run's."""
    try:
        yield
    except InputError as error:
        parser.error(error)
    except RuntimeError as error:
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        parser.error("out of memory: make the batch smaller, or compute it in pieces, "
                     "--micro-batch 64 say")
    except BrokenPipeError:                           # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:                          # a full disk, a name that is too long
        parser.error(f"{error.strerror}: {error.filename or 'output'}; what a run had finished can "
                     "be resumed" if error.strerror else error)
    except KeyboardInterrupt:
        out = settings.get("out")
        print(f"interrupted; to go on: python {parser.prog} --resume --out {shlex.quote(str(out))}"
              if out and (Path(out) / "config.json").exists()
              else "interrupted before anything was written", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def resolve(given, settings):
    """Fill `settings` with a value for every flag; return the teacher (ViT, None). In this order:

        1. a flag that was given
        2. with --resume, what the run was started with (a flag that differs is refused)
        3. the data set's row, the student's preset, and on `shapes` a short run under a large
           teacher
        4. DEFAULTS, and what the machine has
    """
    if given.get("resume"):
        settings.update(settings_of_the_run(
            given, "teacher", DEFAULTS.keys() | SETS["folder"].keys() | {"teacher"}))
        check(settings)
        return open_teacher(settings)

    name, teacher = given.get("data", DEFAULTS["data"]), given.get("teacher")
    if teacher is None:
        if name != "shapes":
            raise InputError("--teacher is missing: FILE (weights of a ViT), none (plain MAE) or "
                             "self (pre-train one first)")
        teacher = "self"
    mine = RUN_FILES + (("teacher/config.json",) if teacher == "self" else ())
    check_vacant(given, mine, "teacher")
    if teacher == "none" and (useless := [f"--{key}" for key in DISTILLING if key in given]):
        raise InputError(f"{useless[0]} is about a teacher: not with --teacher none")

    row = SETS.get(name, SETS["folder"])
    settings.update(DEFAULTS | row | given, teacher=teacher)
    defaults = dict(zip(("decoder_width", "decoder_depth", "decoder_heads"),
                        PRESETS[settings["student"]][1]))
    vit = open_teacher(settings)
    if vit is not None and vit.width >= 512 and name == "shapes":
        # A real teacher costs far more than the student: a taste of it, in minutes on a CPU.
        defaults |= dict(train_images=4000, epochs=4)
    settings.update({key: value for key, value in defaults.items() if key not in given})
    settings.setdefault("warmup_epochs", settings["epochs"] / 10)
    check(settings)
    return vit


def settings_of_the_run(given, source, needed):
    """With --resume: the settings of the run in --out, and what of `given` may differ from them.

    source: the flag, "teacher" or "init", whose file the run has kept a hash of; it tells this
    program's runs from others. needed: settings that there must be."""
    out = Path(given.get("out", ""))
    if given.get("overwrite"):
        raise InputError("--resume and --overwrite exclude each other")
    if not given.get("out") or not (out / "config.json").is_file():
        raise InputError("--resume needs --out, the folder of a run (one with a config.json)")
    try:
        saved = json.loads((out / "config.json").read_text())
        before, settings = saved["settings"], saved["settings"] | given
        other, sha256 = of_another_program(saved, source), saved.get(f"{source}_sha256")
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{out}/config.json is damaged: restore it, or start anew with "
                         "--overwrite") from error
    if other:
        raise InputError(f"--out {out} holds a run of another program: resume it with that")
    if missing := needed - before.keys():
        raise InputError(f"{out}/config.json is damaged, {min(missing)} is not in it: restore it, "
                         "or start anew with --overwrite")
    file = None if settings[source] in ("none", "self") else settings[source]
    # Files and folders may have moved; a hash and the number of images tell others apart.
    free = set(FREE)
    if not {before.get("data"), settings.get("data")} & SETS.keys():
        free.add("data")
    if file and sha256 and split_heads(file)[1] == split_heads(before[source])[1]:
        free.add(source)
    differ = [f"{key} was {before.get(key)}, now {given[key]}" for key in given.keys() - free
              if before.get(key) != given[key]]
    if file and not split_heads(file)[0].exists():
        raise InputError(f"the --{source} of this run is gone from {file}: give its new place "
                         f"with --{source}")
    if file and file_hash(file) != sha256:
        differ.append(f"the content of {file} is another")
    if differ:
        raise InputError(f"--resume cannot change a run: {'; '.join(sorted(differ))}; leave "
                         "these flags out, or start anew in another --out")
    return settings


def of_another_program(saved, source):
    """Whether a config.json belongs to a run that starts from something else than --source."""
    return isinstance(saved, dict) and f"{source}_sha256" not in saved and any(
        key.endswith("_sha256") for key in saved)


def check_vacant(given, names, source):
    """Raise InputError if --out holds any of the files `names`, and was not given up for them; if
    the file that the flag `source` names is one of them; or if another program's run is there."""
    if given.get("out") == "":
        raise InputError("--out is empty: name a folder")
    out = Path(given["out"]) if "out" in given else None
    held = [out / name for name in names if (out / name).exists()] if out is not None else []
    saved = None
    with contextlib.suppress(OSError, ValueError):             # there is none, or it is damaged
        saved = json.loads((out / "config.json").read_text()) if held else None
    if of_another_program(saved, source):
        raise InputError(f"--out {out} holds a run of another program: name another folder")
    if held and not given.get("overwrite"):
        raise InputError(f"--out {out} holds a run ({held[0].relative_to(out)}): add --resume to "
                         "go on with it or --overwrite to replace it, or name another folder")
    if split_heads(given.get(source, "none"))[0].resolve() in [path.resolve() for path in held]:
        raise InputError(f"--overwrite would delete {given[source]}: name another --out")


def check(settings):
    """Fill in device, precision and compilation, from what the machine has; raise InputError for
    numbers and devices that cannot work."""
    for key, least in dict(
            epochs=0, warmup_epochs=0, batch_size=1, micro_batch=1, blr=0, alpha=0, weight_decay=0,
            workers=0, seed=0).items():
        value, most = settings.get(key), 1000 if key == "workers" else 2**63 - 1
        if value is not None and not least <= value <= most:                # nor is nan
            raise InputError(f"--{key.replace('_', '-')} {value}: must be a number from {least} up")
    if settings.get("warmup_epochs", 0) > settings.get("epochs", 0):
        raise InputError(f"--warmup-epochs {settings['warmup_epochs']}: more than the "
                         f"{settings['epochs']} epochs there are")
    if not 0 < settings.get("crop_scale", 1) <= 1:
        raise InputError(f"--crop-scale {settings['crop_scale']}: must be above 0, and at most 1")

    settings.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(1, device=settings["device"]).device.type
        torch.Generator(settings["device"])                                 # meta has none
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {settings['device']} cannot be used here: take cpu, or cuda "
                         "where there is one") from error
    if settings.get("amp") == "fp16" and device != "cuda":
        raise InputError("--amp fp16 needs a CUDA device: take bf16 or off")
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    settings.setdefault("amp", "bf16" if bf16 else "fp16" if device == "cuda" else "off")
    settings.setdefault("compile", device == "cuda")


def open_teacher(settings):
    """The ViT of --teacher, or None for none. For self an untrained one, to check settings with."""
    if settings["teacher"] == "none":
        return None
    if settings["teacher"] != "self":
        return load_vit(settings["teacher"])
    return new_vit(settings["teacher_preset"], settings)


def new_vit(preset, settings):
    (width, depth, heads), _ = PRESETS[preset]
    return ViT(settings["image_size"], settings["patch_size"], settings["channels"], width, depth,
               heads, settings["mean"], settings["std"])


def file_hash(teacher):
    """sha256 of the teacher's file, or None where there is none."""
    if teacher in ("none", "self"):
        return None
    return hashlib.sha256(split_heads(teacher)[0].read_bytes()).hexdigest()


def join_processes(s):
    """Under torchrun, meet the other processes: (rank, how many, the device of this one, a `print`
    that only the first has)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(s.device)
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device, print if rank == 0 else lambda *text: None


@contextlib.contextmanager
def first_process_first():
    """The first process does what is within, then the others do."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.is_initialized() and dist.get_rank() == 0:
        dist.barrier()


def precision(s, device):
    """Gradient scaler and autocast of --amp."""
    return (torch.amp.GradScaler(device.type, enabled=s.amp == "fp16"),
            torch.autocast(device.type, torch.float16 if s.amp == "fp16" else torch.bfloat16,
                           enabled=s.amp != "off"))


def on_what(s, device, world):
    """Device, precision, compilation and processes, in words."""
    kind = dict(off="float32", bf16="bfloat16", fp16="float16")[s.amp]
    return (f"{device}, {kind}{', compiled' if s.compile else ''}, "
            f"{world} process{'es' * (world > 1)}")


def replicate(model, s, device):
    """What to call in training: the model, compiled in place if asked, averaging its gradients over
    the processes if there are several."""
    if s.compile:
        model.compile()
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None)


def new_model(settings, teacher):
    """An untrained MAE, or DMAE if there is a teacher; its weights depend on the seed alone."""
    s = argparse.Namespace(**settings)
    torch.manual_seed(s.seed)
    encoder = new_vit(s.student, settings)
    student = MAE(encoder, s.decoder_width, s.decoder_depth, s.decoder_heads, s.mask_ratio,
                  s.norm_pix, max(1, 2 * encoder.depth // 3) if s.decoupled else None)
    layers = None
    if s.layers is not None:
        if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", s.layers):
            raise InputError(f"--layers {s.layers}: write STUDENT:TEACHER pairs, as in 2:4,4:6")
        layers = [tuple(map(int, pair.split(":"))) for pair in s.layers.split(",")]
    if teacher is None:
        return student
    return DMAE(student, teacher, layers, s.match, s.alpha, s.decoupled)


def learning_rate(step, total, warmup, peak, end=0.0):
    """The rate at step 0 .. total - 1, set at every step as in MAE:

        1. before `warmup`: a line from 0 to peak
        2. from then on: half a cosine from peak to `end`
    """
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def parameter_groups(model, weight_decay):
    """For AdamW: biases and 1-D parameters are not decayed; the tokens and M are."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    free = {n for n, p in trained.items() if p.ndim <= 1 or n.endswith("bias")}
    decayed = [p for n, p in trained.items() if n not in free]
    return [dict(params=decayed, weight_decay=weight_decay),
            dict(params=[trained[n] for n in trained if n in free], weight_decay=0.0)]


def train_step(model, optimizer, scaler, lr, pieces, batch, autocast, clip=None):
    """One update from `batch` images, which come in `pieces` of (images, ids_keep), or of whatever
    else the model takes to return {"loss": ...}. clip: most the gradient's norm may be.

    Returns the mean of each loss term, still on the device: reading it would wait for the step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1)                 # layer-wise decay, in finetune.py
    means, seen = {}, 0
    for images, other in pieces:
        share, seen = len(images) / batch, seen + len(images)
        # With several processes, gradients are averaged once, along with the last piece.
        more_to_come = isinstance(model, DistributedDataParallel) and seen < batch
        with model.no_sync() if more_to_come else contextlib.nullcontext():
            with autocast:
                losses = model(images, other)
            scaler.scale(losses["loss"] * share).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0) + value.detach() * share
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return means


def epoch_order(train, s, epoch):
    """Indices (steps, batch) of an epoch's images; the last, incomplete batch is dropped."""
    shuffle = torch.Generator().manual_seed(mix(s.seed, 0, epoch))
    steps = len(train) // s.batch_size
    order = torch.randperm(len(train), generator=shuffle)[:steps * s.batch_size]
    return order.view(steps, s.batch_size)


def run_epoch(update, source, optimizer, epoch, steps, s, first):
    """One epoch, of `steps` calls of update(step, images) with a batch from `source` each.

    s: the settings. first: of those that this process computes. Returns the mean of each term that
    `update` returns, and a line for the log. Raises InputError when one is not finite."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    show = world == 1 or dist.get_rank() == 0
    sums, read, waited, began = {}, 0, 0.0, time.perf_counter()
    warm, clock, source = 0, began, iter(source)     # images/s leaves out the first steps
    bar = tqdm(range(steps), f"epoch {epoch + 1}/{s.epochs}", unit="step", leave=False,
               disable=None if show else True)
    for i in bar:
        asked = time.perf_counter()
        images = next(source)
        waited += time.perf_counter() - asked
        step = epoch * steps + i
        sums = {name: sums.get(name, 0) + loss for name, loss in update(step, images).items()}
        if i != 4 and (i + 1) % 20 and i + 1 < steps:
            continue

        # The device is read here, and nowhere else between two steps.
        values = torch.stack(list(sums.values())) / (i + 1) / world
        if world > 1:
            dist.all_reduce(values)
        means = dict(zip(sums, values.tolist()))
        bad = [name for name, mean in means.items() if not math.isfinite(mean)]
        trained = (p for group in optimizer.param_groups for p in group["params"])
        if i + 1 == steps and not all(p.isfinite().all() for p in trained):
            bad.append("weights")
        lr = max(group["lr"] for group in optimizer.param_groups)
        if bad:
            raise InputError(
                f"{' and '.join(bad)} not finite in steps {step - i + read} to {step}, at learning "
                f"rate {lr:.3g}: lower --blr or try --amp off; "
                + (f"{s.out} keeps epoch {epoch}" if epoch else "nothing was kept"))
        now, read = time.perf_counter(), i + 1
        if i == 4 < steps - 1:
            warm, clock = i + 1, now
        rate = s.batch_size * (i + 1 - warm) / max(now - clock, 1e-9)
        bar.set_postfix({name: f"{mean:.4f}" for name, mean in means.items()},
                        images_per_s=f"{rate:.0f}")
        if first and show and i > 4:
            first, left = False, ((s.epochs - epoch) * steps - i - 1) * s.batch_size / rate / 60
            print(f"  expected  {left:.1f} more minutes of training; measuring comes on top")
    return means, dict(epoch=epoch + 1, step=step + 1, lr=lr, images_per_second=rate,
                       data_wait=waited / (time.perf_counter() - began))


def pretrain(settings, teacher):
    """One run, as `resolve` set it up; fills in settings["out"], and returns it."""
    s = argparse.Namespace(**settings)
    rank, world, device, say = join_processes(s)

    # Whatever can be wrong comes to light before anything is written.
    if s.batch_size % world:
        raise InputError(f"--batch-size {s.batch_size} does not divide among {world} processes")
    model = new_model(settings, teacher)
    with first_process_first():                                          # it may download
        train, test = open_data(s.data, settings, (s.image_size, s.image_size), s.data_dir,
                                s.train_images, device, s.workers, s.seed)
    steps = len(train) // s.batch_size
    if not steps:
        raise InputError(f"--batch-size {s.batch_size}: more than the {len(train)} training images")
    check_outside(settings, train, test)
    out = settings["out"] = s.out = open_folder(settings, "teacher", RUN_FILES)

    if s.teacher == "self":
        say(f"first the teacher, a masked autoencoder of its own, in {out}/teacher")
        own = {k: settings[k] for k in FROM_STUDENT} | dict(
            teacher="none", student=s.teacher_preset, out=str(out / "teacher"))
        begun = s.resume and (out / "teacher" / "config.json").exists()
        own["resume" if begun else "overwrite"], own_settings = True, {}
        pretrain(own_settings, resolve(own, own_settings))
        teacher = load_vit(out / "teacher" / "student.pth")
        say("\nthen the student")
        model = new_model(settings, teacher)

    model.to(device)
    student = model if teacher is None else model.student
    encoder, patches = student.encoder, math.prod(student.encoder.grid)
    total, warmup = s.epochs * steps, round(s.warmup_epochs * steps)
    peak = s.blr * s.batch_size / 256
    local = s.batch_size // world
    mine, piece = slice(rank * local, (rank + 1) * local), s.micro_batch or local
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, s.weight_decay), lr=peak,
                                  betas=(0.9, 0.95), fused=device.type in ("cpu", "cuda"))
    scaler, autocast = precision(s, device)

    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    done, log = load_checkpoint(out, parts, len(train)) if s.resume else (0, [])
    if s.resume:
        say(f"{out}: {done} of {s.epochs} epochs are done")
    if s.resume and done == s.epochs and all((out / name).exists() for name in RUN_FILES):
        return out

    def batches(epoch, count=steps):
        return train.batches(epoch_order(train, s, epoch)[:count, mine], epoch)

    def pieces(step, images):
        """(images, ids_keep) to train on. The random numbers of a step are drawn for the whole
        batch and then divided, so that they do not depend on who computes what."""
        generator = torch.Generator(device).manual_seed(mix(s.seed, 1, step))
        noise = torch.rand(s.batch_size, patches, device=device, generator=generator)
        draws = train.draw(s.batch_size, generator)
        shares = [x[mine].split(piece) for x in (student.choose(noise), *draws)]
        for part, ids_keep, *draw in zip(images.split(piece), *shares):
            yield train.augment(part, *draw), ids_keep

    # The header.
    say(f"run {out}: {s.data}, {train.description}")
    say(f"  set       image {s.image_size}, patch {s.patch_size}, crop scale {s.crop_scale}, mean "
        f"{list(s.mean)}, std {list(s.std)}, student {s.student}, {s.epochs} epochs, "
        f"batch {s.batch_size}, blr {s.blr:g}")
    say(f"  student   {sum(p.numel() for p in encoder.parameters()):,} parameters in the encoder, "
        f"{sum(p.numel() for p in trained):,} trained; {student.kept} of {patches} patches visible")
    if teacher is not None:
        say(f"  teacher   {teacher.description}")
        say(f"  distilled blocks {', '.join(model.mixers)} by {s.match}, alpha {s.alpha:g}")
    say(f"  training  effective batch {s.batch_size}, learning rate {peak:.3g}, {total} steps, "
        f"{warmup} of them warm-up; " + on_what(s, device, world))
    first, _ = next(pieces(0, next(iter(batches(0, count=1)))))
    say(f"  MAE loss of predicting nothing: {student.target(first)[0].square().mean():.3f}; "
        "learning begins below it")

    # What the features are worth: after each epoch, and first of all untrained.
    neighbours = None
    if rank == 0 and test is not None and train.labels is not None and test.labels is not None:
        neighbours = KNN(train, test)
    elif rank == 0:
        say("  k-NN      none: it needs train/ and val/ with the same folders of classes")

    def student_features(batches):
        with autocast:
            return pooled_features(encoder, batches)

    if rank == 0 and not done:
        log.clear()
        line = dict(epoch=0, step=0)
        if neighbours:
            line["knn_pixels"] = neighbours(
                lambda batches: torch.cat([images.flatten(1) for images in batches]))
            line["knn"] = neighbours(student_features)
            say(f"  k-NN      raw pixels {line['knn_pixels']:.1%}, "
                f"untrained student {line['knn']:.1%}")
        record(out, log, line)

    replica = replicate(model, s, device)

    def update(step, images):
        lr = learning_rate(step, total, warmup, peak)
        return train_step(replica, optimizer, scaler, lr, pieces(step, images), local, autocast)

    for epoch in range(done, s.epochs):
        means, line = run_epoch(update, batches(epoch), optimizer, epoch, steps, s,
                                first=epoch == done)
        if rank == 0:
            line |= means
            if train.broken:
                line["broken_images"] = len(train.broken)
            if neighbours:
                line["knn"] = neighbours(student_features)
            record(out, log, line)
            save_student(out / "student.pth", model)
            save_checkpoint(out, parts, epoch + 1, len(train))
            say(f"epoch {epoch + 1}/{s.epochs}: "
                + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                + (f", k-NN {line['knn']:.1%}" if neighbours else "")
                + f", {line['images_per_second']:.0f} images/s")

    if rank == 0:
        save_student(out / "student.pth", model)           # there may have been no epoch to do it
        samples = test or train
        images = next(iter(samples.plain(torch.linspace(0, len(samples) - 1, 8).long())))
        reconstruction_picture(student, images, out / "reconstruction.png")
        attention_picture(model, images[:4], out / "attention.png")
        if neighbours:
            say(f"k-NN top-1: raw pixels {log[0]['knn_pixels']:.1%}, untrained student "
                f"{log[0]['knn']:.1%}, now {log[-1]['knn']:.1%}")
        say(f"in {out}: student.pth, reconstruction.png, attention.png, log.jsonl")
    if world > 1:
        dist.barrier()             # whoever returns finds the files: a teacher's are read at once
    return out


# --------------------------------------------------------------------------- k-NN, files, pictures


def knn_top1(bank, bank_labels, test, test_labels, k=20, temperature=0.07):
    """Share of `test` that a weighted k-NN vote gets right. Features (N, c), labels (N,) int64.

    Cosine similarity; each of the k nearest votes with exp(similarity / temperature)."""
    bank, test = F.normalize(bank, dim=1), F.normalize(test, dim=1)
    right, classes = 0, int(bank_labels.max()) + 1
    rows = max(1, min(1000, 10**8 // len(bank)))                             # bounds the memory
    for part, labels in zip(test.split(rows), test_labels.split(rows)):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test)


@torch.no_grad()
def pooled_features(encoder, batches, block=None, pool="mean"):
    """Tokens of a block (None: the last) after a parameter-free layer norm: (N, c).

    pool: "mean" of the patch tokens, or the class token, "cls"."""
    block = encoder.depth if block is None else block
    tokens = (encoder(images, tokens=[block])[1][block] for images in batches)
    tokens = (F.layer_norm(x.float(), x.shape[-1:]) for x in tokens)
    return torch.cat([x[:, 1:].mean(dim=1) if pool == "mean" else x[:, 0] for x in tokens])


class KNN:
    """Accuracy of any features on samples of the training images, the bank, and the test images,
    the same ones for every seed; None: all of them."""

    def __init__(self, train, test, bank=10_000, queries=2_000):
        def sample(source, count):
            return torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]

        self.sources = train, test
        self.ids = sample(train, bank), sample(test, queries)

    def __call__(self, features):
        """features: a function from batches of images to (N, c)."""
        bank, query = (features(source.plain(ids)) for source, ids in zip(self.sources, self.ids))
        labels = [x.labels[ids].to(bank.device) for x, ids in zip(self.sources, self.ids)]
        return knn_top1(bank, labels[0], query, labels[1])


def check_outside(settings, *sources):
    """Raise InputError if the run's folder would lie among a folder's images."""
    out = Path(settings.get("out", "runs"))
    for source in sources if settings["data"] not in SETS else ():
        if source is not None and source.root.resolve() in (out.resolve(), *out.resolve().parents):
            raise InputError(f"--out {out} is inside the data, {source.root}: name a folder "
                             "elsewhere, that what is written does not mix with the images")


def open_folder(settings, source, names):
    """Make the run's folder, given or the next free number under runs/, and write its config, with
    a hash of the file given as --source. names: the files of an earlier run, to be removed."""
    folder = [settings.get("out")]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            number = 0
            while folder[0] is None:
                number += 1
                with contextlib.suppress(FileExistsError):
                    Path(f"runs/{number:04d}").mkdir(parents=True)
                    folder[0] = f"runs/{number:04d}"
            out = Path(folder[0])
            out.mkdir(parents=True, exist_ok=True)
            if not settings.get("resume"):
                content = dict(
                    settings=settings | dict(out=str(out)), torch=torch.__version__,
                    torchvision=torchvision.__version__,
                    **{f"{source}_sha256": file_hash(settings[source])})

                def replace(temporary):     # the old run goes once the folder can be written to
                    temporary.write_text(json.dumps(content, indent=1) + "\n")
                    for name in names:
                        (out / name).unlink(missing_ok=True)

                write(out / "config.json", replace)
        except OSError as error:
            raise InputError(f"--out {folder[0] or 'runs'}: cannot write there, "
                             f"{error.strerror}") from error
    if dist.is_initialized():
        dist.broadcast_object_list(folder, src=0)
    return Path(folder[0])


def record(out, log, line):
    """Append a line to the log, a list, and to the run's log.jsonl."""
    log.append(line)
    write(out / "log.jsonl", lambda path: path.write_text("".join(
        json.dumps(x) + "\n" for x in log)))


def save_checkpoint(out, parts, epoch, images, classes=None):
    """All that `load_checkpoint` needs. parts: name -> what has a state_dict. images, classes: of
    the training set, how many and which; others are refused."""
    content = {name: part.state_dict() for name, part in parts.items()}
    content |= dict(epoch=epoch, images=images, classes=classes)
    write(out / "checkpoint.pth", lambda path: torch.save(content, path))


def load_checkpoint(out, parts, images, classes=None):
    """Restore `parts` from the run in `out`: (epochs done, lines of the log up to there)."""
    path = out / "checkpoint.pth"
    if not path.exists():
        return 0, []
    try:
        saved = read_weights(path)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        log = [line for line in log if line["epoch"] <= saved["epoch"]]
        if log[-1]["epoch"] != saved["epoch"]:
            raise ValueError("the log is shorter than the run")
    except (InputError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"checkpoint.pth or log.jsonl in {out} is damaged or of another run: "
                         "restore them, or start anew with --overwrite") from error
    if saved["images"] != images:
        raise InputError(f"the run in {out} had {saved['images']} training images, now there are "
                         f"{images}: restore them, or start anew in another --out")
    if saved.get("classes") != classes:
        raise InputError(f"the run in {out} had other classes: restore their names, or start anew "
                         "in another --out")
    return saved["epoch"], log


def write(path, save):
    """save(a temporary name), then rename: a file is there as a whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:                # torch.save, where the file system has refused
        raise OSError(errno.EIO, "cannot be written, is the disk full?", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_student(path, model):
    """Encoder (names as in timm), decoder (as in the MAE release), mixers, plain settings."""
    mae = model.student if isinstance(model, DMAE) else model
    mixers = model.mixers if isinstance(model, DMAE) else {}

    def plain(tensors):
        return {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    decoder = {n: t for n, t in mae.state_dict().items() if not n.startswith("encoder.")}
    config = mae.encoder.config | mae.config
    if isinstance(model, DMAE):
        config |= dict(match=model.match)
    content = dict(model=plain(mae.encoder.state_dict()), decoder=plain(decoder),
                   mixers=plain(mixers), config=config)
    write(path, lambda temporary: torch.save(content, temporary))


@torch.no_grad()
def reconstructions(student, images):
    """Images (b, c, H, W), their visible patches, the prediction, and both of these together.

    A prediction of normalised patches has no brightness and contrast of its own: it is shown with
    each patch's true mean and deviation."""
    noise = torch.rand(len(images), math.prod(student.encoder.grid),
                       generator=torch.Generator().manual_seed(0))
    ids_keep = student.choose(noise.to(images.device))
    tokens = student.encoder(images, ids_keep, tokens=[student.decode_after])[1]
    prediction = student.decode(tokens[student.decode_after], ids_keep)
    patches = student.encoder.patchify(images)
    if student.norm_pix:
        _, mean, std = student.target(images)
        prediction = prediction * std + mean
    hidden = torch.ones_like(patches[..., :1]).scatter(1, ids_keep[..., None], 0)     # b n 1
    visible = patches * (1 - hidden)
    panels = [patches, visible, prediction, visible + prediction * hidden]
    return [student.encoder.unpatchify(panel) for panel in panels]


def reconstruction_picture(student, images, path):
    """A row per image: it, its visible patches, the prediction, and both of these together."""
    panels = [as_rgb(student.encoder, panel) for panel in reconstructions(student, images)]
    save_grid(torch.stack(panels, dim=1).flatten(0, 1), path, columns=4)


@torch.no_grad()
def attention_picture(model, images, path):
    """Attention of the last block's class token to the patches, a column per head, each scaled to
    its own maximum. Two rows an image: the student's, and below it the teacher's."""
    views = [(model.encoder, images)] if isinstance(model, MAE) else [
        (model.student.encoder, images), (model.teacher, model.teacher_images(images))]
    columns = 1 + max(vit.config["heads"] for vit, _ in views)
    picture = as_rgb(*views[0])                                                       # b 3 H W
    rows = []
    for vit, seen in views:
        scores = vit(seen, scores=[vit.depth])[0][vit.depth]                          # b h 1+n 1+n
        maps = rearrange(scores.softmax(dim=-1)[:, :, 0, 1:], "b h (gh gw) -> b h gh gw",
                         gh=vit.grid[0])
        maps = F.interpolate(maps / maps.amax(dim=(2, 3), keepdim=True), picture.shape[2:])
        row = picture.new_ones(len(picture), columns, *picture.shape[1:])             # b h 3 H W
        row[:, 0], row[:, 1:1 + maps.shape[1]] = picture, maps[:, :, None]
        rows.append(row)
    save_grid(torch.stack(rows, dim=1).flatten(0, 2), path, columns)


def as_rgb(vit, images):
    """Normalised images -> (b, 3, H, W) in 0 to 1, at least 96 pixels high."""
    images = (images.float() * vit.std + vit.mean).clamp(0, 1)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    return F.interpolate(images, scale_factor=math.ceil(96 / images.shape[2]))


def save_grid(images, path, columns):
    write(path, lambda temporary: torchvision.utils.save_image(
        images, temporary, nrow=columns, pad_value=1, format="png"))


if __name__ == "__main__":
    main()
