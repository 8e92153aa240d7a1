"""Detection: Mask R-CNN on a plain pre-trained encoder, the last columns of the paper's table.

    python -m experiments.detect --init runs/0001/student.pth          # on scenes, drawn here
    python -m experiments.detect --init dmae_tiny.pth --data coco      # the paper's; not run here

Pyramid, heads and losses are ViTDet's (Li et al. 2022, arXiv 2203.16527) by torchvision's MaskRCNN.
Scenes and COCO come through one loader, in the layout that COCO is published in: train2017/,
val2017/, annotations/instances_train2017.json and instances_val2017.json. AP is pycocotools'
(pip install pycocotools).
"""

import argparse
import contextlib
import copy
import io
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, tv_tensors
from torchvision.models import detection
from torchvision.models.convnext import LayerNorm2d
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import dmae
from data import SETS, InputError, require, seed_of

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from experiments.scenes import encoded, write_scenes
except ImportError:
    COCO = None

# ============================================================================================ model


class Pyramid(nn.Module):
    """A plain ViT, and four maps of its last block at strides 4, 8, 16 and 32 by (de)convolutions;
    a fifth, for the largest boxes, is half of the last. All are `width` wide. The ViT and they run
    in `autocast`; what follows does not: corners of boxes do not fit into eight bits."""

    def __init__(self, vit, width, autocast):
        super().__init__()
        self.vit, self.out_channels, self.autocast = vit, width, autocast
        self.scales, p = nn.ModuleList(), vit.config["patch_size"]
        require(p in (1, 2, 4, 8, 16, 32), f"patches of {p} pixels: take 1, 2, 4, 8, 16 or 32")
        for stride in (4, 8, 16, 32):
            c, steps = vit.width, [nn.MaxPool2d(stride // p)] if stride > p else []
            for _ in range(int(math.log2(max(1, p / stride)))):
                steps += [LayerNorm2d(c), nn.GELU()] if steps else []
                steps.append(nn.ConvTranspose2d(c, c // 2, 2, stride=2))
                c //= 2
            self.scales.append(nn.Sequential(
                *steps, nn.Conv2d(c, width, 1, bias=False), LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)))

    def forward(self, images):
        """(b, ch, S, S), normalised -> {name: (b, width, S / stride, S / stride)}, float32."""
        with self.autocast:
            tokens = self.vit(images, tokens_of=[self.vit.depth])[0][self.vit.depth]  # b 1+n c
            x = tokens[:, 1:].mT.unflatten(2, self.vit.grid)                          # b c gh gw
            maps = [scale(x).float() for scale in self.scales]
        return {str(i): x for i, x in enumerate([*maps, F.max_pool2d(maps[-1], 1, 2)])}


class Detector(detection.MaskRCNN):
    """Mask R-CNN on a `Pyramid`, its heads as wide. On the finest map boxes are proposed around
    those of `anchor` pixels, on each next one around boxes twice as large."""

    def __init__(self, vit, outputs, width, anchor, autocast, **options):
        side, boxes, masks = vit.config["image_size"][0], detection.faster_rcnn, detection.mask_rcnn
        super().__init__(
            Pyramid(vit, width, autocast), min_size=side, max_size=side, size_divisible=side,
            image_mean=vit.config["mean"], image_std=vit.config["std"],
            rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(
                [(anchor * 2 ** i,) for i in range(5)], [(0.5, 1.0, 2.0)] * 5),
            box_head=boxes.TwoMLPHead(width * 7 ** 2, 4 * width),
            box_predictor=boxes.FastRCNNPredictor(4 * width, outputs),
            mask_head=masks.MaskRCNNHeads(width, [width] * 4, 1),
            mask_predictor=masks.MaskRCNNPredictor(width, width, outputs), **options)

    def forward(self, images, targets=None):
        """images: (3, height, width) in 0 to 1 each; targets: {"boxes", "labels", "masks"} each. In
        training {"loss": ..., and its terms}, else {"boxes", "labels", "scores", "masks"} each, in
        pixels of the image."""
        device = self.backbone.vit.cls_token.device
        targets = targets and [{name: target[name].to(device) for name in (
            "boxes", "labels", "masks")} for target in targets]
        found = super().forward([image.to(device) for image in images], targets)
        return {"loss": sum(found.values())} | found if self.training else found


# =========================================================================================== images


def open_coco(root, split, *transforms):
    """Pairs of an image and its target from a folder in COCO's layout; of "train", without crowds,
    those with something on them."""
    folder, file = Path(root, f"{split}2017"), Path(root, f"annotations/instances_{split}2017.json")
    transforms = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), *transforms]
    try:
        with contextlib.redirect_stdout(io.StringIO()):                     # it reports its timings
            data = datasets.CocoDetection(str(folder), str(file), transforms=v2.Compose(transforms))
        if split == "train":
            single = {i: [x for x in found if not x["iscrowd"]]
                      for i, found in data.coco.imgToAnns.items()}
            data.coco.imgToAnns = {i: found for i, found in single.items() if found}
            data.ids = sorted(data.coco.imgToAnns)
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise InputError(f"--data {root}: {file} is not there, or not as COCO has it") from error
    require(data.ids and min(data.coco.cats) > 0, f"--data {root}: {file} has nothing on its "
            "images, or a category 0, which is the ground here")
    data.classes, data.broken = sorted(data.coco.cats), []               # as the core's sets have
    return datasets.wrap_dataset_for_transforms_v2(
        data, target_keys=("image_id", "boxes", "labels", "masks"))


# ======================================================================================= evaluation


@torch.no_grad()
def detect(model, data):
    """What the model finds on all images, as COCO's files of results have it."""
    model.eval()
    results = []
    for batch in DataLoader(data, 16, collate_fn=list):
        for (_, target), found in zip(batch, model([image for image, _ in batch]), strict=True):
            boxes = TF.convert_bounding_box_format(found["boxes"].cpu(), "xyxy", "xywh").tolist()
            codes = map(encoded, found["masks"][:, 0].cpu() > 0.5)
            results += [dict(image_id=target["image_id"], category_id=label, bbox=box, score=score,
                             segmentation=code) for label, score, box, code in zip(
                        found["labels"].tolist(), found["scores"].tolist(), boxes, codes)]
    return results


def average_precision(truth, results):
    """{"box_ap", "box_ap50", "mask_ap", "mask_ap50"} in percent. truth: a COCO."""
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            truth = copy.deepcopy(truth)                      # COCOeval writes into its annotations
            judge = COCOeval(truth, truth.loadRes(results) if results else COCO(), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            found |= {f"{name}_ap": 100 * float(judge.stats[0]),
                      f"{name}_ap50": 100 * float(judge.stats[1])}
    return found


@torch.no_grad()
def draw(model, data, out):
    """detection_1.png to detection_4.png: the truth of an image; what is found, if rather sure."""
    model.eval()
    for i, (image, target) in zip(range(4), data):
        found, panels = model([image])[0], []
        found = {name: x[found["scores"] >= 0.5].cpu() for name, x in found.items()}
        for x in (target, found | dict(masks=found["masks"][:, 0] > 0.5)):
            scale = math.ceil(384 / max(image.shape))
            panels.append(F.interpolate(image[None], scale_factor=scale)[0])
            if len(x.get("labels", ())):
                masks = F.interpolate(x["masks"][None].float(), scale_factor=scale)[0] > 0
                names = [data.coco.cats[label]["name"] for label in x["labels"].tolist()]
                panels[-1] = draw_bounding_boxes(draw_segmentation_masks(
                    panels[-1], masks, alpha=0.4), x["boxes"] * scale, names)
        TF.to_pil_image(torch.cat(panels, dim=2)).save(out / f"detection_{i + 1}.png")


# ============================================================================================= runs

RECIPES = {
    "scenes": dict(                                                   # sized for two CPU cores
        epochs=3, batch_size=16, lr=1e-3, jitter=(0.75, 1.33), image_size=64, patch_size=4,
        model="slim", width=32, anchor=8, options=dict(
            rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64,
            box_batch_size_per_image=64, box_detections_per_img=20)),
    "coco": dict(                                                     # the authors'
        epochs=100, batch_size=64, lr=1e-4, jitter=(0.1, 2.0), image_size=640, patch_size=16,
        model="tiny", width=256, anchor=32, options={}),
}
FLAGS = {
    "init": (None, "FILE", "weights of a ViT, x.pth or x.pth:3 to give its heads; none: scratch"),
    "data": ("scenes", "DIR", "a folder in COCO's layout; scenes are drawn, into --data-dir"),
    "train_images": (None, (int, 1, 10**9), "take the first N [all]"),
    "image_size": (None, (int, 32, 10**5), "the longer side is brought to it [recipe]"),
    "epochs": (None, (int, 1, 10**6), "over the training images [recipe]"),
    "batch_size": (None, (int, 1, 10**9), "images an update [recipe]"),
    "lr": (None, (float, 0, 1e9), "learning rate [recipe]"),
} | {name: dmae.MACHINE_FLAGS[name] for name in dmae.MACHINE_FLAGS.keys() - {
    "micro_batch", "compile"}}                      # the losses read numbers: nothing to compile


def defaults_for(given):
    require("init" in given, "--init is missing: FILE (weights of a ViT), or none (from scratch)")
    row = RECIPES["scenes" if given.get("data", "scenes") == "scenes" else "coco"]
    return row | dict(compile=False)


def learning_rate(step, total, peak):
    """Warm-up over 250 steps, at most a tenth of all; a tenth from 24/27 and again from 26/27."""
    return peak * min(1, (step + 1) / max(1, min(250, total // 10))) * 0.1 ** sum(
        step >= part * total / 27 for part in (24, 26))


def new_detector(s, outputs, autocast):
    """A detector on the encoder of --init; its own weights depend on the seed alone."""
    torch.manual_seed(s.seed)
    vit = (dmae.new_vit(s.model, argparse.Namespace(**SETS["shapes"] | vars(s)))
           if s.init == "none" else dmae.load_vit(s.init))
    p = vit.config["patch_size"]
    require(vit.config["channels"] == 3, f"--init {s.init} sees grey images alone")
    require(s.image_size % 32 == 0 == s.image_size % p, f"--image-size {s.image_size}: no multiple "
            f"of 32 and of the patches' side, {p}")
    dmae.resize_grid(vit, [s.image_size // p] * 2).pos_embed.requires_grad_(True)
    return Detector(vit, outputs, s.width, s.anchor, autocast, **s.options)


def train(s):
    """One run, with pictures of what it finds in its folder; returns the last line of its log."""
    began, run = time.perf_counter(), dmae.Run(s, "init")
    require(run.world == 1, "detection takes one process")
    root, side = Path(s.data_dir, "scenes") if s.data == "scenes" else s.data, s.image_size
    if s.data == "scenes":
        write_scenes(root, "train", 4000, seed=0)
        write_scenes(root, "val", 500, seed=1)
    grey = {tv_tensors.Image: 0.5, "others": 0}                        # what is beyond the image
    data = open_coco(
        root, "train", v2.RandomHorizontalFlip(), v2.ScaleJitter((side, side), s.jitter),
        v2.RandomCrop(side, fill=grey, pad_if_needed=True), v2.SanitizeBoundingBoxes())
    data.ids[s.train_images or len(data):] = []
    run.sources = _, test = data, open_coco(root, "val")
    model = new_detector(s, 1 + max(data.classes), run.autocast).to(run.device)
    steps, _, _ = run.divide(len(data))
    run.open_folder()
    optimizer = torch.optim.AdamW(dmae.parameter_groups(model, 0.05), lr=s.lr)
    run.parts = dict(model=model, optimizer=optimizer, scaler=run.scaler)
    done, total = run.load_checkpoint(data), s.epochs * steps
    before = run.log[-1]["minutes"] if run.log else 0
    run.say(f"run {run.out}: {s.init} on {len(data):,} images of {s.data}, {len(test):,} to test "
            f"on, {len(data.classes)} categories; {total} steps")
    tested = range(s.epochs, 0, -math.ceil(3 * len(test) / len(data)))
    for epoch in range(done, s.epochs):
        model.train()
        torch.manual_seed(seed_of(s.seed, epoch))          # of crops, and of boxes to learn from
        meter = dmae.Meter(run, epoch, steps)
        for i, batch in enumerate(DataLoader(
                data, batch_sampler=dmae.epoch_order(len(data), s, epoch).tolist(),
                num_workers=s.workers if run.device.type == "cuda" else 0, collate_fn=list)):
            lr = learning_rate(epoch * steps + i, total, s.lr)
            meter.add(dmae.train_step(model, optimizer, run.scaler, lr, [list(zip(*batch))],
                                      len(batch), contextlib.nullcontext()))
        line = meter.line(optimizer)
        if epoch + 1 in tested:
            line |= average_precision(test.coco, detect(model, test))
        run.record(line | dict(minutes=before + (time.perf_counter() - began) / 60))
        run.save_checkpoint(data)
    draw(model, test, run.out)
    return run.log[-1]


def main(argv=None):
    """The command line; returns the last line of the log. Bad input: a line, exit status 2."""
    with dmae.command_line("experiments.detect", FLAGS, argv) as given:
        require(COCO, "detection needs pip install pycocotools")
        return train(dmae.settings_of(given, FLAGS, "init", defaults_for))


if __name__ == "__main__":
    main()
