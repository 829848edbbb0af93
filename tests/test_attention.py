import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry

from t2i_align.pipelines import PipelineError, attention
from t2i_align.pipelines.attention import check_attention, set_attention
from tests.families import FAMILIES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DISPATCHING = ["flux-dev", "flux2-klein", "qwen-image", "chroma", "z-image"]
OLDER = ["sd", "sdxl", "sd3", "pixart-sigma", "aura-flow", "sana", "lumina2", "cogview4", "hunyuan-dit"]


def names(net):
    """The back-end that each attention of a network names."""
    processors = [m.processor for m in net.modules() if getattr(m, "processor", None) is not None]
    return {getattr(processor, "_attention_backend", "-") for processor in processors}


@pytest.mark.parametrize("family", DISPATCHING)
def test_a_network_with_a_dispatcher_is_switched_and_others_are_not(family):
    pipe, other = FAMILIES[family]().pipe, FAMILIES[family]().pipe
    default = _AttentionBackendRegistry.get_active_backend()
    set_attention(pipe, "_native_math")
    assert names(pipe.transformer) == {"_native_math"}
    assert names(other.transformer) == {None}
    assert _AttentionBackendRegistry.get_active_backend() == default
    set_attention(pipe, "native")
    assert names(pipe.transformer) == {"native"}


def test_the_switch_decides_which_kernel_runs():
    family = FAMILIES["flux-dev"]()
    family.pipe.set_progress_bar_config(disable=True)
    kernels = {}
    for backend in ("native", "_native_math"):
        set_attention(family.pipe, backend)
        inputs = family.embeds(1) if family.embeds else {"prompt": "a red circle"}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            family.pipe(**inputs, **family.call, num_inference_steps=1, output_type="latent")
        counts = {event.key: event.count for event in profile.key_averages()}
        kernels[backend] = counts.get("aten::_scaled_dot_product_attention_math", 0)
    assert kernels["_native_math"] > kernels["native"]


@pytest.mark.parametrize("family", OLDER)
def test_a_network_without_a_dispatcher_is_native_and_nothing_else(family):
    pipe = FAMILIES[family]().pipe
    set_attention(pipe, "native")
    with pytest.raises(PipelineError, match="Expected attention=native.*but got '_native_math'"):
        set_attention(pipe, "_native_math")


@pytest.mark.parametrize("family", ["lumina2", "cogview4", "sana"])
def test_processors_that_xformers_would_replace_by_wrong_ones_are_kept(family):
    with pytest.raises(PipelineError, match="Expected attention=native for .*but got 'xformers'"):
        set_attention(FAMILIES[family]().pipe, "xformers")


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may work here")
def test_a_switch_that_fails_is_said():
    with pytest.raises(PipelineError, match="'xformers' cannot be used here"):
        set_attention(FAMILIES["sd"]().pipe, "xformers")


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "part"), [("sd", "unet"), ("sdxl", "unet"), ("sd3", "transformer")])
def test_xformers_replaces_the_processors_of_older_networks(family, part):
    pytest.importorskip("xformers")
    pipe = FAMILIES[family]().pipe.to("cuda")
    set_attention(pipe, "xformers")
    modules = [m for m in getattr(pipe, part).modules() if getattr(m, "processor", None) is not None]
    assert all(type(module.processor).__name__.startswith("XFormers") for module in modules)


def test_a_switch_that_changes_nothing_is_said(monkeypatch):
    pipe = FAMILIES["sd"]().pipe
    monkeypatch.setattr(type(pipe.unet), "enable_xformers_memory_efficient_attention", lambda net: None)
    with pytest.raises(PipelineError, match="UNet2DConditionModel did not change"):
        set_attention(pipe, "xformers")


def test_a_pipeline_without_attention_is_refused():
    with pytest.raises(PipelineError, match="no network whose attention"):
        set_attention(FAMILIES["toy"]().pipe, "native")


@pytest.mark.parametrize(
    ("name", "device", "message"),
    [
        ("flahs", GPU, "Did you mean 'flash'. Available: .*native"),
        ("flash", CPU, "Expected a GPU"),
        ("xformers", CPU, "Expected a GPU"),
        ("sage_hub", CPU, "Expected a GPU"),
        ("sage_varlen", GPU, "needs sageattention: `pip install sageattention`"),
        ("flash_hub", GPU, "needs kernels"),
    ],
)
def test_back_ends_that_are_not_here_are_refused_before_loading(name, device, message, monkeypatch):
    monkeypatch.setattr(attention, "find_spec", lambda package: None)
    with pytest.raises(PipelineError, match=message):
        check_attention(name, device)


def test_back_ends_of_pytorch_need_nothing():
    for name in ("native", "_native_math", "flex"):
        check_attention(name, CPU)
