"""The other ways to pre-train that the paper compares: SimMIM, MoCo-v3, DINO, supervised.

    python -m experiments.rivals simmim --data fashion-mnist
    python finetune.py --init runs/0001/student.pth --data fashion-mnist

Each is a class below: an encoder and what its loss needs. `inputs(views, labels, generator)` makes
what `forward` takes, which returns the losses by name. Network, images, crops, recipes, runs and
k-NN are dmae.py's; views, weight decay and head are the method's, sized by us for images of 32
pixels. Unlike the papers: AdamW's beta2 (0.95), milder crops, no blur, hue or solarisation; for
DINO no small crops, gradient clipping or warm-up of the teacher's temperature.

Letters as in dmae.py; e prototypes or width of an embedding, v views.
"""

import copy
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torchvision.transforms.v2 import functional as TF

import dmae
from data import SmallSet, require, seed_of, write


def mlp(*widths, activation=nn.GELU, batch_norm=False):
    """Linear layers, an activation between them; batch_norm: a norm after each, the last without
    weights."""
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:]), start=2):
        layers.append(nn.Linear(a, b, bias=not batch_norm))
        layers += [nn.BatchNorm1d(b, affine=i < len(widths))] if batch_norm else []
        layers.append(activation())
    return nn.Sequential(*layers[:-1])


@torch.no_grad()
def follow(average, model, rate, done):
    """Moves `average` towards the model, an exponential moving average: average * momentum + model
    * (1 - momentum). The momentum rises from 1 - rate to 1. done: share of the steps completed."""
    momentum = 1 - rate * (1 + math.cos(math.pi * done)) / 2
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - momentum)


def jitter(images, generator, grey=0.2):
    """Brightness, contrast and, of colour images, saturation, by a factor from 0.6 to 1.4 each, and
    sometimes grey: one draw an image. uint8 or float in 0 to 1, (b, ch, height, width)."""
    factors = 0.6 + 0.8 * torch.rand(len(images), 3, generator=generator)
    kinds = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation][:images.shape[1]]
    lost = torch.rand(len(images), generator=generator) < grey
    out = []
    for image, numbers, no_colour in zip(images, factors.tolist(), lost.tolist(), strict=True):
        for kind, factor in zip(kinds, numbers):
            image = kind(image, factor)
        out.append(TF.rgb_to_grayscale(image, 3) if no_colour and len(image) > 1 else image)
    return torch.stack(out)


# ========================================================================================== methods


class SimMIM(nn.Module):
    """L = mean over hidden pixels of |prediction - pixels| (Xie et al. 2022, arXiv 2111.09886).

    Hidden patches are replaced by mask tokens in the encoder's input and pass through it; the head
    is one linear layer. 60 % of the squares of 2 x 2 patches are hidden."""

    def __init__(self, vit, classes):
        super().__init__()
        self.encoder, width = vit, vit.width
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(width, vit.config["patch_size"] ** 2 * vit.config["channels"])
        require(all(side % 2 == 0 for side in vit.grid) and math.prod(vit.grid) > 4, "simmim hides "
                f"patches two by two: not of a grid of {vit.grid[0]} x {vit.grid[1]}")

    def inputs(self, views, labels, generator):
        rows, columns = (side // 2 for side in self.encoder.grid)
        noise = torch.rand(len(views[0]), rows * columns, generator=generator)
        mask = noise.argsort(dim=1).argsort(dim=1) < round(0.6 * rows * columns)          # b n/4
        mask = mask.view(-1, rows, columns).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return views[0], mask.flatten(1).to(views[0].device)                              # b n

    def forward(self, images, mask):
        x = self.encoder.embed(images)                                                    # b 1+n c
        tokens = self.mask_token + self.encoder.pos_embed[:, 1:]                          # 1 n c
        patches = torch.where(mask[..., None], tokens, x[:, 1:])                          # b n c
        x = torch.cat([x[:, :1], patches], dim=1)                                         # b 1+n c
        for block in self.encoder.blocks:
            x, _ = block(x)                                                               # b 1+n c
        prediction = self.head(self.encoder.norm(x)[:, 1:]).float()                   # b n (p p ch)
        error = (prediction - self.encoder.patchify(images)).abs().mean(dim=-1)           # b n
        return {"loss": (error * mask).sum() / mask.sum()}


class MoCoV3(nn.Module):
    """L = 2 T (CE(q1 k2 / T) + CE(q2 k1 / T)) (Chen et al. 2021, arXiv 2104.02057).

    q: predictor(projector(class token)) of a view; k: projector(class token) of the other view, by
    moving averages of encoder and projector. The positive k of a q is that of the same image."""

    temperature = 0.2

    def __init__(self, vit, classes):
        super().__init__()
        self.encoder = vit
        self.projector = mlp(vit.width, 512, 512, 128, activation=nn.ReLU, batch_norm=True)
        self.predictor = mlp(128, 512, 128, activation=nn.ReLU, batch_norm=True)
        self.average = copy.deepcopy(nn.ModuleList([vit, self.projector])).requires_grad_(False)

    def inputs(self, views, labels, generator):
        return torch.stack(views, dim=1), labels

    def forward(self, views, labels):
        x = rearrange(views, "b v ch h w -> (v b) ch h w")
        q = self.predictor(self.projector(self.encoder.encode(x)[:, 0]))                  # v*b e
        with torch.no_grad():
            vit, projector = self.average
            keys = projector(vit.encode(x)[:, 0])                                         # v*b e
        (q1, q2), (k1, k2) = q.float().chunk(2), keys.float().chunk(2)                    # b e each
        return {"loss": self.contrast(q1, k2) + self.contrast(q2, k1)}

    def contrast(self, q, keys):
        scores = F.normalize(q, dim=1) @ F.normalize(keys, dim=1).T / self.temperature    # b b
        positives = torch.arange(len(q), device=q.device)
        return 2 * self.temperature * F.cross_entropy(scores, positives)

    def after_step(self, done):
        follow(self.average, nn.ModuleList([self.encoder, self.projector]), 0.01, done)


class DINO(nn.Module):
    """L = H(P_t(x1), P_s(x2)) / 2 + H(P_t(x2), P_s(x1)) / 2 (Caron et al. 2021, arXiv 2104.14294).

    P: softmax over e prototypes, scored by a head on the class token; the teacher t is a moving
    average of the student, centred (minus its running mean), sharpened (at a lower temperature)."""

    student_temperature, teacher_temperature = 0.1, 0.04

    def __init__(self, vit, classes, prototypes=1024):
        super().__init__()
        self.encoder, self.neck = vit, mlp(vit.width, 512, 512, 128)
        self.prototypes = nn.utils.parametrizations.weight_norm(
            nn.Linear(128, prototypes, bias=False))
        self.prototypes.parametrizations.weight.original0.data.fill_(1)
        self.prototypes.parametrizations.weight.original0.requires_grad_(False)
        self.average = copy.deepcopy(self.parts()).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(1, prototypes))

    def parts(self):
        return nn.ModuleList([self.encoder, self.neck, self.prototypes])

    inputs = MoCoV3.inputs

    @staticmethod
    def scores(parts, images):
        vit, neck, prototypes = parts
        return prototypes(F.normalize(neck(vit.encode(images)[:, 0]), dim=1)).float()     # b e

    def forward(self, views, labels):
        x = rearrange(views, "b v ch h w -> (v b) ch h w")
        student = self.scores(self.parts(), x)                                            # v*b e
        with torch.no_grad():
            teacher = self.scores(self.average, x)                                        # v*b e
        loss = self.cross_entropy(student, teacher)
        self.centre.lerp_(teacher.mean(dim=0, keepdim=True), 0.1)
        return {"loss": loss}

    def cross_entropy(self, student, teacher):
        """Each view's distribution against the other view's: (v*b, e) both, v = 2."""
        targets = ((teacher - self.centre) / self.teacher_temperature).softmax(dim=1)
        first, second = targets.chunk(2)                                                  # b e each
        logs = (student / self.student_temperature).log_softmax(dim=1)                    # v*b e
        return -(torch.cat([second, first]) * logs).sum(dim=1).mean()

    def after_step(self, done):
        follow(self.average, self.parts(), 0.004, done)


class Supervised(nn.Module):
    """L = cross-entropy of a linear layer on the mean patch token; the layer is thrown away."""

    def __init__(self, vit, classes):
        super().__init__()
        self.encoder, self.head = vit, nn.Linear(vit.width, classes)

    def inputs(self, views, labels, generator):
        return views[0], labels

    def forward(self, images, labels):
        logits = self.head(self.encoder.encode(images)[:, 1:].mean(dim=1)).float()     # b classes
        return {"loss": F.cross_entropy(logits, labels)}


# name: (class, how many views of an image, weight decay at the start and at the end).
METHODS = {"simmim": (SimMIM, 1, (0.05, 0.05)), "mocov3": (MoCoV3, 2, (0.1, 0.1)),
           "dino": (DINO, 2, (0.04, 0.4)), "supervised": (Supervised, 1, (0.05, 0.05))}

# ============================================================================================= runs

OWN = ("data", "train_images", "student", "image_size", "patch_size", "crop_scale", "epochs",
       "warmup_epochs", "batch_size", "blr")
FLAGS = {name: dmae.FLAGS[name] for name in OWN} | dmae.MACHINE_FLAGS
del FLAGS["micro_batch"]                    # batch norm and contrast are over the whole batch


def pretrain(method, s):
    """One run; leaves config, log, checkpoint and, at the end, student.pth with the encoder alone;
    returns its folder."""
    run = dmae.Run(s, "teacher")
    require(run.world == 1, "rivals take one process")
    require(s.batch_size > 1, "--batch-size must be 2 or more: images are contrasted")
    torch.manual_seed(s.seed)
    vit, (kind, count, decay) = dmae.new_vit(s.student, s), METHODS[method]
    train, test = run.open_data(vars(s), vit.config["image_size"], s.train_images)
    require(count == 1 or isinstance(train, SmallSet), f"{method} contrasts two crops of an image, "
            "and of files one is read: name a small set")
    require(method != "supervised" or train.labels is not None, "supervised needs classes")
    steps, _, _ = run.divide(len(train))
    model = kind(vit, len(train.classes)).to(run.device)
    replica = run.replicate(model)
    run.open_folder()
    total, warmup = s.epochs * steps, round(s.warmup_epochs * steps)
    peak = s.blr * s.batch_size / 256
    optimizer = torch.optim.AdamW(dmae.parameter_groups(model, decay[0]), lr=peak,
                                  betas=(0.9, 0.95))
    run.parts = dict(model=model, optimizer=optimizer, scaler=run.scaler)
    done = run.load_checkpoint(train)
    run.say(f"run {run.out}: {method}, {s.student} on {len(train):,} images of {s.data}; {total} "
            f"steps, learning rate {peak:.3g}")
    knn = partial(dmae.nearest_neighbours, run, train, test,
                  knn=partial(dmae.pooled_features, vit))
    if not run.log:
        run.record(dict(epoch=0, step=0) | knn())
    measured = range(s.epochs, 0, -math.ceil(60_000 / len(train)))
    for epoch in range(done, s.epochs):
        meter = dmae.Meter(run, epoch, steps)
        order = dmae.epoch_order(len(train), s, epoch)
        for i, (images, labels) in enumerate(train.batches(order, epoch)):
            step = epoch * steps + i
            generator = torch.Generator().manual_seed(seed_of(s.seed, 1, step))
            views = [train.augment(jitter(images, generator) if count > 1 else images,
                                   *train.draw(len(images), torch.Generator(run.device).manual_seed(
                                       seed_of(s.seed, 2, step, view)))) for view in range(count)]
            pieces = [model.inputs(views, labels, generator)]
            optimizer.param_groups[0]["weight_decay"] = decay[1] + (
                decay[0] - decay[1]) * (1 + math.cos(math.pi * step / total)) / 2
            lr = dmae.learning_rate(step, total, warmup, peak)
            meter.add(dmae.train_step(replica, optimizer, run.scaler, lr, pieces, len(images),
                                      run.autocast))
            if hasattr(model, "after_step"):
                model.after_step((step + 1) / total)
        run.record(meter.line(optimizer) | (knn() if epoch + 1 in measured else {}))
        run.save_checkpoint(train)
    content = dict(model={n: p.cpu() for n, p in vit.state_dict().items()}, config=vit.config)
    write(run.out / "student.pth", lambda path: torch.save(content, path))
    return run.out


def main(argv=None):
    """The command line; returns the run's folder. Bad input: a line on stderr, exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    method, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    with dmae.command_line("experiments.rivals METHOD", FLAGS, argv) as given:
        require(method in METHODS, f"name a method first: {', '.join(METHODS)}")
        s = dmae.settings_of(given, FLAGS, "teacher", lambda given: dict(
            dmae.defaults_for(given | dict(teacher="none")), teacher="none", method=method))
        require(getattr(s, "method", None) == method, f"--resume {s.out}: not a run of {method}")
        return pretrain(method, s)


if __name__ == "__main__":
    main()
