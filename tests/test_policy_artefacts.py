"""What a policy leaves on disk, opened again by stock software and by us."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

import t2i_align as t2i
from t2i_align.keys import generator
from t2i_align.policy import Policy, PolicyError
from t2i_align.policy.artefacts import new_folder
from t2i_align.policy.lora import Layers, adapter_weights, inject, lora_config
from tests.families import FAMILIES


def train(policy, size=0.05):
    for i, p in enumerate(policy.trainable()):
        p.data += size * torch.randn(p.shape, generator=generator("training", i))
    return policy


def family(name="sd"):
    torch.manual_seed(0)
    pipe = FAMILIES[name]().pipe
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipe


def image(pipe, **call):
    draw = torch.Generator().manual_seed(0)
    call = {"prompt": "a red circle", "num_inference_steps": 4, "output_type": "pt"} | call
    return pipe(generator=draw, **call).images


def apart(one, other):
    return float((one - other).abs().max())


def same(policy, other):
    pairs = zip(policy.trainable(), other.trainable(), strict=True)
    return policy.adapters.shape("policy") == other.adapters.shape("policy") and all(
        torch.equal(p, q) for p, q in pairs
    )


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def snippet(folder, monkeypatch):
    """Runs the code of a folder's card, in it; returns the pipeline."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    scope["pipe"].set_progress_bar_config(disable=True)
    return scope["pipe"]


# LoRA for stock pipelines


@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 8), (4, 16), (6, 7.5), (3, 1)])
def test_stock_pipeline_gives_the_policys_image(tmp_path, rank, alpha):
    pipe, stock = t2i.load_pipeline("tiny-sd"), t2i.load_pipeline("tiny-sd")
    policy = train(Policy.lora(pipe, rank=rank, alpha=alpha))
    policy.save(tmp_path / "lora")
    before = image(stock)
    stock.load_lora_weights(tmp_path / "lora")
    assert type(stock) is StableDiffusionPipeline
    assert apart(image(stock), image(pipe)) < 1e-4
    assert apart(before, image(pipe)) > 0.02
    power_of_two = alpha / rank in (1, 2, 4)
    assert ("policy.safetensors" in files(tmp_path / "lora")) == (not power_of_two)
    again = Policy.load(t2i.load_pipeline("tiny-sd"), tmp_path / "lora")
    assert same(policy, again)
    assert set(again.adapters.shape("policy").values()) == {(rank, alpha)}
    assert torch.equal(image(again.pipe), image(pipe))


def test_card_opens_the_weights(tmp_path, monkeypatch):
    policy = train(Policy.lora(t2i.load_pipeline("tiny-sd"), rank=2, alpha=3))
    policy.save(tmp_path / "lora")
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "Rank 2, alpha 3, on 56 layers of the UNet2DConditionModel" in card
    assert apart(image(snippet(tmp_path / "lora", monkeypatch)), image(policy.pipe)) < 1e-4


def test_ranks_may_differ_between_layers(tmp_path):
    policy = Policy.lora(family(), rank=1)
    names = list(policy.adapters.shape("policy"))
    layers: Layers = {name: (1 + i % 3, 2.0 + i) for i, name in enumerate(names)}
    mixed = family()
    inject(mixed.unet, "mixed", layers)
    save_file(
        {f"base_model.model.{key}": p.detach() for key, p in adapter_weights(mixed.unet, "mixed").items()},
        tmp_path / "adapter_model.safetensors",
    )
    lora_config(layers).save_pretrained(tmp_path)
    policy = train(Policy.lora(family(), start=tmp_path), 0.5)
    assert policy.adapters.shape("policy") == layers
    policy.save(tmp_path / "lora")
    stock = family()
    before = image(stock)
    stock.load_lora_weights(tmp_path / "lora")
    assert apart(image(stock), image(policy.pipe)) < 1e-4
    assert apart(before, image(policy.pipe)) > 0.01
    kohya = load_file(tmp_path / "lora" / "kohya.safetensors")
    ranks = {name.removesuffix(".alpha"): int(value) for name, value in kohya.items() if name.endswith(".alpha")}
    assert set(ranks.values()) == {1, 2, 3}
    assert all(len(kohya[f"{name}.lora_down.weight"]) == rank for name, rank in ranks.items())
    assert same(policy, Policy.load(family(), tmp_path / "lora"))


def test_the_lora_of_a_unet_is_there_under_kohya_s_names_too(tmp_path):
    policy = train(Policy.lora(family(), rank=3, alpha=2), 0.5)
    policy.save(tmp_path / "lora")
    other = family()
    before = image(other)
    other.load_lora_weights(tmp_path / "lora", weight_name="kohya.safetensors")
    assert apart(image(other), image(policy.pipe)) < 1e-4
    assert apart(before, image(policy.pipe)) > 0.01
    assert "`kohya.safetensors` is the same" in (tmp_path / "lora" / "README.md").read_text()


def test_averaged_weights_and_number_types(tmp_path):
    policy = train(Policy.lora(family(), rank=3, alpha=2), 0.3)
    policy.update_average(0.5)
    average = [p.detach().clone() for p in policy.trainable()]
    train(policy, 0.3)
    policy.save(tmp_path / "average", averaged=True)
    again = Policy.load(family(), tmp_path / "average")
    assert all(torch.equal(p, q) for p, q in zip(average, again.trainable(), strict=True))
    assert json.loads((tmp_path / "average" / "policy.json").read_text())["averaged"]
    policy.save(tmp_path / "half", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(tmp_path / "half" / "pytorch_lora_weights.safetensors").values()} == {
        torch.bfloat16
    }
    for p, q in zip(policy.trainable(), Policy.load(family(), tmp_path / "half").trainable(), strict=True):
        assert q.dtype == torch.float32
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-6)


# A folder appears whole or not at all


def test_a_folder_is_replaced_whole(tmp_path):
    policy = train(Policy.lora(family(), rank=3, alpha=2))
    policy.save(tmp_path / "lora")
    (tmp_path / "lora" / "stale").touch()
    train(policy)
    policy.save(tmp_path / "lora")
    assert same(policy, Policy.load(family(), tmp_path / "lora"))
    assert files(tmp_path) == ["lora"]
    assert files(tmp_path / "lora") == [
        "README.md",
        "kohya.safetensors",
        "policy.json",
        "policy.safetensors",
        "pytorch_lora_weights.safetensors",
    ]


def test_a_failure_leaves_the_former_folder(tmp_path, monkeypatch):
    policy = train(Policy.lora(family(), rank=2))
    policy.save(tmp_path / "lora")
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}
    train(policy)

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("t2i_align.policy.artefacts.card", full)
    with pytest.raises(OSError, match="No space"):
        policy.save(tmp_path / "lora")
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before
    assert files(tmp_path) == ["lora"]


def test_files_of_others_are_not_overwritten(tmp_path):
    policy = Policy.lora(family(), rank=2)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper.tex").touch()
    for folder in (tmp_path / "results", tmp_path / "results" / "paper.tex"):
        with pytest.raises(PolicyError, match="new, empty or written by"):
            policy.save(folder)
    with pytest.raises(PolicyError, match="no average"):
        policy.save(tmp_path / "lora", averaged=True)
    assert files(tmp_path) == ["results"]


# LoRA for peft: other pipelines, other components


def controlled():
    """The family sd with a ControlNet."""
    parts = family().components
    net = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    for key, p in net.named_parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator(key))  # its outputs start at zero
    return StableDiffusionControlNetPipeline(**parts, controlnet=net, requires_safety_checker=False)


@pytest.mark.parametrize(
    ("make", "component"),
    [(lambda: family("pixart-sigma"), None), (family, "text_encoder"), (controlled, "controlnet")],
)
def test_peft_files_with_a_card(tmp_path, monkeypatch, make, component):
    make().save_pretrained(tmp_path / "base")
    pipe = type(make()).from_pretrained(tmp_path / "base")
    policy = train(Policy.lora(pipe, rank=3, alpha=2, component=component), 0.3)
    policy.save(tmp_path / "lora")
    assert files(tmp_path / "lora") == ["README.md", "adapter_config.json", "adapter_model.safetensors", "policy.json"]
    opened = snippet(tmp_path / "lora", monkeypatch)
    theirs = {key.replace(".default.", ".policy."): value for key, value in named(opened, policy).items()}
    mine = named(pipe, policy)
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[key], value) for key, value in mine.items())
    again = type(pipe).from_pretrained(tmp_path / "base")
    assert same(policy, Policy.load(again, tmp_path / "lora"))
    call = {"height": 16, "width": 16}
    if component is None:
        call["use_resolution_binning"] = False
    if component == "controlnet":
        call["image"] = torch.rand(1, 3, 16, 16, generator=generator("control"))
    assert apart(image(opened, **call), image(pipe, **call)) < 1e-4
    fresh = type(pipe).from_pretrained(tmp_path / "base")
    assert apart(image(fresh, **call), image(pipe, **call)) > 1e-4


def named(pipe, policy):
    return dict(getattr(pipe, policy.component).named_parameters())


# Full weights


def test_full_weights_are_a_pipeline_folder(tmp_path, monkeypatch):
    pipe = t2i.load_pipeline("tiny-sd")
    policy = train(Policy.full(pipe), 0.01)
    policy.update_average(0.0)
    average = image(pipe)
    train(policy, 0.01)
    policy.save(tmp_path / "model")
    policy.save(tmp_path / "average", averaged=True)
    with pytest.raises(PolicyError, match="no dtype="):
        policy.save(tmp_path / "half", dtype=torch.float16)
    assert torch.equal(image(snippet(tmp_path / "model", monkeypatch)), image(pipe))
    assert torch.equal(image(snippet(tmp_path / "average", monkeypatch)), average)
    base = image(t2i.load_pipeline("tiny-sd"))
    again = Policy.load(t2i.load_pipeline("tiny-sd"), tmp_path / "model")
    assert torch.equal(image(again.pipe), image(pipe))
    with again.reference():
        torch.testing.assert_close(image(again.pipe), base)
    with pytest.raises(PolicyError, match="Cannot open"):
        Policy.load(family(), tmp_path / "model")
    with pytest.raises(PolicyError, match="holds the full weights of unet"):
        Policy.lora(t2i.load_pipeline("tiny-sd"), start=tmp_path / "model")


# Starting from an existing LoRA


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained policy of tiny-sd, rank 4 and alpha 6, and its folder."""
    folder = tmp_path_factory.mktemp("saved") / "lora"
    policy = train(Policy.lora(t2i.load_pipeline("tiny-sd"), rank=4, alpha=6))
    policy.save(folder)
    return policy, folder


def start(path, **options):
    return Policy.lora(t2i.load_pipeline("tiny-sd"), start=path, **options)


def test_start_from_our_own_folder(saved):
    policy, folder = saved
    assert same(policy, start(folder))


def test_start_from_a_file_of_diffusers(saved, tmp_path):
    policy, folder = saved
    shutil.copy(folder / "pytorch_lora_weights.safetensors", tmp_path / "someone.safetensors")
    opened = start(tmp_path / "someone.safetensors", adapters=("policy", "start"))
    assert set(opened.adapters.shape("policy").values()) == {(4, 4)}
    assert apart(image(opened.pipe), image(policy.pipe)) < 1e-4
    train(opened)
    with opened.adapter("start"):
        assert apart(image(opened.pipe), image(policy.pipe)) < 1e-4


def kohya(policy, alpha):
    """The same weights as kohya's scripts write them: raw, with an alpha for each layer."""
    content = {}
    for key, p in policy.adapters.weights("policy").items():
        path, _, which = key.partition(".lora_")
        name = "lora_unet_" + path.replace(".", "_")
        content[f"{name}.lora_{'down' if which[0] == 'A' else 'up'}.weight"] = p.detach().half()
        content[f"{name}.alpha"] = torch.tensor(float(alpha))
    return content


def test_start_from_a_file_of_kohya(saved, tmp_path):
    policy, _ = saved
    save_file(kohya(policy, 6), tmp_path / "kohya.safetensors")
    opened = start(tmp_path / "kohya.safetensors")
    assert set(opened.adapters.shape("policy").values()) == {(4, 6)}
    assert {p.dtype for p in opened.trainable()} == {torch.float32}
    assert sum(p.requires_grad for p in opened.network.parameters()) == len(opened.trainable())
    assert apart(image(opened.pipe), image(policy.pipe)) < 1e-2
    opened.save(tmp_path / "lora")
    stock = t2i.load_pipeline("tiny-sd")
    stock.load_lora_weights(tmp_path / "lora")
    assert apart(image(opened.pipe), image(stock)) < 1e-4


def test_lora_that_does_not_fit_is_refused_before_the_network_is_touched(saved, tmp_path):
    policy, folder = saved
    portable = load_file(folder / "pytorch_lora_weights.safetensors")
    first = next(iter(portable))
    path = tmp_path / "lora.safetensors"

    def refused(pipe, where, message, **options):
        before = [name for name, _ in pipe.unet.named_parameters()]
        with pytest.raises(PolicyError, match=message):
            Policy.lora(pipe, start=where, **options)
        assert [name for name, _ in pipe.unet.named_parameters()] == before

    refused(family(), folder, "does not fit")
    refused(
        family(), folder, "hold a LoRA of text_encoder but it holds the lora weights of unet", component="text_encoder"
    )
    save_file(portable | {"text_encoder.x.lora_A.weight": torch.ones(1)}, path)
    refused(family(), path, "has text encoder weights too")
    save_file(portable | {first.replace("lora_A", "lora_magnitude_vector"): torch.ones(1)}, path)
    refused(family(), path, "plain LoRA weights")
    save_file(portable, path)
    refused(family(), path, "Cannot open the LoRA")
    refused(family(), path, "opens no other LoRA of its text_encoder", component="text_encoder")
    path.write_bytes(path.read_bytes()[:100])
    refused(family(), path, "cannot be read")
    save_file({"transformer.x.lora_A.weight": torch.ones(1, 2)}, path)
    refused(family(), path, "has no weights for it")
    with pytest.raises(PolicyError, match="start="):
        Policy.load(family(), tmp_path)


def test_what_killed_saves_left_is_removed_and_what_live_ones_write_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    gone, live = ended.pid, os.getppid()
    kept = [f".lora.{live}.new", f".lora.{live}.old", f".lora2.{gone}.new", ".lora.new", "lora.old"]
    for name in (*kept, f".lora.{gone}.new", f".lora.{gone}.old", f".lora.{os.getpid()}.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    Policy.lora(family()).save(tmp_path / "lora")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "lora"])


def test_the_last_whole_result_is_kept_until_there_is_a_new_one(tmp_path):
    """A kill between two renames leaves the old folder under its other name."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old = tmp_path / f".lora.{ended.pid}.old"
    old.mkdir()
    with pytest.raises(RuntimeError, match="full"), new_folder(tmp_path / "lora"):
        raise RuntimeError("the disk is full")
    assert old.is_dir()
