"""Which file may import which: read from the sources, nothing is imported here."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# a file imports only from files above it, so that there is no circle
HOUSE = """
    model.errors model.files model.LMConfig model.model model.model_vlm model.conversation model.images model.layouts
    model.llava model.vision_utils model.checkpoint
    dataset.records dataset.parquet dataset.pictures dataset.source dataset.dataset dataset.batches
    model.decoder model.generate model.onnx_graphs model.chat model.score model.stages model.arguments model.hf model.onnx_export model.export model.doctor
    dataset.check dataset.convert dataset.demo.scenes dataset.demo.drawing dataset.demo.sentences dataset.demo.world
    model.training.distributed model.training.logs model.training.stats model.training.feature_cache model.training.graphs
    model.training.resume model.training.trainer model.training.plot
    model.demo.make_tokenizer model.demo.make_clip model.demo.make_llm
    web.requests web.queue web.api web.backend
    1-pretrain_vlm 2-sft_vlm 3-eval_chat web_server
"""
ORDER = HOUSE.split()
PLACES = [*ROOT.glob("*.py"), *(file for name in ("model", "dataset", "web") for file in (ROOT / name).rglob("*.py"))]
SOURCES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text(encoding="utf-8"))
    for file in PLACES
    if file.name != "__init__.py"
}


def imported(name):
    """(file of the repository, whether it is named relatively) for each import in a file, those inside functions too."""
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found, relative = [alias.name for alias in node.names], False
        elif isinstance(node, ast.ImportFrom):
            base = [".".join(name.split(".")[: -node.level])] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            found, relative = [module, *(f"{module}.{alias.name}" for alias in node.names)], node.level > 0
        else:
            continue
        yield from ((one, relative) for one in found if one in SOURCES)


def test_every_file_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(SOURCES)


def test_a_file_imports_only_from_files_above_it():
    below = [
        f"{name} imports {other}"
        for name in ORDER
        for other, _ in imported(name)
        if ORDER.index(other) >= ORDER.index(name)
    ]
    assert not below


def test_a_file_names_those_of_its_own_folder_relatively_and_others_from_the_root():
    odd = [
        f"{name}: {other}"
        for name in ORDER
        for other, relative in imported(name)
        if relative != ("." in name and name.rpartition(".")[0] == other.rpartition(".")[0])
    ]
    assert not odd


def test_an_exported_folder_carries_what_its_code_needs_and_no_more():
    code = next(
        ast.literal_eval(node.value)
        for node in SOURCES["model.export"].body
        if isinstance(node, ast.Assign) and node.targets[0].id == "CODE"
    )
    needed, new = set(), {"model.hf"}
    while new:
        needed |= new
        new = {other for name in new for other, _ in imported(name)} - needed
    assert needed == {f"model.{name}" for name in code}


def test_no_test_module_imports_another():
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("test_", "conftest")) for name in names), file
