"""What a pre-trained encoder is worth: fine-tuning, a linear probe, k-NN.

    python finetune.py --init runs/0001/student.pth                          # on drawn images
    python finetune.py --init runs/x/student.pth --data /path/to/imagenet    # the paper's
    python finetune.py --init none --data cifar100                           # from scratch
    python finetune.py --init mae_tiny_400e.pth.tar --data pets              # anyone's weights
    python finetune.py --init runs/x/student.pth --data fashion-mnist --mode knn
    python finetune.py --eval runs/pets/model.pth --data pets

The last line printed is the result, as JSON: top-1 and top-5 on the whole test set after the last
epoch. Model, loading, schedule and training step are those of dmae.py; new here are the classifier,
layer-wise learning rates, and the recipes.
"""

import argparse
import copy
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

from data import PHOTOS, SETS, InputError, mix, open_data, seeded
from dmae import (
    KNN, PRESETS, Parser, ViT, add_machine_flags, check, check_outside, check_vacant, epoch_order,
    first_process_first, join_processes, learning_rate, load_checkpoint, load_vit, new_vit,
    on_what, one_line_errors, open_folder, pooled_features, precision, record, replicate, run_epoch,
    save_checkpoint, settings_of_the_run, train_step, write)

# The paper's two recipes; every value has a flag. The learning rate is blr * batch / 256;
# RandAugment's scale is 0 to 10; it, clip, mixup, cutmix, erasing and smoothing are off at 0.
RECIPES = {
    "imagenet": dict(
        optimizer="adamw", epochs=300, warmup_epochs=5, batch_size=1024, blr=1e-3, end_lr=1e-6,
        weight_decay=0.05, layer_decay=0.85, clip=0.0, crop_scale=0.08, randaugment=10, mixup=0.2,
        cutmix=0.0, erasing=0.0, smoothing=0.0),
    "transfer": dict(
        optimizer="sgd", epochs=100, warmup_epochs=20, batch_size=512, blr=0.015, end_lr=1e-6,
        weight_decay=0.0, layer_decay=0.75, clip=1.0, crop_scale=0.08, randaugment=0, mixup=0.0,
        cutmix=0.0, erasing=0.0, smoothing=0.0),
    "small": dict(                                          # ours, for the small sets, as is this:
        optimizer="adamw", epochs=3, warmup_epochs=0.5, batch_size=128, blr=4e-3, end_lr=1e-6,
        weight_decay=0.05, layer_decay=0.85, clip=0.0, crop_scale=0.5, randaugment=0, mixup=0.0,
        cutmix=0.0, erasing=0.0, smoothing=0.0),
    "linear": dict(
        optimizer="sgd", epochs=100, warmup_epochs=10, batch_size=512, blr=0.3, end_lr=0.0,
        weight_decay=0.0, clip=0.0, smoothing=0.0),
}
# Which of them a data set gets, and what is different for it; a folder gets ImageNet's. The paper
# gives no length for the transfer sets but CIFAR-100: 100 epochs are ours.
RECIPE_OF = {
    **{name: ("transfer", {}) for name in PHOTOS},
    **{name: ("transfer", dict(epochs=50, warmup_epochs=10, blr=0.05))
       for name in ("cifar100", "cifar10")},
    **{name: ("small", {}) for name in ("fashion-mnist", "shapes")},
}
# What a run leaves in its folder; nothing else is ever overwritten.
RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pth", "model.pth")

# ======================================================================================= classifier


class Classifier(ViT):
    """Mean of the last block's patch tokens -> fc_norm -> head. The class token is not read, the
    encoder's final norm dropped, the position table trained (paper, appendix).

    Parameter names are those of timm's VisionTransformer with global_pool="avg"."""

    def __init__(self, classes, **config):
        super().__init__(**config)
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.pos_embed.requires_grad_(True)

    def logits(self, images):
        """(b, channels, height, width), normalised -> (b, classes)."""
        x = self(images, tokens=[self.depth])[1][self.depth]                          # b 1+n c
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))


class Probe(nn.Module):
    """Linear probe: batch norm without parameters, and a linear layer, on features (b, c)."""

    depth = 0

    def __init__(self, width, classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(width, affine=False)
        self.head = nn.Linear(width, classes)

    def logits(self, features):
        return self.head(self.norm(features))


class Supervised(nn.Module):
    """A classifier and its loss, to be called as MAE and DMAE are. targets: labels (b,) int64, or
    shares of the classes (b, classes)."""

    def __init__(self, classifier, smoothing=0.0):
        super().__init__()
        self.classifier, self.smoothing = classifier, smoothing

    def forward(self, images, targets):
        logits = self.classifier.logits(images).float()
        return {"loss": F.cross_entropy(logits, targets, label_smoothing=self.smoothing)}


def layer_of(name, depth):
    """0: class token, positions and patch embedding; k: block k; depth + 1: fc_norm and head."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1 if name.startswith(("fc_norm.", "head.")) else 0


def layer_groups(model, layer_decay, weight_decay):
    """Parameter groups of layer-wise learning rates: the further from the head, the slower.

    A group's learning rate is multiplied by its `scale`; biases, norms, class token and positions
    are not decayed."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = {}
    for name, p in trained.items():
        layer = layer_of(name, model.depth)
        decayed = p.ndim > 1 and name not in ("cls_token", "pos_embed")
        group = groups.setdefault((layer, decayed), dict(
            params=[], layer=layer, scale=layer_decay ** (model.depth + 1 - layer),
            weight_decay=weight_decay if decayed else 0.0))
        group["params"].append(p)
    every = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(every) == sorted(map(id, trained.values())), "each in exactly one group"
    return [groups[key] for key in sorted(groups)]


def new_classifier(vit, classes, s):
    """A classifier, its weights taken from the first of these that has them:

        1. with --resume, the checkpoint of the run itself (`finetune` loads it)
        2. --init FILE: class token, positions, patch embedding and blocks, or with --keep-blocks K
           the first K blocks
        3. chance, by the seed alone; with --init none, everything

    Returns it and the names of its parts that are new. --freeze-blocks K keeps the first K blocks,
    and what lies before them, as they are."""
    torch.manual_seed(s.seed)
    model = Classifier(classes, **vit.config)
    kept = model.depth if s.keep_blocks is None else s.keep_blocks
    if s.init == "none":
        kept = -1                                                   # not even what lies below
    given = {name: tensor for name, tensor in vit.state_dict().items()
             if not name.startswith("norm.") and layer_of(name, model.depth) <= kept}
    model.load_state_dict(model.state_dict() | given)
    for name, p in model.named_parameters():
        if s.freeze_blocks is not None and layer_of(name, model.depth) <= s.freeze_blocks:
            p.requires_grad_(False)
    new = ["everything"] if kept < 0 else ["fc_norm", "head"]
    if 0 <= kept < model.depth:
        new.append(f"blocks {kept + 1} to {model.depth}")
    return model, new


def load_classifier(path):
    """A fine-tuned model from a file: ours, or any that `load_vit` reads and that has fc_norm and
    head. `classes` of the result: their names, or None. Raises InputError for other files."""
    vit = load_vit(path)
    head = vit.head
    if head.keys() != {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}:
        raise InputError(f"{path} holds no classifier on the mean of its patches (fc_norm and "
                         "head): give the model.pth of a fine-tuning run")
    classes = len(head["head.bias"])
    if head["head.weight"].shape != (classes, vit.width):
        raise InputError(f"{path}: its head does not fit an encoder {vit.width} wide")
    model = Classifier(classes, **vit.config)
    model.load_state_dict(head | {
        name: tensor for name, tensor in vit.state_dict().items() if not name.startswith("norm.")})
    model.classes = vit.classes
    return model


# ===================================================================================== augmentation


class RandAugment:
    """Two operations, each done with probability 1/2: uint8 image (c, h, w), seed -> the same.

    The nearest in torchvision to timm's rand-m10-mstd0.5-inc1: `magnitude` 10 of 10 rotates by 30
    degrees (torchvision's own scale ends at 30). Corners that come in are of colour `fill`."""

    def __init__(self, magnitude, fill):
        operation = v2.RandAugment(
            num_ops=1, magnitude=magnitude, num_magnitude_bins=11, fill=fill,
            interpolation=InterpolationMode.BILINEAR)
        self.operations = v2.Compose([v2.RandomApply([operation], p=0.5)] * 2)

    def __call__(self, image, seed):
        return seeded(seed, self.operations, image)


def batch_augmentation(s, classes):
    """What follows crop, flip and RandAugment: f(images, labels, step, first) -> images, targets.

    first: place of the first image in the whole batch. RandomErasing of each image; then MixUp or
    CutMix, for a batch at a time and among the images of one process."""
    erase = v2.RandomErasing(p=s.erasing, value="random")
    mixers = [kind(alpha=alpha, num_classes=classes)
              for kind, alpha in ((v2.MixUp, s.mixup), (v2.CutMix, s.cutmix)) if alpha > 0]

    def augment(images, labels, step, first):
        if s.erasing:
            images = torch.stack([seeded(mix(s.seed, 4, step, first + i), erase, image)
                                  for i, image in enumerate(images)])
        if mixers:
            images, labels = seeded(
                mix(s.seed, 5, step), v2.RandomChoice(mixers), images, labels)
        return images, labels

    return augment


def stratified(labels, fraction, seed):
    """Indices of a `fraction` of each class, at least one image of each, sorted."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix(seed, 6)))
    shuffled, keep = labels[order], []
    for label in labels.unique():
        mine = order[shuffled == label]
        keep.append(mine[:max(1, round(fraction * len(mine)))])
    return torch.cat(keep).sort().values


def hold_out(train, count):
    """(train without them, `count` of its images to test on), the same for every seed; train is
    changed in place."""
    if count >= len(train):
        raise InputError(f"--holdout {count}: there are {len(train)} images to train on, and some "
                         "must be left")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    test = copy.copy(train)
    test.broken = type(train.broken)()
    test.subset(order[:count].sort().values)
    train.subset(order[count:].sort().values)
    return train, test


class Features:
    """Features computed once, in the place of images: the interface of SmallSet and Files."""

    def __init__(self, features, source):
        """features (N, c); source: what they are of, already read."""
        self.features, self.labels = features, source.labels
        self.classes, self.broken = source.classes, source.broken

    def __len__(self):
        return len(self.features)

    def draw(self, b, generator):
        return ()

    def batches(self, order, epoch):
        return (self.features[indices] for indices in order)

    def augment(self, features):
        return features

    def plain(self, indices, batch=500):
        return (self.features[part] for part in indices.split(batch))


@torch.no_grad()
def evaluate(classifier, test, autocast, device):
    """Top-1, top-5 and cross-entropy on the whole test set; several processes share the work."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    classifier.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    indices = torch.arange(len(test))[rank::world]
    for images, part in zip(test.plain(indices, 250), indices.split(250)):
        with autocast:
            logits = classifier.logits(images).float()
        labels = test.labels[part].to(device)               # after reading: see Files._load
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([best[:, 0].sum(), best.sum(), loss, labels.new_tensor(len(labels))])
    if world > 1:
        dist.all_reduce(sums)
    top1, top5, loss = (sums[:3] / sums[3]).tolist()
    return dict(top1=top1, top5=top5, test_loss=loss)


# ===================================================================================== command line

# Flags that make sense in every mode, and those that do in some; others are refused.
COMMON = {"init", "data", "data_dir", "mode", "model", "image_size", "patch_size",
          "label_fraction", "holdout", "seed", "workers", "device", "amp", "out", "overwrite"}
DEFAULTS = dict(
    data="shapes", data_dir="data", image_size=None, label_fraction=1.0, holdout=None, seed=0,
    workers=min(8, os.cpu_count() or 1), eval_every=1, micro_batch=None, block=None, pool="mean",
    bank=None, keep_blocks=None, freeze_blocks=None, resume=False, overwrite=False)
MODES = {
    "finetune": {*RECIPES["imagenet"], "recipe", "keep_blocks", "freeze_blocks", "eval_every",
                 "micro_batch", "compile"},
    "linear": {*RECIPES["linear"], "block", "pool", "eval_every"},
    "knn": {"block", "pool", "bank"},
}


def make_parser():
    parser = Parser(
        prog="finetune.py", allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Fine-tune, probe or evaluate a pre-trained encoder.",
        epilog="[recipe]: from RECIPES in finetune.py, printed at the start.")
    add = parser.add_argument
    add("--init", metavar="FILE", help="what to start from: weights of a ViT, x.pth or x.pth:3 to "
        "give its heads; none: chance, a control")
    add("--eval", metavar="FILE", help="only evaluate a fine-tuned model.pth")
    add("--data", metavar="DIR|NAME", help="a folder with train/CLASS/ and val/CLASS/, or "
        f"{', '.join(n for n in SETS if n != 'folder')} [shapes]")
    add("--mode", choices=MODES, help="train everything; or a linear layer on features computed "
        "once; or compare features by k nearest neighbours [finetune]")
    add("--model", choices=PRESETS, help="size of a model from scratch [of the data set, as in "
        "dmae.py]")
    add("--image-size", type=int, metavar="N", help="side of the images; another than the "
        "encoder's resizes its position table [the encoder's]")
    add("--patch-size", type=int, metavar="N", help="of a model from scratch [as in dmae.py]")
    add("--label-fraction", type=float, metavar="X", help="train on this share of each class, "
        "drawn by the seed; take more epochs then [1]")
    add("--holdout", type=int, metavar="N", help="test on N of the training images, taken out of "
        "training, instead of the test set: to choose settings by [none]")
    add("--keep-blocks", type=int, metavar="K", help="keep the first K pre-trained blocks, begin "
        "the others anew; 0 keeps the embedding: are lower or higher layers of use? [all]")
    add("--freeze-blocks", type=int, metavar="K", help="do not train the embedding and the first "
        "K blocks; 0 freezes the embedding [none]")
    add("--block", type=int, metavar="K", help="take the features of linear and knn after block "
        "K; MAE's are often best before the last [the last]")
    add("--pool", choices=("mean", "cls"), help="of patch tokens, or the class token [mean]")
    add("--bank", type=int, metavar="N", help="training images that k-NN looks among [all]")
    add("--recipe", choices=("imagenet", "transfer", "small"), help="AdamW with strong "
        "augmentation; SGD with crops and flips; AdamW with these [by data set]")
    add("--optimizer", choices=("adamw", "sgd"), help="sgd has Nesterov momentum 0.9 [recipe]")
    add("--epochs", type=int, metavar="N", help="passes over the labelled images [recipe]")
    add("--warmup-epochs", type=float, metavar="X", help="of linear warm-up [the recipe's share of "
        "the epochs]")
    add("--batch-size", type=int, metavar="N", help="images an update, over all processes "
        "[recipe, at most all]")
    add("--blr", type=float, metavar="X", help="the learning rate is blr * batch / 256; the first "
        "thing to tune [recipe]")
    add("--end-lr", type=float, metavar="X", help="the cosine's lowest learning rate [recipe]")
    add("--weight-decay", type=float, metavar="X", help="none on biases, norms, tokens [recipe]")
    add("--layer-decay", type=float, metavar="X", help="each block's learning rate is this times "
        "the next one's; nearer 1 for weak pre-training [recipe; 1 from scratch]")
    add("--clip", type=float, metavar="X", help="most the gradient's norm may be, 0: any [recipe]")
    add("--crop-scale", type=float, metavar="X", help="least area of a random crop [recipe]")
    add("--randaugment", type=int, metavar="M", help="magnitude, 0 (off) to 10 [recipe]")
    add("--mixup", type=float, metavar="X", help="alpha of MixUp, 0: off [recipe]")
    add("--cutmix", type=float, metavar="X", help="alpha of CutMix, 0: off; with both, either at "
        "random for each batch [recipe]")
    add("--erasing", type=float, metavar="X", help="share of images with a part erased [recipe]")
    add("--smoothing", type=float, metavar="X", help="of the labels, 0.1 say [recipe]")
    add("--eval-every", type=int, metavar="N", help="test after each N-th epoch, and the last; "
        "saves time when epochs are short [1]")
    add_machine_flags(add)
    return parser


def main(argv=None):
    """The command line; returns the result, a dictionary. Bad input: a line, exit status 2."""
    parser = make_parser()
    given, settings = vars(parser.parse_args(argv)), {}
    with one_line_errors(parser, settings):
        if "eval" in given:
            return evaluate_file(given)
        vit = resolve(given, settings)
        return finetune(settings, vit)


def resolve(given, settings):
    """Fill `settings` with a value for every flag of the mode; return the encoder. In this order:

        1. a flag that was given
        2. with --resume, what the run was started with (a flag that differs is refused)
        3. the recipe of --recipe, or the data set's with its changes; from scratch, no layer decay
        4. for --init none, the data set's row of SETS, as in dmae.py
    """
    if given.get("resume"):
        settings.update(settings_of_the_run(given, "init", DEFAULTS.keys() | {"init", "mode"}))
        check_numbers(settings)
        return open_encoder(settings)

    mode, name, init = given.get("mode", "finetune"), given.get("data", "shapes"), given.get("init")
    if init is None:
        raise InputError("--init is missing: FILE (weights of a ViT), or none (from scratch); or "
                         "--eval FILE to evaluate a fine-tuned model")
    if useless := sorted(given.keys() - COMMON - MODES[mode]):
        raise InputError(f"{flag(useless[0])} has no meaning with --mode {mode}: leave it out")
    scratch = init == "none"
    for key in ("keep_blocks", "freeze_blocks") if scratch else ("model", "patch_size"):
        if key in given:
            raise InputError(f"{flag(key)} has no meaning with --init {init}: leave it out")
    check_vacant(given, RUN_FILES, "init")

    recipe, changes = RECIPE_OF.get(name, ("imagenet", {}))
    if mode != "finetune":
        recipe, changes = mode, {}
    elif given.get("recipe", recipe) != recipe:
        recipe, changes = given["recipe"], {}
    values = RECIPES.get(recipe, {}) | changes                                 # k-NN has none
    if scratch and "layer_decay" in values:
        values["layer_decay"] = 1.0             # there is nothing learnt that it could protect
    if "epochs" in given and values:            # the warm-up keeps its share
        values["warmup_epochs"] *= given["epochs"] / values["epochs"]
    defaults = DEFAULTS | dict(mode=mode, recipe=recipe)
    if scratch:
        row = SETS.get(name, SETS["folder"])
        defaults |= dict(model=row["student"], patch_size=row["patch_size"],
                         image_size=row["image_size"])
    settings.update(defaults | values | given)
    check_numbers(settings)
    return open_encoder(settings)


def flag(key):
    return "--" + key.replace("_", "-")


def check_numbers(settings):
    """As `check` of dmae.py, and for what is new here."""
    check(settings)
    for key, low, high in (
            ("epochs", 1, 10**6), ("end_lr", 0, 10), ("layer_decay", 0, 1), ("clip", 0, 10**6),
            ("randaugment", 0, 10), ("mixup", 0, 100), ("cutmix", 0, 100), ("erasing", 0, 1),
            ("smoothing", 0, 0.99), ("eval_every", 1, 10**6), ("bank", 1, 10**9),
            ("holdout", 1, 10**9), ("image_size", 1, 4096)):
        value = settings.get(key)
        if value is not None and not low <= value <= high:                          # nor is nan
            raise InputError(f"{flag(key)} {value}: must be a number from {low} to {high}")
    if not 0 < settings["label_fraction"] <= 1:
        raise InputError(f"--label-fraction {settings['label_fraction']}: must be above 0, and at "
                         "most 1")


def open_encoder(settings):
    """The encoder to start from, at the images' size."""
    s = argparse.Namespace(**settings)
    row = SETS.get(s.data, SETS["folder"])
    torch.manual_seed(s.seed)
    if s.init == "none":
        vit = new_vit(s.model, row | settings)
        vit.description = f"{s.model}, {vit.width} wide, {vit.depth} blocks, untrained"
    else:
        vit = load_vit(s.init)
        if s.image_size is not None:
            if s.image_size % vit.config["patch_size"]:
                raise InputError(f"--image-size {s.image_size} is not a multiple of the encoder's "
                                 f"patch size {vit.config['patch_size']}")
            vit.resize_grid([s.image_size // vit.config["patch_size"]] * 2)
    check_channels(vit, s.data)
    for key in ("keep_blocks", "freeze_blocks", "block"):
        value = getattr(s, key)
        if value is not None and not 0 <= value <= vit.depth:
            raise InputError(f"{flag(key)} {value}: the encoder has blocks 1 to {vit.depth}, and 0 "
                             "stands for its embedding")
    if s.freeze_blocks is not None and s.keep_blocks is not None and (
            s.freeze_blocks > s.keep_blocks):
        raise InputError(f"--freeze-blocks {s.freeze_blocks}: only the {s.keep_blocks} blocks "
                         "that are kept can be frozen")
    return vit


def check_channels(vit, data):
    """Raise InputError unless `vit` can see these images; one of colour images can see grey."""
    channels = SETS.get(data, SETS["folder"])["channels"]
    if vit.config["channels"] not in (channels, 3):
        raise InputError(f"an encoder of grey images cannot see the colour images of {data}: "
                         "pre-train one on them")


def open_labelled(data, vit, data_dir, device, workers, seed, crop_scale=1.0):
    """Training and test source with labels, normalised and sized for `vit`, or an InputError."""
    row = dict(mean=vit.config["mean"], std=vit.config["std"], crop_scale=crop_scale)
    with first_process_first():                                                # it may download
        train, test = open_data(data, row, tuple(vit.config["image_size"]), data_dir,
                                device=device, workers=workers, seed=seed)
    if test is None or train.labels is None or test.labels is None:
        raise InputError(f"--data {data} cannot be learnt: {what_lacks(train, test)}; it needs "
                         f"images in {data}/train/CLASS/ and {data}/val/CLASS/, the same two or "
                         "more classes in both")
    return train, test


def what_lacks(train, test):
    """Why these Files have no labels, in a few words."""
    if test is None:
        return "there are no images in a folder val/"
    for source in (train, test):
        if not source.classes:
            stray = next(p for p in source.paths if Path(p).parent == source.root)
            return f"{stray} lies in no folder of a class"
    if len(train.classes) == 1:
        return "there is one class only"
    one_sided = sorted(set(train.classes) ^ set(test.classes))[0]
    return f"class {one_sided} is in one of train/ and val/ only"


def evaluate_file(given):
    """--eval: test a fine-tuned model, print and return the result. Nothing is written."""
    allowed = {"eval", "data", "data_dir", "workers", "device", "amp"}
    if useless := sorted(given.keys() - allowed):
        raise InputError(f"{flag(useless[0])} has no meaning with --eval: leave it out")
    settings = dict(data="shapes", data_dir="data", workers=min(8, os.cpu_count() or 1)) | given
    check(settings)
    s = argparse.Namespace(**settings)
    _, _, device, say = join_processes(s)
    model = load_classifier(s.eval)
    check_channels(model, s.data)
    train, test = open_labelled(s.data, model, s.data_dir, device, s.workers, seed=0)
    if len(train.classes) != model.head.out_features:
        raise InputError(f"{s.eval} tells {model.head.out_features} classes apart, {s.data} has "
                         f"{len(train.classes)}: give the data set that it was fine-tuned on")
    if model.classes not in (None, list(train.classes)):
        raise InputError(f"{s.eval} tells apart {', '.join(model.classes[:3])} and so on, not the "
                         f"classes of {s.data}: give the data set that it was fine-tuned on")
    result = dict(eval=s.eval, data=s.data, test_images=len(test))
    result |= evaluate(model.to(device), test, precision(s, device)[1], device)
    result |= dict(broken_images=len(test.broken)) if test.broken else {}
    say(json.dumps(result))
    return result


# ============================================================================================= runs


def finetune(settings, vit):
    """One run, as `resolve` set it up; fills in settings["out"] and returns the result."""
    s, began = argparse.Namespace(**settings), time.perf_counter()
    if s.mode != "finetune" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(f"--mode {s.mode} is the work of one process: start it without torchrun")
    _, world, device, say = join_processes(s)

    # Whatever can be wrong comes to light before anything is written.
    train, test = open_labelled(s.data, vit, s.data_dir, device, s.workers, s.seed,
                                settings.get("crop_scale", 1.0))
    check_outside(settings, train, test)
    next(iter(test.plain(torch.arange(min(8, len(test))))))      # unreadable: now, not in an hour
    found, classes = (len(train), len(test)), len(train.classes)
    where = f"{found[0]:,} images to train on and {found[1]:,} to test on"
    if s.holdout:
        where = f"{found[0]:,} training images, {s.holdout:,} of them held out to test on"
        train, test = hold_out(train, s.holdout)
    if s.label_fraction < 1:
        train.subset(stratified(train.labels, s.label_fraction, s.seed))
    if s.mode != "knn":
        s.batch_size = min(s.batch_size, len(train))           # with few labels, all that there are
        if s.batch_size % world:
            raise InputError(f"--batch-size {s.batch_size} does not divide among {world} processes")
        if s.mode == "linear" and s.batch_size < 2:
            raise InputError("--batch-size 1: the batch norm of a linear probe needs two images")
    if s.mode == "finetune":
        model, new = new_classifier(vit, classes, s)
    out = settings["out"] = s.out = open_folder(settings, "init", RUN_FILES)

    say(f"run {out}: {s.mode} on {s.data}, {where}, {classes} classes"
        + f", {len(train):,} used" * (s.label_fraction < 1))
    if s.data in PHOTOS and found != PHOTOS[s.data][:2]:
        say("  note      the paper has {:,} and {:,} images of these".format(*PHOTOS[s.data]))
    say(f"  loaded    {vit.description}" + ", norm not used" * (s.mode == "finetune"))
    say(f"  images    {' x '.join(map(str, vit.config['image_size']))}, {vit.config['channels']} "
        f"channels, mean {vit.config['mean']}, std {vit.config['std']}")
    if s.mode == "finetune":
        say(f"  new       {', '.join(new)}")
        if s.randaugment:
            grey = 255 * sum(vit.config["mean"]) / len(vit.config["mean"])
            train.policy = RandAugment(s.randaugment, fill=round(grey))
        further = batch_augmentation(s, classes)
        return train_classifier(model, train, test, s, device, began, further)

    vit.to(device)
    _, autocast = precision(s, device)
    say(f"  features  {s.pool} after block {vit.depth if s.block is None else s.block}")

    def features(batches):
        with autocast:
            return pooled_features(vit, batches, s.block, s.pool)

    if s.mode == "knn":
        top1 = KNN(train, test, s.bank, queries=None)(features)
        line = dict(top1=top1, minutes=(time.perf_counter() - began) / 60)
        record(out, [], line | broken_of(train, test))
        return report(s, line | broken_of(train, test), len(train))
    train, test = (Features(features(x.plain(torch.arange(len(x)))), x) for x in (train, test))
    say(f"  computed  in {(time.perf_counter() - began) / 60:.1f} minutes; "
        "new are batch norm and a linear layer")
    torch.manual_seed(s.seed)
    model = Probe(train.features.shape[1], classes)
    single_layer = argparse.Namespace(**vars(s) | dict(amp="off", compile=False))
    return train_classifier(model, train, test, single_layer, device, began)


def train_classifier(model, train, test, s, device, began, further=None):
    """The loop of fine-tuning and of the linear probe; returns the result.

    model: has `logits`. train, test: sources of images or of features. began: the clock at the
    start. further: augmentation of whole batches, as `batch_augmentation` returns it."""
    rank, world, _, say = join_processes(s)
    model.to(device)
    steps, local = len(train) // s.batch_size, s.batch_size // world
    total, warmup = s.epochs * steps, round(s.warmup_epochs * steps)
    peak, piece = s.blr * s.batch_size / 256, s.micro_batch or local
    mine = slice(rank * local, (rank + 1) * local)
    groups = layer_groups(model, getattr(s, "layer_decay", 1.0), s.weight_decay)
    options = dict(lr=peak, fused=device.type in ("cpu", "cuda"))
    optimizer = (torch.optim.AdamW(groups, betas=(0.9, 0.999), **options) if s.optimizer == "adamw"
                 else torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options))
    scaler, autocast = precision(s, device)

    say(f"  recipe    {s.recipe}: {s.optimizer}, " + ", ".join(
        f"{key.replace('_', ' ')} {getattr(s, key):g}" for key in RECIPES["imagenet"]
        if key != "optimizer" and hasattr(s, key)))
    say(f"  training  learning rate {peak:.3g}, {total} steps, {warmup} of them warm-up; "
        + on_what(s, device, world))
    for layer in sorted({group["layer"] for group in groups}):
        here = [group for group in groups if group["layer"] == layer]
        say(f"  layer {layer:<3} learning rate x {here[0]['scale']:.4f}; " + ", ".join(
            f"{sum(p.numel() for p in group['params']):,} parameters, weight decay "
            f"{group['weight_decay']:g}" for group in here))

    parts = dict(model=model, optimizer=optimizer, scaler=scaler)
    state_of = dict(images=len(train), classes=list(train.classes))
    done, log = load_checkpoint(s.out, parts, **state_of) if s.resume else (0, [])
    minutes = log[-1]["minutes"] if log else 0.0
    best = max((line["best_top1"] for line in log if "best_top1" in line), default=0.0)
    if s.resume:
        say(f"{s.out}: {done} of {s.epochs} epochs are done")
    replica = replicate(Supervised(model, s.smoothing), s, device)

    def batches(epoch):
        order = epoch_order(train, s, epoch)[:, mine]
        for images, indices in zip(train.batches(order, epoch), order):
            yield images, train.labels[indices].to(device)      # after reading: see Files._load

    def pieces(step, images, labels):
        """(images, targets). As in dmae.py, the random numbers of a step do not depend on who
        computes what, but for the partners in MixUp and CutMix."""
        generator = torch.Generator(device).manual_seed(mix(s.seed, 1, step))
        draws = train.draw(s.batch_size, generator)
        images = train.augment(images, *(x[mine] for x in draws))
        if further:
            images, labels = further(images, labels, step, rank * local)
        return zip(images.split(piece), labels.split(piece))

    def update(step, batch):
        lr = learning_rate(step, total, warmup, peak, s.end_lr)
        return train_step(replica, optimizer, scaler, lr, pieces(step, *batch), local, autocast,
                          s.clip)

    for epoch in range(done, s.epochs):
        model.train()
        means, line = run_epoch(update, batches(epoch), optimizer, epoch, steps, s,
                                first=epoch == done)
        line |= means
        if (epoch + 1) % s.eval_every == 0 or epoch + 1 == s.epochs:
            line |= evaluate(model, test, autocast, device)
            best = line["best_top1"] = max(best, line["top1"])
        line["minutes"] = minutes + (time.perf_counter() - began) / 60
        line |= broken_of(train, test)
        if rank == 0:
            record(s.out, log, line)
            save_checkpoint(s.out, parts, epoch + 1, **state_of)
            say(f"epoch {epoch + 1}/{s.epochs}: loss {line['loss']:.4f}, "
                + "".join(f"top-{k} {line[f'top{k}']:.2%}, " for k in (1, 5) if f"top{k}" in line)
                + f"{line['images_per_second']:.0f} images/s")

    if rank == 0 and isinstance(model, Classifier):
        content = dict(model={name: p.detach().cpu() for name, p in model.state_dict().items()},
                       config=model.config | dict(classes=list(train.classes)))
        write(s.out / "model.pth", lambda path: torch.save(content, path))
    if world > 1:
        dist.barrier()                                # whoever returns finds the files
    return report(s, log[-1], len(train)) if rank == 0 else {}


def broken_of(train, test):
    broken = len(train.broken) + len(test.broken)
    return dict(broken_images=broken) if broken else {}


def report(s, line, train_images):
    """Print and return the result: the settings that tell runs apart, and the last `line` of the
    log."""
    keys = ("mode", "data", "init", "seed", "label_fraction", "recipe", "epochs", "batch_size",
            "blr", "layer_decay", "keep_blocks", "freeze_blocks", "block", "bank", "holdout")
    keys += ("pool",) if s.mode != "finetune" else ()
    result = {key: getattr(s, key) for key in keys if getattr(s, key, None) is not None}
    result |= dict(train_images=train_images, out=str(s.out))
    keys = ("top1", "top5", "minutes", "broken_images")
    result |= {key: line[key] for key in keys if key in line}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
