"""What the README's first commands give, over several seeds: python -m experiments.first_run

Runs `python dmae.py` with the teacher in weights/ and without one, fine-tunes the students, the
teacher and a network from scratch with 1 % and with all of the labels, one line of --results for
each command, and prints the README's table. What is in --results already is not run again.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from data import require, write
from dmae import command_line

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "weights/shapes_teacher.pth"
PRETRAINED = {"MAE": "--teacher none", "D-MAE": ""}
STARTS = {"none (scratch)": "none", "MAE": "{runs}/MAE-{seed}/student.pth",
          "D-MAE": "{runs}/D-MAE-{seed}/student.pth", "MAE, the teacher": TEACHER}
COLUMNS = {"1 %": "--label-fraction 0.01", "all": ""}
FLAGS = {
    "seeds": ("0,1,2,3,4", "N,...", "seeds of pre-training and of fine-tuning"),
    "runs": ("runs/first_run", "DIR", "where the runs are written"),
    "results": (str(Path(__file__).with_name("results") / "first_run.jsonl"), "FILE",
                "a line of JSON for each command"),
}


def commit():
    """The commit that runs, with -dirty where files were changed since; None outside of git."""
    if not shutil.which("git"):
        return None
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or None


def read(path):
    return list(map(json.loads, Path(path).read_text().splitlines())) if Path(path).exists() else []


def run(path, lines, key, command, out):
    """Run a command and add a line to the results: `key`, what it measured, how long it took."""
    if any(key.items() <= line.items() for line in lines):
        return
    print("$ python", command, flush=True)
    began = time.perf_counter()
    program, *flags = command.split()
    process = subprocess.run([sys.executable, ROOT / program, *flags, "--out", str(out)])
    require(process.returncode == 0, f"python {command} failed")
    minutes = (time.perf_counter() - began) / 60
    first, *_, last = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = ({name: first[name] for name in ("knn_pixels", "knn_teacher") if name in first}
             | dict(untrained=first["knn"], top1=last["knn"]) if "knn" in first
             else dict(top1=last["top1"]))
    lines.append(key | found | dict(minutes=round(minutes, 2), commit=commit(),
                                    command=f"python {command}"))
    write(Path(path), lambda temporary: temporary.write_text(
        "".join(json.dumps(line) + "\n" for line in lines)))


def summary(values, seeds):
    """Mean ± deviation, and behind it how many values there are if not `seeds`; "" of none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    few = "" if len(values) == seeds else f" ({len(values)})"
    return f"{statistics.mean(values):.1f}{spread}{few}"


def table(lines):
    """The README's table, in Markdown: mean ± deviation over seeds, in percent, and behind it how
    many seeds there are if not all."""
    seeds = len({line["seed"] for line in lines})

    def cell(row, column, name="top1", unit=100):
        values = [unit * line[name] for line in lines
                  if (line["row"], line["column"]) == (row, column) and name in line]
        return summary(values, seeds)

    yield "| pre-training | minutes | k-NN | 1 % of the labels | all labels |"
    yield "|---|---|---|---|---|"
    for row in STARTS:
        knn = cell(row, "k-NN") or cell("D-MAE", "k-NN", {
            "none (scratch)": "untrained", "MAE, the teacher": "knn_teacher"}.get(row, ""))
        yield (f"| {row} | {cell(row, 'k-NN', 'minutes', 1)} | {knn} | "
               + " | ".join(cell(row, column) for column in COLUMNS) + " |")


def main(argv=None):
    with command_line("experiments.first_run", FLAGS, argv) as given:
        s = {name: flag[0] for name, flag in FLAGS.items()} | given
        lines, runs = read(s["results"]), Path(s["runs"])
        for seed in s["seeds"].split(","):
            for row, flags in PRETRAINED.items():
                run(s["results"], lines, dict(row=row, column="k-NN", seed=int(seed)),
                    f"dmae.py --seed {seed} {flags}".strip(), runs / f"{row}-{seed}")
            for row, init in STARTS.items():
                for number, (column, flags) in enumerate(COLUMNS.items()):
                    command = f"finetune.py --init {init} --seed {seed} {flags}".strip()
                    run(s["results"], lines, dict(row=row, column=column, seed=int(seed)),
                        command.format(runs=runs, seed=seed),
                        runs / f"tuned-{list(STARTS).index(row)}{number}-{seed}")
        print("\n".join(table(lines)))


if __name__ == "__main__":
    main()
