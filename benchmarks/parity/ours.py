"""Our modules on the cases of the fixtures, with the same weights from the seed; the tests run it at the reduced size.

    python -m benchmarks.parity.ours image_reward full

prints the largest relative difference from the original's scores.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.parity import inputs
from t2i_align.rewards.base import Scorer

FIXTURES = Path(__file__).parent / "fixtures"


class Case(NamedTuple):
    """One picture and prompt, scored by both."""

    picture: str
    prompt: str
    original: float
    ours: float
    original_std: float = 0.0
    ours_std: float = 0.0

    @property
    def difference(self) -> float:
        """Relative to the original's score; of the stds too, where there are any."""
        stds = abs(self.ours_std / self.original_std - 1) if self.original_std else 0.0
        return max(abs(self.ours / self.original - 1), stds)


def compare(scorer: str, size: str, folder: Path) -> list[Case]:
    """All cases of a fixture; weights are written to `folder`."""
    fixture = json.loads((FIXTURES / f"{scorer}-{size}.json").read_text(encoding="utf-8"))
    if fixture["seed"] != inputs.SEED:
        raise SystemExit(f"{scorer}-{size}.json was made with the seed {fixture['seed']}, not {inputs.SEED}.")
    module, pictures = MAKE[scorer](scorer, size, folder), inputs.pictures()
    cases = []
    for case in fixture["cases"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # prompts are cut on purpose
            scores = module.scores(pictures[case["picture"]], inputs.PROMPTS[case["prompt"]])
        std = 0.0 if scores.std is None else scores.std.item()
        cases.append(
            Case(case["picture"], case["prompt"], case["score"], scores.total.item(), case.get("std", 0.0), std)
        )
    return cases


def _write(scorer: str, size: str, file: Path) -> None:
    if file.exists():  # of an earlier call: the weights depend on the scorer and size alone
        return
    drawn = inputs.draw_weights(inputs.shapes_of(scorer, size))
    save_file({name: torch.from_numpy(np.array(value)) for name, value in drawn.items()}, file)


def _blip(scorer: str, size: str, folder: Path) -> Scorer:
    from t2i_align.rewards.cyclereward import CycleReward
    from t2i_align.rewards.image_reward import ImageReward

    file = folder / "weights.safetensors"
    _write(scorer, size, file)
    (folder / "vocab.txt").write_text("\n".join(inputs.bert_vocabulary()) + "\n", encoding="utf-8")
    return (ImageReward if scorer == "image_reward" else CycleReward)(str(file), str(folder))


def _hpsv2(scorer: str, size: str, folder: Path) -> Scorer:
    import open_clip

    from t2i_align.rewards.hpsv2 import HPSv2, HPSv21

    s, name = inputs.SIZES["clip"][size], f"parity-{size}"
    eye = {"image_size": 224, "layers": s["layers"], "width": s["width"], "head_width": s["head"], "patch_size": 14}
    mind = {"context_length": 77, "vocab_size": 49408, "width": s["text_width"], "layers": s["text_layers"]}
    config = {"embed_dim": s["embed"], "vision_cfg": eye, "text_cfg": {**mind, "heads": s["text_width"] // 64}}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    _write(scorer, size, folder / "weights.safetensors")
    return (HPSv2 if scorer == "hpsv2" else HPSv21)(str(folder / "weights.safetensors"), model=name)


def _pickscore(scorer: str, size: str, folder: Path) -> Scorer:
    from t2i_align.rewards.pickscore import PickScore

    (folder / "config.json").write_text(json.dumps(inputs.clip_config(**inputs.SIZES["clip"][size])))
    _write(scorer, size, folder / "model.safetensors")
    return PickScore(str(folder))


def _hpsv3(scorer: str, size: str, folder: Path) -> Scorer:
    from t2i_align.rewards.hpsv3 import HPSv3

    for file, content in inputs.qwen_files().items():
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    _write(scorer, size, folder / "HPSv3.safetensors")
    return HPSv3(str(folder), str(folder), dtype="float32")


def _vqascore(scorer: str, size: str, folder: Path) -> Scorer:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from t2i_align.rewards.vqascore import VQAScore

    CLIPVisionModel(CLIPVisionConfig(**inputs.EYE_CONFIG)).save_pretrained(folder / "vision")
    for part in ("weights", "words"):
        (folder / part).mkdir()
    (folder / "words" / "spiece.model").write_bytes((inputs.HERE / "spiece.model").read_bytes())
    (folder / "words" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (folder / "weights" / "config.json").write_text(json.dumps(inputs.T5_CONFIG))
    _write(scorer, size, folder / "weights" / "model.safetensors")
    return VQAScore("xxl", str(folder / "weights"), str(folder / "words"), str(folder / "vision"), "float32")


MAKE: dict[str, Callable[[str, str, Path], Scorer]] = {
    "image_reward": _blip,
    "cyclereward": _blip,
    "hpsv3": _hpsv3,
    "vqascore": _vqascore,
    "hpsv2": _hpsv2,
    "hpsv2.1": _hpsv2,  # no fixtures: the same network with other weights
    "pickscore": _pickscore,
}


def main(scorer: str, size: str) -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cases = compare(scorer, size, Path(folder))
    for case in cases:
        print(f"{case.picture:10} {case.prompt:9} {case.original:+.7f} {case.ours:+.7f} {case.difference:.1e}")
    worst = max(case.difference for case in cases)
    print(f"{scorer} {size}: largest relative difference {worst:.1e}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
