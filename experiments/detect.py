"""Detection: Mask R-CNN on a plain pre-trained encoder, the last columns of the paper's table.

    python -m experiments.detect --init runs/0001/student.pth           # on scenes, drawn here
    python -m experiments.detect --init dmae_tiny.pth --data coco       # as the paper; not run

The pyramid of feature maps is ViTDet's (Li et al. 2022, arXiv 2203.16527), what follows is
torchvision's MaskRCNN: a proposal network (rpn) finds boxes that may hold something; for each, one
head classifies it and refines the box, another draws its mask. The log has the losses of each.
Scenes and COCO come through one loader, in the layout that COCO is published in: train2017/,
val2017/, annotations/instances_train2017.json and instances_val2017.json. AP, by pycocotools (pip
install pycocotools), is average precision, averaged over the IoU from which a detection counts: 50,
55, ... 95 % (AP50: 50 % alone). Results: DETECTION.md.
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
from torchvision import tv_tensors
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN, faster_rcnn, mask_rcnn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_convert
from torchvision.ops.poolers import initLevelMapper
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import dmae
from data import FOLDER, SETS, require, seed_of

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    from experiments.scenes import encoded, open_coco, write_scenes
except ImportError:
    COCO = None

# ============================================================================================ model


class Pyramid(nn.Module):
    """A plain ViT; from its last block four maps at strides 4 to 32, by (de)convolution or pooling,
    and a fifth at 64, all `width` channels wide. These run in `autocast`, what follows in float32:
    the eight significant bits of bfloat16 are too few for corners of boxes."""

    def __init__(self, vit, width, autocast):
        super().__init__()
        self.vit, self.out_channels, self.autocast = vit, width, autocast
        self.levels, p = nn.ModuleList(), vit.config["patch_size"]
        for stride in (4, 8, 16, 32):       # of patches of 16: enlarged twice, once, as is, pooled
            c, steps = vit.width, [nn.MaxPool2d(stride // p)] if stride > p else []
            for _ in range(int(math.log2(max(1, p / stride)))):
                steps += [LayerNorm2d(c), nn.GELU()] if steps else []
                steps.append(nn.ConvTranspose2d(c, c // 2, 2, stride=2))
                c //= 2
            self.levels.append(nn.Sequential(
                *steps, nn.Conv2d(c, width, 1, bias=False), LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False), LayerNorm2d(width)))

    def forward(self, images):
        """(b, ch, S, S), normalised -> {name: (b, width, S / stride, S / stride)}, float32."""
        with self.autocast:
            tokens = self.vit(images, tokens_of=[self.vit.depth])[0][self.vit.depth]  # b 1+n c
            x = tokens[:, 1:].mT.unflatten(2, self.vit.grid)                          # b c gh gw
            maps = [level(x).float() for level in self.levels]
        return {str(i): x for i, x in enumerate([*maps, F.max_pool2d(maps[-1], 1, 2)])}


class Detector(MaskRCNN):
    """Mask R-CNN on a `Pyramid`, with heads of its width. Anchors, the boxes refined to proposals,
    have sides of `anchor` pixels on the finest map, and of twice as many on each coarser one."""

    def __init__(self, vit, classes, width, anchor, autocast, **options):
        side = vit.config["image_size"][0]
        super().__init__(
            Pyramid(vit, width, autocast), min_size=side, max_size=side, size_divisible=side,
            image_mean=vit.config["mean"], image_std=vit.config["std"],
            rpn_anchor_generator=AnchorGenerator(
                [(anchor * 2 ** i,) for i in range(5)], [(0.5, 1.0, 2.0)] * 5),
            box_head=faster_rcnn.TwoMLPHead(width * 7 ** 2, 4 * width),
            box_predictor=faster_rcnn.FastRCNNPredictor(4 * width, 1 + classes),
            mask_head=mask_rcnn.MaskRCNNHeads(width, [width] * 4, 1),
            mask_predictor=mask_rcnn.MaskRCNNPredictor(width, width, 1 + classes), **options)
        # torchvision would guess these by the first image, wrongly from one that is padded.
        for pool in (self.roi_heads.box_roi_pool, self.roi_heads.mask_roi_pool):
            pool.scales, pool.map_levels = [1 / 4, 1 / 8, 1 / 16, 1 / 32], initLevelMapper(2, 5)

    def forward(self, images, targets=None):
        """images: [(3, height, width) in 0 to 1]; targets: [{"boxes", "labels", "masks"}]. Returns
        {"loss": ..., and its terms} in training, else [{"boxes", "labels", "scores", "masks"}], in
        pixels of the image."""
        device = self.backbone.vit.cls_token.device
        targets = targets and [{name: target[name].to(device) for name in (
            "boxes", "labels", "masks")} for target in targets]
        found = super().forward([image.to(device) for image in images], targets)
        return {"loss": sum(found.values())} | found if self.training else found


# ======================================================================================= evaluation


@torch.no_grad()
def detect(model, data, workers=0):
    """Detections in all images, in the format of COCO's result files."""
    model.eval()
    results = []
    for batch in DataLoader(data, 16, num_workers=workers, collate_fn=list):
        for (_, target), found in zip(batch, model([image for image, _ in batch]), strict=True):
            boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
            codes = map(encoded, (found["masks"][:, 0] > 0.5).cpu())
            results += [dict(image_id=target["image_id"], category_id=label, bbox=box, score=score,
                             segmentation=code) for label, score, box, code in zip(
                        found["labels"].tolist(), found["scores"].tolist(), boxes, codes)]
    return results


def average_precision(truth, results):
    """{"box_ap", "box_ap50", "mask_ap", "mask_ap50"} in percent. truth: a COCO."""
    found, truth = {}, copy.deepcopy(truth)                   # COCOeval writes into its annotations
    with contextlib.redirect_stdout(io.StringIO()):
        detections = truth.loadRes(results) if results else COCO()
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            judge = COCOeval(truth, detections, kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
            found |= {f"{name}_ap": 100 * float(judge.stats[0]),
                      f"{name}_ap50": 100 * float(judge.stats[1])}
    return found


COLOURS = "red lime blue yellow magenta cyan orange purple white black".split()      # of classes


@torch.no_grad()
def draw(model, data, out):
    """detection_1.png to detection_4.png: left the truth, right what is found with scores from
    0.5."""
    model.eval()
    for i, (image, target) in zip(range(4), data):
        found, panels = model([image])[0], []
        found = {name: x[found["scores"] >= 0.5].cpu() for name, x in found.items()}
        for x in (target, found | dict(masks=found["masks"][:, 0] > 0.5)):
            size = math.ceil(384 / max(image.shape))                        # of a pixel, enlarged
            panels.append(F.interpolate(image[None], scale_factor=size)[0])
            if len(x.get("labels", ())):
                masks = F.interpolate(x["masks"][None].float(), scale_factor=size)[0] > 0
                names = [data.classes[label - 1] for label in x["labels"].tolist()]
                colours = [COLOURS[label % len(COLOURS)] for label in x["labels"].tolist()]
                panels[-1] = draw_segmentation_masks(panels[-1], masks, 0.5, colours)
                panels[-1] = draw_bounding_boxes(panels[-1], x["boxes"] * size, names, colours)
        TF.to_pil_image(torch.cat(panels, dim=2)).save(out / f"detection_{i + 1}.png")


# ============================================================================================= runs

RECIPES = {
    "scenes": dict(                                                   # sized for two CPU cores
        epochs=3, batch_size=16, blr=1.6e-2, jitter=(0.75, 1.33), image_size=64, patch_size=4,
        model="slim", width=32, anchor=8, options=dict(
            rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=64,
            box_batch_size_per_image=32, box_detections_per_img=20)),
    "coco": dict(    # the authors', not run; heads, padding, boxes that a crop cuts: torchvision's
        epochs=100, batch_size=64, blr=4e-4, jitter=(0.1, 2.0), image_size=640, patch_size=16,
        model="tiny", width=256, anchor=32, options={}),
}
FLAGS = {
    "init": (None, "FILE", "weights of a ViT, x.pth or x.pth:3 to give its heads; none: scratch"),
    "data": ("scenes", "DIR", "a folder in COCO's layout; scenes are drawn, into --data-dir"),
    "train_images": (None, (int, 1, 10**9), "use only so many, the same ones for every seed [all]"),
    "image_size": (None, (int, 64, 4096), "the longer side is brought to it [recipe]"),
    "epochs": (None, (int, 1, 10**6), "over the training images [recipe]"),
    "batch_size": (None, (int, 1, 10**9), "images an update [recipe]"),
    "blr": (None, (float, 0, 1e9), "the learning rate is blr * batch / 256 [recipe]"),
} | dmae.MACHINE_FLAGS
del FLAGS["micro_batch"], FLAGS["compile"]


def defaults_for(given):
    require("init" in given, "--init is missing: FILE (weights of a ViT), or none (from scratch)")
    row = RECIPES["scenes" if given.get("data", "scenes") == "scenes" else "coco"]
    return row | dict(compile=False)


def learning_rate(step, total, peak):
    """Warm-up over 250 steps, at most a tenth of all; a tenth of the peak from 24/27 of all steps
    on, a hundredth from 26/27 on."""
    return peak * min(1, (step + 1) / max(1, min(250, total // 10))) * 0.1 ** sum(
        step >= part * total / 27 for part in (24, 26))


def open_encoder(s):
    """The encoder of --init, its position table resized to the images and trained."""
    torch.manual_seed(s.seed)
    row = SETS["shapes"] if s.data == "scenes" else FOLDER
    vit = (dmae.new_vit(s.model, argparse.Namespace(**row | vars(s))) if s.init == "none"
           else dmae.load_vit(s.init))
    p = vit.config["patch_size"]
    require(32 % p == 0, f"--init {s.init}: patches of {p} pixels, not a power of two up to 32")
    require(vit.config["channels"] == 3, f"--init {s.init} is for grey images: take another")
    require(s.image_size % 64 == 0, f"--image-size {s.image_size}: take a multiple of 64")
    dmae.resize_grid(vit, [s.image_size // p] * 2)
    vit.pos_embed.requires_grad_(True)
    return vit


def train(s):
    """One run; its folder gets pictures, too, and the model is in checkpoint.pth. AP is measured
    after each epoch, or after several where these are short: six images are trained on for each
    that is tested on. Returns the last line of the log."""
    began, run = time.perf_counter(), dmae.Run(s, "init")
    require(run.world == 1, "detection takes one process")
    vit, root, side = open_encoder(s), s.data, s.image_size
    if s.data == "scenes":
        root = Path(s.data_dir, "scenes")
        write_scenes(root, "train", 4000, seed=0)
        write_scenes(root, "val", 500, seed=1)
    mean = {tv_tensors.Image: vit.config["mean"], "others": 0}         # what is beyond the image
    data = open_coco(
        root, "train", v2.RandomHorizontalFlip(), v2.ScaleJitter((side, side), s.jitter),
        v2.RandomCrop(side, fill=mean, pad_if_needed=True), v2.SanitizeBoundingBoxes())
    test = open_coco(root, "val")
    run.sources = data, test
    require(data.classes == test.classes, f"--data {root}: train and val differ in categories")
    require((s.train_images or 0) <= len(data), f"--train-images: there are only {len(data)}")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    data.ids[:] = [data.ids[i] for i in order[:s.train_images].sort().values]
    model = Detector(vit, len(data.classes), s.width, s.anchor, run.autocast, **s.options)
    model.to(run.device)
    steps, _, _ = run.divide(len(data))
    run.open_folder()
    optimizer = torch.optim.AdamW(dmae.parameter_groups(model, 0.05))
    run.parts = dict(model=model, optimizer=optimizer, scaler=run.scaler)
    done, total = run.load_checkpoint(data), s.epochs * steps
    before, peak = run.log[-1]["minutes"] if run.log else 0, s.blr * s.batch_size / 256
    workers = s.workers if run.device.type == "cuda" else 0      # a CPU's cores are busy with steps
    run.say(f"run {run.out}: {s.init} on {len(data):,} images of {s.data}, {len(test):,} to test "
            f"on, {len(data.classes)} categories; {total} steps")
    tested = range(s.epochs, 0, -math.ceil(6 * len(test) / len(data)))
    for epoch in range(done, s.epochs):
        model.train()
        torch.manual_seed(seed_of(s.seed, epoch))          # of crops, and of boxes to learn from
        meter = dmae.Meter(run, epoch, steps)
        for i, batch in enumerate(DataLoader(
                data, batch_sampler=dmae.epoch_order(len(data), s, epoch).tolist(),
                num_workers=workers, collate_fn=list)):
            lr = learning_rate(epoch * steps + i, total, peak)
            pieces = [list(zip(*batch))]                       # one: (images, targets)
            meter.add(dmae.train_step(model, optimizer, run.scaler, lr, pieces, len(batch),
                                      contextlib.nullcontext()))             # Pyramid has its own
        line = meter.line(optimizer)
        if epoch + 1 in tested:
            line |= average_precision(test.coco, detect(model, test, workers))
        run.record(line | dict(minutes=before + (time.perf_counter() - began) / 60))
        run.save_checkpoint(data)
    draw(model, test, run.out)
    run.say(f"{run.out}: detection_1.png to detection_4.png, left the truth, right what is found")
    return run.log[-1]


def main(argv=None):
    """The command line; returns the last line of the log. Bad input: a line, exit status 2."""
    with dmae.command_line("experiments.detect", FLAGS, argv) as given:
        require(COCO, "detection needs pip install pycocotools")
        return train(dmae.settings_of(given, FLAGS, "init", defaults_for))


if __name__ == "__main__":
    main()
