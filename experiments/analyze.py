"""Look inside encoders: attention distance, attention entropy, CKA, attention maps, M.

    python -m experiments.analyze runs/mae/student.pth runs/dmae/student.pth \\
        --teacher runs/teacher/student.pth --data fashion-mnist

The third part of Wang et al. (ICML 2023). Files of encoders come first: whatever dmae.py takes as
--teacher, x.pth or x.pth:3 to give its heads. Writes analysis.json with every number into --out
and, if matplotlib is installed, figures beside it; prints a short table. Nothing is masked, except
where scores are compared with a teacher's. All measures use the encoders' ordinary forward pass.
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
from pathlib import Path

import torch
from einops import einsum, rearrange
from tqdm import tqdm

import dmae
from data import FOLDER, SETS, open_data, require, write

# ========================================================================================= measures


def patch_distances(grid):
    """Euclidean distance between the centres of every pair of patches, in patches: (n, n)."""
    centres = torch.cartesian_prod(*(torch.arange(float(side)) for side in grid))
    return torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")


def distance_and_entropy(scores, grid):
    """Attention distance, the sum over keys of attention x distance, in patches; and attention
    entropy, -sum a ln a over keys of attention a, in nats. Means over queries: (2, b, h).

    scores: (b, h, 1 + n, 1 + n), before the softmax, which is taken over patches alone: the class
    token's row and column are left out."""
    logs = scores[:, :, 1:, 1:].contiguous().log_softmax(dim=-1)      # twice as fast as of a view
    attention = logs.exp()                                                            # b h n n
    distances = patch_distances(grid).to(attention)
    distance = einsum(attention, distances, "b h q k, q k -> b h q")
    return torch.stack([distance, -(attention * logs).sum(dim=-1)]).mean(dim=-1)


def representations(vit, tokens):
    """What CKA compares, of patch tokens alone: the input of each block after its norm1, and the
    output after the final norm. tokens: {i: (b, 1 + n, c)}, 0 to depth -> depth + 1 of (b, n c)."""
    seen = [block.norm1(tokens[i]) for i, block in enumerate(vit.blocks)]
    seen.append(vit.norm(tokens[vit.depth]))
    return [x[:, 1:].flatten(1) for x in seen]


def gram(x):
    """Linear kernel of samples (m, c) -> (m, m) float64, its diagonal zero, as the estimate below
    wants it. Centring does not change that estimate, but reduces its rounding error."""
    x = x - x.mean(dim=0)
    return (x @ x.T).double().fill_diagonal_(0)


def hsic(grams):
    """Unbiased estimate of HSIC (Song et al. 2012, eq. 5) for every pair of p kernels:
    (p, m, m), diagonals zero, m at least 4 -> (p, p)."""
    m = grams.shape[1]
    flat, rows, total = grams.flatten(1), grams.sum(dim=2), grams.sum(dim=(1, 2))
    return (flat @ flat.T + torch.outer(total, total) / ((m - 1) * (m - 2))
            - rows @ rows.T * 2 / (m - 2)) / (m * (m - 3))


def cka(mean_hsic):
    """Minibatch CKA: HSIC (p, p), a mean over minibatches, divided by the roots of its diagonal."""
    scale = mean_hsic.diagonal().clamp(min=0).sqrt()
    return mean_hsic / torch.outer(scale, scale)


@torch.no_grad()
def measure(vits, sources, indices, batch, piece=16):
    """[(2, blocks, heads) for each vit], distance and entropy; CKA (p, p) of all representations.

    sources: for each vit, the images as it takes them. batch: images in a minibatch of CKA; the
    last, incomplete one is left out of it. Memory does not depend on the number of images."""
    sums, total, batches = [0] * len(vits), 0, 0
    for part in tqdm(indices.split(batch), "images", unit=f" x {batch}", leave=False):
        grams = []
        for i, (vit, source) in enumerate(zip(vits, sources, strict=True)):
            found = []
            for images, _ in source.plain(part, piece):
                tokens, scores = vit(images, tokens_of=range(vit.depth + 1),
                                     scores_of=range(1, vit.depth + 1))
                sums[i] += torch.stack([distance_and_entropy(scores[k], vit.grid).sum(dim=1)
                                        for k in scores], dim=1).double()
                found.append(representations(vit, tokens))
            grams += [gram(torch.cat(x)) for x in zip(*found, strict=True)]
        if len(part) == batch:
            total, batches = total + hsic(torch.stack(grams)), batches + 1
    return [x / len(indices) for x in sums], cka(total / batches)


def fit_mixer(ours, theirs):
    """The M (t, s) for which M ours is nearest to theirs: scores (b, s, n, n), (b, t, n, n)."""
    a, b = (rearrange(x, "b h q k -> h (b q k)").double() for x in (ours, theirs))
    return torch.linalg.lstsq(a @ a.T, a @ b.T).solution.T.float()


def through(M, scores):
    return einsum(M.to(scores), scores, "t s, b s q k -> b t q k")


@torch.no_grad()
def agreement(vit, teacher_file, images, learnt=None):
    """How close the last block's scores come, through a mixer, to those of the teacher's.

    Mean squared errors on the second half of the images, masked by 75 % as in training, and on
    whole images: `zeros`, of predicting zero; `mean_map`, the teacher's scores averaged over the
    first half, blind to the image (whole ones only); `fitted`, the mixer that is best on the first
    half; `learnt`, the student's own. Returns these, and (ours, mixed, theirs) of the first image,
    through the learnt mixer if there is one."""
    student = dmae.MAE(vit, decoder_width=4, decoder_depth=0, decoder_heads=1)
    teacher = dmae.DMAE(student, dmae.load_vit(teacher_file).to(images.device)).teacher
    noise = torch.rand(len(images), student.patches, generator=torch.Generator().manual_seed(0))
    half, out = len(images) // 2, {}
    for kind, ids_keep in (("masked", student.choose(noise.to(images.device))), ("whole", None)):
        ours = vit(images, ids_keep, scores_of=[vit.depth])[1][vit.depth]
        theirs = teacher(dmae.images_for(teacher, vit, images), ids_keep,
                         scores_of=[teacher.depth])[1][teacher.depth]
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


# ================================================================================= files and images


def names_of(paths):
    """Short names, each different: the folder of a student.pth or model.pth, else the file."""
    names = []
    for path in (dmae.split_heads(path)[0] for path in paths):
        name = (path.resolve().parent.name if path.name in ("student.pth", "model.pth")
                else re.sub(r"(\.pth|\.tar|\.safetensors)+$", "", path.name)).replace("$", "_")
        others = (f"{name} {number}" for number in itertools.count(2))
        names.append(next(x for x in itertools.chain([name], others) if x not in names))
    return names


def open_images(data, data_dir, vit, device="cpu", workers=0):
    """Images to look at, as `vit` takes them: a test split, or all of a folder without one."""
    config = vit.config
    require(config["channels"] in (SETS.get(data, FOLDER)["channels"], 3), "an encoder of grey "
            f"images cannot see the colour images of {data}")
    row = dict(mean=config["mean"], std=config["std"], crop_scale=1.0)
    train, test = open_data(data, row, config["image_size"], data_dir, device=device,
                            workers=workers)
    return test or train


def own_mixer(content, folder, name, vit, teacher, teacher_file):
    """The student's M between the last blocks, or None; says why if it has one that is not used.

    content: of its file. folder: where that lies, with the config.json of its run."""
    if not content.get("mixers"):
        return None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        sha256 = json.loads((folder / "config.json").read_text())["teacher_sha256"]
        if sha256 not in (None, dmae.file_hash(teacher_file)):
            print(f"{name}: distilled from another teacher than {teacher_file}: its M is not used")
            return None
    M = content["mixers"].get(f"scores:{vit.depth}:{teacher.depth}")
    heads = teacher.config["heads"], vit.config["heads"]
    if M is None or tuple(M.shape) != heads:
        print(f"{name}: its M is not between the scores of the last blocks: not used")
        return None
    return M


def finite(x):
    """Nested lists and dictionaries with None in the place of NaN and infinities."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ========================================================================================== figures


def new_figure(width, height, rows, columns, **options):
    """A matplotlib figure of width x height inches, and its panels, rows x columns."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure, path):
    write(path, lambda temporary: figure.savefig(temporary, format="png", dpi=80))


def draw_blocks(models, key, unit, uniform, path):
    """A panel per model: each head's value and their mean, block by block."""
    figure, (panels,) = new_figure(2.6 * len(models) + 0.8, 3.2, 1, len(models), sharey=True)
    for model, panel in zip(models, panels, strict=True):
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
    count = len(models)
    least = min((x for values in similarity.values() for row in values for x in row
                 if math.isfinite(x)), default=0)
    figure, panels = new_figure(2.3 * count + 1.2, 2.3 * count + 0.5, count, count)
    for i, j in itertools.product(range(count), repeat=2):
        panel = panels[i, j]
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


def draw_maps(rows, title, path, row_names):
    """rows: for each, an RGB image (3, H, W), and maps (heads, gh, gw), each scaled to its own
    range."""
    heads = max(len(maps) for _, maps in rows)
    figure, panels = new_figure(heads + 1.9, 1.05 * len(rows) + 0.7, len(rows), heads + 1)
    for line, (picture, maps), name in zip(panels, rows, row_names, strict=True):
        for panel in line:
            panel.set(xticks=[], yticks=[], frame_on=False,
                      box_aspect=maps.shape[1] / maps.shape[2])
        line[0].imshow(picture.permute(1, 2, 0).numpy())
        line[0].set_ylabel(name, fontsize=8)
        for panel, values in zip(line[1:1 + len(maps)], maps, strict=True):
            shown = panel.imshow(values.numpy(), cmap="magma")
    for head, panel in enumerate(panels[0, 1:], start=1):
        panel.set_title(f"head {head}", fontsize=8)
    bar = figure.colorbar(shown, ax=panels, shrink=0.5, ticks=[])
    bar.set_label("least to most, each map by itself", fontsize=8)
    figure.suptitle(title, fontsize=10)
    save(figure, path)


def draw_mixer(M, title, path):
    """M: a row for each head of the teacher, a column for each of the student."""
    figure, ((panel,),) = new_figure(0.6 * M.shape[1] + 2.2, 0.42 * M.shape[0] + 1.4, 1, 1)
    most = M.abs().max().item()
    image = panel.imshow(M.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    panel.set(title=f"M of {title}", xlabel="head of the student", ylabel="head of the teacher",
              xticks=range(M.shape[1]), xticklabels=range(1, M.shape[1] + 1),
              yticks=range(M.shape[0]), yticklabels=range(1, M.shape[0] + 1))
    for t, s in itertools.product(*map(range, M.shape)):
        panel.text(s, t, f"{M[t, s]:.2f}", ha="center", va="center", fontsize=7,
                   color="white" if abs(M[t, s]) > 0.6 * most else "black")
    figure.colorbar(image, label="weight")
    save(figure, path)


def framed(pictures, grid):
    """RGB images (b, 3, H, W) with a red frame around the middle patch."""
    side = pictures.shape[2] // grid[0]
    top, left = (side * (count // 2) for count in grid)
    frame = torch.zeros(pictures.shape[2:], dtype=torch.bool)
    frame[top:top + side, left:left + side] = True
    frame[top + 2:top + side - 2, left + 2:left + side - 2] = False
    return torch.where(frame, torch.tensor([1.0, 0, 0]).view(3, 1, 1), pictures)


def maps_of(x, grid, query):
    """One query's row of scores or attention (b, h, 1 + n, 1 + n), for the patches, on their grid:
    (b, h, gh, gw). query: 0 is the class token."""
    return x[:, :, query, 1:].cpu().unflatten(2, grid)


@torch.no_grad()
def draw_all(s, out, names, vits, images, shown, numbers):
    """Draw whatever there is to draw; returns the names of the files. images: for each of the vits,
    a few as it takes them; shown: {name: scores of the first image, as `agreement` returns}."""
    models = numbers["models"]
    draw_blocks(models, "distance", "patches", "uniform attention", out / "distance.png")
    draw_blocks(models, "entropy", "nats", "uniform, the most", out / "entropy.png")
    draw_cka(models, numbers["cka"], out / "cka.png")
    figures = ["distance.png", "entropy.png", "cka.png"]
    looks = {"class": [], "patch": []}
    for name, vit, few in zip(names, vits, images, strict=True):
        block = s.block or vit.depth
        attention = vit(few, scores_of=[block])[1][block].softmax(dim=-1)
        middle = 1 + vit.grid[0] // 2 * vit.grid[1] + vit.grid[1] // 2
        pictures = dmae.as_rgb(vit, few).cpu()
        marked = framed(pictures, vit.grid)
        looks["class"].append(zip(pictures, maps_of(attention, vit.grid, 0), strict=True))
        looks["patch"].append(zip(marked, maps_of(attention, vit.grid, middle), strict=True))
        if name in shown:
            scores = [maps_of(x, vit.grid, middle)[0] for x in shown[name]]
            figures.append(f"scores_{name}.png")
            draw_maps([(marked[0], x) for x in scores], f"{name}: scores of the framed patch to all"
                      " others, last block, before the softmax", out / figures[-1],
                      ["student", "through M", "teacher"])
    for kind, what in (("class", "the class token"), ("patch", "the framed patch")):
        figures.append(f"attention_{kind}.png")
        rows = [row for image in zip(*looks[kind], strict=True) for row in image]
        draw_maps(rows, f"Where {what} looks to, " + (f"block {s.block}" if s.block else "last "
                  "block"), out / figures[-1], names * s.pictures)
    for name, M in numbers["mixers"].items():
        figures.append(f"mixer_{name.replace(':', '-')}.png")
        draw_mixer(torch.tensor(M), name, out / figures[-1])
    return figures


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


# ===================================================================================== command line

# As FLAGS of dmae.py.
FLAGS = {
    "teacher": (None, "FILE", "one more, whose attention the students' mixers predict"),
    "data": ("shapes", "DIR|NAME", "its test images: val/ of a folder that has one, else all"),
    "images": (None, (int, 4, 10**9), "a sample of N [1100, or all there are]"),
    "batch_size": (64, (int, 4, 10**6), "images in a minibatch of CKA; fewer for small sets"),
    "block": (None, (int, 1, 1000), "whose attention is drawn, from 1 [the last of each]"),
    "pictures": (3, (int, 1, 20), "images with attention maps"),
    "out": ("analysis", "DIR", "the folder to write to"),
} | {name: dmae.MACHINE_FLAGS[name] for name in ("data_dir", "seed", "workers", "device")}


def main(argv=None):
    """The command line; returns the numbers, as in analysis.json. Bad input: a line, status 2."""
    argv = sys.argv[1:] if argv is None else argv
    files = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    with dmae.command_line("experiments.analyze FILE ...", FLAGS, argv[len(files):]) as given:
        require(files, "files of encoders are missing: name them first")
        settings = {name: flag[0] for name, flag in FLAGS.items()} | given
        return analyze(argparse.Namespace(files=files, amp="off", compile=False, **settings))


def analyze(s):
    device, out = dmae.Run(s, None).device, Path(s.out)
    held = out / "analysis.json"
    require(not held.exists(), f"--out {out} holds an analysis: name another folder")
    paths = s.files + [s.teacher] * (s.teacher is not None)
    names, vits = names_of(paths), [dmae.load_vit(path).to(device) for path in paths]
    for name, path, vit in zip(names, paths, vits, strict=True):
        print(f"{name}: {vit.description}")
        require((s.block or 1) <= vit.depth, f"--block {s.block}: {name} has {vit.depth} blocks")
        require(all(p.isfinite().all() for p in vit.parameters()), f"{path} holds weights that are "
                "not finite: its training has failed")
    require(s.data in SETS or not out.resolve().is_relative_to(Path(s.data).resolve()), f"--out "
            f"{out} is inside the data, {s.data}: name a folder elsewhere")
    sources = [open_images(s.data, s.data_dir, vit, device, s.workers) for vit in vits]
    count = s.images or min(1100, len(sources[0]))
    require(s.batch_size <= count <= len(sources[0]), f"--images {count}, of the {len(sources[0])} "
            f"that {s.data} has: must be from --batch-size, {s.batch_size}, to {len(sources[0])}")
    out.mkdir(parents=True, exist_ok=True)
    sample = torch.randperm(len(sources[0]), generator=torch.Generator().manual_seed(s.seed))

    means, similarity = measure(vits, sources, sample[:count], s.batch_size)
    models = [dict(
        name=name, file=path, sha256=dmae.file_hash(path), description=vit.description,
        grid=list(vit.grid), patch_size=vit.config["patch_size"], distance=mean[0].tolist(),
        entropy=mean[1].tolist(), distance_uniform=patch_distances(vit.grid).mean().item(),
        entropy_uniform=math.log(math.prod(vit.grid)))
        for name, path, vit, mean in zip(names, paths, vits, means, strict=True)]
    sizes, between = [vit.depth + 1 for vit in vits], {}
    for i, rows in enumerate(similarity.split(sizes)):
        for j, part in enumerate(rows.split(sizes, dim=1)[:i + 1]):
            between[f"{names[i]} | {names[j]}"] = part.tolist()

    # The last block's scores compared with the teacher's, on a sample of at most 128 images.
    agreements, shown, mixers = {}, {}, {}
    for i, file in enumerate(s.files):
        path, name, vit = dmae.split_heads(file)[0], names[i], vits[i]
        content = dmae.read_weights(path)
        mixers |= {f"{name} {pair}": M.tolist() for pair, M in content.get("mixers", {}).items()}
        if s.teacher:
            images = torch.cat([x for x, _ in sources[i].plain(sample[:min(count, 128)])])
            learnt = own_mixer(content, path.parent, name, vit, vits[-1], s.teacher)
            agreements[name], shown[name] = agreement(vit, s.teacher, images, learnt)
    s.images, s.images_for_scores = count, min(count, 128)
    s.images_for_cka = count // s.batch_size * s.batch_size
    numbers = dict(settings=vars(s), torch=torch.__version__, models=models, cka=between,
                   scores=agreements, mixers=mixers, figures=[])
    table(models, between, agreements, reference=names[-1])
    if not torch.isfinite(similarity).all():
        print("CKA is undefined where all images look alike to a block: null in analysis.json")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("(figures need pip install matplotlib)")
    else:
        few = [next(source.plain(sample[:s.pictures]))[0] for source in sources]
        numbers["figures"] = draw_all(s, out, names, vits, few, shown, numbers)
    text = json.dumps(finite(numbers), indent=1, allow_nan=False)       # NaN would be no JSON
    write(held, lambda path: path.write_text(text + "\n"))
    print(f"in {out}: analysis.json and {len(numbers['figures'])} figures")
    return numbers


if __name__ == "__main__":
    main()
