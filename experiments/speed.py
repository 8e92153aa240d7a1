"""How fast is a training step, and how near to what the machine can do?

    python -m experiments.speed                             # D-MAE-Tiny under ViT-Base, batch 32
    python -m experiments.speed --against plain,hf          # in alternation with other ways
    python -m experiments.speed --batch-size 1024 --amp bf16 --compile        # on a GPU

Times whole steps of the core's `train_step` (forward, backward, optimizer) on random images that
lie on the device; the teacher has random weights. Prints a line of JSON for each way: images/s,
milliseconds a step (median, 10th and 90th percentile), peak memory (allocated on a GPU; on a CPU
that of the whole process, of which the libraries are 0.7 GB), what is kept for the backward pass,
and the operations that are needed as a share of what the best of several matrix products reached
meanwhile. Where the machine is shared that is a low estimate: a best beside a median.

Other ways: `plain`, as one would write it down first: student and teacher embed all patches before
they drop some, the teacher runs all of its blocks, softmax attention is spelt out. `hf`: Hugging
Face's ViTMAE classes. These do more than is needed, and their share counts what is needed.
"""

import argparse
import itertools
import json
import platform
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import einsum, rearrange
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dmae
from data import InputError, require
from dmae import DMAE, MAE, PRESETS, Attention, ViT
from finetune import Classifier, Supervised, layer_groups

# ======================================================================================== measuring


def costs(s, run, images, other):
    """What a step costs for an image: operations of its matrix products, attention included, 2 for
    a multiply-add; bytes that the forward pass keeps for the backward pass, not compiled.

    Both are counted, on any device. images, other: four of what `train_step` takes."""
    model, _ = build("ours", argparse.Namespace(**vars(s) | dict(compile=False)), run.device)
    kept = []
    for count in (2, 4):                        # what does not grow with the batch drops out
        storages = {}

        def pack(tensor, storages=storages):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, run.autocast:
            model(images[:count], other[:count])
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    # The counter does not see every fused attention: here it is spelt out.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, other)["loss"].backward()
    return counter.get_total_flops() / len(images), (kept[1] - kept[0]) / 2


def best_product(device, dtype, side):
    """Operations a second of the best of several products of square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    clock = []
    for _ in range(6):
        (a @ b)[0, 0].item()                               # waits for the device
        clock.append(time.perf_counter())
    return 2 * side**3 / min(after - before for before, after in itertools.pairwise(clock))


def peak_memory(device):
    """In bytes; 0 on Windows, which does not tell that of a process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


# ======================================================================================= other ways


class PlainAttention(Attention):
    """Attention with its softmax spelt out; returns (scores, None) where the other has (q, k)."""

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        out = rearrange(scores.softmax(dim=-1) @ v, "b h n d -> b n (h d)")
        return self.proj(out), (scores, None)


class PlainViT(ViT):
    """Embeds every patch, then drops; always runs all blocks and the final norm."""

    def forward(self, images, ids_keep=None, tokens_of=(), scores_of=(), extra=None):
        x = self.patch_embed["proj"](images).flatten(2).mT + self.pos_embed[:, 1:]
        x = x if ids_keep is None else x.take_along_dim(ids_keep[..., None], dim=1)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        tokens, scores = {0: x}, {}
        for i, block in enumerate(self.blocks, start=1):
            x, (all_scores, _) = block(x)
            tokens[i] = x
            if i in scores_of:
                scores[i] = all_scores.float()
        self.norm(x)
        return tokens, scores


def plain(module):
    """Make every ViT and every attention in `module` the plain one; the weights stay."""
    for part in module.modules():
        if type(part) is Attention:
            part.__class__ = PlainAttention
        elif type(part) is ViT:
            part.__class__ = PlainViT
    return module


class HuggingFace(nn.Module):
    """D-MAE from transformers' classes: as DMAE, but called with the masking noise (b, n)."""

    def __init__(self, student, teacher, image_size, patch_size):
        super().__init__()
        try:
            from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
        except ImportError as error:
            raise InputError("--against hf: pip install transformers") from error

        def config(preset):
            (width, depth, heads), (d_width, d_depth, d_heads) = PRESETS[preset]
            return ViTMAEConfig(
                hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
                intermediate_size=4 * width, image_size=image_size, patch_size=patch_size,
                decoder_hidden_size=d_width, decoder_num_hidden_layers=d_depth,
                decoder_num_attention_heads=d_heads, decoder_intermediate_size=4 * d_width,
                norm_pix_loss=True, attn_implementation="sdpa")

        self.student = ViTMAEForPreTraining(config(student))
        self.__dict__["teacher"] = ViTMAEModel(config(teacher)).requires_grad_(False).eval()
        require(hasattr(self.teacher, "layers"), "--against hf needs transformers 5: upgrade it")
        heads = [PRESETS[preset][0][2] for preset in (teacher, student)]
        self.mixer = nn.Parameter(torch.randn(heads) / heads[1])

    def scores(self, vit, hidden):
        """Scores of the last block, from its input: the classes give probabilities only."""
        block = vit.layers[-1]
        x = block.layernorm_before(hidden)
        q, k = (rearrange(part(x), "b n (h d) -> b h n d", h=vit.config.num_attention_heads)
                for part in (block.attention.q_proj, block.attention.k_proj))
        return dmae.attention_scores(q, k)

    def forward(self, images, noise):
        out = self.student(images, noise=noise, output_hidden_states=True)
        with torch.no_grad():
            theirs = self.teacher(images, noise=noise, output_hidden_states=True).hidden_states[-2]
            theirs = self.scores(self.teacher, theirs)
        ours = self.scores(self.student.vit, out.hidden_states[-2])
        attn = F.mse_loss(einsum(self.mixer, ours, "t s, b s q k -> b t q k"), theirs)
        return {"loss": out.loss + attn, "mae": out.loss, "attn": attn}


def build(way, s, device):
    """(what train_step trains, its optimizer) for the way "ours", "plain" or "hf"; equal weights
    for the first two."""
    torch.manual_seed(0)
    encoder, decoder = PRESETS[s.student]
    model = ViT(s.image_size, s.patch_size, 3, *encoder)
    if s.task == "finetune":
        model = Supervised(Classifier(1000, **model.config))
    elif way == "hf":
        model = HuggingFace(s.student, s.teacher, s.image_size, s.patch_size)
        model.teacher.to(device)
    else:
        model = MAE(model, *decoder)
        if s.task == "dmae":
            teacher = ViT(s.image_size, s.patch_size, 3, *PRESETS[s.teacher][0])
            model = DMAE(model, plain(teacher) if way == "plain" else teacher)
    model = (plain(model) if way == "plain" else model).to(device)
    groups = (layer_groups(model.classifier, 0.85, 0.05) if s.task == "finetune"
              else dmae.parameter_groups(model, 0.05))
    if s.compile:
        model.compile()
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def time_steps(s):
    """Measure, and return a list of lines, one for each way."""
    run = dmae.Run(s, None)
    device, cuda = run.device, run.device.type == "cuda"
    patches = (s.image_size // s.patch_size) ** 2
    torch.manual_seed(0)
    images = torch.randn(s.batch_size, 3, s.image_size, s.image_size, device=device)
    noise = torch.rand(s.batch_size, patches, device=device)
    labels = torch.arange(s.batch_size, device=device) % 1000
    other = labels if s.task == "finetune" else noise.argsort(dim=1)[:, :patches // 4]
    operations, kept = costs(s, run, *(x[torch.arange(4) % s.batch_size] for x in (images, other)))

    ways, piece = {}, s.micro_batch or s.batch_size
    for name in ("ours", *(s.against.split(",") if s.against else ())):
        began = time.perf_counter()
        model, optimizer = build(name, s, device)

        def step(model=model, optimizer=optimizer, other=noise if name == "hf" else other):
            pieces = zip(images.split(piece), other.split(piece), strict=True)
            losses = dmae.train_step(model, optimizer, run.scaler, 1e-4, pieces, s.batch_size,
                                     run.autocast)
            return losses["loss"].item()                   # which waits for the device

        loss = step()                                      # compiles, if asked to
        ways[name] = dict(step=step, first=time.perf_counter() - began, loss=loss, seconds=[])
        step()
        step()

    best, memory = 0.0, 0
    dtype = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[s.amp]
    for i in range(s.steps):                   # in alternation: the machine's moods meet them all
        if i % max(1, s.steps // 3) == 0:
            best = max(best, best_product(device, dtype, 8192 if cuda else 2048))
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)              # the product's is no step's
        for way in ways.values():
            began = time.perf_counter()
            way["step"]()
            way["seconds"].append(time.perf_counter() - began)
        memory = max(memory, peak_memory(device))

    lines = []
    for name, way in ways.items():
        low, middle, high = np.quantile(way["seconds"], (0.1, 0.5, 0.9))
        rate = s.batch_size / middle
        lines.append(dict(
            way=name, images_per_second=round(rate, 2), ms_per_step=round(1e3 * middle, 2),
            ms_10=round(1e3 * low, 2), ms_90=round(1e3 * high, 2),
            gflop_per_image=round(operations / 1e9, 3),
            share_of_best_product=round(operations * rate / best, 3),
            best_product_gflops=round(best / 1e9, 1),
            peak_memory_gb=round(memory / 1e9, 2) if len(ways) == 1 else None,
            kept_mb_per_image=round(kept / 1e6, 2) if name == "ours" else None,
            first_step_s=round(way["first"], 1), first_loss=way["loss"],
            **vars(s) | dict(teacher=s.teacher if s.task == "dmae" else None),
            threads=torch.get_num_threads(), torch=torch.__version__,
            machine=torch.cuda.get_device_name(device) if cuda else platform.machine(),
            date=time.strftime("%Y-%m-%d")))
    return lines


# ===================================================================================== command line

# As FLAGS of dmae.py.
FLAGS = {
    "task": ("dmae", ("dmae", "mae", "finetune"), "what a step is of"),
    "against": (None, ("plain", "hf", "plain,hf"), "other ways to time in alternation [none]"),
    "student": ("tiny", tuple(PRESETS), "its size"),
    "teacher": ("base", tuple(PRESETS), "its size, random weights"),
    "image_size": (224, (int, 1, 10**5), "side of the images"),
    "patch_size": (16, (int, 1, 10**5), "side of the patches"),
    "batch_size": (32, (int, 1, 10**9), "images a step"),
    "micro_batch": (None, (int, 1, 10**9), "images at a time, of a step [all]"),
    "steps": (12, (int, 1, 10**9), "steps to time, after three"),
    "device": (None, "DEVICE", "cpu, cuda, cuda:1, ... [cuda if there is one]"),
    "amp": ("off", ("off", "bf16", "fp16"), "autocast"),
    "compile": (False, bool, "torch.compile"),
}


def main(argv=None):
    """The command line; prints and returns a line for each way."""
    with dmae.command_line("python -m experiments.speed", FLAGS, argv) as given:
        s = argparse.Namespace(**{name: flag[0] for name, flag in FLAGS.items()} | given)
        require(s.task == "dmae" or "hf" not in f"{s.against}", "--against hf: not for this task")
        lines = time_steps(s)
        print(*map(json.dumps, lines), sep="\n")
        return lines


if __name__ == "__main__":
    main()
