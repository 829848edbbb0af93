"""What batch scoring costs: medians of alternating runs in one process, on CLIP towers with random weights.

    python benchmarks/scoring.py [MODEL ...] [--prompts 8] [--images 4] [--batch 32] [--runs 3] [--device cpu]
    python benchmarks/scoring.py --memory            # memory from 1,000 to 20,000 images
    python benchmarks/scoring.py --image-reward [--original /tmp/originals]       # beside its original loop
    python benchmarks/scoring.py --together          # five scorers in one process, and each in its own

`loop` is what a notebook does: each image by itself, Pillow preprocessing, its text encoded with it, fp32. `job` is
`score_file` from files on disk to the table on disk. `bare` is the tower's two encoders alone, on one prepared batch
and the different texts, without a file or a table. The last two are explained in `published.py`. Scores of random
weights mean nothing; their differences do. Seconds of the clock, and of the processor (all threads), which other
programs on the machine disturb less.
"""

import argparse
import json
import tempfile
import time
from itertools import chain
from pathlib import Path
from statistics import median, pstdev

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from t2i_align.rewards import Scorer, encoders
from t2i_align.rewards.clip import CLIP
from t2i_align.rewards.tower import CPU_PIXELS, Preprocessing, Tower, TowerSpec
from t2i_align.scoring import Row, open_rows, score_file

MODELS = ("ViT-L-14", "ViT-H-14")


class RandomCLIP(CLIP):
    """`clip` on a tower that is given instead of opened."""

    def __init__(self, tower, name):
        Scorer.__init__(self)
        self._hold(tower)
        self.name, self.variant, self.prefix = name, "cosine", ""


def random_tower(name, device):
    import open_clip

    torch.manual_seed(0)
    network, _, preprocess = open_clip.create_model_and_transforms(name)
    network.to(device)
    tokenise = open_clip.get_tokenizer(name)
    how = network.visual.preprocess_cfg
    size = how["size"] if isinstance(how["size"], tuple) else (how["size"], how["size"])
    tower = Tower(
        TowerSpec(name, "random"),
        network,
        Preprocessing(size, tuple(how["mean"]), tuple(how["std"])),
        encoders.open_clip_image,
        encoders.open_clip_text,
        tokenise,
        lambda text: 0,
    )
    return tower, preprocess


def make_images(folder, number, size):
    """Smooth pictures with some noise, as JPEG files."""
    rng = np.random.default_rng(0)
    for n in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 6, (size, size, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.jpg", quality=92)
    return [folder / f"{n}.jpg" for n in range(number)]


class Cases:
    """The ways to score one set of rows; each call returns the scores."""

    def __init__(self, name, rows, folder, device, batch):
        self.tower, self.preprocess = random_tower(name, device)
        self.half = self.tower.on(torch.device(device), torch.bfloat16)  # kept, since opening weights is not timed
        self.rows, self.folder, self.device, self.size = rows, folder, device, batch
        self.texts = list(dict.fromkeys(row.prompt for row in rows))
        images = [self.preprocess(Image.open(row.image).convert("RGB")) for row in rows]
        self.batch = torch.stack(images).to(device)
        self.tokens = self.tower.tokenise(self.texts).to(device)

    @torch.no_grad()
    def loop(self):
        values = []
        for row in self.rows:
            pixels = self.preprocess(Image.open(row.image).convert("RGB"))[None].to(self.device)
            image = F.normalize(self.tower.network.encode_image(pixels), dim=-1)
            text = F.normalize(
                self.tower.network.encode_text(self.tower.tokenise([row.prompt]).to(self.device)), dim=-1
            )
            values.append((image * text).sum().item())
        return values

    @torch.no_grad()
    def bare(self):
        together = CPU_PIXELS // self.batch[0, 0].numel() if self.device == "cpu" else self.size
        parts = [encoders.open_clip_image(self.tower.network, part) for part in self.batch.split(together)]
        image = F.normalize(torch.cat(parts), dim=-1)
        text = F.normalize(encoders.open_clip_text(self.tower.network, self.tokens), dim=-1)
        return image.mm(text.T).max().item()

    def job(self, names=("a",), dtype="fp32"):
        out = self.folder / "table.jsonl"
        scorers = [RandomCLIP(self.tower, name) for name in names]
        options = {"batch_size": self.size, "dtype": dtype, "device": self.device, "overwrite": True}
        score_file(self.rows, scorers, out, settings={"rewards": list(names)}, **options)
        return [json.loads(line)["a"] for line in out.read_text().splitlines()]


def seconds(function, device):
    """Seconds of the clock and of the processor, and what the function returned."""
    started, worked = time.perf_counter(), time.process_time()
    values = function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - started, time.process_time() - worked), values


def make_rows(folder, options):
    images = make_images(folder, options.prompts * options.images, options.size)
    return [Row(path, f"a picture of {n // options.images} things in a room") for n, path in enumerate(images)]


def compare(name, options):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = make_rows(folder, options)
        cases = Cases(name, rows, folder, options.device, options.batch)
        ways = {
            "loop": cases.loop,
            "job fp32": cases.job,
            "bare": cases.bare,
            "two scorers": lambda: cases.job(("a", "b")),
            "job bf16": lambda: cases.job(dtype="bf16"),
        }
        times, values = {way: [] for way in ways}, {}
        for run in range(options.runs + options.warm):
            for way, function in ways.items():
                took, values[way] = seconds(function, options.device)
                if run >= options.warm:
                    times[way].append(took)
    work = f"{options.prompts} prompts x {options.images} images of {options.size} px"
    print(f"{name}: {work}, batch {options.batch}, {options.runs} runs each")
    for at, kind in enumerate(("clock", "processor")):
        middle = {way: median(pair[at] for pair in taken) for way, taken in times.items()}
        print(f"  {kind}: " + ", ".join(f"{way} {took:.2f} s" for way, took in middle.items()))
        loop, job = middle["loop"], middle["job fp32"]
        print(f"    fp32 {loop / job:.2f}x the loop's speed (asked: 1.1), bf16 {loop / middle['job bf16']:.2f}x (1.8)")
        print(f"    two scorers on one tower take {middle['two scorers'] / job:.3f}x the time of one (1.1)")
        print(f"    the job takes {100 * (job / middle['bare'] - 1):+.1f} % over bare forwards (5)")
    for way in ("job fp32", "job bf16"):
        off = max(abs(a - b) for a, b in zip(values[way], values["loop"], strict=True))
        sd = pstdev(values["loop"])
        print(f"  {way}: largest difference to the loop's cosine {off:.1e} (their standard deviation {sd:.1e})")


def resident():
    """Bytes of memory this process holds."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory(rewards, number=20_000, first=1_000):
    """Resident memory while a table of `number` images is scored, and its slope from `first` on."""
    from t2i_align.rewards import load_reward

    scorer = load_reward(rewards)
    measure, counted, points = scorer.measure, [0], []

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for n in range(100):
            Image.effect_noise((64, 64), n + 1).convert("RGB").save(folder / f"{n}.png")
        with (folder / "in.jsonl").open("w") as file:
            for n in range(number):
                about = {"image": f"{n % 100}.png", "prompt": f"a red circle and number {n}", "row": n}
                file.write(json.dumps(about) + "\n")

        def watch(images, prompts):
            counted[0] += len(images)
            points.append((counted[0], resident()))
            return measure(images, prompts)

        object.__setattr__(scorer, "measure", watch)
        started = time.perf_counter()
        score_file(open_rows(folder / "in.jsonl"), [scorer], folder / "out.parquet", settings={"rewards": rewards})
        took, after = time.perf_counter() - started, resident()
    kept = [(count, size) for count, size in points if count >= first]
    counts, sizes = zip(*kept, strict=True)
    slope = np.polyfit(counts, sizes, 1)[0]
    print(f"{rewards}: {number} images in {took:.0f} s, {number / took:.0f} images/s")
    for at in (first, number // 4, number // 2, number):
        size = next(size for count, size in chain(kept, [(number, after)]) if count >= at)
        print(f"  {at} images: {size / 2**20:.1f} MiB")
    print(f"  after the merge: {after / 2**20:.1f} MiB")
    print(f"  slope from {first} on: {slope:.0f} bytes an image")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", nargs="?", const="tiny_clip")
    parser.add_argument("--image-reward", action="store_true")
    parser.add_argument("--together", action="store_true")
    parser.add_argument("--original", type=Path, help="environment of parity/environment.py with the wheel")
    parser.add_argument("--scale", choices=("full", "reduced"), default="full", help="of these two's networks")
    parser.add_argument("--emulate", action="store_true", help="bf16 also on a CPU without it")
    chosen = parser.parse_args()
    if chosen.image_reward or chosen.together:
        import published

        kinds = [kind for kind in ("image_reward", "together") if getattr(chosen, kind)]
        for kind in kinds:
            with tempfile.TemporaryDirectory() as place:
                published.run(kind, make_rows(Path(place), chosen), Path(place), chosen)
    elif chosen.memory:
        memory(chosen.memory)
    else:
        for model in chosen.models:
            compare(model, chosen)
