"""Tests of the experiments, run with all others by python -m pytest. They need no network and no
data; what needs matplotlib or transformers is skipped where these are missing."""

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

import data
import dmae
import finetune
from dmae import DMAE, MAE, ViT
from data import InputError
from experiments import analyze, deploy, detect, first_run, loader, rivals, speed, study

# torchvision announces the end of its decoders; the core does without them when it comes. The other
# one is between pycocotools and numpy.
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding"),
              pytest.mark.filterwarnings("ignore:__array__ implementation")]


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch, tmp_path):
    """800 training and 80 test images in the place of 20,000 and 2,000; an empty folder."""
    monkeypatch.setattr(dmae, "bf16_gain", lambda: 1.0)
    whole = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda count, seed: whole(count // 25, seed))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


@pytest.fixture
def model():
    """The model in run/student.pth; its teacher is in teacher.pth."""
    torch.manual_seed(1)
    dmae.save_student(Path("teacher.pth"), MAE(ViT(64, 8, 3, 24, 3, 3), 16, 1, 2))
    model = DMAE(MAE(ViT(32, 4, 3, 32, 2, 4), 16, 1, 2), dmae.load_vit("teacher.pth"))
    Path("run").mkdir()
    dmae.save_student(Path("run/student.pth"), model)
    return model


def fails(program, words, argv, capsys):
    """A program refuses a command line in one line that has these words, with status 2."""
    with pytest.raises(SystemExit) as stopped:
        program.main([str(word) for word in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1, error


# ========================================================================================= analysis


def test_distance_and_entropy_against_numpy_and_torchs_distributions():
    """Of patches alone. Looking at oneself has neither distance nor entropy."""
    scores, places = torch.randn(1, 2, 7, 7), np.array(list(np.ndindex(2, 3)))
    looks = torch.distributions.Categorical(logits=scores[:, :, 1:, 1:])
    apart = torch.tensor(np.linalg.norm(places[:, None] - places, axis=2)).float()
    expected = torch.stack([(looks.probs * apart).sum(dim=-1), looks.entropy()]).mean(dim=-1)
    torch.testing.assert_close(analyze.distance_and_entropy(scores, (2, 3)), expected)
    assert analyze.distance_and_entropy(200 * torch.eye(7)[None, None], (2, 3)).abs().max() < 1e-6


def test_hsic_against_sums_over_distinct_samples():
    """Song et al. 2012, before it is simplified: averages over distinct i, j, q, r."""
    K, L = (analyze.gram(torch.randn(7, 3)) for _ in range(2))
    pairs = [(K[i, j] * (L[i, j] + L[q, r] - 2 * L[i, q])).item()
             for i, j, q, r in itertools.permutations(range(7), 4)]
    assert analyze.hsic(torch.stack([K, L]))[0, 1].item() == pytest.approx(np.mean(pairs))


def test_cka_of_rotations_scalings_and_noise():
    x, y = torch.randn(2048, 24), torch.randn(2048, 40)
    rotation, related = torch.linalg.qr(torch.randn(24, 24)).Q, x @ torch.randn(24, 40) + 3 * y
    features = x, x @ rotation * 5 + 2, related
    found = analyze.cka(analyze.hsic(torch.stack([analyze.gram(part) for part in features])))
    assert found[0, 1].item() == pytest.approx(1, abs=1e-5) and 0.1 < found[0, 2] < 0.9


def test_measure_is_the_mean_over_images_whatever_the_pieces():
    vits = [ViT(32, 8, 3, 24, 2, 3), ViT(48, 8, 3, 24, 3, 3)]
    sources = [analyze.open_images("shapes", "data", vit) for vit in vits]
    (_, large), cka = analyze.measure(vits, sources, torch.arange(16), batch=8, piece=3)
    (_, again), _ = analyze.measure(vits, sources, torch.arange(16), batch=8, piece=16)
    _, cka_again = analyze.measure(vits, sources, torch.arange(21), batch=8, piece=16)
    assert torch.allclose(again, large) and torch.allclose(cka, cka_again, atol=1e-5)
    seen, _ = next(sources[1].plain(torch.arange(16)))
    tokens, scores = vits[1](seen, tokens_of=range(4), scores_of=[2])
    expected = analyze.distance_and_entropy(scores[2], (6, 6)).mean(1)
    assert torch.allclose(large[:, 1].float(), expected, atol=1e-5)
    # The input of block 2 is what its norm1 hands on, patches only; last comes the output.
    vits[1].norm.weight.data *= 2
    for i, seen_by in ((1, vits[1].blocks[1].norm1(tokens[1])), (3, vits[1].encode(seen))):
        found = analyze.representations(vits[1], tokens)[i]
        torch.testing.assert_close(found, seen_by[:, 1:].flatten(1))


def test_an_analysis_leaves_numbers_and_figures(model, capsys):
    pytest.importorskip("matplotlib")
    numbers = analyze.main("run/student.pth --teacher teacher.pth --pictures 2 --out a".split())
    saved = json.loads(Path("a/analysis.json").read_text())
    assert saved == json.loads(json.dumps(numbers)) and saved["settings"]["images"] == 80
    ours, theirs = saved["models"]
    assert (ours["name"], theirs["name"]) == ("run", "teacher")
    assert ours["entropy_uniform"] == pytest.approx(math.log(64))
    assert np.shape(saved["cka"]["teacher | run"]) == (4, 3)
    assert np.allclose(saved["mixers"]["run scores:2:3"], model.mixers["scores:2:3"].detach())
    pictures = {path.name for path in Path("a").glob("*.png")}
    assert pictures == set(saved["figures"]) == {f"{name}.png" for name in (
        "distance", "entropy", "cka", "attention_class", "attention_patch", "mixer_run scores-2-3",
        "scores_run")}
    assert "uniform attention has" in capsys.readouterr().out
    for name in pictures:
        picture = data.read_image(f"a/{name}").float()
        assert min(picture.shape[1:]) > 100 and picture.std() > 10
    fails(analyze, "holds an analysis", ["run/student.pth", "--out", "a"], capsys)


def test_agreement_of_scores_is_the_distance_that_is_trained_on(model):
    images, M = torch.randn(6, 3, 32, 32), model.mixers["scores:2:3"].detach()
    vit = dmae.load_vit("run/student.pth")
    found, (ours, mixed, theirs) = analyze.agreement(vit, "teacher.pth", images, M)
    noise = torch.rand(6, 64, generator=torch.Generator().manual_seed(0))
    expected = model(images[3:], model.student.choose(noise)[3:])["scores"].item()
    assert found["masked"]["learnt"] == pytest.approx(expected, rel=1e-4)
    assert torch.allclose(torch.einsum("ts,bsqk->btqk", M, ours), mixed, atol=1e-5)
    seen = dmae.images_for(model.teacher, vit, images)
    whole = model.teacher(seen, scores_of=[3])[1][3]
    assert torch.equal(theirs, whole[:1])
    own = vit(images, scores_of=[2])[1][2]
    fitted = analyze.through(analyze.fit_mixer(own[:3], whole[:3]), own[3:])
    for name, guess in dict(zeros=0, fitted=fitted, mean_map=whole[:3].mean(0)).items():
        error = (whole[3:] - guess).square().mean().item()
        assert found["whole"][name] == pytest.approx(error, rel=1e-4)
    # A teacher whose scores are a mixture of the student's own is fitted exactly.
    mixed = torch.einsum("ts,bsqk->btqk", 2 * M, ours)
    assert torch.allclose(analyze.fit_mixer(ours, mixed), 2 * M, atol=1e-3)


def test_what_does_not_apply_is_left_out_and_said(model, monkeypatch, capsys):
    """Mixers of another teacher and of probabilities; CKA of images all alike; figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    Path("probs").mkdir()
    dmae.save_student(Path("probs/student.pth"), DMAE(model.student, model.teacher, match="probs"))
    Path("run/config.json").write_text(json.dumps(dict(teacher_sha256="of another file")))
    for i in range(8):
        Image.new("RGB", (32, 32), "red").save(f"run/{i}.png")
    numbers = analyze.main("run/student.pth probs/student.pth --teacher teacher.pth --data run "
                           "--batch-size 5 --workers 0".split())
    output = capsys.readouterr().out
    assert "probs: its M is not between the scores" in output and "CKA is undefined" in output
    assert "run: distilled from another teacher" in output and "pip install matplotlib" in output
    assert all("learnt" not in errors["masked"] for errors in numbers["scores"].values())
    assert "NaN" not in Path("analysis/analysis.json").read_text()


def test_bad_analysis_input_is_one_line_and_names_differ(model, capsys):
    paths = ["a/x/student.pth", "b/x/student.pth", "x 2.pth.tar", "y.v1.pth", "y.v2.pth:3", "$.pth"]
    assert analyze.names_of(paths) == ["x", "x 2", "x 2 2", "y.v1", "y.v2", "_"]
    student = "run/student.pth"
    content = torch.load(student, weights_only=True)
    content["model"]["norm.bias"][0] = math.nan
    torch.save(content, "nan.pth")
    for words, *argv in (
            ("run has 2 blocks", student, "--block", 3), ("not finite", "nan.pth"),
            ("from --batch-size, 64", student, "--images", 4),
            ("of the 80 that", student, "--images", 99), ("4 to", student, "--batch-size", 3),
            ("inside the data", student, "--data", "run", "--out", "run/a"),
            ("File exists: 'nan.pth'", student, "--out", "nan.pth"), ("are missing", "--seed", 1)):
        fails(analyze, words, argv, capsys)
    assert not Path("analysis").exists()


# ============================================================================================ speed


def test_counted_costs_are_those_of_the_hand_count():
    """Of the paper's models; 2 for a multiply-add. Teacher 8.05 GFLOP, student 1.69, decoder 0.27:
    only kept patches are embedded, and of the teacher's last block there are queries and keys."""
    s = argparse.Namespace(task="dmae", student="tiny", teacher="base", image_size=224,
                           patch_size=16, compile=False, device="cpu", amp="off")
    run, ids = dmae.Run(s, None), torch.rand(4, 196).argsort(dim=1)[:, :49]
    operations, _ = speed.costs(s, run, torch.randn(4, 3, 224, 224), ids)
    assert operations / 1e9 == pytest.approx(8.05 + 1.69 + 0.27, abs=0.02)
    s.task = "finetune"
    operations, kept = speed.costs(s, run, torch.randn(4, 3, 224, 224), torch.arange(4))
    assert operations / 1e9 == pytest.approx(7.46, abs=0.01)
    # Of a block: what goes into its halves, two norms, qkv, attention, MLP: 16 numbers of 4 bytes.
    assert kept / (12 * 197 * 192 * 4) == pytest.approx(16, rel=0.05)


def test_the_plain_way_computes_the_same(capsys, monkeypatch):
    monkeypatch.setattr(speed, "best_product", lambda *_: 1e11)               # it takes seconds
    small = "--student nano --image-size 32 --patch-size 8 --against plain --batch-size"
    ours, plain = lines = speed.main(
        f"--teacher micro {small} 6 --micro-batch 4 --steps 2".split())
    assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=1e-4)
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines
    share = ours["gflop_per_image"] * ours["images_per_second"] / 100
    assert ours["share_of_best_product"] == pytest.approx(share, abs=0.002, rel=0.1)
    assert ours["images_per_second"] * ours["ms_per_step"] == pytest.approx(6000, rel=0.02)
    for task in ("mae", "finetune"):
        ours, plain = speed.main(f"--task {task} {small} 4 --amp bf16 --steps 1".split())
        assert ours["first_loss"] == pytest.approx(plain["first_loss"], rel=0.02)
        assert ours["task"] == task and ours["teacher"] is None
    fails(speed, "not for this task", ["--against", "hf", "--task", "mae"], capsys)


def test_hugging_faces_way_is_given_the_same_images_and_noise():
    pytest.importorskip("transformers", minversion="5")
    s = argparse.Namespace(task="dmae", student="nano", teacher="micro", image_size=32,
                           patch_size=8, compile=False)
    model, _ = speed.build("hf", s, torch.device("cpu"))
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    hidden = model.teacher(images, noise=noise, output_hidden_states=True).hidden_states[-2]
    scores = model.scores(model.teacher, hidden)
    model.teacher.set_attn_implementation("eager")
    attention = model.teacher(images, noise=noise, output_attentions=True).attentions[-1]
    assert torch.allclose(scores.softmax(dim=-1), attention, atol=1e-5)
    assert model(images, noise)["loss"].requires_grad


def test_loader_measures_photograph_like_files(capsys):
    loader.make_photographs(".", 2)
    assert Image.open("class0/0.jpg").size == (500, 375)
    line = loader.main(["--data", ".", "--images", "2", "--rounds", "1"])
    assert line == json.loads(capsys.readouterr().out) and 60 < line["mean_kilobytes"] < 110
    fails(loader, "two or more folders", ["--data", "class0"], capsys)
    fails(loader, "from 1 to", ["--rounds", "0"], capsys)


# =============================================================================== study and the rest


def test_a_difference_counts_beyond_two_standard_errors():
    """2, 3 and 2 points: their mean, deviation / sqrt(3). Paired t-tests have p = 0.020, 0.23,
    0.074; two seeds decide nothing, and one has no error."""
    base = {0: 70.0, 1: 74.0, 2: 78.0}
    for values, said in (((72, 77, 80), "+2.33 ± 0.33 **"), ((71, 74, 80), "+1.00 ± 0.58"),
                         ((71, 77, 80), "+2.00 ± 0.58 *"), ((80, 84.1), "+10.05 ± 0.05 (2)"),
                         ((90,), "")):
        assert study.difference(dict(enumerate(values)), base) == said


def test_every_cell_is_a_command_of_its_program():
    """The flags of each parse, and no student is trained by the command of another."""
    s = argparse.Namespace(seeds="0,1", rows=None, columns=None, data=None)
    texts = {cell: study.command(*cell) for cell in study.cells(s)}
    programs = {"dmae.py": dmae, "finetune.py": finetune, "experiments.detect": detect,
                "experiments.rivals": rivals, "experiments.analyze": analyze}
    for cell, text in texts.items():
        name, *argv = text.removeprefix("python ").removeprefix("-m ").split()
        first = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
        assert all(word in study.LEFT_BY or word in rivals.METHODS for word in first)
        with dmae.command_line(name, programs[name].FLAGS, argv[len(first):]) as given:
            assert given["seed"] == cell[2] and (
                given["data"] == cell[0] or cell[3].startswith(("transfer", "box", "mask")))
    students = [text for cell, text in texts.items() if cell[3] == "pretrain"]
    assert len(set(students)) == len(students) > 40


def test_first_run_measures_once(tmp_path, monkeypatch):
    lines, key = [], dict(row="D-MAE", column="k-NN", seed=0)
    for _ in range(2):                                          # the second has nothing to do
        first_run.run(tmp_path / "lines", lines, key,
                      "dmae.py --train-images 128 --epochs 1 --workers 0", tmp_path / "run")
    line, = first_run.read(tmp_path / "lines")
    log = [json.loads(text) for text in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines == [line] and line.items() >= (key | dict(
        top1=log[1]["knn"], untrained=log[0]["knn"], knn_teacher=log[0]["knn_teacher"])).items()
    asked = []                                     # what it asks for is what has been measured
    monkeypatch.setattr(first_run, "run", lambda path, lines, key, command, out: asked.append(
        key | dict(command=f"python {command}")))
    first_run.main([])
    assert all(any(x.items() <= line.items() for x in asked)
               for line in first_run.read(first_run.FLAGS["results"][0]))


def test_deployed_programs_agree(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = finetune.Classifier(10, image_size=32, patch_size=4, width=96, depth=2, heads=4)
    file = tmp_path / "model.pth"
    torch.save(dict(model=model.state_dict(), config=model.config), file)
    lines = deploy.main([str(file), "--steps", "1", "--out", str(tmp_path / "out")])
    assert " ".join(x["file"] for x in lines) == "model.pth model.pt2 model.onnx model_int8.onnx"
    exact, same, onnx, small = (line["difference"] for line in lines)
    assert exact == same == 0 and onnx < 1e-5 < small < 0.1
    assert lines[3]["megabytes"] < 0.5 * lines[2]["megabytes"]     # weights a quarter, graph whole
    fails(deploy, "a file of an encoder", [], capsys)
    fails(deploy, "out holds model.pt2", [file, "--out", tmp_path / "out"], capsys)
    torch.save(dict(model=model.state_dict(), config=model.config | dict(classes=["a"] * 10)), file)
    fails(deploy, "shapes has not the classes", [file, "--data", "shapes", "--out", "new"], capsys)
    assert not Path("new").exists()


def test_losses_of_the_rivals_are_those_of_the_papers():
    vit, q, keys = ViT(16, 4, 3, 32, 2, 4), torch.randn(6, 5), torch.randn(6, 5)
    sure = torch.cosine_similarity(q[:, None], keys, dim=2).div(0.2).softmax(dim=1).diagonal()
    torch.testing.assert_close(rivals.MoCoV3(vit, 3).contrast(q, keys), -0.4 * sure.log().mean())
    model = rivals.DINO(vit, 3)
    model.centre.fill_(0.3)
    s, t = torch.randn(6, 1024), torch.randn(6, 1024)                  # two views of three images
    expected = nn.functional.cross_entropy(s.roll(3, 0) / 0.1, ((t - 0.3) / 0.04).softmax(dim=1))
    torch.testing.assert_close(model.cross_entropy(s, t), expected, rtol=1e-5, atol=0)
    vit, images, labels = ViT(32, 4, 3, 32, 2, 4), torch.randn(2, 3, 32, 32), torch.arange(2)
    model = rivals.SimMIM(vit, 3)
    _, mask = model.inputs([images], labels, torch.Generator().manual_seed(0))
    units = mask.view(2, 4, 2, 4, 2).transpose(2, 3).flatten(3).flatten(1, 2)      # images unit 4
    assert (units.all(-1) | ~units.any(-1)).all() and (mask.sum(1) == 40).all()    # 10 of 16 units
    x = vit.embed(images)
    x[:, 1:][mask] = (model.mask_token + vit.pos_embed[:, 1:]).expand(2, -1, -1)[mask]
    for block in vit.blocks:
        x, _ = block(x)
    error = model.head(vit.norm(x))[:, 1:] - vit.patchify(images)
    torch.testing.assert_close(model(images, mask)["loss"], error[mask].abs().mean())
    model = rivals.Supervised(vit, 3)
    expected = nn.functional.cross_entropy(model.head(vit.encode(images)[:, 1:].mean(1)), labels)
    torch.testing.assert_close(model(images, labels)["loss"], expected)
    factors = rivals.jitter(torch.full((400, 1, 2, 2), 0.5), torch.manual_seed(0))[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4
    layers = rivals.mlp(2, 3, 4, activation=nn.ReLU, batch_norm=True)
    assert [type(layer) for layer in layers] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d]
    assert [layer.affine for layer in layers[1::3]] == [True, False]


@pytest.mark.parametrize("kind, rate", [(rivals.MoCoV3, 0.01), (rivals.DINO, 0.004)])
def test_averages_follow_and_give_the_targets_and_the_centre_moves(kind, rate):
    model = kind(ViT(16, 4, 3, 32, 2, 4), 3)
    before = [p.clone() for p in model.average.parameters()]
    for name, p in model.named_parameters():
        p.data += 0 if name.startswith("average.") else 0.1
    for done, share in ((1, 0), (0.25, 0.1 * rate * 0.853553)):       # half a cosine, down to 0
        model.after_step(done)
        for p, old in zip(model.average.parameters(), before, strict=True):
            torch.testing.assert_close(p, old + share)
    views, (vit, neck, *scores) = torch.randn(4, 2, 3, 16, 16), model.average
    x = views.transpose(0, 1).flatten(0, 1)                                    # first views first
    ours, theirs = model.encoder.encode(x)[:, 0], neck(vit.encode(x)[:, 0])
    if kind is rivals.DINO:
        theirs = scores[0](nn.functional.normalize(theirs, dim=1))
        ours = model.prototypes(nn.functional.normalize(model.neck(ours), dim=1))
        expected = model.cross_entropy(ours, theirs)
        assert model.prototypes.weight.norm(dim=1).allclose(torch.ones(1024), atol=0.2)
    else:
        ours = model.predictor(model.projector(ours))
        expected = model.contrast(ours[:4], theirs[4:]) + model.contrast(ours[4:], theirs[:4])
    torch.testing.assert_close(model(views, None)["loss"], expected)
    assert kind is rivals.MoCoV3 or torch.allclose(model.centre[0], 0.1 * theirs.mean(dim=0))


@pytest.mark.parametrize("method", ["simmim", "mocov3", "dino", "supervised"])
def test_a_rival_leaves_a_student_that_the_core_reads(method, monkeypatch):
    seeds, jitter = Mock(wraps=data.seed_of), Mock(wraps=rivals.jitter)
    monkeypatch.setattr(rivals, "seed_of", seeds)
    monkeypatch.setattr(rivals, "jitter", jitter)
    out = rivals.main([method, *"--student nano --epochs 17 --batch-size 64 --blr 6e-3 --workers 0 "
                       "--image-size 16 --out run".split()])
    log = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    assert log[1]["lr"] == pytest.approx(dmae.learning_rate(11, 204, 20, 6e-3 / 4))
    assert log[17]["loss"] < log[1]["loss"] or method == "dino"
    views = 1 + (method in ("mocov3", "dino"))                   # each of its own crops and colours
    assert len({x.args for x in seeds.call_args_list}) == seeds.call_count == 204 * (1 + views)
    assert jitter.call_count == 204 * (views if views > 1 else 0)
    checkpoint = torch.load(out / "checkpoint.pth")
    group = checkpoint["optimizer"]["param_groups"][0]
    assert tuple(group["betas"]) == (0.9, 0.95) and group["weight_decay"] == pytest.approx(
        dict(mocov3=0.1, dino=0.4).get(method, 0.05), rel=2e-3)
    assert views == 1 or checkpoint["model"]["average.0.norm.weight"].ne(1).any()     # it has moved
    before = (out / "student.pth").read_bytes()
    assert rivals.main([method, "--resume", str(out)]) == out                # nothing is left to do
    assert (out / "student.pth").read_bytes() == before
    vit = dmae.load_vit(out / "student.pth")
    images, _ = next(analyze.open_images("shapes", "data", vit).plain(torch.arange(20)))
    assert dmae.pooled_features(vit, images).std(dim=0).mean() > 0.05    # 204 steps: not collapsed


def test_rivals_refuse_what_does_not_suit_them(capsys):
    dmae.main(["--teacher", "none", "--epochs", "0", "--out", "mae"])
    small = ["--data", "shapes", "--image-size"]
    for words, argv in (("not a run of simmim", ["simmim", "--resume", "mae"]),
                        ("not of a grid of 2 x 2", ["simmim", *small, "8"]),
                        ("not of a grid of 3 x 3", ["simmim", *small, "12"]),
                        ("must be 2 or more", ["mocov3", "--batch-size", "1"]),
                        ("two crops of an image", ["dino", "--data", "mae", "--out", "files"]),
                        ("name a method first", ["mae"])):
        fails(rivals, words, argv, capsys)


@pytest.fixture
def argv(monkeypatch):
    """The flags of a study of 200 training and 20 test images."""
    shapes = data.draw_shapes
    monkeypatch.setattr(data, "draw_shapes", lambda count, seed: shapes(count // 4, seed))
    monkeypatch.setitem(study.DATA, "shapes", study.DATA["shapes"] | dict(
        epochs=2, half=1, train=200, held=40, teacher=dmae.RECIPES["shapes"]["teacher"]))
    return ["--data", "shapes", "--results", "r.jsonl", "--seeds", "0,1"]


def test_the_study_runs_each_cell_once_and_again_if_its_flags_change(monkeypatch, argv, capsys):
    asked = [*argv, "--rows", "mae", "--columns", "knn"]
    study.main(asked)
    title = "shapes: top-1 in percent, here and on Fashion-MNIST"
    table = study.main(asked)[title]                                            # not run again
    study.main([*argv[:-1], "1", "--rows", "untrained,simmim", "--columns", "knn"])
    lines = first_run.read("r.jsonl")
    assert [(x["row"], x["seed"], x["column"]) for x in lines] == [
        ("mae", 0, "pretrain"), ("mae", 0, "knn"), ("mae", 1, "pretrain"), ("mae", 1, "knn"),
        ("untrained-teacher", 0, "pretrain"), ("untrained", 1, "pretrain"),
        ("untrained", 1, "knn"), ("simmim", 1, "pretrain"), ("simmim", 1, "knn")]
    mae = [100 * x["top1"] for x in lines if (x["row"], x["column"]) == ("mae", "knn")]
    assert f"| MAE | {np.mean(mae):.1f} ± {np.std(mae, ddof=1):.1f} (2) |\n" in table
    for before, x in itertools.pairwise([{}, *lines]):      # what a line says is what has run
        alone = x["column"] == "pretrain" and x["row"] != "untrained"
        assert x["files_sha256"] == ([] if alone else [before["sha256"]])
        if x["column"] == "pretrain":
            out = Path(study.folder(x["command"]))
            rates = [y["images_per_second"] for y in first_run.read(out / "log.jsonl")[1:]]
            assert x["minutes"] == pytest.approx(sum(128 / rate for rate in rates) / 60)
    Path(study.student("shapes", "simmim", 1)).unlink()
    Path(study.folder(lines[7]["command"]), "checkpoint.pth").unlink()
    study.main([*argv[:-1], "1", "--rows", "simmim", "--columns", "linear"])
    again = first_run.read("r.jsonl")[9:]        # trained anew, to the same bits
    assert [x["column"] for x in again] == ["pretrain", "linear"]
    assert again[0]["sha256"] == lines[7]["sha256"]
    monkeypatch.setitem(study.ALL_ROWS, "mae", ("MAE", "mae", "--mask-ratio 0.5"))
    table = study.main([*argv, "--rows", "scratch", "--columns", "knn"])[title]
    assert "| MAE |" not in table and "| none (scratch) |" in table
    probe = Mock(wraps=finetune.linear_probe)
    monkeypatch.setattr(finetune, "linear_probe", probe)
    study.main([*argv[:-1], "0", "--rows", "mae,mae@6e-3", "--columns", "knn,held-out"])
    lines = first_run.read("r.jsonl")[13:]
    assert [x["column"] for x in lines] == ["pretrain", "held-out", "pretrain", "knn"]
    assert lines[0]["images"] == 2 * 128
    _, (_, learnt), (_, tested) = probe.call_args.args    # learnt: what --train-images 160 leaves
    seen, _ = data.open_data("shapes", data.SETS["shapes"], (32, 32), train_images=160)
    assert torch.equal(learnt.sort()[0], seen.labels.sort()[0]) and len(tested) == 40
    fails(study, "--rows dame: choose from scratch", ["--rows", "dame"], capsys)
    fails(study, "put weights/dinov2.safetensors in its", ["--rows", "mae,from-dinov2"], capsys)
    monkeypatch.setattr(study, "measure", lambda s, *cell: asked.append(cell[1]))
    study.main(["--results", "r.jsonl", "--columns", "pretrain"])    # without what cannot be
    assert "from-dino" in asked and "from-dinov2" not in asked
    pytest.importorskip("matplotlib")
    study.main(["--report", "--results", "r.jsonl"])
    assert Image.open("study.png").size == (860, 360)
    Path("bad.jsonl").write_text('{"data": 1}')
    fails(study, "not lines of this program", ["--report", "--results", "bad.jsonl"], capsys)


def test_the_study_looks_inside(monkeypatch, argv):
    """Seed 0 beside supervised seed 1; what is fine-tuned by itself."""
    columns = "distance-1-3", "cka-4-6", "tuned-distance-4-6"
    monkeypatch.setitem(study.TABLES, "inside", (
        ["shapes"], ["mae", "dmae"], {name: study.COLUMNS[name] for name in columns}))
    monkeypatch.setitem(analyze.FLAGS, "batch_size", (8, (int, 4, 100), ""))
    table = study.main([*argv[:-1], "0", "--rows", "mae", "--columns", ",".join(columns)])[
        "shapes: inside"]
    student, *lines = first_run.read("r.jsonl")
    assert [(x["row"], x["seed"], x["column"]) for x in (student, *lines)] == [
        ("mae", 0, "pretrain"), ("supervised", 1, "pretrain"), ("mae", 0, "distance-1-3"),
        ("mae", 0, "all"), ("mae", 0, "tuned-distance-4-6")]
    line, tuned = lines[1], lines[3]
    found = json.loads(Path(study.folder(line["command"]), "analysis.json").read_text())
    mae, supervised = found["models"]
    distance = 4 * np.mean(mae["distance"], axis=1)                            # pixels, by block
    cka = 100 * np.diag(found["cka"][f"{supervised['name']} | {mae['name']}"])[1:]
    for name, values in (("distance", distance), ("cka", cka)):
        assert [line[f"lower_{name}"], line[f"higher_{name}"]] == pytest.approx(
            [values[:3].mean(), values[3:].mean()])
    assert f"| MAE | {line['lower_distance']:.1f} (1) | {line['higher_cka']:.1f} (1) | " in table
    assert "higher_cka" not in tuned


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_the_pyramid_has_strides_of_4_to_64_and_every_patch_in_its_place(patch):
    pyramid = detect.Pyramid(ViT(64, patch, 3, 16, 1, 2), 8, contextlib.nullcontext())
    maps = pyramid(torch.rand(2, 3, 64, 64))
    assert [tuple(x.shape) for x in maps.values()] == [(2, 8, s, s) for s in (16, 8, 4, 2, 1)]
    sum(x.square().sum() for x in maps.values()).backward()
    assert pyramid.vit.patch_embed["proj"].weight.grad.abs().sum() > 0
    tokens = torch.randn(1, 1 + (64 // patch) ** 2, 16)
    pyramid.vit.forward = lambda images, tokens_of: ({1: tokens}, {})
    before = pyramid(None)["0"]
    row, column = 1, 64 // patch - 1                                   # of the patch that changes
    tokens[0, 1 + row * (64 // patch) + column] += torch.randn(16)
    changed = (pyramid(None)["0"] - before)[0].abs().amax(dim=0).nonzero()
    inside = [(s * patch // 4 - 1, (s + 1) * patch // 4) for s in (row, column)]
    assert len(changed) and all(
        low <= place <= high for at in changed.tolist() for place, (low, high) in zip(at, inside))


def test_the_first_image_may_be_flat():
    """torchvision infers the strides of the maps from the first image that it sees."""
    first, second = (detect.Detector(ViT(64, 4, 3, 16, 1, 2), 2, 8, 8, contextlib.nullcontext(),
                                     box_score_thresh=0).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    first([torch.rand(3, 24, 64)])
    image = torch.rand(3, 64, 64)
    boxes, expected = (model([image])[0]["boxes"] for model in (first, second))
    assert len(boxes) and torch.equal(boxes, expected)


def test_scenes_have_exact_boxes_and_ap_is_right_of_finds_and_of_none():
    pytest.importorskip("pycocotools")
    for folder in "ab":
        detect.write_scenes(folder, "train", 12, seed=5)
    a, b = ({path.name: path.read_bytes() for path in Path(x).rglob("*.*")} for x in "ab")
    assert a == b and len(a) == 13
    drawn, found = detect.open_coco("a", "train"), []
    shrunk = detect.open_coco("a", "train", v2.Resize(64))
    for (image, target), (_, small) in zip(drawn, shrunk, strict=True):
        boxes = masks_to_boxes(target["masks"])
        assert image.shape == (3, 96, 96) and image.max() <= 1 and len(boxes) >= 1
        torch.testing.assert_close(target["boxes"].as_subclass(torch.Tensor),
                                   boxes + torch.tensor([0, 0, 1, 1]))         # to the pixels' ends
        assert target["masks"].sum(dim=0).max() == 1
        for mask in target["masks"].bool():                   # one colour, but for edge and noise
            assert image[:, mask].median(dim=1)[0].sub(image[:, mask].T).abs().median() < 0.05
        # As if found: boxes moved by a fifth, which overlap by two thirds; masks as their head is
        # taught them, 28 x 28 pixels of an image of 64, pasted back by torchvision.
        fifth = (target["boxes"][:, 2:3] - target["boxes"][:, :1]) / 5
        taught = project_masks_on_boxes(
            small["masks"], small["boxes"], torch.arange(len(boxes)), 28)
        found.append(dict(
            boxes=target["boxes"] + fifth * torch.tensor([1, 0, 1, 0]), labels=target["labels"],
            scores=torch.ones(len(boxes)),
            masks=paste_masks_in_image(taught[:, None], target["boxes"], (96, 96))))
    results = detect.detect(Mock(return_value=found), drawn)
    ap = detect.average_precision(drawn.coco, results)
    assert (ap["box_ap"], ap["box_ap50"]) == pytest.approx((40, 100))
    assert 65 < ap["mask_ap"] < 95 and ap["mask_ap"] < ap["mask_ap50"]
    assert set(detect.average_precision(drawn.coco, []).values()) == {0}


def test_detection_learns_scenes_and_goes_on_where_it_was_stopped(monkeypatch, capsys):
    pytest.importorskip("pycocotools")
    write = detect.write_scenes
    monkeypatch.setattr(detect, "write_scenes", lambda root, split, count, seed: write(
        root, split, count // 100, seed))
    dmae.save_student(Path("s.pth"), MAE(ViT(32, 4, 3, 16, 2, 2), 16, 1, 2))
    argv = ["--init", "s.pth", "--epochs", "3", "--batch-size", "4", "--blr", "0.2", "--out"]
    whole = detect.main([*argv, "whole"])
    log = [json.loads(line) for line in Path("whole/log.jsonl").read_text().splitlines()]
    assert log[-1] == whole and log[-1]["loss"] < 0.95 * log[0]["loss"]
    one, other = (path.read_bytes() for path in Path("data/scenes").glob("*/000000000001.png"))
    assert one != other                                          # of training and of testing
    assert [detect.learning_rate(step, 2700, 1.0) for step in (0, 249, 2399, 2400, 2599, 2600)
            ] == pytest.approx([1 / 250, 1, 1, 0.1, 0.1, 0.01])
    assert whole["lr"] == pytest.approx(0.2 * 4 / 256 * 0.01)
    assert Image.open("whole/detection_4.png").size == (768, 384)

    monkeypatch.setattr(detect, "seed_of", Mock(wraps=data.seed_of, side_effect=itertools.chain(
        [DEFAULT, InputError("stopped here")], itertools.repeat(DEFAULT))))   # at the second epoch
    fails(detect, "stopped here", [*argv, "part"], capsys)
    again = detect.main(["--resume", "part"])
    assert again == whole | {name: again[name] for name in ("images_per_second", "minutes")}
    dmae.save_student(Path("grey.pth"), MAE(ViT(32, 4, 1, 16, 2, 2), 16, 1, 2))
    dmae.save_student(Path("fourteen.pth"), MAE(ViT(28, 14, 3, 16, 2, 2), 16, 1, 2))
    for words, bad in (("--init is missing", []), ("for grey images", ["--init", "grey.pth"]),
                       ("a multiple of 64", ["--init", "s.pth", "--image-size", "96"]),
                       ("not a power of two", ["--init", "fourteen.pth"]),
                       ("as COCO has it", ["--init", "s.pth", "--data", "nowhere"]),
                       ("more than the 40", ["--init", "none", "--batch-size", "64"])):
        fails(detect, words, bad, capsys)


def test_detection_reads_cocos_layout_with_polygons_crowds_and_gaps(capsys):
    pytest.importorskip("pycocotools")
    square = [[8, 4, 40, 4, 40, 28, 8, 28]]
    crowd = dict(size=[48, 64], counts=[48 * 32, 48 * 32])                     # the right half
    for split in ("train", "val"):
        Path("coco", f"{split}2017").mkdir(parents=True)
        Path("coco", "annotations").mkdir(exist_ok=True)
        for i in (1, 7, 9):
            Image.new("RGB", (64, 48), "gray").save(f"coco/{split}2017/{i}.jpg")
        kinds = [(1, 90, square, 0), (1, 90, crowd, 1), (7, 3, crowd, 1)]      # nothing on the last
        Path(f"coco/annotations/instances_{split}2017.json").write_text(json.dumps(dict(
            images=[dict(id=i, file_name=f"{i}.jpg", width=64, height=48) for i in (1, 7, 9)],
            categories=[dict(id=3, name="car"), dict(id=90, name="brush")],
            annotations=[dict(id=k, image_id=i, category_id=c, segmentation=what, iscrowd=many,
                              area=768, bbox=[32, 0, 32, 48] if many else [8, 4, 32, 24])
                         for k, (i, c, what, many) in enumerate(kinds, start=1)])))
    train, val = detect.open_coco("coco", "train"), detect.open_coco("coco", "val")
    assert train.ids == [1] and val.ids == [1, 7, 9]
    [(_, target)] = train
    assert target["boxes"].tolist() == [[8, 4, 40, 28]] and target["labels"].tolist() == [2]
    assert target["masks"].sum() == 32 * 24
    dmae.save_student(Path("s.pth"), MAE(ViT(32, 16, 3, 16, 2, 2), 16, 1, 2))
    result = detect.main(["--init", "s.pth", "--data", "coco", "--image-size", "64", "--epochs",
                          "1", "--batch-size", "1", "--out", "run"])
    assert 0 <= result["box_ap"] <= 100 and Path("run/detection_3.png").exists()
    file = Path("coco/annotations/instances_train2017.json")
    good = json.loads(file.read_text())
    for words, bad in (
            ("KeyError('categories')", dict(images=good["images"], annotations=[])),
            ("annotation 1 is incomplete", good | dict(images=good["images"][1:])),
            ("among them gone.jpg", good | dict(
                images=[*good["images"], dict(id=2, file_name="gone.jpg")])),
            ("no objects", good | dict(annotations=[])), ("AssertionError", [])):
        file.write_text(json.dumps(bad))
        fails(detect, words, ["--init", "s.pth", "--data", "coco", "--out", "bad"], capsys)
    assert not Path("bad").exists()


def test_tables_of_the_texts_are_those_of_the_lines():
    printed = study.tables(study.read(study.RESULTS)).values()
    for name in ("STUDY.md", "DETECTION.md"):
        text = study.HERE.joinpath(name).read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            assert table in printed, f"{name} has a table that --report does not print:\n{table}"
    readme = study.HERE.with_name("README.md").read_text(encoding="utf-8")
    table = "\n".join(first_run.table(first_run.read(first_run.FLAGS["results"][0])))
    assert table in readme, f"write this one into README.md:\n{table}"
