"""Does distillation help? The paper's question at small scale, with error bars.

    python -m experiments.study --results mine.jsonl      # MAE, D-MAE and the control, three seeds
    python -m experiments.study --results mine.jsonl --minutes 10    # a piece; again: the next
    python -m experiments.study --results mine.jsonl --data shapes --rows all --columns all
    python -m experiments.study --results mine.jsonl --rows mae dmae grid --columns held-out
    python -m experiments.study --results mine.jsonl --picture          # of seed 0's students
    python -m experiments.study --report                  # tables and figures of our lines

A cell of the study is one run of dmae.py or finetune.py: a data set, a way to pre-train (row), a
seed, and what is measured (column; `pretrain` is the pre-training itself). Each finished cell adds
a line to --results and is not run again; runs lie under --runs and are resumed. Tables and figures
come from that file alone. The committed one holds our lines: name another to run it all yourself.
Two of these may run side by side, in the same folder, best with one thread each
(OMP_NUM_THREADS=1). Where the files of students are gone, --again trains them anew.

One rule: a difference counts beyond two standard errors of its mean over seeds. Runs of the same
seed had the same labels and the same order of images, so seeds are compared pair by pair. With
three seeds chance alone passes this 18 % of the time, and columns that agree measure the same three
students: ** marks what chance passes 5 % of the time. Each kind of teacher was trained once, so
that what is found holds for that one. After --again, a pair may be of two machines, and rounding
alone makes other students in the end.

What settings were chosen by is never the test set: the learning rate comes from the column
`held-out`, a linear probe on training images that were taken out of its training (pre-training has
seen them, without labels). Alpha is the paper's in the main rows.
"""

import fcntl
import itertools
import json
import math
import shlex
import signal
import statistics
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum

import dmae
import finetune
from dmae import InputError, Parser, file_hash, one_line_errors
from experiments.analyze import fit_mixer, load_student, open_images

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "study.jsonl"

# ======================================================================================= the study

# For each data set: the flags of its teacher and of every student, epochs of fine-tuning with 1 %,
# 10 % and all of the labels, and of plain MAE in the time that D-MAE took with its teacher: 24.8 +
# 5.1 minutes on Fashion-MNIST, where 3 epochs of MAE took 4.2; 25.9 + 6.5 on `shapes`, where 9 took
# 4.0. (`dmae-long` and `better-long` have as many epochs.) Other students see 180,000 images,
# teachers 480,000, better ones 1,440,000.
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
# The rows whose curves are drawn.
DRAWN = ("mae", "mae-long", "dmae", "dmae-long", "better", "better-long", "untrained")

# The columns: flags of finetune.py.
COLUMNS = {
    "knn": ("k-NN", "--mode knn --bank 10000"),
    "linear": ("linear", "--mode linear --eval-every 100"),
    "1%": ("1 % labels", "--label-fraction 0.01 --epochs {0} --eval-every {0}"),
    "10%": ("10 % labels", "--label-fraction 0.1 --epochs {1} --eval-every {1}"),
    "100%": ("all labels", "--epochs {2} --eval-every {2}"),
}
HELD_OUT = {"held-out": ("linear, held out", "--mode linear --holdout 5000 --eval-every 100")}
# The first K blocks kept, the others begun anew; K = 6 is the column `1%` or `10%` itself.
KEEP = {f"keep{k}-{share}": (f"{k} blocks kept, {share}", f"{COLUMNS[share][1]} --keep-blocks {k}")
        for share in ("1%", "10%") for k in (2, 4)}
ALL_COLUMNS = COLUMNS | HELD_OUT | KEEP
GROUPS = dict(rows=dict(all=ROWS, grid=GRID), columns=dict(all=COLUMNS, keep=KEEP))


def command(s, data, row, seed, column):
    """The program and the command line of a cell, without its --out."""
    setting, runs = DATA[data], shlex.quote(f"{s.runs}/{data}")
    common = f" --data {data} --data-dir {shlex.quote(s.data_dir)} --seed {seed}"
    if column == "pretrain":
        own = setting["teacher" if row in TEACHERS else "student"].split()
        new = shlex.split(ALL_ROWS[row][1].format(runs=runs, **setting))
        for flag, value in zip(own[::2], own[1::2]):     # a row's flags come before the data set's
            new += [] if flag in new else [flag, value]
        return dmae, new + shlex.split(common)
    start = (f"--init {runs}/{row}/{seed}/pretrain/student.pth" if row != "scratch" else
             "--init none --model slim")
    return finetune, shlex.split(
        start + " " + ALL_COLUMNS[column][1].format(*setting["tuning"]) + common)


def needs(row, seed, column):
    """The cells, of the same data set, that must be there before this one."""
    if column != "pretrain":
        return [] if row == "scratch" else [(row, seed, "pretrain")]
    flags = ALL_ROWS[row][1]
    return [(name, 0, "pretrain") for name in TEACHERS if f"/{name}/" in flags]


# ========================================================================================= running


def read(path=RESULTS):
    """The lines of a file of results; none if there is no file."""
    lines, path = [], Path(path)
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
            float(line["minutes"]), line["data"], line["row"], line["seed"], line["command"]
            float(line["images"] if line["column"] == "pretrain" else line["top1"])
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"--results {path}: line {number} is not one that this program "
                             "writes; remove it, and its cell will be run again") from error
        lines.append(line)
    return lines


def lines_of(s, data, row, seed, column):
    """All lines of a cell: one, and for a student trained again one more for each time."""
    return [line for line in read(s.results) if (line["data"], line["row"], line["seed"],
                                                 line["column"]) == (data, row, seed, column)]


def line_of(s, data, row, seed, column):
    """The line of a cell, or None. Raises InputError if it was measured with other settings."""
    found = lines_of(s, data, row, seed, column)
    if not found:
        return None

    program, argv = command(s, data, row, seed, column)

    def settings(words):
        given = vars(program.make_parser().parse_args(words))
        return {flag: "/".join(Path(value).parts[-4:]) if flag in ("init", "teacher") else value
                for flag, value in given.items() if flag != "data_dir"}

    before, now = settings(shlex.split(found[0]["command"])[2:]), settings(argv)
    if before != now:
        differ = ", ".join(f"--{x.replace('_', '-')}" for x in sorted(before.keys() | now.keys())
                           if before.get(x) != now.get(x))
        raise InputError(f"--results {s.results}: {data}, {row}, seed {seed}, {column} was "
                         f"measured with another {differ}: name another file")
    return found[0]


def find_student(s, data, row, seed):
    """The student.pth of a finished pre-training; None if it is missing, or if its hash is in none
    of the lines."""
    path = Path(s.runs, data, row, str(seed), "pretrain", "student.pth")
    known = [line["student_sha256"] for line in lines_of(s, data, row, seed, "pretrain")]
    return path if path.exists() and file_hash(path) in known else None


def student(s, data, row, seed):
    """The same. Raises InputError if there is none."""
    path = find_student(s, data, row, seed)
    if path is None:
        raise InputError(f"{s.runs}/{data}/{row}/{seed}/pretrain/student.pth is not there, or not "
                         f"that of {s.results}: name the --runs where it lies, or train it "
                         "--again, or name another --results to run it all anew")
    return path


def run(s, data, row, seed, column, wait):
    """Run or resume a cell and append its line; True once it is there. What another process is at
    is left to it (wait: until it has finished)."""
    def there():
        return line_of(s, data, row, seed, column) and not (
            s.again and column == "pretrain" and not find_student(s, data, row, seed))

    if there():
        return True
    for cell in needs(row, seed, column):
        if not run(s, data, *cell, wait):
            return False
        student(s, data, *cell[:2])
    out = Path(s.runs, data, row, str(seed), column)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:              # let go when the process ends, however
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        if there():
            return True
        program, argv = command(s, data, row, seed, column)
        begun = {name for name in ("config.json", "checkpoint.pth") if (out / name).exists()}
        resume = ["--resume"] if len(begun) == 2 else ["--overwrite"] if begun else []
        print(f"--- {data}, {row}, seed {seed}, {column}: {out}", flush=True)
        again = bool(line_of(s, data, row, seed, column))
        if again:                               # a broken file would be left as it is
            (out / "student.pth").unlink(missing_ok=True)
        result = program.main(argv + ["--out", str(out)] + resume)
        if again and find_student(s, data, row, seed):
            return True                                 # it came out the same, to the bit
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        config = json.loads((out / "config.json").read_text())
        line = dict(data=data, row=row, seed=seed, column=column)
        if column == "pretrain":
            keys = ("epoch", "loss", "mae", "attn", "hidden", "knn")
            line["curve"] = [{k: x[k] for k in keys if k in x} for x in log]
            line["knn_pixels"] = log[0]["knn_pixels"]
            line["student_sha256"] = file_hash(out / "student.pth")
            images = [(b["step"] - a["step"]) * config["settings"]["batch_size"]
                      for a, b in zip(log, log[1:])]
            line["images"] = sum(images)
            # Of training alone; of the other columns, from start to end.
            line["minutes"] = sum(n / x["images_per_second"] / 60 for n, x in zip(images, log[1:]))
        else:
            line |= {k: result[k] for k in ("top1", "train_images", "minutes")}
            if row != "scratch":
                line["student_sha256"] = file_hash(student(s, data, row, seed))
        line |= dict(command=shlex.join(["python", f"{program.__name__}.py", *argv]),
                     commit=s.commit, date=time.strftime("%Y-%m-%d"), torch=config["torch"],
                     threads=torch.get_num_threads())
        if again:
            line["again"] = True
        with open(s.results, "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read()
            file.write("\n" * (whole[-1:] not in ("", "\n")) + json.dumps(line) + "\n")
    return True


def commit():
    """The commit that runs, with a + where the core was changed since; None outside of git."""
    def git(*words):
        return subprocess.run(["git", "-C", str(HERE), *words], capture_output=True,
                              text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "../dmae.py", "../finetune.py", "../data.py")
        return (git("rev-parse", "--short", "HEAD") + "+" * bool(changed)) or None
    except OSError:                                                       # git is not installed
        return None


# ======================================================================================= reporting


def values_of(lines, data, row, column):
    """{seed: percent} of a cell's lines; of `pretrain`, {seed: minutes}, the first time. (What was
    measured on a student trained again tells by its student_sha256.)"""
    key = dict(data=data, row=row, column=column)
    return {line["seed"]: 100 * line["top1"] if "top1" in line else line["minutes"]
            for line in lines if key.items() <= line.items() and "again" not in line}


def mean_and_deviation(values):
    """Of {seed: value}; how many seeds, unless three."""
    if not values:
        return ""
    values = list(values.values())
    text = f"{statistics.mean(values):.1f}"
    text += f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return text + f" ({len(values)})" * (len(values) != 3)


def difference(a, b):
    """Mean and standard error of a - b over the seeds that both have, and how many these are."""
    pairs = [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]
    if len(pairs) < 2:
        return None
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs)), len(pairs)


def difference_text(a, b):
    """The same in words. By the rule of the study, * marks what counts; ** what chance alone passes
    in less than one of twenty cases (Student's t). Two seeds decide nothing."""
    found = difference(a, b)
    if found is None:
        return ""
    mean, error, seeds = found
    limit = {2: math.inf, 3: 4.30, 4: 3.18, 5: 2.78}.get(seeds, 2.58)
    star = "**" if abs(mean) > limit * error else "*" if abs(mean) > 2 * error and seeds > 2 else ""
    return f"{mean:+.2f} ± {error:.2f} {star}".rstrip() + f" ({seeds})" * (seeds != 3)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(lines):
    """{name: a table in Markdown} of all that `lines` have to say."""
    out = {}
    for data in DATA:
        columns = [column for column in COLUMNS
                   if any(values_of(lines, data, row, column) for row in ROWS)]
        titles = ["pre-training", *(COLUMNS[column][0] for column in columns)]
        shown = {row: [values_of(lines, data, row, column) for column in columns]
                 for row in ROWS}
        shown = {row: values for row, values in shown.items() if any(values)}
        if shown:
            out[f"{data}: top-1 in percent"] = markdown(
                [*titles, "minutes of it"],
                [[ROWS[row][0], *map(mean_and_deviation, values),
                  mean_and_deviation(values_of(lines, data, row, "pretrain"))]
                 for row, values in shown.items()])
        for base, others in (("mae", ROWS.keys() - {"mae"}),
                             ("dmae", ROWS.keys() - {"scratch", "mae", "dmae"}),
                             ("mae-long", {"dmae-long", "better", "better-long"})):
            rows = []
            for row, values in shown.items():
                against = list(map(difference_text, values, shown.get(base, [])))
                if row in others and any(against):
                    rows.append([ROWS[row][0], *against])
            if rows:
                out[f"{data}: difference from {ROWS[base][0]} (± standard error)"] = (
                    markdown(titles, rows))
        grid = []
        for name, (title, _) in SETTINGS.items():
            rows = [row if name == "taken" else f"{row}-{name}" for row in ("mae", "dmae")]
            values = [values_of(lines, data, row, "held-out") for row in rows]
            if any(values):
                grid.append([title, *map(mean_and_deviation, values)])
        if grid:
            out[f"{data}: linear probe on held-out training images"] = markdown(
                ["settings", ROWS["mae"][0], ROWS["dmae"][0]], grid)
        keep = []
        for share in ("1%", "10%"):
            for row in ("mae", "dmae"):
                values = [values_of(lines, data, row, f"keep{k}-{share}") for k in (2, 4)]
                if any(values):
                    seeds = set().union(*values)
                    whole = {seed: value for seed, value in
                             values_of(lines, data, row, share).items() if seed in seeds}
                    keep.append([ROWS[row][0], share.replace("%", " %"),
                                 *map(mean_and_deviation, [*values, whole])])
        if keep:
            out[f"{data}: only the first blocks kept"] = markdown(
                ["pre-training", "labels", "2", "4", "6 (all)"], keep)
        teachers = {row: [values_of(lines, data, row, column)
                          for column in ("knn", "linear", "pretrain")] for row in TEACHERS}
        teachers = [[TEACHERS[row][0], *map(mean_and_deviation, values)]
                    for row, values in teachers.items() if any(values[:2])]
        if teachers:
            out[f"{data}: the teacher"] = markdown(["", "k-NN", "linear", "minutes"], teachers)
        again = []
        for row, (title, _) in ALL_ROWS.items():
            cell = dict(data=data, row=row, column="pretrain").items()
            runs = [line for line in lines if cell <= line.items()]
            first = {line["seed"]: line["curve"][-1] for line in runs if "again" not in line}
            pairs = [(first[line["seed"]], line["curve"][-1]) for line in runs
                     if "again" in line and line["seed"] in first]
            if pairs and "mae" in pairs[0][0]:
                losses, neighbours = ([[x[key] for x in pair] for pair in pairs]
                                      for key in ("mae", "knn"))
                again.append([title, str(len(pairs)),
                              *(f"{statistics.mean(x):.4f}" for x in zip(*losses)),
                              *(f"{100 * statistics.mean(x):.1f}" for x in zip(*neighbours)),
                              f"{100 * max(abs(a - b) for a, b in neighbours):.1f}"])
        if again:
            out[f"{data}: trained again"] = markdown(
                ["pre-training", "students", "MAE loss", "again", "k-NN", "again",
                 "largest difference"], again)
    return out


def headline(lines, data):
    """The README's first table: what the labels are worth after each kind of pre-training."""
    rows = [[ROWS[row][0], *(mean_and_deviation(values_of(lines, data, row, column))
                             for column in ("1%", "100%"))]
            for row in ("scratch", "mae", "mae-long", "dmae")]
    return markdown(["pre-training", "1 % of the labels", "all labels, one epoch"], rows)


@torch.no_grad()
def picture(s, data, path, count=4):
    """Test images; their visible patches; D-MAE's prediction with these put back; and the scores
    that the class token has for the visible patches in the last block: of the untrained student, of
    D-MAE and of the teacher. Students of seed 0; of the teacher, the head whose scores vary most;
    of the students, what makes up for it: D-MAE's M, and the mixture of the untrained heads that is
    best on these images. All three are drawn on the teacher's scale.
    """
    saved = load_student(student(s, data, "dmae", 0))
    mae, (mixer,) = saved["mae"], saved["mixers"].values()
    torch.manual_seed(0)
    vits = [dmae.ViT(**mae.encoder.config), mae.encoder,
            dmae.load_vit(student(s, data, "teacher", 0))]
    images = next(iter(open_images(data, s.data_dir, mae.encoder, "cpu", 0).plain(
        torch.arange(count))))
    noise = torch.rand(count, math.prod(mae.encoder.grid),
                       generator=torch.Generator().manual_seed(0))      # as in reconstructions
    ids_keep = mae.choose(noise)
    scores = [vit(images, ids_keep, scores=[vit.depth])[0][vit.depth] for vit in vits]  # b h 1+k .
    mixers = [fit_mixer(scores[0], scores[2]), mixer, torch.eye(len(mixer))]
    rows = torch.stack([einsum(m, x[:, :, 0, 1:], "t s, b s k -> b t k")
                        for m, x in zip(mixers, scores)])                             # 3 b t k
    head = rows[2].var(dim=2).sum(dim=0).argmax()
    rows = rows[:, :, head]                                                           # 3 b k
    low, high = rows[2].amin(dim=1, keepdim=True), rows[2].amax(dim=1, keepdim=True)
    rows = ((rows - low) / (high - low)).clamp(0, 1)
    image, visible, _, both = dmae.reconstructions(mae, images)
    panels = [dmae.as_rgb(mae.encoder, panel) for panel in (image, visible, both)]
    hidden = torch.tensor([0.2, 0.25, 0.4]).view(1, 3, 1).repeat(count, 1, noise.shape[1])
    for row in rows:                                                          # b k, on blue: b 3 n
        patches = hidden.scatter(2, ids_keep[:, None].expand(-1, 3, -1),
                                 row[:, None].expand(-1, 3, -1))
        panels.append(F.interpolate(patches.unflatten(2, mae.encoder.grid), panels[0].shape[2:]))
    dmae.save_grid(torch.stack(panels, dim=1).flatten(0, 1), path, columns=len(panels))


def figures(lines, folder):
    """Curves over pre-training, mean and range over seeds, a file for each data set: its names."""
    try:
        import matplotlib
    except ImportError:
        print("(figures need pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    made = []
    for data in DATA:
        runs = {row: [line for line in lines if (line["data"], line["row"], line["column"]) == (
            data, row, "pretrain") and "again" not in line] for row in DRAWN}
        if not any(runs.values()):
            continue
        fig, axes = plt.subplots(1, 3, figsize=(13, 4.6), constrained_layout=True)
        ticks = {0.0}
        for n, (row, seeds) in enumerate(runs.items()):
            if not seeds:
                continue
            curves = [line["curve"] for line in seeds]
            each = seeds[0]["images"] / 1000 / max(1, len(curves[0]) - 1)
            ticks |= {each, each * (len(curves[0]) - 1)}
            for axis, key, unit in zip(axes, ("mae", "attn", "knn"), (1, 1, 100)):
                points = [(i * each, [unit * x[key] for x in epoch])
                          for i, epoch in enumerate(zip(*curves)) if key in epoch[0]]
                if points:
                    x, values = zip(*points)
                    axis.plot(x, list(map(statistics.mean, values)), color=f"C{n}", linewidth=1,
                              marker=".", label=ROWS[row][0])
                    axis.fill_between(x, list(map(min, values)), list(map(max, values)),
                                      color=f"C{n}", alpha=0.2, linewidth=0)
        pixels = next(seeds[0]["knn_pixels"] for seeds in runs.values() if seeds)
        axes[2].axhline(100 * pixels, color="grey", linestyle=":", linewidth=1, label="raw pixels")
        ticks = sorted(ticks)
        for axis, title in zip(axes, ("MAE loss", "distillation loss", "k-NN top-1, %")):
            axis.set_title(title)
            axis.set_xlabel("thousand images seen (logarithmic after the first epoch)")
            # Rows differ eightfold in length; linear up to the first epoch, which has 0 before it.
            axis.set_xscale("symlog", linthresh=ticks[1], linscale=0.3)
            axis.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
            axis.minorticks_off()
        axes[1].set_yscale("log")
        fig.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        fig.savefig(folder / f"study_{data}.png", dpi=80)
        plt.close(fig)
        made.append(f"study_{data}.png")
    return made


# ==================================================================================== command line


def make_parser():
    parser = Parser(prog="python -m experiments.study", allow_abbrev=False,
                    description="Pre-train and fine-tune small students, and compare.")
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA, default=["fashion-mnist"], help="[fashion-mnist]")
    add("--rows", nargs="+", choices=[*GROUPS["rows"], *ALL_ROWS], metavar="ROW",
        default=["mae", "dmae", "untrained"],
        help=f"{', '.join([*GROUPS['rows'], *ALL_ROWS])} [mae dmae untrained]")
    add("--columns", nargs="+", choices=[*GROUPS["columns"], *ALL_COLUMNS, "pretrain"],
        metavar="COLUMN", default=["knn", "linear", "1%"],
        help=(f"{', '.join([*GROUPS['columns'], *ALL_COLUMNS])}, pretrain (no more than that) "
              "[knn linear 1%]").replace("%", "%%"))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="[0 1 2]")
    add("--minutes", type=float, help="stop after this time; the same command again goes on [none]")
    add("--again", action="store_true", help="train students whose files are gone, by the same "
        "commands; one that comes out otherwise, as on another machine, gets a line of its own")
    add("--report", action="store_true", help="print tables and draw figures, run nothing")
    add("--picture", action="store_true", help="draw figures/study.png, from the first of --data "
        "and seed 0; run nothing")
    add("--results", default=str(RESULTS), metavar="FILE",
        help="lines of what has been measured [experiments/results/study.jsonl]")
    add("--runs", default="runs/study", metavar="DIR", help="where runs lie [runs/study]")
    add("--data-dir", default="data", metavar="DIR", help="where data sets lie [data]")
    return parser


def main(argv=None):
    """The command line; returns the tables, {name: Markdown}."""
    parser = make_parser()
    s = parser.parse_args(argv)
    with one_line_errors(parser, {}):
        folder = HERE / "figures" if Path(s.results) == RESULTS else Path(s.results).parent
        if s.picture:
            picture(s, s.data[0], folder / "study.png")
            print(folder / "study.png")
            return {}
        if not s.report:
            run_all(s)
        lines = read(s.results)
        if s.report and not lines:
            raise InputError(f"--results {s.results}: there are no lines in it yet")
        out = tables(lines)
        for name, table in out.items():
            print(f"\n{name}\n\n{table}", end="")
        if s.report:
            print()
            for name in figures(lines, folder):
                print(folder / name)
    return out


def cells(s):
    """The cells that were asked for, in their order."""
    def chosen(kind, names):
        known = {name: [name] for name in [*ALL_ROWS, *ALL_COLUMNS, "pretrain"]}
        groups = known | {name: list(group) for name, group in GROUPS[kind].items()}
        return dict.fromkeys(name for group in names for name in groups[group])

    for data, seed in itertools.product(s.data, s.seeds):
        for row, column in itertools.product(chosen("rows", s.rows), chosen("columns", s.columns)):
            if row != "scratch" or column in COLUMNS:        # there is nothing to pre-train or keep
                yield data, row, seed, column


def run_all(s):
    """Run what is missing: first what no other process is at, then, waiting for it, the rest."""
    if s.minutes is not None and not 1e-3 <= s.minutes < 10**6:
        raise InputError(f"--minutes {s.minutes}: must be from 0.001 to 1000000")
    if min(s.seeds) < 0:
        raise InputError(f"--seeds {min(s.seeds)}: must be 0 or more")
    s.commit, missing = commit(), list(cells(s))
    with open(s.results, "a"):                       # that it can be written, now, not in an hour
        pass

    def stop(*_):
        raise KeyboardInterrupt

    try:
        if s.minutes is not None:
            signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, 60 * s.minutes)
        for wait in (False, True):
            for cell in list(missing):
                if run(s, *cell, wait):
                    missing.remove(cell)
    except (KeyboardInterrupt, SystemExit) as stopped:
        # The programs end in 130 when interrupted; whatever else ended them has said why.
        if isinstance(stopped, SystemExit) and stopped.code != 130:
            raise
        print(f"stopped, {len(missing)} cells are left: the same command goes on")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
