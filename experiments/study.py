"""Which pre-training suits a small ViT? The paper's comparison at small scale, with error bars.

    python -m experiments.study                                  # everything: days of one core
    python -m experiments.study --rows mae,dmae --columns knn,linear,1% --seeds 0,1,2
    python -m experiments.study --report                         # tables and figure of our lines

A cell is one command: a data set, a way to pre-train (row), a seed, and what is measured (column;
`pretrain` is the pre-training itself). It runs once, adds a line to --results, and is identified by
its command, in which each run that it starts from is named by a hash of that run's command. So only
a row whose flags change is measured anew. Stop whenever you like: the same command continues.
Several may run side by side if no two need the same run, so run first the teachers, and seed 0 of
`supervised` and `dino`, which serve as teachers, too.

All students have the same network and see 120,000 images of the set, except where MAE is given the
time of another row. Seeds of different rows share their order of images and their labels, so
differences are taken seed by seed. Learning rates were chosen on Fashion-MNIST by `held-out`: half
the epochs (MAE: all) of pre-training, then a linear probe tested on images neither was trained on.
"""

import argparse
import hashlib
import itertools
import json
import math
import re
import shutil
import statistics
import time
from functools import partial
from pathlib import Path

import torch

import dmae
import finetune
from data import InputError, require
from experiments import analyze, detect, first_run, rivals

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "study.jsonl"

# ================================================================================= what is compared

# How each method is started, and its flags, unless a row has its own; the learning rates are what
# `held-out` chose on Fashion-MNIST. @NAME is the student.pth of row NAME, of seed 0, {…} from DATA.
METHODS = {
    "supervised": ("-m experiments.rivals supervised", {"--blr": "6e-3"}),
    "simmim": ("-m experiments.rivals simmim", {"--blr": "6e-3"}),
    "mocov3": ("-m experiments.rivals mocov3", {"--blr": "1.5e-3"}),
    "dino": ("-m experiments.rivals dino", {"--blr": "2.4e-2"}),
    "mae": ("dmae.py --teacher none", {"--blr": "1.5e-3"}),
    "dmae": ("dmae.py", {"--blr": "2.4e-2", "--teacher": "{teacher}"}),
}
# For each data set: `epochs` that make 120,000 images; `half` for searches; MAE's in the `time` of
# D-MAE, or as `long` as D-MAE plus its teacher, by speeds measured side by side on Fashion-MNIST;
# training images, and how many of them are held out; the teacher.
DATA = {
    "fashion-mnist": dict(epochs=2, half=1, time=3, long=47, train=60_000, held=5_000,
                          teacher="@teacher"),
    "shapes": dict(epochs=6, half=3, time=9, long=230, train=20_000, held=2_000,
                   teacher="weights/shapes_teacher.pth"),
}
# The rows: what the table says, the method, flags that come before those from DATA.
ROWS = {
    "scratch": ("none (scratch)", None, ""),
    "supervised": ("supervised", "supervised", ""),
    "simmim": ("SimMIM", "simmim", ""),
    "mocov3": ("MoCo-v3", "mocov3", ""),
    "dino": ("DINO", "dino", ""),
    "mae": ("MAE", "mae", ""),
    "mae-rate": ("MAE, at D-MAE's learning rate", "mae", f"--blr {METHODS['dmae'][1]['--blr']}"),
    "mae-time": ("MAE, for the time of D-MAE", "mae", "--epochs {time}"),
    "mae-long": ("MAE, for the time of D-MAE and teacher", "mae", "--epochs {long}"),
    "mae-long-rate": ("MAE, for the time of both, at 6e-3", "mae", "--epochs {long} --blr 6e-3"),
    "dmae": ("D-MAE", "dmae", ""),
    "untrained": ("D-MAE, untrained teacher", "dmae", "--teacher @untrained-teacher"),
}
# On Fashion-MNIST alone: what is distilled, and from whom. Put DINOv2's ViT-S/14 into weights/.
VARIANTS = {
    "lower": ("D-MAE, block 3", "dmae", "--layers 3:3"),
    "probs": ("D-MAE, after the softmax (alpha 100)", "dmae", "--match probs --alpha 100"),
    "hidden": ("D-MAE, hidden states", "dmae", "--match hidden"),
    "d2": ("D²-MAE", "dmae", "--decoupled"),
    "no-mixer": ("D-MAE, without M", "dmae", "--no-mixer"),
    "from-supervised": ("D-MAE, supervised teacher", "dmae", "--teacher @supervised"),
    "from-dino": ("D-MAE, DINO teacher", "dmae", "--teacher @dino"),
    "from-dinov2": ("D-MAE, DINOv2 teacher (alpha 0.1)", "dmae",
                    "--teacher weights/dinov2.safetensors --alpha 0.1"),
}
TEACHERS = {
    "teacher": ("teacher", "mae", "--student mini --epochs 24 --blr 3e-3"),
    "untrained-teacher": ("untrained teacher", "mae", "--student mini --epochs 0"),
}
# The same small search for every method, and one for DINOv2, whose scores are ten times an MAE's:
# flag, rows, values to choose from, each in the place of the row's own, by `held-out` with seed 0
# after `half` the epochs; of MAE, the baseline, after all of them.
SEARCHES = [("--blr", METHODS, ("1.5e-3", "6e-3", "2.4e-2")),
            ("--alpha", ["from-dinov2"], ("0.01", "0.1", "1"))]
SEARCH = {f"{row}@{value}": (f"{title}, {flag[2:]} {value}", method, (
              f"{flags.partition(f' {flag}')[0]} {flag} {value} --epochs {length} --train-images "
              "{unseen}").strip())
          for flag, rows, values in SEARCHES for row in rows for value in values
          for length in ["{epochs}" if row == "mae" else "{half}"]
          for title, method, flags in [(ROWS | VARIANTS)[row]]}
ALL_ROWS = ROWS | VARIANTS | TEACHERS | SEARCH

# The tables: title, data sets, rows, columns; of a column: heading, program with flags, the key of
# its result that counts. {start} is the student (for columns tuned-…, the model that column `all`
# leaves), {rival} the supervised network of another seed.
FEW = "finetune.py --init {start} --label-fraction 0.01"
ALL = "finetune.py --init {start} --epochs 1"
SCENES = "-m experiments.detect --init {start} --data scenes"
INSIDE, TUNED = "-m experiments.analyze {start} {rival}", "-m experiments.analyze {start}"
TOP1 = {
    "knn": ("k-NN", "finetune.py --init {start} --mode knn --bank 10000", "top1"),
    "linear": ("linear", "finetune.py --init {start} --mode linear", "top1"),
    "1%": ("1 % labels", FEW, "top1"),
    "all": ("all labels", ALL, "top1")}
TRANSFER = {
    f"transfer-{x}": (f"{TOP1[x][0]}, Fashion-MNIST", f"{TOP1[x][1]} --data fashion-mnist", "top1")
    for x in ("linear", "1%")}
TABLES = {
    "top-1 in percent": (["fashion-mnist"], ROWS | VARIANTS, TOP1),
    "top-1 in percent, here and on Fashion-MNIST": (["shapes"], ROWS, TOP1 | TRANSFER),
    "of the class token, top-1 in percent": (["shapes"], ["mocov3", "dino"], {
        f"cls-{x}": (TOP1[x][0], f"{TOP1[x][1]} --pool cls", "top1") for x in ("knn", "linear")}),
    "lower blocks kept, the others reinitialised, top-1 in percent": (
        DATA, ["supervised", "mae", "dmae"], {
            "1%-keep-2": ("1 % labels, 2 blocks", f"{FEW} --keep-blocks 2", "top1"),
            "1%-keep-4": ("1 % labels, 4 blocks", f"{FEW} --keep-blocks 4", "top1"),
            "all-keep-2": ("all labels, 2 blocks", f"{ALL} --keep-blocks 2", "top1"),
            "all-keep-4": ("all labels, 4 blocks", f"{ALL} --keep-blocks 4", "top1")}),
    "inside: attention distance in pixels, CKA with a supervised network in percent": (
        DATA, list(ROWS)[1:], {
            "distance-1-3": ("distance, blocks 1 to 3", INSIDE, "lower_distance"),
            "distance-4-6": ("blocks 4 to 6", INSIDE, "higher_distance"),
            "cka-1-3": ("CKA, blocks 1 to 3", INSIDE, "lower_cka"),
            "cka-4-6": ("blocks 4 to 6", INSIDE, "higher_cka")}),
    "inside, fine-tuned with all labels: attention distance in pixels": (DATA, ROWS, {
        "tuned-distance-1-3": ("blocks 1 to 3", TUNED, "lower_distance"),
        "tuned-distance-4-6": ("blocks 4 to 6", TUNED, "higher_distance")}),
    "detection, AP in percent": (["shapes"], ["scratch", "mae", "mae-long-rate", "dmae"], {
        "boxes-200": ("boxes, 200 scenes", f"{SCENES} --train-images 200 --epochs 60", "box_ap"),
        "masks-200": ("masks, 200 scenes", f"{SCENES} --train-images 200 --epochs 60", "mask_ap"),
        "boxes": ("boxes, all scenes", SCENES, "box_ap"),
        "masks": ("masks, all scenes", SCENES, "mask_ap")}),
}
# `pretrain`, whose flags are of the row, and `held-out` are in tables of their own.
COLUMNS = {"pretrain": ("minutes", "", "minutes"), "held-out": TOP1["linear"]} | {
    name: column for _, _, columns in TABLES.values() for name, column in columns.items()}
KEPT = {key for _, _, key in COLUMNS.values()} | {"box_ap50", "mask_ap50"}          # of a result

# The paper's results with ViT-Tiny: fine-tuned on Pets and on Flowers.
PAPER = {"scratch": (26.1, 30.2), "supervised": (93.1, 96.4), "simmim": (68.9, 77.2),
         "mocov3": (87.8, 94.8), "dino": (89.3, 95.6), "mae": (76.5, 85.8), "dmae": (89.1, 95.2)}

LEFT_BY = {}                # {file: the cell whose run leaves it}, of all that commands start from


def command(data, row, seed, column):
    """A cell's command line without --out and --data-dir. This text identifies the cell."""
    if column == "pretrain":
        _, method, flags = ALL_ROWS[row]
        setting = DATA[data] | dict(unseen=DATA[data]["train"] - DATA[data]["held"])
        start, own = METHODS[method]
        own = {"--epochs": "{epochs}", "--batch-size": 128} | own
        own = " ".join(f"{name} {own[name]}" for name in own if name not in flags.split())
        text = f"{start} {own} {flags}".strip().format(**setting)
    else:
        start = student(data, row, seed, "all" if column.startswith("tuned") else "pretrain")
        rival = student(data, "supervised", (seed + 1) % 3)
        text = COLUMNS[column][1].format(start=start, rival=rival)
    text = re.sub(r"@([\w-]+)", lambda match: student(data, match[1], 0), text)
    return f"python {text} --seed {seed}" + f" --data {data}" * ("--data" not in text)


def folder(text):
    """The folder of a command's run. Recorded results contain its name, so it must not change."""
    return f"runs/comparison/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def student(data, row, seed, column="pretrain"):
    """The file other cells start from, noted in LEFT_BY: a student, for `all` its tuned model."""
    if (row, column) == ("scratch", "pretrain"):
        return "none"
    name = "student.pth" if column == "pretrain" else "model.pth"
    file = f"{folder(command(data, row, seed, column))}/{name}"
    LEFT_BY[file] = data, row, seed, column
    return file


# ============================================================================================= runs


def held_out(argv):
    """Like finetune.py --mode linear, but on training images alone: tested on the last `held` (see
    DATA) in the order of --train-images, on which the search did not pre-train."""
    with dmae.command_line("finetune.py", finetune.FLAGS, argv) as given:
        s = dmae.settings_of(given, finetune.FLAGS, "init", finetune.defaults_for)
        run, vit, train, _ = finetune.begin(s)
        features = partial(dmae.pooled_features, vit.to(run.device))
        x, y = dmae.features_of(run, train, torch.arange(len(train)), features)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        count = DATA[s.data]["held"]
        rest, test = order[:-count], order[-count:]
        s.batch_size = min(s.batch_size, len(rest))
        run.record(finetune.linear_probe(s, (x[rest], y[rest]), (x[test], y[test])))
        return run.log[-1]


def inside(argv):
    """For the first encoder given to experiments.analyze: attention distance in pixels and, with a
    second one, CKA of their equal-numbered blocks' outputs, in percent; lower and upper half."""
    numbers = analyze.main(argv)
    model, *rival = numbers["models"]
    values = dict(distance=[model["patch_size"] * statistics.mean(x) for x in model["distance"]])
    if rival:
        between = numbers["cka"][f"{rival[0]['name']} | {model['name']}"]
        values["cka"] = [100 * row[i] for i, row in enumerate(between)][1:]
    half = len(model["distance"]) // 2
    return {f"{part}_{name}": statistics.mean(x[blocks]) for name, x in values.items()
            for part, blocks in (("lower", slice(half)), ("higher", slice(half, None)))}


PROGRAMS = {"dmae.py": dmae.main, "finetune.py": finetune.main, "experiments.rivals": rivals.main,
            "experiments.detect": detect.main, "experiments.analyze": inside}


def read(path):
    """The lines of a file of results; none if there is no file."""
    try:
        lines = first_run.read(path)
        for line in lines:
            line["data"], line["row"], line["seed"], line["column"], line["command"]
            float(line["minutes"])
        return lines
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"--results {path}: not lines of this program: name another") from error


def measure(s, data, row, seed, column, wanted=None):
    """Run a cell, and first those it starts from, unless that is done, and append their lines.
    wanted: a file that the cell writes; if it is missing, the cell is run again."""
    text = command(data, row, seed, column)
    if any(line["command"] == text for line in read(s.results)) and Path(wanted or ".").exists():
        return
    for word in text.split():
        if word in LEFT_BY:
            measure(s, *LEFT_BY[word], wanted=word)
    out = Path(folder(text))
    name, *argv = text.removeprefix("python ").removeprefix("-m ").split()
    method = [argv[0]] if argv[0] in rivals.METHODS else []
    print(f"--- {data}, {row}, seed {seed}, {column}: {text}", flush=True)
    program = held_out if column == "held-out" else PROGRAMS[name]
    if (out / "checkpoint.pth").exists():
        argv = [*method, "--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)                # without one there is nothing to keep
        argv += ["--out", str(out)] + ["--amp", s.amp] * (program is not inside)
    began, code = time.perf_counter(), first_run.commit()          # HEAD may move during the run
    result = program([*argv, "--data-dir", s.data_dir])
    measured = dict(minutes=(time.perf_counter() - began) / 60)
    amp = "off" if program is inside else json.loads(
        (out / "config.json").read_text())["settings"]["amp"]
    if column == "pretrain":                                     # the minutes of training, no k-NN
        log = first_run.read(out / "log.jsonl")
        images = 128 * log[-1]["step"]
        seconds = sum(images / len(log[1:]) / epoch["images_per_second"] for epoch in log[1:])
        measured = dict(minutes=seconds / 60, images=images,
                        sha256=dmae.file_hash(out / "student.pth"))
    else:                                  # if the result has minutes, they are of all its sessions
        measured |= {name: result[name] for name in KEPT & result.keys()}
    # Bits differ between machines, so each line has the hashes of the files it starts from.
    files = [dmae.file_hash(word) for word in text.split()[2:] if Path(word).is_file()]
    line = dict(data=data, row=row, seed=seed, column=column, **measured,
                commit=code, threads=torch.get_num_threads(), amp=amp, command=text,
                files_sha256=files)
    with open(s.results, "a") as file:
        file.write(json.dumps(line) + "\n")


# ======================================================================================== reporting


def values_of(lines, data, row, column):
    """{seed: value} of a row and column, top-1 in percent, from lines of today's command alone."""
    key = COLUMNS[column][2]
    return {line["seed"]: line[key] * (100 if key == "top1" else 1) for line in lines
            if (line["data"], line["row"]) == (data, row) and key in line
            and line["command"] == command(data, row, line["seed"], column)}


def difference(a, b):
    """Mean of a - b over common seeds ± standard error, then the number of seeds if not three. Rule
    of the study: a difference counts, *, beyond two standard errors, which chance alone passes with
    three seeds 18 % of the time; **: beyond the 5 % limit of Student's t. Two decide nothing."""
    pairs = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    seeds = len(pairs)
    if seeds < 2:
        return ""
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(seeds)
    limit = {2: math.inf, 3: 4.30, 4: 3.18, 5: 2.78}.get(seeds, 2.58)
    star = "**" if abs(mean) > limit * error else "*" if abs(mean) > 2 * error and seeds > 2 else ""
    return f"{mean:+.2f} ± {error:.2f} {star}".rstrip() + f" ({seeds})" * (seeds != 3)


def markdown(head, rows):
    """A Markdown table of {row: cells}, without empty rows and columns; "" if nothing is left."""
    rows = [[ALL_ROWS[row][0] if row in ALL_ROWS else row, *cells]
            for row, cells in rows.items() if any(cells)]
    used = [True, *(any(cells) for cells in list(zip(*rows))[1:])]
    lines = [itertools.compress(line, used) for line in (head, ["---"] * len(head), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if rows else ""


def tables(lines):
    """{name: Markdown} of all tables that the lines fill."""
    def mean(*cells):
        """The mean of all seeds with their standard deviation, as text."""
        return first_run.summary(values_of(lines, *cells).values(), seeds=3)

    found = {}
    for data in DATA:
        known = partial(values_of, lines, data)
        for title, (sets, rows, columns) in TABLES.items():
            if data not in sets:
                continue
            head = ["pre-training", *(column[0] for column in columns.values())]
            found[f"{data}: {title}"] = head, {
                row: [mean(data, row, x) for x in columns] for row in rows}
            for base in ("mae", "dmae"):                 # variants are compared with D-MAE alone
                found[f"{data}: {title}, differences from {ROWS[base][0]}"] = head, {
                    row: [difference(known(row, x), known(base, x)) for x in columns]
                    for row in rows if row != base and (base == "dmae" or row in ROWS)}
        found[f"{data}: minutes of one core"] = ["pre-training", "minutes"], {
            row: [mean(data, row, "pretrain")] for row in ROWS | VARIANTS if row != "scratch"}
        for flag, rows, values in SEARCHES:
            found[f"{data}: linear probe on held-out images, by {flag}"] = ["method", *values], {
                row: [mean(data, f"{row}@{x}", "held-out") for x in values] for row in rows}
        found[f"{data}: the teacher"] = ["", "k-NN", "linear", "minutes"], {
            row: [mean(data, row, x) for x in ("knn", "linear", "pretrain")] for row in TEACHERS}
        hours = [sum(line["minutes"] for line in lines if (line["data"], part) == (
            data, line["column"] == "pretrain")) / 60 for part in (True, False)]
        found[f"{data}: hours of one core"] = ["", "pre-training", "measuring"], {
            "all lines": [f"{x:.1f}" for x in hours if any(hours)]}
    found = {name: markdown(head, rows) for name, (head, rows) in found.items()}
    return {name: table for name, table in found.items() if table}


def figure(lines, path):
    """Linear probe and 1 % of the labels by each method, mean and deviation, beside the paper's
    Pets and Flowers."""
    sets = [data for data in DATA if any(values_of(lines, data, row, "linear") for row in PAPER)]
    sheet, (axes,) = analyze.new_figure(5.3 + 3.3 * len(sets), 3.6, 1, 1 + len(sets), sharey=True)
    for axis, data in zip(axes, [*sets, None]):
        for i, column in enumerate(("linear", "1%")):
            values = [list(values_of(lines, data, row, column).values()) if data
                      else [PAPER[row][i]] for row in PAPER]
            points = {place + 0.3 * i: x for place, x in enumerate(values) if x}
            axis.errorbar(
                [statistics.mean(x) for x in points.values()], list(points), fmt="os"[i], capsize=3,
                xerr=[statistics.stdev(x) if len(x) > 1 else 0 for x in points.values()],
                label=COLUMNS[column][0] if data else ("Pets", "Flowers")[i])
        axis.set_title(f"{data}, small ViT" if data else "paper: ViT-Tiny, fine-tuned")
        axis.set_xlabel("top-1 in percent")
        axis.grid(axis="y", alpha=0.3)
        axis.legend()                                        # where there is room
    axes[0].set_yticks([place + 0.15 for place in range(len(PAPER))], [ROWS[x][0] for x in PAPER])
    axes[0].invert_yaxis()
    sheet.savefig(path, dpi=100)


# ===================================================================================== command line

FLAGS = {                                                               # argparse wants % as %%
    "rows": (None, "ROW,...", f"{', '.join(ALL_ROWS)} [all whose teachers are there]"),
    "columns": (None, "COLUMN,...", f"{', '.join(COLUMNS)} [all]".replace("%", "%%")),
    "data": (None, "NAME,...", f"{', '.join(DATA)} [both]"),
    "seeds": ("0,1,2", "N,...", "whole numbers"),
    "report": (False, bool, "print the tables and draw the figure, run nothing"),
    "results": (str(RESULTS), "FILE", "lines of what has been measured"),
    "data_dir": ("data", "DIR", "where data sets lie"),
    "amp": ("off", ("off", "bf16", "fp16"), "precision, as dmae.py has it"),
}


def chosen(flag, text, known):
    names = list(known) if text is None else text.split(",")
    for name in names:
        require(name in known, f"--{flag} {name}: choose from {', '.join(known)}")
    return names


def columns_of(data, row, seed):
    """The columns to measure for a row; of teachers and of the search for seed 0 alone."""
    columns = [column for sets, rows, columns in TABLES.values()
               if data in sets and row.split("@")[0] in rows for column in columns]
    if row in SEARCH:
        return ["held-out"] if columns and seed == 0 else []
    if row in TEACHERS:
        here = seed == 0 and (data != "shapes" or row != "teacher")
        return ["pretrain", "knn", "linear"] if here else []
    return ["pretrain", *columns] if columns and row != "scratch" else columns


def missing(data, row, seed, column):
    """The file in weights/ that a row's pre-training takes, if it is not there; else None."""
    words = command(data, row, seed, "pretrain").split() if row != "scratch" else []
    return next((x for x in words if "weights/" in x and not Path(x).exists()), None)


def cells(s):
    """The cells asked for, (data, row, seed, column) each: first the search, by which rates are
    chosen; then the first columns of all rows, set by set; then the others."""
    rows = chosen("rows", s.rows, ALL_ROWS)
    columns = chosen("columns", s.columns, COLUMNS)
    require(re.fullmatch(r"\d+(,\d+)*", s.seeds), f"--seeds {s.seeds}: write them as in 0,1,2")
    found = [(data, row, seed, column) for data in chosen("data", s.data, DATA)
             for seed in map(int, s.seeds.split(",")) for row in rows
             for column in columns_of(data, row, seed) if column in columns]
    order = {"held-out": 0} | dict.fromkeys(["pretrain", "knn", "linear", "1%"], 1)
    return sorted(found, key=lambda cell: order.get(cell[3], 2))                  # sorts stably


def main(argv=None):
    """The command line; returns the tables, {name: Markdown}. Bad input: a line, exit status 2."""
    with dmae.command_line("experiments.study", FLAGS, argv) as given:
        s = argparse.Namespace(**{name: flag[0] for name, flag in FLAGS.items()} | given)
        if not s.report:
            asked = [cell for cell in cells(s) if s.rows or not missing(*cell)]
            for cell in asked:
                require(not missing(*cell), f"--rows {cell[1]}: put {missing(*cell)} in its place")
            Path(s.results).open("a").close()                       # fails now, not after an hour
            for cell in asked:
                measure(s, *cell)
        lines = read(s.results)
        found = tables(lines)
        require(found, f"--results {s.results}: there are no lines of today's flags in it")
        print(*(f"\n{name}\n\n{table}" for name, table in found.items()), sep="", end="")
        if s.report:
            try:
                place = HERE / "figures" if Path(s.results) == RESULTS else Path(s.results).parent
                figure(lines, place / "study.png")
            except ImportError as error:
                raise InputError("the figure needs pip install matplotlib") from error
        return found


if __name__ == "__main__":
    main()
