"""The model card, and the hub it goes to: a stub on loopback."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from helpers import COLORS, tree, write_images

from vlkr.cli import main
from vlkr.errors import VlkrError
from vlkr.export.card import base_licence
from vlkr.export.export import export, load_input
from vlkr.files import resource
from vlkr.runs import RunFolder


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one upload needs; keeps what it is sent."""

    def do_POST(self):
        server, path = self.server, self.path.split("?")[0]
        body = self._body()
        server.requests.append((path, self.headers.get("Authorization")))
        if server.refuse:
            self._answer(server.refuse, {"error": "the stub refuses"})
        elif path == "/api/repos/create":
            server.created = json.loads(body)
            self._answer(200, {"url": f"{server.address}/me/digits", "id": "1"})
        elif path == "/api/validate-yaml":
            server.card = json.loads(body)["content"]
            self._answer(200, {"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": _mode(f["path"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                o | {"actions": {"upload": {"href": f"{server.address}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            assert path.endswith("/commit/main"), path
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    server.files[value["path"]] = server.large[value["oid"]]
                else:
                    server.message = value["summary"]
            url = f"{server.address}/me/digits/commit/0"
            self._answer(200, {"commitUrl": url, "commitOid": "0", "success": True})

    def do_PUT(self):
        body = self._body()
        digest = hashlib.sha256(body).hexdigest()
        assert self.path == f"/lfs/{digest}"
        self.server.large[digest] = body
        self._answer(200, {})

    def do_GET(self):
        self._answer(404, {"error": "no such thing"})

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def _mode(path):
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    server.refuse, server.requests, server.files, server.large = 0, [], {}, {}
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def endpoint(hub, tmp_path, monkeypatch):
    """What HF_ENDPOINT, HF_TOKEN and HF_HUB_DISABLE_XET set when huggingface_hub is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


# The hub's client sends a file as its HTTP library would not have it.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push_to_hub(run, hub, endpoint, tmp_path, capsys):
    output = tmp_path / "digits"
    arguments = ["export", "--run", run, "--output", output, "--push-to-hub", "me/digits"]
    assert main(list(map(str, arguments))) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "(open_clip, float32). Compared on 19 test images: least cosine" in printed
    assert "same predictions 100%" in printed
    assert f"Pushed to {hub.address}/me/digits" in printed
    assert hub.files == tree(output)
    assert len(hub.large) == 2
    assert hub.created["name"] == "digits"
    assert hub.created["organization"] == "me"
    assert hub.message == "Export by vlkr"
    assert {token for path, token in hub.requests if path.startswith("/api/")} == {
        "Bearer hf_secret"
    }
    card = hub.files["README.md"].decode()
    assert 'snapshot_download("me/digits", local_dir="digits")' in card
    assert card.split("---\n")[1] in hub.card


@pytest.mark.parametrize("refuse", [403, None])
def test_a_push_that_fails_leaves_the_export(
    refuse, run, hub, endpoint, tmp_path, monkeypatch, capsys
):
    hub.refuse = refuse
    if refuse is None:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--push-to-hub", "me/digits"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"wrote {tmp_path / 'out'}, but could not push it to me/digits: " in line
    assert "hf_secret" not in line
    assert (tmp_path / "out" / "vlkr_export.json").is_file()


def test_no_token_is_told_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vlkr.export.card.get_token", lambda: None)
    with pytest.raises(VlkrError, match="no token to push to the hub with: set HF_TOKEN"):
        export(run, tmp_path / "out", push_to_hub="me/digits")
    assert tree(tmp_path) == {}


# The card


@pytest.fixture(scope="module")
def card(digits_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("cards") / "digits-clip"
    export(digits_run, output, dtype="float16")
    _, front, text = (output / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_front_matter(card, digits_run):
    front, _ = card
    metrics = json.loads((digits_run / "metrics.json").read_text())["results"][0]
    assert front["base_model"] == "tiny"
    assert front["license"] == "mit"
    assert front["library_name"] == "open_clip"
    assert front["pipeline_tag"] == "zero-shot-image-classification"
    assert front["datasets"] == ["digits"]
    assert front["adapter"]["name"] == "kradapter"
    (result,) = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "test"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", metrics["metrics"]["acc1"])


def test_card_tells_what_was_exported_and_from_what(card, digits_run):
    _, text = card
    bundle = RunFolder.open(digits_run).load_model()
    metrics = json.loads((digits_run / "metrics.json").read_text())["results"][0]
    for part in (
        f"| base weights, SHA-256 | {bundle.weights_hash} |",
        "| base licence | mit |",
        "| data | digits, 4 shots, seed 1 |",
        "| data licence | CC BY 4.0 |",
        "| dtype of the weights | float16 |",
        "zero, one, two, three",
        "the digit {c}",
        "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5), interpolation bicubic, resize_mode squash",
        "Compared on 64 test images",
        f"vlkr export --run {digits_run.name} --format open_clip --output digits-clip "
        "--dtype float16",
        f"| digits | test | 510 | {100 * metrics['metrics']['acc1']:.1f} |",
        "templates digits card (3), final checkpoint",
        'create_model_and_transforms("local-dir:digits-clip")',
    ):
        assert part in text, part
    assert str(digits_run.parent) not in text


def test_metrics_of_full_strength_are_not_those_of_another(run, exported):
    _, front, text = (exported(run, alpha=0.5).folder / "README.md").read_text().split("---\n", 2)
    assert "model-index" not in yaml.safe_load(front)
    assert "not at the strength of this export" in text
    assert "--alpha 0.5" in text


def test_command_of_the_card_names_the_folder_that_one_is_in(run, tmp_path, monkeypatch):
    monkeypatch.chdir(run)
    export(Path(), tmp_path / "out", format="adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"vlkr export --run {run.name} --format adapter --output out\n" in card


def test_card_names_no_folders_of_this_machine(run, vit_run, exported):
    for source, name in ((run, "open_clip"), (vit_run, "timm")):
        card = (exported(source, name).folder / "README.md").read_text()
        assert str(source.parents[1]) not in card
    assert "The run was not evaluated." in card
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["pipeline_tag"] == "image-classification"
    assert front["base_model"] == "timm/test_vit"


def test_licence_of_the_base(write_model, make_run, tmp_path):
    run = make_run(tmp_path / "run", write_model(tmp_path / "clip"))
    source, _ = load_input(run, 1.0)
    assert base_licence(source) is None
    for readme, licence in (
        ("# No front matter\n", None),
        ("---\ntags: [clip]\n---\n# Clip\n", None),
        ("---\nlicense: apache-2.0\n---\n# Clip\n", "apache-2.0"),
        ("---\n: {\n---\n# Broken\n", None),
    ):
        (tmp_path / "clip" / "README.md").write_text(readme)
        assert base_licence(source) == licence
    source.adapted.name, source.adapted.pretrained = "ViT-B-32", "openai"
    assert base_licence(source) == "mit"


def test_card_names_the_data_and_what_was_drawn(small, make_run, exported, tmp_path):
    data = {"name": f"digits={resource('data/digits')}", "fraction": 0.1}
    folder = exported(make_run(tmp_path / "run", small, data=data), "adapter").folder
    card = (folder / "README.md").read_text()
    assert str(resource("data/digits")) not in card
    assert "| data | digits, fraction 0.1, seed 1 |" in card
    assert "| data licence | CC BY 4.0 |" in card
    manifest = json.loads((folder / "vlkr_export.json").read_text())
    assert manifest["data"] == {"name": "digits", "fraction": 0.1, "seed": 1}


def test_names_in_the_card_are_neither_tags_nor_links_nor_cells(small, make_run, tmp_path):
    images = write_images(tmp_path / "images")
    for color, name in zip(COLORS, ("<b>red", "[x](y)", "a|b"), strict=True):
        (images / color).rename(images / name)
    data = {"name": None, "root": str(images)}
    run = make_run(tmp_path / "run", small, data=data)
    export(run, tmp_path / "<i>out", format="adapter")
    text = (tmp_path / "<i>out" / "README.md").read_text().split("---\n", 2)[2]
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    assert "| classes | &lt;b>red, \\[x](y), a\\|b |" in prose
    assert not re.search(r"<[a-z]|(?<!\\)\[", prose)
