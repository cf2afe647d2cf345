"""What is there to train with, what is missing and how to get it, and which scripts can run.

python -m model.doctor                                        # the parts published today, and those of 2024 if some are here
python -m model.doctor --dim 768 --n_layers 16                # for the large model
python -m model.doctor --parts v1 --vision_path MY_CLIP       # the files of 2024, or your own
python -m model.doctor --demo                                 # for the demo

It reads all weights and all records, but only a few pictures of each data set: `python -m dataset.check` opens all of
them. The exit code is 0 if 1-pretrain_vlm.py can run.
"""

import argparse
import hashlib
import os
import random
import re
import shutil
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from dataset.records import parse_record
from dataset.source import Source, place_inside

from .arguments import MAX_BAD_FRACTION, add_model_arguments, check_device, model_sizes, parse_with_demo
from .checkpoint import (
    KNOWN_TOKENIZERS,
    PUBLISHED_TOKENIZER,
    build_config,
    load_tokenizer,
    load_vlm,
    read_metadata,
    read_model,
    tokenizer_hash,
)
from .errors import BadInput, BadRecord, run_script
from .files import find_weights, in_repository
from .images import Preprocess
from .LMConfig import LMConfig
from .model_vlm import MiniMindVLM
from .stages import (
    DATA_REPOSITORY,
    DEMO_LLM,
    DEMO_MODEL,
    STAGES,
    Parts,
    answering_stage,
    published_parts,
    weights_path,
)
from .vision_utils import load_vision

SAMPLE = 20  # records that are checked besides the first and the last
SMALL = Preprocess(32)  # only whether a picture can be read matters
# on disk for each parameter: weights, resume state (with Adam's two), and the copy that replaces it
BYTES = 4 + 12 + 12
PUBLISHED_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "<": 30, ">": 32}


# --- single things --------------------------------------------------------------------------------------------------


def size_and_hash(file):
    """A file's size and the beginning of its SHA-256, so that people can compare copies."""
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return f"{file.stat().st_size / 1e6:.1f} MB, sha256 {digest.hexdigest()[:12]}"


def unlike_published(tokenizer):
    """The first difference between a tokenizer and the published one."""
    published = LMConfig().vocab_size
    if len(tokenizer) != published:
        return f"it has {len(tokenizer):,} tokens, not {published:,}"
    for token, wanted in PUBLISHED_IDS.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            return f"its {token} is token {found}, not {wanted}"
    return "it has other tokens"


def sample_of(source):
    """Counts the records of a Source; returns the count and (where, record) of the first, the last and a random sample.

    Reservoir sampling.
    """
    records = enumerate(source.records())
    kept = {}
    last = next(records, None)
    if last is None:
        return 0, []
    for following in records:
        number = last[0]
        slot = number if number <= SAMPLE else random.randint(1, number)  # 0 is the first record's
        if slot <= SAMPLE:
            kept[slot] = last
        last = following
    return last[0] + 1, list(dict([*kept.values(), last]).values())


def left_out(bad, looked_at):
    """A remark about bad records in the sample; BadRecord if there are more than training would skip."""
    if not bad:
        return ""
    remark = f"{len(bad)} of {looked_at} sampled records can't be used, the first: {bad[0]}"
    if len(bad) > MAX_BAD_FRACTION * looked_at:
        raise BadRecord(bad[0].reason, remark)
    return f"; {remark}"


def other_packages():
    """The packages whose versions are not those of requirements.txt."""
    for line in (Path(__file__).parent.parent / "requirements.txt").read_text(encoding="utf-8").splitlines():
        package = Requirement(line)
        if package.marker and not package.marker.evaluate():
            continue  # for another version of Python
        try:
            version = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            yield f"{package} is not installed"
            continue
        if version not in package.specifier:
            yield f"{package.name} is {version}, not {package.specifier}"


def device_facts(device):
    """A device's name and memory. BadInput if it can't be used."""
    check_device(device)
    kind = torch.device(device).type
    if kind == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB of memory"
    if kind == "mps":
        return f"{torch.mps.recommended_max_memory() / 1e9:.0f} GB of memory"
    if not hasattr(os, "sysconf"):  # Windows
        return f"{os.cpu_count()} cores"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{os.cpu_count()} cores, {memory / 1e9:.0f} GB of memory"


# --- the machine ----------------------------------------------------------------------------------------------------


def report(mark, what, place, says):
    """Prints a finding: ok, missing or wrong; where; and details, or what to do about it. Returns the mark."""
    between = ": " if mark == "ok" else f"\n{'':9}"
    print(f"{mark:<9}{what:<26}{place}{between}{says}", flush=True)
    return mark


def check_machine(args):
    """Reports packages, device and disk: {what: mark}."""
    other = list(other_packages())
    says = f"{'; '.join(other)}: pip install -r requirements.txt" if other else "all are there, in these versions"
    marks = {"packages": report("wrong" if other else "ok", "packages", "requirements.txt", says)}
    try:
        marks["device"] = report("ok", "device", args.device, device_facts(args.device))
    except BadInput as problem:
        marks["device"] = report("wrong", "device", args.device, problem)
    folder = Path(args.out_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    with torch.device("meta"):
        model = MiniMindVLM(build_config({}, None, None, sizes=model_sizes(args)))
    wanted = BYTES * sum(parameter.numel() for parameter in model.parameters())
    says = f"{free / 1e9:.2f} GB free, a stage writes up to {wanted / 1e9:.2f}"
    writable = folder.is_dir() and os.access(folder, os.W_OK)
    if free < wanted:
        says += ": make room, or name another --out_dir"
    if not writable:
        says = f"{folder} is not a writable folder: name another --out_dir"
    mark = "ok" if writable and free >= wanted else "wrong"
    return {**marks, "disk": report(mark, "disk", args.out_dir, says)}


# --- one part after the other ---------------------------------------------------------------------------------------


class Doctor:
    """Checks Parts one by one and prints what it finds; `marks` keeps each result: ok, missing or wrong.

    marks: those of the machine. tokenizer, encoder: None until they are found to be good. source: the records that were last
    looked at.
    """

    def __init__(self, args, parts, marks):
        self.args = args
        self.parts = parts
        self.marks = dict(marks)
        self.tokenizer = self.encoder = self.source = None
        # published parts have their own sizes
        self.sizes = {"max_seq_len": args.max_seq_len} if parts.llm_repository else model_sizes(args)
        named_after = argparse.Namespace(dim=parts.dim, use_moe=args.use_moe and not parts.llm_repository)
        self.weights = {"llm": Path(parts.llm)}
        for stage in STAGES.values():
            self.weights[stage.writes] = weights_path(args.out_dir, named_after, stage.writes)

    def command(self, name):
        flags = f" --out_dir {self.args.out_dir}" if self.args.out_dir != in_repository("out") else ""
        if self.args.demo:
            return f"python {STAGES[name].command} --demo{flags}"
        flags += " --use_moe" if self.args.use_moe and not self.parts.llm_repository else ""
        return self.parts.command(name) + flags

    def report(self, mark, what, place, says):
        self.marks[what] = report(mark, what, place, says)

    def check_file(self, what, file, get, check):
        """Reports a file: what `check()` says of it (or its BadInput), or `get`, how to obtain it."""
        if not file.is_file():
            belongs = file.parent == Path(DEMO_LLM).parent
            self.report(
                "missing", what, file, f"it comes with MiniMind-V: git checkout {file.parent}" if belongs else get
            )
            return
        place = file
        try:
            place = f"{file}, {size_and_hash(file)}"
            self.report("ok", what, place, check())
        except OSError as error:
            self.report("wrong", what, place, f"it could not be read ({error.strerror})")
        except BadInput as problem:
            self.report("wrong", what, place, problem)

    def check_encoder(self):
        self.encoder = encoder = load_vision(self.parts.vision_path)
        size = encoder.preprocess.size
        return f"{encoder.image_tokens} tokens, {encoder.vision_width} wide, for a picture of {size}x{size}"

    def check_tokenizer(self):
        """Accepts the published ones, and any that some weights here say they were trained with."""
        self.tokenizer = load_tokenizer(self.parts.tokenizer_path)
        own_hash = tokenizer_hash(self.tokenizer)
        count = f"{len(self.tokenizer):,} tokens"
        if own_hash == PUBLISHED_TOKENIZER:
            return f"{count}, the published one"
        if own_hash in KNOWN_TOKENIZERS:
            return f"{count}, {KNOWN_TOKENIZERS[own_hash]}'s"
        for file in self.weights.values():
            if read_metadata(file).get("tokenizer") == own_hash:
                return f"{count}, the ones that {file} was trained with"
        if self.parts.llm == self.parts.tokenizer_path:
            return f"{count}, from the folder of the language model"
        raise BadInput(
            f"it is not the published minimind_tokenizer ({unlike_published(self.tokenizer)}), and no weights here say "
            "that they were trained with it: take the one of the first MiniMind-V"
        )

    def check_weights(self, name):
        path = self.weights[name]
        state, metadata, told = read_model(path)
        encoder = self.encoder
        if encoder and metadata["config"].get("drop_class_token"):
            encoder = load_vision(self.parts.vision_path, drop_class_token=True)
        config = build_config(metadata, self.tokenizer, encoder, self.sizes, told)
        is_llm = name == "llm"
        _, summary = load_vlm(path, config, self.tokenizer, encoder, state, metadata, allow_missing_projector=is_llm)
        return summary.rpartition(", ")[2]

    def check_models(self):
        parts = self.parts
        vision, tokenizer, llm = Path(parts.vision_path), Path(parts.tokenizer_path), Path(parts.llm)
        other_formats = ' --exclude "*.h5" --exclude "*.msgpack"' if "openai" in parts.vision_repository else ""
        get = f"get it with: hf download {parts.vision_repository} --local-dir {vision}{other_formats}"
        self.check_file("encoder", find_weights(vision), get, self.check_encoder)
        get = f"get it with: hf download {parts.llm_repository} --local-dir {llm}"
        if not parts.llm_repository:
            get = f"copy model/minimind_tokenizer of the first MiniMind-V into {tokenizer}"
        self.check_file("tokenizer", tokenizer / "tokenizer.json", get, self.check_tokenizer)
        if not parts.llm_repository:
            get = "copy the published one there, or do without: python 1-pretrain_vlm.py --from_scratch"
        file = find_weights(llm) if parts.llm_repository else llm
        self.check_file(llm.name, file, get, partial(self.check_weights, "llm"))
        for name, stage in STAGES.items():
            file = self.weights[stage.writes]
            get = f"made by: {self.command(name)}"
            if not parts.llm_repository and not self.args.demo:
                get += ", or copy the published one there"
            self.check_file(file.name, file, get, partial(self.check_weights, stage.writes))

    def check_data(self, name, stage):
        """Reports the records and the pictures that a stage reads, a few of each."""
        file = Path(self.parts.data_paths[name])
        folder = Path((stage.demo if self.args.demo else stage.defaults)["images_path"])
        get = "get the data of the first MiniMind-V, as dataset/README.md says"
        if file.suffix == ".parquet":
            get = (
                f"get it with: hf download {DATA_REPOSITORY} {file.name} --repo-type dataset --local-dir {file.parent}"
            )
        if self.args.demo:
            get = f"delete {file.parent}, and the scripts draw it again"
            if not (file.parent / "world.json").exists():
                for what, place in (("records", file), ("pictures", folder)):
                    self.report("ok", f"{name} {what}", place, "will be drawn by the first script that runs")
                return
        names = []  # of the pictures of each sampled record
        self.check_file(f"{name} records", file, get, partial(self.check_records, file, folder, names))
        if names or file.suffix != ".parquet":
            self.check_pictures(f"{name} pictures", folder, names, get)
        else:  # they are in the file of the records
            self.marks[f"{name} pictures"] = "ok"

    def check_records(self, file, folder, names):
        self.source = Source(file, folder, self.args.out_dir)
        count, sample = sample_of(self.source)
        bad = []
        for where, record in sample:
            try:
                _, its_names = parse_record(record, where, LMConfig().image_special_token)
                names.append(its_names)
            except BadRecord as problem:
                bad.append(problem)
        return f"{count:,} records{left_out(bad, len(sample))}"

    def check_pictures(self, what, folder, names, get):
        try:
            if any(place_inside(name) is None for its_names in names for name in its_names):
                self.source.open_images_path()
                self.source.compare_names({name for its_names in names for name in its_names})
            elif not names and not folder.exists():
                raise BadInput(get)
        except BadInput as problem:
            self.report("missing", what, folder, f"{problem}; or {get}" if folder.exists() else get)
            return
        bad = []
        for its_names in names:
            try:
                for name in its_names:
                    self.source.read_pixels(name, SMALL)
            except BadRecord as problem:
                bad.append(problem)
        try:
            remark = left_out(bad, len(names))
            self.report("ok", what, folder, f"checked in {len(names)} sampled records{remark}")
        except BadRecord as problem:
            mark = "missing" if problem.reason == "picture missing" else "wrong"
            self.report(mark, what, folder, f"{problem}; or {get}")

    def ready(self, command, weights, data=()):
        """Prints whether a script can run, and returns that. weights: their name; data: what else it needs.

        Other versions of packages don't matter: what the script imports has been imported here.
        """
        needed = ["encoder", "tokenizer", self.weights[weights].name, "device", *data]
        lacking = [f"{what} {self.marks[what]}" for what in needed if self.marks[what] != "ok"]
        reason = f" ({', '.join(lacking)})" if lacking else ""
        print(f"{'not ready' if lacking else 'ready'}: {command}{reason}")
        return not lacking

    def examine(self):
        """Checks everything; True if the first stage can run."""
        self.check_models()
        for name, stage in STAGES.items():
            self.check_data(name, stage)
        print()
        verdicts = [
            self.ready(self.command(name), stage.starts_from, (f"{name} records", f"{name} pictures", "disk"))
            for name, stage in STAGES.items()
        ]
        flags = re.sub(r" --data_path \S+", "", self.command("sft").partition(".py")[2])
        self.ready(f"python 3-eval_chat.py{flags}", answering_stage(multi=False).writes)
        return verdicts[0]


def parts_to_check(args):
    """The Parts that the flags ask for; without any, those of today, and those of 2024 if one of its own files is here."""
    if args.demo and args.parts:
        raise BadInput("--demo has its own parts: leave out --parts")
    if args.demo:
        data_paths = {name: stage.demo["data_path"] for name, stage in STAGES.items()}
        demo = args.dim, DEMO_LLM, None, args.tokenizer_path, args.vision_path, ""
        return [Parts("the demo", *demo, data_paths)]
    published = published_parts(args)
    if args.parts:
        return [published[args.parts]]
    v1 = published["v1"]
    files = [v1.llm, Path(v1.tokenizer_path) / "tokenizer.json", *v1.data_paths.values()]
    if not any(Path(file).exists() for file in files):
        del published["v1"]
    return list(published.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--parts", choices=["minimind2", "minimind3", "v1"], help="look at these only")
    args = parse_with_demo(parser, DEMO_MODEL)
    build_config({}, None, None, sizes=model_sizes(args))  # refuses flags that fit no model
    marks = check_machine(args)
    found_ready = False
    for parts in parts_to_check(args):
        print(f"\n{parts.title}")
        found_ready |= Doctor(args, parts, marks).examine()
    sys.exit(not found_ready)


if __name__ == "__main__":
    run_script(main)
