"""Curves from the logs of trainings.

    python -m model.training.plot out/*.jsonl     # one picture, curves.png, of loss, learning rate and throughput
    python -m model.training.plot out/*.jsonl --save loss.png

`python web_server.py` shows the same at /training while a training runs.
"""

import argparse
import glob
import math

from model.errors import BadInput, run_script

from .logs import read_log

PANELS = {"loss": ("loss", "val_loss"), "learning rate": ("lr",), "samples/s": ("samples_per_s",)}


def draw(runs, path):
    """All runs in one picture, a panel for each of PANELS."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("to draw, matplotlib is needed: pip install matplotlib") from None
    figure = Figure(figsize=(7, 8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(PANELS), sharex=True), PANELS.items(), strict=True):
        for number, run in enumerate(runs):
            for name in names:
                points = run["curves"].get(name, [])
                steps, values = [step for step, _ in points], [math.nan if y is None else y for _, y in points]
                measured = name == "val_loss"
                label = f"{run['name']}, held out" if measured and points else None if measured else run["name"]
                axes.plot(
                    steps, values, color=f"C{number}", label=label, linewidth=1.2, marker="." if measured else None
                )
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.axes[-1].set_xlabel("step")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} could not be written ({error})") from None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", help=".jsonl files of trainings")
    parser.add_argument("--save", default="curves.png", help="the picture to write (default %(default)s)")
    args = parser.parse_args()
    files = [file for log in args.logs for file in sorted(glob.glob(log)) or [log]]  # cmd.exe leaves the * in
    runs = [read_log(file) for file in files]
    if len({run["name"] for run in runs}) < len(runs):  # of the same stage, in several folders
        for run, file in zip(runs, files, strict=True):
            run["name"] = file
    draw(runs, args.save)
    print(f"saved {args.save}: {len(files)} runs")


if __name__ == "__main__":
    run_script(main)
