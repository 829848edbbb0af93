import json
import shutil

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

import t2i_align as t2i
from t2i_align.config import ConfigError, TrainConfig, load_config
from t2i_align.pipelines import PipelineError, call_defaults, call_keywords, load_pipeline
from t2i_align.pipelines.catalog import guidance_keyword, steps_note
from t2i_align.pipelines.loading import ALIASES, default_dtype
from t2i_align.pipelines.models import MODELS
from tests.families import FAMILIES

CALL = {"num_inference_steps": 3, "output_type": "np"}


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline("tiny-sd")


@pytest.fixture
def folder(tmp_path):
    """A pipeline folder to change."""
    return shutil.copytree(ALIASES["tiny-sd"], tmp_path / "mine")


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def image(pipe):
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), **CALL).images


def test_tiny_sd_opens_with_the_stock_class_and_draws_the_same_picture(tiny):
    stock = StableDiffusionPipeline.from_pretrained(ALIASES["tiny-sd"], dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    assert type(tiny) is StableDiffusionPipeline
    assert (image(tiny) == image(stock)).all()


def test_a_folder_and_an_object_work_like_an_alias(tiny, tmp_path):
    assert load_pipeline(tiny) is tiny
    tiny.save_pretrained(tmp_path / "mine")
    again = load_pipeline(tmp_path / "mine")
    weights = zip(tiny.unet.parameters(), again.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("dtype", ["bf16", torch.bfloat16])
def test_dtype_is_honoured(dtype):
    pipe = load_pipeline("tiny-sd", dtype=dtype)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_the_number_type_follows_device_and_model():
    assert [default_dtype("flux-dev", device) for device in ("cpu", "cuda", "mps")] == ["fp32", "bf16", "bf16"]
    assert default_dtype("somebody/model", "cuda") == default_dtype("tiny-sd", "cuda") == "fp32"


# Call settings


def test_defaults_come_from_the_card(tmp_path, tiny):
    assert call_defaults("tiny-sd")["num_inference_steps"] == 25
    tiny.save_pretrained(tmp_path / "mine")
    assert call_defaults(tmp_path / "mine") == {}


def test_a_folder_is_not_taken_for_a_model_of_its_name(folder):
    turbo = folder.rename(folder.parent / "sdxl-turbo")
    (turbo / "card.json").unlink()
    assert call_defaults(turbo) == {}
    assert steps_note(turbo, 50) is None


def test_what_is_given_wins_over_the_table():
    assert call_keywords("sdxl-turbo") == dict(MODELS["sdxl-turbo"].call)
    given = call_keywords("sdxl-turbo", steps=4, guidance=1.0, height=64, width=None)
    assert given == {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 64, "width": 512}


def test_guidance_goes_by_the_keyword_that_a_pipeline_takes(tmp_path):
    qwen = call_keywords("Qwen/Qwen-Image", guidance=2.5)
    assert qwen["true_cfg_scale"] == 2.5
    assert qwen["negative_prompt"] == " "
    assert "guidance_scale" not in qwen
    pipes = {name: FAMILIES[name]().pipe for name in ("qwen-image", "flux-dev", "sd")}
    expected = {"qwen-image": "true_cfg_scale", "flux-dev": "guidance_scale", "sd": "guidance_scale"}
    assert {name: guidance_keyword(pipe) for name, pipe in pipes.items()} == expected
    (tmp_path / "model_index.json").write_text('{"_class_name": "QwenImagePipeline"}')
    assert call_keywords(tmp_path, guidance=3.0) == {"true_cfg_scale": 3.0}


def test_many_steps_of_a_distilled_model_are_remarked_upon():
    assert "distilled to 1 to 4 steps: 50 take 50 times as long" in steps_note("sdxl-turbo", 50)
    assert steps_note("sdxl-turbo", 4) is steps_note("sdxl", 50) is steps_note("tiny-sd", 50) is None


# Refusals


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny-ds", "Did you mean 'tiny-sd'"),
        ("sdlx-turbo", "Did you mean 'sdxl-turbo'"),
        ("no/such/folder", "Unknown pipeline"),
        (".", "no model_index.json"),
    ],
)
def test_unknown_pipelines_are_refused_in_a_sentence(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(name)


def test_the_folder_of_a_run_is_told_from_its_result(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "model_index.json").write_text("{}")
    with pytest.raises(PipelineError, match="of a run take .*run/model"):
        load_pipeline(tmp_path / "run")
    (tmp_path / "run" / "lora").mkdir()
    with pytest.raises(PipelineError, match="of a run take --lora .*run/lora"):
        load_pipeline(tmp_path / "run")
    with pytest.raises(PipelineError, match="of a run take .*run/lora"):
        load_pipeline("tiny-sd", lora=tmp_path / "run")
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(ConfigError, match="use .*run/config.yaml"):
        load_config(TrainConfig, tmp_path / "run")


def test_a_pipeline_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(PipelineError, match="Cannot open the pipeline"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(PipelineError, match="not a JSON object"):
        load_pipeline(tmp_path)
    with pytest.raises(PipelineError, match="but got 3"):
        load_pipeline(3)
    with pytest.raises(PipelineError, match="Unknown pipeline"):
        load_pipeline("x" * 400)


def test_truncated_weights_are_named(folder):
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(PipelineError, match="Cannot open the pipeline"):
        load_pipeline(folder)


def test_missing_weights_and_components_are_named_before_any_is_read(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(PipelineError, match="lacks the weights of .*scheduler.*unet"):
        load_pipeline(folder)


def test_a_missing_shard_is_missed(tiny, tmp_path):
    tiny.save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert (image(load_pipeline(tmp_path)) == image(tiny)).all()
    shards[0].unlink()
    with pytest.raises(PipelineError, match="lacks the weights of unet"):
        load_pipeline(tmp_path)


def test_pickles_are_never_opened(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(PipelineError, match=r"unet of .* only pickled weights \(diffusion_pytorch_model.bin\)"):
        load_pipeline(folder)


def test_pickles_beside_safetensors_do_no_harm(folder):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    load_pipeline(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "Unknown dtype 'fp8'. Available: fp32, bf16, fp16"),
        ({"dtype": torch.int8}, "Unknown dtype torch.int8"),
        ({"variant": "fp16"}, "no weights of the variant 'fp16'"),
        ({"revision": "main"}, "Expected a hub id for the revision 'main'"),
        ({"offload": "disk"}, "Unknown offload 'disk'. Available: model, sequential"),
        ({"offload": "model"}, "offload='model' needs an accelerator"),
        ({"quantize": "8bit"}, "Unknown quantize '8bit'. Available: 4bit"),
        ({"quantize": "4bit"}, "quantize='4bit' needs a GPU"),
        ({"attention": "sdpa"}, "Unknown attention 'sdpa'. .*native"),
        ({"attention": "flash"}, "Expected a GPU"),
        ({"attention": "_native_math"}, "Expected attention=native or xformers for UNet2DConditionModel"),
        ({"lora": 3}, "Expected a LoRA as a path, a hub id, or a pair"),
        ({"lora": ("style", "strong")}, "There is no LoRA style"),
        ({"lora": ("a/b", float("nan"))}, "Expected a LoRA as a path"),
        ({"lora": "org/style"}, "run `hf download org/style`"),
        ({"lora": __file__}, "Expected a LoRA in safetensors"),
        ({"vae": "nowhere"}, "There is no autoencoder nowhere"),
        ({"vae": "org/vae"}, "run `hf download org/vae`"),
        ({"vae": 3}, "Expected vae to be a folder"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_options_that_cannot_be_served_are_refused(options, message, no_hub):
    with pytest.raises(t2i.T2IError, match=message):
        load_pipeline("tiny-sd", **options)


def test_options_are_not_laid_over_an_open_pipeline(tiny):
    with pytest.raises(PipelineError, match="dtype, vae_tiling for a pipeline to open but got one .* open"):
        load_pipeline(tiny, dtype="bf16", vae_tiling=True)


# Autoencoders


def test_another_autoencoder_is_taken_from_a_folder_a_pipeline_or_an_object(tiny, folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.25
    vae.save_pretrained(tmp_path / "vae")
    vae.save_pretrained(folder / "vae")
    images = [image(load_pipeline("tiny-sd", vae=source)) for source in (tmp_path / "vae", str(folder), vae)]
    assert np.abs(images[0] - image(tiny)).mean() > 0.05
    assert all((images[0] == other).all() for other in images)


def test_an_autoencoder_of_another_space_is_refused(tmp_path):
    FAMILIES["flux-dev"]().pipe.vae.save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match="Expected an autoencoder of 8 latent channels but .* has 1"):
        load_pipeline("tiny-sd", vae=tmp_path)


def test_an_autoencoder_that_is_not_one_is_refused(tmp_path, folder):
    with pytest.raises(PipelineError, match="Expected an autoencoder .*config.json"):
        load_pipeline("tiny-sd", vae=tmp_path)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(PipelineError, match="only pickled weights"):
        load_pipeline("tiny-sd", vae=folder)


def put(cache, repo, part):
    """Store something with `save_pretrained` in a hub cache."""
    store = cache / f"models--{repo.replace('/', '--')}"
    part.save_pretrained(store / "snapshots" / "abc")
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("abc")


def test_sdxl_in_fp16_gets_an_autoencoder_that_does_not_overflow(no_hub, tmp_path):
    family = FAMILIES["sdxl"]()
    put(tmp_path / "hub", MODELS["sdxl"].source, family.pipe)
    with pytest.warns(UserWarning, match="overflows in fp16.*decoded in fp32.*hf download madebyollin"):
        kept = load_pipeline("sdxl", dtype="fp16")
    assert kept.vae.dtype == torch.float16
    assert kept.vae.config.force_upcast  # the pipeline decodes in fp32
    images = kept("a red circle", **CALL, height=32, width=32).images
    assert np.isfinite(images).all()

    safe = family.pipe.vae
    with torch.no_grad():
        safe.decoder.conv_out.bias.fill_(7.0)
    put(tmp_path / "hub", MODELS["sdxl"].vae, safe)
    pipe = load_pipeline("sdxl", dtype="fp16")
    assert (pipe.vae.decoder.conv_out.bias == 7).all()
    assert not pipe.vae.config.force_upcast
    assert not (load_pipeline("sdxl", dtype="fp32").vae.decoder.conv_out.bias == 7).any()


def test_slicing_and_tiling_are_switched_on(tiny):
    pipe = load_pipeline("tiny-sd", vae_slicing=True, vae_tiling=True)
    assert (pipe.vae.use_slicing, pipe.vae.use_tiling) == (True, True)
    assert (tiny.vae.use_slicing, tiny.vae.use_tiling) == (False, False)


# LoRAs


def save_lora(folder, seed):
    """A random LoRA of tiny-sd, as trainers save them."""
    pipe = load_pipeline("tiny-sd")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    layers = peft.get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers={k: 3 * v for k, v in layers.items()})
    return folder


def test_loras_add_up_with_their_weights(tiny, tmp_path):
    a, b = save_lora(tmp_path / "a", 1), save_lora(tmp_path / "b", 2)
    stock = StableDiffusionPipeline.from_pretrained(ALIASES["tiny-sd"], dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    for name, folder in (("x", a), ("y", b)):
        stock.load_lora_weights(folder, adapter_name=name)
    stock.set_adapters(["x", "y"], [0.5, 2.0])
    both = load_pipeline("tiny-sd", lora=[(str(a), 0.5), (b / "pytorch_lora_weights.safetensors", 2)])
    assert (image(both) == image(stock)).all()
    one = image(load_pipeline("tiny-sd", lora=a))
    assert np.abs(one - image(tiny)).max() > 0.01
    assert np.abs(one - image(both)).max() > 0.01
    off = image(load_pipeline("tiny-sd", lora=(a, 0.0)))
    assert np.abs(off - image(tiny)).max() < 1e-5


def test_a_lora_is_found_in_the_cache_of_the_hub(tiny, tmp_path, no_hub):
    store = tmp_path / "hub" / "models--org--style"
    save_lora(store / "snapshots" / "abc", 1)
    (store / "refs").mkdir()
    (store / "refs" / "main").write_text("abc")
    assert np.abs(image(load_pipeline("tiny-sd", lora="org/style")) - image(tiny)).max() > 0.01


def test_a_lora_that_fits_nothing_is_refused(tmp_path):
    from safetensors.torch import save_file

    other = {f"transformer.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(PipelineError, match="other.safetensors"):
        load_pipeline("tiny-sd", lora=tmp_path)
    save_file(other, tmp_path / "another.safetensors")
    with pytest.raises(PipelineError, match=r"found several \(another.safetensors, other.safetensors\): name the file"):
        load_pipeline("tiny-sd", lora=tmp_path)
    with pytest.raises(PipelineError, match="found none"):
        load_pipeline("tiny-sd", lora=ALIASES["tiny-sd"])


def test_a_pipeline_that_takes_no_lora_says_so_before_loading(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtSigmaPipeline"}))
    lora = save_lora(tmp_path / "lora", 1)
    with pytest.raises(PipelineError, match="PixArtSigmaPipeline has no load_lora_weights"):
        load_pipeline(tmp_path, lora=lora)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"offload": "model"}, {"offload": "sequential"}, {"dtype": "fp16"}])
def test_a_gpu_draws_the_same_picture(tiny, options):
    pipe = load_pipeline("tiny-sd", device="cuda", **options)
    assert np.abs(image(pipe) - image(tiny)).mean() < 0.02


@pytest.mark.gpu
def test_four_bits_are_near_enough(tiny):
    pytest.importorskip("bitsandbytes")
    pipe = load_pipeline("tiny-sd", device="cuda", quantize="4bit")
    assert "Linear4bit" in {type(module).__name__ for module in pipe.unet.modules()}
    assert np.isfinite(image(pipe)).all()
