"""How many images a second does one core load and augment?

    python -m experiments.loader                       # makes photograph-like JPEGs for itself
    python -m experiments.loader --data /path/to/imagenet/val

One process, one thread, in alternation on the same files. `ours`: `Files` of data.py decodes,
crops and hands over uint8; flip and normalisation are left to the device, a GPU where there is one.
`ours_normalised` does these too, on this core. `usual_bilinear`, `usual_bicubic`: torchvision's
ImageFolder with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize on Pillow images,
for torchvision's default and for what the MAE release has; all of it is the core's work there.
Finding the files is not timed. Then `SmallSet`: images of 32 x 32 augmented on the device. Prints a
line of JSON.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision import transforms

from data import SETS, Files, InputError, SmallSet, find_images
from dmae import Parser, check, one_line_errors


def make_photographs(folder, count):
    """JPEGs of 500 x 375, 60 to 110 kB, coarse and fine structure mixed as in photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((375, 500, 3), 128.0)
        for rows, contrast in ((6, 55), (25, 30), (90, 14), (375, generator.uniform(6, 12))):
            noise = generator.normal(size=(rows, rows * 4 // 3, 3)) * contrast
            layers = [Image.fromarray(noise[..., c].astype(np.float32)).resize(
                (500, 375), Image.Resampling.BICUBIC) for c in range(3)]
            pixels += np.stack([np.asarray(layer) for layer in layers], axis=2)
        path = Path(folder) / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=88)


def usual_loader(root, paths, batch, interpolation):
    """What most training scripts have, on `paths`."""
    prepare = transforms.Compose([
        transforms.RandomResizedCrop(224, (0.08, 1), interpolation=interpolation),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(SETS["folder"]["mean"], SETS["folder"]["std"])])
    folder = torchvision.datasets.ImageFolder(root, prepare, allow_empty=True)
    folder.samples = [(str(path), 0) for path in paths]
    return torch.utils.data.DataLoader(folder, batch)


def measure(root, count, batch, rounds):
    paths = find_images(root)[0][:count]
    source = Files(paths, None, [], root, SETS["folder"], (224, 224))
    order = torch.arange(len(source)).split(batch)
    generator = torch.Generator().manual_seed(0)

    def ours():
        yield from source.batches(order, epoch=0)

    def ours_normalised():
        for images in source.batches(order, epoch=0):
            yield source.augment(images, *source.draw(len(images), generator))

    usual = {name: usual_loader(root, paths, batch, transforms.InterpolationMode(name))
             for name in ("bilinear", "bicubic")}
    ways = {"ours": ours, "ours_normalised": ours_normalised,
            **{f"usual_{name}": loader.__iter__ for name, loader in usual.items()}}
    rates = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seen, began = 0, time.perf_counter()
            for images in way():
                seen += len(images[0] if isinstance(images, list) else images)
            rates[name].append(seen / (time.perf_counter() - began))
    sizes = [Path(path).stat().st_size / 1e3 for path in paths]
    return {name: round(statistics.median(rate), 1) for name, rate in rates.items()} | dict(
        files=len(source), mean_kilobytes=round(statistics.mean(sizes), 1))


def small_set(device, seconds=3):
    """Images of 32 x 32 augmented a second: crop, flip, normalise, in batches of 512."""
    images = torch.randint(256, (10_000, 3, 32, 32), dtype=torch.uint8)
    source = SmallSet(images, None, SETS["cifar10"], (32, 32), device)
    generator = torch.Generator(device).manual_seed(0)
    seen, began = 0, None
    while began is None or time.perf_counter() - began < seconds:
        for batch in source.batches(torch.randperm(10_000)[:5120].split(512), 0):
            out = source.augment(batch, *source.draw(len(batch), generator))
            seen += len(batch)
        out.sum().item()                                        # waits for the device
        if began is None:
            seen, began = 0, time.perf_counter()
    return round(seen / (time.perf_counter() - began))


def make_parser():
    parser = Parser(prog="python -m experiments.loader", allow_abbrev=False,
                    description="Images a second that one core loads, and a device augments.")
    add = parser.add_argument
    add("--data", metavar="DIR", help="a folder of classes of JPEGs [made for the purpose]")
    add("--images", type=int, default=256, metavar="N", help="files to read in a round [256]")
    add("--rounds", type=int, default=5, metavar="N", help="rounds, of which the median counts [5]")
    add("--batch-size", type=int, default=64, metavar="N", help="images in a batch [64]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="where small images are augmented [cuda or cpu]")
    return parser


def main(argv=None):
    parser = make_parser()
    s = parser.parse_args(argv)
    with one_line_errors(parser, {}), tempfile.TemporaryDirectory() as made:
        for key in ("images", "rounds", "batch_size"):
            if getattr(s, key) < 1:
                raise InputError(f"--{key.replace('_', '-')} {getattr(s, key)}: must be 1 or more")
        check(dict(device=s.device, batch_size=s.batch_size))
        if s.data is not None and not Path(s.data).is_dir():
            raise InputError(f"--data {s.data}: no such folder")
        if s.data is not None and len(find_images(s.data)[2]) < 2:
            raise InputError(f"--data {s.data}: needs two or more folders of images in it")
        threads = torch.get_num_threads()
        line = dict(small_32_per_second=small_set(s.device), small_threads=threads)
        if s.data is None:
            make_photographs(made, s.images)
        torch.set_num_threads(1)
        try:
            line |= measure(s.data or made, s.images, s.batch_size, s.rounds)
        finally:
            torch.set_num_threads(threads)
        for name in ("usual_bilinear", "usual_bicubic"):
            for ours in ("ours", "ours_normalised"):
                line[f"{ours}_over_{name}"] = round(line[ours] / line[name], 2)
        line |= dict(batch_size=s.batch_size, rounds=s.rounds, data=s.data,
                     machine=platform.machine(), device=s.device, torch=torch.__version__,
                     torchvision=torchvision.__version__, date=time.strftime("%Y-%m-%d"))
        print(json.dumps(line))
        return line


if __name__ == "__main__":
    main()
