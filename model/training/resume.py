"""Resume states: what a run saves in order to continue as if it had never stopped, and what must not change meanwhile.

A state is saved beside the weights: `x_resume.pth` beside `x.pth`. It holds no random numbers: every step reseeds from
(seed, step, rank), and samplers from (seed, epoch), so the step alone says where a run is.
"""

import json

import torch

from model.checkpoint import encoder_hash, tokenizer_hash
from model.errors import BadInput
from model.files import read_tensors, write_atomically

FORMAT = 3  # raise it with every change of what a state holds

# flags that decide what a step computes; batch size, accumulation and processes may change if their product stays the same
FIXED_SIZES = ("dim", "n_layers", "n_heads", "n_kv_heads", "max_seq_len", "use_moe", "projector")
FIXED_SIZES += ("drop_class_token",)
FIXED_FLAGS = ("epochs", "learning_rate", "grad_clip", "warmup_iters", "seed", "freeze_llm", "val_fraction")
FIXED_FLAGS += ("batch_tokens",)


def state_file(weights_file):
    """The resume state's file, beside the weights."""
    return weights_file.with_name(f"{weights_file.stem}_resume.pth")


def read_state(path):
    """The state that `save_state` wrote; None if there is no file. BadInput if it is corrupt or of another version."""
    if not path.exists():
        return None
    try:
        state = read_tensors(path)
    except BadInput:
        raise BadInput(f"{path} is truncated or corrupt: start over without --resume") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise BadInput(
            f"{path} was written by another version of MiniMind-V: resume with that version, or start over without "
            "--resume"
        )
    return state


def save_state(path, run):
    """Writes the state of a `trainer.Run`. OSError if that fails; an older state is then kept."""
    write_atomically(path, lambda file: torch.save(state_dict(run), file))


def global_batch_size(args, world_size, state):
    """Samples per optimizer step over all processes and micro-batches; with --batch_tokens, batches per step.

    A run that is resumed with the same flags on another number of processes keeps the size that it started with.
    """
    if state and state["batching"] == [args.batch_size, args.accumulation_steps]:
        return state["invariants"]["global batch size"]
    per_process = 1 if args.batch_tokens else args.batch_size
    return per_process * args.accumulation_steps * world_size


def resume_invariants(run):
    """What must be the same in a run and its continuation, by the names that messages use."""
    return {
        **{f"--{name}": getattr(run.model.config, name) for name in FIXED_SIZES},
        **{f"--{name}": getattr(run.args, name) for name in FIXED_FLAGS},
        "global batch size": run.sampler.step_size,
        "precision": str(run.dtype),
        "checksum of the data": run.data_checksum,
        "tokenizer": tokenizer_hash(run.tokenizer),
        "CLIP": encoder_hash(run.encoder),
        "preparation of pictures": str(tuple(run.encoder.preprocess)),
    }


def state_dict(run):
    """Everything that `load_state_dict` needs, as `torch.load(weights_only=True)` can read it."""
    return {
        "format": FORMAT,
        "invariants": resume_invariants(run),
        "batching": [run.args.batch_size, run.args.accumulation_steps],
        "step": run.step,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "running_stats": run.stats.state_dict(),
        "wandb_id": run.wandb_id,
        "problems": {reason: sorted(numbers) for reason, numbers in run.problems.by_reason.items()},
        "metadata": json.dumps({"config": json.loads(run.model.config.to_json_string()), "training": run.history}),
    }


def load_state_dict(run, state):
    """Puts a run back to where `state` was saved. BadInput lists every invariant that differs."""
    # refuse to continue as something else: the losses would no longer be those of one run
    invariants = resume_invariants(run)
    different = []
    for name, saved_value in state["invariants"].items():
        if invariants.get(name) != saved_value:
            different.append(f"{name} is {invariants.get(name)}, was {saved_value}")
    if different:
        raise BadInput(
            f"{state_file(run.weights_file)} belongs to a different run ({'; '.join(different)}): use its settings, or "
            "start over without --resume"
        )

    # the weights, and what the optimizer has accumulated
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])

    # where it is; statistics too, as it may have been saved between two log lines
    run.step = state["step"]
    run.stats.load_state_dict(state["running_stats"])
    run.problems.merge([state["problems"]])

    # the run at Weights & Biases to continue
    run.wandb_id = state["wandb_id"]
