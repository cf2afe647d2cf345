"""The log of a run: written while it trains, and read by what draws curves.

A log is a .jsonl file. A run, or its continuation, starts with {"run", "step", "steps", "time", "args"}. A line of
metrics has "step" and some of "loss", "lr", "samples_per_s", "grad_norm", "epoch", "skipped", "val_loss", "epoch_Time".
The last line is {"left_out"}: how many records were not used, by reason.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from model.errors import BadInput


class Log:
    """Where a run's metrics go: a progress bar or plain lines, a JSON-lines file, and Weights & Biases if asked for.

    step: the step the run resumes at, or 0; what an interrupted run has logged beyond it is removed from the file.
    """

    def __init__(self, args, name, step, steps, wandb_id=None):
        path = Path(args.out_dir) / f"{name}.jsonl"
        start = {"run": name, "step": step, "steps": steps, "time": time.time(), "args": vars(args)}
        try:
            if step and path.exists():
                os.truncate(path, size_up_to(path, step))
            self.file = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
            self.file.write(json.dumps(start) + "\n")
        except OSError as error:
            raise BadInput(f"{path} could not be written ({error.strerror}): name another --out_dir") from None
        self.bar = tqdm(
            total=steps,
            initial=step,
            desc=name,
            disable=not (args.log_interval and sys.stderr.isatty()),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",  # fits 80 columns
        )
        self.first_step = step
        self.steps = steps
        self.started = time.time()
        self.write_failed = False
        self.wandb = self.open_wandb(args, wandb_id) if args.use_wandb else None

    @staticmethod
    def open_wandb(args, wandb_id):
        """The run at Weights & Biases; None, with a message, if there can't be one."""
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds to reach the server
        import wandb

        try:
            return wandb.init(
                project=args.wandb_project, name=args.wandb_run_name, config=vars(args), id=wandb_id, resume="allow"
            )
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            tell(
                f"no Weights & Biases ({reason}): set WANDB_MODE=offline to log here and sync later; continuing without"
            )
            return None

    @property
    def wandb_id(self):
        return self.wandb.id if self.wandb else None

    def write(self, step, metrics):
        """Logs metrics, {name: number}, of a step."""
        # the time left, in minutes, from the mean time per step since the start; minimind's logs call it epoch_Time
        seconds_per_step = (time.time() - self.started) / (step - self.first_step)
        minutes_left = seconds_per_step * (self.steps - step) / 60
        metrics = {**metrics, "epoch_Time": minutes_left}

        # flush every line, so that curves can be watched live; a full disk doesn't end the training
        try:
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.write_failed:
                tell(f"{self.file.name} could not be written ({error.strerror}); training continues")
            self.write_failed = True
        if self.wandb:
            self.wandb.log(metrics, step=step)

        # for the terminal: a bar, or a line if the output goes to a file
        if self.bar.disable:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name != "epoch_Time")
            print(f"step {step}/{self.steps}: {shown}, {minutes_left:.1f} min left", flush=True)
        else:
            self.bar.set_postfix({name: f"{metrics[name]:.4g}" for name in ("loss", "val_loss") if name in metrics})
            self.bar.update(step - self.bar.n)

    def close(self, left_out):
        """left_out: how many records were not used, by reason."""
        self.bar.close()
        try:
            self.file.write(json.dumps({"left_out": left_out}) + "\n")
            self.file.close()
        except OSError:
            pass  # `write` has reported it
        if self.wandb:
            self.wandb.finish()


def size_up_to(path, step):
    """Bytes of a log up to the last line that its last run wrote of steps up to `step`; what follows is of later ones.

    Cutting the end off keeps the rest on disk, where a process that is killed can't lose it.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if line.startswith(b'{"run"')]
    kept = starts[-1] if starts else 0
    while kept < len(lines) and step_of(lines[kept]) <= step:
        kept += 1
    return sum(map(len, lines[:kept]))


def step_of(line):
    """The step of a line of the log; infinity for a truncated line and for one without a step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")


def tell(text):
    """Prints to stderr without breaking the progress bar."""
    tqdm.write(text, file=sys.stderr)
    sys.stderr.flush()


def read_log(path):
    """The last run in a log that `Log` wrote: {"name", "step", "steps", "minutes_left", "curves"}.

    minutes_left is None before the first metrics and after the end. curves: for each metric its points [step, value],
    with None for a value that is not finite. Truncated lines are skipped: a running training may be writing the last.
    BadInput if the file can't be read or has no run.
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
            # a start from step 0 is a new run; a resumed one continues its curves
            if run is None or not entry.get("step"):
                run = {"name": entry["run"], "step": 0, "steps": entry.get("steps", 0), "curves": {}}
            run["minutes_left"] = None
        elif run and "left_out" in entry:
            run["minutes_left"] = None
        elif run and "step" in entry:
            # the other entries of the line are metrics
            run["step"] = entry.pop("step")
            run["minutes_left"] = entry.pop("epoch_Time", None)
            for name, value in entry.items():
                is_finite = isinstance(value, int | float) and math.isfinite(value)
                run["curves"].setdefault(name, []).append([run["step"], value if is_finite else None])
    if run is None:
        raise BadInput(f"{path} is not a training log: pass .jsonl files that a training stage wrote")
    return run
