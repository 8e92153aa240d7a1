"""Images with boxes and masks for `experiments.detect`: COCO's layout, and scenes drawn in it."""

import contextlib
import io
import json
import math
from pathlib import Path

import torch
from pycocotools import mask as rle
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from data import FIGURES, InputError, figure_distance, require, write


def open_coco(root, split, *transforms):
    """(image, target) pairs from a folder in COCO's layout, categories numbered from 1. For "train"
    crowds are dropped, and images left without objects."""
    folder, file = Path(root, f"{split}2017"), Path(root, f"annotations/instances_{split}2017.json")
    transforms = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), *transforms]
    quiet = contextlib.redirect_stdout(io.StringIO())                  # pycocotools reports timings
    try:
        with quiet:
            data = datasets.CocoDetection(str(folder), str(file), transforms=v2.Compose(transforms))
        content, files = data.coco.dataset, {path.name for path in folder.iterdir()}
        names = {x["id"]: x["name"] for x in content["categories"]}
        numbers = {old: new for new, old in enumerate(names, start=1)}
        for x in content["annotations"]:
            x["category_id"] = numbers[x["category_id"]]
            require(x["image_id"] in data.coco.imgs and x["area"] >= 0 and len(x["bbox"]) == 4
                    and x["segmentation"], f"its annotation {x['id']} is incomplete")
            x["bbox"] = [float(side) for side in x["bbox"]]   # torchvision truncates integers
        content["categories"] = [dict(id=numbers[i], name=name) for i, name in names.items()]
        if split == "train":
            content["annotations"] = [x for x in content["annotations"] if not x["iscrowd"]]
        with quiet:
            data.coco.createIndex()
        lost = {x["file_name"] for x in data.coco.imgs.values()} - files
        require(not lost, f"{len(lost)} images are not there, among them {min(lost, default='')}")
        require(all(x["height"] > 0 < x["width"] for x in content["images"]), "an image is empty")
        require(any(not x["iscrowd"] for x in content["annotations"]), "it has no objects")
        data.ids = sorted(data.coco.imgToAnns if split == "train" else data.coco.imgs)
    except (InputError, OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        reason = error if isinstance(error, InputError) else repr(error)
        raise InputError(f"--data {root}: {file} is not as COCO has it: {reason}") from error
    data.classes, data.broken = list(names.values()), []             # what Run expects of a source
    return datasets.wrap_dataset_for_transforms_v2(
        data, target_keys=("image_id", "boxes", "labels", "masks"))


def draw_scene(g):
    """Two to five figures of `shapes` on a ground of 96 pixels, partly hidden or cut off: an image,
    uint8 (3, 96, 96); which is seen where, (96, 96), 0 for none; their labels into FIGURES."""
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
        contrast = uniform(0.3, 0.55) * (1 if grey < 0.5 else -1)      # lighter on dark ground
        colour = (grey + contrast + uniform(-0.2, 0.2, 3)).view(3, 1, 1)
        image, seen[cover > 0.5] = image * (1 - cover) + colour * cover, number
    image = image + 0.01 * torch.randn(image.shape, generator=g)
    return (image * 255).round().clamp(0, 255).byte(), seen, labels


def write_scenes(root, split, count, seed):
    """`count` scenes in COCO's layout, unless their JSON is there. Deterministic. Figures of which
    fewer than 40 pixels are seen get no annotation."""
    folder, file = Path(root, f"{split}2017"), Path(root, f"annotations/instances_{split}2017.json")
    if file.exists():
        return
    print(f"drawing {count:,} scenes into {folder}")
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
