"""The log of a run: written while it trains, and read by what draws curves."""

import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from model.errors import BadInput


class Log:
    """Where the figures of a run go: a bar or plain lines, a JSON-lines file, and Weights & Biases if asked.

    step: where the run continues; what the file has beyond it, of a run that was cut off, is taken out.
    """

    def __init__(self, args, name, step, steps, wandb_id=None):
        path = Path(args.out_dir) / f"{name}.jsonl"
        try:
            self.file = open(path, "r+" if step and path.exists() else "a", encoding="utf-8")  # noqa: SIM115
            if step:
                self.forget_beyond(step)
            self.file.write(
                json.dumps({"run": name, "step": step, "steps": steps, "time": time.time(), "args": vars(args)}) + "\n"
            )
        except OSError as error:
            raise BadInput(f"{path} could not be written ({error.strerror}): name another --out_dir") from None
        self.bar = tqdm(total=steps, initial=step, desc=name, disable=not sys.stderr.isatty())
        self.first, self.steps, self.begun = step, steps, time.time()
        self.full = False
        self.wandb = self.open_wandb(args, wandb_id) if args.use_wandb else None

    def forget_beyond(self, step):
        """Cuts the file before the first line of the last run that tells of a later step."""
        lines = self.file.readlines()
        last = max((i for i, line in enumerate(lines) if line.startswith('{"run"')), default=0)
        kept = lines[:last] + [line for line in lines[last:] if whole_step(line) <= step]
        self.file.seek(0)
        self.file.truncate()
        self.file.writelines(kept)

    @staticmethod
    def open_wandb(args, wandb_id):
        """The run at Weights & Biases, or None, with a word about it, where there can be none."""
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds in which it must be reached
        import wandb

        try:
            return wandb.init(
                project=args.wandb_project, name=args.wandb_run_name, config=vars(args), id=wandb_id, resume="allow"
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            tell(f"no Weights & Biases ({reason}): set WANDB_MODE=offline to log here and sync later; going on without")
            return None

    @property
    def wandb_id(self):
        return self.wandb.id if self.wandb else None

    def write(self, step, figures):
        left = (time.time() - self.begun) / (step - self.first) * (self.steps - step) / 60
        figures = {**figures, "epoch_Time": left}
        try:
            self.file.write(json.dumps({"step": step, **figures}) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.full:
                tell(f"{self.file.name} could not be written ({error.strerror}); training goes on")
            self.full = True
        if self.wandb:
            self.wandb.log(figures, step=step)
        if self.bar.disable:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if name != "epoch_Time")
            print(f"step {step}/{self.steps}: {shown}, {left:.1f} min left", flush=True)
        else:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in figures.items()})
            self.bar.update(step - self.bar.n)

    def close(self, left_out):
        """left_out: how many records were not used, by reason."""
        self.bar.close()
        try:
            self.file.write(json.dumps({"left_out": left_out}) + "\n")
            self.file.close()
        except OSError:
            pass  # told before
        if self.wandb:
            self.wandb.finish()


def whole_step(line):
    """The step of a line of the log; infinity for a line that was cut off in the middle."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def tell(text):
    """A line for the person who watches, beside a bar that may be moving."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def read_log(path):
    """The last run in a log that `Log` wrote: {"name", "step", "steps", "minutes_left", "curves"}.

    minutes_left is None before the first figures and after the end. curves: for each figure its points, [step, value], with
    None where the value is not a finite number. Lines that are not whole are passed over, as the last one of a running
    training may be. BadInput if the file can't be read or has no run.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise BadInput(f"{path} could not be read ({error.strerror})") from None
    run = None
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and "run" in entry:
            if run is None or not entry.get("step"):  # one that is resumed goes on where it was
                run = {"name": entry["run"], "step": 0, "steps": entry.get("steps", 0), "curves": {}}
            run["minutes_left"] = None
        elif run and "left_out" in entry:
            run["minutes_left"] = None
        elif run and "step" in entry:
            run["step"], run["minutes_left"] = entry.pop("step"), entry.pop("epoch_Time", None)
            for name, value in entry.items():
                point = [run["step"], value if isinstance(value, int | float) and math.isfinite(value) else None]
                run["curves"].setdefault(name, []).append(point)
    if run is None:
        raise BadInput(f"{path} is not the log of a training: name .jsonl files that a stage wrote")
    return run
