import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import small_run, tree
from safetensors.torch import load_file

from vlkr.adapters import merge_adapters
from vlkr.cli import main
from vlkr.datasets import load_dataset
from vlkr.datasets.pipelines import decode_image
from vlkr.errors import VlkrError
from vlkr.evaluation.runs import load_run
from vlkr.export import open_clip as export_module
from vlkr.export.open_clip import export
from vlkr.models.zero_shot import class_embeddings, tokenize_prompts
from vlkr.training.adapt import AdapterOptions

FILES = {"open_clip_config.json", "open_clip_model.safetensors", "vlkr_export.json"}

# Runs where vlkr cannot be imported: features and predictions of digits, by open_clip alone.
RELOAD = """
import io, sys, tarfile
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vlkr":
            raise ImportError("vlkr is blocked")
sys.meta_path.insert(0, Block())
try:
    import vlkr
except ImportError:
    pass
else:
    sys.exit("vlkr was imported")
import open_clip, torch
from PIL import Image
folder, shard, names, template, output = sys.argv[1:]
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
model.eval()
torch.set_num_threads(1)
with tarfile.open(shard) as archive:
    images = [
        preprocess(Image.open(io.BytesIO(archive.extractfile(entry).read())).convert("RGB"))
        for entry in archive if entry.name.endswith(".png")
    ]
texts = [template.replace("{c}", name) for name in names.split(",")]
with torch.no_grad():
    features = model.encode_image(torch.stack(images), normalize=True)
    embeddings = model.encode_text(tokenizer(texts), normalize=True)
torch.save({"features": features, "embeddings": embeddings}, output)
assert not [name for name in sys.modules if name.startswith("vlkr")]
"""


def test_needs_no_vlkr_and_computes_the_same(run, tmp_path):
    result = export(run, tmp_path / "out")
    assert set(tree(tmp_path / "out")) == FILES
    digits = load_dataset("digits-fonts")
    shard = digits.source("test").urls()[0]
    template = "a photo of the digit {c}."
    names = ",".join(digits.class_names)
    arguments = [str(tmp_path / "out"), shard, names, template, str(tmp_path / "features.pt")]
    subprocess.run(
        [sys.executable, "-I", "-c", RELOAD, *arguments], cwd=tmp_path, check=True, timeout=120
    )
    found = torch.load(tmp_path / "features.pt", weights_only=True)
    bundle, _ = load_run(run)
    images = [decode_image(sample) for sample in digits.source("test")]
    prompts = tokenize_prompts(bundle.tokenizer, digits.class_names, [template])
    with torch.no_grad():
        features = F.normalize(
            bundle.model.encode_image(torch.stack([bundle.preprocess(i) for i in images])), dim=-1
        )
        embeddings = class_embeddings(bundle.model, prompts)
    assert F.cosine_similarity(found["features"], features).min() >= 0.99999
    assert F.cosine_similarity(found["embeddings"], embeddings).min() >= 0.99999
    predictions = (features @ embeddings.T).argmax(1)
    assert torch.equal((found["features"] @ found["embeddings"].T).argmax(1), predictions)
    assert result.parity.same_predictions == 1


def test_weights_are_the_merged_ones(run, small, tmp_path):
    export(run, tmp_path / "out")
    bundle, _ = load_run(run)
    merge_adapters(bundle.model)
    exported = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    base = load_file(Path(small.removeprefix("local-dir:")) / "open_clip_model.safetensors")
    assert set(base) <= set(exported)
    state = bundle.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in exported.items())
    changed = {key for key, tensor in base.items() if not torch.equal(exported[key], tensor)}
    assert {key.rsplit(".", 1)[-1] for key in changed} == {"in_proj_weight", "weight"}
    assert not {key for key in changed if "ln" in key or "embedding" in key or "conv" in key}


@pytest.mark.parametrize(
    "adapter",
    [AdapterOptions("lora", options={"rank": 2, "dropout": 0.3}), AdapterOptions("lora", ["qkv"])],
    ids=["dropout", "qkv"],
)
def test_other_adapters(tmp_path, small, colors, adapter):
    run = small_run(tmp_path / "run", small, colors, adapter=adapter).output
    parity = export(run, tmp_path / "out").parity
    assert parity.min_image_cosine >= 0.99999
    assert parity.images == 19


def test_says_what_was_compared(run, tmp_path, capsys):
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "compared on 19 test images" in printed
    assert "same predictions 100%" in printed
    card = json.loads((tmp_path / "out" / "vlkr_export.json").read_text())
    assert card["base_sha256"] == load_run(run)[0].weights_hash
    assert card["adapter"]["name"] == "kradapter"
    assert main([*arguments, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parity"] == card["parity"]


def test_what_is_there_is_kept_unless_told(run, tmp_path):
    output = tmp_path / "out"
    export(run, output)
    before = tree(output)
    with pytest.raises(VlkrError, match="exists already; name another folder, or --force"):
        export(run, output)
    assert tree(output) == before
    (output / "vlkr_export.json").write_text("{}")
    export(run, output, force=True)
    assert tree(output) == before


def test_force_replaces_exports_only(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    before = tree(tmp_path)
    with pytest.raises(VlkrError, match="holds no export; --force replaces nothing else"):
        export(run, tmp_path / "home", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_target_is_intact_when_writing_fails(run, tmp_path, monkeypatch, error):
    export(run, tmp_path / "out")
    before = tree(tmp_path)

    def fail(*args):
        raise error

    monkeypatch.setattr(export_module, "write_json", fail)
    raised = VlkrError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised):
        export(run, tmp_path / "out", force=True)
    with pytest.raises(raised):
        export(run, tmp_path / "new")
    assert tree(tmp_path) == before


def test_a_difference_leaves_nothing(run, tmp_path, monkeypatch):
    save = export_module.save_open_clip_folder

    def save_wrongly(bundle, folder, tensors):
        wrong = {key: tensor.clone() for key, tensor in tensors.items()}
        wrong["visual.proj"] += 0.1 * torch.randn_like(wrong["visual.proj"])
        save(bundle, folder, wrong)

    monkeypatch.setattr(export_module, "save_open_clip_folder", save_wrongly)
    with pytest.raises(VlkrError, match="the export differs from the adapted model: least cosine"):
        export(run, tmp_path / "out")
    assert tree(tmp_path) == {}


def test_features_that_are_not_finite_are_a_difference(run, tmp_path, monkeypatch):
    def load_broken(folder):
        bundle, config = load_run(folder)
        bundle.model.visual.proj.data.fill_(torch.nan)
        return bundle, config

    monkeypatch.setattr(export_module, "load_run", load_broken)
    with pytest.raises(VlkrError, match="differs from the adapted model: least cosine nan"):
        export(run, tmp_path / "out")


def test_export_is_a_model_like_any_other(run, colors, tmp_path, capsys):
    export(run, tmp_path / "out")
    arguments = ["evaluate", "--model", str(tmp_path / "out"), "--datasets", str(colors), "--json"]
    assert main(arguments) == 0
    metrics = json.loads(capsys.readouterr().out)["results"][0]["metrics"]
    home = json.loads((run / "metrics.json").read_text())["results"][0]["metrics"]
    assert metrics == pytest.approx(home, abs=1e-4)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert type(model) is open_clip.CLIP


@pytest.mark.parametrize(
    ("output", "message"),
    [("file/inside", "file is a file"), ("file", "is a file, expected a folder")],
)
def test_output_that_cannot_be_written(run, tmp_path, output, message):
    (tmp_path / "file").touch()
    with pytest.raises(VlkrError, match=message):
        export(run, tmp_path / output, force=True)
