"""Hub ids: the real cache layout in a folder of the test's own, and a hub that answers on this machine."""

import json
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch

from t2i_align.pipelines import PipelineError, call_defaults, hub, load_pipeline
from t2i_align.pipelines.catalog import check_pipeline, find_pipeline
from t2i_align.pipelines.models import MODELS

TURBO = MODELS["sd-turbo"].source


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline("tiny-sd")


def put(cache, repo, pipe, commit="a" * 40, ref="main", **options):
    """Store a pipeline as `hf download` does: files under `blobs`, links to them under `snapshots`."""
    store = cache / f"models--{repo.replace('/', '--')}"
    snapshot = store / "snapshots" / commit
    pipe.save_pretrained(snapshot, **options)
    (store / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate([file for file in snapshot.rglob("*") if file.is_file()]):
        blob = store / "blobs" / f"{commit}{number}"
        file.rename(blob)
        file.symlink_to(Path(*[".."] * (len(file.relative_to(store).parts) - 1), "blobs", blob.name))
    (store / "refs").mkdir(exist_ok=True)
    (store / "refs" / ref).write_text(commit)
    return snapshot


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_an_alias_opens_from_the_cache_with_its_settings(cache, tiny):
    put(cache, TURBO, tiny)
    pipe = load_pipeline("sd-turbo")
    assert same(pipe.unet, tiny.unet)
    assert pipe.config._name_or_path == TURBO
    settings = {"num_inference_steps": 1, "guidance_scale": 0.0, "height": 512, "width": 512}
    assert call_defaults("sd-turbo") == call_defaults(TURBO) == call_defaults(pipe) == settings


def test_any_hub_id_opens_from_the_cache_and_has_no_settings(cache, tiny):
    put(cache, "somebody/their.model_1", tiny)
    assert same(load_pipeline("somebody/their.model_1").unet, tiny.unet)
    assert call_defaults("somebody/their.model_1") == {}
    assert call_defaults(load_pipeline("somebody/their.model_1")) == {}


def test_a_card_in_the_cache_is_read(cache, tiny):
    folder = put(cache, "somebody/ours", tiny)
    (folder / "card.json").write_text(json.dumps({"defaults": {"num_inference_steps": 7}}))
    assert call_defaults("somebody/ours") == {"num_inference_steps": 7}


def test_the_revision_is_honoured(cache, tiny):
    changed = load_pipeline("tiny-sd")
    with torch.no_grad():
        changed.unet.conv_out.bias += 1
    put(cache, TURBO, tiny)
    put(cache, TURBO, changed, commit="b" * 40, ref="newer")
    assert same(load_pipeline("sd-turbo").unet, tiny.unet)
    assert same(load_pipeline("sd-turbo", revision="newer").unet, changed.unet)
    assert same(load_pipeline("sd-turbo", revision="b" * 40).unet, changed.unet)
    with pytest.raises(PipelineError, match="HF_HUB_OFFLINE forbids"):
        load_pipeline("sd-turbo", revision="older")


def test_half_precision_files_are_found_whatever_the_dtype(cache, tiny):
    put(cache, TURBO, tiny, variant="fp16")
    assert load_pipeline("sd-turbo").unet.dtype == torch.float32
    assert load_pipeline("sd-turbo", dtype="fp16").unet.dtype == torch.float16
    with pytest.raises(PipelineError, match="no weights of the variant 'ema'; it has 'fp16'"):
        load_pipeline("sd-turbo", variant="ema")


def test_a_download_that_was_cut_short_is_named(cache, tiny):
    folder = put(cache, TURBO, tiny)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(PipelineError, match="lacks the weights of unet"):
        load_pipeline("sd-turbo")


@pytest.mark.parametrize("name", ["sd-turbo", "somebody/model"])
def test_what_is_not_here_says_what_to_download_and_where_to_put_it(cache, name):
    repo = TURBO if name == "sd-turbo" else name
    for act in (load_pipeline, find_pipeline, check_pipeline):
        with pytest.raises(PipelineError) as caught:
            act(name)
        assert f"`hf download {repo}`" in str(caught.value)
        assert str(cache) in str(caught.value)
        assert f"models--{repo.replace('/', '--')}" in str(caught.value)


def test_local_files_only_leaves_the_network_alone(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(PipelineError, match="local_files_only forbids the network"):
        load_pipeline("sd-turbo", local_files_only=True)


@contextmanager
def answering(status, code="", gated=False):
    """A hub that gives one answer to everything; or that knows every model, but hands out none of its files."""

    class Hub(BaseHTTPRequestHandler):
        def answer(self):
            body = b'{"id": "org/name", "siblings": []}'
            closed = gated and "/resolve/" in self.path
            self.send_response(403 if closed else status)
            self.send_header("X-Error-Code", "GatedRepo" if closed else code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def online(monkeypatch, endpoint):
    files = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    constants = {"HF_HUB_OFFLINE": False, "ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": files}
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)


def test_a_hub_that_cannot_be_reached_is_said_at_once(cache, monkeypatch):
    online(monkeypatch, "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(PipelineError, match=r"the hub cannot be reached .* run `hf download stabilityai/sd-turbo`"):
        load_pipeline("sd-turbo")
    assert time.monotonic() - start < 5  # and not after the hub library's retries, which take 23 s


def test_a_silent_hub_is_given_up_on(cache, monkeypatch):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as deaf:
        online(monkeypatch, f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr(hub, "TIMEOUT", 0.5)
        with pytest.raises(PipelineError, match="the hub cannot be reached"):
            load_pipeline("sd-turbo")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (
            403,
            "GatedRepo",
            "is gated: accept its licence on https://huggingface.co/org/name, then .* login",
        ),
        (401, "RepoNotFound", "the hub shows no model of that name"),
        (404, "RevisionNotFound", "no revision 'v9' on the hub"),
        (503, "", "the hub answers .*503"),
    ],
)
def test_answers_of_the_hub_become_sentences(cache, monkeypatch, status, code, message):
    with answering(status, code) as endpoint:
        online(monkeypatch, endpoint)
        with pytest.raises(PipelineError, match=message):
            load_pipeline("org/name", revision="v9")


def test_a_licence_that_shows_up_in_the_download_is_said(cache, monkeypatch):
    with answering(200, gated=True) as endpoint:
        online(monkeypatch, endpoint)
        with pytest.raises(PipelineError, match="is gated"):
            hub.fetch("org/name", None, lambda _: huggingface_hub.hf_hub_download("org/name", "model_index.json"))


def test_a_download_that_fails_says_why(cache, monkeypatch):
    def full(files):
        raise OSError(28, "No space left on device")

    with answering(200) as endpoint:
        online(monkeypatch, endpoint)
        with pytest.raises(PipelineError, match="Downloading org/name failed .*No space left"):
            hub.fetch("org/name", None, full)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [("org/name", True), ("name", False), ("a/b/c", False), ("./name", False), ("../name", False), ("o/x" * 99, False)],
)
def test_hub_ids_are_told_from_paths(name, is_one):
    assert hub.is_hub_id(name) is is_one
