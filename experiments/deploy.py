"""A trained file as a program that runs without this project: how large, how fast, how exact.

    pip install onnx onnxscript onnxruntime
    python -m experiments.deploy runs/0002/model.pth --out deployed --data shapes

Writes model.pt2 (torch.export), model.onnx and model_int8.onnx (weights in 8 bits), each for any
number of images, and a line of JSON for each: size, time for one image on one thread, difference
from the original, and with --data the accuracy on its test images. An encoder gives features (b, 1
+ n, c), all tokens after the final norm; a fine-tuned classifier logits (b, classes). Images are
normalised as the file's config says.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import dmae
import finetune
from data import FOLDER, SETS, InputError, open_data, require

FLAGS = {
    "data": (None, "DIR|NAME", "images to test a classifier on"),
    "data_dir": ("data", "DIR", "where named sets lie, or are downloaded to"),
    "steps": (30, (int, 1, 10**6), "images to time, one by one; the median counts"),
    "out": ("deployed", "DIR", "where the programs are written"),
}


NAMES = ["model.pt2", "model.onnx", "model_int8.onnx"]


class Program(nn.Module):
    """A method of a module, images (b, ch, height, width) -> tensor, as a module of its own."""

    def __init__(self, method):
        super().__init__()
        self.model, self.forward = method.__self__, method


def export(method, images, out):
    """Write the three files into `out`; returns {name: how to call it, images -> outputs}."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    out.mkdir(parents=True, exist_ok=True)
    program, batch = Program(method).eval(), {"images": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(program, (images,), dynamic_shapes=batch),
                      out / "model.pt2")
    torch.onnx.export(program, (images,), out / "model.onnx", dynamo=True, dynamic_shapes=batch,
                      external_data=False, verbose=False)
    # Seven of the eight bits: with all, sums of two products overflow on CPUs without VNNI.
    quantize_dynamic(out / "model.onnx", out / "model_int8.onnx", reduce_range=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1

    def runtime(name):
        session = onnxruntime.InferenceSession(out / name, options)
        entry, = session.get_inputs()
        return lambda x: torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0])

    return {"model.pt2": torch.export.load(out / "model.pt2").module(),
            **{name: runtime(name) for name in NAMES[1:]}}


def milliseconds(call, image, steps):
    """The median time of a call on one thread, after three to warm up."""
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(steps + 3):
        began = time.perf_counter()
        call(image)
        times.append(1000 * (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return statistics.median(times[3:])


@torch.no_grad()
def deploy(file, s):
    vit = dmae.load_vit(file)
    model = finetune.load_classifier(file) if "head.weight" in vit.others else vit
    method, config, out = getattr(model, "logits", model.encode), vit.config, Path(s.out)
    held = [name for name in NAMES if (out / name).exists()]
    require(not held, f"--out {out} holds {', '.join(held)}: name another folder")
    require(not s.data or model is not vit, f"--data: {file} is an encoder, without classes")
    test = None
    if s.data:
        _, test = open_data(s.data, dict(config, crop_scale=1.0), config["image_size"], s.data_dir)
        channels = SETS.get(s.data, FOLDER)["channels"]
        require(test is not None and test.labels is not None and len(test.classes) ==
                model.head.out_features and (model.classes or test.classes) == list(test.classes)
                and channels <= config["channels"], f"--data {s.data} has not the classes, or not "
                f"the colours, that {file} tells apart")
    images = torch.randn(4, config["channels"], *config["image_size"],
                         generator=torch.Generator().manual_seed(0))
    try:
        programs = export(method, images, out)
    except ImportError as error:
        raise InputError(f"{error}: pip install onnx onnxscript onnxruntime") from error
    lines = []
    for name, call in {Path(file).name: method, **programs}.items():
        path, expected = (Path(file) if call is method else out / name), method(images)
        lines.append(dict(
            file=name, megabytes=round(path.stat().st_size / 1e6, 2),
            milliseconds=round(milliseconds(call, images[:1], s.steps), 2),
            difference=float((call(images) - expected).norm() / expected.norm())))
        if test is not None:
            right = [(call(x).argmax(dim=1) == y).float() for x, y in
                     test.plain(torch.arange(len(test)))]
            lines[-1]["top1"] = torch.cat(right).mean().item()
        print(json.dumps(lines[-1]), flush=True)
    return lines


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    file, argv = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    with dmae.command_line("experiments.deploy FILE", FLAGS, argv) as given:
        require(file, "a file of an encoder or of a classifier is missing: name it first")
        settings = {name: flag[0] for name, flag in FLAGS.items()} | given
        return deploy(file, argparse.Namespace(**settings))


if __name__ == "__main__":
    main()
