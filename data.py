"""Images: drawn, small public sets, folders of photographs, the paper's transfer sets.

`open_data` returns a training and a test source. A `SmallSet` keeps all its images on the device
and augments a whole batch there; `Files` reads and crops in DataLoader workers.
Letters in shapes: b batch, c channels, h x w an image as it is stored, H x W as it is returned.
"""

import contextlib
import glob
import io
import json
import math
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

# torchvision plans to remove it; without it, Pillow reads the same files, more slowly.
decode_jpeg = getattr(torchvision.io, "decode_jpeg", None)

COLUMNS = "channels", "mean", "std", "image_size", "patch_size", "crop_scale"
SETS = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in {
    "shapes": (3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32, 4, 0.5),
    "fashion-mnist": (1, (0.286,), (0.353,), 32, 4, 0.5),
    "cifar10": (3, (0.491, 0.482, 0.447), (0.247, 0.243, 0.262), 32, 4, 0.2),
    "cifar100": (3, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 32, 4, 0.2),
}.items()}
# A folder of photographs: ImageNet's mean and deviation, the paper's sizes.
FOLDER = dict(zip(COLUMNS, (3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224, 16, 0.08),
                  strict=True))
PHOTOS = "flowers", "pets", "aircraft", "cars", "inat18"                # the paper's transfer sets
SETS |= dict.fromkeys(PHOTOS, FOLDER)
EXTENSIONS = ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


def require(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


class Source(Dataset):
    """Images to train or to test on. row: the set's row of SETS, possibly overridden. size: (H, W).

    items: uint8 images (N, c, h, w), or paths (N,). labels: (N,) int64 or None. classes: the names
    that labels index. root: the folder of the files. bicubic: share of the crops resized so, the
    others are resized bilinearly. policy: None, or one more random transform of a uint8 image.
    broken: the paths that could not be read.

    batches(order, epoch) yields (uint8 images, labels or None) for each tensor of indices in order;
    draw(b, generator) returns a batch's random numbers, a tuple of tensors with b rows each;
    augment(images, *draws) returns the training input: float (b, c, H, W), normalised."""

    def __init__(self, items, labels, classes, row, size, device="cpu", workers=0, seed=0,
                 root=None):
        self.items = items.to(device) if isinstance(items, torch.Tensor) else items
        self.labels, self.classes, self.root = labels, classes, root
        self.size, self.crop_scale = list(size), row["crop_scale"]
        # On the CPU: workers get a copy of all this, and have no use of a device.
        self.mean, self.std = (torch.tensor(row[k]).view(-1, 1, 1) * 255 for k in ("mean", "std"))
        self.device, self.workers, self.seed = torch.device(device), workers, seed
        self.bicubic, self.policy, self.broken = 0.5, None, set()

    def __len__(self):
        return len(self.items)

    def labels_of(self, indices):
        return None if self.labels is None else self.labels[indices]

    def subset(self, indices):
        """Keep these images alone."""
        self.items, self.labels = self.items[indices.numpy()], self.labels_of(indices)

    def normalise(self, images):
        """uint8 or float in 0..255 (b, c, H, W) -> float32, (x / 255 - mean) / std per channel."""
        mean, std = (x.to(images.device, non_blocking=True) for x in (self.mean, self.std))
        return (images.float() - mean) / std

    def plain(self, indices, batch=100):
        """Yields (normalised images, labels or None), not augmented."""
        for images, labels in self.batches(indices.split(batch), epoch=None):
            if list(images.shape[-2:]) != self.size:      # a small set, enlarged for an encoder
                images = resize_and_crop(images, self.size)
            yield self.normalise(images), labels


def resize_and_crop(images, size):
    """Evaluation crop of (..., h, w): shorter side to 256/224 of max(size), then the centre."""
    images = TF.resize(images, [round(max(size) * 256 / 224)], InterpolationMode.BICUBIC)
    return TF.center_crop(images, size)


# -------------------------------------------------------------- small sets, augmented on the device


def random_crops(count, min_scale, generator):
    """Random resized crops of square images, half of them mirrored, as matrices for F.affine_grid:
    (count, 2, 3), mapping (x, y) in the crop to (x, y) in the image, both from -1 to 1.

    As torchvision's RandomResizedCrop: area uniform in (min_scale, 1), aspect ratio log-uniform in
    (3/4, 4/3); the first of ten tries that fits, else the whole image."""
    where = dict(device=generator.device, generator=generator)
    area = min_scale + (1 - min_scale) * torch.rand(count, 10, **where)
    ratio = torch.exp(math.log(4 / 3) * (2 * torch.rand(count, 10, **where) - 1))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2)      # width, height
    fits = (sides <= 1).all(dim=2)
    first = sides[torch.arange(count, device=sides.device), fits.int().argmax(dim=1)]
    sides = torch.where(fits.any(dim=1, keepdim=True), first, 1)
    middle = (1 - sides) * (2 * torch.rand(count, 2, **where) - 1)
    sides[:, 0] *= torch.where(torch.rand(count, **where) < 0.5, -1, 1)
    return torch.cat([torch.diag_embed(sides), middle[:, :, None]], dim=2)


class SmallSet(Source):
    """A set that fits on the device: items are square images, uint8 (N, c, h, h)."""

    def batches(self, order, epoch):
        for indices in order:
            labels = self.labels_of(indices)
            yield self.items[indices], None if labels is None else labels.to(self.device)

    def draw(self, b, generator):
        seeds = torch.randint(2**62, (b,), device=generator.device, generator=generator)
        # On the CPU, so that `augment` need not wait for the device.
        coin = torch.rand(b, generator=torch.Generator().manual_seed(generator.initial_seed()))
        return random_crops(b, self.crop_scale, generator), seeds, coin < self.bicubic

    def augment(self, images, crops, seeds, bicubic):
        # Near a crop's edge, interpolation uses pixels beyond it; torchvision repeats the edge. Not
        # antialiased, as crops are mostly enlarged: shrunk to less than half, they skip pixels.
        grid = F.affine_grid(crops, [len(images), 1, *self.size], align_corners=False)
        out = images.new_empty(*images.shape[:2], *self.size, dtype=torch.float32)
        for mode, chosen in (("bilinear", ~bicubic), ("bicubic", bicubic)):
            out[chosen] = F.grid_sample(images[chosen].float(), grid[chosen], mode, "border", False)
        images = out.clamp(0, 255)
        if self.policy is not None:
            pairs = zip(images.round().byte(), seeds.tolist(), strict=True)
            images = torch.stack([seeded(seed, self.policy, image) for image, seed in pairs])
        return self.normalise(images)


# ------------------------------------------------------------------------------- folders of images


def read_image(path):
    """Any image file as uint8 RGB (3, h, w): alpha on white, 16 bits scaled to 8, EXIF rotation
    done. Raises OSError, naming the file, for whatever cannot be decoded."""
    try:
        content = Path(path).read_bytes()
        # A JPEG that is whole: the same pixels, a quarter faster. Where it fails, Pillow may not.
        if decode_jpeg and content.endswith(b"\xff\xd9"):
            with contextlib.suppress(RuntimeError):
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8),
                                   mode="RGB", apply_exif_orientation=True)
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known scale: convert to 8 bits")
            if image.mode.startswith("I"):                      # 16-bit grey: 65535 is white
                grey = (np.asarray(image) / 257).round().clip(0, 255)
                image = Image.fromarray(grey.astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception as error:               # each format has its own ways to stumble over damage
        raise OSError(f"{path}: {error}") from error


def find_images(root):
    """(paths of the images below `root`, sorted; labels; names). If all lie in two subfolders or
    more, labels are (N,) int64 into the sorted names of these, otherwise None."""
    files = glob.glob("**/*.*", root_dir=root, recursive=True)             # leaves out hidden ones
    files = sorted(file for file in files if Path(file).suffix.lower() in EXTENSIONS)
    folders = [os.path.dirname(file).split(os.sep)[0] for file in files]
    paths = np.array([os.path.join(root, file) for file in files], dtype=str)
    if not all(folders):
        return paths, None, []
    names, labels = np.unique(folders, return_inverse=True)
    return paths, torch.from_numpy(labels) if len(names) > 1 else None, names.tolist()


class Files(Source):
    """Image files: items, labels and classes are as `find_images` returns them.

    A file that cannot be read is replaced by the next readable one, with that one's label, and
    named once. More than 1 % of such files are an InputError."""

    def batches(self, order, epoch):
        keys = [(epoch, indices.tolist()) for indices in order if len(indices)]
        loader = DataLoader(self, batch_size=None, sampler=keys, num_workers=self.workers,
                            pin_memory=self.device.type == "cuda")
        for images, labels, broken in loader:
            new = sorted(broken.keys() - self.broken)
            self.broken.update(new)
            require(len(self.broken) <= len(self) // 100, f"{len(self.broken)} of {len(self)} "
                    f"images cannot be read: repair or remove them, {min(self.broken, default='')}")
            for path in new:
                print(f"broken image, replaced by the next one: {broken[path]}", flush=True)
            yield (images.to(self.device, non_blocking=True),
                   None if labels is None else labels.to(self.device))

    def __getitem__(self, key):
        """A batch, made by one worker. key: (epoch, indices), epoch None for no augmentation.

        Returns uint8 (b, 3, H, W), labels (b,) or None, {path of a broken file: reason}."""
        epoch, indices = key
        images, places, broken = [], [], {}
        for index in indices:
            place, image = index, None
            while image is None:
                try:
                    image = read_image(self.items[place])
                except OSError as error:
                    broken[self.items[place]] = str(error)
                    place = (place + 1) % len(self)
                if len(broken) > len(self) // 100:
                    return None, None, broken                   # `batches` will stop
            places.append(place)
            images.append(self.prepare(image, epoch, index))
        return torch.stack(images), self.labels_of(places), broken

    def prepare(self, image, epoch, index):
        """(3, h, w) -> (3, H, W). Depends on seed, epoch and index alone, whatever the worker."""
        if epoch is None:
            return resize_and_crop(image, self.size)
        image = seeded(seed_of(self.seed, 2, epoch, index), self.crop, image)
        if self.policy is not None:
            image = seeded(seed_of(self.seed, 3, epoch, index), self.policy, image)
        return image

    def crop(self, image):
        box = RandomResizedCrop.get_params(image, (self.crop_scale, 1), (3 / 4, 4 / 3))
        bicubic = torch.rand(()) < self.bicubic
        kind = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR
        return TF.resized_crop(image, *box, self.size, kind)

    def draw(self, b, generator):
        return (torch.rand(b, device=generator.device, generator=generator) < 0.5,)

    def augment(self, images, flip):
        return self.normalise(torch.where(flip[:, None, None, None], images.flip(-1), images))


def seed_of(*numbers):
    """One 63-bit seed from several whole numbers; close numbers give unrelated seeds."""
    return random.Random(repr(numbers)).getrandbits(63)         # seeded by a SHA-512 of the text


def write(path, save):
    """Calls save(temporary path), then renames the file: it is there complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    except RuntimeError as error:                # how torch.save reports that writing failed
        raise OSError(f"{path} cannot be written, is the disk full?") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(images, path, columns, rows=(), caption=""):
    """Images (b, 3, H, W) in 0 to 1 as a PNG, with titles of columns and rows, and a caption."""
    grid = torchvision.utils.make_grid(images, nrow=len(columns), pad_value=1)
    left, (height, width) = 80 if rows else 0, (side + 2 for side in images.shape[2:])
    sheet = Image.new("RGB", (left + grid.shape[2], 40 + grid.shape[1]), "white")
    sheet.paste(TF.to_pil_image(grid.cpu()), (left, 20))
    texts = [(left + 4 + i * width, 3, title) for i, title in enumerate(columns)]
    texts += [(4, 14 + (i + 0.5) * height, title) for i, title in enumerate(rows)]
    for x, y, text in [*texts, (4, 22 + grid.shape[1], caption)]:
        ImageDraw.Draw(sheet).text((x, y), text, "black", ImageFont.load_default(12))
    write(path, lambda temporary: sheet.save(temporary, format="png"))


def seeded(seed, transform, *inputs):
    """transform(*inputs); torchvision draws from the global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(*inputs)


# -------------------------------------------------------------------------- sets by name or by path

# The class in torchvision, its splits to train and to test on, the files expected in --data-dir.
PUBLISHED = {
    "fashion-mnist": (datasets.FashionMNIST, [True], [False], "FashionMNIST/raw/*-ubyte[.gz]"),
    "cifar10": (datasets.CIFAR10, [True], [False], "cifar-10-batches-py/"),
    "cifar100": (datasets.CIFAR100, [True], [False], "cifar-100-python/"),
    "flowers": (datasets.Flowers102, ["train", "val"], ["test"], "flowers-102/{jpg/,*.mat}"),
    "pets": (datasets.OxfordIIITPet, ["trainval"], ["test"], "oxford-iiit-pet/"),
    "aircraft": (datasets.FGVCAircraft, ["trainval"], ["test"], "fgvc-aircraft-2013b/"),
    "cars": (datasets.StanfordCars, ["train"], ["test"],
             "stanford_cars/{cars_train/,cars_test/,devkit/,cars_test_annos_withlabels.mat}"),
    "inat18": (None, ["train"], ["val"], "inat18/{train2018.json,val2018.json,train_val2018/}"),
}


def read_set(name, data_dir, train):
    """(images, labels, classes) of a named set, to train or to test on: uint8 (N, c, 32, 32), or
    paths for PHOTOS; (N,) int64. Downloads what is missing, except cars (gone) and inat18."""
    if name == "shapes":
        return draw_shapes(20_000, seed=1) if train else draw_shapes(2_000, seed=2)
    kind, training, testing, files = PUBLISHED[name]
    splits = training if train else testing
    try:
        if name == "inat18":        # torchvision has its images, but not the competition's split
            return read_inat18(Path(data_dir) / "inat18", *splits)
        first, *more = (kind(data_dir, split, download=name != "cars") for split in splits)
        if name == "fashion-mnist":                               # 28 x 28 grey, padded to 32 x 32
            return F.pad(first.data[:, None], (2, 2, 2, 2)), first.targets, first.classes
        if name in ("cifar10", "cifar100"):
            images = torch.from_numpy(first.data).permute(0, 3, 1, 2).contiguous()
            return images, torch.tensor(first.targets), first.classes
        # torchvision decodes an image to give its label: its private lists of both spare that.
        if name == "cars":
            paths, labels = zip(*first._samples, strict=True)
        elif name == "pets":
            paths, labels = first._images, first._labels
        else:
            paths = [path for part in (first, *more) for path in part._image_files]
            labels = [label for part in (first, *more) for label in part._labels]
        return np.array(paths, dtype=str), torch.tensor(labels), first.classes
    except Exception as error:             # tarfile, pickle, scipy, http: each fails in its own way
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--data {name}: cannot be read or downloaded ({reason[:160]}): "
                         f"put {files} into {data_dir} (--data-dir)") from error


def read_inat18(root, split):
    part = json.loads((root / f"{split}2018.json").read_text(encoding="utf-8"))
    kinds = sorted(part["categories"], key=lambda kind: kind["id"])
    number = {kind["id"]: i for i, kind in enumerate(kinds)}
    label = {note["image_id"]: number[note["category_id"]] for note in part["annotations"]}
    paths = [root / image["file_name"] for image in part["images"]]
    labels = [label[image["id"]] for image in part["images"]]
    return np.array(paths, dtype=str), torch.tensor(labels), [kind["name"] for kind in kinds]


def open_data(name, row, size, data_dir="data", train_images=None, **options):
    """The training source and the test source (None where there is none) of `--data name`.

    row, size, options (device, workers, seed): as in `Source`. train_images: use N of them only.
    Raises InputError, e.g. for missing files or a folder without images."""
    root, test = Path(name), None
    require(name in SETS or root.is_dir(), f"--data {name}: neither a folder nor one of "
            f"{', '.join(SETS)}")
    if name in SETS:
        kind = Files if name in PHOTOS else SmallSet
        train, test = (kind(*read_set(name, data_dir, train), row, size, **options)
                       for train in (True, False))
    else:
        where = root / "train" if (root / "train").is_dir() else root
        train = Files(*find_images(where), row, size, **options, root=where)
        require(len(train), f"--data {name}: no images below {where}, {' '.join(EXTENSIONS)}")
        if where != root:
            test = Files(*find_images(root / "val"), row, size, **options, root=root / "val")
            if test.classes != train.classes:               # its labels would mean other classes
                test.labels = None
    if train_images is not None:
        require(1 <= train_images <= len(train), f"--train-images {train_images}: must be from 1 "
                f"to {len(train)}")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        train.subset(order[:train_images].sort().values)
    return train, test or None


# ------------------------------------------------------------------------------------------- shapes

FIGURES = ["disc", "ring", "square", "frame", "triangle", "cross", "star", "stripes", "dots",
           "checker"]


def figure_distance(figure, u, v):
    """Roughly the signed distance from the figure's edge, negative inside. u, v: figure units."""
    r, a, b, box = torch.hypot(u, v), u.abs(), v.abs(), torch.maximum(u.abs(), v.abs())
    # By symmetry one tenth of the star is enough, and there its inside is a half-plane.
    fold = math.pi / 5 - (torch.atan2(v, u).remainder(2 * math.pi / 5) - math.pi / 5).abs()
    return {
        "disc": lambda: r - 0.8,
        "ring": lambda: (r - 0.7).abs() - 0.2,
        "square": lambda: box - 0.7,
        "frame": lambda: (box - 0.65).abs() - 0.18,
        "triangle": lambda: torch.maximum(0.866 * a + 0.5 * v, -v) - 0.5,
        "cross": lambda: torch.maximum(torch.maximum(a, b) - 0.9, torch.minimum(a, b) - 0.25),
        "star": lambda: 0.6 * r * torch.cos(fold) + 0.8 * r * torch.sin(fold) - 0.6,
        "stripes": lambda: torch.maximum(                                        # three
            box - 0.85, ((v + 0.85).remainder(0.68) - 0.17).abs() - 0.17),
        "dots": lambda: torch.maximum(box - 0.9, torch.hypot(                    # three by three
            (u + 0.9).remainder(0.6) - 0.3, (v + 0.9).remainder(0.6) - 0.3) - 0.22),
        "checker": lambda: torch.maximum(box - 0.85, -0.135 * (                  # four by four
            torch.sin(math.pi * u / 0.425) * torch.sin(math.pi * v / 0.425))),
    }[figure]()


def draw_shapes(count, seed):
    """`count` drawn images: uint8 (count, 3, 32, 32), labels (count,) into FIGURES, FIGURES.

    One figure each. Position, size, angle, colours, a background of two waves and noise all vary,
    so that comparing pixels tells little. Deterministic for a seed and a count."""
    g = torch.Generator().manual_seed(seed)
    labels = (torch.arange(count) % len(FIGURES))[torch.randperm(count, generator=g)]
    parts = [draw_figures(part, g) for part in labels.split(2000)]       # bounds the memory needed
    return torch.cat(parts), labels, FIGURES


def draw_figures(labels, g):
    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(len(labels), channels, 1, 1, generator=g)

    x = ((torch.arange(32) + 0.5) / 16 - 1).expand(1, 1, 32, 32)
    y = x.mT
    grey = uniform(0.2, 0.8)
    ground = grey + uniform(-0.2, 0.2, 3)
    for _ in range(2):
        turn, phase = uniform(0, math.pi), uniform(0, 2 * math.pi)
        along = torch.cos(turn) * x + torch.sin(turn) * y
        wave = torch.sin(uniform(3, 14) * along + phase)
        ground = ground + uniform(-0.1, 0.1) * wave
    contrast = uniform(0.3, 0.55)                           # lighter on dark, darker on light
    colour = torch.where(grey > 0.5, grey - contrast, grey + contrast) + uniform(-0.2, 0.2, 3)
    angle, radius = uniform(0, 2 * math.pi), uniform(0.6, 0.9)
    left, up = x - uniform(-0.4, 0.4), y - uniform(-0.4, 0.4)
    u = (torch.cos(angle) * left + torch.sin(angle) * up) / radius
    v = (torch.cos(angle) * up - torch.sin(angle) * left) / radius
    distance = torch.empty_like(u)
    for number, figure in enumerate(FIGURES):
        chosen = labels == number
        distance[chosen] = figure_distance(figure, u[chosen], v[chosen])
    cover = (0.5 - distance * radius * 16).clamp(0, 1)                   # edge one pixel wide
    images = ground * (1 - cover) + colour * cover
    images = images + 0.01 * torch.randn(images.shape, generator=g)
    return (images * 255).round().clamp(0, 255).byte()
