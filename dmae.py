"""D-MAE: a small ViT learns as a masked autoencoder while its attention follows a large one's.

Wang et al., "A Closer Look at Self-Supervised Lightweight Vision Transformers", ICML 2023
(arXiv 2205.14443), on top of He et al., "Masked Autoencoders Are Scalable Vision Learners"
(arXiv 2111.06377). The decoupled variant, D2-MAE, is from Gao et al., IJCV 2025 (arXiv 2404.12210).

    python dmae.py                                      # draws its images; the teacher in weights/
    python dmae.py --teacher mae_base.pth --data /path/to/imagenet               # the paper's run

First the paper: ViT, MAE, D-MAE. Then what they rest on, teacher files, pre-training, and runs.

Letters in shapes and einops patterns: b batch, n patches (in `Attention`: tokens), k kept (visible)
patches, h heads, d width of a head, c width of the tokens, p side of a patch, ch channels, gh x gw
the grid of patches, s and t heads of student and teacher. A mask is 1 where a patch is hidden.
Blocks are numbered from 1, as in the paper; in tensor names from 0, as in timm.
"""

import argparse
import contextlib
import hashlib
import http.client
import itertools
import json
import math
import os
import pickle
import re
import time
import timeit
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import FOLDER, SETS, InputError, open_data, require, save_grid, seed_of, write

# ============================================================================================== ViT


def attention_scores(q, k):
    """The attention map before the softmax, in float32 even under autocast.

    q, k: (b, h, n, d) -> (b, h, n, n), q.k / sqrt(d)."""
    with torch.autocast(q.device.type, enabled=False):
        return (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-2, -1)


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        require(heads > 0 and width % heads == 0, f"{heads} heads: must divide width {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        """(b, n, c) -> (b, n, c), and queries and keys, (b, h, n, d) each."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = rearrange(attend(q, k, v), "b h n d -> b n (h d)")
        return self.proj(out), (q, k)

    def queries_and_keys(self, x):
        """Queries and keys alone, (b, h, n, d) each, without values and output projection."""
        rows = 2 * self.qkv.in_features                                  # q and k come first in qkv
        qk = F.linear(x, self.qkv.weight[:rows], self.qkv.bias[:rows])
        return rearrange(qk, "b n (two h d) -> two b h n d", two=2, h=self.heads)


class Block(nn.Module):
    """Pre-norm transformer block, MLP ratio 4, exact GELU."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU(), fc2=nn.Linear(4 * width, width)))

    def forward(self, x):
        update, queries_and_keys = self.attn(self.norm1(x))
        x = x + update
        return x + self.mlp(self.norm2(x)), queries_and_keys


class ViT(nn.Module):
    """Vision transformer: the student's encoder, the teacher, later the classifier. Parameter names
    are timm's. image_size: a side or (height, width). mean, std: how its images are normalised."""

    def __init__(self, image_size=224, patch_size=16, channels=3, width=192, depth=12, heads=12,
                 mean=FOLDER["mean"], std=FOLDER["std"]):
        super().__init__()
        sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
        require(patch_size > 0 and all(side > 0 and side % patch_size == 0 for side in sides),
                f"image size {sides[0]} x {sides[1]}: not a multiple of patch size {patch_size}")
        self.config = dict(
            image_size=sides, patch_size=patch_size, channels=channels, width=width, depth=depth,
            heads=heads, mean=list(mean), std=list(std))
        self.grid = (sides[0] // patch_size, sides[1] // patch_size)
        self.width, self.depth = width, depth
        # They describe the images, not the network: persistent=False keeps them out of state_dict.
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
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images, ids_keep=None, tokens_of=(), scores_of=(), extra=None):
        """images: (b, ch, height, width), normalised; ids_keep: (b, k) visible patches, None: all.

        Returns (tokens, scores), dictionaries keyed by block: tokens (b, 1 + k, c) after each block
        in `tokens_of`, 0 being the embedding; float32 scores (b, h, 1 + k, 1 + k) of each block in
        `scores_of`. The pass ends at the last block asked for; if only its scores are asked for,
        its values and MLP are skipped. extra: one more block, appended after the last."""
        last = max([0, *tokens_of, *scores_of])
        x, scores = self.embed(images, ids_keep), {}                                  # b 1+k c
        tokens = {0: x} if 0 in tokens_of else {}
        for i, block in enumerate([*self.blocks, extra][:last], start=1):
            if i == last and i not in tokens_of:
                q, k = block.attn.queries_and_keys(block.norm1(x))                    # b h 1+k d
            else:
                x, (q, k) = block(x)                                                  # b 1+k c
            if i in scores_of:
                scores[i] = attention_scores(q, k)                                    # b h 1+k 1+k
            if i in tokens_of:
                tokens[i] = x
        return tokens, scores

    def embed(self, images, ids_keep=None):
        """Class token and kept patches (None: all), with positions: (b, 1 + k, c)."""
        patches = self.patchify(images)                                               # b n (p p ch)
        positions = self.pos_embed[:, 1:]                                             # 1 n c
        if ids_keep is not None:      # select, then embed: a quarter of the work at mask ratio 0.75
            patches = patches.take_along_dim(ids_keep[..., None], dim=1)              # b k (p p ch)
            positions = positions[0][ids_keep]                                        # b k c
        # A convolution whose stride is its kernel size: the same linear map of every patch.
        weight = rearrange(self.patch_embed["proj"].weight, "c ch p1 p2 -> c (p1 p2 ch)")
        x = F.linear(patches, weight, self.patch_embed["proj"].bias) + positions      # b k c
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)     # b 1 c
        return torch.cat([cls, x], dim=1)                                             # b 1+k c

    def encode(self, images):
        """All tokens after the final norm: (b, 1 + n, c). Nothing is masked, nothing is random."""
        return self.norm(self(images, tokens_of=[self.depth])[0][self.depth])

    def patchify(self, images):
        """(b, channels, height, width) -> (b, n, p * p * channels), row by row, channels last."""
        p = self.config["patch_size"]
        return rearrange(images, "b ch (gh p1) (gw p2) -> b (gh gw) (p1 p2 ch)", p1=p, p2=p)

    def unpatchify(self, patches):
        """(b, n, p * p * channels) -> (b, channels, height, width)."""
        return rearrange(patches, "b (gh gw) (p1 p2 ch) -> b ch (gh p1) (gw p2)", gh=self.grid[0],
                         p1=self.config["patch_size"], p2=self.config["patch_size"])


# ============================================================================================== MAE


class MAE(nn.Module):
    """Masked autoencoder: an encoder of the visible patches and a light decoder of all patches;
    parameter names as in the MAE release. decode_after: the block whose output the decoder reads, 0
    for the embedding, by default the last. Raises InputError for settings that do not fit."""

    def __init__(self, encoder, decoder_width=96, decoder_depth=1, decoder_heads=3, mask_ratio=0.75,
                 norm_pix=True, decode_after=None):
        super().__init__()
        self.encoder, self.norm_pix = encoder, norm_pix
        self.decode_after = encoder.depth if decode_after is None else decode_after
        self.config = dict(
            decoder_width=decoder_width, decoder_depth=decoder_depth, decoder_heads=decoder_heads,
            mask_ratio=mask_ratio, norm_pix=norm_pix, decode_after=self.decode_after)
        self.patches = math.prod(encoder.grid)
        require(0 <= self.decode_after <= encoder.depth, f"decode_after {decode_after}: there are "
                f"{encoder.depth} blocks")
        kept = self.patches * (1 - mask_ratio) + 1e-9         # 10 * (1 - 0.9) is 0.99... in floats
        require(1 <= kept < self.patches, f"mask ratio {mask_ratio}: of {self.patches} patches, "
                "one must be visible and one hidden")
        self.kept = int(kept)

        values = encoder.config["patch_size"] ** 2 * encoder.config["channels"]        # per patch
        self.decoder_embed = nn.Linear(encoder.width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        table = [torch.zeros(1, 1, decoder_width), sincos_positions(decoder_width, encoder.grid)]
        self.decoder_pos_embed = nn.Parameter(torch.cat(table, dim=1), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            [Block(decoder_width, decoder_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, values)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            initialise(part)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images, ids_keep=None):
        """images: (b, channels, height, width), normalised; ids_keep: (b, k) visible patches, drawn
        at random if None -> {"loss": what to minimise, "mae": its only term}."""
        if ids_keep is None:
            ids_keep = self.choose(torch.rand(len(images), self.patches, device=images.device))
        tokens, _ = self.encoder(images, ids_keep, tokens_of=[self.decode_after])
        mae = self.reconstruction_loss(images, tokens[self.decode_after], ids_keep)
        return {"loss": mae, "mae": mae}

    def choose(self, noise):
        """noise: (b, n) -> ids_keep (b, k), the patches of the smallest noise."""
        return noise.argsort(dim=1)[:, :self.kept]

    def decode(self, tokens, ids_keep):
        """tokens: (b, 1 + k, c) of block `decode_after`, before the encoder's norm -> prediction
        (b, n, p * p * ch)."""
        x = self.decoder_embed(self.encoder.norm(tokens))                             # b 1+k c
        masked = self.mask_token.to(x.dtype).expand(len(x), self.patches, -1)         # b n c
        index = ids_keep[..., None].expand(-1, -1, x.shape[-1])                       # b k c
        patches = masked.scatter(1, index, x[:, 1:])                                  # b n c
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed            # b 1+n c
        for block in self.decoder_blocks:
            x, _ = block(x)                                                           # b 1+n c
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]                         # b n (p p ch)

    def target(self, images):
        """The target (b, n, p * p * ch): pixels, each patch normalised by itself if `norm_pix`."""
        patches = self.encoder.patchify(images.float())
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt() if self.norm_pix else patches

    def reconstruction_loss(self, images, tokens, ids_keep):
        """Mean squared error over the hidden patches alone (MAE, section 3), in float32.

        tokens: (b, 1 + k, c) of block `decode_after`."""
        prediction, target = self.decode(tokens, ids_keep), self.target(images)
        error = (prediction.float() - target).square().mean(dim=-1)                   # b n
        mask = torch.ones_like(error).scatter(1, ids_keep, 0)                         # 1 is hidden
        return (error * mask).sum() / mask.sum()


# ============================================================================================ D-MAE


class DMAE(nn.Module):
    """A masked autoencoder whose attention is pulled towards a frozen teacher's.

    teacher: a ViT of any size and normalisation; it is frozen and resized to the student's grid.
    layers: pairs (student block, teacher block), numbered from 1; default: the last of each. match:
    what is compared, comma-separated: "scores", attention maps before the softmax, class token
    included (the paper's L_attn); "probs", maps after the softmax; "hidden", the blocks' output
    tokens. mixer: learn an M for each kind and pair; without M both networks must have the same
    number of heads (for "hidden", the same width). decoupled: D2-MAE, an extra student block is
    matched to the teacher's last; build the student's MAE with an earlier decode_after. loss =
    L_mae + alpha * the sum of all distances. Raises InputError for settings that do not fit."""

    def __init__(self, student, teacher, layers=None, match="scores", alpha=1.0, mixer=True,
                 decoupled=False):
        super().__init__()
        encoder = student.encoder
        self.student, self.match, self.alpha = student, match.split(","), alpha
        self.layers = list(layers or [(encoder.depth + decoupled, teacher.depth)])
        check_distillation(self, teacher, layers, mixer, decoupled)
        self.extra = None
        if decoupled:        # norm1, queries and keys are used, the value rows of qkv lie idle
            self.extra = Block(encoder.width, encoder.config["heads"])
            initialise(self.extra)
            del self.extra.attn.proj, self.extra.norm2, self.extra.mlp
        # Not assigned as an attribute, which would register it: so the teacher is in no optimizer,
        # state_dict or DDP, and .train() skips it. `_apply` below makes it follow .to(device).
        self.__dict__["teacher"] = resize_grid(teacher, encoder.grid).requires_grad_(False).eval()
        self.mixers = nn.ParameterDict()
        for kind, (i, j) in itertools.product(self.match, self.layers if mixer else ()):
            M = nn.Parameter(torch.empty(mixer_dim(teacher, kind), mixer_dim(encoder, kind)))  # t s
            nn.init.kaiming_uniform_(M, a=5**0.5)          # PyTorch's default for a 1x1 convolution
            self.mixers[f"{kind}:{i}:{j}"] = M

    def forward(self, images, ids_keep=None):
        """images: (b, channels, height, width), normalised for the student; ids_keep: (b, k)
        visible patches, drawn at random if None -> {"loss": total, and its terms by name}."""
        student, encoder = self.student, self.student.encoder
        if ids_keep is None:
            noise = torch.rand(len(images), student.patches, device=images.device)
            ids_keep = student.choose(noise)                                                  # b k
        blocks, t_blocks = zip(*self.layers)
        attention, hidden = self.match != ["hidden"], "hidden" in self.match
        tokens, scores = encoder(images, ids_keep, tokens_of=range(encoder.depth + 1),
                                 scores_of=blocks if attention else (), extra=self.extra)
        mae = student.reconstruction_loss(images, tokens[student.decode_after], ids_keep)

        with torch.no_grad():                              # same image, same visible patches
            t_tokens, t_scores = self.teacher(
                images_for(self.teacher, encoder, images), ids_keep,
                tokens_of=t_blocks if hidden else (), scores_of=t_blocks if attention else ())

        terms = dict.fromkeys(self.match, 0)
        for kind, (i, j) in itertools.product(self.match, self.layers):
            ours, theirs = (tokens, t_tokens) if kind == "hidden" else (scores, t_scores)
            M = self.mixers.get(f"{kind}:{i}:{j}")
            terms[kind] = terms[kind] + self.distance(ours[i], theirs[j], M, kind)
        return {"loss": mae + self.alpha * sum(terms.values()), "mae": mae, **terms}

    @staticmethod
    def distance(A_S, A_T, M, kind="scores"):
        """L_attn = MSE(A_T, M A_S), the mean over everything, in float32; M None: the identity.

        A_S, A_T: scores (b, s, 1 + k, 1 + k) and (b, t, 1 + k, 1 + k); M: (t, s), no bias. For kind
        "hidden", tokens (b, 1 + k, c), which are layer-normalised and whose channels M mixes."""
        with torch.autocast(A_S.device.type, enabled=False):
            if kind == "hidden":                                                    # b c 1+k each
                A_S, A_T = (F.layer_norm(x.float(), x.shape[-1:]).mT for x in (A_S, A_T))
            elif kind == "probs":
                A_S, A_T = A_S.softmax(dim=-1), A_T.softmax(dim=-1)
            if M is not None:
                A_S = einsum(M, A_S, "t s, b s ... -> b t ...")
            return F.mse_loss(A_S, A_T)

    def _apply(self, *args, **kwargs):               # what .to(), .cuda(), .float() go through
        self.teacher._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)


# ============================================================================ what these three need


def sincos_positions(width, grid):
    """Fixed 2-D sine-cosine position table (1, rows * columns, width), row by row.

    The first half of the channels encodes the column, the second the row; in each half sines, then
    cosines, of frequencies 10000^(-i / (width / 4))."""
    require(width % 4 == 0, f"width {width}: sine-cosine positions need a multiple of 4")
    rows, columns = torch.cartesian_prod(*(torch.arange(side).double() for side in grid)).T
    frequencies = 10000 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]       # n c/4 each
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=1)[None].float()


def attend(q, k, v):
    """softmax(q.k / sqrt(d)) v; (b, h, n, d) each. On a CPU in float32, even under autocast: its
    gradient takes up to seven times as long in bfloat16 (torch 2.14)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float())


def initialise(module):
    """Xavier-uniform weights for each Linear and the patch embedding. Biases are 0, but the patch
    embedding's stays as PyTorch drew it: uniform within 1 / sqrt(fan-in)."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)


def resize_grid(vit, grid):
    """Bring a ViT's position table to another grid (rows, columns), in place; returns the ViT.

    A sine-cosine table, recognised even in half precision or with its halves swapped as in MoCo-v3,
    is computed anew; any other counts as learnt and is interpolated bicubically, as in DINOv2's and
    Hugging Face's code (timm's blurs first). The class token's row stays."""
    if tuple(grid) == vit.grid:
        return vit
    stored = vit.pos_embed.detach()
    table = rearrange(stored[:, 1:], "1 (gh gw) c -> 1 c gh gw", gh=vit.grid[0])
    table = F.interpolate(table, size=tuple(grid), mode="bicubic")
    patches = rearrange(table, "1 c gh gw -> 1 (gh gw) c")
    for shift in (0, vit.width // 2):
        fixed, wanted = (sincos_positions(vit.width, sides).roll(shift, dims=-1).to(stored)
                         for sides in (vit.grid, grid))
        if (stored[:, 1:] - fixed).abs().max() < 3e-3:
            patches = wanted
    vit.pos_embed = nn.Parameter(torch.cat([stored[:, :1], patches], dim=1),
                                 requires_grad=vit.pos_embed.requires_grad)
    vit.grid = tuple(grid)
    vit.config["image_size"] = [side * vit.config["patch_size"] for side in grid]
    return vit


def images_for(teacher, encoder, images):
    """The student's batch as the teacher wants it: its size, channels and normalisation."""
    ours, theirs = ([vit.config[key] for key in ("image_size", "channels", "mean", "std")]
                    for vit in (encoder, teacher))
    if ours == theirs:
        return images
    images = images.float() * encoder.std + encoder.mean                   # pixels, 0 to 1
    images = images.expand(-1, teacher.config["channels"], -1, -1)         # grey: three times
    if ours[0] != theirs[0]:
        images = F.interpolate(images, theirs[0], mode="bicubic", antialias=True)
    return (images - teacher.mean) / teacher.std


def mixer_dim(vit, kind):
    """One side of M: the number of heads of this ViT, or for "hidden" the width of its tokens."""
    return vit.width if kind == "hidden" else vit.config["heads"]


def check_distillation(model, teacher, layers, mixer, decoupled):
    """Raise InputError for settings of a DMAE that do not fit."""
    encoder, match = model.student.encoder, model.match
    ours, theirs = encoder.config["channels"], teacher.config["channels"]
    require(set(match) <= {"scores", "probs", "hidden"} and len(set(match)) == len(match), f"match "
            f"{','.join(match)}: choose from scores, probs, hidden, with commas between")
    require(not decoupled or not layers and "hidden" not in match, "the decoupled variant matches "
            "the scores of its extra block: not together with layers or with match hidden")
    for kind in match:
        t, s = mixer_dim(teacher, kind), mixer_dim(encoder, kind)
        require(mixer or t == s, "without a mixer heads (widths, for hidden) must agree: the "
                f"student has {s}, the teacher {t}")
    require(ours in (1, theirs), f"a student of {ours}-channel images cannot feed a teacher of "
            f"{theirs}-channel ones")
    for i, j in model.layers:
        require(1 <= i <= encoder.depth + decoupled and 1 <= j <= teacher.depth, f"layers {i}:{j}: "
                f"the student has blocks 1 to {encoder.depth}, the teacher 1 to {teacher.depth}")
    require(len(set(model.layers)) == len(model.layers), "layers: a pair is given twice")


# ========================================================================================= teachers

# Keys that may hold a file's state dict, tried in this order; DINO's have `student` and `teacher`.
CONTAINERS = ("model", "state_dict", "teacher")
# Prefixes that tensor names may carry; _orig_mod is torch.compile's.
PREFIX = re.compile(r"((module|_orig_mod|model|base_encoder|backbone|vit|dinov2)\.)*")
# From Hugging Face's names, in its files and in transformers 5's models, to timm's.
RENAMINGS = [
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
    (r"\.attention\.(?:attention\.)?(query|key|value|[qkv]_proj)\.", lambda m: f".attn.{m[1][0]}."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^layernorm\.", "norm.")]
# Tensors of encoder files that are ignored: decoders, heads, the D-MAE authors' teacher, mixer, ...
UNUSED = ("mask_token", "decoder", "head.", "tch_model.", "attn_adapter.", "momentum_encoder.",
          "predictor.")

# Tensor names that betray an architecture that `ViT` does not implement.
FOREIGN = [
    (r"(reg|register|storage)_tokens?$", "a ViT with register tokens"),
    (r"rope|periods", "a ViT with rotary positions, as DINOv3"),
    (r"mlp\.(w12|w3|weights_in|gate_proj)\.", "a ViT with SwiGLU"),
    (r"^visual\.|pre_layr?norm|norm_pre\.", "CLIP, with a norm before its blocks and QuickGELU"),
    (r"attn_pool\.|position_embedding\.", "SigLIP, which has no class token"),
    (r"(layers|blocks)\.\d+\.blocks\.", "Swin, whose resolution changes"),
    (r"relative_position", "a ViT with relative positions, as BEiT"),
    (r"dwconv|conv_dw", "ConvNeXt, which has no attention")]


def read_weights(path):
    """The dictionary in a .pth or .safetensors file, on the CPU; no code in it is ever run."""
    require(not path.is_dir(), f"{path} is a folder: name the file of weights in it")
    require(path.exists(), f"no file {path}; the usual teacher, MAE's ViT-Base, is at "
            "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth, and the one "
            "for shapes is in weights/, where README.md says how it was trained")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        # The MAE release's training states hold their command line as a Namespace: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"{path}: to read it, pip install safetensors") from error
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is refused: it holds code or other things than weights, or is no "
                         "PyTorch file; give one that holds a plain state_dict()") from error
    except Exception as error:                        # a damaged file may fail anywhere in a reader
        raise InputError(f"{path} cannot be read as weights, it may be truncated: fetch it "
                         "again") from error
    require(isinstance(content, dict), f"{path} holds no state dict: {type(content).__name__}")
    return content


def load_vit(path, heads=None):
    """A `ViT` with the weights in a file of this project, the MAE release, the D-MAE authors, timm,
    Hugging Face, MoCo-v3, DINO (its teacher), DINOv2 or DeiT; `description` says what was read.

    Sizes are read off the tensors; the number of heads comes from the first of these that gives it:

        1. our own file's config
        2. the D-MAE authors' files: 12
        3. layer scale and patches of 14 pixels, as in DINOv2: width / 64
        4. the width: 12 for 768, 16 for 1024 and 1280
        5. the caller: `heads`, or a suffix of the path, "x.pth:3"

    Raises InputError for heads that contradict this, and for any tensor that is missing, does not
    fit, or belongs neither to the encoder nor to what is known to be unused. From the file of a
    fine-tuned classifier, `others` of the result holds the rest, its head."""
    path, heads = split_heads(path, heads)
    content = read_weights(path)
    require(not {"images", "optimizer"} <= content.keys(), f"{path} is a checkpoint to resume "
            "from: give the student.pth or model.pth beside it, which knows its heads and images")

    # 1. Names: what is the encoder's, and what is known to be something else.
    container = next((k for k in CONTAINERS if isinstance(content.get(k), dict)), None)
    state, others, prefixes = {}, {}, set()
    for key, value in (content[container] if container else content).items():
        prefix = PREFIX.match(str(key))[0]
        name = str(key).removeprefix(prefix)
        for pattern, new in RENAMINGS:
            name = re.sub(pattern, new, name)
        require(name not in state, f"{path} holds {name} twice, under different prefixes")
        (others if name.startswith(UNUSED) else state)[name] = value
        if name in state:
            prefixes.add(prefix.replace("_orig_mod.", ""))

    # 2. What differs between layouts.
    for name in [n for n in state if ".attn.q." in n]:                 # Hugging Face: three tensors
        parts = [state.pop(name.replace(".attn.q.", f".attn.{x}."), torch.empty(0)) for x in "qkv"]
        state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    if classifier := "norm.weight" not in state:                       # fine-tuned: its only norm
        state = {re.sub(r"^fc_norm\.", "norm.", n): t for n, t in state.items()}
    depth = sum(n.endswith(".mlp.fc1.weight") for n in state)
    extra = re.compile(rf"blocks\.{depth}\.(norm1|attn\.qkv)\.")       # D2-MAE's extra block
    others |= {n: t for n, t in state.items() if extra.match(n)}
    state = {n: t for n, t in state.items() if n not in others}

    for (pattern, kind), name in itertools.product(FOREIGN, state):
        require(not re.search(pattern, name), f"{path} holds {kind} ({name}): take a plain ViT")

    # 3. Sizes; layer scale is folded into the layer before it, which is exact.
    try:
        scales = [name for name in state if re.search(r"\.ls[12]\.gamma$", name)]
        for name in scales:
            layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
            gamma, weight, bias = (state.pop(n).float()
                                   for n in (name, f"{layer}.weight", f"{layer}.bias"))
            state |= {f"{layer}.weight": gamma[:, None] * weight, f"{layer}.bias": gamma * bias}
        width, side = len(state["blocks.0.norm1.weight"]), math.isqrt(state["pos_embed"].shape[1])
        channels, patch_size, _ = state["patch_embed.proj.weight"].shape[1:]
    except (LookupError, AttributeError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} holds no plain ViT: no pos_embed, patch_embed and blocks of one "
                         f"among its tensors ({', '.join(list(state)[:3])}, ...)") from error
    config = dict(patch_size=patch_size, channels=channels, width=width, depth=depth,
                  image_size=side * patch_size)

    # 4. Heads and normalisation.
    own = content.get("config")
    if isinstance(own, dict) and {"heads", "image_size", "mean", "std"} <= own.keys():
        known, why = own["heads"], "its own config"
        config |= {key: own[key] for key in ("image_size", "mean", "std")}
    elif "module.model." in prefixes or container == "model" and "module.base_encoder." in prefixes:
        known, why = 12, "the D-MAE authors' layout"
    elif scales and patch_size == 14:
        known, why = width // 64, "DINOv2's layout"
    else:
        known, why = {768: 12, 1024: 16, 1280: 16}.get(width), f"its width, {width}"
    require(known or heads is not None, f"{path}: a ViT {width} wide may have any number of heads "
            "and the file does not say (DeiT-Tiny has 3, MAE-Tiny 12): append it to the name, "
            f"{path.name}:12")
    require(None in (heads, known) or heads == known, f"{path} has {known} heads by {why}, not "
            f"{heads}")
    require("mean" in config or channels == 3, f"{path} takes images of {channels} channels and "
            "does not say how they are normalised: only our own files may have other than 3")

    # 5. Every tensor in its place, or an error.
    try:
        vit = ViT(**config, heads=known or heads)
        vit.load_state_dict(state)
    except (InputError, RuntimeError) as error:
        reason = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ")
        raise InputError(f"{path} holds no plain ViT: {reason[:300]}") from error
    vit.others = others if classifier else {}
    vit.description = (
        f"ViT {width} wide, {depth} blocks, {known or heads} heads by {why if known else 'request'}"
        f", patch {patch_size}, grid {vit.grid[0]}x{vit.grid[1]}, from {path.name}")
    if others:
        vit.description += "; not used: " + ", ".join(sorted({n.split(".")[0] for n in others}))
    return vit


def split_heads(path, heads=None):
    """"x.pth:3" -> Path("x.pth"), 3. If a file of that whole name exists, it is not split. An http
    address in the place of x.pth is downloaded."""
    match = re.fullmatch(r"(.+):(\d+)", str(path))
    if not match or os.path.exists(path):
        return fetch(path), heads
    require(heads in (None, int(match[2])), f"{path}, and {heads} heads: give one number")
    return fetch(match[1]), int(match[2])


def fetch(path):
    """The path of a file; what is at an http address is downloaded into torch's cache, once."""
    if not re.match("https?://", str(path)):
        return Path(path)
    name = hashlib.sha256(path.encode()).hexdigest()[:8] + "-" + Path(path.partition("?")[0]).name
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(path, str(file))
            read_weights(file)                     # raises InputError for a damaged download
        except (OSError, http.client.HTTPException, ValueError) as error:     # also InputError
            file.unlink(missing_ok=True)
            raise InputError(f"{path} cannot be had ({error}): download it yourself") from error
    return file


# ===================================================================================== pre-training

#                    encoder: width, depth, heads; decoder: width, depth, heads
PRESETS = {
    "nano":  ((64, 4, 4), (32, 1, 2)),           # for 32-pixel images, on a CPU
    "slim":  ((64, 6, 8), (32, 1, 2)),           # the default student for these
    "micro": ((96, 4, 6), (48, 1, 3)),
    "mini":  ((128, 6, 8), (64, 1, 4)),          # the size of their teacher
    "tiny":  ((192, 12, 12), (96, 1, 3)),        # the paper's: 12 heads, where DeiT-Tiny has 3
    "small": ((384, 12, 12), (192, 1, 6)),
    "base":  ((768, 12, 12), (512, 8, 16)),      # the usual teacher
}
# `folder` is the paper's recipe for ImageNet; the others are sized for two CPU cores.
SMALL = dict(student="slim", epochs=20, batch_size=128, blr=6e-3)
RECIPES = {
    "shapes": SMALL | dict(epochs=6, blr=2.4e-2, teacher=str(
        Path(__file__).with_name("weights") / "shapes_teacher.pth")),
    "fashion-mnist": SMALL | dict(epochs=4), "cifar10": SMALL, "cifar100": SMALL,
    "folder": dict(student="tiny", epochs=400, batch_size=4096, blr=1.5e-4)}


def learning_rate(step, total, warmup, peak, end=0.0):
    """The rate at step 0 .. total - 1, set at every step as in MAE: linear warm-up from 0 to `peak`
    over `warmup` steps, then half a cosine down to `end`."""
    if step < warmup:
        return peak * step / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def parameter_groups(model, weight_decay):
    """For AdamW: 1-D parameters and positions are not decayed; learnt tokens and M are."""
    decayed, free = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (free if p.ndim <= 1 or name.endswith("pos_embed") else decayed).append(p)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=free, weight_decay=0.0)]


def train_step(model, optimizer, scaler, lr, pieces, batch, autocast, clip=None):
    """One update from `batch` images, given as `pieces`, micro-batches of (images, ids_keep) or of
    what else the model takes to return {"loss": ...}. clip: the largest gradient norm allowed.

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


def epoch_order(count, s, epoch):
    """An epoch's order of `count` images, (steps, batch); the last, incomplete batch is dropped."""
    shuffle = torch.Generator().manual_seed(seed_of(s.seed, 0, epoch))
    steps = count // s.batch_size
    return torch.randperm(count, generator=shuffle)[:steps * s.batch_size].view(steps, -1)


def pretrain(s):
    """One run with the settings `s`, a Namespace; returns its folder."""
    run = Run(s, "teacher")
    teacher = None if s.teacher == "none" else load_vit(s.teacher)
    model = new_model(s, teacher)
    student = model if teacher is None else model.student
    train, test = run.open_data(vars(s), student.encoder.config["image_size"], s.train_images)
    steps, local, share = run.divide(len(train))
    examples, _ = next((test or train).plain(torch.linspace(0, len(test or train) - 1, 8).long()))
    run.open_folder()                   # only now: all input has been checked

    model.to(run.device)
    before = class_scores(model, examples)
    total, warmup = s.epochs * steps, round(s.warmup_epochs * steps)
    peak = s.blr * s.batch_size / 256
    optimizer = torch.optim.AdamW(parameter_groups(model, s.weight_decay), lr=peak,
                                  betas=(0.9, 0.95), fused=run.device.type in ("cpu", "cuda"))
    run.parts = dict(model=model, optimizer=optimizer, scaler=run.scaler)
    done = run.load_checkpoint(train)
    nothing = student.target(examples).square().mean()
    run.say(f"run {run.out}: {s.student} on {len(train):,} images of {s.data}, {student.kept} of "
            f"{student.patches} patches visible; {run.world} x {s.device}, amp {s.amp}\n"
            f"teacher: {teacher.description if teacher else 'none, plain MAE'}\n"
            f"{total} steps, {warmup} of warm-up, learning rate {peak:.3g}\n"
            f"MAE loss of predicting nothing: {nothing:.3f}; a loss below it shows learning")
    knn = partial(nearest_neighbours, run, train, test)
    features = partial(pooled_features, student.encoder)
    if not run.log:
        run.record(dict(epoch=0, step=0) | knn(**baselines(student.encoder, teacher), knn=features))

    replica = run.replicate(model)
    measured = range(s.epochs, 0, -math.ceil(60_000 / len(train)))   # k-NN: a tenth of the time
    for epoch in range(done, s.epochs):
        meter = Meter(run, epoch, steps)
        order = epoch_order(len(train), s, epoch)[:, share]
        for i, (images, _) in enumerate(train.batches(order, epoch)):
            # The random numbers of a step are drawn for the whole batch, and each process takes its
            # share, so that they do not depend on who computes what.
            step, device = epoch * steps + i, run.device
            generator = torch.Generator(device).manual_seed(seed_of(s.seed, 1, step))
            noise = torch.rand(s.batch_size, student.patches, device=device, generator=generator)
            draws = student.choose(noise), *train.draw(s.batch_size, generator)
            parts = [x.split(s.micro_batch or local) for x in (images, *(x[share] for x in draws))]
            # Made as they are needed: micro-batches of (augmented images, visible patches).
            pieces = ((train.augment(part, *draw), ids) for part, ids, *draw in zip(*parts))
            lr = learning_rate(step, total, warmup, peak)
            meter.add(train_step(replica, optimizer, run.scaler, lr, pieces, local, run.autocast))
        run.record(meter.line(optimizer) | (knn(knn=features) if epoch + 1 in measured else {}))
        run.save_checkpoint(train)
        if run.rank == 0:
            save_student(run.out / "student.pth", model)
    if run.rank == 0:
        save_student(run.out / "student.pth", model)
        draw_pictures(run.out, model, examples, before)
    run.say(f"{summary(run.log)}in {run.out}: student.pth, reconstruction.png, attention.png\n"
            f"next: python finetune.py --init {run.out}/student.pth --data {s.data} "
            "--label-fraction 0.01\ncompare: the same with --init none; dmae.py --teacher none")
    return run.out


# ============================================================================================= runs


def sides(text):
    """"224", or "160,224" for height and width -> [height, width]."""
    if not re.fullmatch(r"[1-9]\d{0,4}(,[1-9]\d{0,4})?", text):
        raise argparse.ArgumentTypeError(f"{text}: must be a number of pixels, or HEIGHT,WIDTH")
    return [int(side) for side in text.split(",") * 2][:2]


# name: (default, kind, help). kind: type, least and most of a number; bool, for --x and --no-x; a
# tuple of choices; a string, the metavar of a text; a parser. All programs share MACHINE_FLAGS.
MACHINE_FLAGS = {
    "data_dir": ("data", "DIR", "where named sets lie, or are downloaded to"),
    "seed": (0, (int, 0, 2**63 - 1), "of everything random; vary it for error bars"),
    "micro_batch": (None, (int, 1, 10**9), "images at a time, if memory is short [all]"),
    "workers": (min(8, os.cpu_count() or 1), (int, 0, 1000), "processes decoding image files"),
    "device": (None, "DEVICE", "cpu, cuda, cuda:1, ... [cuda if there is one]"),
    "amp": (None, ("off", "bf16", "fp16"), "autocast [cuda: bf16, fp16 on old cards; else off]"),
    "compile": (None, bool, "torch.compile: waits a minute, then runs faster [cuda on Linux: on]"),
    "out": (None, "DIR", "the run's folder [the next number under runs/]"),
    "resume": (None, "DIR", "go on with the run in DIR, by its own settings"),
}
FLAGS = {
    "teacher": (None, "FILE", "weights of a ViT, x.pth or x.pth:3 to give its heads; none: plain "
                "MAE [for shapes the one in weights/]"),
    "data": ("shapes", "DIR|NAME", f"a folder of images, or {', '.join(SETS)}"),
    "train_images": (None, (int, 1, 10**9), "use only N: shortens any run [all]"),
    "student": (None, tuple(PRESETS), "size of the student [set]"),
    "image_size": (None, sides, "side of the student's images, or HEIGHT,WIDTH [set]"),
    "patch_size": (None, (int, 1, 10**5), "side of its patches; the teacher gets its grid [set]"),
    "crop_scale": (None, (float, 1e-3, 1), "least area of a crop; small images want more [set]"),
    "mask_ratio": (0.75, (float, 0, 1), "share of patches hidden; a lower one is slower"),
    "norm_pix": (True, bool, "predict normalised patches; plain ones make nicer pictures"),
    "layers": (None, "S:T,...", "student and teacher blocks to match, from 1 [the last of each]"),
    "match": ("scores", "KIND,...", "scores; probs: after softmax, raise --alpha; hidden: tokens"),
    "mixer": (True, bool, "learn M; without it, heads of equal number are compared directly"),
    "alpha": (1.0, (float, 0, 1e9), "weight of the distillation loss; at 0 it is only logged"),
    "decoupled": (False, bool, "D2-MAE: an extra block is matched, the decoder reads a lower one"),
    "epochs": (None, (int, 0, 10**6), "0 writes an untrained student, a control [set]"),
    "warmup_epochs": (None, (float, 0, 10**6), "more if the loss jumps early [a tenth of them]"),
    "batch_size": (None, (int, 1, 10**9), "images an update, over all processes [set]"),
    "blr": (None, (float, 0, 1e9), "the learning rate is blr * batch / 256 [set]"),
    "weight_decay": (0.05, (float, 0, 1e3), "none on biases and norms"),
} | MACHINE_FLAGS


def main(argv=None):
    """The command line; returns the run's folder. Bad input: a line on stderr, exit status 2."""
    with command_line("dmae.py", FLAGS, argv) as given:
        return pretrain(settings_of(given, FLAGS, "teacher", defaults_for))


@contextlib.contextmanager
def command_line(prog, flags, argv):
    """Yields {name: value} of the flags given. Inside, an error that the user can correct ends the
    program with one line."""
    def number(kind, least, most, text):
        with contextlib.suppress(ValueError):
            if least <= kind(text) <= most:                                      # false for nan
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: must be {kind.__name__}, from {least} to {most}")

    parser = argparse.ArgumentParser(
        prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, epilog="[set]: by data set, "
        "[recipe]: by recipe; see SETS in data.py and each program's RECIPES")
    parser.error = lambda error: parser.exit(2, f"{prog}: error: {' '.join(str(error).split())}\n")
    for name, (default, kind, text) in flags.items():
        options = (dict(action=argparse.BooleanOptionalAction) if kind is bool
                   else dict(metavar=kind) if isinstance(kind, str)
                   else dict(metavar="N", type=kind) if callable(kind)
                   else dict(choices=kind) if isinstance(kind[0], str)
                   else dict(type=partial(number, *kind), metavar=kind[0].__name__))
        text += "" if default is None else f" [{default}]"
        parser.add_argument("--" + name.replace("_", "-"), help=text, **options)
    given = vars(parser.parse_args(argv))
    try:
        yield given
    except (InputError, OSError) as error:         # OSError: a full disk, a name that is too long
        parser.error(error)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; a run with a checkpoint.pth goes on with --resume DIR\n")
    except (torch.OutOfMemoryError, torch._dynamo.exc.ShortenTraceback) as error:
        parser.error(f"--micro-batch N saves memory, --no-compile needs no C compiler: {error}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def settings_of(given, flags, source, defaults_for):
    """The settings of a run, a Namespace. Each comes from the first of these that has it: the flags
    given; with --resume, the run's config.json; defaults_for(given); the defaults in `flags`.

    source: the flag that names the file the run starts from; if moved, it is known by its hash."""
    if "resume" not in given:
        defaults = {name: flag[0] for name, flag in flags.items()}
        s = argparse.Namespace(**defaults | defaults_for(given) | given)
        warmup = getattr(s, "warmup_epochs", None)
        require(not warmup or warmup <= s.epochs, f"--warmup-epochs {warmup}: there are only "
                f"{s.epochs} epochs")
        return s
    out, movable = given["resume"], {source, "data", "data_dir", "workers", "device", "micro_batch"}
    fixed = sorted(given.keys() - movable - {"resume"})
    require(not fixed, "--resume takes all settings from the run: leave out --"
            + ", --".join(fixed).replace("_", "-"))
    try:
        saved = json.loads((Path(out) / "config.json").read_text())
        sha256, settings = saved[f"{source}_sha256"], saved["settings"] | given | dict(out=out)
        s = argparse.Namespace(**{name: settings[name] for name in flags} | settings)
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"--resume {out}: no run of this program is there, or its config.json is "
                         "damaged") from error
    file = getattr(s, source)
    require(file_hash(file) == sha256 and (sha256 or source not in given), f"--{source} {file} is "
            f"not there, or not what the run began with: give the new place by --{source}")
    return s


def defaults_for(given):
    """What suits the data set and the teacher."""
    name = given.get("data", "shapes")
    row = SETS.get(name, FOLDER) | RECIPES.get(name, RECIPES["folder"])
    teacher = given.get("teacher", row.get("teacher"))
    require(teacher, "--teacher is missing: FILE (weights of a ViT), or none (plain MAE)")
    about = given.keys() & {"layers", "match", "alpha", "mixer", "decoupled"}
    require(teacher != "none" or not about, f"--{', --'.join(about)}: not with --teacher none")
    if name == "shapes" and teacher != "none" and load_vit(teacher).width >= 512:
        row |= dict(train_images=4000, epochs=4)           # it costs far more than the student
    return row | dict(warmup_epochs=given.get("epochs", row["epochs"]) / 10)


def new_vit(preset, s):
    return ViT(s.image_size, s.patch_size, s.channels, *PRESETS[preset][0], s.mean, s.std)


def new_model(s, teacher):
    """An untrained MAE, or DMAE if there is a teacher; its weights depend on the seed alone."""
    torch.manual_seed(s.seed)
    encoder = new_vit(s.student, s)
    student = MAE(encoder, *PRESETS[s.student][1], s.mask_ratio, s.norm_pix,
                  decode_after=max(1, 2 * encoder.depth // 3) if s.decoupled else None)
    require(s.layers is None or re.fullmatch(r"\d+:\d+(,\d+:\d+)*", s.layers), f"--layers "
            f"{s.layers}: write pairs STUDENT:TEACHER, as in 2:4,4:6")
    layers = [(int(i), int(j)) for i, j in re.findall(r"(\d+):(\d+)", s.layers or "")]
    return (DMAE(student, teacher, layers, s.match, s.alpha, s.mixer, s.decoupled) if teacher
            else student)


def bf16_gain():
    """How many times faster this CPU multiplies matrices in bfloat16 than in float32."""
    matrices = (torch.ones(256, 256, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    slow, fast = (min(timeit.repeat("a @ a", globals=dict(a=a), number=1, repeat=4))
                  for a in matrices)                                     # the first one is slow
    return slow / fast


class Run:
    """What surrounds training in all programs: processes, precision, the folder and its files.

    s: the settings. source: the flag of the file that the run starts from. `parts`, set by the
    program: {name: what has a state_dict}, for checkpoints. `log`: the lines of log.jsonl."""

    def __init__(self, s, source):
        self.s, self.source, self.log, self.parts = s, source, [], {}
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        s.device = s.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.device = torch.Generator(s.device).device                  # fails for device meta
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"--device {s.device} cannot be used here: take cpu") from error
        cuda = self.device.type == "cuda"
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        s.amp = s.amp or ("bf16" if bf16 else "fp16" if cuda else "off")
        s.compile = cuda and os.name != "nt" if s.compile is None else s.compile   # nt: no Triton
        require(cuda or s.amp != "fp16", "--amp fp16 needs a CUDA device: take bf16 or off")
        if self.world > 1 and cuda:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group()                               # nccl for cuda, gloo for cpu
        self.say = print if self.rank == 0 else lambda *text: None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=s.amp == "fp16")
        dtype = torch.float16 if s.amp == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(self.device.type, dtype, enabled=s.amp != "off")

    def open_data(self, row, size, train_images=None):
        """Training and test source. The other processes wait for the first, which may download."""
        if self.rank > 0:
            dist.barrier()
        self.sources = open_data(self.s.data, row, size, self.s.data_dir, train_images,
                                 device=self.device, workers=self.s.workers, seed=self.s.seed)
        if self.rank == 0 and self.world > 1:
            dist.barrier()
        return self.sources

    def divide(self, count):
        """(steps per epoch, images of a batch for this process, the slice of a batch they are)."""
        batch, local = self.s.batch_size, self.s.batch_size // self.world
        require(batch <= count, f"--batch-size {batch}: more than the {count} training images")
        require(batch % self.world == 0, f"--batch-size {batch}: not for {self.world} processes")
        return count // batch, local, slice(self.rank * local, (self.rank + 1) * local)

    def open_folder(self):
        """Make --out, or the next number under runs/, and write config.json: all settings and a
        hash of the file the run starts from. With --resume it is there already."""
        s = self.s
        require(self.world == 1 or s.out, "several processes need the name of a folder: --out DIR")
        numbers = (f"runs/{n:04d}" for n in range(1, 10**6))
        s.out = s.out or next(n for n in numbers if not Path(n).exists())
        self.out = Path(s.out)
        if self.rank or s.resume:
            return
        roots = {Path(x.root).resolve() for x in self.sources if x and s.data not in SETS}
        require(roots.isdisjoint([self.out.resolve(), *self.out.resolve().parents]), f"--out "
                f"{s.out} is inside the data, {s.data}: name a folder elsewhere")
        held = [name for name in ("config.json", "checkpoint.pth") if (self.out / name).exists()]
        require(not held, f"--out {s.out} holds a run ({', '.join(held)}): go on with it by "
                f"--resume {s.out}, or name another folder")
        if self.device.type == "cpu" and s.amp == "off" and bf16_gain() > 1.5:
            self.say("this CPU multiplies faster in bfloat16: --amp bf16 would shorten the run")
        self.out.mkdir(parents=True, exist_ok=True)
        content = {"settings": vars(s), "torch": torch.__version__,
                   f"{self.source}_sha256": file_hash(getattr(s, self.source))}
        write(self.out / "config.json", lambda path: path.write_text(json.dumps(content, indent=1)))

    def record(self, line):
        """Add a line to log.jsonl, with the number of broken images if there are any; print it."""
        broken = sum(len(source.broken) for source in self.sources if source)
        self.log.append(line := line | ({"broken_images": broken} if broken else {}))
        text = "".join(json.dumps(x) + "\n" for x in self.log)
        if self.rank == 0:
            write(self.out / "log.jsonl", lambda path: path.write_text(text))
            print(", ".join(f"{name.replace('_', ' ')} {x:.4g}" for name, x in line.items()))

    def save_checkpoint(self, train):
        """What `load_checkpoint` needs to go on from here."""
        if self.rank == 0:
            content = {name: part.state_dict() for name, part in self.parts.items()}
            content |= dict(log=self.log, images=len(train), classes=list(train.classes))
            write(self.out / "checkpoint.pth", lambda path: torch.save(content, path))

    def load_checkpoint(self, train):
        """Bring `parts` and `log` to where the run was; returns how many epochs are done."""
        path = self.out / "checkpoint.pth"
        if not path.exists():
            return 0
        try:
            saved = read_weights(path)
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self.log, images, classes = saved["log"], saved["images"], saved["classes"]
        except (InputError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is damaged, or of another run: restore it") from error
        require((images, classes) == (len(train), list(train.classes)), f"{path} is of a run with "
                f"{images} training images of {len(classes)} classes, not these: give its --data")
        return self.log[-1]["epoch"]

    def replicate(self, model):
        """The model as training calls it: compiled in place if asked, in DDP unless alone."""
        if self.s.compile:
            model.compile()
        return model if self.world == 1 else DistributedDataParallel(model)


class Meter:
    """An epoch's progress bar, mean losses and images a second; stops the run at inf and nan."""

    def __init__(self, run, epoch, steps):
        self.run, self.epoch, self.steps, self.sums = run, epoch, steps, {}
        self.began = time.perf_counter()
        self.bar = tqdm(total=steps, desc=f"epoch {epoch + 1}/{run.s.epochs}", unit="step",
                        leave=False, disable=run.rank > 0 or None)

    def add(self, losses):
        """Count a step's losses, {name: tensor}, which stay on the device."""
        self.bar.update()
        self.sums = {name: self.sums.get(name, 0) + loss for name, loss in losses.items()}

    def line(self, optimizer):
        """The epoch's line of the log. The device is read here, and not between steps."""
        means = torch.stack(list(self.sums.values())) / self.steps / self.run.world
        if self.run.world > 1:
            dist.all_reduce(means)
        lr = max(group["lr"] for group in optimizer.param_groups)
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        require(all(x.isfinite().all() for x in (means, *weights)), f"losses or weights of epoch "
                f"{self.epoch + 1} are not finite, at learning rate {lr:.3g}: lower --blr, or try "
                "--amp off if it is on")
        self.bar.close()
        rate = self.run.s.batch_size * self.steps / (time.perf_counter() - self.began)
        return dict(epoch=self.epoch + 1, step=(self.epoch + 1) * self.steps, lr=lr,
                    images_per_second=rate, **dict(zip(self.sums, means.tolist())))


# --------------------------------------------------------------------------- k-NN, files, pictures


def knn_top1(bank, bank_labels, test, test_labels, k=20, temperature=0.07):
    """Share of `test` that a weighted k-NN vote gets right. Features (N, c), labels (N,) int64.

    Cosine similarity; each of the k nearest votes with exp(similarity / temperature)."""
    bank, test = F.normalize(bank, dim=1), F.normalize(test, dim=1)
    right, classes = 0, int(bank_labels.max()) + 1
    for part, labels in zip(test.split(500), test_labels.split(500)):        # bounds the memory
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        right += int((votes.argmax(dim=1) == labels).sum())
    return right / len(test)


def pooled_features(encoder, images, block=None, pool="mean"):
    """Pooled tokens of a block (None: the last) after a parameter-free layer norm: (b, c).

    pool: "mean", of the patch tokens, or "cls", the class token."""
    block = encoder.depth if block is None else block
    tokens = encoder(images, tokens_of=[block])[0][block].float()
    tokens = F.layer_norm(tokens, tokens.shape[-1:])
    return tokens[:, 1:].mean(dim=1) if pool == "mean" else tokens[:, 0]


@torch.no_grad()
def features_of(run, source, indices, function):
    """(features (N, c), labels (N,)) of images of a source. function: images (b, ...) -> (b, c)."""
    with run.autocast:
        found = [(function(images), labels) for images, labels in source.plain(indices)]
    return tuple(torch.cat(part) for part in zip(*found))


def nearest_neighbours(run, train, test, bank=5_000, queries=1_000, **functions):
    """{name: k-NN accuracy of its features} for each of `functions`, images -> (b, c); {} without
    labels and in processes other than the first. Samples are the same for every seed.

    bank, queries: how many training and test images are sampled, None for all."""
    if run.rank or test is None or train.labels is None or test.labels is None:
        return {}
    samples = [(source, torch.randperm(len(source), generator=torch.Generator().manual_seed(0))[:n])
               for source, n in ((train, bank), (test, queries))]
    return {name: knn_top1(*(x for sample in samples for x in features_of(run, *sample, function)))
            for name, function in functions.items()}


def baselines(encoder, teacher):
    """What else k-NN compares before training: pixels, and a teacher if it is not too slow."""
    found = dict(knn_pixels=lambda images: images.flatten(1))
    if teacher and teacher.width <= 4 * encoder.width:
        found["knn_teacher"] = lambda images: pooled_features(
            teacher, images_for(teacher, encoder, images))
    return found


def summary(log):
    """A table of what k-NN found, before training and last."""
    rows = {"raw pixels": log[0].get("knn_pixels"), "untrained": log[0].get("knn"),
            "student": log[-1].get("knn"), "teacher": log[0].get("knn_teacher")}
    return "".join(f"k-NN top-1, {row:10} {100 * x:5.1f} %\n" for row, x in rows.items() if x)


def file_hash(path):
    """sha256 of a file of weights, None if there is no such file."""
    path = split_heads(path)[0]
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def save_student(path, model):
    """Encoder (names as in timm), decoder (as in the MAE release), mixers, plain settings."""
    mae = model.student if isinstance(model, DMAE) else model
    parts = dict(
        model=mae.encoder.state_dict(), mixers=getattr(model, "mixers", {}),
        decoder={n: p for n, p in mae.state_dict().items() if not n.startswith("encoder.")})
    content = {part: {name: p.detach().cpu() for name, p in tensors.items()}
               for part, tensors in parts.items()}
    content["config"] = mae.encoder.config | mae.config | dict(match=getattr(model, "match", None))
    write(path, lambda temporary: torch.save(content, temporary))


@torch.no_grad()
def class_scores(model, images):
    """The class token's scores for all patches, none masked, in the last pair of matched blocks: of
    the student, through M if it mixes these, and of the teacher, if any: (b, h, gh, gw) each."""
    if isinstance(model, MAE):
        vit = model.encoder
        found = [vit(images, scores_of=[vit.depth])[1][vit.depth]]                # b h 1+n 1+n
    else:
        vit, teacher, (i, j) = model.student.encoder, model.teacher, model.layers[-1]
        _, scores = vit(images, tokens_of=[vit.depth], scores_of=[i], extra=model.extra)
        M, ours = model.mixers.get(f"scores:{i}:{j}"), scores[i]
        found = [ours if M is None else einsum(M, ours, "t s, b s ... -> b t ..."),
                 teacher(images_for(teacher, vit, images), scores_of=[j])[1][j]]
    return [scores[:, :, 0, 1:].unflatten(2, vit.grid) for scores in found]


@torch.no_grad()
def draw_pictures(out, model, images, before):
    """reconstruction.png, a row for each image; attention.png, the class token's scores of three
    images, before training and after, and of the teacher. before: `class_scores` back then."""
    student = getattr(model, "student", model)
    noise = torch.rand(len(images), student.patches, generator=torch.Generator().manual_seed(0))
    ids_keep = student.choose(noise.to(images.device))
    tokens, _ = student.encoder(images, ids_keep, tokens_of=[student.decode_after])
    prediction = student.decode(tokens[student.decode_after], ids_keep)
    patches = student.encoder.patchify(images)
    if student.norm_pix:               # each patch's true mean and deviation: it predicts neither
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + mean
    mask = torch.ones_like(patches[..., :1]).scatter(1, ids_keep[..., None], 0)       # b n 1
    visible = patches * (1 - mask)
    panels = [as_rgb(student.encoder, student.encoder.unpatchify(panel))
              for panel in (patches, visible, prediction, visible + prediction * mask)]
    save_grid(torch.stack(panels, dim=1).flatten(0, 1), out / "reconstruction.png",
              ["image", "visible", "prediction", "both"])
    picture, after = panels[0][:3], class_scores(model, images)                      # b 3 H W
    maps = dict(untrained=before[0], student=after[0]) | dict(zip(["teacher"], after[1:]))
    heads, rows = min(x.shape[1] for x in maps.values()), []
    for scores in maps.values():
        least, most = (f(scores, dim=(2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        seen = F.interpolate((scores - least) / (most - least), picture.shape[2:])[:3, :heads]
        rows.append(torch.cat([picture[:, None], seen[:, :, None].expand(-1, -1, 3, -1, -1)], 1))
    save_grid(torch.stack(rows, dim=1).flatten(0, 2), out / "attention.png",
              ["image", *(f"head {i + 1}" for i in range(heads))], [*maps] * 3,
              "Class-token scores for the patches of whole images, last pair of matched blocks. "
              "White is highest." + " Student: through M, if it mixes scores." * (len(after) > 1))


def as_rgb(vit, images):
    """Normalised images -> (b, 3, H, W) in 0 to 1, at least 96 pixels high."""
    images = (images.float() * vit.std + vit.mean).clamp(0, 1).expand(-1, 3, -1, -1)
    return F.interpolate(images, scale_factor=math.ceil(96 / images.shape[2]))


if __name__ == "__main__":
    main()
