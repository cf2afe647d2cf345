"""Scripts in processes that are forked from one which has imported PyTorch and transformers already: it saves 4 s each."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# what takes long; nothing of this repository, which each process imports itself
HEAVY = ["torch", "torch.utils.data", "transformers", "transformers.generation", "PIL.Image", "flask"]
HEAVY += ["transformers.models.clip.modeling_clip"]
THERE = "forkserver" in multiprocessing.get_all_start_methods() and sys.platform == "linux"  # macOS forks at its peril
if THERE:
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(HEAVY)


def run_warm(command, cwd, environment, timeout=600):
    """What `python COMMAND...` does: (exit code, stdout, stderr). Killed after so many seconds, as subprocess.run does."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=become, args=(command, cwd, environment, outputs))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        return process.exitcode, *(output.read_text(encoding="utf-8") for output in outputs)


def become(command, cwd, environment, outputs):
    """In the new process: is `python COMMAND...` from here on."""
    for number, output in enumerate(outputs, 1):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), number)
    multiprocessing.set_start_method(None, force=True)  # its own processes start as everywhere
    os.chdir(cwd)
    os.environ |= environment
    module = command[0] == "-m"
    sys.argv = list(command[module:])
    sys.path[:0] = [str(cwd) if module else str(Path(cwd, command[0]).parent)]
    if module:
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(command[0], run_name="__main__")
