"""`t2i-align generate`: prompts -> images, a results table and a contact sheet."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Exit, Option

# Keywords of pipelines that have options of their own, or are decided here.
OPTIONS = {
    "prompt": "the argument PROMPT",
    "negative_prompt": "--negative",
    "num_inference_steps": "--steps",
    "height": "--height",
    "width": "--width",
    "generator": "--seed",
    "num_images_per_prompt": "--particles",
    **dict.fromkeys(("output_type", "return_dict", "latents"), "what `generate` decides itself"),
}


def list_models(wanted: bool) -> None:
    if not wanted:
        return
    from t2i_align.cli.tables import print_table
    from t2i_align.pipelines.models import model_rows

    print_table(model_rows())
    raise Exit


def list_settings(method: str | None) -> None:
    if method is None:
        return
    from t2i_align.cli.tables import print_settings
    from t2i_align.steering import method_class

    print_settings(method_class(method))
    raise Exit


def generate(
    prompts: Annotated[
        str, Argument(metavar="PROMPT|FILE", help="A prompt, or a .txt, .jsonl, .json, .csv, .tsv or .parquet file.")
    ],
    out: Annotated[Path, Option(help="Folder for the images, the table of results and contact_sheet.png.")],
    settings: Annotated[
        list[str] | None, Argument(metavar="[KEY=VALUE]...", help="Settings of the steering method: particles=8.")
    ] = None,
    pipeline: Annotated[
        str, Option(help="Alias (see --models), hub id or folder of a diffusers pipeline.")
    ] = "tiny-sd",
    particles: Annotated[
        int | None, Option(min=1, help="Images per prompt. [default: 8; the method's own where steered]")
    ] = None,
    steer: Annotated[
        str | None, Option(metavar="METHOD", help="Steer by --rewards: best_of_n, fk, svdd, das, guidance, reno, ...")
    ] = None,
    rewards: Annotated[str | None, Option(help='What --steer maximises: "2 * pickscore + image_reward".')] = None,
    kernel: Annotated[
        str | None,
        Option(help="Of the reverse steps: ddim(1.0), flow_sde(0.7), ode. [default: the pipeline's or method's own]"),
    ] = None,
    decoder: Annotated[
        str | None, Option(help="Folder or hub id of a small autoencoder for rewards along the way: madebyollin/taesd.")
    ] = None,
    choices: Annotated[
        bool, Option("--choices", help="Write choices.json, to say which images are better and train on it by d3po.")
    ] = False,
    shared_start: Annotated[
        bool, Option("--shared-start", help="All images of a prompt start from one noise; with --kernel.")
    ] = False,
    save_pairs: Annotated[
        Path | None, Option(help="Folder for the best and worst image of each steered prompt, as preference pairs.")
    ] = None,
    seed: Annotated[int, Option(help="An image depends on prompt, seed and its number alone.")] = 0,
    steps: Annotated[
        int | None, Option(min=1, help="Denoising steps. [default: the pipeline's own; steered, where unknown, 20]")
    ] = None,
    guidance: Annotated[float | None, Option(help="Guidance scale. [default: the pipeline's own]")] = None,
    negative: Annotated[
        str | None,
        Option(
            help="Negative prompt. A column negative_prompt of the file goes before it. Acts with guidance above 1."
        ),
    ] = None,
    keyword: Annotated[
        list[str] | None,
        Option(metavar="KEY=VALUE", help="Of the pipeline's __call__, may be repeated: guidance_rescale=0.7."),
    ] = None,
    height: Annotated[int | None, Option(min=1, help="Pixels. [default: the pipeline's own]")] = None,
    width: Annotated[int | None, Option(min=1, help="Pixels. [default: the pipeline's own]")] = None,
    batch_size: Annotated[
        int, Option("--max-batch", "--batch-size", min=1, help="Images computed together, of one prompt or several.")
    ] = 16,
    device: Annotated[str, Option(help="cpu, cuda, cuda:1, mps; auto takes the GPU if there is one.")] = "auto",
    dtype: Annotated[
        str | None, Option(help="fp32, bf16, fp16. [default: fp32 on the CPU, else what suits the model]")
    ] = None,
    variant: Annotated[str | None, Option(help="Of the weight files, such as fp16. [default: what suits]")] = None,
    revision: Annotated[str | None, Option(help="Branch, tag or commit of a hub id.")] = None,
    vae: Annotated[str | None, Option(help="Folder or hub id of another autoencoder.")] = None,
    lora: Annotated[
        list[str] | None, Option(metavar="LORA[@WEIGHT]", help="File, folder or hub id; several add up.")
    ] = None,
    quantize: Annotated[str | None, Option(help="4bit: smaller weights by bitsandbytes, on a GPU.")] = None,
    offload: Annotated[
        str | None, Option(help="model, sequential: weights in main memory until they are called, on a GPU.")
    ] = None,
    vae_slicing: Annotated[bool, Option("--vae-slicing", help="Decode image by image.")] = False,
    vae_tiling: Annotated[bool, Option("--vae-tiling", help="Decode large images in tiles.")] = False,
    attention: Annotated[str | None, Option(help="native, xformers, flash, ... [default: native]")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on in an existing folder.")] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace an existing folder of ours.")] = False,
    models: Annotated[
        bool,
        Option("--models", is_eager=True, callback=list_models, help="List the aliases and their settings, and exit."),
    ] = False,
    settings_of: Annotated[
        str | None,
        Option(
            "--settings",
            metavar="METHOD",
            is_eager=True,
            callback=list_settings,
            help="List the settings of a steering method, and exit.",
        ),
    ] = None,
) -> None:
    """Generate images from prompts; with --steer, steered by rewards."""
    from t2i_align.errors import T2IError
    from t2i_align.pipelines.catalog import check_pipeline, guidance_keyword
    from t2i_align.prompts import read_prompts

    check_steering(steer, rewards, settings or [], decoder, save_pairs)
    check_kernel(steer, kernel, choices, shared_start)
    download = check_pipeline(pipeline, revision)
    table, loras = read_prompts(prompts), [read_lora(word) for word in lora or []]
    keywords = read_keywords(keyword or [])
    if guidance is not None and guidance_keyword(pipeline) in keywords:
        raise T2IError(f"Expected --guidance or --keyword {guidance_keyword(pipeline)} but got both.")
    job: dict[str, Any] = {
        "prompts": table.text,
        "pipeline": pipeline,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "negative": negative,
        "keywords": keywords,
        "columns": dict(table.columns),
        "height": height,
        "width": width,
        "dtype": dtype,
        "variant": variant,
        "revision": revision,
        "vae": vae,
        "lora": tuple(loras),
        "quantize": quantize,
        "kernel": kernel,
        "shared_start": shared_start,
    }
    run: dict[str, Any] = {
        "device": device,
        "resume": resume,
        "overwrite": overwrite,
        "offload": offload,
        "vae_slicing": vae_slicing,
        "vae_tiling": vae_tiling,
        "attention": attention,
    }
    if download:
        print(f"note: downloading {download} (several GB) to the cache of the hub", file=sys.stderr)
    if steer is None:
        from t2i_align.jobs import GenerateJob, run_generate

        plain = GenerateJob(**job, particles=particles or 8)
        rows = run_generate(plain, out, batch_size=batch_size, **run)
        print(f"{len(rows)} images of {len(table)} prompts in {out}; open {out / 'contact_sheet.png'}")
        if choices:
            from t2i_align.choices import write_template

            print(f"say which images are better in {write_template(out, plain)}, then train with method.choices={out}")
        return
    from t2i_align.data.preferences import PAIRS_FILE
    from t2i_align.steering.job import SteerJob, read_method, run_steer

    name, resolved = read_method(steer, settings or [], particles)
    steering = {"steer": name, "settings": resolved, "rewards": rewards or "", "decoder": decoder}
    steered = SteerJob(**job, **steering)
    rows = run_steer(steered, out, max_batch=batch_size, save_pairs=save_pairs, **run)
    best = [row["reward"] for row in rows if row["is_best"]]
    print(
        f"{len(rows)} images of {len(table)} prompts in {out}, mean best reward {sum(best) / len(best):.4g}; open "
        f"{out / 'contact_sheet.png'}"
    )
    if save_pairs is not None:
        print(f"preference pairs in {save_pairs / PAIRS_FILE}")


def check_steering(
    steer: str | None, rewards: str | None, settings: list[str], decoder: str | None, save_pairs: Path | None
) -> None:
    """Refuse options of steering without it, and steering without a reward."""
    from t2i_align.errors import T2IError

    if steer is not None and not rewards:
        raise T2IError('Expected --rewards with --steer, such as --rewards "2 * pickscore + image_reward".')
    given = {"--rewards": rewards, "--decoder": decoder, "--save-pairs": save_pairs, " ".join(settings): settings}
    if steer is None and (idle := [name for name, value in given.items() if value]):
        raise T2IError(f"Expected --steer METHOD with {', '.join(idle)}; `--steer fk` is a good first choice.")


def check_kernel(steer: str | None, kernel: str | None, choices: bool, shared_start: bool) -> None:
    """Refuse a kernel that is none, and options that need one of plain sampling."""
    from t2i_align.errors import T2IError
    from t2i_align.pipelines import load_kernel

    noisy = kernel is not None and load_kernel(kernel).stochastic
    wanting = [flag for flag, given in {"--choices": choices, "--shared-start": shared_start}.items() if given]
    if wanting and (steer is not None or not noisy):
        raise T2IError(
            f'Expected {" and ".join(wanting)} with a stochastic --kernel such as "ddim(1.0)" (on flow-matching models '
            '"flow_sde(0.7)") and without --steer: training needs chains of steps that have a log-prob.'
        )


def read_keywords(words: list[str]) -> dict[str, Any]:
    """Words `key=value`, values read as YAML."""
    from yaml import YAMLError

    from t2i_align.config import parse_yaml
    from t2i_align.errors import T2IError

    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise T2IError(f"Expected --keyword KEY=VALUE, such as guidance_rescale=0.7, but got {word!r}.")
        if name.strip() in OPTIONS:
            raise T2IError(f"Expected {OPTIONS[name.strip()]} in the place of --keyword {name.strip()}.")
        try:
            found[name.strip()] = parse_yaml(value)
        except YAMLError as error:
            raise T2IError(f"Expected --keyword KEY=VALUE with YAML as value but got {word!r}.") from error
    return found


def read_lora(word: str) -> tuple[str, float]:
    """`path@0.5` -> ("path", 0.5); without a weight 1."""
    from t2i_align.errors import T2IError

    source, at, weight = word.rpartition("@")
    if not at:
        return word, 1.0
    try:
        return source, float(weight)
    except ValueError as error:
        raise T2IError(f"Expected LORA or LORA@WEIGHT, such as style.safetensors@0.5, but got {word!r}.") from error
