"""Measure every promise of the driver on every pipeline family, and write the table into the documentation.

    python benchmarks/families.py [FAMILY ...] [--write docs/pipelines.md]

Without names, all families of `tests/families`. The table goes between `<!-- families -->` and `<!-- /families -->`.
"""

import argparse
import logging
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import diffusers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # the families live in the tests

from t2i_align.policy.artefacts import is_portable
from t2i_align.policy.component import trainable_network
from tests.families import FAMILIES
from tests.families.exports import standing, text_to_image
from tests.families.promises import PROMISES, NotApplicable
from tests.families.subject import Subject

MARKS = ("<!-- families -->", "<!-- /families -->")
STANDINGS = {
    "reachable": "Within reach by their signatures, but not built at tiny size here",
    "deprecated": "The same, and deprecated by diffusers",
    "unreachable": "Not driven, and why",
}


def measure(subject):
    """Promise -> (cell of the table, remark or None) of one family."""
    cells = {}
    for name, promise in PROMISES.items():
        reason = subject.family.cannot.get(name)
        try:
            value = promise.measure(subject)
        except NotApplicable as error:
            cells[name] = ("–", str(error).split(":")[0])
            continue
        except Exception as error:
            cells[name] = ("no", reason or f"FAILED: {type(error).__name__}: {str(error)[:80]}")
            continue
        kept = value <= promise.bound_of(subject)
        cell = "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")
        cells[name] = (cell, None) if kept else ("no", reason or f"FAILED: measured {cell}")
    return cells


def table(results, classes):
    """Markdown of the family table with its legend and footnotes."""
    notes = {}
    lines = [f"| family | class | {' | '.join(PROMISES)} |", f"|---|---|{'---|' * len(PROMISES)}"]
    for family, cells in results.items():
        row = []
        for cell, remark in cells.values():
            number = f" [{notes.setdefault(remark, len(notes) + 1)}]" if cell == "no" else ""
            row.append(cell + number)
        lines.append(f"| {family} | {classes[family].removesuffix('Pipeline')} | {' | '.join(row)} |")
    lines += ["", "What the columns measure, and the bound that the tests set:", ""]
    lines += [f"- `{name}`: {promise.says}; at most {promise.bound:g}." for name, promise in PROMISES.items()]
    lines += ["", "A dash: does not apply."]
    absent = defaultdict(set)
    for family, cells in results.items():
        for name, (cell, remark) in cells.items():
            if cell == "–":
                absent[remark, name].add(family)
    merged = defaultdict(list)
    for (remark, name), families in absent.items():
        merged[remark, frozenset(families)].append(name)
    for (remark, families), names in merged.items():
        where = f"{len(families)} families" if len(families) > 4 else ", ".join(sorted(families))
        lines.append(f"`{'`, `'.join(names)}`: {remark} ({where}).")
    lines += [""] + [f"[{number}] {remark}." for remark, number in notes.items()]
    return lines


def exports(tested):
    """Markdown lists of the other text-to-image pipelines that diffusers exports."""
    groups = defaultdict(lambda: defaultdict(list))
    for name, made in text_to_image().items():
        kind, reason = standing(made, tested)
        groups[kind][reason].append(name.removesuffix("Pipeline"))
    lines = [f"Of {sum(len(n) for g in groups.values() for n in g.values())} text-to-image pipelines that diffusers"]
    lines[0] += f" {diffusers.__version__} exports, {sum(map(len, groups['tested'].values()))} are tested above."
    for kind, title in STANDINGS.items():
        listed = [(f"{reason}: " if kind == "unreachable" else "") + ", ".join(n) for reason, n in groups[kind].items()]
        lines += ["", f"{title}:", "", *(f"- {line}." for line in listed)]
    return lines


def without_stock_lora(pipes):
    """The sentence that lists classes whose LoRA stock pipelines cannot open."""
    names = sorted({type(pipe).__name__.removesuffix("Pipeline") for pipe in pipes if not stock_opens_lora(pipe)})
    return f"Without `load_lora_weights`, so that `Policy.save` writes peft's files: {', '.join(names) or 'none'}."


def stock_opens_lora(pipe):
    component, network = trainable_network(pipe, None, False)
    return is_portable(pipe, component, network)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", choices=[*FAMILIES, []], metavar="FAMILY")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    started, results, classes, pipes = time.perf_counter(), {}, {}, []
    for family in options.families or FAMILIES:
        subject = Subject(family)
        pipes.append(subject.pipe)
        classes[family], results[family] = type(subject.pipe).__name__, measure(subject)
        print(family, {name: cell for name, (cell, _) in results[family].items()}, flush=True)
    listed = [without_stock_lora(pipes), "", *exports(set(classes.values()))]
    text = "\n".join([*table(results, classes), "", *listed])
    if options.write:
        page = options.write.read_text()
        before, after = page.split(MARKS[0])[0], page.split(MARKS[1])[1]
        options.write.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}")
    else:
        print(text)
    failed = [f for f, cells in results.items() if any((r or "").startswith("FAILED") for _, r in cells.values())]
    print(f"{len(results)} families, {time.perf_counter() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
