"""How many images a second does one core load and augment?

    python -m experiments.loader                       # makes photograph-like JPEGs for itself
    python -m experiments.loader --data /path/to/imagenet/val

One process, one thread, in alternation on the same files; prints a line of JSON with the medians.
`ours`: `Files` of data.py decodes, crops and hands over uint8; flip and normalisation are left to
the device, a GPU where there is one. `ours_normalised` does these too, on this core.
`usual_bilinear`, `usual_bicubic`: torchvision's ImageFolder with RandomResizedCrop,
RandomHorizontalFlip, ToTensor and Normalize, for torchvision's default and for what the MAE release
has. Finding the files is not timed. `small_32`: images of 32 x 32, augmented on the device.
"""

import argparse
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

import dmae
from data import FOLDER, SETS, Files, SmallSet, find_images, require


def make_photographs(folder, count):
    """JPEGs of 500 x 375, 60 to 110 kB, coarse and fine structure mixed as in photographs."""
    generator = np.random.default_rng(0)
    for i in range(count):
        pixels = np.full((375, 500, 3), 128.0)
        for rows, contrast in ((6, 55), (25, 30), (90, 14), (375, generator.uniform(6, 12))):
            noise = generator.normal(128, contrast, (rows, rows * 4 // 3, 3)).clip(0, 255)
            layer = Image.fromarray(noise.astype(np.uint8))
            pixels += np.asarray(layer.resize((500, 375), Image.Resampling.BICUBIC)) - 128.0
        path = Path(folder) / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=88)


def ways_to_load(root, paths, batch, device):
    """{name: a function that starts a pass over all images and yields (images, anything)}."""
    def ours(source, augment):
        order, generator = torch.arange(len(source)).split(batch), torch.Generator(source.device)
        for images, labels in source.batches(order, epoch=0):
            if augment:
                images = source.augment(images, *source.draw(len(images), generator))
            yield images, labels

    def usual(interpolation):
        folder = torchvision.datasets.ImageFolder(root, transforms.Compose([
            transforms.RandomResizedCrop(224, (0.08, 1), interpolation=interpolation),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(FOLDER["mean"], FOLDER["std"])]))
        folder.samples = [(str(path), 0) for path in paths]
        return torch.utils.data.DataLoader(folder, batch)

    files = Files(paths, None, [], FOLDER, (224, 224))
    images = torch.randint(256, (5120, 3, 32, 32), dtype=torch.uint8)
    small = SmallSet(images, None, [], SETS["cifar10"], (32, 32), device)
    return dict(
        ours=lambda: ours(files, False), ours_normalised=lambda: ours(files, True),
        usual_bilinear=usual(transforms.InterpolationMode.BILINEAR).__iter__,
        usual_bicubic=usual(transforms.InterpolationMode.BICUBIC).__iter__,
        small_32=lambda: ours(small, True))


# As FLAGS of dmae.py.
FLAGS = {
    "data": (None, "DIR", "a folder of classes of JPEGs [made for the purpose]"),
    "images": (256, (int, 2, 10**6), "files to read in a round"),
    "rounds": (5, (int, 1, 10**6), "rounds, of which the median counts"),
    "batch_size": (64, (int, 1, 10**6), "images in a batch"),
    "device": (None, "DEVICE", "where small images are augmented [cuda if there is one]"),
}


def main(argv=None):
    """The command line; prints and returns {way: images a second}, and how it was measured."""
    program = dmae.command_line("python -m experiments.loader", FLAGS, argv)
    with program as given, tempfile.TemporaryDirectory() as made:
        s = argparse.Namespace(**{name: flag[0] for name, flag in FLAGS.items()} | given)
        device = dmae.Run(argparse.Namespace(device=s.device, amp="off", compile=False), "").device
        if s.data is None:
            make_photographs(made, s.images)
        paths, labels, _ = find_images(s.data or made)
        require(labels is not None, f"--data {s.data}: needs two or more folders of images in it")
        paths, threads = paths[:s.images], torch.get_num_threads()
        ways = ways_to_load(s.data or made, paths, s.batch_size, device)
        rates = {name: [] for name in ways}
        torch.set_num_threads(1)
        for _ in range(s.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                seen = sum(len(images) for images, _ in way())
                torch.zeros(1, device=device).item()                     # waits for the device
                rates[name].append(seen / (time.perf_counter() - began))
        torch.set_num_threads(threads)
        line = {name: round(statistics.median(rate), 1) for name, rate in rates.items()}
        kilobytes = sum(Path(path).stat().st_size for path in paths) / len(paths) / 1e3
        line |= dict(vars(s), mean_kilobytes=round(kilobytes, 1), machine=platform.machine(),
                     torch=torch.__version__, date=time.strftime("%Y-%m-%d"))
        print(json.dumps(line))
        return line


if __name__ == "__main__":
    main()
