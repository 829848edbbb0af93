"""The README.md of a run: what was trained, what it gained and lost, how to load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_align.runs import write_text
from t2i_align.training.curves import MEASURES

if TYPE_CHECKING:
    from t2i_align.policy import Policy
    from t2i_align.training.blocks import StopBlock
    from t2i_align.training.checkpoints import State
    from t2i_align.training.honest import Honest

CARD = """\
---
library_name: diffusers
pipeline_tag: text-to-image
tags:
- text-to-image
- t2i-align
- {method}
---
# {method} on {base}

{what} of {base}, {aim} by {method}: {steps} updates on {images} images.{kept}

## Scores before and after

{prompts}; images of each: {each}, drawn with {call}, the same noise before and after. Means over
prompts with 95 % intervals. {trained}

{table}

{measures}

![curves](curves.png)
![the base above, update {step} below](samples/step-{step:06d}.png)

## Use

```python
{code}
```
{usage}
`config.yaml` has all settings, `evaluations.jsonl` every score, `environment.json` the versions.
"""
NOT_TRAINED = "None of these was trained on."


def write_card(result: Path, watcher: Honest, policy: Policy, state: State, kept: dict[str, Any]) -> None:
    """Write the card of a run beside its result.

    Args:
        result: folder of the trained weights.
        watcher: with the evaluations of the run.
        policy: what was trained.
        state: at the end of the run.
        kept: the evaluation of the weights that were kept.
    """
    config = watcher.config
    lora = policy.weights.kind == "lora"
    per_round = config.prompts.per_round * config.method["group"]
    stop = config.evaluate.stop
    how = "" if watcher.best is None else f" The weights are those of step {kept['step']}, {chosen(stop)}."
    averaged = " They are averaged over the training (EMA)." if config.train.ema else ""
    text = CARD.format(
        method=config.method["use"],
        base=config.model.use or f"an open {type(watcher.method.tools.driver.pipe).__name__}",
        what=f"A LoRA of the {policy.component}" if lora else f"The {policy.component}",
        aim=aim(watcher),
        trained=trained_on(watcher),
        steps=state.step,
        images=state.step // watcher.method.updates * per_round,
        kept=how + averaged + f" {watcher.note(state.step)}".rstrip(),
        prompts=prompts_of(watcher),
        each=config.evaluate.images,
        call=", ".join(f"`{name}={value!r}`" for name, value in watcher.call.items()) or "the pipeline's own settings",
        table=score_table(watcher, kept),
        measures=measure_table(watcher.rows[0], kept),
        step=kept["step"],
        code=snippet(result),
        usage=f"\n{watcher.method.usage}\n" if watcher.method.usage else "",
    )
    write_text(result.parent / "README.md", text)


def prompts_of(watcher: Honest) -> str:
    """What scores were measured on."""
    count, trained = len(watcher.prompts), watcher.trained_prompts
    return f"Prompts: {count}, of which {trained} were trained on" if trained else f"Held-out prompts: {count}"


def trained_on(watcher: Honest) -> str:
    """Which scorers of the table were trained on."""
    if not watcher.method.learns_reward:
        return NOT_TRAINED
    parts, watched = watcher.watched_in_reward, watcher.judges.watch
    if not watched:
        return "The scorer was trained on; no other was watched."
    if not parts:
        return "Only the first scorer was trained on."
    others = ", ".join(f"`{name}`" for name in watched if name not in parts) or "none"
    same = ", ".join(f"`{name}`" for name in parts)
    return f"Trained on: the first scorer, and with it {same}, which shares scorers with it. Not trained on: {others}."


def chosen(stop: StopBlock | None) -> str:
    """Why these weights were kept."""
    return "the last within the budget" if stop is None else f"the best by `{stop.watch}`"


def aim(watcher: Honest) -> str:
    """What a run learnt, for a sentence."""
    config = watcher.config
    if config.choices is not None:
        return f"trained on a person's choices in `{config.choices}`"
    if config.reward is None or not watcher.method.learns_reward:
        return "trained on given preferences"
    return f"trained to raise `{config.reward if isinstance(config.reward, str) else ', '.join(config.reward)}`"


def snippet(result: Path) -> str:
    """The code that opens the weights, from their own card, as seen from the folder above."""
    code = (result / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("\n```")[0]
    return code.replace('"."', f'"{result.name}"').replace("this folder", "the folder beside this file")


def score_table(watcher: Honest, kept: dict[str, Any]) -> str:
    """A Markdown table of the scorers before and after."""
    after = f"at update {kept['step']}"
    lines = [f"| scorer | before | {after} | gain | prompts that got better, ties half |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for name, found in watcher.comparisons(kept).items():
        lines.append(f"| {name} | {found.base} | {found.tuned} | {found.gain} | {100 * found.win_rate:.0f} % |")
    return "\n".join(lines)


def measure_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """A Markdown table of what was measured besides."""
    lines = [f"| measure | before | at update {after['step']} |", "| --- | --- | --- |"]
    for name in MEASURES:
        if name in before:
            lines.append(f"| {name} | {before[name]:.4g} | {after[name]:.4g} |")
    return "\n".join(lines)
