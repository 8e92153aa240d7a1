"""Look inside encoders: attention distance, attention entropy, CKA, attention maps, M.

    python -m experiments.analyze runs/mae/student.pth runs/dmae/student.pth \\
        --teacher runs/teacher/student.pth --data fashion-mnist
    python -m experiments.analyze mae_tiny.pth.tar dmae_tiny.pth.tar deit_tiny.pth:3 \\
        --data /path/to/imagenet/val --images 1100

The third part of Wang et al. (ICML 2023). Writes analysis.json with every number into --out and, if
matplotlib is installed, figures beside it; prints a short table. Images are whole: nothing is
masked. All that is measured comes from the encoders' ordinary forward pass.
"""

import contextlib
import json
import math
import os
import re
import time
from pathlib import Path

import torch
from einops import einsum, rearrange
from tqdm import tqdm

from data import InputError, open_data
from dmae import (
    DMAE, MAE, Parser, as_rgb, check, check_outside, file_hash, load_vit, one_line_errors,
    read_weights, reconstructions, split_heads, write)
from finetune import check_channels

# ========================================================================================= measures


def patch_distances(grid):
    """Euclidean distance between the centres of each two patches, in patches: (n, n)."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    centres = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def attention_distance(scores, grid):
    """How far a patch looks: sum over keys of attention x distance, in patches, mean over queries.

    scores: (b, h, 1 + n, 1 + n), before the softmax; the class token's row and column are left out
    of it. Returns (b, h)."""
    attention = scores[:, :, 1:, 1:].softmax(dim=-1)                                  # b h n n
    distances = patch_distances(grid).to(attention)
    return einsum(attention, distances, "b h q k, q k -> b h q").mean(dim=-1)


def attention_entropy(scores):
    """-sum a ln a over keys of the same attention, in nats, mean over queries: (b, h)."""
    logs = scores[:, :, 1:, 1:].contiguous().log_softmax(dim=-1)      # twice as fast as of a view
    return -(logs.exp() * logs).sum(dim=-1).mean(dim=-1)


def representations(vit, tokens):
    """What CKA compares, of patch tokens alone: the input of each block after its norm1, and the
    output after the final norm. tokens: {i: (b, 1 + n, c)}, 0 to depth -> depth + 1 of (b, n c)."""
    seen = [block.norm1(tokens[i]) for i, block in enumerate(vit.blocks)]
    seen.append(vit.norm(tokens[vit.depth]))
    return [x[:, 1:].flatten(1) for x in seen]


def gram(x):
    """Linear kernel of samples (m, c) -> (m, m) float64, its diagonal zero, as the estimate below
    wants it. Centring changes that estimate by rounding alone, for the better."""
    x = x - x.mean(dim=0)
    return (x @ x.T).double().fill_diagonal_(0)


def hsic(grams):
    """Unbiased estimate of HSIC (Song et al. 2012, eq. 5) of each two of p kernels:
    (p, m, m), diagonals zero, m at least 4 -> (p, p)."""
    m = grams.shape[1]
    flat, rows, total = grams.flatten(1), grams.sum(dim=2), grams.sum(dim=(1, 2))
    return (flat @ flat.T + torch.outer(total, total) / ((m - 1) * (m - 2))
            - rows @ rows.T * 2 / (m - 2)) / (m * (m - 3))


def cka(mean_hsic):
    """Minibatch CKA: HSIC (p, p), averaged over minibatches, over the root of its diagonal."""
    scale = mean_hsic.diagonal().clamp(min=0).sqrt()
    return mean_hsic / torch.outer(scale, scale)


@torch.no_grad()
def measure(vits, sources, indices, batch, piece=16):
    """Distance and entropy [(blocks, heads) for each vit], CKA (p, p) over all blocks of all.

    sources: for each vit, the images as it takes them. batch: images in a minibatch of CKA; the
    last, incomplete one is left out of it. Memory does not depend on the number of images."""
    distances, entropies, total, batches = [0] * len(vits), [0] * len(vits), 0, 0
    for part in tqdm(indices.split(batch), "images", unit=f" x {batch}", leave=False):
        grams = []
        for i, (vit, source) in enumerate(zip(vits, sources)):
            found = []
            for images in source.plain(part, piece):
                scores, tokens = vit(images, scores=range(1, vit.depth + 1),
                                     tokens=range(vit.depth + 1))
                distances[i] += torch.stack([attention_distance(scores[k], vit.grid).sum(dim=0)
                                             for k in scores]).double()
                entropies[i] += torch.stack([attention_entropy(scores[k]).sum(dim=0)
                                             for k in scores]).double()
                found.append(representations(vit, tokens))
            grams += [gram(torch.cat(x)) for x in zip(*found)]
        if len(part) == batch:
            total, batches = total + hsic(torch.stack(grams)), batches + 1
    mean = [[x / len(indices) for x in kind] for kind in (distances, entropies)]
    return *mean, cka(total / batches)


# =========================================================================================== models


def load_student(path):
    """What else is in this project's student.pth: dict(mae=MAE, mixers={"i:j": M}, match=what they
    match, scores or another); None for other files."""
    path, _ = split_heads(path)
    content = read_weights(path)
    if not {"model", "decoder", "mixers", "config"} <= content.keys():
        return None
    keys = ("decoder_width", "decoder_depth", "decoder_heads", "mask_ratio", "norm_pix",
            "decode_after")
    try:
        mae = MAE(load_vit(path), **{key: content["config"][key] for key in keys})
        encoder = {f"encoder.{name}": tensor for name, tensor in content["model"].items()}
        mae.load_state_dict(encoder | content["decoder"])
    except (LookupError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} looks like a student.pth, but its decoder does not fit its "
                         "config: write it anew with dmae.py") from error
    match = content["config"].get("match", "scores")
    return dict(mae=mae.eval(), mixers=content["mixers"], match=match)


def names_of(paths):
    """Short names, each different: the folder of a student.pth or model.pth, else the file."""
    names = []
    for path in (split_heads(path)[0] for path in paths):
        name = (path.resolve().parent.name if path.name in ("student.pth", "model.pth")
                else re.sub(r"(\.pth|\.tar|\.safetensors)+$", "", path.name)).replace("$", "_")
        number = 1
        while name + f" {number}" * (number > 1) in names:
            number += 1
        names.append(name + f" {number}" * (number > 1))
    return names


def open_images(data, data_dir, vit, device, workers):
    """Images to look at, as `vit` takes them: a test split, or all of a folder without one."""
    check_channels(vit, data)
    row = dict(mean=vit.config["mean"], std=vit.config["std"], crop_scale=1.0)
    train, test = open_data(data, row, tuple(vit.config["image_size"]), data_dir, device=device,
                            workers=workers)
    return test or train


def fit_mixer(ours, theirs):
    """The M (t, s) for which M ours is nearest to theirs: scores (b, s, n, n), (b, t, n, n)."""
    a, b = (rearrange(x, "b h q k -> h (b q k)").double() for x in (ours, theirs))
    return torch.linalg.lstsq(a @ a.T, a @ b.T).solution.T.float()


def through(M, scores):
    return einsum(M.to(scores), scores, "t s, b s q k -> b t q k")


@torch.no_grad()
def agreement(vit, teacher_file, images, learnt=None):
    """How near the scores of the last block are to those of the teacher's, through a mixer.

    Mean squares over the second half of the images, under a mask of 75 %, as in training, and on
    whole images: `zeros`, of predicting nothing; `mean_map`, the teacher's scores averaged over the
    first half, blind to the image (whole ones only); `fitted`, the mixer that is best on the first
    half; `learnt`, the student's own. Returns these, and (ours, mixed, theirs) of the first image,
    through the learnt mixer if there is one."""
    teacher = load_vit(teacher_file).to(images.device)
    pair = DMAE(MAE(vit, decoder_width=4, decoder_depth=0, decoder_heads=1), teacher)
    noise = torch.rand(len(images), math.prod(vit.grid), generator=torch.Generator().manual_seed(0))
    half, out = len(images) // 2, {}
    for kind, ids_keep in (("masked", pair.student.choose(noise.to(images.device))),
                           ("whole", None)):
        ours = vit(images, ids_keep, scores=[vit.depth])[0][vit.depth]
        theirs = teacher(pair.teacher_images(images), ids_keep, scores=[teacher.depth])[0][
            teacher.depth]
        fitted = fit_mixer(ours[:half], theirs[:half])
        guesses = dict(zeros=torch.zeros_like(theirs[:1]), fitted=through(fitted, ours))
        if kind == "whole":
            guesses["mean_map"] = theirs[:half].mean(dim=0, keepdim=True)
        if learnt is not None:
            guesses["learnt"] = through(learnt, ours)
        out[kind] = {name: (guess[-half:] - theirs[-half:]).square().mean().item()
                     for name, guess in guesses.items()}
    M = fitted if learnt is None else learnt
    return out, (ours[:1], through(M, ours[:1]), theirs[:1])


# ========================================================================================== figures


def save(figure, path):
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))


def draw_blocks(models, key, unit, uniform, path):
    """A panel per model: each head's value and their mean, block by block."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(2.6 * len(models) + 0.8, 3.2), layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for model, panel in zip(models, panels):
        values = torch.tensor(model[key])                                             # blocks heads
        blocks = range(1, len(values) + 1)
        panel.plot(blocks, values.numpy(), "o", color="C0", alpha=0.5, markersize=4)
        panel.plot(blocks, values.mean(dim=1).numpy(), "-", color="C1", label="mean of heads")
        panel.axhline(model[f"{key}_uniform"], linestyle="--", color="grey", label=uniform)
        panel.set(title=model["name"], xlabel="block", xticks=blocks)
        if key == "distance":
            pixels = panel.secondary_yaxis("right", functions=(
                lambda y, p=model["patch_size"]: y * p, lambda y, p=model["patch_size"]: y / p))
            pixels.set_ylabel("pixels" if panel is panels[-1] else "")
    panels[0].set(ylabel=f"attention {key} ({unit})", ylim=(0, None))
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Attention {key}: one dot per head", fontsize=11)
    save(figure, path)


def draw_cka(models, similarity, path):
    """Each pair of models, and each with itself: blocks of one against blocks of the other."""
    from matplotlib.figure import Figure
    count = len(models)
    least = min((x for values in similarity.values() for row in values for x in row
                 if math.isfinite(x)), default=0)
    figure = Figure(figsize=(2.3 * count + 1.2, 2.3 * count + 0.5), layout="constrained")
    panels = figure.subplots(count, count, squeeze=False)
    for i, row in enumerate(panels):
        for j, panel in enumerate(row):
            if j > i:
                panel.set_axis_off()
                continue
            values = similarity[f"{models[i]['name']} | {models[j]['name']}"]
            image = panel.imshow(
                values, vmin=least, vmax=1, origin="lower", cmap="magma", aspect="auto")
            panel.set(xlabel=models[j]["name"] if i == count - 1 else "",
                      ylabel=models[i]["name"] if j == 0 else "",
                      xticks=range(len(values[0])), yticks=range(len(values)),
                      xticklabels=[*range(1, len(values[0])), "out"],
                      yticklabels=[*range(1, len(values)), "out"])
            panel.tick_params(labelsize=6)
    figure.colorbar(image, ax=panels, shrink=0.6, label="CKA")
    figure.suptitle("CKA of patch tokens: the input of each block, and the final output")
    save(figure, path)


def draw_maps(rows, columns, title, path, row_names):
    """rows: for each, an RGB image (3, H, W) or None, and maps (k, gh, gw), each scaled to its own
    range. columns: headings of the maps."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(1.0 * (len(columns) + 1) + 0.9, 1.05 * len(rows) + 0.7),
                    layout="constrained")
    panels = figure.subplots(len(rows), len(columns) + 1, squeeze=False)
    for line, (picture, maps), name in zip(panels, rows, row_names):
        for panel in line:
            panel.set(xticks=[], yticks=[], frame_on=False,
                      box_aspect=maps.shape[1] / maps.shape[2])
        if picture is not None:
            line[0].imshow(picture.permute(1, 2, 0).numpy())
        line[0].set_ylabel(name, fontsize=8)
        for panel, values in zip(line[1:], maps):
            shown = panel.imshow(values.numpy(), cmap="magma")
    for panel, heading in zip(panels[0, 1:], columns):
        panel.set_title(heading, fontsize=8)
    bar = figure.colorbar(shown, ax=panels, shrink=0.5, ticks=[])
    bar.set_label("least to most, each map by itself", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_reconstructions(mae, images, name, path):
    """A row per image: it, its visible patches, the prediction, and both of these together."""
    from matplotlib.figure import Figure
    pictures = reconstructions(mae, images)
    figure = Figure(figsize=(5.6, 1.4 * len(images) + 0.8), layout="constrained")
    panels = figure.subplots(len(images), 4, squeeze=False)
    headings = ("image", "visible", "prediction", "visible and\npredicted")
    for row, line in zip(panels, zip(*pictures)):
        for panel, picture, heading in zip(row, line, headings):
            panel.imshow(as_rgb(mae.encoder, picture[None])[0].permute(1, 2, 0).cpu().numpy())
            panel.set(xticks=[], yticks=[])
            if panel in panels[0]:
                panel.set_title(heading, fontsize=9)
    note = "; brightness and contrast of each patch are the true ones" * mae.norm_pix
    figure.suptitle(f"{name}, {mae.config['mask_ratio']:.0%} hidden{note}", fontsize=8)
    save(figure, path)


def attention_views(vit, images, block, query):
    """For each image: it as RGB; the same with the patch `query` framed; attention of the class
    token and of that patch to the patches, (h, gh, gw) each."""
    with torch.no_grad():
        attention = vit(images, scores=[block])[0][block].softmax(dim=-1).cpu()       # b h 1+n 1+n
    class_maps, patch_maps = (
        rearrange(attention[:, :, row, 1:], "b h (gh gw) -> b h gh gw", gh=vit.grid[0])
        for row in (0, 1 + query))
    plain = as_rgb(vit, images).cpu()
    framed, side = plain.clone(), plain.shape[2] // vit.grid[0]
    top, left = (side * x for x in divmod(query, vit.grid[1]))
    inside = framed[:, :, top + 2:top + side - 2, left + 2:left + side - 2].clone()
    framed[:, :, top:top + side, left:left + side] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    framed[:, :, top + 2:top + side - 2, left + 2:left + side - 2] = inside
    return list(zip(plain, framed, class_maps, patch_maps))


def draw_mixer(M, title, path):
    """M: a row for each head of the teacher, a column for each of the student."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(0.6 * M.shape[1] + 2.2, 0.42 * M.shape[0] + 1.4), layout="constrained")
    panel, most = figure.subplots(), M.abs().max().item()
    image = panel.imshow(M.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    panel.set(title=f"M of {title}", xlabel="head of the student", ylabel="head of the teacher",
              xticks=range(M.shape[1]), xticklabels=range(1, M.shape[1] + 1),
              yticks=range(M.shape[0]), yticklabels=range(1, M.shape[0] + 1))
    for t, row in enumerate(M.tolist()):
        for s, value in enumerate(row):
            panel.text(s, t, f"{value:.2f}", ha="center", va="center", fontsize=7,
                       color="white" if abs(value) > 0.6 * most else "black")
    figure.colorbar(image, label="weight")
    save(figure, path)


def draw_mixed(vit, view, scores, query, title, path):
    """Scores of the framed patch of one image: the student's, through the mixer, the teacher's."""
    maps = [rearrange(x[0, :, 1 + query, 1:].cpu(), "h (gh gw) -> h gh gw", gh=vit.grid[0])
            for x in scores]
    heads = [f"head {h + 1}" for h in range(max(map(len, maps)))]
    draw_maps([(view[1], x) for x in maps], heads, f"{title}: scores of the framed patch to all "
              "others, last block, before the softmax", path, ["student", "through M", "teacher"])


def table(models, between, agreements, reference):
    """A few numbers of each model on stdout: means over heads, block by block."""
    for model in models:
        print(model["name"])
        for key, unit in (("distance", "patches"), ("entropy", "nats")):
            means = " ".join(f"{torch.tensor(heads).mean():5.2f}" for heads in model[key])
            print(f"  {key:9} {means}   {unit}; uniform attention has "
                  f"{model[f'{key}_uniform']:.2f}")
        if model["name"] != reference:
            last = between[f"{reference} | {model['name']}"][-1]
            print("  CKA       " + " ".join(f"{x:5.2f}" for x in last)
                  + f"   with the output of {reference}: from the input of block 1 to the output")
        for kind, errors in agreements.get(model["name"], {}).items():
            print(f"  scores    {kind}: mean square from the teacher's "
                  + ", ".join(f"{name.replace('_', ' ')} {x:.3f}" for name, x in errors.items()))
    print("distance: times the patch size in pixels; the paper's axis shows 14 times the patches")


def find_query(text, vit):
    """Number of the patch "row,column", or of the middle one."""
    rows, columns = vit.grid
    if text is None:
        return rows // 2 * columns + columns // 2
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if not match or int(match[1]) >= rows or int(match[2]) >= columns:
        raise InputError(f"--patch {text}: write ROW,COLUMN, from 0,0 to {rows - 1},{columns - 1}")
    return int(match[1]) * columns + int(match[2])


# ===================================================================================== command line


def make_parser():
    parser = Parser(prog="python -m experiments.analyze", allow_abbrev=False,
                    description="Attention distance and entropy, CKA, attention maps, mixers.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="encoders: whatever dmae.py takes as --teacher "
        "or finetune.py as --init, x.pth or x.pth:3 to give its heads")
    add("--teacher", metavar="FILE", help="one more, whose attention the students' mixers predict")
    add("--data", default="shapes", metavar="DIR|NAME", help="its test images: val/ of a folder "
        "that has one, else all of it [shapes]")
    add("--data-dir", default="data", metavar="DIR", help="where named sets lie [data]")
    add("--images", type=int, metavar="N", help="a sample of N [1100, or all there are]")
    add("--batch-size", type=int, default=64, metavar="N", help="images in a minibatch of CKA, "
        "4 or more; fewer for small sets [64]")
    add("--block", type=int, metavar="K", help="whose attention is drawn, from 1 [the "
        "last of each]")
    add("--patch", metavar="ROW,COLUMN", help="whose attention is drawn, from 0 [the middle one]")
    add("--pictures", type=int, default=3, metavar="N", help="images with attention maps [3]")
    add("--seed", type=int, default=0, metavar="N", help="of the sample [0]")
    add("--workers", type=int, default=min(8, os.cpu_count() or 1), metavar="N",
        help="processes decoding image files [cores, at most 8]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ... [cuda if there is one]")
    add("--out", default="analysis", metavar="DIR", help="the folder to write to [analysis]")
    add("--overwrite", action="store_true", help="replace the analysis that is in --out")
    return parser


def main(argv=None):
    """The command line; returns the numbers, as in analysis.json."""
    parser = make_parser()
    s = parser.parse_args(argv)
    with one_line_errors(parser, {}):
        return analyze(s)


def analyze(s):
    out = Path(s.out)
    held = out / "analysis.json"
    if held.exists() and not s.overwrite:
        raise InputError(f"--out {out} holds an analysis: add --overwrite, or name another folder")
    check(dict(device=s.device, seed=s.seed, workers=s.workers))
    for flag, least, most in (("images", 4, 10**9), ("batch_size", 4, 10**6), ("pictures", 0, 20)):
        value = getattr(s, flag)
        if value is not None and not least <= value <= most:
            raise InputError(f"--{flag.replace('_', '-')} {value}: must be from {least} to {most}")

    paths = s.files + [s.teacher] * (s.teacher is not None)
    names, vits = names_of(paths), [load_vit(path).to(s.device) for path in paths]
    students = {name: load_student(path) for name, path in zip(names, s.files)}
    for name, path, vit in zip(names, paths, vits):
        print(f"{name}: {vit.description}")
        if s.block is not None and not 1 <= s.block <= vit.depth:
            raise InputError(f"--block {s.block}: {name} has blocks 1 to {vit.depth}")
        if not all(p.isfinite().all() for p in vit.parameters()):
            raise InputError(f"{path} holds weights that are not finite: its training has failed")
    sources = [open_images(s.data, s.data_dir, vit, s.device, s.workers) for vit in vits]
    check_outside(dict(out=s.out, data=s.data), sources[0])
    count = min(1100, len(sources[0])) if s.images is None else s.images
    if not s.batch_size <= count <= len(sources[0]):
        raise InputError(f"{count} images of the {len(sources[0])} that {s.data} has: --images "
                         f"must be from --batch-size, {s.batch_size}, to that")
    queries = [find_query(s.patch, vit) for vit in vits]
    sample = torch.randperm(len(sources[0]), generator=torch.Generator().manual_seed(s.seed))
    try:
        out.mkdir(parents=True, exist_ok=True)
        if held.exists():
            for figure in json.loads(held.read_text())["figures"]:
                (out / figure).unlink(missing_ok=True)
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"--out {out}: cannot write there, or what it holds is no analysis; name "
                         "another folder") from error

    began = time.perf_counter()
    distances, entropies, similarity = measure(vits, sources, sample[:count], s.batch_size)
    seconds = time.perf_counter() - began
    models = [dict(
        name=name, file=str(path), sha256=file_hash(path), description=vit.description,
        grid=list(vit.grid), patch_size=vit.config["patch_size"], distance=distance.tolist(),
        entropy=entropy.tolist(), distance_uniform=patch_distances(vit.grid).mean().item(),
        entropy_uniform=math.log(math.prod(vit.grid)))
        for name, path, vit, distance, entropy in zip(names, paths, vits, distances, entropies)]
    ends = torch.tensor([0, *(vit.depth + 1 for vit in vits)]).cumsum(0).tolist()
    between = {f"{a} | {b}": similarity[ends[i]:ends[i + 1], ends[j]:ends[j + 1]].tolist()
               for i, a in enumerate(names) for j, b in enumerate(names) if j <= i}

    # The last block's scores beside the teacher's, by a sample of at most 128 images.
    agreements, shown, mixers = {}, {}, {}
    for name, vit, source in zip(names, vits, sources):
        student = students.get(name)
        for pair, M in (student["mixers"] if student else {}).items():
            mixers[f"{name} {pair}"] = M.tolist()
        if s.teacher is None or name == names[-1]:
            continue
        images = torch.cat(list(source.plain(sample[:min(count, 128)], 16)))
        learnt = own_mixer(student, vit, vits[-1], s.teacher, name, s.files[names.index(name)])
        agreements[name], shown[name] = agreement(vit, s.teacher, images, learnt)
    settings = vars(s) | dict(images=count, images_for_scores=min(count, 128),
                              images_for_cka=count // s.batch_size * s.batch_size)
    numbers = dict(settings=settings, torch=torch.__version__, models=models, cka=between,
                   scores=agreements, mixers=mixers, figures=[])

    def write_numbers():          # null, where there is no number: NaN would be no JSON
        text = json.dumps(finite(numbers), indent=1, allow_nan=False)
        write(held, lambda path: path.write_text(text + "\n"))

    write_numbers()
    table(models, between, agreements, reference=names[-1])
    if not torch.isfinite(similarity).all():
        print("CKA is undefined where all images look alike to a block: null in analysis.json")
    print(f"{count} images through {len(vits)} encoder{'s' * (len(vits) > 1)} in {seconds:.1f} s: "
          f"{count * len(vits) / seconds:.0f} images/s")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print(f"in {out}: analysis.json; for figures, pip install matplotlib")
        return numbers

    draw_blocks(models, "distance", "patches", "uniform attention", out / "distance.png")
    draw_blocks(models, "entropy", "nats", "uniform, the most", out / "entropy.png")
    draw_cka(models, finite(between, math.nan), out / "cka.png")
    figures = ["distance.png", "entropy.png", "cka.png"]
    if s.pictures:
        pictures = [torch.cat(list(source.plain(sample[:s.pictures]))) for source in sources]
        views = [attention_views(vit, images, s.block or vit.depth, query)
                 for vit, images, query in zip(vits, pictures, queries)]
        heads = [f"head {h + 1}" for h in range(max(vit.config["heads"] for vit in vits))]
        which = "last block" if s.block is None else f"block {s.block}"
        for kind, looks in (("class", "the class token"), ("patch", "the framed patch")):
            rows = [(plain, of_class) if kind == "class" else (framed, of_patch)
                    for image in zip(*views) for plain, framed, of_class, of_patch in image]
            figures.append(f"attention_{kind}.png")
            draw_maps(rows, heads, f"Where {looks} looks to, {which}", out / figures[-1],
                      names * s.pictures)
        for name, images, vit, view, query in zip(names, pictures, vits, views, queries):
            if students.get(name):
                figures.append(f"reconstruction_{name}.png")
                mae = students[name]["mae"].to(s.device)
                draw_reconstructions(mae, images, name, out / figures[-1])
            if name in shown:
                figures.append(f"scores_{name}.png")
                draw_mixed(vit, view[0], shown[name], query, name, out / figures[-1])
    for name, M in mixers.items():
        figures.append(f"mixer_{name.replace(':', '-')}.png")
        draw_mixer(torch.tensor(M), name, out / figures[-1])
    numbers["figures"] = figures
    write_numbers()
    print(f"in {out}: analysis.json and {len(figures)} figures")
    return numbers


def own_mixer(student, vit, teacher, teacher_file, name, file):
    """The student's M between the last blocks, or None; says why if it has one that is not used."""
    if student is None or not student["mixers"]:
        return None
    M = student["mixers"].get(f"{vit.depth}:{teacher.depth}")
    heads = teacher.config["heads"], vit.config["heads"]
    config = split_heads(file)[0].parent / "config.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if json.loads(config.read_text())["teacher_sha256"] not in (None, file_hash(teacher_file)):
            print(f"{name}: distilled from another teacher than {teacher_file}: its M is not used")
            return None
    if student["match"] != "scores" or M is None or tuple(M.shape) != heads:
        print(f"{name}: its M is not between the scores of the last blocks: not used")
        return None
    return M


def finite(x, missing=None):
    """Nested lists and dictionaries with `missing` in the place of NaN and infinities."""
    if isinstance(x, dict):
        return {key: finite(value, missing) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value, missing) for value in x]
    return missing if isinstance(x, float) and not math.isfinite(x) else x


if __name__ == "__main__":
    main()
