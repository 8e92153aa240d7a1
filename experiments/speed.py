"""How fast is a training step, and how near to what the machine can do?

    python -m experiments.speed                             # D-MAE-Tiny under ViT-Base, batch 32
    python -m experiments.speed --against plain hf          # in alternation with other ways
    python -m experiments.speed --batch-size 1024 --amp bf16 --compile        # on a GPU
    python -m experiments.speed --task mae --batch-size 4096 --amp bf16 --compile
    python -m experiments.speed --task finetune --batch-size 1024 --amp bf16 --compile

Times whole training steps (forward, backward, optimizer) of the core's own `train_step` on random
images that lie on the device, after a warm-up; the teacher has random weights. Prints a line of
JSON for each way: images/s, milliseconds a step (median, 10th and 90th percentile), peak memory
(allocated on a GPU; on a CPU that of the whole process, of which the libraries are 0.7 GB), what an
image's forward pass keeps for the backward pass, counted, and the floating-point operations that a
step needs as a share of what the best of several matrix products reached meanwhile. Where the
machine is shared that is a low estimate: a best beside a median.

Other ways to do the same: `plain`, as one would write it down first: student and teacher embed all
patches before they drop some, the teacher runs all of its blocks, softmax attention is spelt out
everywhere. `hf`: student and teacher from Hugging Face's ViTMAE classes, with their fused
attention. These do more than is needed, and their share counts what is needed.
"""

import argparse
import importlib.util
import json
import math
import platform
import resource
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

import dmae
from dmae import (
    DMAE, MAE, PRESETS, Attention, InputError, Parser, ViT, attention_scores, check,
    one_line_errors, parameter_groups, precision, take, train_step)
from finetune import Classifier, Supervised, layer_groups

# ========================================================================================= counting


def block_flops(width, tokens):
    """A block's forward pass for one image, 2 for a multiply-add, attention included."""
    return tokens * 24 * width**2 + 4 * tokens**2 * width


def count_flops(task, student, teacher, patches, kept, numbers):
    """Floating-point operations that a training step needs for an image, in matrix products alone:
    {"teacher", "student", "decoder"}, of them those that the task has. student, teacher: presets.
    numbers: of a patch. Left out: the mixer of heads and the classifier's head, together 0.03 %.

    The backward pass costs twice the forward pass, but for the gradient of the images."""
    (width, depth, _), (d_width, d_depth, _) = PRESETS[student]
    if task == "finetune":
        forward = depth * block_flops(width, 1 + patches) + 2 * patches * numbers * width
        return dict(student=3 * forward - 2 * patches * numbers * width)
    tokens = 1 + kept
    embed = 2 * kept * numbers * width
    scores = 2 * tokens**2 * width if task == "dmae" else 0      # a product of their own
    out = dict(student=3 * (embed + depth * block_flops(width, tokens) + scores) - embed)
    out["decoder"] = 3 * (2 * tokens * width * d_width + d_depth * block_flops(d_width, 1 + patches)
                          + 2 * patches * d_width * numbers)
    if task == "dmae":
        (t_width, t_depth, _), _ = PRESETS[teacher]
        out["teacher"] = (2 * kept * numbers * t_width
                          + (t_depth - 1) * block_flops(t_width, tokens)
                          + tokens * 4 * t_width**2 + 2 * tokens**2 * t_width)
    return out


def best_product(device, dtype, side):
    """Operations a second of the best of several products of square matrices."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(6):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def wait(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ======================================================================================= other ways


class PlainAttention(Attention):
    """Attention with its softmax spelt out; the scores come from the same product."""

    def forward(self, x, return_scores=False):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        out = rearrange(scores.softmax(dim=-1) @ v, "b h n d -> b n (h d)")
        return self.proj(out), scores.float() if return_scores else None


class PlainViT(ViT):
    """Embeds every patch, then drops; always runs all blocks and the final norm."""

    def forward(self, images, ids_keep=None, scores=(), tokens=()):
        out_scores, out_tokens = {}, {}
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = x if ids_keep is None else take(x, ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for i, block in enumerate(self.blocks, start=1):
            x, out_scores[i] = block(x, return_scores=i in scores)
            out_tokens[i] = x
        self.norm(x)
        return out_scores, out_tokens


def plain(module):
    """Make every ViT and every attention in `module` the plain one; the weights stay."""
    for part in module.modules():
        if type(part) is Attention:
            part.__class__ = PlainAttention
        elif type(part) is ViT:
            part.__class__ = PlainViT
    return module


class HuggingFace(nn.Module):
    """D-MAE from transformers' classes: as DMAE, called with the same images and noise."""

    def __init__(self, student, teacher, image_size, patch_size):
        super().__init__()
        from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

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
        heads = [PRESETS[preset][0][2] for preset in (teacher, student)]
        self.mixer = nn.Parameter(torch.randn(heads) / heads[1])

    def scores(self, vit, hidden):
        """Scores of the last block, from its input: the classes give probabilities only."""
        layers = vit.layers if hasattr(vit, "layers") else vit.encoder.layer
        block = layers[-1]
        x = block.layernorm_before(hidden)
        attention = block.attention if hasattr(block.attention, "q_proj") else (
            block.attention.attention)
        q, k = ((attention.q_proj, attention.k_proj) if hasattr(attention, "q_proj")
                else (attention.query, attention.key))
        heads = vit.config.num_attention_heads
        return attention_scores(*(rearrange(part(x), "b n (h d) -> b h n d", h=heads)
                                  for part in (q, k)))

    def forward(self, images, noise):
        out = self.student(images, noise=noise, output_hidden_states=True)
        with torch.no_grad():
            theirs = self.teacher(images, noise=noise, output_hidden_states=True).hidden_states[-2]
            theirs = self.scores(self.teacher, theirs)
        ours = self.scores(self.student.vit, out.hidden_states[-2])
        attn = F.mse_loss(torch.einsum("ts,bsqk->btqk", self.mixer, ours), theirs)
        return {"loss": out.loss + attn, "mae": out.loss, "attn": attn}


# ========================================================================================== timing


def build(way, s, device):
    """(what train_step trains, its optimizer) for the way "ours", "plain" or "hf"; equal weights
    for the first two."""
    torch.manual_seed(0)
    if s.task == "finetune":
        width, depth, heads = PRESETS[s.student][0]
        classifier = Classifier(1000, image_size=s.image_size, patch_size=s.patch_size,
                                width=width, depth=depth, heads=heads)
        model = Supervised(plain(classifier) if way == "plain" else classifier)
        groups = layer_groups(classifier, 0.85, 0.05)
    elif way == "hf":
        model = HuggingFace(s.student, s.teacher, s.image_size, s.patch_size)
        groups = parameter_groups(model, 0.05)
    else:
        model = MAE(ViT(s.image_size, s.patch_size, 3, *PRESETS[s.student][0]),
                    *PRESETS[s.student][1])
        if s.task == "dmae":
            teacher = ViT(s.image_size, s.patch_size, 3, *PRESETS[s.teacher][0])
            model = DMAE(model, plain(teacher) if way == "plain" else teacher)
        model = plain(model) if way == "plain" else model
        groups = parameter_groups(model, 0.05)
    model.to(device)
    if way == "hf":
        model.teacher.to(device)
    if s.compile:
        model.compile()
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def kept_for_backward(s, images, other):
    """Bytes that the forward pass of an image keeps for the backward pass, not compiled: counted,
    on any device."""
    model, _ = build("ours", argparse.Namespace(**vars(s) | dict(compile=False)), images.device)
    kept = []
    for count in (2, 4):                        # what does not grow with the batch drops out
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            with precision(s, images.device)[1]:
                model(images[:count], other[:count])
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    return (kept[1] - kept[0]) / 2


def time_steps(s):
    """Measure, and return a list of lines, one for each way."""
    device = torch.device(s.device)
    scaler, autocast = precision(s, device)
    dtype = dict(off=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[s.amp]
    side = s.image_size // s.patch_size
    patches, kept = side**2, int(side**2 * 0.25)
    flops = count_flops(s.task, s.student, s.teacher, patches, kept, 3 * s.patch_size**2)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(s.batch_size, 3, s.image_size, s.image_size, device=device,
                         generator=generator)
    noise = torch.rand(s.batch_size, patches, device=device, generator=generator)
    ids_keep = noise.argsort(dim=1)[:, :kept]
    labels = torch.arange(s.batch_size, device=device) % 1000
    piece = s.micro_batch or s.batch_size
    four = torch.arange(4, device=device) % s.batch_size
    kept_bytes = kept_for_backward(
        s, images[four], (labels if s.task == "finetune" else ids_keep)[four])

    ways = {}
    for way in ("ours", *s.against):
        began = time.perf_counter()
        model, optimizer = build(way, s, device)
        other = labels if s.task == "finetune" else noise if way == "hf" else ids_keep

        def step(model=model, optimizer=optimizer, other=other):
            batch = list(zip(images.split(piece), other.split(piece)))
            losses = train_step(model, optimizer, scaler, 1e-4, batch, s.batch_size, autocast)
            wait(device)
            return losses

        loss = step()["loss"].item()                       # compiles, if asked to
        first = time.perf_counter() - began
        for _ in range(2):
            step()
        ways[way] = dict(step=step, first=first, loss=loss, seconds=[])
    graphs = compiled_graphs()
    best, memory = 0.0, 0
    for i in range(s.steps):                   # in alternation: the machine's moods meet them all
        if i % max(1, s.steps // 3) == 0:
            best = max(best, best_product(device, dtype, 8192 if device.type == "cuda" else 2048))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)              # the product's is no step's
        for way in list(ways.values())[i % len(ways):] + list(ways.values())[:i % len(ways)]:
            began = time.perf_counter()
            way["step"]()
            way["seconds"].append(time.perf_counter() - began)
        memory = max(memory, torch.cuda.max_memory_allocated(device) if device.type == "cuda"
                     else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    recompiled = compiled_graphs() - graphs

    lines = []
    for name, way in ways.items():
        times = torch.tensor(way["seconds"], dtype=torch.float64)
        low, middle, high = (times.quantile(q).item() for q in (0.1, 0.5, 0.9))
        rate = s.batch_size / middle
        lines.append(dict(
            way=name, task=s.task, images_per_second=round(rate, 2),
            ms_per_step=round(1e3 * middle, 2),
            ms_10=round(1e3 * low, 2), ms_90=round(1e3 * high, 2),
            gflop_per_image={k: round(v / 1e9, 3) for k, v in flops.items()},
            share_of_best_product=round(sum(flops.values()) * rate / best, 3),
            best_product_gflops=round(best / 1e9, 1),
            peak_memory_gb=round(memory / 1e9, 2) if len(ways) == 1 else None,
            kept_mb_per_image=round(kept_bytes / 1e6, 2) if name == "ours" else None,
            first_step_s=round(way["first"], 1), recompiled=recompiled, first_loss=way["loss"],
            student=s.student, teacher=s.teacher if s.task == "dmae" else None,
            image_size=s.image_size, patch_size=s.patch_size, batch_size=s.batch_size,
            micro_batch=s.micro_batch, amp=s.amp, compile=s.compile, steps=s.steps,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else
            platform.processor() or platform.machine(), torch=torch.__version__,
            date=time.strftime("%Y-%m-%d")))
    return lines


def compiled_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ==================================================================================== command line


def make_parser():
    parser = Parser(prog="python -m experiments.speed", allow_abbrev=False,
                    description="Time whole training steps on random images.")
    add = parser.add_argument
    add("--task", choices=("dmae", "mae", "finetune"), default="dmae",
        help="what a step is of [dmae]")
    add("--against", nargs="*", choices=("plain", "hf"), default=[], metavar="WAY",
        help="other ways to time in alternation: plain, hf (needs transformers) [none]")
    add("--student", choices=PRESETS, default="tiny", help="its size [tiny]")
    add("--teacher", choices=PRESETS, default="base", help="its size, random weights [base]")
    add("--image-size", type=int, default=224, metavar="N", help="side of the images [224]")
    add("--patch-size", type=int, default=16, metavar="N", help="side of the patches [16]")
    add("--batch-size", type=int, default=32, metavar="N", help="images a step [32]")
    add("--micro-batch", type=int, metavar="N", help="images at a time, of a step [all]")
    add("--steps", type=int, default=12, metavar="N", help="steps to time, after three [12]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[cuda or cpu]")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast [off]")
    add("--compile", action="store_true", help="torch.compile [no]")
    return parser


def main(argv=None):
    """The command line; prints and returns a line for each way."""
    parser = make_parser()
    s = parser.parse_args(argv)
    with one_line_errors(parser, {}):
        for key in ("batch_size", "steps", "image_size", "patch_size"):
            if getattr(s, key) < 1:
                raise InputError(f"--{key.replace('_', '-')} {getattr(s, key)}: must be 1 or more")
        check(dict(device=s.device, amp=s.amp, micro_batch=s.micro_batch, batch_size=s.batch_size))
        if "hf" in s.against and s.task != "dmae":
            raise InputError("--against hf: only for --task dmae")
        if "hf" in s.against and not importlib.util.find_spec("transformers"):
            raise InputError("--against hf: pip install transformers")
        lines = time_steps(s)
        for line in lines:
            print(json.dumps(line))
        return lines


if __name__ == "__main__":
    main()
