"""Draws curves from training logs.

    python -m model.training.plot out/*.jsonl     # loss, learning rate and throughput -> curves.png
    python -m model.training.plot out/*.jsonl --save loss.png

`python web_server.py --watch` shows the same curves live at /training.
"""

import argparse
import glob
import math

from model.errors import BadInput, run_script

from .logs import read_log

PANELS = {"loss": ("loss", "val_loss"), "learning rate": ("lr",), "samples/s": ("samples_per_s",)}


def draw(runs, path):
    """Draws runs, as `read_log` returns them, into one picture: a panel for each of PANELS, a colour for each run."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadInput("drawing needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(len(PANELS), sharex=True), PANELS.items(), strict=True):
        for number, run in enumerate(runs):
            for name in names:
                points = run["curves"].get(name, [])
                steps = [step for step, _ in points]
                values = [math.nan if value is None else value for _, value in points]
                # val_loss has few points: mark each; without any, it is not in the legend
                if name == "val_loss":
                    label = f"{run['name']}, held out" if points else None
                    marker = "."
                else:
                    label = run["name"]
                    marker = None
                axes.plot(steps, values, color=f"C{number}", label=label, linewidth=1.2, marker=marker)
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
    parser.add_argument("logs", nargs="+", help=".jsonl files that training stages wrote")
    parser.add_argument("--save", default="curves.png", help="the picture to write (default %(default)s)")
    args = parser.parse_args()
    files = []
    for log in args.logs:
        files += sorted(glob.glob(log)) or [log]  # cmd.exe passes the * on
    runs = [read_log(file) for file in files]
    if len({run["name"] for run in runs}) < len(runs):  # the same stage in several folders: tell them apart by path
        for run, file in zip(runs, files, strict=True):
            run["name"] = file
    draw(runs, args.save)
    print(f"saved {args.save}: {len(files)} runs")


if __name__ == "__main__":
    run_script(main)
