"""What a pre-trained encoder is worth: fine-tuning, a linear probe, k-NN.

    python finetune.py --init runs/0001/student.pth --label-fraction 0.01    # on drawn images
    python finetune.py --init runs/x/student.pth --data /path/to/imagenet    # the paper's
    python finetune.py --eval runs/pets/model.pth --data pets

The last line printed is the result, as JSON: top-1 and top-5 on the whole test set after the last
epoch. New here are the classifier, layer-wise learning rates and recipes; the rest is dmae.py's.
"""

import json
import math
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

import dmae
from data import FOLDER, PHOTOS, SETS, require, seed_of, seeded, write

# The paper's two recipes. The help of the flag with a value's name explains it.
IMAGENET = dict(
    optimizer="adamw", epochs=300, warmup_epochs=5, batch_size=1024, blr=1e-3, end_lr=1e-6,
    weight_decay=0.05, layer_decay=0.85, clip=0.0, crop_scale=0.08, randaugment=10, mixup=0.2,
    cutmix=0.0, erasing=0.0, smoothing=0.0)
TRANSFER = IMAGENET | dict(             # defaults of the authors' code, except for CIFAR below
    optimizer="sgd", epochs=300, warmup_epochs=20, batch_size=512, blr=0.015, weight_decay=0.0,
    layer_decay=0.75, clip=1.0, randaugment=0, mixup=0.0)
RECIPES = {
    "imagenet": IMAGENET,
    "transfer": TRANSFER,
    "cifar": TRANSFER | dict(epochs=50, warmup_epochs=10, blr=0.05),
    "small": IMAGENET | dict(                                              # ours, for small sets
        epochs=3, warmup_epochs=0.5, batch_size=128, blr=4e-3, crop_scale=0.5, randaugment=0,
        mixup=0.0),
    "linear": dict(epochs=100, warmup_epochs=10, batch_size=512, blr=0.3, weight_decay=0.0),
    "knn": {},
}
RECIPE_OF = dict.fromkeys(PHOTOS, "transfer") | {          # a folder gets ImageNet's
    "cifar100": "cifar", "cifar10": "cifar", "fashion-mnist": "small", "shapes": "small"}

# ======================================================================================= classifier


class Classifier(dmae.ViT):
    """Mean of the last block's patch tokens -> fc_norm -> head. The class token is not used, the
    encoder's final norm is dropped, the position table is trained (paper, appendix). Parameter
    names and initialisation (truncated normals, std 0.02) are those of timm's VisionTransformer
    with global_pool="avg", except for the class token, which today's timm starts near 0."""

    def __init__(self, classes, **config):
        super().__init__(**config)
        self.norm = nn.Identity()
        self.fc_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.head = nn.Linear(self.width, classes)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.patch_embed["proj"].reset_parameters()
        for table in (self.cls_token, self.pos_embed.requires_grad_(True)):
            nn.init.trunc_normal_(table, std=0.02)

    def logits(self, images):
        """(b, channels, height, width), normalised -> (b, classes)."""
        x = self(images, tokens_of=[self.depth])[0][self.depth]                       # b 1+n c
        return self.head(self.fc_norm(x[:, 1:].mean(dim=1)))


class Supervised(nn.Module):
    """A classifier's loss. targets: labels (b,) int64, or class probabilities (b, classes)."""

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
    """Parameter groups of layer-wise learning rates: the further from the head, the smaller the
    `scale` of a group. Biases, norms, class token and positions are not decayed."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            layer = layer_of(name, model.depth)
            decayed = p.ndim > 1 and name not in ("cls_token", "pos_embed")
            group = groups.setdefault((layer, decayed), dict(
                params=[], scale=layer_decay ** (model.depth + 1 - layer),
                weight_decay=weight_decay if decayed else 0.0))
            group["params"].append(p)
    return list(groups.values())


def new_classifier(vit, classes, s):
    """A classifier initialised from `vit`. Drawn from the seed: its head; its fc_norm, if the file
    has none; with --keep-blocks K, all after the first K blocks; with --init none, everything.
    --freeze-blocks K excludes the first K blocks, and the embedding before them, from training."""
    torch.manual_seed(s.seed)
    model = Classifier(classes, **vit.config)
    whole = model.depth + bool(vit.others)             # a classifier's file also fills fc_norm
    kept = -1 if s.init == "none" else whole if s.keep_blocks is None else s.keep_blocks
    given = {name.replace("norm.", "fc_norm."): tensor for name, tensor in vit.state_dict().items()}
    model.load_state_dict(model.state_dict() | {
        name: tensor for name, tensor in given.items() if layer_of(name, model.depth) <= kept})
    for name, p in model.named_parameters():
        p.requires_grad_(s.freeze_blocks is None or layer_of(name, model.depth) > s.freeze_blocks)
    return model


def load_classifier(path):
    """A fine-tuned model from a file: ours, or any that `load_vit` reads and that has fc_norm and
    head. `classes` of the result: their names, or None. Raises InputError for other files."""
    vit, config = dmae.load_vit(path), dmae.read_weights(dmae.split_heads(path)[0]).get("config")
    head = {n: vit.others[n] for n in ("head.weight", "head.bias") if n in vit.others}
    require(len(head) == 2 and head["head.weight"].shape[1:] == (vit.width,), f"{path} holds no "
            "classifier (fc_norm and head): give the model.pth of a fine-tuning run")
    model = Classifier(len(head["head.weight"]), **vit.config)
    encoder = {name.replace("norm.", "fc_norm."): p for name, p in vit.state_dict().items()}
    model.load_state_dict(encoder | head)
    model.classes = config.get("classes") if isinstance(config, dict) else None
    return model


# ===================================================================================== augmentation


def rand_augment(magnitude, fill):
    """Two operations on a uint8 image (c, h, w), each done with probability 1/2.

    The nearest in torchvision to timm's rand-m10-mstd0.5-inc1: `magnitude` runs to 10, for rotation
    30 degrees (torchvision's own magnitudes run to 30). Uncovered corners get the colour `fill`."""
    operation = v2.RandAugment(num_ops=1, magnitude=magnitude, num_magnitude_bins=11, fill=fill,
                               interpolation=InterpolationMode.BILINEAR)
    return v2.Compose([v2.RandomApply([operation], p=0.5)] * 2)


def batch_augmentation(s, classes):
    """What follows crop, flip and RandAugment: f(images, labels, step, first) -> images, targets.

    first: index in the whole batch of this process's first image. RandomErasing draws anew for each
    image; MixUp or CutMix, one draw for a batch, mixes only the images within a process."""
    erase = v2.RandomErasing(p=s.erasing, value="random")
    mixers = [kind(alpha=alpha, num_classes=classes)
              for kind, alpha in ((v2.MixUp, s.mixup), (v2.CutMix, s.cutmix)) if alpha > 0]

    def augment(images, labels, step, first):
        if s.erasing:
            images = torch.stack([seeded(seed_of(s.seed, 4, step, first + i), erase, image)
                                  for i, image in enumerate(images)])
        if mixers:
            images, labels = seeded(
                seed_of(s.seed, 5, step), v2.RandomChoice(mixers), images, labels)
        return images, labels

    return augment


def stratified(labels, fraction, seed):
    """Indices of a `fraction` of each class, at least one image of each, sorted."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed_of(seed, 6)))
    classes = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([x[:max(1, round(fraction * len(x)))] for x in classes]).sort().values


# ===================================================================================== command line

# As FLAGS of dmae.py. [recipe]: from RECIPES, by data set and mode.
FLAGS = {
    "init": (None, "FILE", "weights of a ViT, x.pth or x.pth:3 to give its heads; none: scratch"),
    "eval": (None, "FILE", "only evaluate a fine-tuned model.pth"),
    "data": ("shapes", "DIR|NAME", f"folder of train/CLASS/ and val/CLASS/, or {', '.join(SETS)}"),
    "mode": ("finetune", ("finetune", "linear", "knn"), "trains all, a linear layer, or nothing"),
    "model": (None, tuple(dmae.PRESETS), "size of a model from scratch [as in dmae.py]"),
    "image_size": (None, dmae.sides, "side of the images, or HEIGHT,WIDTH [the encoder's]"),
    "patch_size": (None, (int, 1, 4096), "of a model from scratch [as in dmae.py]"),
    "label_fraction": (1.0, (float, 1e-9, 1), "train on this share of each class, by the seed"),
    "keep_blocks": (None, (int, 0, 1000), "use the first K blocks, reinitialise the others [all]"),
    "freeze_blocks": (None, (int, 0, 1000), "do not train the embedding and the first K blocks"),
    "block": (None, (int, 0, 1000), "linear and knn take the tokens after block K [the last]"),
    "pool": ("mean", ("mean", "cls"), "of patch tokens, or the class token"),
    "bank": (None, (int, 1, 10**9), "training images that k-NN searches [all]"),
    "recipe": (None, ("imagenet", "transfer", "cifar", "small"), "row of RECIPES [by data set]"),
    "optimizer": (None, ("adamw", "sgd"), "sgd has Nesterov momentum 0.9 [recipe]"),
    "epochs": (None, (int, 1, 10**6), "more for fewer labels [recipe]"),
    "warmup_epochs": (None, (float, 0, 10**6), "linear [the recipe's share of the epochs]"),
    "batch_size": (None, (int, 1, 10**9), "images per update, at most all there are [recipe]"),
    "blr": (None, (float, 0, 1e9), "learning rate x 256 / batch; the first to tune [recipe]"),
    "end_lr": (None, (float, 0, 10), "the cosine's lowest learning rate [recipe]"),
    "weight_decay": (None, (float, 0, 1e3), "none on biases, norms, tokens [recipe]"),
    "layer_decay": (None, (float, 0, 1), "a block's rate is this times the next one's [recipe]"),
    "clip": (None, (float, 0, 10**6), "largest gradient norm allowed, 0: no clipping [recipe]"),
    "crop_scale": (None, (float, 1e-3, 1), "least area of a random crop [recipe]"),
    "randaugment": (None, (int, 0, 10), "magnitude, 0 is off [recipe]"),
    "mixup": (None, (float, 0, 100), "alpha, 0 is off [recipe]"),
    "cutmix": (None, (float, 0, 100), "alpha; if MixUp is on, one is drawn per batch [recipe]"),
    "erasing": (None, (float, 0, 1), "share of images with a part erased [recipe]"),
    "smoothing": (None, (float, 0, 0.99), "label smoothing, e.g. 0.1 [recipe]"),
} | dmae.MACHINE_FLAGS
EVAL_FLAGS = {"eval", "data", "data_dir", "workers", "device", "amp"}
MODE_FLAGS = {                                         # flags that apply in some modes only
    "finetune": {*RECIPES["imagenet"], "recipe", "keep_blocks", "freeze_blocks",
                 "micro_batch", "compile"},
    "linear": {*RECIPES["linear"], "block", "pool"},
    "knn": {"block", "pool", "bank"},
}


def main(argv=None):
    """The command line; returns the result, a dictionary. Bad input: a line, exit status 2."""
    with dmae.command_line("finetune.py", FLAGS, argv) as given:
        s = dmae.settings_of(given, FLAGS, "init", defaults_for)
        return evaluate_file(s) if s.eval else finetune(s) if s.mode == "finetune" else probe(s)


def defaults_for(given):
    """What suits the data set and the mode: a recipe; from scratch, a model as in dmae.py."""
    mode, name = given.get("mode", "finetune"), given.get("data", "shapes")
    require(given.keys() & {"init", "eval"}, "--init is missing: FILE (weights of a ViT), or none "
            "(from scratch); or --eval FILE to evaluate a fine-tuned model")
    scratch = given.get("init") == "none"
    useless = set().union(*MODE_FLAGS.values()) - MODE_FLAGS[mode]
    useless |= {"keep_blocks", "freeze_blocks"} if scratch else {"model", "patch_size"}
    useless = given.keys() - EVAL_FLAGS if "eval" in given else given.keys() & useless
    where = "--eval" if "eval" in given else f"--mode {mode} and --init {given['init']}"
    require(not useless, f"--{min(useless, default='').replace('_', '-')} has no meaning with "
            f"{where}: leave it out")
    recipe = given.get("recipe", RECIPE_OF.get(name, "imagenet")) if mode == "finetune" else mode
    values = RECIPES[recipe] | dict(recipe=recipe)
    if scratch:                       # there is nothing learnt that layer decay could protect
        model = dmae.RECIPES.get(name, dmae.RECIPES["folder"])["student"]
        values = SETS.get(name, FOLDER) | values | dict(layer_decay=1.0, model=model)
    whole = values.get("epochs", 1)
    if recipe == "small":                      # about as many steps with fewer labels
        values["epochs"] = min(100, round(whole / given.get("label_fraction", 1)))
    if "epochs" in values:                     # the warm-up keeps its share
        values["warmup_epochs"] *= given.get("epochs", values["epochs"]) / whole
    return values


def open_encoder(s):
    """The encoder to start from, at the images' size."""
    if s.init == "none":
        torch.manual_seed(s.seed)
        vit = dmae.new_vit(s.model, s)
        vit.description = f"{s.model}, {vit.width} wide, {vit.depth} blocks, untrained"
        vit.others = {}
    else:
        vit = dmae.load_vit(s.init)
        sides, p = s.image_size or vit.config["image_size"], vit.config["patch_size"]
        require(not any(side % p for side in sides), f"--image-size: no multiple of patch size {p}")
        dmae.resize_grid(vit, [side // p for side in sides])
    for name in ("keep_blocks", "freeze_blocks", "block"):
        require((getattr(s, name) or 0) <= vit.depth, f"--{name.replace('_', '-')} "
                f"{getattr(s, name)}: the encoder has blocks 1 to {vit.depth}, 0 is its embedding")
    require(s.keep_blocks is None or (s.freeze_blocks or 0) <= s.keep_blocks, f"--freeze-blocks "
            f"{s.freeze_blocks}: only the {s.keep_blocks} blocks that are kept can be frozen")
    return vit


def open_labelled(run, vit):
    """Training and test source with labels, normalised and sized for `vit`, or an InputError."""
    name, config = run.s.data, vit.config
    require(config["channels"] in (SETS.get(name, FOLDER)["channels"], 3), "an encoder of "
            f"grey images cannot see the colour images of {name}: pre-train one on them")
    row = dict(mean=config["mean"], std=config["std"], crop_scale=run.s.crop_scale or 1.0)
    train, test = run.open_data(row, config["image_size"])
    train.bicubic = 1.0
    require(test is not None and train.labels is not None and test.labels is not None, f"--data "
            f"{name} cannot be learnt: it needs images in {name}/train/CLASS/ and "
            f"{name}/val/CLASS/, of the same two or more classes, and no others")
    return train, test


# ============================================================================================= runs


@torch.no_grad()
def evaluate(classifier, test, run):
    """Top-1, top-5 and cross-entropy on the whole test set; several processes share the work."""
    classifier.eval()
    sums = torch.zeros(3, device=run.device)         # mps has no float64; counts are exact even so
    for images, labels in test.plain(torch.arange(len(test))[run.rank::run.world]):
        with run.autocast:
            logits = classifier.logits(images).float()
        best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([best[:, 0].sum(), best.sum(), loss])
    if run.world > 1:
        dist.all_reduce(sums)
    return {name: x / len(test) for name, x in zip(("top1", "top5", "test_loss"), sums.tolist())}


def evaluate_file(s):
    """--eval: test a fine-tuned model, print and return the result. Nothing is written."""
    run, model = dmae.Run(s, None), load_classifier(s.eval)
    train, test = open_labelled(run, model)
    classes, here = model.head.out_features, list(train.classes)
    require(classes == len(here) and model.classes in (None, here), f"{s.eval} tells {classes} "
            f"classes apart, not those of {s.data}")
    result = evaluate(model.to(run.device), test, run) | dict(
        eval=s.eval, data=s.data, test_images=len(test))
    run.say(json.dumps(result))
    return result


def report(run, train, line):
    """Print and return the result: the settings that tell runs apart, and the last line."""
    keys = ("mode", "data", "init", "model", "seed", "label_fraction", "recipe", "epochs",
            "batch_size", "blr", "layer_decay", "keep_blocks", "freeze_blocks", "block", "pool",
            "bank", "out")
    result = {key: getattr(run.s, key) for key in keys if getattr(run.s, key) is not None}
    result |= {"train_images": len(train)} | {
        key: line[key] for key in ("top1", "top5", "minutes", "broken_images") if key in line}
    run.say(json.dumps(result))
    return result


def begin(s):
    """(run, encoder, training source, test source). All checks of the input are made in here."""
    run = dmae.Run(s, "init")
    vit = open_encoder(s)
    train, test = open_labelled(run, vit)
    next(test.plain(torch.arange(min(8, len(test)))))       # if unreadable, fail now, not later
    require(run.world == 1 or s.mode == "finetune", f"--mode {s.mode} takes one process")
    if s.label_fraction < 1:
        train.subset(stratified(train.labels, s.label_fraction, s.seed))
    if s.batch_size:
        s.batch_size = min(s.batch_size, len(train))               # with few labels, all there are
        require(s.mode != "linear" or s.batch_size > 1, "--mode linear needs batches of 2 or more")
        run.divide(len(train))
    run.open_folder()
    run.say(f"run {run.out}: {s.mode} on {s.data}, {len(train):,} images to train on, "
            f"{len(test):,} to test on, {len(train.classes)} classes\nloaded: {vit.description}\n"
            + ", ".join(f"{key} {getattr(s, key)}" for key in ("recipe", *RECIPES[s.recipe])))
    return run, vit, train, test


def finetune(s):
    """Train a classifier, all of it or what --freeze-blocks leaves; returns the result."""
    began = time.perf_counter()
    run, vit, train, test = begin(s)
    steps, local, share = run.divide(len(train))
    classes = list(train.classes)
    model = new_classifier(vit, len(classes), s).to(run.device)
    total, warmup = s.epochs * steps, round(s.warmup_epochs * steps)
    peak = s.blr * s.batch_size / 256
    groups = layer_groups(model, s.layer_decay, s.weight_decay)
    options = dict(lr=peak, fused=run.device.type in ("cpu", "cuda"))
    optimizer = (torch.optim.AdamW(groups, betas=(0.9, 0.999), **options) if s.optimizer == "adamw"
                 else torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options))
    run.say(f"{total} steps, {warmup} of warm-up, learning rate {peak:.3g}, by layer x "
            + " ".join(f"{x:.3g}" for x in sorted({group["scale"] for group in groups})))
    if s.randaugment:
        grey = round(255 * sum(vit.config["mean"]) / len(vit.config["mean"]))
        train.policy = rand_augment(s.randaugment, fill=grey)
    mix = batch_augmentation(s, len(classes))
    run.parts = dict(model=model, optimizer=optimizer, scaler=run.scaler)
    done = run.load_checkpoint(train)
    before = run.log[-1]["minutes"] if run.log else 0.0

    replica = run.replicate(Supervised(model, s.smoothing))
    tested = range(s.epochs, 0, -math.ceil(3 * len(test) / len(train)))      # a tenth of the time
    for epoch in range(done, s.epochs):
        model.train()
        meter = dmae.Meter(run, epoch, steps)
        order = dmae.epoch_order(len(train), s, epoch)[:, share]
        for i, (images, labels) in enumerate(train.batches(order, epoch)):
            # As in dmae.py, the random numbers of a step do not depend on which process computes
            # what, except that MixUp and CutMix find their partners within a process.
            step = epoch * steps + i
            generator = torch.Generator(run.device).manual_seed(seed_of(s.seed, 1, step))
            draws = train.draw(s.batch_size, generator)
            images = train.augment(images, *(draw[share] for draw in draws))
            images, targets = mix(images, labels, step, first=share.start)
            pieces = zip(*(x.split(s.micro_batch or local) for x in (images, targets)))
            lr = dmae.learning_rate(step, total, warmup, peak, s.end_lr)
            meter.add(dmae.train_step(replica, optimizer, run.scaler, lr, pieces, local,
                                      run.autocast, s.clip))
        line = meter.line(optimizer)
        if epoch + 1 in tested:
            line |= evaluate(model, test, run)
        run.record(line | dict(minutes=before + (time.perf_counter() - began) / 60))
        run.save_checkpoint(train)

    content = dict(config=model.config | dict(classes=classes), model={
        name: p.detach().cpu() for name, p in model.state_dict().items()})
    if run.rank == 0:
        write(run.out / "model.pth", lambda path: torch.save(content, path))
    return report(run, train, run.log[-1])


def probe(s):
    """--mode knn and linear, on features computed once, without crops or flips."""
    began = time.perf_counter()
    run, vit, train, test = begin(s)
    features = partial(dmae.pooled_features, vit.to(run.device), block=s.block, pool=s.pool)
    if s.mode == "knn":
        line = dmae.nearest_neighbours(run, train, test, s.bank, None, top1=features)
    else:
        line = linear_probe(s, *(dmae.features_of(run, source, torch.arange(len(source)), features)
                                 for source in (train, test)))
    run.record(line | dict(minutes=(time.perf_counter() - began) / 60))
    return report(run, train, run.log[-1])


def linear_probe(s, train, test):
    """{"top1", "top5"} of a linear layer behind a batch norm without parameters.

    train, test: features (N, c) and labels (N,) int64."""
    (x, y), (test_x, test_y) = train, test
    torch.manual_seed(s.seed)
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    model = nn.Sequential(nn.BatchNorm1d(x.shape[1], affine=False), head).to(x.device)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True,
                                weight_decay=s.weight_decay)
    steps, peak = len(x) // s.batch_size, s.blr * s.batch_size / 256
    for epoch in range(s.epochs):
        for i, ids in enumerate(dmae.epoch_order(len(x), s, epoch)):
            step = epoch * steps + i
            optimizer.param_groups[0]["lr"] = dmae.learning_rate(
                step, s.epochs * steps, round(s.warmup_epochs * steps), peak)
            optimizer.zero_grad()
            F.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    with torch.no_grad():
        best = model.eval()(test_x).topk(min(5, head.out_features)).indices == test_y[:, None]
    return dict(top1=best[:, 0].float().mean().item(), top5=best.any(1).float().mean().item())


if __name__ == "__main__":
    main()
