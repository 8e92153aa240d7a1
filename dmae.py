"""D-MAE: masked pre-training of a small ViT under the eye of a large one, in one file.

Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023
(arXiv 2205.14443), on top of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(arXiv 2111.06377). The decoupled variant, D2-MAE, is from Gao et al., IJCV 2025 (arXiv 2404.12210).

    python dmae.py                                    # draws its own images, trains its own teacher
    python dmae.py --teacher mae_base.pth             # a real teacher
    python dmae.py --teacher mae_base.pth --data /path/to/imagenet             # the paper's run

You should see the MAE loss fall below the printed loss of predicting nothing, the attention loss
fall, and the k-NN accuracy of the student's features rise above that of the untrained student.

The first half (to the ruler "Training") is the paper: ViT, MAE, DMAE and the loading of teachers. It
can be imported and used alone. The second half pre-trains.

Shapes in comments and einops patterns: b batch, n patches, k kept (visible) patches, h heads, d width
of a head, c width of the tokens, p side of a patch, s and t heads of student and teacher.
A mask holds 1 where a patch is hidden. Blocks count from 1, as in the paper.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import pickle
import re
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
from tqdm import tqdm

from data import IMAGENET_MEAN, IMAGENET_STD, SETS, InputError, mix, open_data

#                    encoder: width, depth, heads; decoder: width, depth, heads
PRESETS = {
    "nano":  ((64, 4, 4), (32, 1, 2)),           # a student of 32-pixel images on a CPU
    "micro": ((96, 4, 6), (48, 1, 3)),           # and its teachers: of `shapes`,
    "mini":  ((128, 6, 8), (64, 1, 4)),          # and of the other small sets
    "tiny":  ((192, 12, 12), (96, 1, 3)),        # the paper's: 12 heads, where DeiT-Tiny has 3
    "small": ((384, 12, 12), (192, 1, 6)),
    "base":  ((768, 12, 12), (512, 8, 16)),      # the MAE release's, with its decoders
    "large": ((1024, 24, 16), (512, 8, 16)),
    "huge":  ((1280, 32, 16), (512, 8, 16)),     # published with --patch-size 14
}

# ============================================================================================ ViT


def sincos_positions(width, grid, swapped=False):
    """Fixed 2-D sine-cosine position table (1, rows * columns, width), row by row.

    The first half of the channels encodes the column, the second the row; in each half sines, then
    cosines, of frequencies 10000^(-i / (width / 4)). `swapped`: row first, as MoCo-v3 has it."""
    if width % 4:
        raise InputError(f"width {width}: sine-cosine positions need a multiple of 4")
    rows, columns = torch.meshgrid(*(torch.arange(g, dtype=torch.float64) for g in grid), indexing="ij")
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

    Parameter names are those of timm and the MAE release. `image_size` is a side or (height, width).
    `mean` and `std` say how its images are normalised, so that DMAE can translate between two."""

    def __init__(self, image_size=224, patch_size=16, channels=3, width=192, depth=12, heads=12,
                 mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        height, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
        if patch_size < 1 or height < 1 or columns < 1 or height % patch_size or columns % patch_size:
            raise InputError(f"image size {height} x {columns} is not a multiple of patch size {patch_size}")
        self.config = dict(
            image_size=[height, columns], patch_size=patch_size, channels=channels, width=width,
            depth=depth, heads=heads, mean=list(mean), std=list(std))
        self.grid = (height // patch_size, columns // patch_size)
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
        p, (rows, columns) = self.config["patch_size"], self.grid
        return rearrange(patches, "b (gh gw) (p1 p2 ch) -> b ch (gh p1) (gw p2)",
                         p1=p, p2=p, gh=rows, gw=columns)

    def embed(self, images, ids_keep=None):
        """Class token and the kept patches, with positions: (b, 1 + k, c). None keeps all, in order."""
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
        """All tokens after the final norm: (b, 1 + n, c). Nothing is masked, nothing is random."""
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


# ============================================================================================ MAE


class MAE(nn.Module):
    """Masked autoencoder: an encoder of the visible patches and a light decoder of all.

    `decode_after`: the block whose output the decoder reads, default the last (D2-MAE reads an
    earlier one). Decoder names are those of the MAE release."""

    def __init__(self, encoder, decoder_width=96, decoder_depth=1, decoder_heads=3, mask_ratio=0.75,
                 norm_pix=True, decode_after=None):
        super().__init__()
        patches = math.prod(encoder.grid)
        self.kept = int(patches * (1 - mask_ratio) + 1e-9) if math.isfinite(mask_ratio) else 0
        if not 1 <= self.kept < patches:
            raise InputError(f"mask ratio {mask_ratio} keeps {self.kept} of {patches} patches: "
                             "at least one must be visible and one hidden")
        if decoder_depth < 0 or decoder_width < 1 or decoder_heads < 1:
            raise InputError("decoder width and heads must be at least 1, its depth at least 0")
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
            ids_keep = self.choose(torch.rand(len(images), math.prod(self.encoder.grid),
                                              device=images.device))
        _, tokens = self.encoder(images, ids_keep, tokens=[self.decode_after])
        mae = self.reconstruction_loss(images, self.decode(tokens[self.decode_after], ids_keep), ids_keep)
        return {"loss": mae, "mae": mae}

    def choose(self, noise):
        """noise: (b, n) -> ids_keep (b, k), the patches of the smallest noise."""
        return noise.argsort(dim=1)[:, :self.kept]

    def decode(self, tokens, ids_keep):
        """tokens: (b, 1 + k, c) of the block `decode_after` -> prediction (b, n, p * p * channels)."""
        x = self.decoder_embed(self.encoder.norm(tokens))                             # b 1+k c
        hidden = self.mask_token.to(x.dtype).expand(len(x), math.prod(self.encoder.grid), -1)
        index = ids_keep[..., None].expand(-1, -1, x.shape[-1])                       # b k c
        patches = hidden.scatter(1, index, x[:, 1:])                                  # b n c
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed            # b 1+n c
        for block in self.decoder_blocks:
            x, _ = block(x)                                                           # b 1+n c
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                         # b n (p p ch)

    def target(self, images):
        """What is predicted, (b, n, p * p * channels), and each patch's mean and deviation (b, n, 1)."""
        target = self.encoder.patchify(images.float())
        mean, std = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return (target - mean) / std if self.norm_pix else target, mean, std

    def reconstruction_loss(self, images, prediction, ids_keep):
        """Mean squared error over the hidden patches alone (MAE, section 3), in float32."""
        error = (prediction.float() - self.target(images)[0]).square().mean(dim=-1)   # b n
        mask = torch.ones_like(error).scatter(1, ids_keep, 0)                         # b n, 1 is hidden
        return (error * mask).sum() / mask.sum()


# ========================================================================================== D-MAE


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

    student: MAE. teacher: ViT, any width, depth, heads, patch size and normalisation; its position
    table is brought to the student's grid. layers: pairs (student block, teacher block) counted from
    1, default the last of each; one mixer M per pair, losses summed. match: what is compared,

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
        if encoder.config["channels"] not in (1, teacher.config["channels"]):
            raise InputError(f"a student of {encoder.config['channels']} channels cannot feed a teacher "
                             f"of {teacher.config['channels']}")
        self.layers = list(layers or [(encoder.depth + decoupled, teacher.depth)])
        for i, j in self.layers:
            if not (1 <= i <= encoder.depth + decoupled and 1 <= j <= teacher.depth):
                raise InputError(f"layers {i}:{j}: the student has blocks 1 to {encoder.depth}, "
                                 f"the teacher 1 to {teacher.depth}")
        if len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers {self.layers}: a pair is given twice")
        self.student, self.match, self.alpha = student, match, alpha
        self.extra = Scores(encoder.width, encoder.config["heads"]) if decoupled else None
        # Past nn.Module's registry: thus the teacher is in no optimizer, no state_dict and no DDP,
        # and .train() does not reach it. `_apply` below lets it follow .to(device).
        teacher.resize_grid(encoder.grid).requires_grad_(False).eval()
        self.__dict__["teacher"] = teacher
        sizes = ((teacher.width, encoder.width) if match == "hidden"
                 else (teacher.config["heads"], encoder.config["heads"]))
        self.mixers = nn.ParameterDict({f"{i}:{j}": torch.empty(sizes) for i, j in self.layers})  # t s
        for mixer in self.mixers.values():
            nn.init.kaiming_uniform_(mixer, a=5**0.5)        # PyTorch's default for a 1x1 convolution

    def _apply(self, *args, **kwargs):
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)

    def forward(self, images, ids_keep=None):
        """images: (b, channels, height, width), normalised for the student; ids_keep: (b, k) visible
        patches, drawn at random if None -> {"loss": the total, then its terms by name}."""
        student, encoder = self.student, self.student.encoder
        if ids_keep is None:
            ids_keep = student.choose(torch.rand(len(images), math.prod(encoder.grid), device=images.device))
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
            t_scores, t_tokens = self.teacher(self.teacher_images(images), ids_keep, **{kind: theirs})
        ours, targets = (tokens, t_tokens) if kind == "tokens" else (scores, t_scores)
        distance = sum(self.distance(ours[i], targets[j], self.mixers[f"{i}:{j}"]) for i, j in self.layers)
        return {"loss": mae + self.alpha * distance, "mae": mae,
                "hidden" if self.match == "hidden" else "attn": distance}

    def distance(self, ours, theirs, M):
        """L_attn = MSE(A_T, M A_S), the mean over everything, in float32.

        ours, theirs: scores (b, s, 1 + k, 1 + k) and (b, t, 1 + k, 1 + k); M: (t, s), no bias."""
        with torch.autocast(ours.device.type, enabled=False):
            if self.match == "hidden":                 # (b, 1 + k, c) each; M: (c of teacher, c of student)
                ours, theirs = (F.layer_norm(x.float(), x.shape[-1:]) for x in (ours, theirs))
                return F.mse_loss(F.linear(ours, M), theirs)
            if self.match == "probs":
                ours, theirs = ours.softmax(dim=-1), theirs.softmax(dim=-1)
            return F.mse_loss(einsum(M, ours, "t s, b s q k -> b t q k"), theirs)

    def teacher_images(self, images):
        """The student's batch as the teacher wants it: its size, channels and normalisation."""
        ours, theirs = self.student.encoder, self.teacher
        if all(ours.config[k] == theirs.config[k] for k in ("image_size", "channels", "mean", "std")):
            return images
        images = images.float() * ours.std + ours.mean                                # pixels, 0 to 1
        images = images.expand(-1, theirs.config["channels"], -1, -1)                 # grey, three times
        if ours.config["image_size"] != theirs.config["image_size"]:
            images = F.interpolate(images, theirs.config["image_size"], mode="bicubic", antialias=True)
        return (images - theirs.mean) / theirs.std


# ================================================================================ loading teachers

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
UNUSED = {"mask_token": "decoder", "decoder": "decoder", "head": "head", "tch_model.": "teacher",
          "attn_adapter.": "mixer", "momentum_encoder.": "momentum encoder", "predictor.": "predictor"}


def read_weights(path):
    """The content of a .pth or .safetensors file on the CPU; no code in it is ever run."""
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file of weights in it")
    try:
        if path.suffix == ".safetensors":
            try:
                from safetensors.torch import load_file
            except ImportError as error:
                raise InputError(f"{path}: reading this needs `pip install safetensors`") from error
            return load_file(path)
        # The MAE release's training states hold their command line as a Namespace: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(
            f"no file {path}; the usual teacher is "
            "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds code or other things than weights, or is no "
                         "PyTorch file; save its state_dict() alone") from error
    except InputError:
        raise
    # Every way in which a damaged file has been seen to fail; safetensors has an error of its own.
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, IndexError, struct.error,
            AttributeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read, it may be truncated; fetch it again") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise InputError(f"{path} cannot be read, it may be truncated; fetch it again") from error


def load_vit(path, heads=None):
    """A plain ViT from any of the files that are around, as a `ViT` with its weights.

    path: ours, the MAE release's, the D-MAE authors', timm's, Hugging Face's, MoCo-v3's, DINO's
    (its teacher), DeiT's; .pth or .safetensors. Sizes come from the tensors; heads are in no tensor
    and come from, in this order:

        1. our own file's config        3. the width: 768 has 12, 1024 and 1280 have 16
        2. the D-MAE authors' files: 12  4. the caller: `heads`, or written behind the path, "x.pth:3"

    `description` of the result says what was read. Raises InputError, with the reason, for anything
    else: every tensor must be one of the encoder's or of a kind known to be unused."""
    path = str(path)
    if (match := re.fullmatch(r"(.+):(\d+)", path)) and not os.path.exists(path):
        path, heads = match[1], int(match[2])
    path = Path(path)
    content = read_weights(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no state dict, but a {type(content).__name__}")
    container = next((k for k in CONTAINERS if isinstance(content.get(k), dict)), None)
    found = content[container] if container else content
    ignored = [str(k) for k in content if k != container] if container else []

    # 1. Names: strip prefixes, rename, sort out what is not the encoder's.
    state, prefixes, unknown, hugging_face = {}, set(), [], False
    for key, tensor in found.items():
        name = prefix = ""
        name = str(key)
        while stripped := next((p for p in PREFIXES if name.startswith(p)), None):
            name, prefix = name.removeprefix(stripped), prefix + stripped
        renamed = name
        for pattern, replacement in RENAMINGS:
            renamed = pattern.sub(replacement, renamed)
        if kind := next((UNUSED[u] for u in UNUSED if renamed.startswith(u)), None):
            ignored.append(kind)
        elif not isinstance(tensor, torch.Tensor):
            unknown.append(name)
        elif renamed in state:
            raise InputError(f"{path} holds {renamed} twice, under different prefixes")
        else:
            state[renamed] = tensor.float()
            prefixes.add(prefix.replace("_orig_mod.", ""))
            hugging_face |= renamed != name
    if "dist_token" in state:
        raise InputError(f"{path} is a distilled DeiT: its second class token (dist_token) has no place "
                         "in a plain ViT; use the model without distillation")
    if missing := [n for n in ("cls_token", "pos_embed", "patch_embed.proj.weight") if n not in state]:
        some = ", ".join(list(state)[:3]) or "nothing"
        raise InputError(f"{path} holds no plain ViT: no {missing[0]} among its tensors ({some}, ...)")

    # 2. Sizes.
    if state["cls_token"].ndim != 3 or state["patch_embed.proj.weight"].ndim != 4:
        raise InputError(f"{path} holds no plain ViT: cls_token or patch embedding of another shape")
    for name in [n for n in state if ".attn.q." in n]:                     # Hugging Face keeps them apart
        parts = [state.pop(name.replace(".attn.q.", f".attn.{x}."), None) for x in "qkv"]
        if all(part is not None for part in parts):
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    if "norm.weight" not in state and "fc_norm.weight" in state:          # fine-tuned: the norm that is left
        state |= {"norm." + x: state.pop("fc_norm." + x) for x in ("weight", "bias") if "fc_norm." + x in state}
    blocks = {}
    for name in state:
        if match := re.match(r"blocks\.(\d+)\.(.*)", name):
            blocks.setdefault(int(match[1]), set()).add(match[2])
    depth = len(blocks)
    if blocks and all(n.startswith(("norm1.", "attn.qkv.")) for n in blocks[max(blocks)]):
        depth -= 1                                                         # D2-MAE's extra block
        ignored.append("extra block")
        state = {n: t for n, t in state.items() if not n.startswith(f"blocks.{max(blocks)}.")}
    width, positions = state["cls_token"].shape[-1], state["pos_embed"].shape[1] - 1
    channels, patch_size = state["patch_embed.proj.weight"].shape[1:3]
    config = dict(patch_size=patch_size, channels=channels, width=width, depth=depth,
                  image_size=math.isqrt(positions) * patch_size)

    # 3. Heads and normalisation.
    ours = content.get("config") if isinstance(content.get("config"), dict) else {}
    authors = "module.model." in prefixes or (container == "model" and "module.base_encoder." in prefixes)
    if "heads" in ours:
        known, why = ours["heads"], "its own config"
        config |= {k: ours[k] for k in ("image_size", "heads", "mean", "std") if k in ours}
    elif authors:
        known, why = 12, "being the D-MAE authors'"
    else:
        known, why = {768: 12, 1024: 16, 1280: 16}.get(width), f"its width of {width}"
    if known is None and heads is None:
        raise InputError(f"{path}: a ViT {width} wide may have any number of heads, the file does not say "
                         f"(DeiT-Tiny has 3, MAE-Tiny 12): write it behind the name, {path.name}:12")
    if known is not None and heads is not None and heads != known:
        raise InputError(f"{path} has {known} heads by {why}, not {heads}")
    config["heads"] = known or heads
    if not 1 <= config["heads"] <= width or width % config["heads"]:
        raise InputError(f"{path}: width {width} does not divide into {config['heads']} heads")
    layout = ("this project" if "heads" in ours else "D-MAE authors" if authors
              else "MoCo-v3" if "module.base_encoder." in prefixes else "DINO" if container == "teacher"
              else "Hugging Face" if hugging_face else "timm" if container is None
              else "DeiT" if "head" in ignored else "MAE release")

    # 4. Every tensor in its place, or an error.
    vit = ViT(**config)
    expected = {name: p.shape for name, p in vit.state_dict().items()}
    wrong = ([f"{n} is missing" for n in expected if n not in state]
             + [f"{n} is not of a plain ViT" for n in [*state, *unknown] if n not in expected]
             + [f"{n} has shape {tuple(state[n].shape)}, not {tuple(shape)}"
                for n, shape in expected.items() if n in state and state[n].shape != shape])
    if wrong:
        raise InputError(f"{path} ({layout}) holds no plain ViT: {wrong[0]}"
                         + (f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""))
    vit.load_state_dict(state)
    vit.description = (f"ViT {width} wide, {depth} blocks, {config['heads']} heads, patch {patch_size}, "
                       f"grid {vit.grid[0]}x{vit.grid[1]}, from {path.name} ({layout})"
                       + (f", {', '.join(dict.fromkeys(ignored))} ignored" if ignored else ""))
    return vit


# ========================================================================================= Training

DEFAULTS = dict(
    data="shapes", data_dir="data", train_images=None, mask_ratio=0.75, norm_pix=True, layers=None,
    match="scores", alpha=1.0, decoupled=False, micro_batch=None, weight_decay=0.05, seed=0,
    workers=min(8, os.cpu_count() or 1))
# What a run leaves in its folder. Only these are ever overwritten.
RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pth", "student.pth", "reconstruction.png",
             "attention.png")
# Settings that cannot change the result: free to differ in `--resume`.
FREE = {"out", "resume", "overwrite", "workers", "data_dir"}
# Settings that the teacher's run of `--teacher self` takes from the student's.
SHARED = ("data", "data_dir", "train_images", "image_size", "patch_size", "crop_scale", "mask_ratio",
          "norm_pix", "epochs", "warmup_epochs", "batch_size", "micro_batch", "blr", "weight_decay",
          "seed", "workers", "device", "amp", "compile")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(str(message).split())}\n")


def make_parser():
    parser = Parser(
        prog="dmae.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Pre-train a small ViT as a masked autoencoder, distilling a teacher's attention.",
        epilog="Values marked [set] come from the data set's row of SETS in data.py, which is printed.")
    add = parser.add_argument
    add("--teacher", metavar="FILE|none|self", help="weights of a ViT (x.pth, or x.pth:3 to give its heads); "
        "none: plain MAE; self: pre-train one first, into OUT/teacher [self for shapes]")
    add("--data", metavar="DIR|NAME", help="folder of images (train/ and val/, or any tree), or "
        f"{', '.join(n for n in SETS if n != 'folder')} [shapes]")
    add("--data-dir", metavar="DIR", help="where named sets are, or are downloaded to [data]")
    add("--train-images", type=int, metavar="N", help="use N training images only: shortens any run [all]")
    add("--student", choices=PRESETS, help="size of the student [set]")
    add("--image-size", type=int, metavar="PIXELS", help="side of the student's images [set]")
    add("--patch-size", type=int, metavar="PIXELS", help="side of its patches; the token grid, image/patch, "
        "is what student and teacher share [set]")
    add("--crop-scale", type=float, metavar="AREA", help="least area of a random crop; 0.08 is the "
        "paper's, 0.2 the MAE release's; raise it for small images [set]")
    add("--mask-ratio", type=float, help="share of patches hidden; 0.75 is robust, lower makes the "
        "task easier and slower [0.75]")
    add("--no-norm-pix", dest="norm_pix", action="store_false", help="predict plain pixels instead of "
        "each patch's normalised ones; usually a little worse features, nicer pictures")
    add("--layers", metavar="S:T,...", help="student and teacher blocks to match, from 1; the paper "
        "found the last best [last:last]")
    add("--match", choices=("scores", "probs", "hidden"), help="attention before the softmax (the paper), "
        "after it (tiny gradients: raise --alpha to try), or the blocks' tokens [scores]")
    add("--alpha", type=float, help="weight of the distillation loss; 0 is plain MAE, still logged [1.0]")
    add("--decoupled", action="store_true", help="D2-MAE: an extra block is matched, the decoder reads "
        "an earlier one, so that the last third learns from the teacher alone")
    add("--decoder-width", type=int, help="the paper: half the encoder's [preset]")
    add("--decoder-depth", type=int, help="1 suffices for small students; 8 in MAE [preset]")
    add("--decoder-heads", type=int, help="must divide the decoder's width [preset]")
    add("--epochs", type=int, help="0 writes an untrained student, a useful control [set]")
    add("--warmup-epochs", type=float, help="linear warm-up [a tenth of the epochs]")
    add("--batch-size", type=int, help="images per update, over all processes [set]")
    add("--micro-batch", type=int, help="images at a time in each process, when memory is short; the "
        "result is the same [all]")
    add("--blr", type=float, help="base learning rate; the rate is blr * batch / 256 [set]")
    add("--weight-decay", type=float, help="none on biases and norms [0.05]")
    add("--seed", type=int, help="of everything random [0]")
    add("--workers", type=int, help="processes that decode a folder's images; no effect on results [cores, "
        "at most 8]")
    add("--device", help="cpu, cuda, ... [cuda if there is one]")
    add("--amp", choices=("off", "bf16", "fp16"), help="autocast; fp16 adds a gradient scaler [bf16 on "
        "cuda where the card has it, else fp16; off on cpu]")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile: a minute to start, then "
        "faster [on for cuda]")
    add("--out", metavar="DIR", help="the run's folder [a fresh number under runs/]")
    add("--resume", action="store_true", help="go on after the last finished epoch of --out; other "
        "flags may be left out")
    add("--overwrite", action="store_true", help="start anew in an --out that holds a run")
    return parser


def main(argv=None):
    """The command line; returns the run's folder. Bad input: one line on stderr and exit status 2."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    settings = {}
    try:
        teacher = resolve(given, settings)
        return pretrain(settings, teacher)
    except InputError as error:
        parser.error(error)
    except KeyboardInterrupt:
        begun = settings.get("out") and (Path(settings["out"]) / "config.json").exists()
        print(f"interrupted; go on with: python dmae.py --resume --out {settings['out']}" if begun
              else "interrupted; nothing was written", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def resolve(given, settings):
    """Fill `settings` with every setting's value and return the teacher (ViT or None). In order:

        1. a flag that was given
        2. with --resume, what the run was started with; a flag that differs is refused
        3. the row of the data set, and the student's preset
        4. DEFAULTS, and what the machine has
    """
    out = Path(given["out"]) if "out" in given else None
    if given.get("resume"):
        if out is None or not (out / "config.json").is_file():
            raise InputError("--resume needs --out with the folder of a run (none there has a config.json)")
        if given.get("overwrite"):
            raise InputError("--resume and --overwrite exclude each other")
        saved = json.loads((out / "config.json").read_text())
        differ = [f"{k} {saved['settings'].get(k)} -> {v}" for k, v in given.items()
                  if k not in FREE and saved["settings"].get(k) != v]
        settings.update(saved["settings"] | given)
        teacher = open_teacher(settings)
        sha256 = file_hash(settings["teacher"])
        if sha256 and sha256 != saved["teacher_sha256"]:
            differ.append(f"content of {settings['teacher']} {saved['teacher_sha256'][:8]} -> {sha256[:8]}")
        if differ:
            raise InputError(f"--resume with other settings than the run's: {'; '.join(differ)}; leave "
                             "them out, or start a run of its own with another --out")
        return teacher

    if out is not None and not given.get("overwrite") and any((out / f).exists() for f in RUN_FILES):
        raise InputError(f"--out {out} holds a run: add --resume to go on with it, --overwrite to "
                         "replace it, or name another")
    name = given.get("data", DEFAULTS["data"])
    row = SETS.get(name, SETS["folder"])
    if "teacher" not in given and name != "shapes":
        raise InputError("--teacher is missing: give a FILE of weights, none (plain MAE) or self "
                         "(pre-train one first)")
    settings.update(DEFAULTS | dict(teacher="self") | row | given)
    settings.update(teacher_preset=row["teacher"], teacher=given.get("teacher", "self"))
    decoder = dict(zip(("decoder_width", "decoder_depth", "decoder_heads"), PRESETS[settings["student"]][1]))
    settings.update({k: v for k, v in decoder.items() if k not in given})
    teacher = open_teacher(settings)
    if teacher is not None and teacher.width >= 512 and name == "shapes":
        # A real teacher costs twenty times the student: a taste of it, in minutes on a CPU.
        settings.update({k: v for k, v in dict(train_images=4000, epochs=4).items() if k not in given})
    settings.setdefault("warmup_epochs", settings["epochs"] / 10)

    for key, least in (("epochs", 0), ("warmup_epochs", 0), ("batch_size", 1), ("micro_batch", 1), ("blr", 0),
                       ("weight_decay", 0), ("workers", 0), ("alpha", 0), ("seed", 0)):
        if settings[key] is not None and not (math.isfinite(settings[key]) and settings[key] >= least):
            raise InputError(f"--{key.replace('_', '-')} {settings[key]}: at least {least}, and finite")
    if settings["warmup_epochs"] > settings["epochs"]:
        raise InputError(f"--warmup-epochs {settings['warmup_epochs']} is longer than --epochs "
                         f"{settings['epochs']}")
    if not 0 < settings["crop_scale"] <= 1:
        raise InputError(f"--crop-scale {settings['crop_scale']}: above 0 and at most 1")

    settings.setdefault("device", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        cuda = torch.empty(0, device=settings["device"]).is_cuda
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {settings['device']}: {str(error).splitlines()[0]}") from error
    bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    settings.setdefault("amp", "bf16" if bf16 else "fp16" if cuda else "off")
    if settings["amp"] == "fp16" and not cuda:
        raise InputError("--amp fp16 needs a CUDA device; take bf16 or off")
    settings.setdefault("compile", cuda)
    return teacher


def open_teacher(settings):
    """The teacher of --teacher: a ViT, or None for none. For self an untrained one, to check with."""
    if settings["teacher"] == "none":
        return None
    if settings["teacher"] != "self":
        return load_vit(settings["teacher"])
    (width, depth, heads), _ = PRESETS[settings["teacher_preset"]]
    return ViT(settings["image_size"], settings["patch_size"], settings["channels"], width, depth, heads,
               settings["mean"], settings["std"])


def file_hash(teacher):
    """sha256 of the teacher's file, or None for none and self."""
    if teacher in ("none", "self"):
        return None
    path = teacher if os.path.exists(teacher) else teacher.rpartition(":")[0]
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def learning_rate(step, total, warmup, peak):
    """The rate of step 0 .. total - 1 (MAE's schedule, set at every step):

        1. below `warmup`: linear from 0      2. after it: half a cosine, from peak to 0
    """
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def parameter_groups(model, weight_decay):
    """Two groups for AdamW: biases and 1-D parameters are not decayed; tokens and mixers are."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [p for n, p in trained if p.ndim > 1 and not n.endswith("bias")]
    kept = [p for n, p in trained if p.ndim <= 1 or n.endswith("bias")]
    assert len(decayed) + len(kept) == len(trained)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=kept, weight_decay=0.0)]


def train_step(model, optimizer, scaler, lr, pieces, batch, autocast):
    """One update from `batch` images that arrive in `pieces`, pairs (images, ids_keep).

    Returns each loss term's mean over the batch, still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    totals, seen = {}, 0
    for images, ids_keep in pieces:
        share, seen = len(images) / batch, seen + len(images)
        # Several GPUs: gradients are averaged once, with the last piece.
        more = isinstance(model, nn.parallel.DistributedDataParallel) and seen < batch
        with model.no_sync() if more else contextlib.nullcontext():
            with autocast:
                losses = model(images, ids_keep)
            scaler.scale(losses["loss"] * share).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() * share
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return totals


def knn_top1(bank, bank_labels, test, test_labels, k=20, temperature=0.07):
    """Share of `test` that a weighted k-NN vote gets right. Features (N, c), labels (N,).

    Cosine similarity; each of the k neighbours votes with exp(similarity / temperature)."""
    bank, test = F.normalize(bank, dim=1), F.normalize(test, dim=1)
    right, classes = 0, int(bank_labels.max()) + 1
    for part, labels in zip(test.split(1000), test_labels.split(1000)):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        right += (votes.argmax(dim=1) == labels).sum()
    return float(right) / len(test)


@torch.no_grad()
def pooled_features(encoder, batches):
    """Mean of the last block's patch tokens after a parameter-free layer norm: (N, c)."""
    def pool(tokens):
        return F.layer_norm(tokens[:, 1:].float(), tokens.shape[-1:]).mean(dim=1)
    return torch.cat([pool(encoder(images, tokens=[encoder.depth])[1][encoder.depth]) for images in batches])


class KNN:
    """k-NN of an encoder on fixed samples: 10,000 training images as bank, 2,000 test images."""

    def __init__(self, train, test):
        def sample(source, count):
            return torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:count]
        self.train, self.test = train, test
        self.bank, self.query = sample(train, 10_000), sample(test, 2_000)

    def __call__(self, features):
        """features: a function from an iterable of image batches to (N, c)."""
        bank, query = (features(source.plain(ids)) for source, ids in (
            (self.train, self.bank), (self.test, self.query)))
        labels = self.train.labels[self.bank], self.test.labels[self.query]
        return knn_top1(bank, labels[0].to(bank.device), query, labels[1].to(query.device))


def write(path, save):
    """save(temporary path), then rename: a file is there complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    save(temporary)
    os.replace(temporary, path)


def save_student(path, model):
    """Encoder (as timm names it), decoder, mixers and plain settings; what `load_vit` reads."""
    mae = model.student if isinstance(model, DMAE) else model
    mixers = model.mixers if isinstance(model, DMAE) else {}
    content = dict(
        model=mae.encoder.state_dict(), config=mae.encoder.config | mae.config,
        decoder={n: t for n, t in mae.state_dict().items() if not n.startswith("encoder.")},
        mixers={name: mixer.detach() for name, mixer in mixers.items()})
    write(path, lambda temporary: torch.save(to_cpu(content), temporary))


def to_cpu(content):
    if isinstance(content, dict):
        return {k: to_cpu(v) for k, v in content.items()}
    return content.detach().cpu().clone() if isinstance(content, torch.Tensor) else content


def pretrain(settings, teacher):
    """One run: the student into OUT/student.pth. `settings` as `resolve` fills them; sets their `out`."""
    s = argparse.Namespace(**settings)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(s.device)
    if world > 1:                                                        # started by torchrun
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *a, **k: None
    if s.batch_size % world:
        raise InputError(f"--batch-size {s.batch_size} does not divide among {world} processes")

    # Everything that can be wrong is built before anything is written.
    def build():
        torch.manual_seed(s.seed)
        (width, depth, heads), _ = PRESETS[s.student]
        encoder = ViT(s.image_size, s.patch_size, s.channels, width, depth, heads, s.mean, s.std)
        student = MAE(encoder, s.decoder_width, s.decoder_depth, s.decoder_heads, s.mask_ratio, s.norm_pix,
                      decode_after=max(1, 2 * depth // 3) if s.decoupled else None)
        if teacher is None:
            if s.decoupled or s.layers:
                raise InputError("--decoupled and --layers need a teacher, not --teacher none")
            return student
        return DMAE(student, teacher, parse_layers(s.layers), s.match, s.alpha, s.decoupled)

    model = build()
    if world > 1 and rank > 0:
        dist.barrier()                                    # the first process downloads for all
    train, test = open_data(s.data, settings, (s.image_size, s.image_size), s.data_dir, s.train_images,
                            device, s.workers, s.seed)
    if world > 1 and rank == 0:
        dist.barrier()
    steps = len(train) // s.batch_size                    # per epoch; the incomplete batch is dropped
    if not steps:
        raise InputError(f"--batch-size {s.batch_size} is larger than the {len(train)} training images")
    total, warmup = s.epochs * steps, round(s.warmup_epochs * steps)
    peak, local = s.blr * s.batch_size / 256, s.batch_size // world
    mine = slice(rank * local, (rank + 1) * local)

    out = settings["out"] = make_folder(settings, rank, world)
    config = dict(settings=settings, teacher_sha256=file_hash(s.teacher),
                  torch=torch.__version__, torchvision=torchvision.__version__)
    if rank == 0 and not settings.get("resume"):
        write(out / "config.json", lambda p: p.write_text(json.dumps(config, indent=1, default=str) + "\n"))
    if s.teacher == "self":
        say(f"first the teacher, a masked autoencoder of its own, into {out / 'teacher'}")
        begun = settings.get("resume") and (out / "teacher" / "config.json").exists()
        own = {k: settings[k] for k in SHARED} | dict(
            teacher="none", student=s.teacher_preset, out=str(out / "teacher"))
        own["resume" if begun else "overwrite"], own_settings = True, {}
        pretrain(own_settings, resolve(own, own_settings))
        teacher = load_vit(out / "teacher" / "student.pth")
        say("then the student")
        model = build()

    model.to(device)
    student = model.student if teacher is not None else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, s.weight_decay), lr=peak, betas=(0.9, 0.95),
                                  fused=device.type in ("cpu", "cuda"))
    scaler = torch.amp.GradScaler(device.type, enabled=s.amp == "fp16")
    dtype = torch.float16 if s.amp == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, dtype=dtype, enabled=s.amp != "off")

    log, done = [], 0
    if settings.get("resume") and (out / "checkpoint.pth").exists():
        saved = read_weights(out / "checkpoint.pth")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        done = saved["epoch"]
        log = [x for x in (out / "log.jsonl").read_text().splitlines() if json.loads(x)["epoch"] <= done]
        if done >= s.epochs:
            say(f"{out} is finished: {done} epochs")
            return out

    def step_inputs(step, images):
        """Pieces of a step's batch on this process: the random numbers of the whole batch are drawn,
        and a share of them used, so that no split of the batch changes them."""
        generator = torch.Generator(device).manual_seed(mix(s.seed, 1, step))
        noise = torch.rand(s.batch_size, math.prod(student.encoder.grid), device=device, generator=generator)
        draws = [x[mine].split(s.micro_batch or local) for x in train.draw(s.batch_size, generator)]
        for part, ids, *draw in zip(images.split(s.micro_batch or local),
                                    student.choose(noise)[mine].split(s.micro_batch or local), *draws):
            yield train.augment(part, *draw), ids

    def batches(epoch):
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(mix(s.seed, 0, epoch)))
        return train.batches(order[:steps * s.batch_size].view(steps, -1)[:, mine], epoch)

    # The header.
    say(f"run: {out}   data: {s.data}, {train.description}")
    say(f"  set: image {s.image_size}, patch {s.patch_size}, crop scale {s.crop_scale}, mean "
        f"{', '.join(f'{x:g}' for x in s.mean)}, std {', '.join(f'{x:g}' for x in s.std)}, {s.epochs} epochs, "
        f"batch {s.batch_size}, blr {s.blr:g}")
    say(f"  student: {s.student}, {sum(p.numel() for p in student.encoder.parameters()):,} parameters "
        f"in the encoder, {sum(p.numel() for p in trained):,} trained; {student.kept} of "
        f"{math.prod(student.encoder.grid)} patches visible")
    if teacher is not None:
        say(f"  teacher: {teacher.description}; blocks "
            f"{', '.join(model.mixers)} matched by {s.match}, alpha {s.alpha:g}")
    say(f"  effective batch {s.batch_size}, learning rate {peak:.3g}, {total} steps ({warmup} of warm-up), "
        f"{device}, {dict(off='float32', bf16='bfloat16', fp16='float16')[s.amp]}"
        f"{', compiled' if s.compile else ''}, {world} process{'es' if world > 1 else ''}")
    first, _ = next(step_inputs(0, next(iter(batches(0)))))
    nothing = student.target(first)[0].square().mean()
    say(f"  predicting nothing scores {nothing:.3f} in the MAE loss: below it, learning begins")

    # k-NN before training: of raw pixels, and of the untrained student.
    knn = None
    if rank == 0 and test is not None and train.labels is not None and test.labels is not None:
        knn = KNN(train, test)

    def student_knn():
        with autocast:
            return knn(lambda images: pooled_features(student.encoder, images))

    def record(**line):
        log.append(json.dumps(line))
        write(out / "log.jsonl", lambda p: p.write_text("\n".join(log) + "\n"))

    if rank == 0 and not log:
        line = dict(epoch=0, step=0)
        if knn:
            line["knn_pixels"] = knn(lambda images: torch.cat([x.flatten(1) for x in images]))
            line["knn"] = student_knn()
            say(f"  k-NN top-1: raw pixels {line['knn_pixels']:.1%}, untrained student {line['knn']:.1%}")
        record(**line)

    if s.compile:
        model.compile()
    wrapped = model
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(
            model, device_ids=[device] if device.type == "cuda" else None)

    # The loop.
    timed = None                                    # (when, steps done then), past the slow first ones
    for epoch in range(done, s.epochs):
        sums, unread, waited, began = {}, 0, 0.0, time.perf_counter()
        source = iter(batches(epoch))
        bar = tqdm(range(steps), desc=f"epoch {epoch + 1}/{s.epochs}", unit="step", leave=False,
                   disable=True if rank else None)
        for i in bar:
            step = epoch * steps + i
            asked = time.perf_counter()
            images = next(source)
            waited += time.perf_counter() - asked
            lr = learning_rate(step, total, warmup, peak)
            losses = train_step(wrapped, optimizer, scaler, lr, step_inputs(step, images), local, autocast)
            sums = {name: sums.get(name, 0) + value for name, value in losses.items()}
            unread += 1
            if i != 4 and (i + 1) % 20 and i + 1 != steps:
                continue
            # Only here, and in the checkpoint, is the device read.
            values = torch.stack(list(sums.values()))
            if world > 1:
                dist.all_reduce(values)
            means = dict(zip(sums, (values / world / (i + 1)).tolist()))
            if bad := [name for name, mean in means.items() if not math.isfinite(mean)]:
                raise InputError(f"the loss {bad[-1]!r} is not finite in steps {step + 1 - unread} to {step}, "
                                 f"learning rate {lr:.3g}: lower --blr, or try --amp off; the last good "
                                 f"epoch is in {out}")
            unread = 0
            now = time.perf_counter()
            bar.set_postfix({n: f"{m:.4f}" for n, m in means.items()}, refresh=False,
                            images_per_s=f"{(i + 1) * s.batch_size / (now - began):.0f}")
            if timed and timed is not True:
                minutes = (now - timed[0]) / (step - timed[1]) * (total - step) / 60
                say(f"  expected: about {minutes:.1f} minutes, and the k-NN after each epoch")
                timed = True
            timed = timed or (now, step)
        seconds = time.perf_counter() - began

        # The end of an epoch: check, measure, save.
        if not all(p.isfinite().all() for p in trained):
            raise InputError(f"a weight is not finite after step {step}, learning rate {lr:.3g}: lower "
                             f"--blr, or try --amp off; the last good epoch is in {out}")
        if rank:
            continue
        line = dict(epoch=epoch + 1, step=step + 1, lr=lr, **means, images_per_second=len(images) * world
                    * steps / seconds, data_wait=waited / seconds)
        if train.broken:
            line["broken_images"] = len(train.broken)
        if knn:
            line["knn"] = student_knn()
        record(**line)
        save_student(out / "student.pth", model)
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     epoch=epoch + 1)
        write(out / "checkpoint.pth", lambda p: torch.save(state, p))
        say(f"epoch {epoch + 1}/{s.epochs}: " + ", ".join(f"{n} {m:.4f}" for n, m in means.items())
            + (f", k-NN {line['knn']:.1%}" if knn else "") + f", {line['images_per_second']:.0f} images/s")

    if rank == 0:
        save_student(out / "student.pth", model)
        samples = test or train
        few = torch.linspace(0, len(samples) - 1, min(8, len(samples))).long()
        images = next(iter(samples.plain(few)))
        reconstruction_picture(student, images, out / "reconstruction.png")
        attention_picture(model, images[:4], out / "attention.png")
        if knn and s.epochs:
            lines = [json.loads(x) for x in log]
            say(f"k-NN top-1: raw pixels {lines[0]['knn_pixels']:.1%}, untrained student "
                f"{lines[0]['knn']:.1%}, trained {lines[-1]['knn']:.1%}")
        say(f"wrote {out}/student.pth, reconstruction.png, attention.png, log.jsonl")
    return out


def parse_layers(text):
    """"4:6,12:12" -> [(4, 6), (12, 12)]; None stays None."""
    if text is None:
        return None
    if not re.fullmatch(r"\d+:\d+(,\d+:\d+)*", text):
        raise InputError(f"--layers {text}: write pairs STUDENT:TEACHER, separated by commas, like 12:12")
    return [tuple(map(int, pair.split(":"))) for pair in text.split(",")]


def make_folder(settings, rank, world):
    """The run's folder, made: the given one, or the next free number under runs/."""
    folder = [settings.get("out")]
    if rank == 0:
        try:
            if folder[0] is None:
                number = 1
                while folder[0] is None:
                    candidate = Path("runs") / f"{number:04d}"
                    try:
                        candidate.mkdir(parents=True)
                        folder[0] = str(candidate)
                    except FileExistsError:
                        number += 1
            path = Path(folder[0])
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.json.tmp").touch()
            (path / "config.json.tmp").unlink()
            if not settings.get("resume"):
                for name in RUN_FILES:
                    (path / name).unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"--out {folder[0] or 'runs'}: cannot write there ({error.strerror})") from error
    if world > 1:
        dist.broadcast_object_list(folder, src=0)
    return Path(folder[0])


@torch.no_grad()
def reconstruction_picture(student, images, path):
    """A row per image: it, its visible patches, the prediction, the prediction with those pasted in.

    With normalised targets, the prediction has no brightness and contrast of its own: it is shown with
    the true mean and deviation of each patch."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), math.prod(student.encoder.grid), generator=generator)
    ids_keep = student.choose(noise.to(images.device))
    tokens = student.encoder(images, ids_keep, tokens=[student.decode_after])[1]
    prediction = student.decode(tokens[student.decode_after], ids_keep)
    patches = student.encoder.patchify(images)
    if student.norm_pix:
        _, mean, std = student.target(images)
        prediction = prediction * std + mean
    hidden = torch.ones(patches.shape[:2], device=images.device).scatter(1, ids_keep, 0)[..., None]
    panels = [patches, patches * (1 - hidden), prediction, patches * (1 - hidden) + prediction * hidden]
    rows = [show(student.encoder, student.encoder.unpatchify(p)) for p in panels]
    save_grid(torch.stack(rows, dim=1).flatten(0, 1), path, columns=4)


@torch.no_grad()
def attention_picture(model, images, path):
    """Last block, class token to patches, a column per head: a row for the student, below it one for
    the teacher; each map is scaled to its own maximum."""
    student = model.student.encoder if isinstance(model, DMAE) else model.encoder
    views = [(student, images)]
    if isinstance(model, DMAE):
        views.append((model.teacher, model.teacher_images(images)))
    picture = show(student, images)
    columns = 1 + max(vit.config["heads"] for vit, _ in views)
    tiles = []
    for vit, seen in views:
        scores = vit(seen, scores=[vit.depth])[0][vit.depth]                          # b h 1+n 1+n
        maps = rearrange(scores.softmax(dim=-1)[:, :, 0, 1:], "b h (gh gw) -> b h gh gw", gh=vit.grid[0])
        maps = maps / maps.amax(dim=(2, 3), keepdim=True)
        maps = F.interpolate(maps, size=picture.shape[2:], mode="nearest")
        maps = maps[:, :, None].expand(-1, -1, 3, -1, -1)                             # b h 3 H W
        blank = maps.new_ones(len(maps), columns - 1 - maps.shape[1], *maps.shape[2:])
        tiles.append(torch.cat([picture[:, None], maps, blank], dim=1))
    save_grid(torch.stack(tiles, dim=1).flatten(0, 2), path, columns)


def show(vit, images):
    """Normalised images -> RGB in 0..1, at least 96 pixels high."""
    images = (images.float() * vit.std + vit.mean).clamp(0, 1)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    return F.interpolate(images, scale_factor=math.ceil(96 / images.shape[2]), mode="nearest")


def save_grid(images, path, columns):
    write(path, lambda p: torchvision.utils.save_image(images, p, nrow=columns, pad_value=1, format="png"))


if __name__ == "__main__":
    main()
