"""All tests: python -m pytest

Needs no network and no data. Tests against timm and Hugging Face are skipped where these are not
installed.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.functional import to_pil_image
from torchvision.transforms.v2 import functional as TF

import data
import dmae
import finetune
from data import SETS, InputError, read_image
from dmae import (DMAE, MAE, Scores, ViT, knn_top1, learning_rate, load_vit, main,
                  parameter_groups, resolve, save_student, sincos_positions, split_heads,
                  train_step)
from experiments import analyze, loader, speed, study

# torchvision announces the end of its decoders; `read_image` does without them when it comes.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")

# ============================================================================================ model
# Fixed weights, images and masking noise, and what an independent implementation of the paper made
# of them in float32.


def wave(name, shape, scale=0.05):
    """A fixed tensor for the parameter called `name`."""
    phase = zlib.crc32(name.encode()) % 6283 / 1000
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    numbers = scale * torch.sin(0.7310 * i + phase + 0.13 * torch.cos(0.0171 * i))
    return numbers.float().view(shape)


def fill(module, rename=lambda name: name):
    """Every trained parameter becomes its wave, plus 1 for the weights of layer norms."""
    for name, p in module.named_parameters():
        if "pos_embed" not in name:
            name = rename(name.removeprefix("encoder."))
            p.data = wave(name, p.shape) + ("norm" in name and name.endswith("weight"))


def fixed_images(b=2, size=224):
    i = torch.arange(size)
    return torch.stack([torch.stack([
        torch.sin(i[:, None] * 0.05 * (c + 1) + n) + torch.cos(i * 0.083 * (n + 1) + c)
        for c in range(3)]) for n in range(b)]).float()


def fixed_noise(b=2, n=196):
    return torch.stack([((torch.arange(n) * 37 + 11 * i) % n) / n for i in range(b)])


def paper_model(decoupled=False):
    student = MAE(ViT(), decode_after=8 if decoupled else None)
    teacher = ViT(width=768)
    model = DMAE(student, teacher, decoupled=decoupled)
    fill(student)
    fill(teacher)
    if decoupled:            # the reference has a whole qkv there, whose value rows are never used
        fill(model.extra, lambda name: "blocks.12." + name)
        for kind, size in (("weight", (576, 192)), ("bias", (576,))):
            qkv = wave(f"blocks.12.attn.qkv.{kind}", size)
            getattr(model.extra.qk, kind).data = qkv[:384]
    model.mixers["13:12" if decoupled else "12:12"].data = wave("adapter", (12, 12), 0.3)
    return model


EXPECTED = {
    "mae": 1.2445016, "attn": 57.364601, "prediction": 0.2850142,
    "blocks.0.attn.qkv.weight": 37.48925, "blocks.11.attn.qkv.weight": 742.65076,
    "patch_embed.proj.weight": 103.21867, "decoder_pred.weight": 49.871662, "M": 36.825104}
EXPECTED_DECOUPLED = {
    "mae": 1.2444993, "attn": 57.356785, "prediction": 0.2850031,
    "blocks.0.attn.qkv.weight": 25.241302, "blocks.7.mlp.fc1.weight": 58.581826,
    "blocks.11.attn.qkv.weight": 24.027229, "blocks.12.norm1.weight": 0.15058867}


@pytest.mark.parametrize("decoupled, expected", [(False, EXPECTED), (True, EXPECTED_DECOUPLED)])
def test_agrees_with_an_independent_implementation(decoupled, expected):
    model, images = paper_model(decoupled), fixed_images()
    ids_keep = model.student.choose(fixed_noise())
    losses = model(images, ids_keep)
    (losses["mae"] + losses["attn"]).backward()
    found = {name: p.grad.abs().sum() for name, p in model.student.named_parameters()
             if p.requires_grad}
    found = {name.removeprefix("encoder."): x for name, x in found.items()}
    found |= {"mae": losses["mae"], "attn": losses["attn"],
              "M": next(iter(model.mixers.values())).grad.abs().sum()}
    if decoupled:
        found["blocks.12.norm1.weight"] = model.extra.norm1.weight.grad.abs().sum()
    tokens = model.student.encoder(images, ids_keep, tokens=[model.student.decode_after])[1]
    found["prediction"] = model.student.decode(*tokens.values(), ids_keep)[0, 5, 7]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4), name
    if not decoupled:                             # the same model, compared after the softmax
        model.match = "probs"
        assert model(images, ids_keep)["attn"].item() == pytest.approx(0.00079768, rel=1e-4)


def test_parameter_counts_of_the_paper():
    student = MAE(ViT())
    encoder = sum(p.numel() for p in student.encoder.parameters())
    assert encoder == 5_524_416 and sum(p.numel() for p in student.parameters()) == 5_748_480
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == 5_691_744
    assert student.kept == 49


def small_vit(**changes):
    return ViT(**dict(image_size=32, patch_size=8, width=32, depth=3, heads=4) | changes)


def small_model(seed=0, **options):
    torch.manual_seed(seed)
    options = dict(match="scores") | options
    decode_after = options.pop("decode_after", None)
    teacher = options.pop("teacher", None) or small_vit(width=48, depth=4, heads=6)
    student = MAE(small_vit(), decoder_width=16, decoder_heads=2, decode_after=decode_after)
    return DMAE(student, teacher, **options)


def test_asking_for_scores_changes_no_bit_of_the_output():
    vit, images = small_vit(), torch.randn(2, 3, 32, 32)
    _, plain = vit(images, tokens=[3])
    scores, tokens = vit(images, tokens=[0, 2, 3], scores=[1, 3])
    assert torch.equal(plain[3], tokens[3])
    # ... and the scores are those whose softmax weighs the values, head by head.
    x = vit.blocks[2].norm1(tokens[2])
    q, k, v = vit.blocks[2].attn.qkv(x).view(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(scores[3], q @ k.mT / 8**0.5)
    out = vit.blocks[2].attn.proj((scores[3].softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(tokens[2] + out, tokens[3] - vit.blocks[2].mlp(
        vit.blocks[2].norm2(tokens[2] + out)), atol=1e-5, rtol=1e-5)


def test_nothing_is_computed_past_what_is_asked_for():
    vit, images = small_vit(), torch.randn(2, 3, 32, 32)
    expected = vit(images, scores=[2], tokens=[3])[0][2]
    for p in [*vit.blocks[2].parameters(), *vit.blocks[1].mlp.parameters(), *vit.norm.parameters(),
              *vit.blocks[1].attn.proj.parameters()]:
        p.data.fill_(math.nan)
    vit.blocks[1].attn.qkv.weight.data[64:] = math.nan                     # the values
    scores, tokens = vit(images, scores=[2])
    assert not tokens and scores[2].isfinite().all()
    torch.testing.assert_close(scores[2], expected)


def test_embedding_is_the_strided_convolution():
    vit, images = ViT((32, 48), 8, 1, 32, 1, 4, (0.5,), (0.5,)), torch.randn(2, 1, 32, 48)
    expected = vit.patch_embed["proj"](images).flatten(2).mT + vit.pos_embed[:, 1:]
    torch.testing.assert_close(vit.embed(images)[:, 1:], expected)
    ids = torch.stack([torch.randperm(24)[:5] for _ in range(2)])
    kept = expected.gather(1, ids[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(vit.embed(images, ids)[:, 1:], kept)


def test_encode_sees_every_patch_and_is_deterministic():
    vit, images = ViT((32, 48), 4, 1, 32, 2, 4, (0.5,), (0.5,)), torch.randn(2, 1, 32, 48)
    tokens = vit.encode(images)
    assert tokens.shape == (2, 1 + 8 * 12, 32) and torch.equal(tokens, vit.train().encode(images))
    for y, x in ((0, 0), (31, 47), (13, 30)):
        changed = images.clone()
        changed[:, :, y, x] += 1
        assert not torch.allclose(vit.encode(changed), tokens)


# ============================================================================================== MAE


def test_painted_patches_survive_masking_and_unshuffling():
    """Patch i is painted with the number i; an encoder and a decoder that only pass numbers on must
    put every visible number back into its place."""
    mae = MAE(ViT((24, 32), 4, 1, 4, 0, 1, (0.0,), (1.0,)), 4, 0, 1, norm_pix=False)
    n = 6 * 8
    images = mae.encoder.unpatchify(torch.arange(float(n)).view(1, n, 1).expand(2, n, 16))
    assert images[0, 0, 5, 9] == 1 * 8 + 2                  # row 5 is of patch row 1, column 9 of 2
    torch.testing.assert_close(mae.encoder.patchify(images)[0, :, 3], torch.arange(float(n)))
    for p in mae.parameters():
        p.data.zero_()
    mae.encoder.patch_embed["proj"].weight.data[0] = 1 / 16                  # the mean of a patch
    mae.encoder.norm = mae.decoder_norm = torch.nn.Identity()
    mae.decoder_embed.weight.data[0, 0] = mae.decoder_pred.weight.data[:, 0] = 1
    mae.mask_token.data[:] = -1
    ids_keep = mae.choose(torch.rand(2, n))
    assert ids_keep.shape == (2, 12)
    shown = mae.decode(mae.encoder.embed(images, ids_keep), ids_keep)[..., 0]
    for row, ids in zip(shown, ids_keep):
        expected = torch.full((n,), -1.0)
        expected[ids] = ids.float()
        torch.testing.assert_close(row, expected)


def test_loss_touches_hidden_patches_only_and_normalises_each():
    mae = MAE(small_vit(), 16, 1, 2)
    images, ids_keep = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 7, 15], [1, 2, 8, 9]])
    prediction = torch.randn(2, 16, 192)
    total, count = 0.0, 0
    for b in range(2):                                       # the definition, patch by patch
        for i in set(range(16)) - set(ids_keep[b].tolist()):
            y, x = 8 * (i // 4), 8 * (i % 4)
            patch = images[b, :, y:y + 8, x:x + 8].permute(1, 2, 0).flatten()
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            total, count = total + (prediction[b, i] - patch).square().mean(), count + 1
    loss = mae.reconstruction_loss(images, prediction, ids_keep)
    torch.testing.assert_close(loss, total / count)
    prediction[0, 3] += 100                                                  # visible
    assert torch.equal(mae.reconstruction_loss(images, prediction, ids_keep), loss)
    prediction[0, 4] += 100                                                  # hidden
    assert mae.reconstruction_loss(images, prediction, ids_keep) > 10 * loss
    # Predicting nothing scores (n - 1) / n: the variance is the unbiased one.
    zero = mae.reconstruction_loss(images, torch.zeros_like(prediction), ids_keep)
    assert zero.item() == pytest.approx(191 / 192, rel=1e-4)


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = DMAE(MAE(small_vit(), 64, 1, 4), small_vit(width=48, depth=4, heads=6))
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=3e-3)
    images, ids_keep = torch.randn(2, 3, 32, 32), torch.rand(2, 16).argsort(1)[:, :4]
    first = train_one(model, optimizer, images, ids_keep, lr=3e-3)
    for _ in range(200):
        last = train_one(model, optimizer, images, ids_keep, lr=3e-3)
    assert last["mae"] < 0.1 < 0.9 < first["mae"] and last["attn"] < 0.1 * first["attn"]


def train_one(model, optimizer, images, ids_keep, lr=1e-3, piece=None):
    parts = zip(images.split(piece or len(images)), ids_keep.split(piece or len(images)))
    return train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), lr, parts,
                      len(images), torch.autocast("cpu", enabled=False))


# ============================================================================================ D-MAE


def test_distance_is_the_mean_square_between_teacher_and_mixed_student():
    model = small_model()
    M = torch.randn(6, 4)
    ours, theirs = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    slow = torch.stack(
        [theirs[:, t] - sum(M[t, s] * ours[:, s] for s in range(4)) for t in range(6)])
    torch.testing.assert_close(model.distance(ours, theirs, M), slow.square().mean())
    with torch.autocast("cpu", torch.bfloat16):                     # float32 whatever surrounds it
        torch.testing.assert_close(model.distance(ours, theirs, M), slow.square().mean())


def test_identical_student_and_teacher_are_at_distance_zero():
    student = MAE(small_vit(), 16, 1, 2)
    for match in ("scores", "probs", "hidden"):
        teacher = small_vit()
        teacher.load_state_dict(student.encoder.state_dict())
        model = DMAE(student, teacher, match=match)
        model.mixers["3:3"].data = torch.eye(32 if match == "hidden" else 4)
        name = "hidden" if match == "hidden" else "attn"
        assert model(torch.randn(2, 3, 32, 32))[name] < 1e-10
        model.mixers["3:3"].data *= 1.1
        assert model(torch.randn(2, 3, 32, 32))[name] > 1e-7


def test_hidden_compares_normalised_tokens_and_layers_add_up():
    images, ids_keep = torch.randn(2, 3, 32, 32), torch.rand(2, 16).argsort(1)[:, :4]
    both = small_model(layers=[(1, 2), (3, 3)], match="hidden")
    total = 0
    for i, j in both.layers:
        ours = both.student.encoder(images, ids_keep, tokens=[i])[1][i]
        theirs = both.teacher(images, ids_keep, tokens=[j])[1][j]
        ours, theirs = ((x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True)
                                                          + 1e-5).sqrt() for x in (ours, theirs))
        total += (ours @ both.mixers[f"{i}:{j}"].T - theirs).square().mean()
    torch.testing.assert_close(both(images, ids_keep)["hidden"], total)


@pytest.mark.parametrize("options", [
    {}, dict(layers=[(1, 2), (3, 4)]), dict(match="probs"), dict(match="hidden", layers=[(2, 2)]),
    dict(decoupled=True, decode_after=2)])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(options):
    model = small_model(**options)
    before = {n: p.clone() for n, p in model.teacher.state_dict().items()}
    model.train()
    assert not any(m.training for m in model.teacher.modules())
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-2)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.teacher.parameters()}
    model(torch.randn(2, 3, 32, 32))["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name
    optimizer.step()
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(torch.equal(p, before[n]) for n, p in model.teacher.state_dict().items())
    assert not any("teacher" in name for name in model.state_dict())


def test_decoupled_decodes_an_earlier_block():
    model = small_model(decoupled=True, decode_after=2)
    model(torch.randn(2, 3, 32, 32))["mae"].backward()
    assert model.student.encoder.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0
    assert model.student.encoder.blocks[2].attn.qkv.weight.grad is None
    assert isinstance(model.extra, Scores) and len(model.student.encoder.blocks) == 3


def test_alpha_zero_is_plain_mae_to_the_bit():
    images, ids_keep = torch.randn(8, 3, 32, 32), torch.rand(8, 16).argsort(1)[:, :4]
    distilled, plain = small_model(alpha=0.0), small_model().student
    optimizers = [torch.optim.AdamW(parameter_groups(m, 0.05)) for m in (distilled, plain)]
    for _ in range(5):
        losses = train_one(distilled, optimizers[0], images, ids_keep)
        train_one(plain, optimizers[1], images, ids_keep)
    assert losses["attn"] > 0
    for (name, p), q in zip(distilled.student.named_parameters(), plain.parameters()):
        assert torch.equal(p, q), name
    assert not torch.equal(plain.encoder.cls_token, small_model().student.encoder.cls_token)


def test_grey_small_student_under_a_large_colour_teacher():
    """1 x 32 x 32 in patches of 4 under 3 x 224 x 224 in patches of 14: 8 x 8 for both."""
    torch.manual_seed(0)
    teacher = ViT(224, 14, 3, 48, 2, 6)
    student = MAE(ViT(32, 4, 1, 32, 2, 4, (0.3,), (0.2,)), 16, 1, 2)
    model = DMAE(student, teacher)
    pixels = torch.rand(2, 1, 32, 32)
    seen = model.teacher_images((pixels - 0.3) / 0.2)
    assert seen.shape == (2, 3, 112, 112) and teacher.grid == (8, 8)
    colour = F.interpolate(pixels, (112, 112), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
    expected = torchvision.transforms.v2.functional.normalize(
        colour, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(teacher.pos_embed[:, 1:], sincos_positions(48, (8, 8)))
    losses = model((pixels - 0.3) / 0.2)
    losses["loss"].backward()
    assert losses["attn"].isfinite() and model.mixers["2:2"].shape == (6, 4)


def test_equal_settings_hand_the_teacher_the_very_same_batch():
    model, images = small_model(), torch.randn(2, 3, 32, 32)
    assert model.teacher_images(images) is images


@pytest.mark.parametrize("make, words", [
    (lambda: small_model(layers=[(4, 4)]), "1 to 3"),
    (lambda: small_model(layers=[(1, 0)]), "1 to 4"),
    (lambda: small_model(layers=[(1, 1), (1, 1)]), "twice"),
    (lambda: small_model(decoupled=True, layers=[(1, 1)]), "not together"),
    (lambda: small_model(match="logits"), "choose"),
    (lambda: small_model(teacher=small_vit(channels=1, mean=(0.5,), std=(0.5,))), "channel"),
    (lambda: ViT(30, 8), "multiple"),
    (lambda: ViT(32, 8, width=32, heads=5), "heads"),
    (lambda: ViT(32, 8, width=30, heads=5), "multiple of 4"),
    (lambda: MAE(small_vit(), mask_ratio=0.99), "visible"),
    (lambda: MAE(small_vit(), mask_ratio=0.0), "hidden"),
    (lambda: MAE(small_vit(), mask_ratio=math.nan), "mask ratio")])
def test_settings_that_cannot_work_say_why(make, words):
    with pytest.raises(InputError, match=words):
        make()


def test_scores_and_losses_stay_float32_under_autocast():
    model, images = small_model(), torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        scores, tokens = model.student.encoder(images, scores=[3], tokens=[3])
        losses = model(images)
    assert scores[3].dtype == torch.float32 and tokens[3].isfinite().all()
    assert all(loss.dtype == torch.float32 for loss in losses.values())


# ================================================================================= loading teachers


def scramble(model):
    """Move every weight: the zeros and ones of a fresh model would hide what is lost or swapped."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape)
    return model.eval()


def scrambled_vit(**sizes):
    return scramble(ViT(**dict(image_size=32, patch_size=8, width=48, depth=2, heads=3) | sizes))


def some_images(vit):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, vit.config["channels"], *vit.config["image_size"], generator=generator)


def save(content, path):
    safe = path.suffix == ".safetensors"
    (pytest.importorskip("safetensors.torch").save_file if safe else torch.save)(content, path)
    return path


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def module(**parts):
    return {f"module.{part}.{n}": t for part, state in parts.items() for n, t in state.items()}


def other(state):
    """Weights that must be left alone."""
    return {name: tensor + 1 for name, tensor in state.items()}


HEAD = {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
DECODER = dict.fromkeys(["mask_token", "decoder_pos_embed", "decoder_norm.bias"], torch.ones(1))
# The files that are around, made of an encoder's weights `s`, and what their description must say.
LAYOUTS = {
    "mae_pretrain.pth": (lambda s: {"model": s}, "(MAE release)"),
    "mae_visualize.pth": (lambda s: {"model": s | DECODER}, "(MAE release), decoder ignored"),
    "mae_checkpoint.pth": (
        lambda s: dict(model=s | DECODER, optimizer={"state": {0: {"exp_avg": torch.ones(2)}}},
                       epoch=3, scaler={"scale": 2.0}, args=argparse.Namespace(lr=1e-3)),
        "(MAE release), decoder, optimizer, epoch, scaler, args ignored"),
    "mae_tiny.pth.tar": (lambda s: {"model": module(model=s)}, "(D-MAE authors)"),
    "mae_tiny_distill.pth.tar": (
        lambda s: {"model": module(model=s | DECODER, tch_model=other(s), attn_adapter=HEAD)},
        "(D-MAE authors), decoder, teacher, mixer ignored"),
    "supervised.pth.tar": (
        lambda s: {"model": module(model={n.replace("norm.", "fc_norm."): s[n] for n in s} | HEAD)},
        "(D-MAE authors), head ignored"),
    "d2mae.pth.tar": (
        lambda s: {"model": module(model=s | {
            n.replace("blocks.0.", "blocks.11."): t for n, t in other(s).items()
            if n.startswith(("blocks.0.norm1.", "blocks.0.attn.qkv."))})},
        "(D-MAE authors), extra block ignored"),
    "moco_tiny.pth.tar": (lambda s: {"model": module(base_encoder=s)}, "(D-MAE authors)"),
    "moco_v3.pth.tar": (
        lambda s: {"state_dict": module(
            base_encoder=s | HEAD, momentum_encoder=other(s), predictor=HEAD)},
        "(MoCo-v3), head, momentum encoder, predictor ignored"),
    "dino.pth": (lambda s: s, "(timm)"),                         # nothing tells the two apart
    "dino_full.pth": (
        lambda s: {"student": module(backbone=other(s)), "teacher": under("backbone.", s) | HEAD},
        "(DINO), head, student ignored"),
    "deit.pth": (lambda s: {"model": s | HEAD}, "(DeiT), head ignored"),
    "timm.bin": (lambda s: s | HEAD, "(timm), head ignored"),
    "timm.safetensors": (lambda s: s, "(timm)"),
    "compiled.pth": (lambda s: {"model": under("_orig_mod.", s)}, "(MAE release)"),
    "inside.pth": (lambda s: {"model": module(_orig_mod=s)}, "(MAE release)"),
    "outside.pth": (lambda s: {"model": under("_orig_mod.module.", s)}, "(MAE release)"),
    "authors.pth": (lambda s: under("_orig_mod.module.model.", s), "(D-MAE authors)"),
    "config.pth": (lambda s: {"model": s, "config": {"heads": 3}}, "(MAE release)"),     # not ours
}


def assert_same(vit, source):
    weights, expected = vit.state_dict(), source.state_dict()
    assert vit.config == source.config and weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert torch.equal(vit.encode(some_images(vit)), source.encode(some_images(vit)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_the_wild(tmp_path, name):
    make, ending = LAYOUTS[name]
    heads = 12 if "authors" in ending else 3
    source = scrambled_vit(depth=11, heads=heads)                    # 11: block 10 follows 9, not 1
    path = save(make(source.state_dict()), tmp_path / name)
    vit = load_vit(path, heads=None if heads == 12 else 3)       # the authors' decide on their own
    assert_same(vit, source)
    assert vit.description == (f"ViT 48 wide, 11 blocks, {heads} heads, patch 8, grid 4x4, "
                               f"from {name} {ending}")


def test_our_students_come_back(tmp_path):
    encoder = scrambled_vit(image_size=(16, 32), channels=1, mean=(0.5,), std=(0.3,))
    mae = MAE(encoder, 16, 1, 2, decode_after=1)
    for model in mae, DMAE(mae, scrambled_vit(channels=1), decoupled=True):
        save_student(tmp_path / "student.pth", model)
        vit = load_vit(tmp_path / "student.pth")
        assert_same(vit, encoder)
        assert "(this project), decoder" in vit.description


@pytest.mark.parametrize("name", ["ViTMAEForPreTraining", "ViTMAEModel"])
def test_hugging_face_agrees(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = scramble(getattr(transformers, name)(transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=11, num_attention_heads=3,
        intermediate_size=192, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.0,
        decoder_num_attention_heads=2, decoder_intermediate_size=16, layer_norm_eps=1e-6)))
    model.save_pretrained(tmp_path)                              # under other names than in memory
    for path in tmp_path / "model.safetensors", save(model.state_dict(), tmp_path / "model.pth"):
        vit = load_vit(path, heads=3)
        noise = torch.arange(16.0).expand(2, -1)                 # ascending: patches in order
        theirs = getattr(model, "vit", model)(some_images(vit), noise=noise).last_hidden_state
        torch.testing.assert_close(vit.encode(some_images(vit)), theirs, atol=1e-4, rtol=1e-4)
        assert "(Hugging Face)" in vit.description


@pytest.mark.parametrize("channels, size, patch", [(3, (32, 32), 16), (1, (16, 32), 4)])
def test_timm_agrees(tmp_path, channels, size, patch):
    timm = pytest.importorskip("timm.models.vision_transformer")
    theirs = scramble(timm.VisionTransformer(
        img_size=size, patch_size=patch, in_chans=channels, embed_dim=48, depth=11, num_heads=6,
        num_classes=0, global_pool="token"))

    def assert_agrees(vit):
        features = theirs.forward_features(some_images(vit))
        torch.testing.assert_close(vit.encode(some_images(vit)), features, atol=1e-5, rtol=1e-5)
    if channels == 3:                                            # and square, as all but ours
        assert_agrees(load_vit(save(theirs.state_dict(), tmp_path / "timm.pth"), heads=6))
    ours = scrambled_vit(image_size=size, patch_size=patch, channels=channels, depth=11,
                     heads=6, mean=[0.5] * channels, std=[0.3] * channels)
    save_student(tmp_path / "student.pth", MAE(ours, 16, 1, 2))
    theirs.load_state_dict(torch.load(tmp_path / "student.pth", weights_only=True)["model"])
    assert_agrees(ours)


def refusal(path, heads=None):
    """What load_vit says when it refuses: one line."""
    with pytest.raises(InputError) as caught:
        load_vit(path, heads)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("width, make, heads, why", [
    (768, lambda s: {"model": s, "config": dict(
        heads=8, image_size=[32, 32], mean=[0.5] * 3, std=[0.3] * 3)}, 8, "its own config"),
    (48, lambda s: {"model": module(model=s)}, 12, "being the D-MAE authors'"),
    (768, lambda s: s, 12, "its width, 768"),
    (1024, lambda s: s, 16, "its width, 1024"),
    (1280, lambda s: s, 16, "its width, 1280"),
])
def test_files_that_decide_their_heads(tmp_path, width, make, heads, why):
    state = ViT(image_size=32, width=width, depth=1, heads=1).state_dict()
    path = save(make(state), tmp_path / "x.pth")
    assert load_vit(path).config["heads"] == load_vit(path, heads).config["heads"] == heads
    assert f"{heads} heads by {why}, not 4" in refusal(f"{path}:4")          # nobody overrules it


def test_heads_that_the_caller_decides(tmp_path):
    path = save(scrambled_vit().state_dict(), tmp_path / "x.pth")
    message = refusal(path)
    assert "48 wide" in message and "write it behind the name, x.pth:12" in message
    assert load_vit(path, 6).config["heads"] == load_vit(f"{path}:6", 6).config["heads"] == 6
    assert split_heads(f"{path}:6") == (path, 6) and split_heads(path, 6) == (path, 6)
    assert f"{path}: width 48 does not divide into 5 heads" in refusal(path, 5)
    assert "does not divide into 0 heads" in refusal(f"{path}:0")
    odd = path.rename(tmp_path / "a.pth:3")                      # a name, not a number of heads
    assert split_heads(odd) == (odd, None)
    assert load_vit(odd, 12).config["heads"] == load_vit(f"{odd}:12").config["heads"] == 12
    assert "12" in refusal(f"{odd}:6", 12)                       # which of the two?


def saved(content, legacy=False):
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def misspelt(state):
    """A legacy file with a wrong digit in the last name of a storage."""
    data = bytearray(saved(state, legacy=True))
    data[[name.end() for name in re.finditer(rb"\d{8,}", data)][-1] - 1] ^= 1
    return bytes(data)


REFUSED = {
    "empty": (lambda s: b"", "truncated: fetch it again"),
    "wrong digit": (misspelt, "fetch it again"),
    "text": (lambda s: b"version https://git-lfs.github.com/spec/v1\n", "no PyTorch file; give"),
    "module": (lambda s: scrambled_vit(), "give one that holds a plain state_dict()"),
    "tensor": (lambda s: s["pos_embed"], "holds no state dict, but a Tensor"),
    "nothing": (lambda s: {}, "no cls_token of 3 dimensions among its tensors (none, ...)"),
    "resnet": (lambda s: torchvision.models.resnet18().state_dict(), "its tensors (conv1.weight, "),
    "distilled": (lambda s: s | {"dist_token": s["cls_token"]}, "the model without distillation"),
    "scale": (lambda s: s | {"blocks.0.ls1.gamma": s["norm.bias"]}, "blocks.0.ls1.gamma does not"),
    "relative": (lambda s: s | {"blocks.0.attn.relative_position_bias_table": torch.ones(732, 12)},
                 "relative_position_bias_table does not belong"),
    "missing": (lambda s: {n: s[n] for n in s if n != "norm.bias"}, "norm.bias is missing"),
    "no blocks": (lambda s: {n: s[n] for n in s if "blocks" not in n}, "holds no plain ViT"),
    "no positions": (lambda s: s | {"pos_embed": torch.ones(1, 0, 48)}, "pos_embed"),
    "shape": (lambda s: s | {"norm.bias": torch.ones(47)}, "norm.bias is (47,), not (48,)"),
    "grey": (lambda s: s | {"patch_embed.proj.weight": torch.ones(48, 1, 8, 8)}, "of 1 channels"),
    "twice": (lambda s: s | under("module.", s), "cls_token twice, under different prefixes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(tmp_path, case):
    make, reason = REFUSED[case]
    content, path = make(scrambled_vit().state_dict()), tmp_path / "x.pth"
    path.write_bytes(content if isinstance(content, bytes) else saved(content))
    message = refusal(path, 3)
    assert str(path) in message and reason in message


def test_missing_files_and_folders(tmp_path):
    address = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth"
    assert address in refusal(tmp_path / "x.pth") and address in refusal(f"{tmp_path}/x.pth:3")
    assert "is a folder: name the file" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "x.safetensors"])
def test_truncated_files(tmp_path, kind):
    path, state = tmp_path / kind, scrambled_vit(width=8, heads=2).state_dict()
    whole = (save(state, path).read_bytes() if path.suffix == ".safetensors"
             else saved(state, legacy=kind == "legacy.pth"))
    for size in [*range(0, len(whole), 199), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert re.search("fetch it again|no PyTorch file", refusal(path, 2)), size


def test_safetensors_may_not_be_installed(tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_is_run(tmp_path):
    path, marker = tmp_path / "x.pth", tmp_path / "marker"

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)
    for dump in torch.save, pickle.dump:
        with path.open("wb") as file:
            dump({"model": scrambled_vit().state_dict(), "args": Code()}, file)
        assert "it holds code" in refusal(path, 3) and not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()                                       # it would have run


@pytest.mark.parametrize("swapped", [False, True])
def test_sincos_positions_by_hand(swapped):
    table = [[wave(place * 10000 ** (-k / 4))
              for place in ((row, column) if swapped else (column, row))
              for wave in (math.sin, math.cos) for k in range(4)]
             for row in range(2) for column in range(3)]
    torch.testing.assert_close(sincos_positions(16, (2, 3), swapped), torch.tensor([table]))


@pytest.mark.parametrize("swapped", [False, True])
def test_resize_grid_recomputes_sine_cosine(swapped):
    vit = scrambled_vit()
    cls = vit.pos_embed[:, :1].clone()
    vit.pos_embed.data[:, 1:] = sincos_positions(48, (4, 4), swapped) + 1e-5    # others' rounding
    assert vit.resize_grid([2, 6]) is vit and not vit.pos_embed.requires_grad
    assert torch.equal(vit.pos_embed[:, 1:], sincos_positions(48, (2, 6), swapped))
    assert torch.equal(vit.pos_embed[:, :1], cls)
    assert vit.grid == (2, 6) and vit.config["image_size"] == [16, 48]
    assert vit.encode(some_images(vit)).shape == (2, 13, 48)


@pytest.mark.parametrize("grid", [(7, 5), (2, 3)])
def test_resize_grid_interpolates_a_learnt_table(grid):
    layers = pytest.importorskip("timm.layers")
    vit = scrambled_vit()
    before = vit.pos_embed.requires_grad_(True)
    assert vit.resize_grid([4, 4]).pos_embed is before           # nothing to do
    expected = layers.resample_abs_pos_embed(before, list(grid), num_prefix_tokens=1)
    assert vit.resize_grid(grid).pos_embed.requires_grad         # still learnt
    torch.testing.assert_close(vit.pos_embed, expected, atol=1e-4, rtol=0)
    assert (vit.pos_embed[:, 1:] - sincos_positions(48, grid)).abs().max() > 0.1


# ============================================================================================= data


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(seed))


def write_images(root, *names, height=10, width=12):
    """A picture of noise in each file, every one different."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(height, width, 3, seed=number).numpy()).save(root / name)


def image_folder(root, **options):
    return data.Files(*data.find_images(root), root,
                      **dict(row=SETS["folder"], size=(8, 8)) | options)


def torchvision_box(*size, min_scale):
    return v2.RandomResizedCrop.get_params(torch.empty(1, *size), (min_scale, 1), (3 / 4, 4 / 3))


def test_crop_boxes_are_distributed_as_torchvisions():
    ours = data.crop_boxes(30_000, 60, 80, 0.2, torch.manual_seed(0))
    theirs = torch.tensor([torchvision_box(60, 80, min_scale=0.2) for _ in range(3000)])
    top, left, h, w = ours.T
    assert top.min() == 0 and left.min() == 0                      # every border is reached,
    assert (top + h).max() == 60 and (left + w).max() == 80        # and none is crossed
    # Area and ratio; rounding moves each side by half a pixel at most.
    assert ((h - 0.5) * (w - 0.5) <= 60 * 80).all() and ((h + 0.5) * (w + 0.5) >= 960).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    a, b = (torch.cat([x, x[:, 2:].prod(1, keepdim=True)], dim=1).double() for x in (ours, theirs))
    sigma = (a.var(dim=0) / len(a) + b.var(dim=0) / len(b)).sqrt()
    assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * sigma).all()      # of the box and its area


@pytest.mark.parametrize("size", [(4, 100), (100, 4), (5, 99), (8, 30)])
def test_where_no_crop_fits_the_centre_is_taken_as_torchvision_does(size):
    boxes = data.crop_boxes(3, *size, 0.9, torch.manual_seed(0))
    assert boxes.tolist() == [list(torchvision_box(*size, min_scale=0.9))] * 3


@pytest.mark.parametrize("size", [(32, 32), (20, 28), (72, 60)])
def test_resized_crop_is_torchvisions_image_by_image(size):
    images, boxes = noise(12, 3, 40, 48), data.crop_boxes(12, 40, 48, 0.1, torch.manual_seed(0))
    boxes[0] = torch.tensor([39, 46, 1, 2])                        # a corner, all of it edge
    bicubic = torch.arange(12) % 3 == 0
    out = data.resized_crop(images, boxes, bicubic, size)
    for image, box, cubic, ours in zip(images.float(), boxes.tolist(), bicubic, out):
        kind = InterpolationMode.BICUBIC if cubic else InterpolationMode.BILINEAR
        theirs = TF.resized_crop(image, *box, list(size), kind, antialias=True).clamp(0, 255)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_augment_flips_the_chosen_images_and_no_others(tmp_path):
    images, row = noise(6, 3, 32, 32), SETS["cifar10"]
    flip, bicubic = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1]]).bool()
    small = data.SmallSet(images, None, row, (32, 32))
    plain, = small.plain(torch.arange(6))
    torch.testing.assert_close(plain, TF.normalize(images / 255, row["mean"], row["std"]))
    expected = torch.stack([x.flip(-1) if f else x for x, f in zip(plain, flip)])
    whole = torch.tensor([[0, 0, 32, 32]] * 6)
    assert torch.equal(small.augment(images, flip, bicubic, whole), expected)
    assert torch.equal(image_folder(tmp_path, row=row).augment(images, flip), expected)


def test_read_image_understands_every_kind_of_pixel(tmp_path):
    rgba = noise(5, 7, 4).numpy()
    rgb, grey, alpha = rgba[..., :3], rgba[..., :1], rgba[..., 3:] / 255
    deep = (grey * 257.0 + 100).clip(0, 65535).astype(np.uint16)
    deep[0, :3, 0] = 0, 32768, 65535
    index, colours = rgb[..., 0] % 4, noise(4, 3).numpy()
    glass = np.where(np.arange(4)[:, None] == 2, 255, colours)     # entry 2 shows the white below
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    cases = {                       # name: (image, how it should look, options of its file)
        "rgb": (Image.fromarray(rgb), rgb, {}),
        "grey": (Image.fromarray(grey[..., 0]), grey, {}),
        "1-bit": (Image.fromarray(grey[..., 0] > 127), (grey > 127) * 255, {}),
        "16-bit": (Image.fromarray(deep[..., 0]), deep / 257, {}),
        "palette": (palette, colours[index], {}),
        "palette, one entry transparent": (palette, glass[index], dict(transparency=2)),
        "rgba": (Image.fromarray(rgba), rgb * alpha + 255 * (1 - alpha), {}),
        "la": (Image.fromarray(rgba[..., ::3].copy()), grey * alpha + 255 * (1 - alpha), {})}
    for orientation, quarters in ((3, 2), (6, -1)):                # upside down, on its left side
        exif = Image.Exif()
        exif[0x0112] = orientation
        cases[f"exif {orientation}"] = Image.fromarray(rgb), np.rot90(rgb, quarters), {"exif": exif}
    for name, (image, expected, options) in cases.items():
        image.save(tmp_path / f"{name}.png", **options)
        pixels = data.read_image(tmp_path / f"{name}.png").permute(1, 2, 0).numpy()
        assert pixels.dtype == np.uint8 and pixels.shape == (*expected.shape[:2], 3), name
        assert np.abs(pixels - expected.astype(float)).max() <= 0.51, name     # to the nearest
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red = torch.tensor([255.0, 0, 0]).view(3, 1, 1)
    assert (data.read_image(tmp_path / "print.jpg") - red).abs().max() <= 8     # JPEG is lossy


def test_pillow_alone_reads_the_same_pixels(tmp_path, monkeypatch):
    colours = Image.fromarray(noise(9, 7, 3).numpy()).resize((70, 90))
    for mode, exif in itertools.product(("RGB", "L", "CMYK"), (1, 3, 6, 8)):      # turned
        head = struct.pack("<6s2sHIHHHIII", b"Exif", b"II", 42, 8, 1, 0x0112, 3, 1, exif, 0)
        colours.convert(mode).save(tmp_path / f"{mode}{exif}.jpg", exif=head)
    paths = sorted(tmp_path.iterdir())
    (tmp_path / "trailing.jpg").write_bytes(paths[0].read_bytes() + b"more")
    either = [data.read_image(path) for path in [*paths, tmp_path / "trailing.jpg"]]
    monkeypatch.setattr(data, "decode_jpeg", None)
    pillow = [data.read_image(path) for path in [*paths, tmp_path / "trailing.jpg"]]
    assert all(torch.equal(a, b) for a, b in zip(either, pillow, strict=True))
    assert {tuple(x.shape) for x in either} == {(3, 90, 70), (3, 70, 90)}


def test_read_image_names_the_file_that_cannot_be_decoded(tmp_path, monkeypatch):
    # Pillow rewrites the EXIF of a picture that it turns, and stumbles if the width is a text.
    exif = struct.pack("<6s2sHIHHHIIHHI4sI", b"Exif", b"II", 42, 8, 2,
                       0x0112, 3, 1, 6, 0x0100, 2, 4, b"wide", 0)
    Image.fromarray(noise(40, 40, 3).numpy()).save(tmp_path / "exif.jpg", exif=exif)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "exif.jpg").read_bytes()[:1000])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("not an image\n" * 100)
    monkeypatch.setattr(data, "decode_jpeg", None)                   # which does not mind the EXIF
    for name in ("cut.jpg", "empty.png", "text.jpg", "exif.jpg"):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            data.read_image(tmp_path / name)
    monkeypatch.undo()
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            data.read_image(tmp_path / name)


def test_folder_of_train_and_val_has_a_class_per_folder(tmp_path):
    def open_it(**options):
        return data.open_data(str(tmp_path), SETS["folder"], (8, 8), **options)

    names = ["cat/0.png", "cat/1.JPEG", "dog/0.webp", "emu/old/0.png"]
    write_images(tmp_path, *(f"{part}/{name}" for part in ("train", "val") for name in names))
    write_images(tmp_path / "train", ".thumbnails/0.png", "cat/._0.png", ".0.png")
    (tmp_path / "train" / "notes.txt").touch()
    train, test = open_it()
    assert train.paths == [str(tmp_path / "train" / name) for name in names]
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 2]
    few, _ = open_it(train_images=3)                     # not the first three
    assert len(few) == len(few.labels) == 3
    assert all(f"/{few.classes[i]}/" in path for i, path in zip(few.labels, few.paths))
    write_images(tmp_path, "val/bird/0.png")             # its numbers would mean something else
    assert open_it()[0].labels is not None and open_it()[1].labels is None
    write_images(tmp_path, "train/0.png")                # an image without a class
    assert len(open_it()[0]) == 5 and open_it()[0].labels is None


def test_folder_plain_is_a_resize_and_a_centre_crop(tmp_path):
    write_images(tmp_path, "0.png", height=60, width=80)
    image = next(image_folder(tmp_path, size=(16, 28)).plain(torch.tensor([0])))[0]
    small = TF.resize(Image.open(tmp_path / "0.png"), 32, InterpolationMode.BICUBIC)     # Pillow's
    pixels = TF.pil_to_tensor(TF.center_crop(small, (16, 28)))
    expected = TF.normalize(pixels / 255, data.IMAGENET_MEAN, data.IMAGENET_STD)
    assert (image - expected).abs().max() < 1.5 / 255 / 0.224                # one grey level


def test_folder_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    write_images(tmp_path, *(f"{i}.png" for i in range(8)), height=12)
    shuffled = torch.randperm(8, generator=torch.manual_seed(0)).view(2, 4)

    def crops(order=shuffled, epoch=3, **options):
        images = torch.cat(list(image_folder(tmp_path, **options).batches(order, epoch)))
        return images[order.flatten().argsort()]

    assert torch.equal(crops(), crops(workers=2))
    assert torch.equal(crops(), crops(order=shuffled.flip(0, 1)))
    for other in (crops(epoch=4), crops(seed=1)):
        assert (other != crops()).flatten(1).any(dim=1).all()
    # A crop of everything, at its own size, is the file itself.
    whole = crops(row=SETS["folder"] | dict(crop_scale=1.0), size=(12, 12))
    files = torch.stack([noise(12, 12, 3, seed=i) for i in range(8)])
    assert torch.equal(whole, files.permute(0, 3, 1, 2))


def folder_of_120(root, *broken, **options):
    write_images(root, *(f"{i:03}.png" for i in range(120)))
    for i in broken:
        (root / f"{i:03}.png").write_bytes(b"")
    return image_folder(root, **options), torch.arange(120).view(4, 30)


def test_a_broken_image_is_replaced_by_the_next_and_named_once(tmp_path, capsys):
    source, order = folder_of_120(tmp_path, 119)         # after the last comes the first
    assert [len(list(source.batches(order, epoch))) for epoch in range(2)] == [4, 4]
    assert source.broken == {str(tmp_path / "119.png")}
    first, second, last = next(source.plain(torch.tensor([0, 1, 119])))
    assert torch.equal(last, first) and not torch.equal(last, second)
    line, = capsys.readouterr().out.splitlines()
    assert "119.png" in line


@pytest.mark.parametrize("count, workers", [(3, 0), (3, 2), (120, 0)])
def test_too_many_broken_images_are_an_error(tmp_path, count, workers):
    source, order = folder_of_120(tmp_path, *range(count), workers=workers)
    assert len(source[0, 0][1]) == 2                     # past 1 % it looks for no further one
    with pytest.raises(InputError, match="of 120 images .*000.png"):
        list(source.batches(order, 0))


def test_shapes_are_balanced_and_the_same_for_a_seed():
    (images, labels, _), again, other = (data.draw_shapes(500, seed) for seed in (1, 1, 2))
    assert images.dtype == torch.uint8 and images.shape == (500, 3, 32, 32)
    assert labels.bincount().tolist() == [50] * 10
    assert torch.equal(images, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(images, other[0]) and not torch.equal(labels, other[1])


def test_pixels_tell_little_about_shapes():
    sources = data.open_data("shapes", SETS["shapes"], (32, 32), train_images=10_000)
    bank, test = (torch.cat(list(s.plain(torch.arange(len(s))))).flatten(1) for s in sources)
    assert (len(bank), len(test)) == (10_000, 2_000)
    accuracy = dmae.knn_top1(bank, sources[0].labels, test, sources[1].labels)
    assert 0.12 < accuracy < 0.40                        # chance is 0.10, with a deviation of 0.007


def test_fashion_mnist_is_read_from_its_files_and_padded(tmp_path):
    raw, sets = tmp_path / "FashionMNIST" / "raw", []
    raw.mkdir(parents=True)
    for part, count in (("train", 12), ("t10k", 5)):
        sets.append((noise(count, 28, 28, seed=count), noise(count, seed=count) % 10))
        for kind, tensor in zip(("images-idx3", "labels-idx1"), sets[-1]):
            head = struct.pack(f">{1 + tensor.ndim}I", 0x800 + tensor.ndim, *tensor.shape)
            (raw / f"{part}-{kind}-ubyte").write_bytes(head + tensor.numpy().tobytes())
    sources = data.open_data("fashion-mnist", SETS["fashion-mnist"], (32, 32), tmp_path, 7)
    for source, (images, labels), count in zip(sources, sets, (7, 5)):
        padded = np.pad(images[:count, None].numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
        assert np.array_equal(source.images.numpy(), padded)
        assert torch.equal(source.labels, labels[:count].long())


def test_open_data_says_what_is_wrong_in_one_line(tmp_path, monkeypatch):
    def no_network(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    write_images(tmp_path, "two/0.png", "two/1.png")
    for name in ("empty", "texts"):
        (tmp_path / name).mkdir()
    (tmp_path / "texts" / "notes.txt").touch()
    two = str(tmp_path / "two")
    for name, train_images, message in (
            ("fashion-mnist", None, "no network.* FashionMNIST/raw/.*--data-dir"),
            ("cifar10", None, "no network.* cifar-10-batches-py/ .*--data-dir"),
            ("cifar100", None, "no network.* cifar-100-python/ .*--data-dir"),
            ("cifar11", None, "cifar11: .*shapes, fashion-mnist, cifar10, cifar100"),
            (str(tmp_path / "empty"), None, "empty: no images"),
            (str(tmp_path / "texts"), None, "texts: no images"),
            (two, 0, "--train-images 0: .*1 to 2"), (two, 3, "--train-images 3: .*1 to 2")):
        with pytest.raises(InputError, match=f"^[^\n]*{message}[^\n]*$"):
            data.open_data(name, SETS["folder"], (8, 8), tmp_path / "sets", train_images)


# The sets as they are published, in miniature. Each function writes a set's lists into its folder
# and returns what they say: the images' paths around their names, the class number of each name,
# in order, for training and for testing, and what these numbers stand for.


def flowers(root):
    mat = pytest.importorskip("scipy.io")
    labels, parts = [3, 1, 102, 2, 1, 77], dict(trnid=[5, 2], valid=[1, 6], tstid=[4, 3])
    mat.savemat(root / "imagelabels.mat", {"labels": np.uint8([labels])})
    mat.savemat(root / "setid.mat", {part: np.uint16([ids]) for part, ids in parts.items()})
    return ("jpg/image_0000{}.jpg", {5: 0, 2: 0, 1: 2, 6: 76}, {4: 1, 3: 101},
            {0: "pink primrose", 2: "canterbury bells", 101: "blackberry lily"})


def pets(root):
    lists = {"trainval": "Egyptian_Mau_1 3 1 2\nAbyssinian_10 1 1 1\npug_7 2 2 1\n",
             "test": "pug_2 2 2 1\nEgyptian_Mau_20 3 1 2\nAbyssinian_3 1 1 1\n"}
    for part, lines in lists.items():
        (root / "annotations" / f"{part}.txt").write_text(lines)
    return ("images/{}.jpg", {"Egyptian_Mau_1": 2, "Abyssinian_10": 0, "pug_7": 1},
            {"pug_2": 1, "Egyptian_Mau_20": 2, "Abyssinian_3": 0},
            {0: "Abyssinian", 1: "Pug", 2: "Egyptian Mau"})


def aircraft(root):
    lists = {"variants": "707-320\nBoeing 717\nF/A-18\n",
             "images_variant_trainval": "034 F/A-18\n102 Boeing 717\n005 707-320\n",
             "images_variant_test": "062 Boeing 717\n048 707-320\n"}
    for part, lines in lists.items():
        (root / "data" / f"{part}.txt").write_text(lines)
    return ("data/images/{}.jpg", {"034": 2, "102": 1, "005": 0}, {"062": 1, "048": 0},
            {0: "707-320", 1: "Boeing 717", 2: "F/A-18"})


def cars(root):
    mat = pytest.importorskip("scipy.io")
    names = ["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Ram C/V Cargo Van 2012"]
    mat.savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array([names], object)})
    fields = [("bbox_x1", np.uint16), ("class", np.uint8), ("fname", object)]
    for path, numbers in (("devkit/cars_train_annos.mat", [3, 1, 3]),
                          ("cars_test_annos_withlabels.mat", [2, 3])):
        rows = [(39, n, f"0000{i}.jpg") for i, n in enumerate(numbers, 1)]
        mat.savemat(root / path, {"annotations": np.array([rows], fields)})
    return ("cars_{}.jpg", {"train/00001": 2, "train/00002": 0, "train/00003": 2},
            {"test/00001": 1, "test/00002": 2}, dict(enumerate(names)))


def inat18(root):
    names = {7: "Abies alba", 2: "Zea mays", 5000: "Bufo bufo"}         # in no order, with gaps
    for part, images in (("train", {31: (7, "b"), 4: (2, "c"), 12: (5000, "a")}),
                         ("val", {90: (5000, "e"), 80: (7, "d")})):
        (root / f"{part}2018.json").write_text(json.dumps({
            "images": [{"id": image, "file_name": f"train_val2018/Plantae/{kind}/{name}.jpg"}
                       for image, (kind, name) in images.items()],
            "annotations": [{"id": n, "image_id": image, "category_id": images[image][0]}
                            for n, image in enumerate(sorted(images))],
            "categories": [{"id": kind, "name": name} for kind, name in names.items()]}))
    return ("train_val2018/Plantae/{}.jpg", {"7/b": 1, "2/c": 0, "5000/a": 2},
            {"5000/e": 2, "7/d": 1}, {0: "Zea mays", 1: "Abies alba", 2: "Bufo bufo"})


TRANSFER = {     # what writes the lists, the set's folder and one in it, files a refusal must name
    "flowers": (flowers, "flowers-102", "jpg", "jpg/,imagelabels.mat,setid.mat"),
    "pets": (pets, "oxford-iiit-pet", "annotations", "images,annotations"),
    "aircraft": (aircraft, "fgvc-aircraft-2013b", "data", ""),
    "cars": (cars, "stanford_cars", "devkit", "cars_train,cars_test,devkit.*_annos_withlabels.mat"),
    "inat18": (inat18, "inat18", "", "train2018.json,val2018.json,train_val2018")}


def write_set(name, root):
    """Its folder, now with lists and images, and what the lists say."""
    write, folder, inner, _ = TRANSFER[name]
    (root / folder / inner).mkdir(parents=True)
    path, train, test, names = write(root / folder)
    write_images(root / folder, *(path.format(image) for image in [*train, *test]))
    return root / folder, path, train, test, names


@pytest.fixture
def asked(monkeypatch):
    """What was asked of the network, which is not there; nor are the published checksums."""
    def no_network(request, *args, **options):
        requests.append(request)
        raise urllib.error.URLError("no network")

    requests = []
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    for source in (torchvision.datasets.flowers102, torchvision.datasets.cifar):
        monkeypatch.setattr(source, "check_integrity", lambda path, md5: os.path.exists(path))
    return requests


def refused(name, words, data_dir):
    with pytest.raises(InputError, match=rf"\A--data {name}: [^\n]*{words}[^\n]*\Z"):
        data.open_data(name, SETS[name], (32, 32), data_dir)


@pytest.mark.parametrize("name", TRANSFER)
def test_transfer_sets_are_read_as_they_are_published(name, tmp_path, asked):
    folder, path, *parts, names = write_set(name, tmp_path)
    sources = data.open_data(name, SETS[name], (16, 24), tmp_path)
    for source, part in zip(sources, parts, strict=True):
        assert source.paths == [str(folder / path.format(image)) for image in part]
        torch.testing.assert_close(source.labels, torch.tensor(list(part.values())))
        assert {i: source.classes[i] for i in names} == names
        assert len(source.classes) == (102 if name == "flowers" else 3)
        assert next(source.plain(torch.tensor([0]))).shape == (1, 3, 16, 24) and not source.broken
    assert not asked


def test_transfer_sets_have_the_papers_sizes():
    assert {name: (train, test) for name, (train, test, _) in data.PHOTOS.items()} == {
        "flowers": (2040, 6149), "pets": (3680, 3669), "aircraft": (6667, 3333),
        "cars": (8144, 8041), "inat18": (437_513, 24_426)}


@pytest.mark.parametrize("name", TRANSFER)
def test_missing_transfer_sets_name_their_files(name, tmp_path, monkeypatch, asked):
    _, folder, _, files = TRANSFER[name]
    if name in ("flowers", "cars"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, "scipy", None)
            refused(name, "pip install scipy", tmp_path)
        assert not asked
        pytest.importorskip("scipy.io")
    refused(name, f"{folder}/.*{files}.*--data-dir", tmp_path)
    assert bool(asked) == (name not in ("cars", "inat18"))       # these cannot be downloaded


@pytest.mark.parametrize("name, path, old, new", [                        # regular expressions
    ("cars", "devkit/cars_meta.mat", "(?s).+", ""), ("pets", "annotations/test.txt", " 1\n", "\n"),
    ("cars", "devkit/cars_train_annos.mat", r"(?s).{50}\Z", ""),
    ("aircraft", "data/variants.txt", "717", "737"), ("inat18", "val2018.json", "}$", ""),
    ("inat18", "train2018.json", '"image_id": 12', '"image_id": 13'),
    ("inat18", "val2018.json", '"id": 5000', '"id": 5001')])
def test_damaged_lists_are_one_line(name, path, old, new, tmp_path, asked):
    file = write_set(name, tmp_path)[0] / path
    damaged, count = re.subn(old.encode(), new.encode(), file.read_bytes())
    assert count
    file.write_bytes(damaged)
    refused(name, "--data-dir", tmp_path)


def test_an_archive_that_is_none_is_one_line(tmp_path, asked):
    (tmp_path / "fgvc-aircraft-2013b.tar.gz").write_text("<html>Not found</html>")
    refused("aircraft", "--data-dir", tmp_path)


@pytest.mark.parametrize("name, folder, parts, meta, fine", [
    ("cifar10", "cifar-10-batches-py", [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]],
     "batches.meta", ""), ("cifar100", "cifar-100-python", [["train"], ["test"]], "meta", "fine_")])
def test_cifar_is_read_from_its_files(name, folder, parts, meta, fine, tmp_path, asked):
    def write(file, **content):
        (tmp_path / folder / file).write_bytes(pickle.dumps(content))

    (tmp_path / folder).mkdir()
    write(meta, **{"coarse_label_names": ["d"], f"{fine}label_names": ["a", "b", "c"]})
    sets = [(noise(2 * len(part), 3, 32, 32), noise(2 * len(part)) % 3) for part in parts]
    for part, (images, labels) in zip(parts, sets):
        for file, two, kinds in zip(part, images.split(2), labels.split(2), strict=True):
            write(file, data=two.flatten(1).numpy(),                 # all red, all green, all blue
                  **{"coarse_labels": [0, 0], f"{fine}labels": kinds.tolist()})
    sources = data.open_data(name, SETS[name], (32, 32), tmp_path)
    for source, (images, labels) in zip(sources, sets, strict=True):
        assert torch.equal(source.images, images) and source.classes == ["a", "b", "c"]
        torch.testing.assert_close(source.labels, labels.long())
        assert next(source.plain(torch.tensor([0]))).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_takes_the_label_of_its_replacement(tmp_path, workers):
    for i in range(300):                                       # an image's colour is its class
        path = tmp_path / "ab"[i // 150] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 200 * (i // 150)).save(path)
        if i in (148, 149, 299):                               # 1 %; after the last comes the first
            path.write_bytes(b"")
    source = image_folder(tmp_path, workers=workers)
    order = torch.arange(300).view(6, 50)                      # 148 is read before 149
    for indices, images in zip(order, source.batches(order, 0), strict=True):
        assert torch.equal(source.labels[indices], (images[:, 0, 4, 4] > 100).long())
    assert source.labels.tolist() == [0] * 148 + [1] * 151 + [0] and len(source.broken) == 3


def test_mix_gives_close_numbers_unrelated_seeds():
    keys = [key for n in (1, 2, 3) for key in itertools.product(range(10), repeat=n)]
    seeds = [data.mix(*key) for key in keys]
    assert len(set(seeds)) == len(keys) and all(0 <= seed < 2**63 for seed in seeds)
    assert 30 < np.mean([(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]) < 33
    assert data.mix(1234567) == 6457827717110365317 >> 1     # SplitMix64's published first number


# ========================================================================================= training


def test_learning_rate_at_the_joints():
    def rate(step):
        return learning_rate(step, total=100, warmup=20, peak=2.4e-3)
    assert [rate(0), rate(10), rate(20)] == pytest.approx([0, 1.2e-3, 2.4e-3])
    assert rate(60) == pytest.approx(1.2e-3)                              # half-way down the cosine
    assert 0 < rate(99) < 2.4e-3 * 0.001
    assert learning_rate(0, total=10, warmup=0, peak=1) == 1


def test_groups_partition_the_parameters_and_spare_biases_and_norms():
    model = DMAE(MAE(ViT(depth=1)), ViT(width=768, depth=1))
    decayed, free = parameter_groups(model, 0.05)
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    block = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert {names[id(p)] for p in decayed["params"]} == {
        "mixers.1:1", "student.mask_token", "student.encoder.cls_token",
        "student.encoder.patch_embed.proj.weight", "student.decoder_embed.weight",
        "student.decoder_pred.weight"} | {
        f"student.{part}.0.{n}" for part in ("encoder.blocks", "decoder_blocks") for n in block}
    both = [id(p) for p in decayed["params"] + free["params"]]
    assert sorted(both) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_knn_against_a_loop():
    torch.manual_seed(0)
    bank, test = torch.randn(60, 5), torch.randn(40, 5)
    labels, answers = torch.randint(4, (60,)), torch.randint(4, (40,))
    right = 0
    for feature, answer in zip(test, answers):
        similarity = [torch.cosine_similarity(feature, other, dim=0).item() for other in bank]
        votes = [0.0] * 4
        for i in sorted(range(60), key=lambda i: -similarity[i])[:20]:
            votes[labels[i]] += math.exp(similarity[i] / 0.07)
        right += votes.index(max(votes)) == answer
    assert knn_top1(bank, labels, test, answers) == pytest.approx(right / 40)
    assert knn_top1(bank * 3, labels, bank, labels, k=1) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 + 16 images of 16 pixels in two classes, each a gradient one way or the other."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("val", 8)):
        for label in ("down", "right"):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = torch.arange(16.0).expand(3, 16, 16) * 12 + torch.rand(3, 1, 1) * 60
                image = image.mT if label == "down" else image
                image = (image + torch.rand(3, 16, 16) * 10).byte().contiguous()
                to_pil_image(image).save(root / split / label / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of a ViT 24 wide, 3 deep, 3 heads, grid 4 x 4, as this project writes it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_student(path, MAE(ViT(32, 8, 3, 24, 3, 3), 16, 1, 2))
    return str(path)


def arguments(folder, teacher, *more):
    return ["--data", folder, "--teacher", teacher, "--image-size", "16", "--patch-size", "4",
            "--student", "nano", "--epochs", "2", "--batch-size", "8", "--blr", "0.03",
            "--workers", "0", *map(str, more)]


def weights(out):
    content = torch.load(Path(out) / "student.pth", weights_only=True)
    parts = ("model", "decoder", "mixers")
    return {f"{part}.{n}": t for part in parts for n, t in content[part].items()}


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def same_bits(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(log):
    times = ("images_per_second", "data_wait", "minutes")
    return [{k: v for k, v in line.items() if k not in times} for line in log]


def same_function(a, b):
    """Weights whose gradient is zero but for rounding (key biases) may differ: compare features."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = [load_vit(Path(out) / "student.pth").encode(images) for out in (a, b)]
    return torch.allclose(*found, atol=2e-3)


@pytest.fixture(scope="module")
def run(folder, teacher, tmp_path_factory):
    """A finished run to compare others with."""
    return main(arguments(folder, teacher, "--out", tmp_path_factory.mktemp("runs") / "plain"))


def test_a_run_leaves_what_it_should(run, teacher):
    assert {p.name for p in run.iterdir()} == set(dmae.RUN_FILES)
    log = log_of(run)
    assert [line["epoch"] for line in log] == [0, 1, 2] and log[-1]["step"] == 10
    assert {"knn_pixels", "knn"} < set(log[0]) and log[2]["mae"] < log[1]["mae"]
    assert {"loss", "mae", "attn", "lr", "images_per_second", "data_wait", "knn"} < set(log[1])
    assert log[1]["loss"] == pytest.approx(log[1]["mae"] + log[1]["attn"], rel=1e-5)
    content = torch.load(run / "student.pth", weights_only=True)
    assert list(content["mixers"]) == ["4:3"] and content["mixers"]["4:3"].shape == (3, 4)
    assert content["config"]["image_size"] == [16, 16] and content["config"]["heads"] == 4
    student = load_vit(run / "student.pth")
    assert student.grid == (4, 4) and student.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 17, 64)
    checkpoint = torch.load(run / "checkpoint.pth", weights_only=True)
    assert not any("teacher" in name for name in checkpoint["model"])
    saved = json.loads((run / "config.json").read_text())
    assert saved["teacher_sha256"] == hashlib.sha256(Path(teacher).read_bytes()).hexdigest()


def test_pictures_show_what_they_say(run):
    image = read_image(run / "reconstruction.png").float()
    side = 96 + 2                                             # of a tile, with its frame
    assert image.shape[1:] == (8 * side + 2, 4 * side + 2)
    tiles = image[:, 2:, 2:].unfold(1, 96, side).unfold(2, 96, side)         # 3 rows columns 96 96
    patches = tiles.unfold(3, 24, 24).unfold(4, 24, 24).flatten(5, 6).flatten(3, 4)  # ... n pixels
    original, visible, _, both = patches.permute(2, 1, 3, 0, 4).flatten(3)   # rows n numbers each
    kept = (visible == original).all(-1)
    assert (kept.sum(-1) == 4).all() and (both[kept] == original[kept]).all()
    assert visible[~kept].std(dim=-1).max() < 45          # one colour: the mean, in three channels
    assert (both[~kept] != original[~kept]).any(-1).all()
    attention = read_image(run / "attention.png")
    assert attention.shape[1:] == (2 * 4 * side + 2, (1 + 4) * side + 2)     # student has 4 heads
    assert (attention[:, 2 + side:2 + side + 96, 2 + 4 * side:2 + 4 * side + 96] == 255).all()


def test_same_seed_same_bits_other_seed_other_bits(run, folder, teacher, tmp_path):
    again = main(arguments(folder, teacher, "--out", tmp_path / "a", "--workers", 2))
    assert same_bits(run, again) and without_times(log_of(run)) == without_times(log_of(again))
    other = main(arguments(folder, teacher, "--out", tmp_path / "b", "--seed", 1))
    assert not same_bits(run, other)


def test_alpha_zero_on_the_command_line_is_teacher_none(folder, teacher, tmp_path):
    distilled = main(arguments(folder, teacher, "--alpha", 0, "--out", tmp_path / "a"))
    plain = main(arguments(folder, "none", "--out", tmp_path / "b"))
    a, b = weights(distilled), weights(plain)
    assert all(torch.equal(a[name], b[name]) for name in b) and set(a) - set(b) == {"mixers.4:3"}
    assert log_of(distilled)[1]["attn"] > 0 and "attn" not in log_of(plain)[1]


def test_micro_batches_do_the_same(run, folder, teacher, tmp_path):
    pieces = main(arguments(folder, teacher, "--micro-batch", 3, "--out", tmp_path / "a"))
    assert same_function(run, pieces) and not same_bits(run, pieces)
    assert log_of(pieces)[-1]["loss"] == pytest.approx(log_of(run)[-1]["loss"], rel=1e-3)


def test_interrupted_and_resumed_ends_in_the_same_bits(run, folder, teacher, tmp_path, monkeypatch,
                                                       capsys):
    def stop(*args, **kwargs):
        stop.steps += 1
        if stop.steps == 8:                                    # in the middle of the second epoch
            raise KeyboardInterrupt
        return train_step(*args, **kwargs)
    stop.steps = 0
    monkeypatch.setattr(dmae, "train_step", stop)
    with pytest.raises(SystemExit) as end:
        main(arguments(folder, teacher, "--out", tmp_path / "a"))
    assert end.value.code == 130
    assert capsys.readouterr().err.strip().endswith(f"--resume --out {tmp_path / 'a'}")
    monkeypatch.undo()
    resumed = main(["--resume", "--out", str(tmp_path / "a")])                  # no other flag
    assert same_bits(run, resumed) and without_times(log_of(run)) == without_times(log_of(resumed))


def test_resume_refuses_other_settings_and_another_teacher(folder, teacher, tmp_path, capsys):
    copy = tmp_path / "teacher.pth"
    copy.write_bytes(Path(teacher).read_bytes())
    out = main(arguments(folder, str(copy), "--epochs", 1, "--out", tmp_path / "a"))
    before = {p: p.read_bytes() for p in out.iterdir()}
    fails(["--resume", "--out", out, "--alpha", 2, "--mask-ratio", 0.5], "alpha was 1.0, now 2.0; "
          "mask_ratio was 0.75, now 0.5", capsys)
    torch.manual_seed(2)
    save_student(copy, MAE(ViT(32, 8, 3, 24, 3, 3), 16, 1, 2))
    fails(["--resume", "--out", out], "the content of .* is another", capsys)
    for other in "none", f"{copy}:3":
        fails(["--resume", "--out", out, "--teacher", other], "teacher was", capsys)
    copy.unlink()
    fails(["--resume", "--out", out], "is gone from .*--teacher", capsys)
    fails(["--resume", "--out", tmp_path], "config.json", capsys)
    fails(["--resume"], "--out", capsys)
    assert {p: p.read_bytes() for p in out.iterdir()} == before
    assert main(["--resume", "--out", str(out), "--teacher", teacher]) == out     # it only moved


def test_resume_completes_what_a_late_stop_left_out(folder, tmp_path):
    out = main(arguments(folder, "none", "--epochs", 1, "--out", tmp_path / "a"))
    before = weights(out)
    for name in ("student.pth", "attention.png"):
        (out / name).unlink()
    main(["--resume", "--out", str(out)])
    assert {p.name for p in out.iterdir()} == set(dmae.RUN_FILES) and len(log_of(out)) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())


def test_resume_refuses_other_images_and_damaged_files(folder, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(Path(folder) / "train", images)
    out = main(arguments(str(images), "none", "--epochs", 1, "--out", tmp_path / "a"))
    shutil.copy(images / "down" / "0.png", images / "down" / "new.png")
    fails(["--resume", "--out", out], "had 40 training images, now there are 41", capsys)
    for name, content in (("log.jsonl", b""), ("log.jsonl", b"{"), ("checkpoint.pth", b"x"),
                          ("checkpoint.pth", (out / "student.pth").read_bytes()),
                          ("config.json", b"{}"), ("config.json", b"")):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(content)
        fails(["--resume", "--out", out], f"{name} .*--overwrite|{name} is damaged", capsys)
        assert (out / name).read_bytes() == content
        (out / name).write_bytes(whole)


def test_what_is_not_this_runs_is_not_overwritten(folder, tmp_path, capsys):
    """A run that happens to lie where --teacher self would put its teacher; photographs."""
    out = main(arguments(folder, "none", "--epochs", 0, "--out", tmp_path / "a" / "teacher"))
    before = (out / "student.pth").read_bytes()
    fails(arguments(folder, "self", "--out", tmp_path / "a"), "holds a run .teacher/config", capsys)
    assert (out / "student.pth").read_bytes() == before
    inside = Path(folder) / "train" / "runs"
    fails(arguments(folder, "none", "--out", inside), "inside the data", capsys)
    assert not inside.exists()


def test_teacher_self_is_an_earlier_run_without_teacher(tmp_path):
    more = ["--train-images", "64", "--epochs", "1", "--seed", "3"]
    both, first, second = (tmp_path / name for name in ("both", "first", "second"))
    main([*more, "--out", str(both)])
    main([*more, "--teacher", "none", "--student", "micro", "--out", str(first)])
    assert same_bits(both / "teacher", first)
    main([*more, "--teacher", str(first / "student.pth"), "--out", str(second)])
    assert same_bits(both, second)


def test_a_loss_that_is_not_finite_stops_the_run(folder, teacher, tmp_path, capsys):
    out = tmp_path / "a"
    flags = ["--epochs", 20, "--blr", 1e18, "--warmup-epochs", 1, "--out", out]
    fails(arguments(folder, teacher, *flags),
          r"(mae|attn|weights).* not finite in steps \d+ to \d+, at learning rate .*--blr", capsys)
    if (out / "checkpoint.pth").exists():
        saved = torch.load(out / "checkpoint.pth", weights_only=True)
        assert all(tensor.isfinite().all() for tensor in saved["model"].values())


# ===================================================================================== command line


def fails(argv, words, capsys, program=dmae):
    """One line on stderr with `words`, exit status 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program.main([str(x) for x in argv])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{program.make_parser().prog}: error: ") and re.search(words, error)


# Every flag, with what must be seen of it afterwards: in config.json, log.jsonl or student.pth.
def config(out):
    return json.loads((out / "config.json").read_text())["settings"]


FLAGS = {
    "--train-images 24": lambda out: log_of(out)[1]["step"] == 3,
    "--student micro": lambda out: load_vit(out / "student.pth").width == 96,
    "--image-size 24 --patch-size 6": lambda out: load_vit(out / "student.pth").grid == (4, 4),
    "--crop-scale 1": lambda out: not same_bits(out, RUN[0]),
    "--mask-ratio 0.5": lambda out: decoder_config(out)["mask_ratio"] == 0.5,
    "--no-norm-pix": lambda out: not decoder_config(out)["norm_pix"]
        and log_of(out)[1]["mae"] != log_of(RUN[0])[1]["mae"],
    "--layers 1:2,4:3": lambda out: {"mixers.1:2", "mixers.4:3"} < weights(out).keys(),
    "--match probs": lambda out: weights(out)["mixers.4:3"].shape == (3, 4)
        and log_of(out)[1]["attn"] != log_of(RUN[0])[1]["attn"],
    "--match hidden": lambda out: weights(out)["mixers.4:3"].shape == (24, 64),
    "--alpha 3": lambda out: log_of(out)[1]["loss"] == pytest.approx(
        log_of(out)[1]["mae"] + 3 * log_of(out)[1]["attn"], rel=1e-5),
    "--decoupled": lambda out: "mixers.5:3" in weights(out) and "model.blocks.4.norm1.weight"
        not in weights(out) and decoder_config(out)["decode_after"] == 2,
    "--decoder-width 24 --decoder-depth 2 --decoder-heads 3": lambda out:
        weights(out)["decoder.decoder_blocks.1.attn.qkv.weight"].shape == (72, 24),
    "--warmup-epochs 1": lambda out: log_of(out)[1]["lr"] == pytest.approx(0.8 * 0.03 * 8 / 256),
    "--epochs 0": lambda out: len(log_of(out)) == 1 and untrained(out),
    "--batch-size 5": lambda out: log_of(out)[1]["step"] == 8,
    "--micro-batch 4": lambda out: config(out)["micro_batch"] == 4,
    "--blr 0": lambda out: untrained(out),
    "--weight-decay 0.5": lambda out: not same_bits(out, RUN[0]),
    "--seed 7": lambda out: not same_bits(out, RUN[0]),
    "--workers 1": lambda out: same_bits(out, RUN[0]),
    "--device cpu": lambda out: same_bits(out, RUN[0]),
    "--amp bf16": lambda out: not same_bits(out, RUN[0]) and log_of(out)[2]["mae"] ==
        pytest.approx(log_of(RUN[0])[2]["mae"], rel=0.02),
    "--amp off --no-compile": lambda out: same_bits(out, RUN[0]),
    "--compile": lambda out: same_function(out, RUN[0]),
    "--data-dir elsewhere": lambda out: same_bits(out, RUN[0]),
    "--overwrite": lambda out: same_bits(out, RUN[0]),
}
RUN = []                              # the finished run, once there is one


def decoder_config(out):
    return torch.load(out / "student.pth", weights_only=True)["config"]


def untrained(out):
    """The weights are those of a fresh model of the same seed."""
    fresh = dmae.new_model(config(out), teacher=None)
    return all(torch.equal(p, weights(out)[f"model.{n}"])
               for n, p in fresh.encoder.state_dict().items())


@pytest.mark.parametrize("flags", FLAGS)
def test_flag(flags, run, folder, teacher, tmp_path):
    RUN[:] = [run]
    out = main(arguments(folder, teacher, "--out", tmp_path / "a", *flags.split()))
    assert FLAGS[flags](out)


def test_no_flag_is_left_untested_and_each_has_its_help():
    actions = dmae.make_parser()._actions
    tested = set(" ".join(FLAGS).split()) | {"--help", "--teacher", "--data", "--out", "--resume"}
    assert {action.option_strings[0] for action in actions} - {"-h"} <= tested
    assert all(len(action.help) > 15 for action in actions)


def test_fresh_numbered_folders_and_overwrite(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [main(arguments(folder, "none", "--epochs", 0)) for _ in range(2)]
    assert [str(run) for run in runs] == ["runs/0001", "runs/0002"]
    (runs[0] / "mine.txt").write_text("not ours")
    fails(arguments(folder, "none", "--out", runs[0]), "--overwrite", capsys)
    main(arguments(folder, "none", "--epochs", 0, "--out", runs[0], "--overwrite"))
    assert (runs[0] / "mine.txt").read_text() == "not ours"
    fails(arguments(folder, str(runs[0] / "student.pth"), "--out", runs[0], "--overwrite"),
          "would delete .*student.pth", capsys)
    assert (runs[0] / "student.pth").exists()


def test_a_real_teacher_on_shapes_is_sized_for_a_cpu(tmp_path):
    """--teacher FILE alone, with a teacher as wide as MAE-Base: the run is short by default."""
    path, settings, longer = tmp_path / "base.pth", {}, {}
    torch.save({"model": ViT(width=768, depth=1).state_dict()}, path)
    assert resolve(dict(teacher=str(path)), settings).config["heads"] == 12
    assert settings["student"] == "nano"
    assert settings["train_images"] * settings["epochs"] <= 20_000
    resolve(dict(teacher=f"{path}:12", epochs=9), longer)
    assert longer["epochs"] == 9


def bad(words, *flags):
    return pytest.param(flags, words, id=" ".join(flags)[:40] or "none")


@pytest.mark.parametrize("flags, words", [
    bad("mae_pretrain_vit_base.pth", "--teacher", "no/such/file.pth"),
    bad("is a folder", "--teacher", "."),
    bad("neither a folder nor one of", "--data", "no/such/folder"),
    bad("no images", "--data", "{empty}"),
    bad("multiple of patch size", "--image-size", "30"),
    bad("multiple of patch size", "--patch-size", "0"),
    bad("visible", "--mask-ratio", "0.99"), bad("hidden", "--mask-ratio", "0"),
    bad("mask ratio nan", "--mask-ratio", "nan"), bad("invalid float", "--mask-ratio", "most"),
    bad("1 to 4", "--layers", "5:3"), bad("pairs", "--layers", "4"),
    bad("twice", "--layers", "1:1,1:1"),
    bad("not together", "--layers", "4:3", "--decoupled"),
    bad("not together", "--match", "hidden", "--decoupled"),
    bad("not with --teacher none", "--teacher", "none", "--decoupled"),
    bad("not with --teacher none", "--teacher", "none", "--match", "probs"),
    bad("out is empty", "--out", ""), bad("name too long", "--out", "x" * 300),
    bad("from 0", "--seed", "9" * 20), bad("device", "--device", "meta"),
    bad("more than the 40", "--batch-size", "41"), bad("from 1", "--batch-size", "0"),
    bad("from 0", "--epochs", "-1"), bad("invalid int", "--epochs", "1.5"),
    bad("from 0", "--blr", "nan"), bad("from 0", "--weight-decay", "-1"),
    bad("from 0", "--seed", "-1"),
    bad("from 0", "--alpha", "inf"), bad("more than the 2 epochs", "--warmup-epochs", "3"),
    bad("crop-scale", "--crop-scale", "0"), bad("the set has", "--train-images", "41"),
    bad("divide", "--decoder-heads", "5"), bad("multiple of 4", "--decoder-width", "6"),
    bad("--device", "--device", "toaster"), bad("CUDA", "--amp", "fp16"),
    bad("choose from", "--student", "giant"), bad("choose from", "--match", "logits"),
    bad("unrecognized", "--learning-rate", "1"), bad("unrecognized", "--epoch", "1"),
    bad("expected one argument", "--seed"), bad("cannot write", "--out", "{file}/below"),
    bad("exclude", "--resume", "--overwrite")])
def test_bad_input_is_one_line_and_loses_nothing(flags, words, folder, teacher, tmp_path, capsys,
                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    flags = [flag.format(empty=tmp_path / "empty", file=tmp_path / "file") for flag in flags]
    fails(arguments(folder, teacher, *flags), words, capsys)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "file"]


def test_missing_teacher_names_the_three_choices(folder, capsys):
    fails(["--data", folder], "FILE.*none.*self", capsys)


# ====================================================================================== fine-tuning


def tune(init, *more):
    return finetune.main(["--init", str(init), *map(str, more)])


def tuning(folder, *more):
    return ["--data", folder, "--epochs", 2, "--batch-size", 8, "--workers", 0, *more]


def tuned(out):
    return torch.load(Path(out) / "model.pth", weights_only=True)["model"]


def small_classifier(classes=3, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(image_size=16, patch_size=4, width=24, depth=2, heads=3)
    return finetune.Classifier(classes, **sizes | changes)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("heads", [3, 12])
def test_classifier_agrees_with_timm(heads):
    timm = pytest.importorskip("timm")
    model = scramble(finetune.Classifier(7, depth=2, heads=heads)).eval()
    other = timm.create_model("vit_tiny_patch16_224", num_classes=7, global_pool="avg",
                              depth=2, num_heads=heads).eval()
    other.load_state_dict(model.state_dict())
    images = some_images(model)
    with torch.no_grad():
        assert torch.allclose(model.logits(images), other(images), atol=1e-4)


def test_tiny_classifier_has_the_papers_number_of_parameters():
    assert sum(p.numel() for p in finetune.Classifier(1000).parameters()) == 5_717_416


def test_layer_decay_and_weight_decay_of_every_parameter_of_tiny():
    model = finetune.Classifier(10)
    groups = finetune.layer_groups(model, 0.85, 0.05)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    # 0.85^13 for what comes before block 1, 0.85^12 for block 1, ..., 1 for the head.
    scales = [0.120906, 0.142242, 0.167343, 0.196874, 0.231617, 0.272491, 0.320577, 0.377150,
              0.443705, 0.522006, 0.614125, 0.7225, 0.85, 1.0]
    expected = {"cls_token": (scales[0], 0), "pos_embed": (scales[0], 0),
                "patch_embed.proj.weight": (scales[0], 0.05),
                "patch_embed.proj.bias": (scales[0], 0),
                "fc_norm.weight": (1, 0), "fc_norm.bias": (1, 0),
                "head.weight": (1, 0.05), "head.bias": (1, 0)}
    for block in range(12):
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            expected[f"blocks.{block}.{part}.weight"] = (scales[block + 1], 0.05)
            expected[f"blocks.{block}.{part}.bias"] = (scales[block + 1], 0)
        for part in ("norm1", "norm2"):
            expected[f"blocks.{block}.{part}.weight"] = (scales[block + 1], 0)
            expected[f"blocks.{block}.{part}.bias"] = (scales[block + 1], 0)
    assert {n for n, _ in model.named_parameters()} == expected.keys()
    assert sum(len(g["params"]) for g in groups) == len(expected) == len(found)
    for name, p in model.named_parameters():
        assert found[id(p)] == pytest.approx(expected[name], abs=1e-6), name


@pytest.mark.parametrize("data_set, images, peak", [("folder", 1_281_167, 4e-3),
                                                    ("cifar100", 50_000, 0.1),
                                                    ("pets", 3_680, 0.03)])
def test_schedules_of_the_paper(data_set, images, peak):
    recipe, changes = finetune.RECIPE_OF.get(data_set, ("imagenet", {}))
    row = finetune.RECIPES[recipe] | changes
    steps = images // row["batch_size"]
    total, warm = row["epochs"] * steps, row["warmup_epochs"] * steps
    assert row["blr"] * row["batch_size"] / 256 == pytest.approx(peak)

    def rate(step):
        return learning_rate(step, total, warm, peak, row["end_lr"])

    assert rate(0) == 0 and rate(warm // 2) == pytest.approx(peak * (warm // 2) / warm)
    assert rate(warm) == peak and rate(warm - 1) < peak
    assert rate(warm + (total - warm) // 2) == pytest.approx((peak + 1e-6) / 2, rel=2e-3)
    assert 1e-6 < rate(total - 1) < 1e-6 + peak * 1e-3
    # Layer decay scales the end too: what the optimizer gets is this times the group's scale.
    model = finetune.Supervised(small_classifier())
    optimizer = torch.optim.SGD(finetune.layer_groups(model.classifier, 0.5, 0.0), lr=1)
    batch = torch.zeros(2, 3, 16, 16), torch.tensor([0, 1])
    train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), rate(total - 1),
               [batch], 2, torch.autocast("cpu", enabled=False))
    assert {(g["layer"], g["lr"] / rate(total - 1)) for g in optimizer.param_groups} == {
        (0, 0.125), (1, 0.25), (2, 0.5), (3, 1.0)}


def test_the_gradients_norm_is_clipped():
    model, images = finetune.Supervised(small_classifier()), torch.randn(4, 3, 16, 16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0,
               [(images, torch.tensor([0, 1, 2, 0]))], 4, torch.autocast("cpu", enabled=False),
               clip=1e-3)
    change = sum((p - q).square().sum() for p, q in zip(model.parameters(), before)).sqrt().item()
    assert change == pytest.approx(1e-3, rel=1e-2)


def test_classifier_overfits_one_batch_and_targets_may_be_soft():
    model = finetune.Supervised(small_classifier())
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3
    first = model(images, labels)["loss"].item()
    assert first == pytest.approx(math.log(3), abs=0.1)         # the head begins near zero
    assert model(images, F.one_hot(labels, 3).float())["loss"].item() == pytest.approx(first)
    model.smoothing = 0.3
    soft = 0.7 * F.one_hot(labels, 3) + 0.1
    expected = -(soft * model.classifier.logits(images).log_softmax(1)).sum(1).mean()
    assert torch.allclose(model(images, labels)["loss"], expected)
    model.smoothing = 0.0
    optimizer = torch.optim.AdamW(finetune.layer_groups(model.classifier, 0.9, 0.05))
    for _ in range(60):
        loss = train_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), 3e-3,
                          [(images, labels)], 12, torch.autocast("cpu", enabled=False))["loss"]
    assert loss < 0.05


def names_of(model, *beginnings):
    return {n for n in model.state_dict() if n.startswith(beginnings)}


def test_initialisations_differ_exactly_where_they_should(run):
    def start(init, **changes):
        settings = dict(init=init, keep_blocks=None, freeze_blocks=None, seed=5) | changes
        return finetune.new_classifier(vit, 2, argparse.Namespace(**settings))[0]

    vit = load_vit(run / "student.pth")
    scratch, loaded = start("none"), start("student.pth")
    embedding = ("cls_token", "pos_embed", "patch_embed.")
    everything = set(scratch.state_dict())

    def from_file(model):
        saved = vit.state_dict()
        return {n for n, p in model.state_dict().items() if n in saved and torch.equal(p, saved[n])}

    def as_scratch(model):
        return {n for n, p in model.state_dict().items() if torch.equal(p, scratch.state_dict()[n])}

    assert from_file(loaded) == everything - names_of(loaded, "fc_norm.", "head.")
    for kept in range(5):
        model = start("student.pth", keep_blocks=kept)
        pre_trained = names_of(model, *embedding, *(f"blocks.{i}." for i in range(kept)))
        assert from_file(model) >= pre_trained
        assert as_scratch(model) == (everything - pre_trained) | {"pos_embed"}    # a fixed table
    # A model from scratch is the untrained student of that seed, and the seed matters.
    untrained = dmae.new_model(config(run) | dict(seed=5), None).encoder.state_dict()
    assert all(torch.equal(untrained[n], p) for n, p in scratch.state_dict().items()
               if n in untrained)
    assert not torch.equal(start("none", seed=6).cls_token, scratch.cls_token)


def test_kept_and_frozen_blocks_on_the_command_line(run, folder, tmp_path):
    result = tune(run / "student.pth", *tuning(folder), "--keep-blocks", 3, "--freeze-blocks", 2,
                  "--out", tmp_path / "a")
    before, after = load_vit(run / "student.pth").state_dict(), tuned(result["out"])
    same = {n for n in after if n in before and torch.equal(before[n], after[n])}
    assert same == {n for n in after if n.startswith(
        ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1."))}


@pytest.fixture(scope="module")
def fine(run, folder, tmp_path_factory):
    """A finished fine-tuning with every augmentation, and its result."""
    out = tmp_path_factory.mktemp("fine") / "plain"
    return tune(run / "student.pth", *tuning(folder, "--out", out, *AUGMENTED))


AUGMENTED = ["--cutmix", 1, "--erasing", 0.5, "--smoothing", 0.1, "--blr", 0.1]


def test_fine_tuning_leaves_what_it_should(fine, run, folder, capsys):
    out = Path(fine["out"])
    assert {p.name for p in out.iterdir()} == set(finetune.RUN_FILES)
    log = log_of(out)
    assert [line["epoch"] for line in log] == [1, 2] and log[-1]["step"] == 10
    assert {"loss", "top1", "top5", "test_loss", "lr", "images_per_second", "minutes"} < set(log[0])
    assert fine["top1"] == log[-1]["top1"] and fine["top5"] == 1
    assert log[-1]["best_top1"] == max(line["top1"] for line in log)
    saved = json.loads((out / "config.json").read_text())
    assert saved["settings"]["randaugment"] == 10 and saved["settings"]["layer_decay"] == 0.85
    assert saved["init_sha256"] == hashlib.sha256((run / "student.pth").read_bytes()).hexdigest()
    # The last line printed is the result, for a shell to collect; --eval finds the same.
    capsys.readouterr()
    finetune.main(["--eval", str(out / "model.pth"), "--data", folder, "--workers", "0"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {key: result[key] for key in ("top1", "top5")} == {
        key: fine[key] for key in ("top1", "top5")} and result["test_images"] == 16


def test_timm_evaluates_the_saved_model_to_the_same(run, folder, tmp_path):
    """timm's model, Pillow and torchvision's transforms; a short run, that errors are left."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    out = tune(run / "student.pth", *tuning(folder, "--epochs", 1, "--blr", 0.01,
                                            "--out", tmp_path / "a"))["out"]
    content = torch.load(Path(out) / "model.pth", weights_only=True)
    c = content["config"]
    other = timm.VisionTransformer(
        img_size=c["image_size"], patch_size=c["patch_size"], embed_dim=c["width"],
        depth=c["depth"], num_heads=c["heads"], num_classes=len(c["classes"]),
        global_pool="avg").eval()
    other.load_state_dict(content["model"])
    prepare = v2.Compose([v2.Resize(18, InterpolationMode.BICUBIC), v2.CenterCrop(16),
                          v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                          v2.Normalize(c["mean"], c["std"])])
    val = torchvision.datasets.ImageFolder(Path(folder) / "val", transform=prepare)
    images, labels = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*val))
    with torch.no_grad():
        logits = other(images)
    result = finetune.main(["--eval", f"{out}/model.pth", "--data", folder])
    assert result["top1"] == (logits.argmax(1) == labels).float().mean().item()
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=0.01)


def test_others_fine_tuned_files_are_evaluated_and_probing_heads_refused(tmp_path, capsys, folder):
    model = scramble(small_classifier(2, heads=12))
    save({"model": under("module.model.", model.state_dict())}, tmp_path / "authors.pth.tar")
    loaded = finetune.load_classifier(tmp_path / "authors.pth.tar")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.logits(images), model.logits(images))
    # A head behind `norm` reads the class token: not this classifier.
    vit = scrambled_vit()
    save(vit.state_dict() | {"head.weight": torch.zeros(2, vit.width),
                             "head.bias": torch.zeros(2)}, tmp_path / "deit.pth")
    assert load_vit(tmp_path / "deit.pth", heads=vit.config["heads"]).head == {}


def test_fine_tuning_stopped_and_resumed_ends_in_the_same_bits(fine, run, folder, tmp_path,
                                                               monkeypatch, capsys):
    def stop(*args, **kwargs):
        stop.steps += 1
        if stop.steps == 8:
            raise KeyboardInterrupt
        return train_step(*args, **kwargs)
    stop.steps = 0
    monkeypatch.setattr(finetune, "train_step", stop)
    with pytest.raises(SystemExit) as end:
        tune(run / "student.pth", *tuning(folder, "--out", tmp_path / "a", *AUGMENTED))
    assert end.value.code == 130 and "python finetune.py --resume" in capsys.readouterr().err
    monkeypatch.undo()
    resumed = finetune.main(["--resume", "--out", str(tmp_path / "a")])
    assert equal(tuned(resumed["out"]), tuned(fine["out"])) and resumed["top1"] == fine["top1"]
    assert without_times(log_of(resumed["out"])) == without_times(log_of(fine["out"]))
    again = finetune.main(["--resume", "--out", str(tmp_path / "a")])            # nothing to do
    assert again["top1"] == fine["top1"]
    fails(["--resume", "--out", tmp_path / "a", "--mixup", 0.3], "mixup was 0.2, now 0.3", capsys,
          finetune)
    fails(["--resume", "--out", run], "of another program: resume", capsys, finetune)
    (run / "student.pth").rename(run / "moved.pth")
    try:
        fails(["--resume", "--out", tmp_path / "a"], "--init of this run is gone", capsys, finetune)
        assert finetune.main(["--resume", "--out", str(tmp_path / "a"), "--init",
                              str(run / "moved.pth")])["top1"] == fine["top1"]
    finally:
        (run / "moved.pth").rename(run / "student.pth")


def test_a_full_disk_is_one_line_and_loses_nothing(run, folder, tmp_path, monkeypatch, capsys):
    argv = ["--init", run / "student.pth", *tuning(folder, "--out", tmp_path / "a")]

    def full(content, path):                        # as torch.save does it, on its second call
        path.write_bytes(b"half of a file")
        if (tmp_path / "a" / "checkpoint.pth").exists():
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")
        real(content, path)
    real = torch.save
    monkeypatch.setattr(torch, "save", full)
    fails(argv, "is the disk full.* can be resumed", capsys, finetune)
    monkeypatch.undo()
    assert not list((tmp_path / "a").glob("*.tmp"))
    resumed = finetune.main(["--resume", "--out", str(tmp_path / "a")])
    straight = tune(run / "student.pth", *tuning(folder, "--out", tmp_path / "b"))
    assert equal(tuned(resumed["out"]), tuned(straight["out"]))


def test_resume_refuses_other_classes_and_a_config_that_lacks_something(run, folder, tmp_path,
                                                                        capsys):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    out = Path(tune(run / "student.pth", *tuning(images, "--batch-size", 100, "--epochs", 1,
                                                 "--out", tmp_path / "a"))["out"])
    resumed = ["--resume", "--out", out]          # the flags as given, though 40 images are no 100
    assert finetune.main([*map(str, resumed), "--batch-size", "100"])["batch_size"] == 40
    for part in ("train", "val"):
        (images / part / "down").rename(images / part / "left")
    fails(resumed, "had other classes", capsys, finetune)
    content = json.loads((out / "config.json").read_text())
    del content["settings"]["label_fraction"]
    (out / "config.json").write_text(json.dumps(content))
    fails(resumed, "config.json is damaged", capsys, finetune)
    (out / "config.json").write_text("[]")
    fails(resumed, "config.json is damaged", capsys, finetune)


def test_pre_training_does_not_replace_a_fine_tuning(fine, folder, capsys):
    fails(arguments(folder, "none", "--out", fine["out"], "--overwrite"), "of another program",
          capsys)


def test_linear_probe_resumes_in_the_same_bits(run, folder, tmp_path, monkeypatch):
    flags = ["--data", folder, "--workers", 0, "--mode", "linear", "--epochs", 6]
    straight = tune(run / "student.pth", *flags, "--out", tmp_path / "a")

    def stop(out, parts, epoch, **state):
        if epoch == 4:                       # after its line of the log, before its checkpoint
            raise KeyboardInterrupt
        dmae.save_checkpoint(out, parts, epoch, **state)
    monkeypatch.setattr(finetune, "save_checkpoint", stop)
    with pytest.raises(SystemExit):
        tune(run / "student.pth", *flags, "--out", tmp_path / "b")
    monkeypatch.undo()
    resumed = finetune.main(["--resume", "--out", str(tmp_path / "b")])
    assert without_times(log_of(straight["out"])) == without_times(log_of(resumed["out"]))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes that any features tell apart: red, green, blue, with some noise."""
    root = tmp_path_factory.mktemp("colours")
    for split, count in (("train", 15), ("val", 6)):
        for channel, name in enumerate(("red", "green", "blue")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = noise(16, 16, 3, seed=i) // 4
                image[..., channel] += 190
                Image.fromarray(image.numpy()).save(root / split / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("mode", ["linear", "knn"])
@pytest.mark.parametrize("flags", [(), ("--pool", "cls"), ("--block", "2"),
                                   ("--block", "0")], ids=" ".join)
def test_probes_tell_separable_features_apart(run, colours, tmp_path, mode, flags):
    result = tune(run / "student.pth", "--data", colours, "--mode", mode, *flags,
                  "--workers", 0, "--out", tmp_path / "a")
    assert result["top1"] == 1 and log_of(tmp_path / "a")[-1]["top1"] == 1
    files = {"config.json", "log.jsonl"} | ({"checkpoint.pth"} if mode == "linear" else set())
    assert {p.name for p in (tmp_path / "a").iterdir()} == files


def test_features_of_a_block_and_pool_by_hand(run):
    vit, images = load_vit(run / "student.pth"), torch.randn(5, 3, 16, 16)
    tokens = vit(images, tokens=[2])[1][2]
    tokens = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, keepdim=True,
                                                                    unbiased=False) + 1e-5).sqrt()
    for pool, expected in (("mean", tokens[:, 1:].mean(1)), ("cls", tokens[:, 0])):
        found = dmae.pooled_features(vit, [images[:2], images[2:]], 2, pool)
        assert torch.allclose(found, expected, atol=1e-5)


def test_constant_features_are_worth_chance(run, colours, tmp_path):
    """The class token before the first block is the same for every image."""
    for mode in ("linear", "knn"):
        result = tune(run / "student.pth", "--data", colours, "--mode", mode, "--block", 0,
                      "--pool", "cls", "--workers", 0, "--out", tmp_path / mode)
        assert result["top1"] == pytest.approx(1 / 3)


def test_label_fraction_is_stratified_and_seeded():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3)[torch.randperm(143)]
    keep, again, other = (finetune.stratified(labels, 0.1, seed) for seed in (0, 0, 1))
    assert labels[keep].bincount().tolist() == [10, 4, 1] and torch.equal(keep, keep.unique())
    assert torch.equal(keep, again) and not torch.equal(keep, other)
    assert torch.equal(finetune.stratified(labels, 1.0, 0), torch.arange(143))


def test_randaugment_reaches_thirty_degrees_and_half_the_operations_are_done():
    image, fill = noise(3, 33, 33, seed=3), 116
    before = torch.get_rng_state()
    for magnitude, degrees in ((10, 30), (5, 15)):
        policy = finetune.RandAugment(magnitude, fill)
        images = [policy(image, seed) for seed in range(400)]
        assert all(torch.equal(images[seed], policy(image, seed)) for seed in range(5))
        turned = [TF.rotate(image, sign * degrees, InterpolationMode.BILINEAR, fill=[fill])
                  for sign in (1, -1)]
        assert all(any(torch.equal(other, x) for x in images) for other in turned)
        # None of two operations in 1/4; one is the identity, others do nothing to some images.
        assert 0.2 < sum(torch.equal(image, x) for x in images) / 400 < 0.45
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("small", [True, False])
def test_each_image_has_a_seed_of_its_own_for_the_policy(tmp_path, small):
    write_images(tmp_path, *(f"{i}.png" for i in range(6)))
    images = torch.stack([noise(3, 10, 12, seed=i) for i in range(6)])
    row = SETS["folder"] | dict(mean=(0, 0, 0), std=(1 / 255,) * 3)
    source = (data.SmallSet(images, torch.zeros(6), row, (8, 8)) if small
              else image_folder(tmp_path, row=row))
    source.policy = lambda image, seed: torch.full_like(image, seed % 251)

    def found(order, epoch=0):
        generator = torch.Generator().manual_seed(epoch)
        parts = [source.augment(part, *source.draw(3, generator))
                 for part in source.batches(order, epoch)]
        return torch.cat(parts)[order.flatten().argsort()].flatten(1)

    order = torch.arange(6).view(2, 3)
    once = found(order)
    assert (once == once[:, :1]).all() and len(once[:, 0].unique()) >= 5
    assert torch.equal(once, found(order)) and not torch.equal(once, found(order, epoch=1))
    if not small:                                        # by index, whoever reads it and when
        assert torch.equal(once, found(order.flip(0, 1)))


def test_grey_images_before_an_encoder_of_colour_ones():
    row, images = SETS["folder"] | dict(mean=(0, 0, 0), std=(1, 1, 1)), noise(4, 1, 16, 16)
    source = data.SmallSet(images, torch.zeros(4), row, (16, 16))
    source.policy = finetune.RandAugment(10, 116)
    for seed in range(30):
        draws = source.draw(4, torch.Generator().manual_seed(seed))
        augmented = source.augment(images, *draws)
        assert augmented.shape == (4, 3, 16, 16) and torch.equal(augmented[:, 0], augmented[:, 2])
    plain = next(source.plain(torch.arange(4)))
    assert torch.allclose(plain, images.expand(-1, 3, -1, -1) / 255)


def test_batch_augmentation_mixes_images_and_labels_alike():
    images = torch.eye(6).view(6, 6, 1, 1).expand(6, 6, 8, 8)          # channel i is image i's
    labels = torch.arange(6)

    def augmented(step=0, **changes):
        s = dict(seed=0, mixup=0.0, cutmix=0.0, erasing=0.0) | changes
        return finetune.batch_augmentation(argparse.Namespace(**s), 6)(images, labels, step, 0)

    assert augmented()[0] is images and augmented()[1] is labels
    for options in (dict(mixup=1.0), dict(cutmix=1.0), dict(mixup=1.0, cutmix=1.0)):
        mixed, targets = augmented(**options)
        assert torch.allclose(mixed.mean(dim=(2, 3)), targets, atol=1e-6)      # shares of each
        assert (targets > 0).sum() == 12 and torch.allclose(targets.sum(1), torch.ones(6))
        again, other = augmented(**options)[0], augmented(step=1, **options)[0]
        assert torch.equal(mixed, again) and not torch.equal(mixed, other)
    erased = [augmented(step, erasing=0.5)[0] for step in range(40)]
    share = torch.stack([(x != images).flatten(1).any(1).float().mean() for x in erased]).mean()
    assert 0.4 < share < 0.6


def test_micro_batches_tune_to_the_same(fine, run, folder, tmp_path):
    pieces = tune(run / "student.pth", *tuning(folder, "--out", tmp_path / "a", *AUGMENTED),
                  "--micro-batch", 3)
    a, b = tuned(pieces["out"]), tuned(fine["out"])
    assert not equal(a, b) and log_of(pieces["out"])[-1]["loss"] == pytest.approx(
        log_of(fine["out"])[-1]["loss"], rel=1e-3)


def settings_of(result):
    return json.loads((Path(result["out"]) / "config.json").read_text())["settings"]


def grid_of(result):
    return load_vit(Path(result["out"]) / "model.pth").grid


# Every flag, with what must be seen of it in the result, the log or the weights.
TUNING_FLAGS = {
    "--image-size 24": lambda r: grid_of(r) == (6, 6),
    "--label-fraction 0.25": lambda r: r["train_images"] == 10 and log_of(r["out"])[0]["step"] == 1,
    "--keep-blocks 0": lambda r: r["keep_blocks"] == 0 and not as_fine(r),
    "--freeze-blocks 4": lambda r: r["freeze_blocks"] == 4 and not as_fine(r),
    "--recipe transfer --warmup-epochs 1": lambda r: settings_of(r)["layer_decay"] == 0.75
        and settings_of(r)["clip"] == 1 and settings_of(r)["randaugment"] == 0,
    "--optimizer sgd": lambda r: not as_fine(r),
    "--warmup-epochs 2": lambda r: log_of(r["out"])[1]["lr"] == pytest.approx(0.9 * 0.1 / 32),
    "--end-lr 0.01": lambda r: log_of(r["out"])[1]["lr"] > 0.003125,
    "--weight-decay 0.5": lambda r: not as_fine(r),
    "--layer-decay 0.5": lambda r: not as_fine(r),
    "--clip 0.1": lambda r: not as_fine(r),
    "--crop-scale 0.9": lambda r: not as_fine(r),
    "--randaugment 0": lambda r: not as_fine(r),
    "--mixup 0": lambda r: not as_fine(r),
    "--cutmix 0": lambda r: not as_fine(r),
    "--erasing 0": lambda r: not as_fine(r),
    "--smoothing 0": lambda r: not as_fine(r),
    "--eval-every 3": lambda r: ["top1" in line for line in log_of(r["out"])] == [False, True],
    "--seed 4": lambda r: r["seed"] == 4 and not as_fine(r),
    "--workers 1": lambda r: as_fine(r),
    "--device cpu --amp off --no-compile": lambda r: as_fine(r),
    "--amp bf16": lambda r: not as_fine(r) and log_of(r["out"])[1]["loss"] == pytest.approx(
        log_of(FINE[0]["out"])[1]["loss"], rel=0.02),
    "--compile": lambda r: log_of(r["out"])[1]["loss"] == pytest.approx(
        log_of(FINE[0]["out"])[1]["loss"], rel=1e-3),
    "--data-dir elsewhere --overwrite": lambda r: as_fine(r),
    "--blr 0 --end-lr 0": lambda r: log_of(r["out"])[1]["lr"] == 0,
}
FINE = []                             # the result of the finished run, once there is one


def as_fine(result):
    return equal(tuned(result["out"]), tuned(FINE[0]["out"]))


@pytest.mark.parametrize("flags", TUNING_FLAGS)
def test_tuning_flag(flags, fine, run, folder, tmp_path):
    FINE[:] = [fine]
    assert TUNING_FLAGS[flags](tune(run / "student.pth", *tuning(
        folder, *AUGMENTED, *flags.split(), "--out", tmp_path / "a")))


def test_no_tuning_flag_is_left_untested_and_each_has_its_help():
    tested = set(" ".join(TUNING_FLAGS).split()) | {
        "--help", "--init", "--eval", "--data", "--out", "--resume", "--mode", "--epochs",
        "--batch-size", "--micro-batch", "--pool", "--block"} | {
        "--bank", "--model", "--patch-size", "--holdout"}                        # just below
    actions = finetune.make_parser()._actions
    assert {action.option_strings[0] for action in actions} - {"-h"} <= tested
    assert all(len(action.help) > 15 for action in actions)


def test_images_held_out_are_not_trained_on_and_the_same_for_every_run(run, folder, tmp_path):
    def images(source):
        return [image.numpy().tobytes() for batch in source.plain(torch.arange(len(source)))
                for image in batch]

    vit, every = load_vit(run / "student.pth"), []
    for seed in (0, 1):
        whole, _ = finetune.open_labelled(str(folder), vit, "data", "cpu", 0, seed)
        every = images(whole)
        train, test = finetune.hold_out(whole, 7)
        held = images(test) if seed == 0 else held
        assert images(test) == held and len(held) == 7 and len(train.labels) == len(train)
        assert sorted(images(train) + held) == sorted(every) and not train.broken
    result = tune(run / "student.pth", "--data", folder, "--mode", "knn", "--holdout", 7,
                  "--out", tmp_path / "a")
    assert result["holdout"] == 7 and result["train_images"] == len(every) - 7
    assert result["top1"] * 7 == pytest.approx(round(result["top1"] * 7))


def test_probes_are_the_work_of_one_process(run, folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(["--init", run / "student.pth", "--data", folder, "--mode", "knn"],
          "without torchrun", capsys, finetune)


def test_from_scratch_and_the_bank(folder, tmp_path):
    result = tune("none", *tuning(folder, "--model", "nano", "--image-size", 24, "--patch-size", 8,
                                  "--epochs", 1, "--out", tmp_path / "a"))
    assert grid_of(result) == (3, 3) and settings_of(result)["layer_decay"] == 1
    for bank in (1, 40):
        result = tune("none", "--data", folder, "--mode", "knn", "--model", "nano", "--image-size",
                      16, "--patch-size", 4, "--bank", bank, "--out", tmp_path / str(bank))
        assert (result["top1"] == 0.5) == (bank == 1)      # one neighbour: all of its class


@pytest.mark.parametrize("flags, words", [
    bad("--init is missing.*FILE.*none.*--eval", "--data", "{folder}"),
    bad("holds no plain ViT", "--init", "{file}"), bad("no file", "--init", "no.pth"),
    bad("no images in a folder val/; it needs images in unlabelled/train/CLASS/ and unlabelled/val/"
        "CLASS/", "--init", "{student}", "--data", "{unlabelled}"),
    bad("neither a folder nor one of", "--init", "{student}", "--data", "petz"),
    bad("blocks 1 to 4", "--init", "{student}", "--keep-blocks", "5"),
    bad("blocks 1 to 4", "--init", "{student}", "--freeze-blocks", "-1"),
    bad("blocks 1 to 4", "--init", "{student}", "--mode", "knn", "--block", "5"),
    bad("only the 1 blocks", "--init", "{student}", "--keep-blocks", "1", "--freeze-blocks", "2"),
    bad("some must be left", "--init", "{student}", "--holdout", "40"),
    bad("from 1 to", "--init", "{student}", "--holdout", "0"),
    bad("--keep-blocks has no meaning", "--init", "none", "--keep-blocks", "1"),
    bad("--model has no meaning", "--init", "{student}", "--model", "nano"),
    bad("--bank has no meaning", "--init", "{student}", "--bank", "5"),
    bad("--mixup has no meaning", "--init", "{student}", "--mode", "linear", "--mixup", "1"),
    bad("--epochs has no meaning", "--init", "{student}", "--mode", "knn", "--epochs", "1"),
    bad("multiple of the encoder's patch", "--init", "{student}", "--image-size", "30"),
    bad("0 to 10", "--init", "{student}", "--randaugment", "11"),
    bad("0 to 0.99", "--init", "{student}", "--smoothing", "1"),
    bad("0 to 1", "--init", "{student}", "--layer-decay", "nan"),
    bad("from 1", "--init", "{student}", "--epochs", "0"),
    bad("from 1", "--init", "{student}", "--eval-every", "0"),
    bad("label-fraction", "--init", "{student}", "--label-fraction", "0"),
    bad("crop-scale", "--init", "{student}", "--crop-scale", "2"),
    bad("warmup-epochs 9", "--init", "{student}", "--epochs", "2", "--warmup-epochs", "9"),
    bad("choose from", "--init", "{student}", "--mode", "teach"),
    bad("choose from", "--init", "none", "--model", "giant"),
    bad("grey images", "--init", "{grey}"), bad("unrecognized", "--lr", "1"),
    bad("has no meaning with --eval", "--eval", "{student}", "--seed", "1"),
    bad("holds no classifier", "--eval", "{student}"),
    bad("tells 2 classes apart, .* has 3", "--eval", "{model}", "--data", "{colours}"),
    bad("tells apart down, right", "--eval", "{model}", "--data", "{renamed}"),
    bad("checkpoint to resume from", "--eval", "{fine}/checkpoint.pth"),
    bad("checkpoint to resume from", "--init", "{run}/checkpoint.pth"),
    bad("there are no images in a folder val/", "--init", "{student}", "--data", "{folder}/train"),
    bad("class down is in one of", "--init", "{student}", "--data", "{one-sided}"),
    bad("stray.png lies in no folder", "--init", "{student}", "--data", "{stray}"),
    bad("another program", "--init", "{student}", "--out", "{copy}", "--overwrite"),
    bad("batch norm", "--init", "{student}", "--mode", "linear", "--batch-size", "1"),
    bad("holds a run .config.json.*--overwrite", "--init", "{student}", "--out", "{fine}"),
    bad("would delete", "--init", "{model}", "--out", "{fine}", "--overwrite"),
    bad("inside the data", "--init", "{student}", "--out", "{folder}/train/runs"),
    bad("--resume needs --out", "--resume"),
    bad("--device", "--init", "{student}", "--device", "toaster")])
def test_bad_tuning_input_is_one_line(flags, words, run, fine, folder, colours, tmp_path, capsys,
                                      monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, "unlabelled/0.png", "unlabelled/1.png")
    trees = tmp_path_factory.mktemp("trees")
    for tree in ("renamed", "one-sided", "stray"):
        shutil.copytree(folder, trees / tree)
    for place in ("renamed/train", "renamed/val", "one-sided/val"):
        (trees / place / "down").rename(trees / place / "left")
    write_images(trees, "stray/train/stray.png")
    shutil.copytree(run, trees / "copy")
    save({"model": {"x": torch.zeros(2)}}, tmp_path / "file")
    save_student(tmp_path / "grey.pth", MAE(small_vit(channels=1, mean=(0.5,), std=(0.5,))))
    places = dict(folder=folder, colours=colours, unlabelled="unlabelled", file="file", run=run,
                  grey="grey.pth", student=run / "student.pth", fine=fine["out"],
                  model=Path(fine["out"]) / "model.pth", copy=trees / "copy",
                  **{tree: trees / tree for tree in ("renamed", "one-sided", "stray")})
    flags = [flag.format(**places) for flag in flags]
    if "--data" not in flags and "--resume" not in flags:
        flags += ["--data", folder]
    before = {p: p.read_bytes() for p in Path(fine["out"]).iterdir()}
    fails(flags, words, capsys, finetune)
    assert {p: p.read_bytes() for p in Path(fine["out"]).iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "grey.pth", "unlabelled"]


# ========================================================================================= analysis


def uniform_scores(b=2, h=3, n=196):
    """Equal scores among patches; the class token's row and column must not count."""
    scores = torch.zeros(b, h, 1 + n, 1 + n)
    scores[:, :, 0], scores[:, :, :, 0] = 7.0, 50.0
    return scores


def test_distance_and_entropy_of_uniform_attention_and_of_looking_at_oneself():
    distance = analyze.attention_distance(uniform_scores(), (14, 14))
    assert distance.shape == (2, 3) and torch.allclose(distance, torch.tensor(7.28), atol=5e-3)
    assert torch.allclose(analyze.attention_entropy(uniform_scores()), torch.tensor(196.0).log())
    alone = uniform_scores() + 200 * torch.eye(197)
    assert analyze.attention_distance(alone, (14, 14)).abs().max() < 1e-6
    assert analyze.attention_entropy(alone).abs().max() < 1e-6


def test_distance_and_entropy_against_loops():
    rows, columns, n = 2, 3, 6
    scores = torch.randn(1, 2, 1 + n, 1 + n)
    for head in range(2):
        distance = entropy = 0.0
        for q in range(n):
            weights = [math.exp(scores[0, head, 1 + q, 1 + k]) for k in range(n)]
            for k, weight in enumerate(weights):
                a = weight / sum(weights)
                distance += a * math.dist(divmod(q, columns), divmod(k, columns)) / n
                entropy -= a * math.log(a) / n
        found = analyze.attention_distance(scores, (rows, columns))[0, head].item()
        assert found == pytest.approx(distance, rel=1e-5)
        assert analyze.attention_entropy(scores)[0, head].item() == pytest.approx(entropy, rel=1e-5)


def similarity(*features, batch=None):
    """Minibatch CKA of features (N, c) each."""
    batches = zip(*(x.split(batch or len(x)) for x in features))
    each = [analyze.hsic(torch.stack([analyze.gram(x) for x in part])) for part in batches]
    return analyze.cka(sum(each) / len(each))


def test_hsic_against_sums_over_distinct_samples():
    """Song et al. 2012, before it is simplified: averages over distinct i, j, q, r."""
    K, L = (analyze.gram(torch.randn(7, 3, generator=torch.manual_seed(seed))) for seed in (0, 1))
    pairs = [(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).item()
             for i, j, q, r in itertools.permutations(range(7), 4)]
    assert analyze.hsic(torch.stack([K, L]))[0, 1].item() == pytest.approx(np.mean(pairs))


def test_cka_of_rotations_scalings_and_noise():
    torch.manual_seed(0)
    x, y = torch.randn(2048, 24), torch.randn(2048, 40)
    rotation = torch.linalg.qr(torch.randn(24, 24)).Q
    related = x @ torch.randn(24, 40) + 3 * y
    whole = similarity(x, x @ rotation * 5 + 2, y, related)
    assert whole[0, 0] == pytest.approx(1) and whole[0, 1].item() == pytest.approx(1, abs=1e-5)
    assert abs(whole[0, 2]) < 0.02 and 0.1 < whole[0, 3] < 0.9
    batches = similarity(x, x @ rotation * 5 + 2, y, related, batch=64)
    assert (batches - whole).abs().max() < 0.02
    centred = [z - z.mean(0) for z in (x, related)]                  # the usual, biased formula
    biased = (centred[0].T @ centred[1]).norm() ** 2 / math.prod(
        (z.T @ z).norm() for z in centred)
    assert whole[0, 3].item() == pytest.approx(biased.item(), abs=0.02)


def test_measure_is_the_mean_over_images_whatever_the_pieces():
    vits = [scrambled_vit(), scrambled_vit(width=24, depth=3, image_size=48)]
    sources = [data.SmallSet(noise(16, 3, 20, 20), None, SETS["shapes"], vit.config["image_size"])
               for vit in vits]
    found = analyze.measure(vits, sources, torch.arange(16), batch=8, piece=3)
    again = analyze.measure(vits, sources, torch.arange(16), batch=8, piece=16)
    for a, b in zip(found, again):
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b))
    images = torch.cat(list(sources[1].plain(torch.arange(16))))
    with torch.no_grad():
        scores = vits[1](images, scores=[2])[0][2]
    assert [x.shape for x in found[0]] == [(2, 3), (3, 3)] and found[2].shape == (7, 7)
    expected = analyze.attention_distance(scores, (6, 6)).mean(0)
    assert torch.allclose(found[0][1][1].float(), expected, atol=1e-5)
    assert torch.allclose(found[2].diagonal(), torch.ones(7, dtype=torch.float64))
    with torch.no_grad():         # the input of block 2 is what its norm1 hands on, patches only
        tokens = vits[0](images[..., :32, :32], tokens=range(3))[1]
    assert torch.equal(analyze.representations(vits[0], tokens)[1],
                       vits[0].blocks[1].norm1(tokens[1])[:, 1:].flatten(1))


def explored(run, teacher, folder, *more):
    return analyze.main([str(run / "student.pth"), "--teacher", teacher, "--data", folder,
                         "--batch-size", "5", "--workers", "0", *map(str, more)])


@pytest.mark.parametrize("figures", [True, False])
def test_an_analysis_leaves_numbers_and_figures(run, teacher, folder, tmp_path, monkeypatch, capsys,
                                                figures):
    if figures:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    numbers = explored(run, teacher, folder, "--out", tmp_path / "a")
    output = capsys.readouterr().out
    saved = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert saved == json.loads(json.dumps(numbers)) and saved["settings"]["images"] == 16
    student, other = saved["models"]
    assert (student["name"], other["name"]) == ("plain", "teacher")
    assert np.shape(student["distance"]) == (4, 4) and np.shape(other["entropy"]) == (3, 3)
    assert student["entropy_uniform"] == pytest.approx(math.log(16))
    assert np.shape(saved["cka"]["teacher | plain"]) == (4, 5)
    assert np.allclose(saved["mixers"]["plain 4:3"], weights(run)["mixers.4:3"])
    errors = saved["scores"]["plain"]
    assert set(errors["masked"]) == {"zeros", "fitted", "learnt"} and errors["whole"]["mean_map"]
    pictures = {p.name for p in (tmp_path / "a").glob("*.png")}
    assert pictures == ({f"{name}.png" for name in (
        "distance", "entropy", "cka", "attention_class", "attention_patch", "reconstruction_plain",
        "mixer_plain 4-3", "scores_plain")} if figures else set())
    assert set(saved["figures"]) == pictures
    assert ("pip install matplotlib" in output) != figures and "images/s" in output
    for name in pictures:
        picture = read_image(tmp_path / "a" / name).float()
        assert min(picture.shape[1:]) > 100 and picture.std() > 10
    before = (tmp_path / "a" / "analysis.json").read_bytes()
    (tmp_path / "a" / "mine.png").touch()
    fails([run / "student.pth", "--out", tmp_path / "a"], "--overwrite", capsys, analyze)
    explored(run, teacher, folder, "--out", tmp_path / "a", "--overwrite", "--pictures", 0)
    assert json.loads(before)["models"] == json.loads(
        (tmp_path / "a" / "analysis.json").read_text())["models"]
    left = {"distance.png", "entropy.png", "cka.png", "mixer_plain 4-3.png"} if figures else set()
    assert {p.name for p in (tmp_path / "a").glob("*.png")} == left | {"mine.png"}


def test_agreement_of_scores_is_the_distance_that_was_trained_on(run, teacher):
    student = analyze.load_student(run / "student.pth")
    assert student["match"] == "scores" and all(
        torch.equal(p, weights(run)[f"decoder.{n}"])
        for n, p in student["mae"].state_dict().items() if not n.startswith("encoder."))
    images, M = torch.randn(6, 3, 16, 16, generator=torch.manual_seed(0)), student["mixers"]["4:3"]
    vit = load_vit(run / "student.pth")
    found, (ours, mixed, theirs) = analyze.agreement(vit, teacher, images, M)
    model = DMAE(student["mae"], load_vit(teacher))
    model.mixers["4:3"].data = M
    noise = torch.rand(6, 16, generator=torch.Generator().manual_seed(0))
    expected = model(images[3:], student["mae"].choose(noise)[3:])["attn"].item()
    assert found["masked"]["learnt"] == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(torch.einsum("ts,bsqk->btqk", M, ours), mixed, atol=1e-5)
    whole = model.teacher(model.teacher_images(images), scores=[3])[0][3]
    assert torch.equal(theirs, whole[:1])
    assert found["whole"]["zeros"] == pytest.approx(whole[3:].square().mean().item(), rel=1e-4)
    mean_map = (whole[3:] - whole[:3].mean(0)).square().mean().item()
    assert found["whole"]["mean_map"] == pytest.approx(mean_map, rel=1e-4)
    # A teacher whose scores are a mixture of the student's own is fitted exactly.
    mixture = torch.randn(3, 4)
    assert torch.allclose(analyze.fit_mixer(ours, torch.einsum("ts,bsqk->btqk", mixture, ours)),
                          mixture, atol=1e-3)


def test_mixers_that_do_not_apply_are_not_used_and_said(run, teacher, folder, tmp_path, capsys):
    main(arguments(folder, teacher, "--match", "probs", "--out", tmp_path / "probs"))
    other = tmp_path / "other.pth"
    save_student(other, MAE(ViT(32, 8, 3, 24, 3, 3), 16, 1, 2))
    probs = tmp_path / "probs" / "student.pth"
    for file, eyes, words in ((probs, teacher, "not between the scores"),
                              (run / "student.pth", other, "another teacher")):
        numbers = analyze.main([str(file), "--teacher", str(eyes), "--data", folder, "--pictures",
                                "0", "--batch-size", "5", "--workers", "0", "--overwrite", "--out",
                                str(tmp_path / "a")])
        assert words in capsys.readouterr().out
        assert "learnt" not in next(iter(numbers["scores"].values()))["masked"]


def test_names_of_models_differ():
    paths = ["a/x/student.pth", "b/x/student.pth", "x 2.pth.tar", "y.v1.pth", "y.v2.pth:3", "$.pth"]
    assert analyze.names_of(paths) == ["x", "x 2", "x 2 2", "y.v1", "y.v2", "_"]


def test_images_all_alike_have_no_cka(run, tmp_path, capsys):
    for i in range(8):
        write_images(tmp_path, f"same/{i}/0.png")
    numbers = analyze.main([str(run / "student.pth"), "--data", str(tmp_path / "same"), "--workers",
                            "0", "--batch-size", "4", "--pictures", "0", "--out",
                            str(tmp_path / "a")])
    text = (tmp_path / "a" / "analysis.json").read_text()
    assert "NaN" not in text and "null" in text
    assert math.isnan(numbers["cka"]["plain | plain"][0][0])
    assert "CKA is undefined" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [
    bad("neither a folder", "{student}", "--data", "petz"), bad("no file", "no.pth"),
    bad("blocks 1 to 4", "{student}", "--block", "5"),
    bad("from --batch-size, 5", "{student}", "--images", "4"),
    bad("decoder does not fit", "{broken}"), bad("not finite", "{nan}"),
    bad("inside the data", "{student}", "--out", "{folder}/val/a"),
    bad("cannot write", "{student}", "--out", "{student}/below"),
    bad("ROW,COLUMN, from 0,0 to 3,3", "{student}", "--patch", "4,0"),
    bad("ROW,COLUMN", "{student}", "--patch", "centre"),
    bad("of the 16 that", "{student}", "--images", "99"),
    bad("from 4 to", "{student}", "--batch-size", "3"), bad("required", "--seed", "1"),
    bad("device", "{student}", "--device", "toaster")])
def test_bad_analysis_input_is_one_line(flags, words, run, folder, tmp_path, capsys, monkeypatch,
                                        tmp_path_factory):
    monkeypatch.chdir(tmp_path)
    files = tmp_path_factory.mktemp("files")
    content = torch.load(run / "student.pth", weights_only=True)
    torch.save(content | dict(decoder={}), files / "broken.pth")
    content["model"]["norm.bias"][0] = math.nan
    torch.save(content, files / "nan.pth")
    flags = [flag.format(student=run / "student.pth", folder=folder, broken=files / "broken.pth",
                         nan=files / "nan.pth") for flag in flags]
    if "--data" not in flags:
        flags += ["--data", folder]
    fails([*flags, *([] if "--batch-size" in flags else ["--batch-size", "5"])], words, capsys,
          analyze)
    assert not list(tmp_path.iterdir())


# ============================================================================================ speed


def test_counted_operations_are_those_that_a_step_does():
    """Against PyTorch's counter, with a small teacher that it be quick. Attention is spelt out, as
    the counter of older versions does not see the fused one."""
    found = speed.count_flops("dmae", "tiny", "base", 196, 49, 768)
    assert {k: round(v / 1e9, 2) for k, v in found.items()} == {
        "teacher": 8.05, "student": 1.69, "decoder": 0.27}
    s = argparse.Namespace(task="dmae", student="tiny", teacher="micro", image_size=224,
                           patch_size=16, compile=False)
    model, _ = speed.build("ours", s, torch.device("cpu"))
    for part in (*model.modules(), *model.teacher.modules()):
        if type(part) is dmae.Attention:
            part.__class__ = speed.PlainAttention
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224))["loss"].backward()
    expected = sum(speed.count_flops("dmae", "tiny", "micro", 196, 49, 768).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)
    s.task = "finetune"
    model, _ = speed.build("plain", s, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 224, 224), torch.tensor([7]))["loss"].backward()
    expected = sum(speed.count_flops("finetune", "tiny", None, 196, 49, 768).values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.002)


def test_the_plain_way_computes_the_same(capsys, monkeypatch):
    monkeypatch.setattr(speed, "best_product", lambda *_: 1e11)               # it takes seconds
    lines = speed.main("--student nano --teacher micro --image-size 32 --patch-size 8 --batch-size "
                       "6 --micro-batch 4 --steps 2 --against plain".split())
    ours, plain = lines
    assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-4)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    share = sum(ours["gflop_per_image"].values()) * ours["images_per_second"] / 100
    assert ours["share_of_best_product"] == pytest.approx(share, abs=0.002, rel=0.1) and share > 0
    assert ours["recompiled"] == 0 and ours["ms_10"] <= ours["ms_per_step"] <= ours["ms_90"]
    for amp in ("off", "bf16"):
        lines = speed.main(f"--student nano --teacher micro --image-size 32 --patch-size 8 --amp "
                           f"{amp} --batch-size 4 --steps 1 --against plain".split())
        assert lines[0]["first_loss"] == pytest.approx(lines[1]["first_loss"], rel=0.02)
    for task in ("mae", "finetune"):
        line, = speed.main(f"--task {task} --student nano --image-size 32 --patch-size 8 "
                           "--batch-size 4 --steps 1".split())
        assert line["task"] == task and line["peak_memory_gb"] > 0
    # Of fine-tuning, at the least each block's input, two norms, qkv, attention, MLP: 17 numbers.
    assert 17 * 4 * 17 * 64 * 4 < line["kept_mb_per_image"] * 1e6 < 40 * 4 * 17 * 64 * 4


def test_hugging_faces_way_is_given_the_same_images_and_noise():
    pytest.importorskip("transformers")
    s = argparse.Namespace(task="dmae", student="nano", teacher="micro", image_size=32,
                           patch_size=8, compile=False)
    model, _ = speed.build("hf", s, torch.device("cpu"))
    images, noise_ = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    hidden = model.teacher(images, noise=noise_, output_hidden_states=True).hidden_states[-2]
    scores = model.scores(model.teacher, hidden)
    model.teacher.set_attn_implementation("eager")
    attention = model.teacher(images, noise=noise_, output_attentions=True).attentions[-1]
    assert torch.allclose(scores.softmax(dim=-1), attention, atol=1e-5)
    assert model(images, noise_)["loss"].requires_grad


def test_loader_measures_photograph_like_files(tmp_path, capsys):
    loader.make_photographs(tmp_path, 2)
    for path in tmp_path.rglob("*.jpg"):
        assert 60_000 < path.stat().st_size < 110_000
        assert Image.open(path).size == (500, 375)
    line = loader.main(["--data", str(tmp_path), "--images", "2", "--rounds", "1"])
    assert line == json.loads(capsys.readouterr().out) and line["files"] == 2
    assert line["ours_over_usual_bicubic"] == pytest.approx(
        line["ours"] / line["usual_bicubic"], abs=0.01)
    fails(["--data", tmp_path / "class0"], "two or more folders", capsys, loader)
    fails(["--rounds", "0"], "1 or more", capsys, loader)
    fails(["--against", "hf", "--task", "mae"], "only for --task dmae", capsys, speed)


# ============================================================================================ study


def study_lines(**values):
    """Lines of a study: row -> top-1 of seeds 0, 1, ..., in the column 1%."""
    return [dict(data="fashion-mnist", row=row, seed=seed, column="1%", top1=top1, minutes=1.0)
            for row, tops in values.items() for seed, top1 in enumerate(tops)]


def test_a_difference_counts_beyond_two_standard_errors():
    lines = study_lines(
        **{"mae": [0.70, 0.74, 0.78], "dmae": [0.72, 0.77, 0.80], "untrained": [0.71, 0.74, 0.80],
           "mae-long": [0.71, 0.77, 0.80], "every": [0.80, 0.841]})
    found = study.difference(*(study.values_of(lines, "fashion-mnist", row, "1%")
                               for row in ("dmae", "mae")))
    pairs = np.array([2.0, 3.0, 2.0])                        # in points, pair by pair
    assert found == pytest.approx((pairs.mean(), pairs.std(ddof=1) / 3 ** 0.5, 3))
    table = study.tables(lines)["fashion-mnist: difference from MAE (± standard error)"]
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ")[1].rstrip(" |") for line in
             table.splitlines()[2:]}
    # Paired t-tests have p = 0.020, 0.23, 0.074; two seeds decide nothing.
    assert cells == {
        "D-MAE, last block": "+2.33 ± 0.33 **", "D-MAE, untrained teacher": "+1.00 ± 0.58",
        "MAE, as long as D-MAE and its teacher": "+2.00 ± 0.58 *",
        "D-MAE, all blocks": "+10.05 ± 0.05 (2)"}
    assert study.difference({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0}) is None          # one seed is none


def test_every_cell_can_be_asked_of_the_programs():
    """Each command line is one that dmae.py and finetune.py take; different cells, different
    ones."""
    s, seen = argparse.Namespace(
        runs="runs", data_dir="data", data=[*study.DATA], rows=[*study.ALL_ROWS], seeds=[0],
        columns=[*study.ALL_COLUMNS, "pretrain"]), set()
    for data_name, row, _, column in study.cells(s):
        program, argv = study.command(s, data_name, row, 0, column)
        given = vars(program.make_parser().parse_args(argv))
        assert given["data"] == data_name and given["seed"] == 0
        flags = [word for word in argv if word.startswith("--")]
        assert len(flags) == len(set(flags))
        seen.add((program.__name__, *argv))
    assert len(seen) == len(set(study.cells(s))) == len(study.DATA) * (
        (len(study.ALL_ROWS) - 1) * (len(study.ALL_COLUMNS) + 1) + len(study.COLUMNS))


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    size = "--student nano --train-images 64 --batch-size 32"
    monkeypatch.setattr(study, "DATA", {"shapes": dict(
        teacher=f"--epochs 2 {size}", student=f"--epochs 1 {size}", tuning=(1, 1, 1),
        long=2, better=3)})
    monkeypatch.setattr(dmae.KNN.__init__, "__defaults__", (100, 100))        # it takes seconds
    monkeypatch.chdir(tmp_path)
    return ["--runs", "my runs", *"--results lines --data shapes --seeds 0 --rows mae dmae "
            "untrained --columns".split()]


def test_a_study_runs_what_is_missing_and_nothing_twice(small_study, tmp_path, capsys):
    study.main([*small_study, "pretrain"])
    lines = study.read("lines")
    assert [(line["row"], line["column"], line["images"]) for line in lines] == [
        ("mae", "pretrain", 64), ("teacher", "pretrain", 128), ("dmae", "pretrain", 64),
        ("untrained-teacher", "pretrain", 0), ("untrained", "pretrain", 64)]
    assert [x["epoch"] for x in lines[1]["curve"]] == [0, 1, 2] and lines[2]["curve"][1]["attn"] > 0
    assert all(line["command"].startswith("python dmae.py --teacher") for line in lines)
    before = Path("lines").read_bytes()
    study.main([*small_study, "pretrain"])
    assert Path("lines").read_bytes() == before
    # A line that is lost: what is there is resumed, not computed again.
    student = tmp_path / "my runs/shapes/dmae/0/pretrain/checkpoint.pth"
    Path("lines").write_text("".join(before.decode().splitlines(keepends=True)[:2]))
    age = student.stat().st_mtime_ns
    study.main([*small_study, "pretrain"])
    assert student.stat().st_mtime_ns == age
    assert [line["row"] for line in study.read("lines")] == [line["row"] for line in lines]
    # A student that is not the one of its line is not measured.
    student.with_name("student.pth").write_bytes(b"another")
    with pytest.raises(SystemExit):
        study.main([*small_study[:-4], "dmae", "--columns", "knn"])
    assert "is not there, or not that of lines" in capsys.readouterr().err
    # It can be trained again. On the same machine it comes out the same; on another it will not,
    # and has a line of its own, which is not among the tables' minutes.
    knn = [*small_study[:-4], "dmae", "--columns", "knn", "--again"]
    study.main(knn)
    assert [line["column"] for line in study.read("lines")] == 5 * ["pretrain"] + ["knn"]
    whole = study.read("lines")
    own, whole[2]["student_sha256"] = whole[2]["student_sha256"], "of another machine"
    whole[2]["minutes"], whole[2]["curve"][-1]["knn"] = 7.0, 0.99
    Path("lines").write_text("".join(json.dumps(line) + "\n" for line in whole[:5]))
    student.with_name("student.pth").unlink()
    tables = study.main(knn)
    *_, again, measured = study.read("lines")
    assert again["again"] and again["student_sha256"] == measured["student_sha256"] == own
    assert study.values_of(study.read("lines"), "shapes", "dmae", "pretrain") == {0: 7.0}
    name = "shapes: trained again"
    assert "| D-MAE, last block | 1 |" in tables[name] and "| 99.0 |" in tables[name]
    before = Path("lines").read_bytes()
    study.main(knn)
    assert Path("lines").read_bytes() == before
    # Where the data lie makes no difference, nor does a flag without a value; other settings do.
    study.main([*small_study[:-4], "mae", "--columns", "pretrain", "--data-dir", "elsewhere"])
    s = argparse.Namespace(results="decoupled", runs="my runs", data_dir="here")
    program, argv = study.command(s, "shapes", "d2", 0, "pretrain")
    Path("decoupled").write_text(json.dumps(lines[1] | dict(
        row="d2", seed=0, command=shlex.join(["python", "dmae.py", *argv]))) + "\n")
    s.data_dir = "elsewhere"
    assert study.line_of(s, "shapes", "d2", 0, "pretrain")
    study.DATA["shapes"]["student"] += " --blr 1e-3"
    with pytest.raises(SystemExit):
        study.main([*small_study, "pretrain"])
    assert "mae, seed 0, pretrain was measured with another --blr" in capsys.readouterr().err


def test_a_study_draws_what_it_has_run(small_study, monkeypatch, capsys):
    study.main([*small_study, "pretrain"])
    files = ["--runs", "my runs", "--results", "lines", "--data", "shapes"]
    study.main([*files, "--picture"])
    image, side = read_image("study.png").float(), 96 + 2          # of a tile, with its frame
    assert image.shape[1:] == (4 * side + 2, 6 * side + 2)
    tiles = image[:, 2:, 2:].unfold(1, 96, side).unfold(2, 96, side)         # 3 rows columns 96 96
    patch = 96 // 8
    patches = tiles.unfold(3, patch, patch).unfold(4, patch, patch).flatten(5, 6).flatten(3, 4)
    test, visible, both, *maps = patches.permute(2, 1, 3, 0, 4)      # each: rows n 3 pixels
    kept = (visible == test).flatten(2).all(-1)
    assert (kept.sum(-1) == 16).all() and (both[kept] == test[kept]).all()
    assert (both[~kept] != test[~kept]).flatten(1).any(-1).all()
    for drawn in maps:                                              # grey where visible, else blue
        assert (drawn == drawn[..., :1]).all()
        colour = drawn[..., 0]
        assert (colour[kept] == colour[kept][:, :1]).all()
        assert len(colour[~kept].unique(dim=0)) == 1 and colour[~kept][0].unique().numel() == 3
    teacher = maps[2][..., 0, 0].masked_fill(~kept, 128)
    assert (teacher.amin(1) == 0).all() and (teacher.amax(1) == 255).all()
    assert not torch.equal(maps[0], maps[1]) and not torch.equal(maps[1], maps[2])
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        study.main([*files, "--report"])
    assert "figures need pip install matplotlib" in capsys.readouterr().out
    assert not Path("study_shapes.png").exists()
    pytest.importorskip("matplotlib")
    study.main([*files, "--report"])
    assert "study_shapes.png" in capsys.readouterr().out
    curves = read_image("study_shapes.png").float()
    assert min(curves.shape[1:]) > 100 and curves.std() > 10


def test_a_study_measures_and_two_of_them_share_the_work(small_study, monkeypatch, capsys):
    study.main([*small_study[:-4], "scratch", "--columns", "1%"])
    line, = study.read("lines")
    assert 0 < line["top1"] < 0.5 and line["train_images"] == 200 and line["row"] == "scratch"
    # While another process holds the run of plain MAE, the others are done; then it is waited for.
    path = Path("my runs/shapes/mae/0/pretrain/lock")
    path.parent.mkdir(parents=True)
    done, held, lock = [], open(path, "w"), study.fcntl.flock
    lock(held, study.fcntl.LOCK_EX)

    def flock(file, how):
        if file.name == str(path) and not how & study.fcntl.LOCK_NB:
            done.append(len(study.read("lines")))
            held.close()                                               # the other one has finished
        lock(file, how)

    monkeypatch.setattr(study.fcntl, "flock", flock)
    study.main([*small_study, "pretrain"])
    assert done == [5] and len(study.read("lines")) == 6


def test_a_study_stops_in_time_and_goes_on(small_study, capsys):
    tables = study.main([*small_study, "pretrain", "--minutes", "0.001"])
    assert "3 cells are left: the same command goes on" in capsys.readouterr().out and not tables
    assert len(study.read("lines")) < 5
    study.main([*small_study, "pretrain"])
    assert len(study.read("lines")) == 5


def test_bad_input_to_a_study_is_one_line(capsys):
    fails(["--minutes", "0"], "--minutes 0.0: must be from", capsys, study)
    fails(["--seeds", "-1"], "must be 0 or more", capsys, study)
    fails(["--rows", "best"], "invalid choice", capsys, study)
    fails(["--results", Path(dmae.__file__), "--report"], "line 1 is not one", capsys, study)
    fails(["--results", "nowhere", "--report"], "no lines in it yet", capsys, study)
    fails(["--results", "no/folder"], "No such file or directory: no/folder", capsys, study)
    fails(["--results", "nowhere", "--picture"], "is not there", capsys, study)


def test_tables_of_the_readme_are_those_of_the_lines():
    lines, here = study.read(), Path(dmae.__file__).parent
    readme, full = ((here / name).read_text() for name in ("README.md", "experiments/STUDY.md"))
    assert len({(x["data"], x["row"], x["seed"], x["column"],
                 "again" in x and x["student_sha256"]) for x in lines}) == len(lines) > 0
    for name, table in study.tables(lines).items():
        where = readme if name.endswith("top-1 in percent") else full
        assert table in where, f"write this one into the README or STUDY.md: {name}\n{table}"
    assert study.headline(lines, "fashion-mnist") in readme.split("## Start here")[0]


# =================================================================================== real processes


def start(*argv, module=(), program=dmae, **options):
    script = str(Path(program.__file__))
    return subprocess.Popen([sys.executable, *module, script, *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_process_default_run_shortened(tmp_path):
    process = start("--train-images", 320, "--epochs", 1, cwd=tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    for words in ("raw pixels", "untrained student", "predicting nothing", "teacher   ViT 96 wide"):
        assert words in output
    out = tmp_path / "runs" / "0001"
    assert set(dmae.RUN_FILES) < {p.name for p in out.iterdir()}
    assert len(log_of(out)) == len(log_of(out / "teacher")) == 2


def test_process_refuses_a_file_with_code(tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({"model": Code()}, tmp_path / "x.pth")
    process = start("--teacher", "x.pth", cwd=tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 2 and errors.count("\n") == 1 and "code" in errors
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]


def test_process_killed_and_resumed(folder, teacher, tmp_path):
    argv = arguments(folder, teacher, "--epochs", 30, "--out", tmp_path / "killed")
    process = start(*argv)
    while not (tmp_path / "killed" / "checkpoint.pth").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and len(log_of(tmp_path / "killed")) < 31
    resumed = main(["--resume", "--out", str(tmp_path / "killed")])
    straight = main([*argv[:-1], str(tmp_path / "straight")])
    assert same_bits(resumed, straight)
    assert without_times(log_of(resumed)) == without_times(log_of(straight))


def torchrun(*argv, program=dmae):
    process = start(*argv, program=program, module=(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def test_process_two_under_torchrun(run, folder, teacher, tmp_path):
    # The second process has nothing to save: it must wait for the teacher that the first one does.
    torchrun("--epochs", 0, "--train-images", 64, "--out", tmp_path / "self")
    assert weights(tmp_path / "self")["mixers.4:4"].shape == (6, 4)
    out = tmp_path / "two"
    torchrun(*arguments(folder, teacher, "--micro-batch", 3, "--out", out))
    assert same_function(run, out)
    for one, two in zip(log_of(run), log_of(out)):
        assert one["knn"] == pytest.approx(two["knn"], abs=0.13)           # 16 images: two of them
        if one["epoch"]:
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_process_two_fine_tune_under_torchrun(run, folder, tmp_path):
    """With a test set that does not divide among them."""
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    (images / "val" / "down" / "0.png").unlink()
    flags = tuning(images, "--mixup", 0, "--erasing", 0.5, "--blr", 0.1, "--micro-batch", 3)
    one = tune(run / "student.pth", *flags, "--out", tmp_path / "one")
    output = torchrun("--init", run / "student.pth", *flags, "--out", tmp_path / "two",
                      program=finetune)
    two = json.loads(output.splitlines()[-1])
    assert two["top1"] == pytest.approx(one["top1"], abs=1 / 15)
    for a, b in zip(log_of(one["out"]), log_of(two["out"])):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)
