"""Plain sampling: prompts -> images, each keyed by seed, prompt and its number among that prompt's images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from t2i_align.data.images import tensor_to_pil
from t2i_align.errors import T2IError
from t2i_align.keys import generator, key
from t2i_align.pipelines import call_keywords, check_call, load_pipeline
from t2i_align.prompts import MORE_TEXTS, NEGATIVE, Prompts, negatives, occurrences

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from t2i_align.pipelines import Driver, Kernel
    from t2i_align.trajectory import Trajectory


class Sample(NamedTuple):
    """One generated image: row of the prompt, its text, number among the prompt's images."""

    row: int
    prompt: str
    particle: int
    image: Image.Image


def generate(
    pipeline: str | Path | DiffusionPipeline,
    prompts: str | Sequence[str] | Prompts,
    *,
    particles: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    batch_size: int = 16,
    **call: Any,
) -> list[Image.Image]:
    """Draw `particles` images of every prompt, group-major (all of the first prompt first).

    An image depends on its prompt, `seed` and its number alone: not on `batch_size` (but for rounding), nor on the
    other prompts; a prompt that comes again in the table gets new images.

    Args:
        pipeline: what `load_pipeline` takes; open it there for another device, dtype, LoRAs, ...
        prompts: one text or many.
        particles: images per prompt.
        seed: any int.
        steps: denoising steps; what suits the pipeline (`call_defaults`) if None.
        guidance: guidance scale, by whichever keyword the pipeline takes it; what suits the pipeline if None.
        batch_size: images that go through the network together.
        call: other keywords of the pipeline's own `__call__` (`height`, `negative_prompt`, ...).

    Raises:
        T2IError: an unknown pipeline or keyword, or a count below 1.
    """
    if particles < 1:
        raise T2IError(f"Expected 1 or more particles but got {particles}.")
    pipe, table = load_pipeline(pipeline), Prompts.of(prompts)
    jobs = [(row, particle) for row in range(len(table)) for particle in range(particles)]
    call = call_keywords(pipeline, steps, guidance) | call
    return [sample.image for sample in generate_samples(pipe, table, jobs, seed=seed, batch_size=batch_size, **call)]


def generate_samples(
    pipe: DiffusionPipeline,
    prompts: Prompts,
    jobs: Sequence[tuple[int, int]],
    *,
    seed: int,
    batch_size: int,
    told: Prompts | None = None,
    **call: Any,
) -> Iterator[Sample]:
    """Draw the images named by `jobs`, pairs (row of `prompts`, particle), in that order, batch by batch.

    `told`: what the pipeline reads instead, a row for each of `prompts`, which still name the noise. A column
    `negative_prompt` goes before the keyword.
    """
    if batch_size < 1:
        raise T2IError(f"Expected a batch size of 1 or more but got {batch_size}.")
    general = call.get(NEGATIVE)
    own = negatives(told or prompts, general, inspect.signature(type(pipe).__call__).parameters)
    check_call(pipe, call if own is None else call | {NEGATIVE: own})
    if own is None:
        own = [general] * len(prompts) if general is None or isinstance(general, str) else list(general)
    if len(own) != len(prompts):
        raise T2IError(f"Expected a {NEGATIVE} for each of {len(prompts)} prompts but got {len(own)}.")
    repeats = occurrences(prompts)
    for first in range(0, len(jobs), batch_size):
        batch, made = jobs[first : first + batch_size], dict[tuple[int, int], Image.Image]()
        for missing in (False, True):  # a batch has negative prompts for all or for none
            part = [(row, particle) for row, particle in batch if (own[row] is None) is missing]
            if not part:
                continue
            # One generator per image is diffusers' own way to make an image independent of its batch mates.
            generators = [sample_generator(seed, prompts[row], repeats[row], particle) for row, particle in part]
            texts = [(told or prompts)[row] for row, _ in part]
            more = repeated(call, len(part)) | ({} if missing else {NEGATIVE: [own[row] for row, _ in part]})
            made |= zip(part, pipe(texts, generator=generators, output_type="pil", **more).images, strict=True)
        for row, particle in batch:
            yield Sample(row, prompts[row], particle, made[row, particle])


def repeated(call: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Keywords of a pipeline for a batch: texts for other encoders, such as `prompt_2`, one for each image."""
    return {k: [v] * count if k.startswith(MORE_TEXTS) and isinstance(v, str) else v for k, v in call.items()}


def sample_generator(seed: int, prompt: str, repeat: int, particle: int) -> torch.Generator:
    """The random stream of one image; `repeat` counts equal prompts of one table."""
    return generator(seed, "sample", prompt, repeat, particle)


def kernel_samples(
    driver: Driver, prompts: Prompts, jobs: Sequence[tuple[int, int]], *, batch_size: int, **options: Any
) -> Iterator[Sample]:
    """As `generate_samples`, by a kernel: the last latents of `chains`, whose options these are, as pictures.

    `driver`: made with the keywords of the pipeline's `__call__`, which decoding reads, too.
    """
    if batch_size < 1:
        raise T2IError(f"Expected a batch size of 1 or more but got {batch_size}.")
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        images = driver.decode(chains(driver, prompts, batch, batch_size=batch_size, **options).x[:, -1])
        for (row, particle), image in zip(batch, images, strict=True):
            yield Sample(row, prompts[row], particle, tensor_to_pil(image))


def chains(
    driver: Driver,
    prompts: Prompts,
    jobs: Sequence[tuple[int, int]],
    *,
    steps: int,
    kernel: Kernel,
    seed: int,
    shared_start: bool = False,
    batch_size: int = 16,
    **call: Any,
) -> Trajectory:
    """The denoising chains of images: functions of the weights, `seed`, prompt and number alone.

    Args:
        driver: of the pipeline.
        prompts: the whole table, since equal prompts in it get different images.
        jobs: pairs (row of `prompts`, particle).
        steps: denoising steps.
        kernel: of the steps.
        seed: any int.
        shared_start: all images of a prompt start from the noise of its particle 0.
        batch_size: images that go through the network together.
        call: keywords of the pipeline's `__call__`.
    """
    repeats = occurrences(prompts)
    ids = [key(prompts[row], repeats[row], particle) for row, particle in jobs]
    starts = [key(prompts[row], repeats[row], 0) for row, _ in jobs] if shared_start else ids
    cond = driver.encode(prompts[[row for row, _ in jobs]])
    x = driver.start(cond, steps, seed, starts, batch_size, **call)
    return driver.rollout(cond, steps, kernel, seed, batch_size=batch_size, ids=ids, start=x, **call)
