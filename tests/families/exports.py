"""Every text-to-image pipeline that diffusers exports: tested here, within the driver's reach, or out of it and why."""

import inspect
import re

import diffusers as d
from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as AUTO

from t2i_align.pipelines.calling import UNKEYED

# Classes of other tasks, by how diffusers names them; a pipeline of its AutoPipelineForText2Image is never one.
OTHER_TASKS = re.compile(
    "Img2Img|I2I|Inpaint|Edit|Pix2Pix|Fill|Redux|Upscale|SuperRes|Refiner|Depth2Img|Layered|Modular|Prior|Decoder|"
    "Audio|Music|AceStep|ShapE|Video|World|Latte|Allegro|Wan|LTX|Mochi|I2V|T2V|TI2VA|LLaDA|DiffusionGemma"
)
REFUSED = {
    **dict.fromkeys(UNKEYED, "the control image's latents are drawn from torch's global random state in every call"),
    "SanaSprintPipeline": "its scheduler (SCM) is not read",
    "Cosmos2TextToImagePipeline": "its flow scheduler holds variance-exploding levels",
    "HeliosPipeline": "it makes videos",
    "HeliosPyramidPipeline": "it makes videos",
}


def text_to_image() -> dict[str, type]:
    """The exported classes whose call takes a prompt, needs no picture and makes pictures."""
    found = {made.__name__: made for made in AUTO.values()}
    for name in dir(d):
        if not name.endswith("Pipeline") or OTHER_TASKS.search(name):
            continue
        if "Onnx" in name:  # has no torch networks; exported where onnxruntime is installed
            continue
        try:
            made = getattr(d, name)
            call = inspect.signature(inspect.unwrap(made.__call__)).parameters
        except ImportError:  # needs a library that is not installed
            continue
        required = {key for key, value in call.items() if value.default is inspect.Parameter.empty}
        if "prompt" in call and "num_frames" not in call and required <= {"self", "prompt", "kwargs"}:
            found[name] = made
    return dict(sorted(found.items()))


def standing(made: type, tested: set[str]) -> tuple[str, str]:
    """(`tested`, `reachable`, `deprecated` or `unreachable`, the reason)."""
    call = inspect.signature(inspect.unwrap(made.__call__)).parameters
    missing = [name for name in ("encode_prompt", "prepare_latents") if not hasattr(made, name)]
    missing += [f"{name}= argument" for name in ("prompt", "latents") if name not in call]
    if made.__name__ in tested:
        return "tested", ""
    if made.__name__ in REFUSED:
        return "unreachable", REFUSED[made.__name__]
    if missing:
        return "unreachable", f"no {', '.join(missing)}"
    if ".deprecated." in made.__module__:
        return "deprecated", "by diffusers"
    return "reachable", "has all that the driver needs; not built here"
