"""Drawn scenes to detect figures in: images, boxes and masks, exact, in COCO's layout.

`experiments.detect` writes them where it needs them.
"""

import json
import math
from pathlib import Path

import torch
from pycocotools import mask as rle
from torchvision.transforms.v2 import functional as TF

from data import FIGURES, figure_distance, write


def draw_scene(g):
    """Two to five figures of `shapes` on a ground of 96 pixels, which may overlap and be cut: image
    uint8 (3, 96, 96); which figure is seen where, (96, 96), from 1; their labels into FIGURES."""
    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape or (1,), generator=g)

    x, grey, turn = (torch.arange(96) + 0.5).expand(96, 96), uniform(0.2, 0.8), uniform(0, math.pi)
    y, seen = x.T, torch.zeros(96, 96).long()
    wave = torch.sin(uniform(0.05, 0.3) * (torch.cos(turn) * x + torch.sin(turn) * y))
    image = (grey + uniform(-0.2, 0.2, 3)).view(3, 1, 1) + uniform(-0.1, 0.1) * wave    # 3 96 96
    labels = torch.randint(len(FIGURES), (int(uniform(2, 6)),), generator=g).tolist()
    for number, label in enumerate(labels, start=1):
        angle, radius, (left, up) = uniform(0, 2 * math.pi), uniform(10, 20), uniform(12, 84, 2)
        u = (torch.cos(angle) * (x - left) + torch.sin(angle) * (y - up)) / radius
        v = (torch.cos(angle) * (y - up) - torch.sin(angle) * (x - left)) / radius
        cover = (0.5 - figure_distance(FIGURES[label], u, v) * radius).clamp(0, 1)      # 96 96
        away = uniform(0.3, 0.55) * (1 if grey < 0.5 else -1)   # lighter on dark, darker on light
        colour = (grey + away + uniform(-0.2, 0.2, 3)).view(3, 1, 1)
        image, seen[cover > 0.5] = image * (1 - cover) + colour * cover, number
    image = image + 0.01 * torch.randn(image.shape, generator=g)
    return (image * 255).round().clamp(0, 255).byte(), seen, labels


def write_scenes(root, split, count, seed):
    """`count` scenes in COCO's layout, unless they are there. Figures of which fewer than 40 pixels
    are seen are not counted. Deterministic."""
    folder, file = Path(root, f"{split}2017"), Path(root, f"annotations/instances_{split}2017.json")
    if file.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(exist_ok=True)
    g, images, annotations = torch.Generator().manual_seed(seed), [], []
    for i in range(1, count + 1):
        picture, seen, labels = draw_scene(g)
        images.append(dict(id=i, file_name=f"{i:012d}.png", width=96, height=96))
        TF.to_pil_image(picture).save(folder / images[-1]["file_name"])
        for number, label in enumerate(labels, start=1):
            code = encoded(seen == number)
            if rle.area(code) >= 40:
                annotations.append(dict(
                    id=len(annotations) + 1, image_id=i, category_id=label + 1, iscrowd=0,
                    bbox=rle.toBbox(code).tolist(), area=int(rle.area(code)), segmentation=code))
    categories = [dict(id=i, name=name) for i, name in enumerate(FIGURES, start=1)]
    content = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    write(file, lambda path: path.write_text(content))


def encoded(mask):
    """A mask (height, width) as COCO's files have it: its size, its run lengths in letters."""
    code = rle.encode(mask.byte().numpy().copy(order="F"))
    return code | dict(counts=code["counts"].decode())
