"""What published scorers cost at full size, on random weights: `benchmarks/scoring.py --image-reward | --together`.

`--image-reward`: `loop` is the original's way on our network: each image by itself, Pillow preprocessing, its prompt
padded to 35 tokens, fp32; `original` is the wheel itself on its own libraries, where `--original` names the environment
that `parity/environment.py` made; `job` is `score_file` from files on disk to the table on disk. Their runs alternate.

`--together`: five scorers in one process, and each in a process of its own: seconds of one `score_file`, the largest
resident memory, weights read from files. The job's parts run one after another, each alone on the machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for `benchmarks.parity` where this is run as a script

from benchmarks.parity import inputs  # noqa: E402
from benchmarks.parity.ours import MAKE  # noqa: E402
from t2i_align.devices import has_bf16  # noqa: E402
from t2i_align.rewards import Scorer  # noqa: E402
from t2i_align.rewards.blip import MEAN, STD  # noqa: E402
from t2i_align.rewards.image_reward import CONTEXT  # noqa: E402
from t2i_align.rewards.image_reward import MEAN as RAW_MEAN  # noqa: E402
from t2i_align.rewards.image_reward import SD as RAW_SD  # noqa: E402
from t2i_align.scoring import Row, score_file  # noqa: E402

TOGETHER = ("pickscore", "hpsv2.1", "image_reward", "aesthetic", "clip")
VIT_L = {"width": 1024, "layers": 24, "text_width": 768, "text_layers": 12, "embed": 768, "head": 64}
RESULTS = ROOT / "benchmarks" / "results" / "scoring"
Seconds = tuple[float, float]  # of the clock, and of the processor (all threads)


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    bf16 = has_bf16(torch.device("cpu"))
    return {"cpu": name, "threads": torch.get_num_threads(), "bf16": bf16, "torch": torch.__version__}


def timed(function) -> tuple[Seconds, list[float]]:
    clock, processor = time.perf_counter(), time.process_time()
    values = function()
    return (time.perf_counter() - clock, time.process_time() - processor), values


def score_table(rows: list[Row], scorers: list[Scorer], folder: Path, batch: int, dtype: str = "fp32") -> list[float]:
    """One job; the scores of its first scorer."""
    out = folder / "table.jsonl"
    names = [scorer.name for scorer in scorers]
    score_file(rows, scorers, out, settings={"rewards": names}, batch_size=batch, dtype=dtype, overwrite=True)
    return [json.loads(line)[names[0]] for line in out.read_text().splitlines()]


# image_reward beside its original


@torch.no_grad()
def loop(scorer, rows: list[Row]) -> list[float]:
    """What the wheel's `score` does, image by image, on our network."""
    network, side = scorer.network, scorer.network.size
    preprocess = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    values = []
    for row in rows:
        pixels = preprocess(Image.open(row.image).convert("RGB"))[None]
        tokens = network.tokenise(
            row.prompt, padding="max_length", truncation=True, max_length=CONTEXT, return_tensors="pt"
        )
        seen = network.vision(pixel_values=pixels).last_hidden_state
        read = network.text(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            is_decoder=False,
        ).last_hidden_state
        values.append(((network.head(read[:, 0]).item()) - RAW_MEAN) / RAW_SD)
    return values


class Original:
    """The wheel in its own environment, kept waiting between runs."""

    def __init__(self, env: Path, rows: list[Row], folder: Path, size: str) -> None:
        table = folder / "rows.json"
        table.write_text(json.dumps([[str(row.image), row.prompt] for row in rows]))
        command = [env / "bin" / "python", inputs.HERE / "timed.py", table, size]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self.answer().strip() != "ready":
            sys.exit(f"The original did not start; run {' '.join(map(str, command))} to see why.")

    def answer(self) -> str:
        return self.process.stdout.readline()

    def run(self) -> tuple[Seconds, list[float]]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found = json.loads(self.answer())
        return tuple(found["seconds"]), found["scores"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare_image_reward(rows: list[Row], folder: Path, options) -> dict:
    """Medians of alternating runs, and how far scores are apart."""
    scorer = MAKE["image_reward"]("image_reward", options.scale, folder)
    scorer.eval().requires_grad_(False)
    ways = {
        "loop": lambda: timed(lambda: loop(scorer, rows)),
        "job fp32": lambda: timed(lambda: score_table(rows, [scorer], folder, options.batch)),
    }
    if machine()["bf16"] or options.emulate:
        ways["job bf16"] = lambda: timed(lambda: score_table(rows, [scorer], folder, options.batch, "bf16"))
    original = Original(options.original.resolve(), rows, folder, options.scale) if options.original else None
    if original is not None:
        ways["original"] = original.run
    times, values = {way: [] for way in ways}, {}
    for run in range(options.runs + options.warm):
        for way, function in ways.items():
            took, values[way] = function()
            if run >= options.warm:
                times[way].append(took)
    if original is not None:
        original.close()
    seconds = {way: [median(taken[at] for taken in took) for at in (0, 1)] for way, took in times.items()}
    reference = "original" if original else "loop"
    off = {way: max(abs(a - b) for a, b in zip(found, values[reference], strict=True)) for way, found in values.items()}
    print(f"image_reward, {options.scale}: {len(rows)} images, {options.runs} runs each, against the {reference}")
    for way, (clock, processor) in seconds.items():
        faster = " and ".join(f"{seconds[reference][at] / seconds[way][at]:.2f}x" for at in (0, 1))
        print(f"  {way}: {clock:.2f} s, {processor:.2f} s of processor: {faster}; scores differ by {off[way]:.1e}")
    print("  asked: fp32 0.98x; bf16 1.8x" + ("" if "job bf16" in ways else ", which this CPU can only emulate"))
    return {"images": len(rows), "runs": options.runs, "against": reference, "seconds": seconds, "largest_gap": off}


# Five scorers together


def make(name: str, scale: str, folder: Path) -> Scorer:
    """A scorer on weights in a folder, written there if they are not yet."""
    place = folder / ("clip" if name in ("clip", "aesthetic") else name)
    place.mkdir(exist_ok=True)
    if name in MAKE:
        return MAKE[name](name, scale, place)
    from t2i_align.rewards.aesthetic import Aesthetic
    from t2i_align.rewards.clip import CLIP

    width = _write_clip(scale, place)
    if name == "clip":
        return CLIP(str(place))
    head = place / "sac+logos+ava1-l14-linearMSE.pth"
    if not head.exists():
        sizes, at = (width, 1024, 128, 64, 16, 1), (0, 2, 4, 6, 7)
        shapes = {f"layers.{n}.weight": (b, a) for n, a, b in zip(at, sizes, sizes[1:], strict=False)}
        shapes |= {f"layers.{n}.bias": (b,) for n, b in zip(at, sizes[1:], strict=True)}
        torch.save({key: torch.from_numpy(value) for key, value in inputs.draw_weights(shapes).items()}, head)
    return Aesthetic(weights=str(head), name=str(place))


def _write_clip(scale: str, place: Path) -> int:
    """CLIP ViT-L/14 as transformers saves it, with tokenizer and image processor; returns the embedding's width."""
    from safetensors.torch import save_file
    from transformers import CLIPImageProcessor

    from t2i_align.rewards.checkpoints import clip_tokenizer

    sizes = VIT_L if scale == "full" else inputs.SIZES["clip"][scale]
    if not (place / "model.safetensors").exists():
        drawn = inputs.draw_weights(inputs.transformers_clip_shapes(**sizes))
        save_file({key: torch.from_numpy(value.copy()) for key, value in drawn.items()}, place / "model.safetensors")
        config = inputs.clip_config(**sizes)
        for part in ("vision_config", "text_config"):
            config[part]["hidden_act"] = "quick_gelu"
        config["text_config"] |= {"eos_token_id": 49407, "bos_token_id": 49406}
        (place / "config.json").write_text(json.dumps(config))
        clip_tokenizer().save_pretrained(place)
        CLIPImageProcessor().save_pretrained(place)
    return sizes["embed"]


def child(names: list[str], scale: str, folder: str, table: str, batch: int, runs: int) -> None:
    """What a process of its own measures; with no runs it writes the weights."""
    if not runs:
        for name in names:  # one at a time: drawing takes more memory than scoring
            make(name, scale, Path(folder))
        return
    started = time.perf_counter()
    scorers = [make(name, scale, Path(folder)) for name in names]
    for scorer in scorers:
        scorer.eval().requires_grad_(False)
    opened = time.perf_counter() - started
    rows = [Row(Path(image), prompt) for image, prompt in json.loads(Path(table).read_text())]
    towers = {id(scorer.tower): scorer.tower for scorer in scorers if hasattr(scorer, "tower")}
    calls = count_calls(towers.values())
    took = [timed(lambda: score_table(rows, scorers, Path(folder), batch))[0] for _ in range(runs + 1)][1:]
    seconds = [median(taken[at] for taken in took) for at in (0, 1)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    encoded = {name: pictures / (runs + 1) for name, pictures in calls.items()}
    print(json.dumps({"seconds": seconds, "opened": opened, "peak": peak, "towers": len(towers), "encoded": encoded}))


def count_calls(towers) -> dict[str, int]:
    """Pictures that each tower's network encodes from now on."""
    counts = {}
    for tower in towers:
        name, encode = Path(tower.spec.name).name, tower.encode_image
        counts[name] = 0

        def counted(network, pixels, name=name, encode=encode):
            counts[name] += len(pixels)
            return encode(network, pixels)

        tower.encode_image = counted
    return counts


def compare_together(rows: list[Row], folder: Path, options) -> dict:
    """Each scorer alone, then all in one process."""
    table = folder / "rows.json"
    table.write_text(json.dumps([[str(row.image), row.prompt] for row in rows]))

    def process(names: tuple[str, ...], runs: int) -> dict:
        given = json.dumps([names, options.scale, str(folder), str(table), options.batch, runs])
        command = [sys.executable, __file__, given]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ).stdout
        return json.loads(said.splitlines()[-1]) if runs else {}

    process(TOGETHER, 0)
    alone = {name: process((name,), options.runs) for name in TOGETHER}
    together = process(TOGETHER, options.runs)
    summed = [sum(found["seconds"][at] for found in alone.values()) for at in (0, 1)]
    memory = sum(found["peak"] for found in alone.values())
    print(f"{', '.join(TOGETHER)}, {options.scale}: {len(rows)} images, {options.runs} runs")
    for name, found in [*alone.items(), ("together", together)]:
        clock, processor = found["seconds"]
        print(
            f"  {name}: {clock:.2f} s, {len(rows) / clock:.2f} images/s, {processor:.2f} s of processor, peak "
            f"{found['peak'] / 2**30:.2f} GiB, opened in {found['opened']:.1f} s"
        )
    print(
        f"  sum of the parts: {summed[0]:.2f} s, {len(rows) / summed[0]:.2f} images/s, {summed[1]:.2f} s of processor, "
        f"{memory / 2**30:.2f} GiB"
    )
    ratios = [part / whole for part, whole in zip(summed, together["seconds"], strict=True)]
    print(
        f"  together: {ratios[0]:.2f}x as fast ({ratios[1]:.2f}x by processor), {together['peak'] / memory:.2f}x memory"
    )
    print(f"  {together['towers']} CLIP towers; pictures encoded a run: {together['encoded']}")
    return {"images": len(rows), "runs": options.runs, "alone": alone, "together": together}


def run(kind: str, rows: list[Row], folder: Path, options) -> None:
    """Measure, print, and keep the numbers of full size in benchmarks/results/scoring/."""
    found = (compare_image_reward if kind == "image_reward" else compare_together)(rows, folder, options)
    if options.scale == "full":
        RESULTS.mkdir(parents=True, exist_ok=True)
        facts = {"machine": machine(), "size": options.size, "batch": options.batch, **found}
        (RESULTS / f"{kind}.json").write_text(json.dumps(facts, indent=1) + "\n")
        print(f"kept in {(RESULTS / f'{kind}.json').relative_to(ROOT)}")


if __name__ == "__main__":
    child(*json.loads(sys.argv[1]))
