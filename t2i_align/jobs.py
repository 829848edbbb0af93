"""The jobs behind the verbs that make folders: settings in, results on disk, resumable."""

from __future__ import annotations

import inspect
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from PIL import Image
from pydantic import Field

from t2i_align.config import Settings
from t2i_align.data.images import contact_sheet, open_image
from t2i_align.devices import resolve_device
from t2i_align.errors import T2IError
from t2i_align.generation import generate_samples, kernel_samples
from t2i_align.pipelines import (
    Driver,
    call_defaults,
    call_keywords,
    card_of,
    check_call,
    load_kernel,
    load_pipeline,
)
from t2i_align.pipelines.catalog import guidance_keyword, steps_note
from t2i_align.pipelines.loading import default_dtype
from t2i_align.pipelines.models import find_model
from t2i_align.playground.grammar import CaptionError, parse
from t2i_align.progress import Progress
from t2i_align.prompts import NEGATIVE, Prompts
from t2i_align.runs import CONFIG, ENVIRONMENT, append_jsonl, open_folder, read_jsonl, write_jsonl

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

J = TypeVar("J", bound="GenerateJob")
SHEET_ROWS = 50  # prompts on a contact sheet


class GenerateJob(Settings):
    """What decides the images of `t2i-align generate`; None leaves a value to the pipeline."""

    prompts: tuple[str, ...]
    pipeline: str = "tiny-sd"
    particles: int = Field(8, gt=0)
    seed: int = 0
    steps: int | None = Field(None, gt=0)
    guidance: float | None = Field(None, allow_inf_nan=False)
    height: int | None = Field(None, gt=0)
    width: int | None = Field(None, gt=0)
    negative: str | None = Field(
        None, description="what guidance points away from, where the prompts' table says nothing"
    )
    keywords: dict[str, Any] = Field(default_factory=dict, description="others of the pipeline's `__call__`")
    columns: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict, description="of the prompts' table besides them, those that decide the images"
    )
    dtype: str | None = None
    variant: str | None = None
    revision: str | None = None
    vae: str | None = None
    lora: tuple[tuple[str, float], ...] = ()
    quantize: str | None = None
    kernel: str | None = Field(None, description="of the reverse steps; null: the pipeline's or the method's own")
    shared_start: bool = Field(False, description="all images of a prompt start from one noise; with a kernel")
    fallback: ClassVar[str] = "diffusers"  # where settings come from that neither the table nor a card has

    def call(self) -> dict[str, Any]:
        """Keywords of the pipeline's `__call__`."""
        size = {"height": self.height, "width": self.width}
        return (
            call_keywords(self.pipeline, self.steps, self.guidance, **size, negative_prompt=self.negative)
            | self.keywords
        )

    def table(self) -> Prompts:
        """The prompts with their columns."""
        return Prompts(self.prompts, self.columns)

    def resolved(self: J, device_type: str = "cpu") -> J:
        """The same with what suits the pipeline, on such a device, filled in."""
        call = self.call()
        guidance = call.get(guidance_keyword(self.pipeline))
        update = {"steps": call.get("num_inference_steps"), "guidance": guidance}
        update |= {"height": call.get("height"), "width": call.get("width")}
        return self.model_copy(update=update | {"dtype": self.dtype or default_dtype(self.pipeline, device_type)})

    def open(self, **options: Any) -> DiffusionPipeline:
        """The pipeline; `options` are those of `load_pipeline` that do not decide the images."""
        return load_pipeline(
            self.pipeline,
            dtype=self.dtype,
            variant=self.variant,
            revision=self.revision,
            vae=self.vae,
            lora=list(self.lora),
            quantize=self.quantize,
            **options,
        )


def call_notes(job: GenerateJob, pipe: DiffusionPipeline) -> Iterator[str]:
    """How a job calls its pipeline and where that comes from; then whether a distilled model gets too many steps."""
    own = {name: parameter.default for name, parameter in inspect.signature(type(pipe).__call__).parameters.items()}
    call = own | job.call()
    steps, guidance = call["num_inference_steps"], call.get(guidance_keyword(job.pipeline))
    said = f"{steps} step{'' if steps == 1 else 's'}"
    said += "" if guidance is None else f", guidance {guidance:g}"
    said += f", {call['width']}x{call['height']}" if call.get("width") and call.get("height") else ""
    source = "its card" if call_defaults(job.pipeline) else job.fallback
    if find_model(job.pipeline) is not None:
        source = "the table of models"
    yield f"{job.pipeline}: {said} (defaults from {source}; --steps, --guidance, --height and --width change them)"
    acting = call["true_cfg_scale"] if "true_cfg_scale" in own else guidance
    if (job.negative or any(job.columns.get(NEGATIVE, ()))) and (acting or 0) <= 1:
        said = "--keyword true_cfg_scale=4" if "true_cfg_scale" in own else "--guidance"
        yield f"a negative prompt acts with a guidance above 1 alone: {said}"
    note = steps_note(job.pipeline, steps)
    if note is not None:
        yield note


def prompt_notes(pipeline: str | Path, prompts: Sequence[str]) -> Iterator[str]:
    """What to say about prompts that a pipeline of the playground was not trained to read."""
    if card_of(pipeline).get("prompts") != "playground":
        return
    for prompt in dict.fromkeys(prompts):
        try:
            parse(prompt)
        except CaptionError as error:
            yield f"{pipeline} was trained on playground captions alone. {error}"


class Opened(NamedTuple):
    """A job that is ready: with what suits the pipeline filled in, the pipeline, its keywords, the output folder."""

    job: Any
    pipe: DiffusionPipeline
    call: dict[str, Any]
    folder: Path


def open_job(
    job: GenerateJob, out: Path, place: torch.device, *, resume: bool, overwrite: bool, **options: Any
) -> Opened:
    """Open what a job needs and say how it will call its pipeline; the folder is made last.

    `options` are those of `load_pipeline` that the job does not name: `offload`, `attention`, ...

    Raises:
        T2IError: a pipeline, a keyword or a folder that cannot serve.
    """
    job = job.resolved(place.type)
    if job.kernel is not None and job.steps is None:
        raise T2IError(f"Expected --steps with --kernel, since {job.pipeline} says nothing of its own steps.")
    for line in prompt_notes(job.pipeline, job.prompts):
        print(f"note: {line}", file=sys.stderr)
    call = job.call()
    pipe = job.open(device=place, **options)
    check_call(pipe, call | ({NEGATIVE: ""} if any(job.columns.get(NEGATIVE, ())) else {}))
    folder = open_folder(out, job, resume=resume, overwrite=overwrite)
    for line in call_notes(job, pipe):
        print(f"note: {line}", file=sys.stderr)
    (folder / "images").mkdir(exist_ok=True)
    return Opened(job, pipe, call, folder)


@contextmanager
def failing_cleanly(job: GenerateJob, folder: Path, resume: bool) -> Iterator[None]:
    """Where a new job fails before its first image what it put into its folder goes, too, and nothing else.

    The `keywords`, whose values nothing checks before, are named where the pipeline fails with them.
    """
    try:
        yield
    except Exception as error:
        if not resume and not any((folder / "images").iterdir()):
            for name in ("images", "history", "prompts"):
                shutil.rmtree(folder / name, ignore_errors=True)
            for name in (CONFIG, ENVIRONMENT, "results.jsonl"):
                (folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # where something else lies, or it is the current folder
                folder.rmdir()
        if isinstance(error, T2IError) or not job.keywords:
            raise
        said = ", ".join(f"{name}={value}" for name, value in job.keywords.items())
        raise T2IError(
            f"{job.pipeline} fails with --keyword {said} ({type(error).__name__}: {' '.join(str(error).split())})."
        ) from error


def image_name(row: int, particle: int) -> str:
    """The file of an image within the folder of a job."""
    return f"images/{row:05d}-{particle:03d}.png"


def write_sheet(path: Path, images: Sequence[Path], columns: int, labels: Sequence[str] = ()) -> None:
    """Lay image files out as a contact sheet, small ones enlarged."""
    shown = [open_image(image) for image in images]
    contact_sheet(shown, columns, labels=labels, zoom=max(1, 128 // shown[0].width)).save(path)


def run_generate(
    job: GenerateJob,
    out: Path,
    *,
    batch_size: int = 16,
    device: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Write `images/ROW-PARTICLE.png`, `results.jsonl` and `contact_sheet.png`; return the result rows.

    `options`: see `open_job`.
    """
    kernel = None if job.kernel is None else load_kernel(job.kernel)
    read = {name: values for name, values in job.columns.items() if name == NEGATIVE}  # others do not decide the images
    job = job.model_copy(update={"columns": read})
    place = resolve_device(device)
    job, pipe, call, folder = open_job(job, out, place, resume=resume, overwrite=overwrite, **options)
    results = folder / "results.jsonl"
    rows = [row for row in read_jsonl(results) if (folder / row["image"]).is_file()]
    write_jsonl(results, rows)  # without rows whose images are gone
    done = {(row["row"], row["particle"]) for row in rows}
    table = job.table()
    jobs = [(row, p) for row in range(len(table)) for p in range(job.particles) if (row, p) not in done]
    options = {"seed": job.seed, "batch_size": batch_size}
    if kernel is None:
        samples = generate_samples(pipe, table, jobs, **options, **call)
    else:
        options |= {"steps": call.pop("num_inference_steps"), "kernel": kernel, "shared_start": job.shared_start}
        samples = kernel_samples(Driver(pipe, **call), table, jobs, **options)
    progress = Progress(len(table) * job.particles, "generating", start=len(done), batch=batch_size)
    with failing_cleanly(job, folder, resume), progress:
        for sample in samples:
            name = image_name(sample.row, sample.particle)
            sample.image.save(folder / name)
            row = {
                "image": name,
                "prompt": sample.prompt,
                "row": sample.row,
                "particle": sample.particle,
                "seed": job.seed,
            }
            append_jsonl(results, [row])
            rows.append(row)
            progress.advance()
    size = Image.open(folder / rows[0]["image"]).size
    if any(asked not in (None, made) for asked, made in zip((job.width, job.height), size, strict=True)):
        print(
            f"note: pictures are {size[0]}x{size[1]}, not {job.width or size[0]}x{job.height or size[1]} as asked: "
            f"{job.pipeline} rounds sizes to what its latents can be",
            file=sys.stderr,
        )
    rows.sort(key=lambda row: (row["row"], row["particle"]))
    shown = [folder / row["image"] for row in rows[: SHEET_ROWS * job.particles]]
    write_sheet(folder / "contact_sheet.png", shown, job.particles, job.prompts)
    return rows
