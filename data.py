"""Images: drawn, small public sets, folders of photographs, the paper's transfer sets.

    python data.py            draws shapes.png, a sheet of the `shapes` images

Two kinds of source. `SmallSet` keeps every image on the device as uint8 and augments a whole batch
there; `Files` decodes and crops in DataLoader workers and hands over uint8. Both have:

    draw(b, generator)        random numbers for `augment`, a tuple of tensors of b rows
    batches(order, epoch)     uint8 batches; order: index tensors (b,), one for each
    augment(uint8, *draws)    -> float (b, c, H, W), normalised
    plain(indices)            -> the same without augmentation, batch by batch
    labels, classes           (N,) int64 or None; the names that they number
    subset(indices)           keeps these images alone
    policy                    None, or further augmentation: uint8 image, seed -> uint8 image
    len(), description, and broken: the files that could not be read

Shapes in comments: b batch, c channels, h and w pixels of the source, H and W pixels handed over.
"""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

try:                                   # torchvision means to drop it; Pillow reads all there is
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What suits each set; dmae.py prints the row it uses. Sizes and lengths have a flag; the channels'
# number, means and deviations do not. `folder` is the paper's ImageNet recipe; the small sets are
# sized for two CPU cores. `teacher_preset` is what `--teacher self` pre-trains first.
SETS = {
    "shapes": dict(
        channels=3, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), image_size=32, patch_size=4,
        crop_scale=0.5, student="nano", teacher_preset="micro",
        epochs=2, batch_size=32, blr=2.4e-2),
    "fashion-mnist": dict(
        channels=1, mean=(0.286,), std=(0.353,), image_size=32, patch_size=4,
        crop_scale=0.5, student="nano", teacher_preset="mini",
        epochs=4, batch_size=128, blr=3e-3),
    "cifar10": dict(
        channels=3, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262), image_size=32,
        patch_size=4, crop_scale=0.2, student="nano", teacher_preset="mini",
        epochs=20, batch_size=128, blr=3e-3),
    "cifar100": dict(
        channels=3, mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276), image_size=32,
        patch_size=4, crop_scale=0.2, student="nano", teacher_preset="mini",
        epochs=20, batch_size=128, blr=3e-3),
    "folder": dict(
        channels=3, mean=IMAGENET_MEAN, std=IMAGENET_STD, image_size=224, patch_size=16,
        crop_scale=0.08, student="tiny", teacher_preset="base",
        epochs=400, batch_size=4096, blr=1.5e-4),
}

# The paper's transfer sets, with its splits: images to train on, images to test on, and what must
# lie in --data-dir. As for a folder of photographs, all else is ImageNet's.
PHOTOS = {
    "flowers": (2_040, 6_149, "flowers-102/{jpg/,imagelabels.mat,setid.mat}"),
    "pets": (3_680, 3_669, "oxford-iiit-pet/{images,annotations}/"),
    "aircraft": (6_667, 3_333, "fgvc-aircraft-2013b/"),
    "cars": (8_144, 8_041, "stanford_cars/{cars_train,cars_test,devkit}/ and "
             "stanford_cars/cars_test_annos_withlabels.mat"),
    "inat18": (437_513, 24_426, "inat18/{train2018.json,val2018.json,train_val2018/}"),
}
SETS |= {name: SETS["folder"] for name in PHOTOS}

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line that says what to do."""


class Normalise:
    """uint8 or float in 0..255 (b, c, H, W) -> float32, (x / 255 - mean) / std per channel."""

    def __init__(self, mean, std, device):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(-1, 1, 1) * 255

    def __call__(self, images):
        return (images.float() - self.mean) / self.std


# ----------------------------------------------------------------- random resized crop, in a batch


def crop_boxes(count, height, width, min_scale, generator):
    """Random resized crop's boxes: `count` rows (top, left, height, width) in pixels, int64.

    Area uniform in (min_scale, 1) of the image, aspect ratio log-uniform in (3/4, 4/3); of ten
    tries the first that fits, else the largest centred crop of an allowed ratio: what torchvision's
    RandomResizedCrop does one image at a time. All on the generator's device."""
    where = dict(device=generator.device, generator=generator)
    area = height * width * (min_scale + (1 - min_scale) * torch.rand(count, 10, **where))
    ratio = torch.exp(math.log(4 / 3) * (2 * torch.rand(count, 10, **where) - 1))
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    h = torch.where(found, h.gather(1, first)[:, 0], min(height, round(width * 4 / 3)))
    w = torch.where(found, w.gather(1, first)[:, 0], min(width, round(height * 4 / 3)))
    room = torch.stack([height - h, width - w])
    place = torch.where(found, torch.rand(2, count, **where) * (room + 1), room / 2).floor()
    return torch.stack([*place, h, w], dim=1).long()


def resize_matrix(start, length, source, target, bicubic):
    """(b, target, source) weights that resize the pixels start .. start + length to `target` ones.

    start, length: (b,) pixels. bicubic: (b,) bool, else bilinear. Antialiased, and blind to what
    lies outside the box, as Pillow's resize of a cropped image is."""
    scale = (length / target)[:, None, None]                             # b 1 1
    out = torch.arange(target, device=start.device)[None, :, None]       # 1 target 1
    pixel = torch.arange(source, device=start.device)[None, None]        # 1 1 source
    first = start[:, None, None]
    x = (pixel - first + 0.5 - (out + 0.5) * scale).abs() / scale.clamp(min=1)
    linear = (1 - x).clamp(min=0)
    cubic = torch.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1,              # Keys, a = -0.5
                        (-0.5 * x**3 + 2.5 * x**2 - 4 * x + 2).where(x < 2, 0))
    weights = torch.where(bicubic[:, None, None], cubic, linear)
    weights = weights * ((pixel >= first) & (pixel < first + length[:, None, None]))
    return weights / weights.sum(dim=2, keepdim=True)


def resized_crop(images, boxes, bicubic, size):
    """Crop each image by its own box, then resize: uint8 (b, c, h, w) -> float 0..255 (b, c, H, W).

    Resizing is linear in each direction, so that a whole batch is two batched matrix products."""
    top, left, height, width = boxes.T
    rows = resize_matrix(top, height, images.shape[2], size[0], bicubic)
    columns = resize_matrix(left, width, images.shape[3], size[1], bicubic)
    out = rows[:, None] @ images.float() @ columns[:, None].transpose(-2, -1)
    return out.clamp(0, 255)


def draw_seeds(source, b, generator):
    """A seed an image for the source's policy; nothing is drawn where there is none."""
    if source.policy is None:
        return ()
    return torch.randint(2**62, (b,), device=generator.device, generator=generator),


class SmallSet:
    """A set that fits on the device: uint8 images (N, c, h, w), labels (N,) or None."""

    broken = ()                       # as Files: those that could not be read
    policy = None

    def __init__(self, images, labels, row, size, device="cpu", classes=()):
        self.images, self.labels, self.classes = images.to(device), labels, classes
        self.size, self.min_scale = tuple(size), row["crop_scale"]
        self.normalise = Normalise(row["mean"], row["std"], device)
        self.description = f"{len(images):,} images of {' x '.join(map(str, images.shape[1:]))}"

    def __len__(self):
        return len(self.images)

    def subset(self, indices):
        self.images, self.labels = self.images[indices.to(self.images.device)], self.labels[indices]

    def draw(self, b, generator):
        where = dict(device=generator.device, generator=generator)
        boxes = crop_boxes(b, *self.images.shape[2:], self.min_scale, generator)
        flip, bicubic = torch.rand(b, **where) < 0.5, torch.rand(b, **where) < 0.5
        return flip, bicubic, boxes, *draw_seeds(self, b, generator)

    def batches(self, order, epoch):
        for indices in order:
            yield self.images[indices.to(self.images.device)]

    def augment(self, images, flip, bicubic, boxes, seeds=None):
        images = resized_crop(images, boxes, bicubic, self.size)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        if self.policy is not None:
            pairs = zip(images.round().byte(), seeds.tolist())
            images = torch.stack([self.policy(image, seed) for image, seed in pairs])
        return self.normalise(images)

    def plain(self, indices, batch=500):
        for part in indices.to(self.images.device).split(batch):
            images = self.images[part]
            if images.shape[2:] != self.size:
                images = TF.resize(images, self.size, InterpolationMode.BICUBIC, antialias=True)
            yield self.normalise(images)


# ------------------------------------------------------------------------------ folders of images


def read_image(path):
    """Any image file as uint8 RGB (3, h, w): alpha on white, 16 bits scaled to 8, EXIF rotation
    done. Raises OSError, naming the file, for whatever cannot be decoded."""
    try:
        content = Path(path).read_bytes()
        # A JPEG that is whole: the same pixels, a quarter faster.
        if decode_jpeg and content.startswith(b"\xff\xd8\xff") and content.endswith(b"\xff\xd9"):
            with contextlib.suppress(RuntimeError):                     # Pillow may know better
                return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8),
                                   mode="RGB", apply_exif_orientation=True)
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known scale: convert to 8 bits")
            if image.mode.startswith("I"):                      # 16-bit grey: 65535 is white
                grey = np.asarray(image).astype(np.float64) / 257
                image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    # Pillow reports damage by any of these, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, KeyError, IndexError, TypeError,
            AttributeError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error


def find_images(root, classes=None):
    """Paths of the images below `root`, sorted; and, if each lies in a subfolder, a label for each
    (N,) int64 into the sorted names of these: (paths, labels or None, names).

    `classes`: the names that there must be, or there are no labels."""
    paths, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        if os.path.realpath(folder) in seen:                            # links may run in circles
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        paths += [os.path.join(folder, f) for f in sorted(files)
                  if Path(f).suffix.lower() in EXTENSIONS and not f.startswith(".")]
    parts = [os.path.relpath(path, root).split(os.sep) for path in paths]
    labelled = bool(parts) and all(len(part) > 1 for part in parts)
    found = sorted({part[0] for part in parts}) if labelled else []
    if len(found) < 2 or classes not in (None, found):
        return paths, None, found
    number = {name: i for i, name in enumerate(found)}
    return paths, torch.tensor([number[part[0]] for part in parts]), found


class Files(torch.utils.data.Dataset):
    """Image files, read as they are needed. paths, labels, classes: as `find_images` returns them.

    The key of an item is (epoch, index), epoch None for evaluation. `broken`: the paths that could
    not be read, each replaced by the next readable one, with its label; more than 1 % of them is an
    InputError."""

    policy = None

    def __init__(self, paths, labels, classes, root, row, size, device="cpu", workers=0, seed=0):
        self.paths, self.classes, self.root = paths, classes, Path(root)
        self.listed = labels
        self.labels = None if labels is None else labels.clone()     # of what is read in its place
        self.size, self.min_scale = list(size), row["crop_scale"]
        self.device, self.workers, self.seed = device, workers, seed
        self.normalise = Normalise(row["mean"], row["std"], device)
        self.broken = set()
        kinds = f"{len(classes):,} classes" if labels is not None else "no labels"
        self.description = f"{len(paths):,} files, {kinds}, from {root}"

    def __len__(self):
        return len(self.paths)

    def subset(self, indices):
        self.paths = [self.paths[i] for i in indices.tolist()]
        if self.listed is not None:
            self.listed = self.listed[indices]
            self.labels = self.listed.clone()

    def __getitem__(self, key):
        """key (epoch, index) -> uint8 (3, H, W), [(path, reason) of broken files], and the index
        of the file that was read."""
        epoch, index = key
        broken = []
        for shift in range(len(self.paths)):
            place = (index + shift) % len(self.paths)
            try:
                image = read_image(self.paths[place])
                break
            except OSError as error:
                broken.append((self.paths[place], str(error)))
                if len(broken) > 0.01 * len(self.paths):
                    return torch.zeros(3, *self.size, dtype=torch.uint8), broken, place
        if epoch is None:                                       # evaluation: resize, centre crop
            short = round(max(self.size) * 256 / 224)
            image = TF.resize(image, [short], InterpolationMode.BICUBIC, antialias=True)
            return TF.center_crop(image, self.size), broken, place
        # The crop depends on seed, epoch and index alone, whatever worker makes it.
        image = seeded(mix(self.seed, 2, epoch, index), self.crop, image)
        if self.policy is not None:
            image = self.policy(image, mix(self.seed, 3, epoch, index))
        return image, broken, place

    def crop(self, image):
        """Random resized crop, bilinear or bicubic."""
        box = RandomResizedCrop.get_params(image, (self.min_scale, 1), (3 / 4, 4 / 3))
        kind = InterpolationMode.BILINEAR if torch.rand(()) < 0.5 else InterpolationMode.BICUBIC
        return TF.resized_crop(image, *box, self.size, kind, antialias=True)

    def _load(self, keys):
        loader = torch.utils.data.DataLoader(
            self, batch_sampler=keys, num_workers=self.workers, collate_fn=collate,
            pin_memory=torch.device(self.device).type == "cuda")
        for batch, (images, broken, read) in zip(keys, loader):
            for path, reason in broken:
                if path not in self.broken:
                    self.broken.add(path)
                    print(f"broken image, replaced by the next one: {reason}", flush=True)
                if len(self.broken) > 0.01 * len(self.paths):
                    raise InputError(
                        f"{len(self.broken)} of {len(self.paths)} images in {self.root} cannot be "
                        f"read, more than 1 %, e.g. {min(self.broken)}: repair or remove them")
            if self.labels is not None:        # of the image that was read
                self.labels[[index for _, index in batch]] = self.listed[read]
            yield images.to(self.device, non_blocking=True)

    def draw(self, b, generator):
        return (torch.rand(b, device=generator.device, generator=generator) < 0.5,)

    def batches(self, order, epoch):
        return self._load([[(epoch, i) for i in indices.tolist()] for indices in order])

    def augment(self, images, flip):
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return self.normalise(images)

    def plain(self, indices, batch=100):
        parts = [part.tolist() for part in indices.split(batch) if len(part)]
        for images in self._load([[(None, i) for i in part] for part in parts]):
            yield self.normalise(images)


def collate(samples):
    """[(image, broken, place)] -> images (b, 3, H, W), all broken ones, places (b,)."""
    images, broken, places = zip(*samples)
    return torch.stack(images), [pair for pairs in broken for pair in pairs], torch.tensor(places)


def mix(*numbers):
    """One 63-bit seed from several whole numbers; close numbers give unrelated seeds."""
    seed = 0
    for number in numbers:                      # a step of SplitMix64 for each number
        seed = (seed + number + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ seed >> 27) * 0x94D049BB133111EB % 2**64
        seed ^= seed >> 31
    return seed >> 1


def seeded(seed, transform, *inputs):
    """transform(*inputs); torchvision draws from the global generator, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(*inputs)


# ------------------------------------------------------------------------- sets by name or by path


def open_data(name, row, size, data_dir="data", train_images=None, device="cpu", workers=0,
              seed=0):
    """The training source and the test source (None where there is none) of `--data name`.

    row: the set's row of SETS, possibly overridden. size: (H, W). train_images: use the first N
    only. Raises InputError, e.g. for missing files or a folder without images."""
    options = dict(row=row, size=size, device=device)
    reading = options | dict(workers=workers, seed=seed)
    if name in PHOTOS:
        train, test = (Files(*photos(name, data_dir, part), Path(data_dir), **reading)
                       for part in (True, False))
        for path in (train.paths[0], test.paths[0]):
            if not os.path.exists(path):
                raise InputError(f"--data {name}: it lists {path}, which is not there: put "
                                 f"{PHOTOS[name][2]} into {data_dir} (--data-dir)")
    elif name in SETS and name != "folder":
        if name == "shapes":
            parts = draw_shapes(20_000, seed=1), draw_shapes(2_000, seed=2)
        else:
            parts = (torchvision_set(name, data_dir, train) for train in (True, False))
        train, test = (SmallSet(images, labels, **options, classes=classes)
                       for images, labels, classes in parts)
    else:
        root = Path(name)
        if not root.is_dir():
            known = ", ".join(n for n in SETS if n != "folder")
            raise InputError(f"--data {name}: neither a folder nor one of {known}")
        has_train = (root / "train").is_dir()
        where = root / "train" if has_train else root
        train, test = Files(*find_images(where), where, **reading), None
        if not len(train):
            raise InputError(f"--data {name}: no images below {where} "
                             f"(looked for {' '.join(sorted(EXTENSIONS))})")
        if has_train and (root / "val").is_dir():
            where = root / "val"
            test = Files(*find_images(where, train.classes), where, **reading)
    if train_images is not None:
        check_count(train_images, len(train))
        # Folders are sorted by class: take images from everywhere, the same ones each time.
        keep = torch.arange(len(train))
        if isinstance(train, Files):
            keep = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        train.subset(keep[:train_images].sort().values)
        train.description += f", {train_images:,} of them used"
    return train, test if test is not None and len(test) else None


def check_count(train_images, available):
    if train_images is not None and not 1 <= train_images <= available:
        raise InputError(f"--train-images {train_images}: the set has 1 to {available} to give")


def torchvision_set(name, data_dir, train):
    """uint8 images (N, c, 32, 32), labels (N,) and class names of a small public set; downloads
    what is missing."""
    kind, files = {
        "fashion-mnist": (torchvision.datasets.FashionMNIST,
                          "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]"),
        "cifar10": (torchvision.datasets.CIFAR10, "cifar-10-batches-py/ or cifar-10-python.tar.gz"),
        "cifar100": (torchvision.datasets.CIFAR100, "cifar-100-python/ or cifar-100-python.tar.gz"),
    }[name]
    with found_or_downloaded(name, files, data_dir):
        try:
            data = kind(data_dir, train=train, download=False)
        except RuntimeError:                    # not there, or (CIFAR) not what it should be
            data = kind(data_dir, train=train, download=True)
        images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    if name == "fashion-mnist":                                   # 28 x 28 grey, padded to 32 x 32
        return torch.nn.functional.pad(images[:, None], (2, 2, 2, 2)), labels, data.classes
    return images.permute(0, 3, 1, 2).contiguous(), labels, data.classes


@contextlib.contextmanager
def found_or_downloaded(name, files, data_dir):
    """Whatever goes wrong within is said in one line, with the files that would mend it."""
    try:
        yield
    # Damaged archives and lists fail in whatever way their readers stumble: tarfile, pickle, scipy
    # and http have exceptions of their own, with no ancestor in common.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--data {name}: cannot be read or downloaded ({reason[:160]}): "
                         f"put {files} into {data_dir} (--data-dir)") from error


def photos(name, data_dir, train):
    """Paths, labels (N,) int64 and class names of one of PHOTOS, its training or its test split.

    Downloads what is missing, but for cars (no longer offered) and inat18 (120 GB)."""
    sets = torchvision.datasets
    if name in ("flowers", "cars") and not importlib.util.find_spec("scipy"):
        raise InputError(f"--data {name}: its labels are in .mat files, pip install scipy")

    def either(kind, split, **options):
        try:
            return kind(data_dir, split, **options)
        except RuntimeError:
            return kind(data_dir, split, **options, download=True)

    # torchvision offers image and label together only: lists spare decoding images for labels.
    with found_or_downloaded(name, PHOTOS[name][2], data_dir):
        if name == "flowers":
            parts = [either(sets.Flowers102, part)
                     for part in (("train", "val") if train else ("test",))]
            return ([str(path) for part in parts for path in part._image_files],
                    torch.tensor([label for part in parts for label in part._labels]),
                    sets.Flowers102.classes)
        if name == "pets":
            part = either(sets.OxfordIIITPet, "trainval" if train else "test")
            return [str(path) for path in part._images], torch.tensor(part._labels), part.classes
        if name == "aircraft":
            part = either(sets.FGVCAircraft, "trainval" if train else "test")
            return part._image_files, torch.tensor(part._labels), part.classes
        if name == "cars":
            part = sets.StanfordCars(data_dir, "train" if train else "test")
            paths, labels = zip(*part._samples)
            return list(paths), torch.tensor(labels), part.classes
        # iNaturalist 2018: torchvision has its images, but not the split of the competition.
        root = Path(data_dir) / "inat18"
        file = root / f"{'train' if train else 'val'}2018.json"
        part = json.loads(file.read_text(encoding="utf-8"))
        categories = sorted(part["categories"], key=lambda category: category["id"])
        number = {category["id"]: i for i, category in enumerate(categories)}
        label = {a["image_id"]: number[a["category_id"]] for a in part["annotations"]}
        return ([str(root / image["file_name"]) for image in part["images"]],
                torch.tensor([label[image["id"]] for image in part["images"]]),
                [category["name"] for category in categories])


# ------------------------------------------------------------------------------------------ shapes

FIGURES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "stripes", "dots",
           "checker")


def figure_distance(kind, u, v):
    """Roughly the distance from the figure's edge, negative inside; (u, v) in figure units."""
    r, a, b = torch.hypot(u, v), u.abs(), v.abs()
    box = torch.maximum(a, b)
    if kind == "disc":
        return r - 0.8
    if kind == "ring":
        return (r - 0.7).abs() - 0.2
    if kind == "square":
        return box - 0.7
    if kind == "frame":
        return (box - 0.65).abs() - 0.18
    if kind == "triangle":
        return torch.maximum(0.866 * a + 0.5 * v, -v) - 0.5
    if kind == "cross":
        return torch.minimum(torch.maximum(a - 0.9, b - 0.25), torch.maximum(b - 0.9, a - 0.25))
    if kind == "star":                  # folded onto one tenth of the star, a half-plane is left
        angle = math.pi / 5 - (torch.atan2(v, u).remainder(2 * math.pi / 5) - math.pi / 5).abs()
        return 0.6 * r * torch.cos(angle) + 0.8 * r * torch.sin(angle) - 0.6
    if kind == "stripes":                                                        # three
        return torch.maximum(box - 0.85, ((v + 0.85).remainder(0.68) - 0.17).abs() - 0.17)
    if kind == "dots":                                                           # three by three
        in_cell = ((x + 0.9).remainder(0.6) - 0.3 for x in (u, v))
        return torch.maximum(box - 0.9, torch.hypot(*in_cell) - 0.22)
    if kind == "checker":                                                        # four by four
        waves = torch.sin(math.pi * u / 0.425) * torch.sin(math.pi * v / 0.425)
        return torch.maximum(box - 0.85, -0.135 * waves)
    raise ValueError(kind)


@functools.lru_cache(maxsize=2)          # a run's teacher and student ask for the same
def draw_shapes(count, seed, size=32):
    """`count` drawn images: uint8 (count, 3, size, size), labels (count,) into FIGURES, FIGURES.

    One figure each. Place, size, angle, colours, a ground of two waves and noise all vary, so that
    comparing pixels tells little. Deterministic for a seed and a count."""
    g = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=g)

    labels = (torch.arange(count) % len(FIGURES))[torch.randperm(count, generator=g)]
    out = torch.empty(count, 3, size, size, dtype=torch.uint8)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = axis[None, None, :], axis[None, :, None]
    for part in torch.arange(count).split(2000):                         # bounds the memory needed
        b = len(part)
        grey = uniform(0.2, 0.8, b, 1, 1, 1)
        ground = grey + uniform(-0.2, 0.2, b, 3, 1, 1)
        for _ in range(2):
            turn, phase = uniform(0, math.pi, b, 1, 1), uniform(0, 2 * math.pi, b, 1, 1)
            along = torch.cos(turn) * x + torch.sin(turn) * y
            wave = torch.sin(uniform(3, 14, b, 1, 1) * along + phase)
            ground = ground + uniform(-0.1, 0.1, b, 1, 1, 1) * wave[:, None]
        away = uniform(0.3, 0.55, b, 1, 1, 1)               # lighter on dark, darker on light
        colour = torch.where(grey > 0.5, grey - away, grey + away) + uniform(-0.2, 0.2, b, 3, 1, 1)
        angle, radius = uniform(0, 2 * math.pi, b, 1, 1), uniform(0.6, 0.9, b, 1, 1)
        left, up = x - uniform(-0.4, 0.4, b, 1, 1), y - uniform(-0.4, 0.4, b, 1, 1)
        u = (torch.cos(angle) * left + torch.sin(angle) * up) / radius
        v = (torch.cos(angle) * up - torch.sin(angle) * left) / radius
        distance = torch.empty(b, size, size)
        for number, kind in enumerate(FIGURES):
            mine = labels[part] == number
            distance[mine] = figure_distance(kind, u[mine], v[mine])
        cover = (0.5 - distance * radius * size / 2).clamp(0, 1)[:, None]    # edge one pixel wide
        image = ground * (1 - cover) + colour * cover
        image = image + 0.01 * torch.randn(b, 3, size, size, generator=g)
        out[part] = (image * 255).round().clamp(0, 255).byte()
    return out, labels, FIGURES


if __name__ == "__main__":
    sheet, kinds, _ = draw_shapes(200, seed=1)
    sheet = sheet[kinds.argsort(stable=True)].float() / 255
    torchvision.utils.save_image(sheet, "shapes.png", nrow=20, padding=1)
    print(f"shapes.png: a row each of {', '.join(FIGURES)}")
