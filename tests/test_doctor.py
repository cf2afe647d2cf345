"""`python -m model.doctor`, as someone calls it who is about to train: files are made, spoilt, and told of."""

import hashlib
import json
import shutil

import pytest
from helpers import ROOT, generation_tokenizer, run_python, save_random_vlm, write_parquet
from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dataset.source import Source
from model.checkpoint import load_tokenizer
from model.doctor import left_out, sample_of, unlike_published
from model.errors import BadRecord

CLIP, TOKENIZER = "model/clip_model/clip-vit-base-patch32", "model/minimind_tokenizer"
V1 = ["--parts", "v1"]
SIZES = ["--dim", 64, "--n_layers", 2, "--n_heads", 4, "--n_kv_heads", 2]
WEIGHTS = [f"64_{stage}.pth" for stage in ("llm", "vlm_pretrain", "vlm_sft", "vlm_sft_multi")]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 605157884\n"


def clone_into(folder):
    """What the doctor needs of the repository, as a clone has it."""
    for file in (ROOT / "requirements.txt", *(ROOT / "model").rglob("*.py"), *(ROOT / "dataset").rglob("*.py")):
        (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / file.relative_to(ROOT))


def doctor(folder, *flags):
    """What it finds in a folder, as a clone of the repository: exit code, {what: (mark, all that it says of it)}, and its
    verdicts."""
    clone_into(folder)
    code, out, err = run_python("-m", "model.doctor", *flags, cwd=folder)
    assert not err, err
    machine, findings, verdicts = out.split("\n\n")
    found = {}
    findings = machine + "\n" + findings.partition("\n")[2]
    for line in findings.replace("\n" + " " * 9, "\n\t").replace("\n\t", "\t").splitlines():
        found[line[9:35].strip()] = (line[:9].strip(), line[35:])
    return code, found, verdicts.splitlines()


def marks(found, mark):
    return [what for what, (its_mark, _) in found.items() if its_mark == mark]


@pytest.fixture
def home(tmp_path, world, tiny_clip, tokenizer):
    """A folder in which all that 64+2 needs lies where the scripts look for it."""
    home = tmp_path / "home"
    shutil.copytree(tiny_clip, home / CLIP)
    shutil.copytree(ROOT / "model/demo", home / TOKENIZER, ignore=shutil.ignore_patterns("[!t]*"))
    (home / "out").mkdir()
    for name in WEIGHTS:
        save_random_vlm(home / "out" / name, tokenizer)
    for stage in ("pretrain", "sft", "sft_multi"):
        folder = home / "dataset" / f"{stage}_images"
        folder.mkdir(parents=True)
        records = json.loads((world / f"{stage}.json").read_text(encoding="utf-8"))
        for picture in {name for record in records for name in record["image"].split(", ")}:
            coco = "COCO_train2014_" if stage == "sft" else ""
            shutil.copy(world / "images" / picture, folder / f"{coco}{picture}")
        shutil.copy(world / f"{stage}.json", home / "dataset" / f"{stage}_vlm_data.json")
    return home


def test_all_is_there(home):
    code, found, verdicts = doctor(home, *V1, *SIZES, "--device", "cpu")
    assert code == 0 and marks(found, "ok") == [*found]
    said = {what: text for what, (_, text) in found.items()}
    assert said["encoder"].endswith(": 5 tokens, 48 wide, for a picture of 64x64")
    assert said["tokenizer"].endswith(": 940 tokens, the ones that out/64_llm.pth was trained with")
    content = (home / "out/64_vlm_sft.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:12]
    assert said["64_vlm_sft.pth"] == (
        f"out/64_vlm_sft.pth, {len(content) / 1e6:.1f} MB, sha256 {digest}: 161,856 parameters of language model and projector"
    )
    assert said["pretrain records"].endswith(": 48 records")
    assert said["sft pictures"] == "dataset/sft_images: checked in 22 sampled records"
    assert said["sft_multi records"].startswith("dataset/sft_multi_vlm_data.json, ")
    assert "cores" in said["device"] and "GB free" in said["disk"]
    assert verdicts == [
        "ready: python 1-pretrain_vlm.py --dim 64",
        "ready: python 2-sft_vlm.py --dim 64",
        "ready: python 2-sft_vlm.py --multi --dim 64",
        "ready: python 3-eval_chat.py --dim 64",
    ]


def test_nothing_is_there(tmp_path):
    code, found, verdicts = doctor(tmp_path, *V1, "--device", "cpu")
    assert code == 1 and marks(found, "wrong") == [] and marks(found, "ok") == ["packages", "device", "disk"]
    for what, says in {
        "encoder": f"hf download openai/clip-vit-base-patch32 --local-dir {CLIP}",
        "tokenizer": f"copy model/minimind_tokenizer of the first MiniMind-V into {TOKENIZER}",
        "512_llm.pth": "copy the published one there, or do without: python 1-pretrain_vlm.py --from_scratch",
        "512_vlm_pretrain.pth": "made by: python 1-pretrain_vlm.py",
        "512_vlm_sft.pth": "made by: python 2-sft_vlm.py",
        "512_vlm_sft_multi.pth": "made by: python 2-sft_vlm.py --multi",
        "pretrain records": "dataset/README.md",
        "sft pictures": "dataset/README.md",
    }.items():
        assert says in found[what][1]
    assert verdicts[1] == (
        "not ready: python 2-sft_vlm.py (encoder missing, tokenizer missing, 512_vlm_pretrain.pth missing, sft records missing, "
        "sft pictures missing)"
    )


def test_the_first_stage_alone_is_ready(home):
    """Without what only later stages need, with a CLIP in several files and as many bad records as a training leaves out."""
    CLIPVisionModel.from_pretrained(home / CLIP).save_pretrained(home / CLIP, max_shard_size="100KB")
    (home / CLIP / "model.safetensors").unlink(missing_ok=True)
    (home / "out/64_vlm_pretrain.pth").unlink()
    shutil.rmtree(home / "dataset/sft_images")
    for picture in (home / "dataset/sft_multi_images").iterdir():
        picture.write_bytes(b"no picture")
    (home / "dataset/pretrain_images/train_00000.jpg").unlink()  # of the first record, which is always looked at
    code, found, verdicts = doctor(home, *V1, *SIZES, "--device", "cpu")
    mark, says = found["pretrain pictures"]
    assert code == 0 and mark == "ok" and "; 1 of 22 sampled records can't be used, the first: dataset/pretrain" in says
    mark, says = found["sft_multi pictures"]
    assert mark == "wrong" and "22 of 22 sampled records" in says and "could not be read as a picture" in says
    assert verdicts == [
        "ready: python 1-pretrain_vlm.py --dim 64",
        "not ready: python 2-sft_vlm.py --dim 64 (64_vlm_pretrain.pth missing, sft pictures missing)",
        "not ready: python 2-sft_vlm.py --multi --dim 64 (sft_multi pictures wrong)",
        "ready: python 3-eval_chat.py --dim 64",
    ]


def test_what_is_there_is_wrong(home, tokenizer):
    (home / CLIP / "model.safetensors").write_text(POINTER)
    save_random_vlm(home / "out/96_llm.pth", tokenizer).replace(home / "out/64_vlm_pretrain.pth")
    for name in WEIGHTS:
        (home / "out" / name).with_suffix(".json").unlink()  # so that nothing tells of another tokenizer
    llm = home / "out/64_llm.pth"
    llm.write_bytes(llm.read_bytes()[:50_000])
    (home / "out/64_vlm_sft.pth").write_text(POINTER)
    data = home / "dataset/pretrain_vlm_data.json"
    data.write_bytes(data.read_bytes()[:-100])
    (home / "dataset/sft_vlm_data.json").write_text(POINTER)
    code, found, verdicts = doctor(home, *V1, "--n_layers", 3, *SIZES[:2], *SIZES[4:], "--device", "cuda")
    assert code == 1
    for what, says in {
        "encoder": f"{CLIP}/model.safetensors is a Git LFS pointer and not yet the file: run `git lfs pull` in its folder",
        "tokenizer": "not the published minimind_tokenizer (it has 940 tokens, not 6,400), and no weights here say",
        "64_llm.pth": "out/64_llm.pth is truncated, or not a file of weights: copy or download it again",
        "64_vlm_pretrain.pth": "has n_layers 2, expected 3: use --n_layers 2, or other weights",
        "64_vlm_sft.pth": "out/64_vlm_sft.pth is a Git LFS pointer and not yet the file: run `git lfs pull` in its folder",
        "pretrain records": "record 47, is not valid JSON",
        "sft records": "is a Git LFS pointer",
        "device": "name another --device",
    }.items():
        assert found[what][0] == "wrong" and says in found[what][1], found[what]
    assert verdicts[0] == (
        "not ready: python 1-pretrain_vlm.py --dim 64 (encoder wrong, tokenizer wrong, 64_llm.pth wrong, device wrong, pretrain records wrong)"
    )


def test_the_demo(tmp_path, world):
    """A world that is not there will be drawn; one of which a part is gone will not be."""
    shutil.copytree(ROOT / "model/demo", tmp_path / "model/demo", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    code, found, verdicts = doctor(tmp_path, "--demo", "--device", "cpu")
    assert code == 0 and marks(found, "missing") == [f"192_vlm_{name}.pth" for name in ("pretrain", "sft", "sft_multi")]
    assert found["tokenizer"][1].endswith("940 tokens, the ones that model/demo/192_llm.pth was trained with")
    assert "will be drawn" in found["sft pictures"][1]
    assert "made by: python 2-sft_vlm.py --demo" in found["192_vlm_sft.pth"][1]
    assert verdicts[:2] == [
        "ready: python 1-pretrain_vlm.py --demo",
        "not ready: python 2-sft_vlm.py --demo (192_vlm_pretrain.pth missing)",
    ]

    (tmp_path / "model/demo/model.safetensors").unlink()
    shutil.copytree(world, tmp_path / "dataset/demo_world", ignore=shutil.ignore_patterns("*.jpg"))
    code, found, verdicts = doctor(tmp_path, "--demo", "--device", "cpu", "--dim", 98304)  # of terabytes
    assert "it comes with MiniMind-V: git checkout model/demo" in found["encoder"][1]
    assert "192_llm.pth has dim 192, expected 98304: use --dim 192" in found["192_llm.pth"][1]
    assert found["pretrain records"][0] == "ok"
    mark, says = found["pretrain pictures"]
    assert mark == "missing" and "or delete dataset/demo_world, and the scripts draw it again" in says
    assert found["disk"][0] == "wrong" and "make room" in found["disk"][1]
    assert code == 1 and verdicts[0] == (
        "not ready: python 1-pretrain_vlm.py --demo (encoder missing, 192_llm.pth wrong, pretrain pictures missing, disk wrong)"
    )


@pytest.fixture
def today(tmp_path, tiny_clip, world):
    """A folder with the parts of MiniMind2-Small as they are downloaded today, small."""
    today = tmp_path / "today"
    shutil.copytree(tiny_clip, today / CLIP)
    tokenizer = generation_tokenizer("MiniMind2 of 2025-04")
    tokenizer.save_pretrained(today / "MiniMind2-Small")
    sizes = dict(hidden_size=512, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8)
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=len(tokenizer), tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(today / "MiniMind2-Small")
    for name, stage in (("pretrain_i2t", "pretrain"), ("sft_i2t", "sft")):
        (today / "dataset").mkdir(exist_ok=True)
        records = json.loads((world / f"{stage}.json").read_text(encoding="utf-8"))
        write_parquet(today / "dataset" / f"{name}.parquet", records, world / "images")
    return today


def test_the_two_ways_of_today(today, tmp_path):
    """An empty clone, a half-filled one and a full one: each missing file, and the command that fetches it."""
    clone_into(tmp_path / "empty")
    code, out, err = run_python("-m", "model.doctor", cwd=tmp_path / "empty")
    assert code == 1 and not err and "the files of 2024" not in out
    for repository, place in (
        ("openai/clip-vit-base-patch32", CLIP),
        ("jingyaogong/MiniMind2-Small", "MiniMind2-Small"),
        ("jingyaogong/siglip2-base-p32-256-ve", "model/siglip2-base-p32-256-ve"),
        ("jingyaogong/minimind-3", "minimind-3"),
        ("jingyaogong/minimind-v_dataset sft_i2t.parquet --repo-type dataset", "dataset"),
    ):
        assert f"get it with: hf download {repository} --local-dir {place}" in out

    code, found, verdicts = doctor(today, "--parts", "minimind2", "--device", "cpu")
    assert code == 0, found
    assert found["MiniMind2-Small"][1].endswith("parameters of language model")
    assert found["tokenizer"][1].endswith("from the folder of the language model")
    assert found["pretrain records"][1].endswith(": 48 records") and found["sft pictures"][0] == "ok"
    flags = "--tokenizer_path MiniMind2-Small --data_path dataset"
    assert verdicts[0] == (
        f"ready: python 1-pretrain_vlm.py --from_weights MiniMind2-Small {flags}/pretrain_i2t.parquet"
    )
    assert verdicts[1] == (f"not ready: python 2-sft_vlm.py {flags}/sft_i2t.parquet (512_vlm_pretrain.pth missing)")

    (today / "MiniMind2-Small" / "model.safetensors").unlink()
    (today / "dataset" / "pretrain_i2t.parquet").unlink()
    code, found, verdicts = doctor(today, "--parts", "minimind2", "--device", "cpu")
    assert code == 1 and marks(found, "missing")[:1] == ["MiniMind2-Small"]
    assert found["pretrain records"][0] == "missing" and found["sft records"][0] == "ok"
    assert "(MiniMind2-Small missing, pretrain records missing)" in verdicts[0]


def test_a_place_that_can_t_be_written_to(tmp_path):
    (tmp_path / "out").write_text("a file")
    _, found, verdicts = doctor(tmp_path, *V1, "--device", "cpu")
    assert found["disk"][0] == "wrong" and "out is not a writable folder" in found["disk"][1]
    assert "disk wrong" in verdicts[0]


def test_flags_that_fit_no_model_are_refused():
    code, out, err = run_python("-m", "model.doctor", "--dim", 100)
    assert (code, out) == (1, "")
    assert (
        err
        == "error: dim 100, n_heads 16, n_kv_heads 8: dim must be a multiple of n_heads, and n_heads of n_kv_heads\n"
    )


def test_in_what_a_tokenizer_is_not_the_published_one(tmp_path):
    tokenizer = load_tokenizer(ROOT / "model/demo")
    assert unlike_published(tokenizer) == "it has 940 tokens, not 6,400"
    tokenizer.add_tokens([f"word {i}" for i in range(6400 - 940)])
    assert unlike_published(tokenizer) == "it has other tokens"
    tokenizer.save_pretrained(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(content)
    vocabulary["model"]["vocab"] |= {"<": 31, "=": 30}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    assert unlike_published(load_tokenizer(tmp_path)) == "its < is token 31, not 30"


@pytest.mark.parametrize("count", [1, 2, 21, 22, 23, 500])
def test_a_sample_has_the_first_and_the_last_record(tmp_path, count):
    (tmp_path / "data.json").write_text(json.dumps([{"number": i} for i in range(count)]))
    total, sample = sample_of(Source(tmp_path / "data.json", tmp_path))
    numbers = [record["number"] for _, record in sample]
    assert total == count and {0, count - 1} <= set(numbers) and len(set(numbers)) == len(numbers) == min(count, 22)
    assert all(where.endswith(f"data.json, record {record['number']}") for where, record in sample)


def test_more_bad_records_than_a_training_leaves_out():
    bad = BadRecord("no answer", "record 7: no turn of the assistant says anything")
    assert left_out([], 22) == ""
    assert left_out([bad], 22) == f"; 1 of 22 sampled records can't be used, the first: {bad}"
    with pytest.raises(BadRecord, match="2 of 22 sampled records"):
        left_out([bad, bad], 22)


def test_another_out_dir_is_in_every_command(today):
    _, _, verdicts = doctor(today, "--parts", "minimind2", "--device", "cpu", "--out_dir", "elsewhere")
    assert len(verdicts) == 4 and all(" --out_dir elsewhere" in verdict for verdict in verdicts)
