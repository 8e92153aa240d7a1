"""Does distillation help? The paper's question at small scale, with error bars.

    python -m experiments.study --results mine.jsonl      # MAE, D-MAE and the control, three seeds
    python -m experiments.study --results mine.jsonl --data shapes --rows all --columns 1%,held-out
    python -m experiments.study --report                  # tables and figures of our lines

A cell of the study is one run of dmae.py or finetune.py: a data set, a way to pre-train (row), a
seed, and what is measured (column; `pretrain` is the pre-training itself). Each finished cell adds
a line to --results and is not run again. Runs lie under --runs: stop whenever you like, the same
command goes on. Tables and figures come from the lines alone. Several of these may run side by side
if their cells differ: of other data sets, or of other seeds once the teachers are there.

Runs of the same seed had the same labels and the same order of images, so differences are taken
pair by pair. What settings were chosen by is never the test set: the learning rate comes from the
column `held-out`, a linear probe tested on training images that are taken out of its training
(pre-training has seen them, without labels). Alpha is the paper's in the main rows.
"""

import argparse
import itertools
import json
import re
import shlex
import statistics
import time
from functools import partial
from pathlib import Path

import torch

import dmae
import finetune
from data import InputError, require
from experiments.comparison import difference, markdown, mean_and_deviation
from experiments.first_run import commit

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "study.jsonl"

# ======================================================================================= the study

# For each data set: the flags of its teacher and of every student, epochs of fine-tuning with 1 %,
# 10 % and all of the labels, of plain MAE in the time that D-MAE and its teacher took (`long`; so
# many have `dmae-long` and `better-long`, too), and of the better teacher.
DATA = {
    "fashion-mnist": dict(
        teacher="--student mini --epochs 8", student="--student slim --epochs 3 --blr 6e-3",
        tuning=(60, 8, 1), long=21, better=24),
    "shapes": dict(
        teacher="--student mini --epochs 24 --batch-size 128 --blr 3e-3",
        student="--student slim --epochs 9 --batch-size 128 --blr 6e-3", tuning=(200, 20, 3),
        long=73, better=72),
}

# The rows of the tables: a name, what the table says, and the flags of dmae.py.
TEACHER, BETTER, UNTRAINED = (f"--teacher {{runs}}/{name}/0/pretrain/student.pth" for name in (
    "teacher", "better-teacher", "untrained-teacher"))
ROWS = {
    "scratch": ("none (scratch)", None),
    "mae": ("MAE", "--teacher none"),
    "mae-long": ("MAE, as long as D-MAE and its teacher", "--teacher none --epochs {long}"),
    "dmae": ("D-MAE, last block", TEACHER),
    "dmae-long": ("D-MAE, as many epochs as the long MAE", TEACHER + " --epochs {long}"),
    "better": ("D-MAE, better teacher (trained three times as long)", BETTER),
    "better-long": ("D-MAE, better teacher, as many epochs as the long MAE",
                    BETTER + " --epochs {long}"),
    "untrained": ("D-MAE, untrained teacher", UNTRAINED),
    "untrained-45": ("D-MAE, untrained teacher (alpha 45)", UNTRAINED + " --alpha 45"),
    "lower": ("D-MAE, block 3", TEACHER + " --layers 3:3"),
    "every": ("D-MAE, all blocks", TEACHER + " --layers 1:1,2:2,3:3,4:4,5:5,6:6"),
    "probs": ("D-MAE, after the softmax (alpha 100)", TEACHER + " --match probs --alpha 100"),
    "hidden": ("D-MAE, hidden states", TEACHER + " --match hidden"),
    "d2": ("D²-MAE", TEACHER + " --decoupled"),
}
# What `mae` and `dmae` were tried with. (The last two, and D-MAE at 1.5e-3, after the choice.) The
# other rows take D-MAE's, untuned; 45 makes the untrained teacher's loss as large as the trained's.
SETTINGS = {
    "blr-1.5e-3": ("blr 1.5e-3", "--blr 1.5e-3"),
    "blr-3e-3": ("blr 3e-3", "--blr 3e-3"),
    "blr-3e-3-alpha-0.3": ("blr 3e-3, alpha 0.3", "--blr 3e-3 --alpha 0.3"),
    "blr-3e-3-alpha-3": ("blr 3e-3, alpha 3", "--blr 3e-3 --alpha 3"),
    "taken": ("blr 6e-3, alpha 1 (taken)", ""),
    "blr-1.2e-2": ("blr 1.2e-2", "--blr 1.2e-2"),
    "warmup-1": ("blr 6e-3, one epoch of warm-up", "--warmup-epochs 1"),
}
GRID = {f"{model}-{name}": (f"{ROWS[model][0]}, {title}", f"{ROWS[model][1]} {flags}")
        for model in ("mae", "dmae") for name, (title, flags) in SETTINGS.items()
        if flags and not (model == "mae" and "--alpha" in flags)}
# What others need, without a place in the main table.
TEACHERS = {
    "teacher": ("teacher", "--teacher none"),
    "better-teacher": ("better teacher", "--teacher none --epochs {better}"),
    "untrained-teacher": ("untrained", "--teacher none --epochs 0"),
}
ALL_ROWS = ROWS | GRID | TEACHERS
# The rows whose curves are drawn, and what of the log.
DRAWN = ("mae", "mae-long", "dmae", "dmae-long", "better", "better-long", "untrained")
CURVES = dict(mae=("MAE loss", 1), attn=("distillation loss", 1), knn=("k-NN top-1, %", 100))

# The columns: flags of finetune.py.
COLUMNS = {
    "knn": ("k-NN", "--mode knn --bank 10000"),
    "linear": ("linear", "--mode linear"),
    "1%": ("1 % labels", "--label-fraction 0.01 --epochs {0}"),
    "10%": ("10 % labels", "--label-fraction 0.1 --epochs {1}"),
    "100%": ("all labels", "--epochs {2}"),
}
HELD_OUT = {"held-out": ("linear, held out", "--mode linear")}        # by `held_out`, below
# The first K blocks kept, the others begun anew; K = 6 is the column `1%` or `10%` itself.
KEEP = {f"keep{k}-{share}": (f"{k} blocks kept, {share}", f"{COLUMNS[share][1]} --keep-blocks {k}")
        for share in ("1%", "10%") for k in (2, 4)}
ALL_COLUMNS = COLUMNS | HELD_OUT | KEEP


def command(s, data, row, seed, column):
    """The program, dmae or finetune, and the command line of a cell, without its --out."""
    setting, runs = DATA[data], shlex.quote(f"{s.runs}/{data}")
    common = f" --data {data} --data-dir {shlex.quote(s.data_dir)} --seed {seed}"
    if column == "pretrain":
        own = setting["teacher" if row in TEACHERS else "student"].split()
        new = shlex.split(ALL_ROWS[row][1].format(runs=runs, **setting))
        for flag, value in zip(own[::2], own[1::2], strict=True):     # a row's own flags come first
            new += [] if flag in new else [flag, value]
        return dmae, new + shlex.split(common)
    start = (f"--init {runs}/{row}/{seed}/pretrain/student.pth" if row != "scratch" else
             "--init none --model slim")
    return finetune, shlex.split(
        start + " " + ALL_COLUMNS[column][1].format(*setting["tuning"]) + common)


def held_out(argv, count=5000):
    """What finetune.py does for --mode linear, but tested on `count` of the training images, which
    are taken out of training: the same ones for every seed. Returns its result."""
    began = time.perf_counter()
    with dmae.command_line("finetune.py", finetune.FLAGS, argv) as given:
        s = dmae.settings_of(given, finetune.FLAGS, "init", finetune.defaults_for)
        run, vit, train, _ = finetune.begin(s)
        features = partial(dmae.pooled_features, vit.to(run.device))
        x, y = dmae.features_of(run, train, torch.arange(len(train)), features)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        test, rest = order[:count].sort().values, order[count:].sort().values
        line = finetune.linear_probe(s, (x[rest], y[rest]), (x[test], y[test]))
        run.record(line | dict(minutes=(time.perf_counter() - began) / 60))
        return dict(train_images=len(rest), **run.log[-1])


def read(path=RESULTS):
    """The lines of a file of results; none if there is no file."""
    lines, whole = [], Path(path).read_text() if Path(path).exists() else ""
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            float(line["minutes"]), line["data"], line["row"], line["seed"], line["command"]
            float(line["images"] if line["column"] == "pretrain" else line["top1"])
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"--results {path}: line {number} is not one that this program "
                             "writes; remove it, and its cell will be run again") from error
        lines.append(line)
    return lines


def line_of(s, data, row, seed, column):
    """The line of a cell, or None. Raises InputError if it was measured with other settings."""
    found = select(read(s.results), data, row, column)
    line = next((line for line in found if line["seed"] == seed), None)
    if line:
        before = list(itertools.pairwise(shlex.split(line["command"])))
        other = [f"{flag} {value}" for flag, value in itertools.pairwise(
            command(s, data, row, seed, column)[1]) if (flag, value) not in before
            and flag.startswith("--") and flag not in ("--teacher", "--init", "--data-dir")]
        require(not other, f"--results {s.results}: {data}, {row}, seed {seed}, {column} was not "
                f"measured with {', '.join(other)}: name another file")
    return line


def begin_or_resume(program, argv, out):
    """The command line of a run that begins in `out`, or goes on there. What is left of one without
    a checkpoint is removed."""
    held = [out / name for name in ("config.json", "checkpoint.pth")]
    if not all(path.exists() for path in held):
        for path in held:
            path.unlink(missing_ok=True)
        return [*argv, "--out", str(out)]
    with dmae.command_line("experiments.study", program.FLAGS, argv) as given:
        begun = json.loads(held[0].read_text())["settings"]
        same = all(begun[x] == given[x] for x in given.keys() - {"teacher", "init", "data_dir"})
        require(same, f"{out} holds a run with other settings: remove it, or name another --runs")
        return ["--resume", str(out), "--data-dir", given["data_dir"]]


def run(s, data, row, seed, column):
    """Run or resume a cell, and what it starts from, and append its line, unless it is there."""
    cell = data, row, seed, column
    if line_of(s, *cell):
        return
    program, argv = command(s, *cell)
    line = dict(data=data, row=row, seed=seed, column=column, commit=commit(),
                command=shlex.join(["python", f"{program.__name__}.py", *argv]),
                date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
                threads=torch.get_num_threads())
    for path in (Path(word) for word in argv if word.endswith("/pretrain/student.pth")):
        needed = data, path.parts[-4], int(path.parts[-3]), "pretrain"
        run(s, *needed)
        sha256 = line_of(s, *needed)["student_sha256"]
        require(path.exists() and dmae.file_hash(path) == sha256, f"{path} is not there, or not "
                f"that of {s.results}: name the --runs where it lies, or remove its line to train "
                "it again, or name another --results to run it all anew")
        line |= dict(student_sha256=sha256)
    out = Path(s.runs, *map(str, cell))
    print(f"--- {data}, {row}, seed {seed}, {column}: {out}", flush=True)
    start = held_out if column in HELD_OUT else program.main
    result = start(begin_or_resume(program, argv, out))
    if column == "pretrain":
        log = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
        batch = json.loads((out / "config.json").read_text())["settings"]["batch_size"]
        images = [(b["step"] - a["step"]) * batch for a, b in itertools.pairwise(log)]
        keys = ("epoch", "loss", "mae", *dmae.MATCHES, "knn")
        # The minutes are those of training alone; of the other columns, from start to end.
        line |= dict(
            curve=[{"attn" if key in dmae.MATCHES else key: x[key] for key in keys if key in x}
                   for x in log],
            knn_pixels=log[0]["knn_pixels"], images=sum(images),
            minutes=sum(n / x["images_per_second"] / 60
                        for n, x in zip(images, log[1:], strict=True)),
            student_sha256=dmae.file_hash(out / "student.pth"))
    else:
        line |= {key: result[key] for key in ("top1", "train_images", "minutes")}
    with open(s.results, "a") as file:
        file.write(json.dumps(line) + "\n")


# ======================================================================================== reporting


def select(lines, data, row, column, again=False):
    """The lines of a row and column; again: those of students that were trained a second time."""
    return [line for line in lines if (line["data"], line["row"], line["column"],
                                       "again" in line) == (data, row, column, again)]


def values_of(lines, data, row, column):
    """{seed: percent} of the lines of a row and column; of `pretrain`, {seed: minutes}."""
    return {line["seed"]: 100 * line["top1"] if "top1" in line else line["minutes"]
            for line in select(lines, data, row, column)}


def tables(lines):
    """{name: a table in Markdown} of all that `lines` have to say."""
    return {f"{data}: {name}": markdown(head, rows)
            for data in DATA for name, head, rows in tables_of(lines, data) if rows}


def tables_of(lines, data):
    """Yields (name, head, rows) of each table of a data set; no rows where there are no lines."""
    known, text = partial(values_of, lines, data), mean_and_deviation
    columns = [column for column in COLUMNS if any(known(row, column) for row in ROWS)]
    shown = {row: [known(row, column) for column in columns] for row in ROWS}
    shown = {row: values for row, values in shown.items() if any(values)}
    head = ["pre-training", *(COLUMNS[column][0] for column in columns)]
    yield "top-1 in percent", [*head, "minutes of it"], [
        [ROWS[row][0], *map(text, [*values, known(row, "pretrain")])]
        for row, values in shown.items()]

    for base, others in (("mae", ROWS.keys() - {"mae"}),
                         ("dmae", ROWS.keys() - {"scratch", "mae", "dmae"}),
                         ("mae-long", {"dmae-long", "better", "better-long"})):
        rows = [[ROWS[row][0], *map(difference, values, shown.get(base, []))]
                for row, values in shown.items() if row in others]
        yield (f"difference from {ROWS[base][0]} (± standard error)", head,
               [row for row in rows if any(row[1:])])

    rows = [[title, *(text(known(row if name == "taken" else f"{row}-{name}", "held-out"))
                      for row in ("mae", "dmae"))] for name, (title, _) in SETTINGS.items()]
    yield ("linear probe on held-out training images",
           ["settings", ROWS["mae"][0], ROWS["dmae"][0]], [row for row in rows if any(row[1:])])

    rows = []
    for share, row in itertools.product(("1%", "10%"), ("mae", "dmae")):
        values = [known(row, f"keep{k}-{share}") for k in (2, 4)]
        seeds = set().union(*values)
        whole = {seed: value for seed, value in known(row, share).items() if seed in seeds}
        if seeds:
            rows.append([ROWS[row][0], share.replace("%", " %"), *map(text, [*values, whole])])
    yield "only the first blocks kept", ["pre-training", "labels", "2", "4", "6 (all)"], rows

    yield "the teacher", ["", "k-NN", "linear", "minutes"], [
        [title, *(text(known(row, column)) for column in ("knn", "linear", "pretrain"))]
        for row, (title, _) in TEACHERS.items() if known(row, "knn") or known(row, "linear")]

    rows = []
    for row, (title, _) in ALL_ROWS.items():
        ends = {line["seed"]: line["curve"][-1] for line in select(lines, data, row, "pretrain")}
        pairs = [(ends[line["seed"]], line["curve"][-1])
                 for line in select(lines, data, row, "pretrain", again=True)]
        if pairs and "mae" in pairs[0][0]:
            mae, knn = ([[end[key] for end in pair] for pair in pairs] for key in ("mae", "knn"))
            rows.append([title, str(len(pairs)),
                         *(f"{statistics.mean(x):.4f}" for x in zip(*mae, strict=True)),
                         *(f"{100 * statistics.mean(x):.1f}" for x in zip(*knn, strict=True)),
                         f"{100 * max(abs(a - b) for a, b in knn):.1f}"])
    yield ("trained again", ["pre-training", "students", "MAE loss", "again", "k-NN", "again",
                             "largest difference"], rows)


def figures(lines, folder):
    """Draws curves over pre-training, mean and range over seeds; yields each data set's file."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("(figures need pip install matplotlib)")
        return
    for data in DATA:
        runs = {row: select(lines, data, row, "pretrain") for row in DRAWN}
        if not any(runs.values()):
            continue
        figure, ticks = Figure(figsize=(13, 4.6), layout="constrained"), {0.0}
        axes = figure.subplots(1, 3)
        for color, seeds in enumerate(runs.values()):
            epochs = list(zip(*(line["curve"] for line in seeds), strict=True))
            for axis, (key, (title, unit)) in zip(axes, CURVES.items(), strict=True):
                axis.set_title(title)
                if not epochs or key not in epochs[-1][0]:
                    continue
                each = seeds[0]["images"] / 1000 / max(1, len(epochs) - 1)
                ticks |= {each, each * (len(epochs) - 1)}
                values = {i * each: [unit * run[key] for run in epoch]
                          for i, epoch in enumerate(epochs) if key in epoch[0]}
                means, least, most = (list(map(function, values.values()))
                                      for function in (statistics.mean, min, max))
                axis.plot(values.keys(), means, color=f"C{color}", linewidth=1, marker=".",
                          label=ROWS[seeds[0]["row"]][0])
                axis.fill_between(values.keys(), least, most, color=f"C{color}", alpha=0.2,
                                  linewidth=0)
        pixels = next(seeds[0]["knn_pixels"] for seeds in runs.values() if seeds)
        axes[2].axhline(100 * pixels, color="grey", linestyle=":", linewidth=1, label="raw pixels")
        ticks = sorted(ticks)
        for axis in axes:
            axis.set_xlabel("thousand images seen (logarithmic after the first epoch)")
            # Rows differ eightfold in length; linear up to the first epoch, which has 0 before it.
            axis.set_xscale("symlog", linthresh=ticks[1], linscale=0.3)
            axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            axis.minorticks_off()
        axes[1].set_yscale("log")
        figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        figure.savefig(folder / f"study_{data}.png", dpi=80)
        yield folder / f"study_{data}.png"


# ===================================================================================== command line

GROUPS = {
    "data": {name: [name] for name in DATA},
    "rows": {name: [name] for name in ALL_ROWS} | dict(all=ROWS, grid=GRID),
    "columns": {name: [name] for name in (*ALL_COLUMNS, "pretrain")} | dict(all=COLUMNS, keep=KEEP)}
# As FLAGS of dmae.py. Lists have commas.
FLAGS = {
    "data": ("fashion-mnist", "NAME,...", ", ".join(GROUPS["data"])),
    "rows": ("mae,dmae,untrained", "ROW,...", ", ".join(GROUPS["rows"])),
    "columns": (None, "COLUMN,...", f"{', '.join(GROUPS['columns'])} [knn,linear,1%]".replace(
        "%", "%%")),                                                       # argparse wants it so
    "seeds": ("0,1,2", "SEED,...", "whole numbers"),
    "report": (False, bool, "print tables and draw figures, run nothing"),
    "results": (str(RESULTS), "FILE", "lines of what has been measured"),
    "runs": ("runs/study", "DIR", "where runs lie"),
    "data_dir": ("data", "DIR", "where data sets lie"),
}


def main(argv=None):
    """The command line; returns the tables, {name: Markdown}. Bad input: a line, exit status 2."""
    with dmae.command_line("experiments.study", FLAGS, argv) as given:
        s = argparse.Namespace(**{name: flag[0] for name, flag in FLAGS.items()} | given)
        if not s.report:
            Path(s.results).touch()                  # that it can be written, now, not in an hour
            for cell in cells(s):
                run(s, *cell)
        lines = read(s.results)
        require(lines, f"--results {s.results}: there are no lines in it yet")
        out = tables(lines)
        print(*(f"\n{name}\n\n{table}" for name, table in out.items()), sep="", end="")
        if s.report:
            folder = HERE / "figures" if Path(s.results) == RESULTS else Path(s.results).parent
            print("", *figures(lines, folder), sep="\n")
        return out


def chosen(flag, text):
    """The names in a list with commas, each once, groups replaced by what is in them."""
    known = GROUPS[flag]
    for name in text.split(","):
        require(name in known, f"--{flag} {name}: choose of {', '.join(known)}")
    return list(dict.fromkeys(name for group in text.split(",") for name in known[group]))


def cells(s):
    """The cells that were asked for, in their order: (data, row, seed, column)."""
    require(re.fullmatch(r"\d+(,\d+)*", s.seeds), f"--seeds {s.seeds}: write them as in 0,1,2")
    rows, columns = chosen("rows", s.rows), chosen("columns", s.columns or "knn,linear,1%")
    return [(data, row, seed, column) for data in chosen("data", s.data)
            for seed in map(int, s.seeds.split(",")) for row in rows for column in columns
            if row != "scratch" or column in COLUMNS]        # there is nothing to pre-train or keep


if __name__ == "__main__":
    main()
