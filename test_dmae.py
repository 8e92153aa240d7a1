"""All tests of dmae.py, data.py and finetune.py: python -m pytest

Needs no network, no data and no GPU. Comparisons with timm, Hugging Face and SciPy are skipped
where these are not installed.
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
import shutil
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF

import data
import dmae
import finetune
from data import SETS, InputError, read_image
from dmae import (DMAE, MAE, ViT, knn_top1, load_vit, main, parameter_groups, resize_grid,
                  save_student, sincos_positions, split_heads)

# torchvision announces the end of its decoders; `read_image` does without them when it comes.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Runs do not measure how fast this machine multiplies."""
    monkeypatch.setattr(dmae, "bf16_gain", lambda: 1.0)


def noise(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.manual_seed(seed))


def write_images(root, *names, height=10, width=12):
    """A picture of noise in each file, every one different."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(height, width, 3, seed=number).numpy()).save(root / name)


def image_folder(root, **options):
    return data.Files(*data.find_images(root), **dict(row=data.FOLDER, size=(8, 8)) | options)


def equal(a, b):
    """Of two state dicts: the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ============================================================================================ model
# Fixed weights, images and masking noise, and what an independent implementation of the paper made
# of them in float32.


def wave(name, shape, scale=0.05):
    """A fixed tensor for the parameter called `name`."""
    phase = zlib.crc32(name.encode()) % 6283 / 1000
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    numbers = scale * torch.sin(0.7310 * i + phase + 0.13 * torch.cos(0.0171 * i))
    return numbers.float().view(shape)


def fill(module, prefix=""):
    """Every trained parameter becomes its wave, plus 1 for the weights of layer norms."""
    for name, p in module.named_parameters():
        if "pos_embed" not in name:
            name = prefix + name.removeprefix("encoder.")
            p.data = wave(name, p.shape) + ("norm" in name and name.endswith("weight"))


EXPECTED = {
    "mae": 1.2445016, "scores": 57.364601, "prediction": 0.2850142,
    "blocks.0.attn.qkv.weight": 37.48925, "blocks.11.attn.qkv.weight": 742.65076,
    "patch_embed.proj.weight": 103.21867, "decoder_pred.weight": 49.871662, "M": 36.825104}
EXPECTED_DECOUPLED = {
    "mae": 1.2444993, "scores": 57.356785, "prediction": 0.2850031,
    "blocks.0.attn.qkv.weight": 25.241302, "blocks.7.mlp.fc1.weight": 58.581826,
    "blocks.11.attn.qkv.weight": 24.027229, "blocks.12.norm1.weight": 0.15058867}


@pytest.mark.parametrize("decoupled, expected", [(False, EXPECTED), (True, EXPECTED_DECOUPLED)])
def test_agrees_with_an_independent_implementation(decoupled, expected):
    student, teacher = MAE(ViT(), decode_after=8 if decoupled else None), ViT(width=768)
    model = DMAE(student, teacher, decoupled=decoupled)
    fill(student)
    fill(teacher)
    if decoupled:
        fill(model.extra, "blocks.12.")
    M = model.mixers["scores:13:12" if decoupled else "scores:12:12"]
    M.data = wave("adapter", (12, 12), 0.3)
    i, n, c = torch.arange(224), torch.arange(2).view(2, 1, 1, 1), torch.arange(3).view(3, 1, 1)
    images = torch.sin(i[:, None] * 0.05 * (c + 1) + n) + torch.cos(i * 0.083 * (n + 1) + c)
    ids_keep = student.choose((torch.arange(196) * 37 + 11 * n.view(2, 1)) % 196)
    losses = model(images, ids_keep)
    (losses["mae"] + losses["scores"]).backward()
    found = {name.removeprefix("encoder."): p.grad.abs().sum()
             for name, p in student.named_parameters() if p.requires_grad}
    found |= dict(mae=losses["mae"], scores=losses["scores"], M=M.grad.abs().sum())
    if decoupled:
        found["blocks.12.norm1.weight"] = model.extra.norm1.weight.grad.abs().sum()
    tokens, _ = student.encoder(images, ids_keep, tokens_of=[student.decode_after])
    found["prediction"] = student.decode(*tokens.values(), ids_keep)[0, 5, 7]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-4), name
    if not decoupled:                             # the same model, compared after the softmax
        model.match, model.mixers["probs:12:12"] = ["probs"], M
        assert model(images, ids_keep)["probs"].item() == pytest.approx(0.00079768, rel=1e-4)


def test_sizes_of_the_paper():
    assert {name: dmae.PRESETS[name] for name in ("slim", "tiny", "small", "base")} == {
        "slim": ((64, 6, 8), (32, 1, 2)), "tiny": ((192, 12, 12), (96, 1, 3)),         # slim: ours
        "small": ((384, 12, 12), (192, 1, 6)), "base": ((768, 12, 12), (512, 8, 16))}
    student, classifier = MAE(ViT()), finetune.Classifier(1000)
    counts = [sum(p.numel() for p in parameters) for parameters in (
        student.encoder.parameters(), student.parameters(), classifier.parameters(),
        (p for p in student.parameters() if p.requires_grad))]
    assert counts == [5_524_416, 5_748_480, 5_717_416, 5_691_744]
    assert (student.encoder.blocks[0].attn.heads, student.decoder_blocks[0].attn.heads) == (12, 3)
    assert {m.eps for m in [*student.modules(), *classifier.modules()]
            if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_a_fresh_model_is_drawn_as_the_paper_says():
    torch.manual_seed(0)
    model = DMAE(MAE(ViT(depth=2)), ViT(width=768, depth=1), decoupled=True)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for m in layers:                                            # Xavier, uniform
        bound = math.sqrt(6 / sum(m.weight.flatten(1).shape))
        assert m.weight.abs().max() <= bound
        assert m.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        within = 1 / math.sqrt(3 * 16 * 16) if isinstance(m, nn.Conv2d) else 0     # PyTorch's
        assert 0.9 * within <= m.bias.abs().max() <= within
    student, M = model.student, model.mixers["scores:3:1"]
    assert all(0.015 < x.std() < 0.025 for x in (student.encoder.cls_token, student.mask_token))
    assert M.shape == (12, 12) and 0.9 / 12**0.5 < M.abs().max() <= 1 / 12**0.5
    for table in (student.encoder.pos_embed, student.decoder_pos_embed):
        assert not table.requires_grad and not table[:, 0].any()
        assert torch.equal(table[:, 1:], sincos_positions(table.shape[2], (14, 14)))


def test_a_classifier_from_scratch_is_drawn_as_timms():
    """Normals of deviation 0.02, biases 0; the patch embedding as PyTorch draws a convolution."""
    torch.manual_seed(0)
    for name, x in finetune.Classifier(10, depth=1).state_dict().items():
        if name.startswith("patch_embed."):
            assert 0.9 / 768**0.5 < x.abs().max() <= 1 / 768**0.5, name
        elif name.endswith("bias") or "norm" in name:
            assert (x == name.endswith("weight")).all(), name
        else:
            assert x.std().item() == pytest.approx(0.02, rel=0.2), name


def small_vit(**changes):
    return ViT(**dict(image_size=32, patch_size=8, width=32, depth=3, heads=4) | changes)


def small_model(teacher=None, decode_after=None, **options):
    torch.manual_seed(0)
    teacher = teacher or small_vit(width=48, depth=4, heads=6)
    student = MAE(small_vit(), decoder_width=16, decoder_heads=2, decode_after=decode_after)
    return DMAE(student, teacher, **options)


def test_what_is_asked_for_is_returned_and_nothing_past_it_computed():
    vit, images = small_vit(), torch.randn(2, 3, 32, 32)
    plain, _ = vit(images, tokens_of=[3])
    tokens, scores = vit(images, tokens_of=[0, 2, 3], scores_of=[1, 2])
    assert tokens.keys() == {0, 2, 3} and scores.keys() == {1, 2}
    assert torch.equal(plain[3], tokens[3]) and torch.equal(tokens[0], vit.embed(images))
    assert torch.equal(vit.encode(images), vit.norm(tokens[3]))
    attention = vit.blocks[1].attn
    for p in [*vit.blocks[2].parameters(), *vit.blocks[1].mlp.parameters(), *vit.norm.parameters(),
              *attention.proj.parameters(), attention.qkv.weight[64:]]:          # 64: the values
        p.data.fill_(math.nan)
    tokens, poisoned = vit(images, scores_of=[2])
    assert not tokens and poisoned.keys() == {2}
    torch.testing.assert_close(poisoned[2], scores[2])
    assert vit(images, tokens_of=[1])[0][1].isfinite().all()


def test_painted_patches_survive_masking_and_unshuffling():
    """Patch i is painted with the number i; an encoder and a decoder that only pass numbers on must
    put every visible number back into its place."""
    mae = MAE(ViT((24, 32), 4, 1, 4, 0, 1, (0.0,), (1.0,)), 4, 0, 1, norm_pix=False)
    numbers = torch.arange(48.0)
    images = mae.encoder.unpatchify(numbers.view(1, 48, 1).expand(2, 48, 16))
    assert images[0, 0, 5, 9] == 1 * 8 + 2                  # row 5 is of patch row 1, column 9 of 2
    torch.testing.assert_close(mae.encoder.patchify(images)[0, :, 3], numbers)
    for p in mae.parameters():
        p.data.zero_()
    mae.encoder.patch_embed["proj"].weight.data[0] = 1 / 16                  # the mean of a patch
    mae.encoder.norm = mae.decoder_norm = nn.Identity()
    mae.decoder_embed.weight.data[0, 0] = mae.decoder_pred.weight.data[:, 0] = 1
    mae.mask_token.data[:] = -1
    ids_keep = mae.choose(torch.rand(2, 48))
    shown = mae.decode(mae.encoder.embed(images, ids_keep), ids_keep)[..., 0]
    visible = (numbers == ids_keep[..., None]).any(1)
    torch.testing.assert_close(shown, torch.where(visible, numbers, -1.0))


def test_loss_touches_hidden_patches_only_and_normalises_each():
    mae = MAE(small_vit(), 16, 1, 2)
    mae.decode = lambda tokens, ids: tokens                  # the tokens are the prediction
    images, ids_keep = 0.2 * torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 7, 15], [1, 2, 8, 9]])
    plain, prediction = mae.encoder.patchify(images), torch.randn(2, 16, 192)
    variance, mean = torch.var_mean(plain, dim=-1, keepdim=True)
    normal = (plain - mean) / (variance + 1e-6).sqrt()
    hidden = (torch.arange(16) != ids_keep[..., None]).all(1)
    prediction[~hidden] += 100                               # visible: they do not count
    for mae.norm_pix, target in ((True, normal), (False, plain)):
        loss = mae.reconstruction_loss(images, prediction, ids_keep)
        torch.testing.assert_close(loss, F.mse_loss(prediction[hidden], target[hidden]))
    # Predicting nothing scores (n - 1) / n, of images of one colour 0.
    mae.norm_pix, nothing = True, torch.zeros_like(prediction)
    losses = [mae.reconstruction_loss(x, nothing, ids_keep).item() for x in (images, 0 * images)]
    assert losses == pytest.approx([191 / 192, 0], rel=1e-4)


def test_distance_scores_and_attention_are_float32_whatever_surrounds_them():
    model, images, M = small_model(), torch.randn(2, 3, 32, 32), torch.randn(6, 4)
    ours, theirs = torch.randn(2, 4, 5, 5), torch.randn(2, 6, 5, 5)
    slow = torch.stack(
        [theirs[:, t] - sum(M[t, s] * ours[:, s] for s in range(4)) for t in range(6)])
    q, k, v = torch.randn(3, 2, 4, 5, 8).bfloat16().requires_grad_()
    exact = q.float() @ k.float().mT / 8**0.5
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            torch.testing.assert_close(model.distance(ours, theirs, M), slow.square().mean())
            scores, out = dmae.attention_scores(q, k), dmae.attend(q, k, v)
            assert {loss.dtype for loss in model(images).values()} == {torch.float32}
        torch.testing.assert_close(scores, exact)
        torch.testing.assert_close(out, exact.softmax(dim=-1) @ v.float())


@pytest.mark.parametrize("mixer", [True, False])
def test_terms_and_layers_add_up_with_a_mixer_and_without(mixer):
    images, ids_keep = torch.randn(2, 3, 32, 32), torch.rand(2, 16).argsort(1)[:, :4]
    teacher = None if mixer else small_vit(depth=4)          # as wide, with as many heads
    model = small_model(teacher, layers=[(1, 2), (3, 3)], match="scores,hidden", alpha=3.0,
                        mixer=mixer)
    scores, hidden = 0, 0
    for i, j in model.layers:
        (x, a), (y, b) = (vit(images, ids_keep, [block], [block]) for vit, block in (
            (model.student.encoder, i), (model.teacher, j)))
        x, y = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in (x[i], y[j]))
        a, b = a[i], b[j]
        if mixer:
            x = x @ model.mixers[f"hidden:{i}:{j}"].T
            a = torch.einsum("ts,bsqk->btqk", model.mixers[f"scores:{i}:{j}"], a)
        scores, hidden = scores + F.mse_loss(a, b), hidden + F.mse_loss(x, y)
    losses = model(images, ids_keep)
    total = losses["mae"] + 3 * (scores + hidden)
    torch.testing.assert_close(
        losses, dict(loss=total, mae=losses["mae"], scores=scores, hidden=hidden))
    pictured = dmae.class_scores(model, images)[1].flatten(2)                  # the last pair
    torch.testing.assert_close(pictured, model.teacher(images, scores_of=[3])[1][3][:, :, 0, 1:])


@pytest.mark.parametrize("options", [
    {}, dict(layers=[(1, 2), (3, 4)]), dict(match="probs"), dict(match="hidden", layers=[(2, 2)]),
    dict(decoupled=True, decode_after=2)])
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none(options):
    model, images = small_model(**options), torch.randn(2, 3, 32, 32)
    assert not any(m.training for m in model.train().teacher.modules())
    losses = model(images)
    if options.get("decoupled"):                 # the decoder reads block 2; 3 has the teacher only
        losses["mae"].backward(retain_graph=True)
        assert model.student.encoder.blocks[1].mlp.fc2.weight.grad.abs().sum() > 0
        assert model.student.encoder.blocks[2].attn.qkv.weight.grad is None
        assert list(model.mixers) == ["scores:4:4"] and len(list(model.extra.parameters())) == 4
    losses["loss"].backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    for part in (model, model.student):                              # each call hides other patches
        assert part(images)["mae"] != part(images)["mae"]
    assert model.double().teacher.pos_embed.dtype == torch.float64           # it follows .to(...)


def test_grey_small_student_under_a_large_colour_teacher():
    """1 x 32 x 32 in patches of 4 under 3 x 224 x 224 in patches of 14: 8 x 8 for both."""
    torch.manual_seed(0)
    teacher, student = ViT(224, 14, 3, 48, 2, 6), ViT(32, 4, 1, 32, 2, 4, (0.3,), (0.2,))
    model, pixels = DMAE(MAE(student, 16, 1, 2), teacher), torch.rand(2, 1, 32, 32)
    images = (pixels - 0.3) / 0.2
    seen = dmae.images_for(teacher, student, images)
    colour = F.interpolate(pixels, (112, 112), mode="bicubic", antialias=True).expand(-1, 3, -1, -1)
    expected = TF.normalize(colour, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert model(images)["scores"].isfinite() and model.mixers["scores:2:2"].shape == (6, 4)
    assert dmae.images_for(student, ViT(32, 4, 1, mean=[0.3], std=[0.2]), images) is images


@pytest.mark.parametrize("options", [dict(match="probs,hidden"), dict(decoupled=True)])
def test_nothing_is_left_on_the_cpu(options, monkeypatch):
    """A small grey student under a colour teacher, a classifier, images of a set: on fake CUDA
    tensors, which need no GPU."""
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda *_, **__: None)   # it looks at the numbers
    with FakeTensorMode():
        with torch.device("cuda"):
            student = ViT(32, 8, 1, 32, 3, 4, (0.3,), (0.2,))
            mae = MAE(student, 16, 1, 2, decode_after=2 if options.get("decoupled") else None)
            model = DMAE(mae, ViT(56, 14, 3, 48, 2, 6), **options)
            classifier = finetune.Classifier(5, image_size=32, patch_size=8, width=32, depth=2,
                                             heads=4)
        items = torch.zeros(6, 1, 32, 32, dtype=torch.uint8)
        source = data.SmallSet(items, torch.arange(6), (), SETS["fashion-mnist"], (32, 32), "cuda")
        (images, labels), = source.plain(torch.arange(4))
        found = [images, labels, classifier.logits(images.expand(-1, 3, -1, -1)),
                 *dmae.class_scores(model, images), *model(images).values(), *mae(images).values(),
                 dmae.pooled_features(student, images)]
        halves = torch.zeros(3, 2, 4, 5, 8, device="cuda", dtype=torch.bfloat16)
        assert dmae.attend(*halves).dtype == torch.bfloat16
    assert {x.device.type for x in found} == {"cuda"}


BAD_SETTINGS = {
    "1 to 3": [lambda: small_model(layers=[(4, 4)]), lambda: small_model(layers=[(0, 1)])],
    "1 to 4": [lambda: small_model(layers=[(1, 0)]), lambda: small_model(layers=[(1, 5)])],
    "twice": [lambda: small_model(layers=[(1, 1), (1, 1)])],
    "not together": [lambda: small_model(decoupled=True, layers=[(1, 1)]),
                     lambda: small_model(decoupled=True, match="scores,hidden")],
    "choose from scores, probs, hidden": [
        lambda: small_model(match="logits"), lambda: small_model(match="probs,probs")],
    "must agree": [lambda: small_model(mixer=False), lambda: small_model(
        small_vit(width=48, heads=4), mixer=False, match="scores,hidden")],
    "channel": [lambda: small_model(small_vit(channels=1, mean=(0.5,), std=(0.5,)))],
    "multiple of patch": [lambda: ViT((32, 30), 8), lambda: ViT((0, 8), 8), lambda: ViT(32, 0)],
    "there are 3 blocks": [
        lambda: small_model(decode_after=4), lambda: small_model(decode_after=-1)],
    "heads: must divide": [lambda: small_vit(heads=5), lambda: small_vit(heads=0)],
    "multiple of 4": [lambda: small_vit(width=30, heads=5)],
    "one must be visible": [lambda: MAE(small_vit(), mask_ratio=0.95),
                            lambda: MAE(small_vit(), mask_ratio=0.0)]}


@pytest.mark.parametrize("words", BAD_SETTINGS)
def test_settings_that_cannot_work_say_why_and_those_at_the_limits_work(words):
    for make in BAD_SETTINGS[words]:
        with pytest.raises(InputError, match=f"^[^\n]*{words}[^\n]*$"):
            make()
    assert len(small_model(layers=[(1, 1), (3, 4), (1, 4)]).mixers) == 3
    # A tenth of ten is one, though 10 * (1 - 0.9) is a little less in floating point.
    assert MAE(small_vit(image_size=(16, 40)), mask_ratio=0.9).kept == 1
    assert [MAE(small_vit(), mask_ratio=x).kept for x in (15 / 16, 0.06, 0.9)] == [1, 15, 1]


# ========================================================================================= teachers


def scramble(model):
    """Move every weight: the zeros and ones of a fresh model would hide what is lost or swapped."""
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn(weight.shape)
    return model.eval()


def scrambled_vit(**sizes):
    return scramble(ViT(**dict(image_size=32, patch_size=8, width=48, depth=2, heads=3) | sizes))


def some_images(vit, count=2):
    return torch.randn(count, vit.config["channels"], *vit.config["image_size"],
                       generator=torch.manual_seed(1))


def save(content, path):
    safe = path.suffix == ".safetensors"
    (pytest.importorskip("safetensors.torch").save_file if safe else torch.save)(content, path)
    return path


def under(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state):
    """Weights that must be left alone."""
    return {name: tensor + 1 for name, tensor in state.items()}


HEAD = {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
DECODER = dict.fromkeys(["mask_token", "decoder_pos_embed", "decoder_norm.bias"], torch.ones(1))
UNUSED = "decoder_norm, decoder_pos_embed, mask_token"
# The files that are around, made of an encoder's weights `s`, and what they hold beside it. Those
# of the D-MAE authors have 12 heads; the others do not say.
LAYOUTS = {
    "mae_checkpoint.pth": (
        lambda s: dict(model=s | DECODER, optimizer={"state": {0: {"exp_avg": torch.ones(2)}}},
                       epoch=3, scaler={"scale": 2.0}, args=argparse.Namespace(lr=1e-3)), UNUSED),
    "authors_mae_tiny_distill.pth.tar": (
        lambda s: {"model": under("module.", under("model.", s | DECODER)
                                  | under("tch_model.", other(s)) | under("attn_adapter.", HEAD))},
        f"attn_adapter, {UNUSED}, tch_model"),
    "authors_supervised.pth.tar": (
        lambda s: {"model": under("module.model.", {n.replace("norm.", "fc_norm."): s[n]
                                                    for n in s} | HEAD)}, "head"),
    "authors_d2mae.pth.tar": (
        lambda s: {"model": under("module.model.", s | {
            n.replace("blocks.0.", "blocks.11."): t for n, t in other(s).items()
            if n.startswith(("blocks.0.norm1.", "blocks.0.attn.qkv."))})}, "blocks"),
    "authors_moco_tiny.pth.tar": (lambda s: {"model": under("module.base_encoder.", s)}, ""),
    "authors_compiled.pth": (lambda s: under("_orig_mod.module.model.", s), ""),
    "moco_v3.pth.tar": (
        lambda s: {"state_dict": under("module.", under("base_encoder.", s | HEAD) | under(
            "momentum_encoder.", other(s)) | under("predictor.", HEAD))},
        "head, momentum_encoder, predictor"),
    "dino_full.pth": (
        lambda s: {"student": other(s), "teacher": under("backbone.", s) | HEAD}, "head"),
    "timm.bin": (lambda s: s | HEAD, "head"), "timm.safetensors": (lambda s: s, ""),
    "config.pth": (lambda s: {"model": s, "config": {"heads": 3}}, "")}                 # not ours


def same_vit(vit, source):
    features = [x.encode(some_images(vit)) for x in (vit, source)]
    return vit.config == source.config and equal(
        vit.state_dict(), source.state_dict()) and torch.equal(*features)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_the_wild(tmp_path, name, monkeypatch):
    """Also without the GPU that they were written on."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    (make, unused), authors = LAYOUTS[name], name.startswith("authors")
    source = scrambled_vit(depth=11, heads=12 if authors else 3)     # 11: block 10 follows 9, not 1
    vit = load_vit(save(make(source.state_dict()), tmp_path / name), None if authors else 3)
    assert same_vit(vit, source)
    heads = "12 heads by the D-MAE authors' layout" if authors else "3 heads by request"
    assert vit.description == (f"ViT 48 wide, 11 blocks, {heads}, patch 8, grid 4x4, from {name}"
                               + (f"; not used: {unused}" if unused else ""))


def test_our_students_come_back(tmp_path):
    encoder, path = scrambled_vit(image_size=(16, 32), channels=1, mean=[0.5], std=[0.3]), tmp_path
    student = MAE(encoder, 16, 1, 2, decode_after=1)
    save_student(path / "student.pth", DMAE(student, scrambled_vit(channels=1), decoupled=True))
    assert same_vit(load_vit(path / "student.pth"), encoder)


def test_hugging_face_agrees(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = scramble(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(
        image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=11, num_attention_heads=3,
        intermediate_size=192, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.0,
        decoder_num_attention_heads=2, decoder_intermediate_size=16, layer_norm_eps=1e-6)))
    model.save_pretrained(tmp_path)                              # under other names than in memory
    for path in tmp_path / "model.safetensors", save(model.state_dict(), tmp_path / "model.pth"):
        vit = load_vit(path, heads=3)
        noise = torch.arange(16.0).expand(2, -1)                 # ascending: patches in order
        theirs = model.vit(some_images(vit), noise=noise).last_hidden_state
        torch.testing.assert_close(vit.encode(some_images(vit)), theirs, atol=1e-4, rtol=1e-4)


def test_layer_scale_is_folded_as_dinov2_has_it(tmp_path):
    """In timm's names and Hugging Face's, in half precision, and at another grid."""
    transformers = pytest.importorskip("transformers")
    timm = pytest.importorskip("timm.models.vision_transformer")
    a = timm.VisionTransformer(
        56, 14, embed_dim=192, depth=2, num_heads=3, init_values=0.5, num_classes=0)
    b = transformers.Dinov2Model(transformers.Dinov2Config(
        image_size=56, patch_size=14, hidden_size=192, num_hidden_layers=2, num_attention_heads=3))
    a, b = (scramble(x).half().float() for x in (a, b))
    b.half().save_pretrained(tmp_path)
    save(a.half().state_dict() | {"mask_token": torch.zeros(1, 192)}, tmp_path / "a.pth")
    images, wide = torch.randn(2, 3, 56, 56), torch.randn(2, 3, 84, 42)
    for name, x, theirs in (
            ("a.pth", images, a.float().forward_features(images)),
            ("model.safetensors", images, b.float()(images).last_hidden_state),
            ("model.safetensors", wide, b(wide).last_hidden_state)):
        vit = resize_grid(load_vit(tmp_path / name), [side // 14 for side in x.shape[2:]])
        assert "3 heads by DINOv2's layout" in vit.description
        torch.testing.assert_close(vit.encode(x), theirs, atol=1e-4, rtol=1e-4)


def test_timm_takes_a_student_as_the_readme_says(tmp_path, monkeypatch):
    names = dict(timm=pytest.importorskip("timm"), torch=torch)
    code = re.search(r"```python\n(.*?)```", Path(dmae.__file__).with_name("README.md").read_text(
        encoding="utf-8"), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    save_student(Path("runs/x/student.pth"), MAE(scramble(ViT())))
    exec(code, names)
    vit, images = load_vit("runs/x/student.pth"), torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(names["vit"].eval().forward_features(images), vit.encode(images),
                               atol=1e-3, rtol=1e-3)


def refusal(path, heads=None):
    """What load_vit says when it refuses: one line."""
    with pytest.raises(InputError) as caught:
        load_vit(path, heads)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("width, make, heads, why", [
    (768, lambda s: {"model": s, "config": dict(
        heads=8, image_size=[28, 28], mean=[0.5] * 3, std=[0.3] * 3)}, 8, "its own config"),
    (48, lambda s: {"model": under("module.model.", s)}, 12, "the D-MAE authors' layout"),
    (768, lambda s: s, 12, "its width, 768"), (1024, lambda s: s, 16, "its width, 1024"),
    (1280, lambda s: s, 16, "its width, 1280")])
def test_files_that_decide_their_heads(tmp_path, width, make, heads, why):
    state = ViT(image_size=28, patch_size=14, width=width, depth=1, heads=1).state_dict()
    path = save(make(state), tmp_path / "x.pth")
    assert load_vit(path).config["heads"] == load_vit(path, heads).config["heads"] == heads
    assert f"{heads} heads by {why}, not 4" in refusal(f"{path}:4")          # nobody overrules it


def test_heads_that_the_caller_decides(tmp_path):
    path = save(scrambled_vit().state_dict(), tmp_path / "x.pth")
    assert re.search("48 wide.*append it to the name, x.pth:12", refusal(path))
    assert "5 heads: must divide" in refusal(path, 5) and "0 heads: must" in refusal(f"{path}:0")
    odd = shutil.copy(path, tmp_path / "a.pth:3")                # a name, not a number of heads
    assert split_heads(f"{path}:6") == (path, 6) and split_heads(odd) == (odd, None)
    assert {load_vit(*x).config["heads"] for x in ((path, 6), (f"{path}:6", 6), (odd, 6),
                                                   (f"{odd}:6",))} == {6}
    assert "12 heads: give one" in refusal(f"{odd}:6", 12)


def saved(content, **options):
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


REFUSED = {
    "empty": (lambda s: b"", "truncated: fetch it again"),
    "cut": (lambda s: saved(s)[:-100], "truncated: fetch it again"),
    "cut, legacy": (lambda s: saved(s, _use_new_zipfile_serialization=False)[:-100], "fetch it"),
    "text": (lambda s: b"version https://git-lfs.github.com/spec/v1\n", "no PyTorch file; give"),
    "code": (lambda s: {"model": s, "args": os.system}, "it holds code"),
    "code, pickled": (lambda s: pickle.dumps({"model": s, "args": os.system}), "it holds code"),
    "tensor": (lambda s: s["pos_embed"], "holds no state dict: Tensor"),
    "nothing": (lambda s: {}, r"no pos_embed, patch_embed and blocks .*\(, ...\)"),
    "distilled": (lambda s: s | {"dist_token": s["cls_token"]}, "no plain ViT: .*dist_token"),
    "scale": (lambda s: s | {"blocks.9.ls1.gamma": s["norm.bias"]}, "holds no plain ViT"),
    "registers": (lambda s: s | {"reg_token": s["cls_token"]}, "register tokens .reg_token.: take"),
    "DINOv3": (lambda s: s | {"rope_embed.periods": s["norm.bias"]}, "rotary positions, as DINOv3"),
    "SwiGLU": (lambda s: s | {"blocks.0.mlp.w12.weight": s["norm.bias"]}, "a ViT with SwiGLU"),
    "CLIP": (lambda s: s | {"vision_model.pre_layrnorm.bias": s["norm.bias"]}, "CLIP, with a norm"),
    "open CLIP": (lambda s: under("visual.", s), "CLIP, with a norm"),
    "SigLIP": (lambda s: under("attn_pool.", s), "SigLIP, which has no class token"),
    "ConvNeXt": (lambda s: under("stages.0.", {"0.dwconv.weight": s["norm.bias"]}), "ConvNeXt"),
    "BEiT": (lambda s: s | {"blocks.0.attn.relative_position_bias_table": s["norm.bias"]}, "BEiT"),
    "Swin": (lambda s: under("layers.0.blocks.", s), "Swin, whose"),
    "no keys": (lambda s: {n.replace("attn.qkv", "attention.query"): s[n][:48] if "qkv" in n else
                           s[n] for n in s}, "size mismatch .*qkv"),
    "no positions": (lambda s: s | {"pos_embed": torch.ones(1, 0, 48)}, "no plain ViT: .*multiple"),
    "grey": (lambda s: s | {"patch_embed.proj.weight": torch.ones(48, 1, 8, 8)}, "of 1 channels"),
    "twice": (lambda s: s | under("module.", s), "cls_token twice, under different prefixes"),
    "resumable": (lambda s: dict(model=s, images=3, optimizer={}), "student.pth or model.pth")}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(tmp_path, case):
    make, reason = REFUSED[case]
    content, path = make(scrambled_vit().state_dict()), tmp_path / "x.pth"
    path.write_bytes(content if isinstance(content, bytes) else saved(content))
    assert re.search(f"^{re.escape(str(path))}.*{reason}", refusal(path, 3))


def test_missing_files_and_readers(tmp_path, monkeypatch):
    address = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_base.pth"
    assert address in refusal(tmp_path / "x.pth") and address in refusal(f"{tmp_path}/x.pth:3")
    assert "is a folder: name the file" in refusal(tmp_path)
    (tmp_path / "x.safetensors").touch()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "pip install safetensors" in refusal(tmp_path / "x.safetensors")


def test_an_address_is_downloaded_once_or_leaves_nothing(folder, teacher, tmp_path, monkeypatch):
    """The folder tmp_path/www stands for the network; a lost connection leaves half a file."""
    def urlopen(request):
        requests.append(request.full_url)
        return urllib.request.urlopen(request.full_url.partition("?")[0].replace(host, files))

    www, host, requests = tmp_path / "www", "https://host:80", []
    files, whole = www.as_uri(), Path(teacher).read_bytes()
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    www.mkdir()
    (www / "x.pth").write_bytes(whole)
    (www / "cut.pth").write_bytes(whole[:len(whole) // 2])
    (www / "page.pth").write_text("<html>log in</html>")
    for _ in range(2):
        assert equal(load_vit(f"{host}/x.pth").state_dict(), load_vit(teacher).state_dict())
    assert len(requests) == 1
    assert dmae.fetch(f"{host}/x.pth?download=true").suffix == ".pth"
    out = main(arguments(folder, f"{host}/x.pth:3", "--epochs 0", tmp_path / "out"))
    content = json.loads((out / "config.json").read_text())
    assert content["teacher_sha256"] == hashlib.sha256(whole).hexdigest()
    cache = files_in(tmp_path / "cache")
    for name in ("cut", "no", "page"):
        assert f"{host}/{name}.pth cannot be had (" in refusal(f"{host}/{name}.pth")
    assert files_in(tmp_path / "cache") == cache and len(cache) == 2


@pytest.mark.parametrize("shift", [0, 24])                       # 24: swapped halves, as in MoCo-v3
def test_sincos_positions_by_hand_and_for_another_grid(shift):
    table = [[wave(place * 10000 ** (-k / 12)) for place in (column, row)
              for wave in (math.sin, math.cos) for k in range(12)]
             for row in range(2) for column in range(6)]
    torch.testing.assert_close(sincos_positions(48, (2, 6)), torch.tensor([table]))
    vit = scrambled_vit()
    cls = vit.pos_embed[:, :1].clone()
    rounded = sincos_positions(48, (4, 4)).bfloat16()                    # as some files have it
    vit.pos_embed.data[:, 1:] = rounded.roll(shift, 2)
    assert resize_grid(vit, [2, 6]) is vit and not vit.pos_embed.requires_grad
    expected = torch.cat([cls, sincos_positions(48, (2, 6)).roll(shift, 2)], dim=1)
    assert torch.equal(vit.pos_embed, expected) and vit.config["image_size"] == [16, 48]
    learnt = vit.pos_embed.requires_grad_(True)
    assert resize_grid(vit, [2, 6]).pos_embed is learnt          # nothing to do
    assert resize_grid(vit, [1, 3]).pos_embed.requires_grad


# ============================================================================================= data

RAW = dict(mean=(0, 0, 0), std=(1 / 255,) * 3, crop_scale=0.08)               # leaves 0 to 255


def test_sets_have_the_published_numbers():
    for name, mean, std in (                                    # of all pixels to train on
            ("fashion-mnist", [0.2860], [0.3530]),
            ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
            ("cifar100", [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762])):
        assert [*SETS[name]["mean"], *SETS[name]["std"]] == pytest.approx(mean + std, abs=5.1e-4)
    assert [SETS[name]["channels"] for name in list(SETS)[:4]] == [3, 1, 3, 3]


def test_crops_are_distributed_as_torchvisions():
    crops = data.random_crops(30_000, 0.2, torch.manual_seed(0))
    assert 0.49 < (crops[:, 0, 0] < 0).float().mean() < 0.51           # half are mirrored
    sides = crops[:, [0, 1], [0, 1]].abs()                             # of the image: width, height
    starts = (1 + crops[:, :, 2] - sides) / 2
    assert -1e-6 < starts.min() < 1e-3 and 0.999 < (starts + sides).max() < 1 + 1e-6
    image = torch.empty(1, 9999, 9999, device="meta")
    torchvisions = v2.RandomResizedCrop.get_params
    boxes = [torchvisions(image, (0.2, 1), (3 / 4, 4 / 3)) for _ in range(3000)]
    theirs = torch.tensor(boxes)[:, [1, 0, 3, 2]] / 9999
    a, b = (torch.cat([x, x**2, x[:, 2:3] * x[:, 3:], (x[:, 2:3] / x[:, 3:]).log()], dim=1)
            for x in (torch.cat([starts, sides], dim=1), theirs))
    sigma = (a.var(dim=0) / len(a) + b.var(dim=0) / len(b)).sqrt()
    assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * sigma).all()
    whole = data.random_crops(9, 1, torch.manual_seed(0)).abs()        # as none of ten tries fits
    assert torch.equal(whole, torch.eye(2, 3).expand(9, 2, 3))


def test_augment_is_torchvisions_resized_crop_image_by_image():
    images, flip, size = noise(5, 3, 32, 32), torch.tensor([1, 0, 0, 1, 1]).bool(), (40, 64)
    boxes = torch.tensor([[0, 0, 32, 32], [5, 9, 16, 12], [0, 20, 14, 12], [1, 2, 20, 25],
                          [10, 0, 22, 30]])                            # top, left, height, width
    corner, sides = boxes[:, [1, 0]], boxes[:, [3, 2]]                 # x before y
    crops = torch.cat([torch.diag_embed(sides / 32), ((2 * corner + sides) / 32 - 1)[..., None]], 2)
    crops[:, 0, 0] *= torch.where(flip, -1, 1)
    source, found = data.SmallSet(images, None, (), RAW, size), []
    # Near its edge a crop sees the image beside it: half a pixel far, a bicubic one 1.5.
    for kind, bicubic, edge in (("bilinear", False, 3), ("bicubic", True, 9)):
        ours = source.augment(images, crops, torch.zeros(5), torch.tensor([bicubic] * 5))
        theirs = torch.stack([
            TF.resized_crop(x.float(), *box, size, InterpolationMode(kind), antialias=False)
            for x, box in zip(images, boxes.tolist(), strict=True)]).clamp(0, 255)
        difference = (ours - torch.where(flip.view(5, 1, 1, 1), theirs.flip(-1), theirs)).abs()
        assert difference[0].max() < 5e-3                              # the whole image
        assert difference[..., edge:-edge, edge:-edge].max() < 5e-3 and difference[1:].max() > 5
        found.append(ours)
    mixed = source.augment(images, crops, torch.zeros(5), flip)                # each by its own
    assert torch.equal(mixed, torch.where(flip.view(5, 1, 1, 1), found[1], found[0]))
    source.policy = lambda image: image                        # gets the nearest whole numbers
    rounded = source.augment(images, crops, torch.zeros(5).long(), flip)
    assert (rounded - mixed).abs().max() < 0.51


def test_sources_normalise_and_a_subset_keeps_its_labels(tmp_path):
    images, row, ids = noise(6, 3, 32, 32), SETS["cifar10"], torch.tensor([4, 1, 2])
    source = data.SmallSet(images, torch.arange(6), (), row, (32, 32))
    (plain, labels), = source.plain(ids)
    torch.testing.assert_close(plain, TF.normalize(images[ids] / 255, row["mean"], row["std"]))
    assert torch.equal(labels, ids)
    (large, _), = data.SmallSet(images, None, (), RAW, (48, 64)).plain(ids)
    theirs = TF.center_crop(TF.resize(images[ids], 73, InterpolationMode.BICUBIC), (48, 64))
    torch.testing.assert_close(large, theirs.float())             # 73: 64 * 256 / 224
    coins = [source.draw(10_000, torch.Generator().manual_seed(seed))[2] for seed in (0, 0, 1)]
    assert 0.48 < coins[0].float().mean() < 0.52 and torch.equal(coins[0], coins[1])
    assert not torch.equal(coins[0], coins[2])
    source.bicubic = 1.0
    assert source.draw(100, torch.manual_seed(0))[2].all()
    source.subset(torch.tensor([5]))
    (left, labels), = source.batches([torch.tensor([0])], 0)
    assert len(source) == 1 and torch.equal(left, images[5:]) and labels.tolist() == [5]
    source = image_folder(tmp_path, row=RAW)
    flip, = source.draw(10_000, torch.manual_seed(0))
    out = source.augment(torch.tensor([1, 2]).expand(10_000, 3, 1, 2), flip)[:, 0, 0, 0]
    assert torch.equal(out.round() == 2, flip) and 0.48 < flip.float().mean() < 0.52


@pytest.mark.parametrize("decode", [data.decode_jpeg, None, Mock(side_effect=RuntimeError)])
def test_read_image_understands_every_kind_of_pixel(tmp_path, monkeypatch, decode):
    rgba = noise(5, 7, 4).numpy()
    rgb, grey, alpha = rgba[..., :3], rgba[..., :1], rgba[..., 3:] / 255
    deep = (grey * 257.0 + 200).clip(0, 65535).astype(np.uint16)
    deep[0, :3, 0] = 0, 32768, 65535
    index, colours = rgb[..., 0] % 4, noise(4, 3).numpy()
    glass = np.where(np.arange(4)[:, None] == 2, 255, colours)     # entry 2 shows the white below
    palette = Image.fromarray(index)
    palette.putpalette(colours.tobytes())
    cases = {                       # file: (image, how it should look, options of its file)
        "16-bit.png": (Image.fromarray(deep[..., 0]), deep / 257, {}),
        "one entry transparent.png": (palette, glass[index], dict(transparency=2)),
        "rgba.png": (Image.fromarray(rgba), rgb * alpha + 255 * (1 - alpha), {})}
    for exif, quarters in ((1, 0), (3, 2), (6, -1), (8, 1)):       # how far it is turned
        head = struct.pack("<6s2sHIHHHIII", b"Exif", b"II", 42, 8, 1, 0x0112, 3, 1, exif, 0)
        for mode in ("RGB", "L", "CMYK"):
            image = Image.fromarray(rgb).resize((70, 90)).convert(mode)
            image.save(tmp_path / "0.jpg")
            seen = np.rot90(Image.open(tmp_path / "0.jpg").convert("RGB"), quarters)
            cases[f"{mode}{exif}.jpg"] = image, seen, dict(exif=head)
    monkeypatch.setattr(data, "decode_jpeg", decode)               # Pillow reads the very same
    for name, (image, expected, options) in cases.items():
        image.save(tmp_path / name, **options)
        pixels = read_image(tmp_path / name).permute(1, 2, 0).numpy()
        assert pixels.dtype == np.uint8 and pixels.shape == (*expected.shape[:2], 3), name
        assert np.abs(pixels - expected.astype(float)).max() <= 0.51, name     # to the nearest
    # What cannot be decoded is named.
    half = (tmp_path / "RGB1.jpg").read_bytes()[:700]
    Image.fromarray(np.float32([[0, 0.5]])).save(tmp_path / "float.tif")       # is white 1 or 255?
    for name, content in {"cut.jpg": half, "end.jpg": half[:300] + b"\xff\xd9", "empty.png": b"",
                          "float.tif": (tmp_path / "float.tif").read_bytes()}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
            read_image(tmp_path / name)


def test_folder_of_train_and_val_has_a_class_per_folder(tmp_path):
    def open_it(**options):
        return data.open_data(str(tmp_path), data.FOLDER, (8, 8), **options)

    names = ["cat/0.png", "cat/1.JPEG", "dog/0.webp", "emu/old/0.png"]
    write_images(tmp_path, *(f"{part}/{name}" for part in ("train", "val") for name in names))
    write_images(tmp_path / "train", ".thumbnails/0.png", "cat/._0.png", ".0.png")
    (tmp_path / "train" / "notes.txt").touch()
    train, test = open_it()
    assert list(train.items) == [str(tmp_path / "train" / name) for name in names]
    assert train.labels.tolist() == test.labels.tolist() == [0, 0, 1, 2]
    assert train.classes == ["cat", "dog", "emu"] and train.root == tmp_path / "train"
    few, _ = open_it(train_images=3)
    assert few.labels.tolist() == [0, 0, 2]                            # not the first three
    assert open_it(device="meta")[1].device.type == "meta"
    assert data.find_images(tmp_path / "train" / "emu")[1:] == (None, ["old"])      # one class only
    write_images(tmp_path, "val/bird/0.png")             # its numbers would mean something else
    assert open_it()[0].labels is not None and open_it()[1].labels is None
    os.symlink(tmp_path / "val" / "bird", tmp_path / "train" / "linked")
    write_images(tmp_path, "train/0.png")                # an image without a class
    assert len(open_it()[0]) == 6 and open_it()[0].labels is None


def test_folder_crops_depend_on_seed_epoch_and_index_alone(tmp_path):
    write_images(tmp_path, *(f"{i}.png" for i in range(8)), height=12)
    shuffled = torch.randperm(8, generator=torch.manual_seed(0)).view(2, 4)

    def crops(order=shuffled, epoch=3, **options):
        images = [x for x, _ in image_folder(tmp_path, **options).batches(order, epoch)]
        return torch.cat(images)[order.flatten().argsort()]

    assert torch.equal(crops(), crops(workers=2))
    source = image_folder(tmp_path, workers=2)
    source.policy = lambda image: torch.full_like(image, os.getpid() % 251)
    assert len(torch.cat([x for x, _ in source.batches(shuffled, 3)]).unique()) == 2
    assert torch.equal(crops(), crops(order=shuffled.flip(0, 1)))
    for other in (crops(epoch=4), crops(seed=1)):
        assert (other != crops()).flatten(1).any(dim=1).all()
    one = image_folder(tmp_path, row=data.FOLDER | dict(crop_scale=1.0))
    for one.bicubic, kind in ((0, "bilinear"), (1, "bicubic")):
        small = TF.resize(noise(3, 12, 12), [8, 8], InterpolationMode(kind))
        assert torch.equal(one.prepare(noise(3, 12, 12), 3, 0), small)
    one.crop_scale = 0.08                              # of one image, whatever its place
    assert len({str(one.prepare(noise(3, 12, 12), 3, i)) for i in range(8)}) > 4
    assert not list(image_folder(tmp_path).plain(torch.arange(0)))     # a process without a share
    # Evaluation is a resize, here as Pillow does it, and a centre crop.
    write_images(tmp_path, "large/0.png", height=60, width=80)
    (plain, _), = image_folder(tmp_path / "large", row=RAW, size=(16, 28)).plain(torch.arange(1))
    small = TF.resize(Image.open(tmp_path / "large/0.png"), 32, InterpolationMode.BICUBIC)
    assert (plain[0] - TF.pil_to_tensor(TF.center_crop(small, (16, 28)))).abs().max() < 1.5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_replaced_by_the_next_with_its_label(tmp_path, workers, capsys):
    for i in range(300):                                       # an image's colour is its class
        path = tmp_path / "ab"[i // 150] / f"{i:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8), 200 * (i // 150)).save(path)
        if i in (148, 149, 299):                               # 1 %; after the last comes the first
            path.write_bytes(b"")
    source, order = image_folder(tmp_path, row=RAW, workers=workers), torch.arange(300).view(6, 50)
    for batches in (source.batches(order, 0), source.batches(order, 1), source.plain(order[-1])):
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.equal(labels, (images[:, 0, 4, 4] > 100).long())
        assert labels.tolist() == ([0] * 148 + [1] * 151 + [0])[-len(labels):]
    assert [path[-7:] for path in sorted(source.broken)] == ["148.png", "149.png", "299.png"]
    assert len(capsys.readouterr().out.splitlines()) == 3      # each is named once
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"\A4 of 300 images [^\n]*000.png\Z"):     # no further
        list(image_folder(tmp_path, workers=workers).batches(order, 0))


def test_shapes_are_balanced_and_pixels_tell_little():
    images, labels, _ = data.draw_shapes(500, 1)
    assert images.dtype == torch.uint8 and images.shape == (500, 3, 32, 32)
    assert labels.bincount().tolist() == [50] * 10
    u, v = torch.meshgrid(*[(torch.arange(1000) + 0.5) / 500 - 1] * 2, indexing="xy")
    for figure, area in zip(data.FIGURES, (                           # as geometry has it
            math.pi * 0.8**2, math.pi * (0.9**2 - 0.5**2), 1.4**2, 1.66**2 - 0.94**2,
            3 * 3**0.5 / 4, 2 * 1.8 * 0.5 - 0.5**2, 3 / (0.6 / math.tan(math.pi / 5) + 0.8),
            3 * 0.34 * 1.7, 9 * math.pi * 0.22**2, 1.7**2 / 2), strict=True):
        drawn = (data.figure_distance(figure, u, v) < 0).float().mean().item() * 4
        assert drawn == pytest.approx(area, abs=1e-3), figure
    (bank, a), (test, b) = (
        [torch.cat(parts) for parts in zip(*source.plain(torch.arange(len(source))), strict=True)]
        for source in data.open_data("shapes", SETS["shapes"], (32, 32), train_images=10_000))
    assert (len(bank), len(test)) == (10_000, 2_000)
    assert bank.mean().abs() < 0.1 and 0.8 < bank.std() < 1.2
    for x, known in ((bank, -1.27), (test, 9.83)):                 # those of the committed results
        assert (x[-500:] * wave("shapes", (500, 3, 32, 32))).sum() == pytest.approx(known, abs=0.05)
    accuracy = knn_top1(bank.flatten(1), a, test.flatten(1), b)
    assert 0.12 < accuracy < 0.40                        # chance is 0.10, with a deviation of 0.007


def cars_list(*numbers):
    rows = [(39, number, f"0000{i}.jpg") for i, number in enumerate(numbers, 1)]
    fields = [("bbox_x1", np.uint16), ("class", np.uint8), ("fname", object)]
    return {"annotations": np.array([rows], fields)}


def inat_list(**images):                                 # name: (image's id, class's id)
    return json.dumps(dict(
        images=[dict(id=image, file_name=f"train_val2018/Plantae/{kind}/{name}.jpg")
                for name, (image, kind) in images.items()],
        annotations=[dict(id=n, image_id=image, category_id=kind)
                     for n, (image, kind) in enumerate(sorted(images.values()))],
        categories=[dict(id=kind, name=name) for kind, name in       # in no order, with gaps
                    ((7, "Abies alba"), (2, "Zea mays"), (5000, "Bufo bufo"))]))


# The sets as they are published, in miniature: a set's folder and the lists in it. What these say:
# images' paths around their names; the class of each, in order, to train and to test on; and names
# of classes.
TRANSFER = {
    "flowers": ("flowers-102", {
        "imagelabels.mat": {"labels": np.uint8([[3, 1, 102, 2, 1, 77]])},
        "setid.mat": {"trnid": np.uint16([[5, 2]]), "valid": np.uint16([[1, 6]]),
                      "tstid": np.uint16([[4, 3]])}},
        "jpg/image_0000{}.jpg", {5: 0, 2: 0, 1: 2, 6: 76}, {4: 1, 3: 101},
        {0: "pink primrose", 2: "canterbury bells", 101: "blackberry lily"}),
    "pets": ("oxford-iiit-pet", {
        "annotations/trainval.txt": "Egyptian_Mau_1 3 1 2\nAbyssinian_10 1 1 1\npug_7 2 2 1\n",
        "annotations/test.txt": "pug_2 2 2 1\nEgyptian_Mau_20 3 1 2\nAbyssinian_3 1 1 1\n"},
        "images/{}.jpg", {"Egyptian_Mau_1": 2, "Abyssinian_10": 0, "pug_7": 1},
        {"pug_2": 1, "Egyptian_Mau_20": 2, "Abyssinian_3": 0},
        {0: "Abyssinian", 1: "Pug", 2: "Egyptian Mau"}),
    "aircraft": ("fgvc-aircraft-2013b", {
        "data/variants.txt": "707-320\nBoeing 717\nF/A-18\n",
        "data/images_variant_trainval.txt": "034 F/A-18\n102 Boeing 717\n005 707-320\n",
        "data/images_variant_test.txt": "062 Boeing 717\n048 707-320\n"},
        "data/images/{}.jpg", {"034": 2, "102": 1, "005": 0}, {"062": 1, "048": 0},
        {0: "707-320", 1: "Boeing 717", 2: "F/A-18"}),
    "cars": ("stanford_cars", {
        "devkit/cars_meta.mat": {"class_names": np.array([["Hummer", "Acura RL", "Ram"]], object)},
        "devkit/cars_train_annos.mat": cars_list(3, 1, 3),
        "cars_test_annos_withlabels.mat": cars_list(2, 3)},
        "cars_{}.jpg", {"train/00001": 2, "train/00002": 0, "train/00003": 2},
        {"test/00001": 1, "test/00002": 2}, {0: "Hummer", 1: "Acura RL", 2: "Ram"}),
    "inat18": ("inat18", {
        "train2018.json": inat_list(b=(31, 7), c=(4, 2), a=(12, 5000)),
        "val2018.json": inat_list(e=(90, 5000), d=(80, 7))},
        "train_val2018/Plantae/{}.jpg", {"7/b": 1, "2/c": 0, "5000/a": 2}, {"5000/e": 2, "7/d": 1},
        {0: "Zea mays", 1: "Abies alba", 2: "Bufo bufo"})}


@pytest.fixture
def asked(monkeypatch):
    """What asks the network, which is not there; nor are the published checksums."""
    network = Mock(side_effect=urllib.error.URLError("no network"))
    monkeypatch.setattr(urllib.request, "urlopen", network)
    for module in (torchvision.datasets.flowers102, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5: os.path.exists(path))
    return network


def refused(words, name, data_dir, **options):
    with pytest.raises(InputError, match=rf"\A[^\n]*{words}[^\n]*\Z"):
        data.open_data(str(name), SETS.get(name, data.FOLDER), (32, 32), data_dir, **options)


@pytest.mark.parametrize("name", TRANSFER)
def test_transfer_sets_are_read_as_they_are_published(name, tmp_path, asked):
    folder, lists, path, *parts, names = TRANSFER[name]
    folder = tmp_path / folder
    write_images(folder, *(path.format(image) for image in itertools.chain(*parts)))
    for file, content in lists.items():
        (folder / file).parent.mkdir(exist_ok=True)
        if file.endswith(".mat"):
            pytest.importorskip("scipy.io").savemat(folder / file, content)
        else:
            (folder / file).write_text(content)
    sources = data.open_data(name, SETS[name], (16, 24), tmp_path, device="meta")
    for source, part in zip(sources, parts, strict=True):
        assert list(source.items) == [str(folder / path.format(image)) for image in part]
        torch.testing.assert_close(source.labels, torch.tensor(list(part.values())))
        assert {i: source.classes[i] for i in names} == names
        found = next(source.plain(torch.tensor([0])))
        assert found[0].shape == (1, 3, 16, 24) and {x.device.type for x in found} == {"meta"}
    assert not asked.called
    for file in lists:                                                   # a list is cut in half
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:len(content) // 2])
        refused(f"--data {name}: .*--data-dir", name, tmp_path)
        (folder / file).write_bytes(content)


def write_cifar(root, folder, parts, meta, fine=""):
    """Returns what its files say: images and labels, to train and to test on."""
    def write(file, **content):
        (root / folder / file).write_bytes(pickle.dumps(content))

    (root / folder).mkdir()
    write(meta, **{"coarse_label_names": ["d"], f"{fine}label_names": ["a", "b", "c"]})
    sets = [(noise(2 * len(part), 3, 32, 32), noise(2 * len(part)) % 3) for part in parts]
    for part, (images, labels) in zip(parts, sets, strict=True):
        for file, two, kinds in zip(part, images.split(2), labels.split(2), strict=True):
            write(file, data=two.flatten(1).numpy(),                 # all red, all green, all blue
                  **{"coarse_labels": [0, 0], f"{fine}labels": kinds.tolist()})
    return sets


def test_small_sets_are_read_as_they_are_published(tmp_path, asked):
    fashion = [(noise(count, 28, 28), noise(count, seed=1) % 10) for count in (12, 5)]
    for part, tensors in zip(("train", "t10k"), fashion, strict=True):
        for kind, x in zip(("images-idx3", "labels-idx1"), tensors, strict=True):
            path = tmp_path / f"FashionMNIST/raw/{part}-{kind}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            head = struct.pack(f">{1 + x.ndim}I", 0x800 + x.ndim, *x.shape)
            path.write_bytes(head + x.numpy().tobytes())
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for name, sets in {
            "cifar10": write_cifar(tmp_path, "cifar-10-batches-py", [batches, ["test_batch"]],
                                   "batches.meta"),
            "cifar100": write_cifar(tmp_path, "cifar-100-python", [["train"], ["test"]], "meta",
                                    "fine_"),
            "fashion-mnist": [(F.pad(x[:, None], (2, 2, 2, 2)), y) for x, y in fashion]}.items():
        sources = data.open_data(name, SETS[name], (32, 32), tmp_path)
        for source, (images, labels) in zip(sources, sets, strict=True):
            assert torch.equal(source.items, images)
            torch.testing.assert_close(source.labels, labels.long())
            assert name[0] == "f" or source.classes == ["a", "b", "c"]
    main(["--data", name, "--data-dir", str(tmp_path), "--teacher", "none", "--epochs", "0",
          "--batch-size", "8", "--out", str(tmp_path / "out")])
    assert not asked.called


def test_what_is_missing_is_said_in_one_line(tmp_path, asked):
    for name, files in (
            ("fashion-mnist", "FashionMNIST/raw/"), ("cifar10", "cifar-10-batches-py/"),
            ("cifar100", "cifar-100-python/"), ("flowers", "flowers-102/.*jpg/"),
            ("pets", "oxford-iiit-pet/"), ("aircraft", "fgvc-aircraft-2013b/")):
        refused(f"--data {name}: .*no network.*{files}.*--data-dir", name, tmp_path)
    requests = asked.call_count
    for name, files in (("cars", "cars_train/.*cars_test/.*devkit/.*_annos_withlabels.mat"),
                        ("inat18", "train2018.json.*val2018.json.*train_val2018/")):
        refused(f"--data {name}: .*{files}.*--data-dir", name, tmp_path)
    assert asked.call_count == requests                      # these cannot be downloaded
    refused("cifar11: .*shapes, fashion-mnist, cifar10, cifar100", "cifar11", tmp_path)
    write_images(tmp_path, "two/0.png", "two/1.png", "none/val/0.png")
    (tmp_path / "none" / "train").mkdir()
    refused("none: no images", tmp_path / "none", tmp_path)
    for count in (0, 3):
        refused(f"--train-images {count}: .*1 to 2", tmp_path / "two", ".", train_images=count)


@pytest.mark.parametrize("small", [True, False])
def test_each_image_has_a_seed_of_its_own_for_the_policy(tmp_path, small):
    write_images(tmp_path, *(f"{i}.png" for i in range(6)))
    source = (data.SmallSet(noise(6, 3, 10, 10), None, (), RAW, (8, 8)) if small
              else image_folder(tmp_path, row=RAW))
    source.policy = lambda image: torch.full_like(image, torch.initial_seed() % 251)

    def found(order, epoch=0):
        generator = torch.Generator().manual_seed(epoch)
        parts = [source.augment(images, *source.draw(3, generator))
                 for images, _ in source.batches(order, epoch)]
        return torch.cat(parts)[order.flatten().argsort()].flatten(1)

    order = torch.arange(6).view(2, 3)
    once = found(order)
    assert (once == once[:, :1]).all() and len(once[:, 0].unique()) >= 5
    assert torch.equal(once, found(order)) and not torch.equal(once, found(order, epoch=1))
    assert small or torch.equal(once, found(order.flip(0, 1)))     # by index, whenever it is read


def test_grey_images_before_an_encoder_of_colour_ones():
    images = noise(4, 1, 16, 16)
    source = data.SmallSet(images, None, (), RAW, (16, 16))
    source.policy = finetune.rand_augment(10, 116)
    for seed in range(30):
        augmented = source.augment(images, *source.draw(4, torch.Generator().manual_seed(seed)))
        assert augmented.shape == (4, 3, 16, 16) and torch.equal(augmented[:, 0], augmented[:, 2])
    plain, _ = next(source.plain(torch.arange(4)))
    torch.testing.assert_close(plain, images.expand(-1, 3, -1, -1).float())


# ========================================================================================= training


def test_groups_partition_the_parameters_and_spare_biases_and_norms():
    model = DMAE(MAE(ViT(depth=1)), ViT(width=768, depth=1))
    decayed, free = parameter_groups(model, 0.05)
    names = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    block = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert {names[id(p)] for p in decayed["params"]} == {
        "mixers.scores:1:1", "student.mask_token", "student.encoder.cls_token",
        "student.encoder.patch_embed.proj.weight", "student.decoder_embed.weight",
        "student.decoder_pred.weight"} | {
        f"student.{part}.0.{n}" for part in ("encoder.blocks", "decoder_blocks") for n in block}
    assert sorted(id(p) for p in decayed["params"] + free["params"]) == sorted(names)


def test_knn_against_votes_by_hand():
    torch.manual_seed(0)
    bank, test = 3 + torch.randn(60, 5), 3 + torch.randn(600, 5)          # all look much the same
    labels = torch.randint(4, (60,))
    similarity = torch.cosine_similarity(test[:, None], bank, dim=2)                        # 600 60
    votes = (similarity / 0.07).exp() * (similarity >= similarity.topk(20).values[:, -1:])
    answers = (votes @ F.one_hot(labels, 4).float()).argmax(1)
    assert knn_top1(bank, labels, 3 * test, answers) == 1            # each answer is the same
    assert knn_top1(bank, labels, test, torch.where(torch.arange(600) < 150, 3 - answers,
                                                    answers)) == 0.75
    assert knn_top1(bank, labels, bank, labels, k=1) == 1


def test_an_epochs_order_and_a_batchs_division():
    def run(batch, world, rank=0):
        return SimpleNamespace(s=argparse.Namespace(batch_size=batch, out=None), world=world,
                               rank=rank)

    order, again, epoch, seed = (
        dmae.epoch_order(23, argparse.Namespace(batch_size=5, seed=seed), epoch)
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)))
    assert order.shape == (4, 5) and len(order.unique()) == 20 and order.max() < 23
    assert torch.equal(order, again) and not any(torch.equal(order, x) for x in (epoch, seed))
    assert data.seed_of(0, 1) == 4499712255002397205     # a run is continued with the same seeds
    assert dmae.Run.divide(run(8, 2, rank=1), 100) == (12, 4, slice(4, 8))
    assert dmae.Run.divide(run(100, 1), 100) == (1, 100, slice(0, 100))
    with pytest.raises(InputError, match="not for 3 processes"):
        dmae.Run.divide(run(8, 3), 100)
    with pytest.raises(InputError, match="--out DIR"):                # each would take its own
        dmae.Run.open_folder(run(8, 2))


def draw(root, train, test, names, image_of):
    """A folder of train + test pictures, in turn of each class."""
    for i in range(train + test):
        path = root / ("train" if i < train else "val") / names[i % len(names)] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image_of(i).byte().numpy()).save(path)
    return str(root)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 + 16 images of 16 pixels in eight classes: gradients one way or the other, four hues."""
    def image(i):
        ramp = 11 * torch.arange(16)[:, None, None].expand(16, 16, 3)
        ramp = ramp if i % 2 else ramp.transpose(0, 1)
        hue = torch.tensor([40 * (i // 2 % 2), 40 * (i // 4 % 2), 0])
        return ramp + hue + noise(3, seed=i) // 8 + noise(16, 16, 3, seed=i) // 25
    return draw(tmp_path_factory.mktemp("images"), 40, 16, "abcdefgh", image)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of a ViT 24 wide, 3 deep, 3 heads, grid 4 x 4, as this project writes it."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_student(path, MAE(ViT(32, 8, 3, 24, 3, 3), 16, 1, 2))
    return str(path)


def arguments(folder, teacher, more="", out="out"):
    more = ("--image-size 16 --patch-size 4 --student nano --epochs 2 --batch-size 8 --blr 0.03 "
            f"--workers 0 {more}")
    return ["--data", str(folder), "--teacher", str(teacher), *more.split(), "--out", str(out)]


def content_of(out, name="student.pth"):
    return torch.load(Path(out) / name, weights_only=True)


def weights(out):
    parts = content_of(out)
    return {f"{part}.{n}": t for part in ("model", "decoder", "mixers")
            for n, t in parts[part].items()}


def log_of(out, times=()):
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


def same_log(a, b):
    a, b = (log_of(out, times=("images_per_second", "minutes")) for out in (a, b))
    return a == b


def same_run(a, b):
    return equal(weights(a), weights(b)) and same_log(a, b)


def files_in(*folders):
    return {p: p.read_bytes() for folder in folders for p in Path(folder).rglob("*") if p.is_file()}


def same_function(a, b):
    """Weights whose gradient is zero but for rounding (key biases) may differ: compare features."""
    vits = [load_vit(Path(out) / "student.pth") for out in (a, b)]
    assert log_of(a)[-1]["loss"] == pytest.approx(log_of(b)[-1]["loss"], rel=1e-3)
    return torch.allclose(*(vit.encode(some_images(vit)) for vit in vits), atol=2e-3)


@pytest.fixture(scope="module")
def run(folder, teacher, tmp_path_factory):
    """A finished run to compare others with."""
    return main(arguments(folder, teacher, out=tmp_path_factory.mktemp("runs") / "plain"))


RUN_FILES = {"config.json", "log.jsonl", "checkpoint.pth", "student.pth", "reconstruction.png",
             "attention.png"}


def test_a_run_leaves_what_it_should(run, folder, teacher):
    log, saved, student = log_of(run), content_of(run), load_vit(run / "student.pth")
    assert {p.name for p in run.iterdir()} == RUN_FILES
    assert [(x["epoch"], x["step"]) for x in log] == [(0, 0), (1, 5), (2, 10)]
    assert log[2]["mae"] < log[1]["mae"]
    assert " ".join(log[2]) == "epoch step lr images_per_second loss mae scores knn"
    assert log[0]["knn"] and "knn" not in log[1]                 # of so few images: a waste of time
    assert {n: p.shape for n, p in saved["mixers"].items()} == {"scores:4:3": (3, 4)}
    assert saved["config"] == student.config | dict(
        decoder_width=32, decoder_depth=1, decoder_heads=2, mask_ratio=0.75, norm_pix=True,
        decode_after=4, match=["scores"])
    checkpoint = content_of(run, "checkpoint.pth")
    assert " ".join(checkpoint) == "model optimizer scaler log images classes"
    groups = checkpoint["optimizer"]["param_groups"]
    assert [(g["betas"], g["eps"], g["weight_decay"]) for g in groups] == [
        ((0.9, 0.95), 1e-8, 0.05), ((0.9, 0.95), 1e-8, 0)]
    lines = [dict(knn_pixels=0.1, knn=0.2, knn_teacher=0.3), dict(knn=0.4)]
    assert re.findall(r"(\w+) +([\d.]+) %", dmae.summary(lines)) == [
        ("pixels", "10.0"), ("untrained", "20.0"), ("student", "40.0"), ("teacher", "30.0")]
    # k-NN of pixels, and of the mean patch token behind a norm without weights.
    images, labels = zip(*(next(source.plain(torch.arange(len(source)))) for source in
                           data.open_data(folder, data.FOLDER, (16, 16))))
    eyes = resize_grid(load_vit(teacher), (4, 4))
    tokens = [student(x, tokens_of=[4])[0][4].detach() for x in images]
    for found, features in (
            (log[0]["knn_pixels"], [x.flatten(1) for x in images]),
            (log[0]["knn_teacher"], [dmae.pooled_features(eyes, dmae.images_for(eyes, student, x))
                                     for x in images]),
            (log[2]["knn"], [F.layer_norm(x, [64])[:, 1:].mean(1) for x in tokens])):
        assert found == knn_top1(features[0], labels[0], features[1], labels[1])


def test_pictures_show_what_they_say(run, folder, teacher):
    def picture(name, left):
        return read_image(run / name).float()[:, 20:-20, left:]              # without titles

    image, side = picture("reconstruction.png", 0), 96 + 2                   # a tile and its frame
    assert image.shape[1:] == (8 * side + 2, 4 * side + 2)
    tiles = image[:, 2:, 2:].unfold(1, 96, side).unfold(2, 96, side)         # 3 rows columns 96 96
    patches = tiles.unfold(3, 24, 24).unfold(4, 24, 24).flatten(5, 6).flatten(3, 4)  # ... n pixels
    original, visible, drawn, both = patches.permute(2, 1, 3, 0, 4).flatten(3)    # rows n numbers
    kept = (visible == original).all(-1)
    assert (kept.sum(-1) == 4).all() and (both[kept] == original[kept]).all()
    assert visible[~kept].std(dim=-1).max() < 45          # one colour: the mean, in three channels
    assert (both[~kept] == drawn[~kept]).all() and (drawn != original).any(-1).all()
    # Patches are drawn with their own brightness: far nearer than the mean colour is.
    assert (drawn - original).abs().mean() < 0.7 * (visible - original)[~kept].abs().mean()
    attention = picture("attention.png", 80)
    assert attention.shape[1:] == (3 * 3 * side + 2, (1 + 3) * side + 2)     # the teacher's heads
    tiles = attention[0, 2:, 2:].unfold(0, 96, side).unfold(1, 96, side)[:, 1:, 12::24, 12::24]
    _, test = data.open_data(folder, data.FOLDER, (16, 16))
    images, _ = next(test.plain(torch.linspace(0, 15, 8).long()[:3]))
    student, eyes = load_vit(run / "student.pth"), resize_grid(load_vit(teacher), (4, 4))
    ours = student(images, scores_of=[4])[1][4]
    theirs = eyes(dmae.images_for(eyes, student, images), scores_of=[3])[1][3]
    M = content_of(run)["mixers"]["scores:4:3"]
    for row, scores in ((1, torch.einsum("ts,bsij->btij", M, ours)), (2, theirs)):
        maps = scores[:, :, 0, 1:].detach()
        maps = (maps - maps.amin(2, True)) / (maps.amax(2, True) - maps.amin(2, True))
        assert (tiles[row::3].flatten(2) - 255 * maps).abs().max() < 1.5
    assert (tiles[::3] != tiles[1::3]).float().mean() > 0.5                  # before and after


def test_same_bits_and_other_bits(run, folder, teacher, tmp_path):
    """Same settings; alpha 0 and no teacher; rate 0 and no epoch; not another seed."""
    again, distilled, plain, still, untrained, other = (
        main(arguments(folder, eyes, more, tmp_path / f"{eyes[-4:]} {more}")) for eyes, more in (
            (teacher, "--workers 1 --device cpu --amp off --no-compile"), (teacher, "--alpha 0"),
            ("none", ""), ("none", "--blr 0"), ("none", "--epochs 0"),
            ("none", "--epochs 0 --seed 1")))
    assert same_run(run, again) and equal(weights(still), weights(untrained))
    assert not equal(weights(untrained), weights(other))
    a, b = weights(distilled), weights(plain)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert set(a) - set(b) == {"mixers.scores:4:3"}


@pytest.fixture
def spied(monkeypatch):
    """What programs do inside: their train_steps, and the sources that they open."""
    def train_step(model, optimizer, scaler, lr, pieces, batch, autocast, clip=None):
        pieces = list(pieces)
        with autocast:
            amp = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        losses = real(model, optimizer, scaler, lr, pieces, batch, autocast, clip)
        found.steps.append(SimpleNamespace(
            model=model, optimizer=optimizer, lr=lr, pieces=pieces, clip=clip, amp=amp,
            losses={name: x.item() for name, x in losses.items()},
            batch=[torch.cat(part) for part in zip(*pieces)]))
        return losses

    def open_data(*args, **options):
        found.sources = opened(*args, **options)
        return found.sources

    real, opened, found = dmae.train_step, data.open_data, SimpleNamespace(steps=[])
    monkeypatch.setattr(dmae, "train_step", train_step)
    monkeypatch.setattr(dmae, "open_data", open_data)
    return found


def test_flags_of_images_and_steps(spied, folder, teacher, tmp_path):
    out = main(arguments(
        folder, teacher, "--train-images 24 --crop-scale 0.9 --mask-ratio 0.5 --layers 1:2,4:3 "
        "--match probs --alpha 3 --warmup-epochs 1 --micro-batch 3 --weight-decay 0.5 --seed 7 "
        "--data-dir elsewhere --norm-pix --workers 1", tmp_path / "a"))
    train, test = spied.sources
    assert (len(train), len(test), train.crop_scale, train.seed, train.workers) == (
        24, 16, 0.9, 7, 1)
    shares = (0, 1 / 3, 2 / 3, 1, 0.75, 0.25)                    # a line up, half a cosine down
    assert [x.lr for x in spied.steps] == pytest.approx([0.03 * 8 / 256 * x for x in shares])
    assert [group["weight_decay"] for group in spied.steps[0].optimizer.param_groups] == [0.5, 0]
    for x in spied.steps:
        assert [len(ids) for _, ids in x.pieces] == [3, 3, 2] and not x.amp
        images, ids_keep = x.batch
        assert images.shape == (8, 3, 16, 16) and ids_keep.shape == (8, 8)
    last = torch.Generator().manual_seed(data.seed_of(7, 1, 5))
    assert torch.equal(ids_keep, torch.rand(8, 16, generator=last).argsort(1)[:, :8])
    for i, line in enumerate(log_of(out)[1:]):                   # the mean of the steps
        assert line["lr"] == spied.steps[3 * i + 2].lr and line["step"] == 3 * i + 3
        for name in ("loss", "mae", "probs"):
            mean = sum(x.losses[name] for x in spied.steps[3 * i:3 * i + 3]) / 3
            assert line[name] == pytest.approx(mean, rel=1e-5)
        assert line["loss"] == pytest.approx(line["mae"] + 3 * line["probs"], rel=1e-5)
    assert {n: p.shape for n, p in content_of(out)["mixers"].items()} == {
        "probs:1:2": (3, 4), "probs:4:3": (3, 4)}


def test_flags_of_the_models(spied, folder, teacher, tmp_path):
    out = main(arguments(
        folder, teacher, "--student mini --image-size 24,12 --patch-size 6 --decoupled "
        "--no-norm-pix --epochs 1 --train-images 8 --amp bf16", tmp_path / "a"))
    vit, saved = load_vit(out / "student.pth"), content_of(out)
    assert vit.grid == (4, 2) and vit.width == 128 and vit.depth == 6
    assert saved["mixers"]["scores:7:3"].shape == (3, 8)
    assert saved["config"].items() >= dict(
        norm_pix=False, decoder_width=64, decoder_depth=1, decoder_heads=4, decode_after=4,
        match=["scores"]).items()
    assert spied.steps[0].amp == torch.bfloat16 and log_of(out)[1]["scores"] > 0


def test_the_compiler_does_the_same(run, folder, teacher, tmp_path, monkeypatch):
    compiled, real = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: compiled.append(
        real(model, backend="eager")))                           # does not wait for a C++ compiler
    graphs = main(arguments(folder, teacher, "--compile", tmp_path / "a"))
    assert same_function(run, graphs) and len(compiled) == 1


def test_the_header_tells_when_bfloat16_is_faster(folder, here, tmp_path, monkeypatch, capsys):
    """Also of images without test images, or with test images of other classes."""
    monkeypatch.undo()
    assert 0 < dmae.bf16_gain() < math.inf
    said = []
    for i, (gain, amp) in enumerate(((1.6, "off"), (1.4, "off"), (1.6, "bf16"))):
        monkeypatch.setattr(dmae, "bf16_gain", lambda gain=gain: gain)
        images, out = (folder, f"{folder}/train", here / "val")[i], tmp_path / str(i)
        out.mkdir()
        main(arguments(images, "none", f"--epochs 0 --amp {amp}", out))
        said.append("--amp bf16 would shorten the run" in capsys.readouterr().out)
    assert said == [True, False, False]


def fails(argv, words, capsys, program=dmae):
    """One line on stderr with `words`, exit status 2, no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program.main([str(x) for x in argv])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"{program.__name__}.py: error: ") and re.search(words, error), error


def test_resume_refuses_what_is_not_its_own(folder, tmp_path, capsys):
    images, teacher = shutil.copytree(folder, tmp_path / "images"), tmp_path / "teacher.pth"
    save_student(teacher, MAE(ViT(32, 8, 3, 24, 3, 3), 16, 1, 2))
    out = main(arguments(images, teacher, "--epochs 1", tmp_path / "a"))
    before, resume = files_in(out), ["--resume", out]
    fails([*resume, "--out", tmp_path, "--alpha", 2, "--epochs", 1], "--alpha, --epochs, --out",
          capsys)
    fails(["--resume", tmp_path], "no run of this program is there", capsys)
    fails(resume, "no run of this program is there", capsys, finetune)
    for other in ("none", f"{out}/student.pth"):
        fails([*resume, "--teacher", other], "not what the run began with: give", capsys)
    new = shutil.copy(images / "train" / "a" / "00.png", images / "train" / "a" / "new.png")
    fails(resume, "with 40 training images of 8 classes, not these", capsys)
    new.unlink()
    (images / "train" / "a").rename(images / "train" / "z")
    fails(resume, "not these: give its --data", capsys)
    (images / "train" / "z").rename(images / "train" / "a")
    for name, content in (("checkpoint.pth", b"x"), ("checkpoint.pth", before[out / "student.pth"]),
                          ("config.json", b"{}"), ("config.json", b""), ("config.json", b"[]"),
                          ("config.json", before[out / "config.json"].replace(b"alpha", b"beta"))):
        (out / name).write_bytes(content)
        fails(resume, f"{name} is damaged", capsys)
        (out / name).write_bytes(before[out / name])
    teacher.unlink()
    fails(resume, "teacher.pth", capsys)
    assert files_in(out) == before


def test_what_is_not_this_runs_is_not_overwritten(run, folder, tmp_path, capsys, monkeypatch):
    """Runs in numbered folders; a finished run; photographs."""
    monkeypatch.chdir(tmp_path)
    runs = [main(arguments(folder, "none", "--epochs 0")[:-2]) for _ in range(2)]
    assert [str(out) for out in runs] == ["runs/0001", "runs/0002"]
    before = files_in(folder)
    for out in (Path(folder) / "val" / "a" / "runs", Path(folder) / "train"):
        fails(arguments(os.path.relpath(folder), "none", out=out), "inside the data", capsys)
    assert files_in(folder) == before
    own = shutil.copytree(run, tmp_path / "a" / "teacher")
    before = files_in(own)
    fails(arguments(folder, "none", out=own),
          f"holds a run .config.json, checkpoint.pth.: .*--resume {own}, or name", capsys)
    assert files_in(own) == before


def test_the_teacher_that_comes_with_the_project(tmp_path, monkeypatch, capsys):
    """It is small, tells figures apart, and without it the default run says where it is from."""
    file = Path(dmae.__file__).parent / "weights" / "shapes_teacher.pth"
    assert file.stat().st_size < 3e6
    vit, (images, labels, _) = load_vit(file), data.draw_shapes(1200, 3)
    assert torch.equal(vit.pos_embed[:, 1:], sincos_positions(128, (8, 8)))    # not halved, either
    source = data.SmallSet(images, labels, (), SETS["shapes"], (32, 32))
    with torch.no_grad():
        features = torch.cat([dmae.pooled_features(vit, x)
                              for x, _ in source.plain(torch.arange(1200))])
    assert knn_top1(features[:1000], labels[:1000], features[1000:], labels[1000:]) > 0.4
    monkeypatch.chdir(tmp_path)
    shape = dmae.RECIPES["shapes"] | dict(teacher=str(tmp_path / "weights" / "shapes_teacher.pth"))
    monkeypatch.setitem(dmae.RECIPES, "shapes", shape)
    fails([], "no file .*weights/shapes_teacher.pth.*README.md says how it was trained", capsys)


def test_what_stops_a_run_loses_nothing(run, folder, teacher, tmp_path, monkeypatch, capsys):
    def full(content, path):                     # as torch.save does it, on its second checkpoint
        path.write_bytes(b"half of a file")
        if (tmp_path / "a" / "student.pth").exists():
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")
        real(content, path)

    fails(arguments(folder, teacher, "--epochs 20 --blr 1e9 --warmup-epochs 1", tmp_path / "nan"),
          "epoch . are not finite, at learning rate .*--blr", capsys)
    real, argv = torch.save, arguments(folder, teacher, out=tmp_path / "a")
    with monkeypatch.context() as patched:                   # losses are finite, a weight is not
        patched.setattr(torch.optim.AdamW, "step",
                        lambda self: self.param_groups[1]["params"][0].data.fill_(math.nan))
        fails(arguments(folder, "none", "--train-images 8", tmp_path / "b"), "not finite", capsys)
    assert not list(tmp_path.glob("*/checkpoint.pth"))
    with monkeypatch.context() as patched:
        patched.setattr(torch._inductor.config.cpp, "cxx", ("g+++",))
        patched.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        fails(arguments(folder, "none", "--compile", tmp_path / "c"), "no-compile .*g[+]+", capsys)
        patched.setattr(dmae, "train_step", Mock(side_effect=torch.OutOfMemoryError("of 80 GiB")))
        fails(arguments(folder, "none", out=tmp_path / "d"), "micro-batch N .*80 GiB", capsys)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        fails(argv, "is the disk full", capsys)
    assert not list((tmp_path / "a").glob("*.tmp"))
    assert same_run(run, main(["--resume", str(tmp_path / "a")]))


# ===================================================================================== command line


@pytest.mark.parametrize("program", [dmae, finetune])
def test_every_flag_has_limits_a_help_and_a_test(program, capsys):
    tests = Path(__file__).read_text()
    for name, (_, kind, text) in program.FLAGS.items():
        flag, good, wrong = "--" + name.replace("_", "-"), {}, []
        assert len(text) > 10 and re.search(rf"--(no-)?{flag[2:]}[ \"]", tests), flag
        if isinstance(kind, str):
            good = {f"{flag}=some text": "some text"}
        elif kind is dmae.sides:
            good = {f"{flag}=16": [16, 16], f"{flag}=16,24": [16, 24]}
            wrong = ["0", "16,", "16,0", "16x16", "100000", "-1", ""]
        elif kind is bool:
            good = {flag: True, flag.replace("--", "--no-"): False}
        elif isinstance(kind[0], str):
            good, wrong = {f"{flag}={x}": x for x in kind}, ["giant", ""]
        else:
            number, least, most = kind
            good = {f"{flag}={x}": number(x) for x in (least, most)}
            wrong = [least - 1, most + 1, -1, "nan", "inf", "x", ""]
        for word, value in good.items():
            with dmae.command_line("x", program.FLAGS, [word]) as given:
                assert given == {name: value} and type(given[name]) is type(value)
        for value in wrong:
            fails([f"{flag}={value}"], f"argument {flag}: ", capsys, program)
    fails(["--epoch", 1], "unrecognized", capsys, program)


def settings(program=dmae, **given):
    source = "teacher" if program is dmae else "init"
    return vars(dmae.settings_of(given, program.FLAGS, source, program.defaults_for))


def test_the_papers_recipe_is_the_default_for_a_folder():
    assert settings(data="imagenet", teacher="base.pth").items() >= dict(
        student="tiny", epochs=400, warmup_epochs=40, batch_size=4096, blr=1.5e-4,
        weight_decay=0.05, mask_ratio=0.75, norm_pix=True, layers=None, match="scores", alpha=1,
        decoupled=False, image_size=224, patch_size=16, crop_scale=0.08, train_images=None,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), seed=0, micro_batch=None,
        mixer=True).items()
    keys = ("student", "image_size", "patch_size", "crop_scale", "epochs", "batch_size", "blr")
    assert {name: [settings(data=name, teacher="none")[key] for key in keys]
            for name in ("shapes", "fashion-mnist", "cifar10", "cifar100", "pets")} == {
        "shapes": ["slim", 32, 4, 0.5, 6, 128, 2.4e-2],
        "fashion-mnist": ["slim", 32, 4, 0.5, 4, 128, 6e-3],
        "cifar10": ["slim", 32, 4, 0.2, 20, 128, 6e-3],
        "cifar100": ["slim", 32, 4, 0.2, 20, 128, 6e-3],
        "pets": ["tiny", 224, 16, 0.08, 400, 4096, 1.5e-4]}            # of the README's results


def test_what_is_given_comes_first_and_suits_the_rest(tmp_path):
    def found(*keys, **given):
        return [settings(**given)[key] for key in keys]

    own = Path(dmae.__file__).parent / "weights" / "shapes_teacher.pth"
    assert found("teacher", "student", "epochs", "warmup_epochs", "batch_size", epochs=5,
                 student="nano") == [str(own), "nano", 5, 0.5, 128]
    assert found("warmup_epochs", epochs=2, warmup_epochs=2) == [2]
    # A teacher as wide as MAE-Base, on drawn images: short by default, for a CPU.
    wide, keys = tmp_path / "base.pth", ("train_images", "epochs", "warmup_epochs")
    torch.save({"model": ViT(width=768, depth=1).state_dict()}, wide)
    assert found(*keys, teacher=str(wide)) == [4000, 4, 0.4]
    assert found(*keys, teacher=f"{wide}:12", epochs=9) == [4000, 9, 0.9]
    save_student(tmp_path / "own.pth", MAE(small_vit()))
    assert found(*keys, teacher=str(tmp_path / "own.pth")) == [None, 6, 0.6]


BAD = {
    "--teacher no/file.pth": "mae_pretrain_vit_base.pth", "--data no/folder": "neither a folder",
    "--data empty": "no images", "--layers 4": "pairs STUDENT:TEACHER", "--layers a:b": "pairs",
    "--layers 1:1;2:2": "pairs", f"--out {'x' * 300}": "name too long",
    "--teacher none --decoupled --match probs --layers 1:1 --alpha 2 --no-mixer":
        "(?=.*--layers)(?=.*--alpha)(?=.*--mixer)(?=.*--match).*decoupled.*: not with --teacher",
    "--out file/below": "Not a dir", "--batch-size 41": "more than the 40", "--amp fp16": "a CUDA",
    "--warmup-epochs 3": "only 2 epochs", "--crop-scale 0": "from 0.001",
    "--device meta": "meta cannot be used", "--device toaster": "toaster cannot be used",
    "--resume empty": "leave out --batch-size, --blr",
    "--no-mixer": "must agree: the student has 4, the teacher 3"}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_loses_nothing(flags, folder, teacher, tmp_path, capsys,
                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("a file")
    fails([*arguments(folder, teacher), *flags.split()], BAD[flags], capsys)
    fails(["--data", folder], "--teacher is missing.*FILE.*none", capsys)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["empty", "file"]


# ====================================================================================== fine-tuning


def tune(init, folder, more="", out="out", size="--epochs 2 --batch-size 8"):
    return finetune.main(["--init", str(init), "--data", str(folder), "--workers", "0",
                          *size.split(), *more.split(), "--out", str(out)])


def tuned(result):
    return content_of(result["out"], "model.pth")["model"]


def test_recipes_of_the_paper():
    imagenet = dict(
        optimizer="adamw", epochs=300, warmup_epochs=5, batch_size=1024, blr=1e-3, end_lr=1e-6,
        weight_decay=0.05, layer_decay=0.85, clip=0, crop_scale=0.08, randaugment=10, mixup=0.2,
        cutmix=0, erasing=0, smoothing=0)
    transfer = imagenet | dict(
        optimizer="sgd", epochs=300, warmup_epochs=20, batch_size=512, blr=0.03 / 2, weight_decay=0,
        layer_decay=0.75, clip=1, randaugment=0, mixup=0)
    cifar = transfer | dict(epochs=50, warmup_epochs=10, blr=0.1 / 2)
    ours = imagenet | dict(epochs=3, warmup_epochs=0.5, batch_size=128, blr=4e-3, crop_scale=0.5,
                           randaugment=0, mixup=0)
    for name, recipe in {"folder": imagenet, "cifar10": cifar, "cifar100": cifar, "shapes": ours,
                         "fashion-mnist": ours, **dict.fromkeys(data.PHOTOS, transfer)}.items():
        s = settings(finetune, data=name, init="x.pth")
        assert {key: s[key] for key in recipe} == pytest.approx(recipe), name
        scratch = settings(finetune, data=name, init="none")       # without layer decay: ours
        assert {key: scratch[key] for key in recipe} == pytest.approx(recipe | dict(layer_decay=1))
        assert settings(data=name, teacher="none").items() >= dict(
            student=scratch["model"], image_size=scratch["image_size"],
            patch_size=scratch["patch_size"]).items()
    assert settings(finetune, data="pets", init="x.pth", mode="linear").items() >= dict(
        epochs=100, warmup_epochs=10, batch_size=512, blr=0.3, weight_decay=0).items()     # ours
    # The warm-up keeps its share of the epochs.
    s = settings(finetune, data="cifar100", init="x.pth", recipe="imagenet", epochs=3)
    assert (s["recipe"], s["epochs"], s["blr"], s["warmup_epochs"]) == ("imagenet", 3, 1e-3, 0.05)
    assert settings(finetune, init="x.pth", epochs=2, warmup_epochs=2)["warmup_epochs"] == 2
    for share, epochs in ((0.5, 6), (0.01, 100)):               # as many steps, up to a point
        s = settings(finetune, init="x.pth", label_fraction=share)
        assert (s["epochs"], s["warmup_epochs"]) == (epochs, pytest.approx(epochs / 6))


def test_layer_decay_and_weight_decay_of_every_parameter_of_tiny():
    model = finetune.Classifier(10)
    groups = finetune.layer_groups(model, 0.85, 0.05)
    found = {id(p): (g["scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        block = re.match(r"blocks\.(\d+)\.", name)                      # 12 layers above the first
        above = 12 - int(block[1]) if block else 0 if name.startswith(("fc_norm", "head")) else 13
        decay = 0.05 if name.endswith("weight") and "norm" not in name else 0
        assert found[id(p)] == pytest.approx((0.85**above, decay)), name


def test_targets_may_be_soft_or_smoothed():
    classifier = finetune.Classifier(3, image_size=16, patch_size=4, width=24, depth=2, heads=3)
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3
    soft = 0.7 * F.one_hot(labels, 3) + 0.1
    expected = -(soft * classifier.logits(images).log_softmax(1)).sum(1).mean()
    assert expected.item() == pytest.approx(math.log(3), abs=0.1)       # the head begins near zero
    for smoothing, targets in ((0.0, soft), (0.3, labels)):
        model = finetune.Supervised(classifier, smoothing)
        assert torch.allclose(model(images, targets)["loss"], expected)
    # Under autocast, evaluation adds in float32; of three classes, the right one is in the top 5.
    run = SimpleNamespace(rank=0, world=1, device="cpu",
                          autocast=torch.autocast("cpu", torch.bfloat16))
    test = data.SmallSet(noise(90, 3, 16, 16), torch.arange(90) % 3, (), RAW, (16, 16))
    with torch.no_grad(), run.autocast:
        logits = classifier.logits(next(test.plain(torch.arange(90)))[0]).float()
    found, loss = finetune.evaluate(classifier, test, run), F.cross_entropy(logits, test.labels)
    assert found["test_loss"] == pytest.approx(loss.item(), rel=1e-4) and found["top5"] == 1


def test_initialisations_differ_exactly_where_they_should(run):
    def new(init, **changes):
        s = dict(init=init, keep_blocks=None, freeze_blocks=None, seed=5) | changes
        model = finetune.new_classifier(vit, 2, argparse.Namespace(**s))
        return model.state_dict(), {n for n, p in model.named_parameters() if not p.requires_grad}

    def same(a, b):
        return {name for name in a if name in b and torch.equal(a[name], b[name])}

    vit = load_vit(run / "student.pth")
    saved, (scratch, _), (loaded, frozen) = vit.state_dict(), new("none"), new("student.pth")
    assert same(loaded, saved) == {n for n in loaded if not n.startswith(("fc_norm.", "head."))}
    assert not frozen
    for kept in range(5):
        model, frozen = new("student.pth", keep_blocks=kept, freeze_blocks=kept)
        names = ("cls_token", "pos_embed", "patch_embed.", *(f"blocks.{i}." for i in range(kept)))
        below = {n for n in model if n.startswith(names)}
        assert same(model, saved) >= below == frozen
        assert same(model, scratch) == set(model) - below
    assert not torch.equal(new("none", seed=6)[0]["cls_token"], scratch["cls_token"])


AUGMENTED = "--cutmix 1 --erasing 0.5 --smoothing 0.1 --blr 0.1"


@pytest.fixture(scope="module")
def fine(run, folder, tmp_path_factory):
    """A finished fine-tuning with every augmentation, and its result."""
    return tune(run / "student.pth", folder, AUGMENTED, tmp_path_factory.mktemp("fine") / "plain")


def test_fine_tuning_leaves_what_it_should(fine, run, folder, capsys):
    out, log = Path(fine["out"]), log_of(fine["out"])
    assert " ".join(sorted(os.listdir(out))) == "checkpoint.pth config.json log.jsonl model.pth"
    assert [(x["epoch"], x["step"]) for x in log] == [(1, 5), (2, 10)]
    assert " ".join(log[1]) == "epoch step lr images_per_second loss top1 top5 test_loss minutes"
    assert 0 < log[0]["minutes"] < log[1]["minutes"]
    assert fine == dict(
        mode="finetune", data=folder, init=str(run / "student.pth"), seed=0, label_fraction=1,
        recipe="imagenet", epochs=2, batch_size=8, blr=0.1, layer_decay=0.85, out=str(out),
        pool="mean", train_images=40, **{key: log[-1][key] for key in ("top1", "top5", "minutes")})
    checkpoint = content_of(out, "checkpoint.pth")
    assert " ".join(checkpoint) == "model optimizer scaler log images classes"
    groups = checkpoint["optimizer"]["param_groups"]
    assert {(g["betas"], g["eps"]) for g in groups} == {((0.9, 0.999), 1e-8)}
    # The last line printed is the result, for a shell to collect; --eval finds the same.
    capsys.readouterr()
    result = finetune.main(["--eval", str(out / "model.pth"), "--data", folder, "--workers", "0",
                            "--device", "cpu", "--amp", "off", "--data-dir", "there"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result == dict(
        eval=str(out / "model.pth"), data=folder, test_images=16,
        **{key: log[-1][key] for key in ("top1", "top5", "test_loss")})


def test_a_classifiers_file_is_a_start_a_teacher_and_a_result(fine, folder, tmp_path):
    """Supervised pre-training."""
    file = Path(fine["out"]) / "model.pth"
    s = argparse.Namespace(init=file, keep_blocks=None, freeze_blocks=None, seed=5)
    saved = tuned(fine)
    for s.keep_blocks, new in ((None, ("head.",)), (4, ("head.", "fc_norm."))):
        started = finetune.new_classifier(load_vit(file), 8, s).state_dict()
        assert {n for n in saved if not torch.equal(saved[n], started[n])} == {
            n for n in saved if n.startswith(new)}
    out = main(arguments(folder, file, "--student micro --epochs 1", tmp_path / "a"))
    assert weights(out)["mixers.scores:4:4"].shape == (4, 6)


def test_timm_evaluates_a_classifiers_file_to_the_same(folder, colours, tmp_path, capsys):
    """As the authors publish theirs; timm's model, Pillow and torchvision's transforms."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = scramble(finetune.Classifier(8, image_size=16, patch_size=4, width=24, depth=2))
    file = save({"model": under("module.model.", model.state_dict())}, tmp_path / "ft.pth.tar")
    fails(["--eval", file, "--data", colours], "tells 8 classes apart, not those of", capsys,
          finetune)
    result = finetune.main(["--eval", str(file), "--data", folder])
    other = timm.VisionTransformer(16, 4, embed_dim=24, depth=2, num_heads=12, num_classes=8,
                                   global_pool="avg").eval()
    other.load_state_dict(model.state_dict())
    prepare = v2.Compose([v2.Resize(18, InterpolationMode.BICUBIC), v2.CenterCrop(16),
                          v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
                          v2.Normalize(data.FOLDER["mean"], data.FOLDER["std"])])
    val = torchvision.datasets.ImageFolder(Path(folder) / "val", transform=prepare)
    images, labels = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*val))
    logits = other(images)
    before = (logits > logits.gather(1, labels[:, None])).sum(1)          # classes above the right
    assert (result["top1"], result["top5"]) == ((before < 1).sum() / 16, (before < 5).sum() / 16)
    assert result["test_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=0.01)


def test_tuning_resumed_ends_in_the_same_bits(fine, run, folder, tmp_path, monkeypatch, capsys):
    """Interrupted at its eighth step, in the middle of the second epoch."""
    steps = itertools.chain([DEFAULT] * 7, [KeyboardInterrupt], itertools.repeat(DEFAULT))
    monkeypatch.setattr(dmae, "train_step", Mock(wraps=dmae.train_step, side_effect=steps))
    out = tmp_path / "a"
    with pytest.raises(SystemExit) as end:
        tune(run / "student.pth", folder, AUGMENTED, out)
    assert end.value.code == 130 and "--resume DIR" in capsys.readouterr().err
    before, resume = log_of(out)[0]["minutes"], ["--resume", str(out)]
    for _ in range(2):                                          # the second has nothing to do
        resumed = finetune.main(resume)
        assert equal(tuned(resumed), tuned(fine)) and same_log(out, fine["out"])
        assert resumed["top1"] == fine["top1"] and resumed["minutes"] > before


def test_two_steps_of_sgd_by_hand(run, folder, tmp_path, monkeypatch):
    """Nesterov's momentum 0.9, layer decay, weight decay, clipping, and a batch in pieces."""
    def by_hand(model, optimizer, scaler, lr, pieces, batch, autocast, clip):
        pieces = list(pieces)
        images, targets = (torch.cat(part) for part in zip(*pieces))
        both = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p, _ in both]
        loss = model(images, targets)["loss"]
        gradients = torch.autograd.grad(loss, [p for p, _ in both])
        norm = sum(g.square().sum() for g in gradients).sqrt()
        losses = real(model, optimizer, scaling, lr, pieces, batch, autocast, clip)
        torch.testing.assert_close(losses["loss"], loss.detach())
        assert not losses["loss"].requires_grad
        for i, ((p, group), old, g) in enumerate(zip(both, before, gradients)):
            g = g * min(1, 0.1 / norm) + group["weight_decay"] * old
            velocity[i] = 0.9 * velocity.get(i, 0) + g
            expected = old - lr * group["scale"] * (g + 0.9 * velocity[i])
            torch.testing.assert_close(p.data, expected, atol=1e-6, rtol=1e-4)
        scales = {(group["scale"], group["weight_decay"]) for _, group in both}
        found.append((lr, model.smoothing, clip, norm > 0.1, images.shape, sorted(scales)))
        return losses

    real, found, velocity = dmae.train_step, [], {}
    scaling = Mock(wraps=torch.amp.GradScaler("cpu"))                  # as with fp16
    monkeypatch.setattr(dmae, "train_step", by_hand)
    result = tune(run / "student.pth", folder, (
        "--optimizer sgd --label-fraction 0.4 --epochs 1 --warmup-epochs 0 --blr 1 --end-lr 0.01 "
        "--weight-decay 0.5 --layer-decay 0.5 --clip 0.1 --smoothing 0.2 --mixup 0 --randaugment 0 "
        "--image-size 24,16 --device cpu --micro-batch 3"), tmp_path / "a")
    scales = sorted((0.5**i, decay) for i in range(6) for decay in (0.0, 0.5))
    assert found == [(pytest.approx(lr), 0.2, 0.1, True, (8, 3, 24, 16), scales)
                     for lr in (1 / 32, (1 / 32 + 0.01) / 2)]
    assert [call[0] for call in scaling.method_calls] == [
        "scale", "scale", "scale", "unscale_", "step", "update"] * 2
    assert result["train_images"] == 16
    assert load_vit(tmp_path / "a" / "model.pth").grid == (6, 4)


def test_tuning_flags_reach_the_images_and_the_steps(spied, run, folder, tmp_path, monkeypatch):
    start, seeds, draws = content_of(run), [], data.Files.draw
    start["config"]["mean"] = [0.4] * 3
    monkeypatch.setattr(data.Files, "draw", lambda source, b, generator: seeds.append(
        generator.initial_seed()) or draws(source, b, generator))
    policies, real = [], finetune.rand_augment
    monkeypatch.setattr(finetune, "rand_augment",
                        lambda *args, **more: policies.append((args, more)) or real(*args, **more))
    result = tune(save(start, tmp_path / "start.pth"), folder, (
        "--recipe transfer --warmup-epochs 1 --crop-scale 0.9 --randaugment 3 --mixup 0.5 --seed 4 "
        "--micro-batch 3 --amp bf16 --keep-blocks 2 --freeze-blocks 2 --epochs 4 "
        "--label-fraction 0.4 --no-compile --data-dir there"), tmp_path / "a")
    assert (result["keep_blocks"], result["freeze_blocks"]) == (2, 2)
    assert policies == [((3,), dict(fill=102))]                # 255 times its encoder's mean colour
    train, _ = spied.sources
    assert (train.crop_scale, train.seed, train.bicubic) == (0.9, 4, 1) and train.policy
    assert train.mean.flatten().tolist() == [102] * 3
    few = finetune.stratified(torch.arange(40) // 5, 0.4, seed=4)
    assert list(train.items) == list(data.find_images(Path(folder) / "train")[0][few])
    assert [x.lr for x in spied.steps[:3]] == pytest.approx([0, 0.015 / 64, 0.015 / 32])
    assert len({x.batch[0].sum().item() for x in spied.steps}) == len(set(seeds)) == 8
    for x in spied.steps:
        images, targets = x.batch
        assert [len(part) for part, _ in x.pieces] == [3, 3, 2] and x.amp == torch.bfloat16
        assert x.clip == 1 and images.shape == (8, 3, 16, 16) and targets.shape == (8, 8)
    shares = torch.cat([x.batch[1] for x in spied.steps])
    assert ((shares > 0) & (shares < 1)).any() and isinstance(x.optimizer, torch.optim.SGD)
    before, after = load_vit(run / "student.pth").state_dict(), tuned(result)
    frozen = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.", "blocks.1.")
    assert {n for n in after if n in before and torch.equal(before[n], after[n])} == {
        n for n in after if n.startswith(frozen)}
    assert [("top1" in line, line["lr"]) for line in log_of(tmp_path / "a")] == [
        (i in (0, 3), spied.steps[2 * i + 1].lr) for i in range(4)]


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes that any features tell apart: red, green, blue. One file is broken."""
    def image(i):
        return noise(16, 16, 3, seed=i) // 4 + 190 * F.one_hot(torch.tensor(i % 3), 3)
    root = draw(tmp_path_factory.mktemp("colours"), 120, 18, ("red", "green", "blue"), image)
    (Path(root) / "train" / "red" / "117.png").write_bytes(b"")
    return root


@pytest.mark.parametrize("mode", ["linear", "knn"])
@pytest.mark.parametrize("flags, top1", [
    ("", 1), ("--block 4", 1), ("--block 0 --pool cls", 1 / 3)])
def test_probes_tell_separable_features_apart_and_constant_ones_not(run, colours, tmp_path, mode,
                                                                    flags, top1, monkeypatch):
    """The class token before the first block is the same for every image."""
    monkeypatch.setattr(dmae.nearest_neighbours, "__defaults__", (1, 1))         # of pre-training
    result = tune(run / "student.pth", colours, f"--mode {mode} {flags}", tmp_path / "a", size="")
    line, = log_of(tmp_path / "a")
    assert result["top1"] == line["top1"] == pytest.approx(top1) and result["train_images"] == 120
    assert (f"--block {result.get('block')}" in flags) == bool(flags)
    assert result["broken_images"] == line["broken_images"] == 1
    assert line["minutes"] > 0 and ("top5" in line) == (mode == "linear")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"config.json", "log.jsonl"}


def test_linear_probe_is_nearly_the_best_there_is(monkeypatch):
    """Of Gaussians around known centres, which make the best linear layer."""
    sgd, rate = Mock(wraps=torch.optim.SGD), Mock(wraps=dmae.learning_rate)
    monkeypatch.setattr(torch.optim, "SGD", sgd)
    monkeypatch.setattr(dmae, "learning_rate", rate)
    torch.manual_seed(0)
    centres = 0.7 * torch.randn(7, 6)
    (x, y), (test, answers) = ((centres[labels] + torch.randn(len(labels), 6), labels)
                               for labels in (torch.arange(1400) % 7, torch.arange(3500) % 3))
    logits = test @ centres.T - centres.square().sum(1) / 2
    before = (logits > logits.gather(1, answers[:, None])).sum(1)
    s = argparse.Namespace(**settings(finetune, init="x", mode="linear", batch_size=64))
    found = finetune.linear_probe(s, (3 * x + 5, y), (3 * test + 5, answers))   # scale is no matter
    for name, place in (("top1", 1), ("top5", 5)):
        share = (before < place).float().mean().item()
        assert found[name] == pytest.approx(share, abs=0.02) and share < 0.99
    assert sgd.call_args.kwargs == dict(momentum=0.9, nesterov=True, weight_decay=0)
    assert rate.call_args_list[0].args == (0, 2100, 210, 0.3 * 64 / 256)
    s.blr, s.epochs = 0, 1                                       # the layer that the seed draws
    top1 = {finetune.linear_probe(s, (x, y), (test, answers))["top1"] for _ in range(2)}
    assert len(top1) == 1 and top1.pop() < 0.5


def test_from_scratch_and_the_bank(folder, tmp_path):
    scratch = "--model nano --image-size 24 --patch-size 8"
    result = tune("none", folder, f"{scratch} --epochs 1 --batch-size 100", tmp_path / "a")
    assert load_vit(tmp_path / "a" / "model.pth").grid == (3, 3)
    assert (result["layer_decay"], result["batch_size"]) == (1, 40)            # all there are
    top1 = [tune("none", folder, f"{scratch} --mode knn --bank {bank}", tmp_path / str(bank),
                 size="")["top1"] for bank in (1, 40)]
    assert top1[0] == 1 / 8 < top1[1]                      # one neighbour: all are of its class
    s = argparse.Namespace(**settings(finetune, init="none", data="shapes"))     # the seed decides
    assert equal(*(finetune.open_encoder(s).state_dict() for _ in range(2)))


def test_label_fraction_is_stratified_and_seeded():
    labels = torch.tensor([0] * 100 + [1] * 40 + [2] * 3 + [3] * 17)[torch.randperm(160)]
    keep, again, other = (finetune.stratified(labels, 0.1, seed) for seed in (0, 0, 1))
    assert labels[keep].bincount().tolist() == [10, 4, 1, 2] and torch.equal(keep, keep.unique())
    assert torch.equal(keep, again) and not torch.equal(keep, other)


def test_randaugment_reaches_thirty_degrees_and_half_the_operations_are_done():
    image, before = noise(3, 33, 33, seed=3), torch.get_rng_state()
    for magnitude, degrees in ((10, 30), (5, 15)):
        policy = finetune.rand_augment(magnitude, 116)
        images = [data.seeded(seed, policy, image) for seed in range(400)]
        assert torch.equal(images[7], data.seeded(7, policy, image))
        turned = [TF.rotate(image, sign * degrees, InterpolationMode.BILINEAR, fill=[116])
                  for sign in (1, -1)]
        assert all(any(torch.equal(other, x) for x in images) for other in turned)
        # None of two operations in 1/4; one is the identity, others do nothing to some images.
        assert 0.2 < sum(torch.equal(image, x) for x in images) / 400 < 0.45
    assert torch.equal(before, torch.get_rng_state())


def test_batch_augmentation_mixes_images_and_labels_alike():
    images = torch.eye(6).view(6, 6, 1, 1).expand(6, 6, 8, 8)          # channel i is image i's
    labels, blended = torch.arange(6), []

    def augmented(step=0, first=0, seed=0, **changes):
        s = argparse.Namespace(**dict(seed=seed, mixup=0.0, cutmix=0.0, erasing=0.0) | changes)
        return finetune.batch_augmentation(s, 6)(images[first:], labels[first:], step, first)

    assert all(torch.equal(*pair) for pair in zip(augmented(), (images, labels)))
    for options in (dict(mixup=1.0), dict(cutmix=1.0), dict(mixup=1.0, cutmix=1.0)):
        found = [augmented(step, **options) for step in range(20)]
        for mixed, targets in found:
            assert torch.allclose(mixed.mean(dim=(2, 3)), targets, atol=1e-6)    # shares of each
            assert torch.allclose(targets.sum(1), torch.ones(6)) and (targets > 0).sum() <= 12
        blended.append(sum(((x > 0) & (x < 1)).any().item() for x, _ in found))
        assert torch.equal(found[0][0], augmented(**options)[0])
        assert not torch.equal(found[0][0], found[1][0])
        assert not torch.equal(found[0][0], augmented(seed=1, **options)[0])
    assert blended[:2] == [20, 0] and 4 < blended[2] < 16              # MixUp, CutMix, by chance
    assert augmented(mixup=1e4)[1].max() < 0.55                        # alpha: nearly halves
    assert not torch.equal(augmented(erasing=1.0)[0], augmented(seed=1, erasing=1.0)[0])
    erased = torch.stack([augmented(step, erasing=0.5)[0] for step in range(40)])
    share = (erased != images).flatten(2).any(2).float().mean()
    assert 0.4 < share < 0.6 and erased.min() < -1                     # noise is put there
    # By its place in the whole batch: each process erases what one alone would.
    assert torch.equal(augmented(3, first=2, erasing=1.0)[0], augmented(3, erasing=1.0)[0][2:])


BAD_TUNING = {
    "": "--init is missing.*FILE.*none.*--eval", "--init {here}/file": "holds no plain ViT",
    "--init {here}/grey.pth": "grey images", "--eval {here}/deit.pth:3": "holds no classifier",
    "{student} --data {here}/a": "cannot be learnt: it needs images in .*/a/train/CLASS/",
    "{student} --data {here}/val": "cannot be learnt",
    "{student} --data {here}/broken": "of 16 images cannot be read",
    "--eval {model} --data {here}/renamed": "8 classes apart",
    "{student} --keep-blocks 5": "blocks 1 to 4", "{student} --freeze-blocks 5": "blocks 1 to 4",
    "{student} --keep-blocks 1 --freeze-blocks 2": "only the 1 blocks",
    "{student} --mode linear --batch-size 1": "batches of 2 or more",
    "--init x --mode linear --keep-blocks 1": "--keep-blocks has no meaning with --mode linear",
    "{student} --image-size 16,30": "no multiple of patch size 4",
    "{student} --mode knn --block 5": "blocks 1 to 4", "--layer-decay 1.1": "from 0 to 1$",
    "--batch-size 0": "from 1 to", "--bank 0": "from 1 to", "--label-fraction 0": "e-09",
    "--label-fraction 1.1": "to 1$", "--erasing 1.1": "from 0 to 1$", "--epochs 0": "from 1 to",
    "--randaugment 11": "from 0 to 10", "--smoothing 1": "from 0 to 0.99"} | {
    flags: re.findall("--[a-z-]+", flags)[-1] + " has no meaning with --" for flags in (
        "--init none --keep-blocks 1", "--init none --freeze-blocks 1", "--init x --model nano",
        "--init x --patch-size 4", "--init x --bank 5", "--init x --pool cls", "--eval x --seed 1",
        "--init x --mode linear --mixup 1", "--init x --mode linear --compile",
        "--init x --mode linear --micro-batch 2",
        "--init x --mode knn --epochs 1", "--init x --mode knn --freeze-blocks 1",
        "--init x --mode knn --recipe small")}


@pytest.fixture(scope="module")
def here(folder, tmp_path_factory):
    """Folders that cannot be learnt, or by others only."""
    root = tmp_path_factory.mktemp("here")
    for name in ("renamed", "val", "broken"):                # "val": another class than in train
        shutil.copytree(folder, root / name)
    for place in ("renamed/train", "renamed/val", "val/val"):
        (root / place / "a").rename(root / place / "z")
    write_images(root, "a/train/a/0.png", "a/train/b/0.png")
    (root / "broken" / "val" / "a" / "40.png").write_bytes(b"")
    save({"model": {"x": torch.zeros(2)}}, root / "file")
    save(scrambled_vit().state_dict() | HEAD, root / "deit.pth")         # reads the class token
    save_student(root / "grey.pth", MAE(small_vit(channels=1, mean=(0.5,), std=(0.5,))))
    return root


@pytest.mark.parametrize("flags", BAD_TUNING)
def test_bad_tuning_is_one_line(flags, run, fine, folder, here, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = flags.format(here=here, student=f"--init {run}/student.pth",
                        model=f"{fine['out']}/model.pth").split()
    before = files_in(run, fine["out"], folder)
    fails(["--data", folder, *argv], BAD_TUNING[flags], capsys, finetune)
    assert files_in(run, fine["out"], folder) == before and not list(tmp_path.iterdir())


# =================================================================================== real processes


def start(*argv, module=(), program=dmae, **options):
    script = str(Path(program.__file__))
    return subprocess.Popen([sys.executable, *module, script, *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def torchrun(*argv, program=dmae):
    process = start(*argv, program=program, module=(
        "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"))
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output


def test_process_default_run_shortened_by_two_under_torchrun(tmp_path):
    out = tmp_path / "out"
    output = torchrun("--train-images", 640, "--epochs", 1, "--out", out)
    for words in (f"run {out}: slim on 640 images of shapes, 16 of 64 patches visible",
                  "teacher: ViT 128 wide, 6 blocks, 8 heads by its own config",
                  "5 steps, 0 of warm-up, learning rate 0.012\n", "predicting nothing: 0.979",
                  f"in {out}: student.pth", "k-NN top-1, raw pixels", "k-NN top-1, teacher ",
                  f"--init {out}/student.pth --data shapes"):
        assert output.count(words) == 1, words
    assert {p.name for p in out.iterdir()} == RUN_FILES and len(log_of(out)) == 2
    assert weights(out)["mixers.scores:6:6"].shape == (8, 8)


def test_process_killed_and_resumed_wherever_its_files_lie(folder, teacher, tmp_path):
    process = start(*arguments(folder, teacher, "--epochs 12", tmp_path / "killed"))
    while not (tmp_path / "killed" / "checkpoint.pth").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -9 and len(log_of(tmp_path / "killed")) < 13
    straight = main(arguments(folder, teacher, "--epochs 12", tmp_path / "straight"))
    out = (tmp_path / "killed").rename(tmp_path / "moved")
    images = shutil.copytree(folder, tmp_path / "images")
    eyes = shutil.copy(teacher, tmp_path / "eyes.pth")
    resume = ["--resume", str(out), "--data", str(images), "--teacher", str(eyes),
              "--workers", "1", "--data-dir", "there", "--device", "cpu", "--micro-batch", "8"]
    assert same_run(main(resume), straight)
    for name in ("student.pth", "attention.png"):                    # what a late stop leaves out
        (out / name).unlink()
    assert same_run(main(resume), straight) and {p.name for p in out.iterdir()} == RUN_FILES
    for picture in out.glob("*.png"):
        assert picture.read_bytes() == (straight / picture.name).read_bytes()


def test_process_two_under_torchrun(run, folder, teacher, tmp_path):
    output = torchrun(*arguments(folder, teacher, "--micro-batch 3", tmp_path / "two"))
    assert same_function(run, tmp_path / "two") and output.count("epoch 2, step 10") == 1
    for one, two in zip(log_of(run), log_of(tmp_path / "two")):
        assert one.get("knn") == pytest.approx(two.get("knn"), abs=0.13)   # 16 images: two of them
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-3)


def test_process_two_fine_tune_under_torchrun(run, folder, tmp_path):
    """With a test set that does not divide among them."""
    images = shutil.copytree(folder, tmp_path / "images")
    (images / "val" / "a" / "40.png").unlink()
    flags = "--mixup 0 --erasing 0.5 --blr 0.1 --micro-batch 3"
    one = tune(run / "student.pth", images, flags, tmp_path / "one")
    output = torchrun("--init", run / "student.pth", "--data", images, "--epochs", 2,
                      "--batch-size", 8, *flags.split(), "--out", tmp_path / "two",
                      program=finetune)
    two = json.loads(output.splitlines()[-1])
    for a, b in zip(log_of(one["out"]), log_of(two["out"])):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
        assert b.get("test_loss", 0) == pytest.approx(a.get("test_loss", 0), rel=1e-3)
