"""`Subject`: a family under test, with the driver, the condition and the one stored trajectory its promises share."""

import copy
from functools import cached_property

import torch

from t2i_align.keys import generator
from t2i_align.pipelines.cond import Cond
from t2i_align.pipelines.driver import Driver
from t2i_align.pipelines.kernels import ddim
from tests.families import FAMILIES, PROMPTS, Family

B = len(PROMPTS)
OFF = {"guidance_scale": 1.0, "true_cfg_scale": 1.0, "distilled_guidance_scale": 1.0, "pag_scale": 0.0}


class Subject:
    """One family, built once; `twin` makes the same in another number type."""

    def __init__(self, family: str | Family) -> None:
        self.family = build(family) if isinstance(family, str) else family
        self.pipe, self.steps = self.family.pipe, self.family.steps

    @cached_property
    def driver(self) -> Driver:
        return Driver(self.pipe, **self.family.call)

    @cached_property
    def said(self) -> dict:
        """Keywords of the pipeline's call that say what to draw."""
        if self.family.embeds is None:
            return {"prompt": list(PROMPTS)}
        return {name: cast(value, self.driver.dtype) for name, value in self.family.embeds(B).items()}

    @cached_property
    def cond(self) -> Cond:
        return self.driver.encode(PROMPTS) if self.family.embeds is None else self.driver.condition(**self.said)

    @cached_property
    def trajectory(self):
        return self.driver.rollout(self.cond, self.steps, ddim(1.0), seed=1)

    @property
    def unguided(self) -> dict:
        """The keywords that turn guidance off."""
        names = [name for name in OFF if name in self.driver.accepts]
        return {name: min(OFF[name], self.family.call.get(name, 1.0)) for name in names}

    @cached_property
    def images(self) -> torch.Tensor:
        """The pipeline's own."""
        return self.bare()

    def bare(self, **options):
        """What the pipeline itself makes of the driver's starting noise."""
        draws = [generator(1, "start", i) for i in range(B)]
        said = {name: list(v) if isinstance(v, list) else v for name, v in self.said.items()}
        call = {**self.family.call, **said, "num_inference_steps": self.steps, "output_type": "pt", **options}
        if isinstance(call.get("negative_prompt"), str):
            call["negative_prompt"] = [call["negative_prompt"]] * B  # some pipelines take one string for one row
        with torch.no_grad():
            return self.pipe(generator=draws, **call)[0]

    def step(self, row: int, rows: slice = slice(None)):
        """The step of a row of the trajectory, from its stored latents."""
        x = self.trajectory.x[rows, row]
        return self.driver.step(x, row, self.cond[rows], self.steps, ddim(1.0))

    def twin(self, dtype: torch.dtype) -> "Subject":
        """A copy whose modules compute in another type."""
        return Subject(self.family._replace(pipe=with_modules(self.pipe, dtype)))

    def with_scheduler(self, scheduler) -> "Subject":
        """The same modules with another scheduler."""
        pipe = copy.copy(self.pipe)
        pipe.__dict__["scheduler"] = scheduler
        return Subject(self.family._replace(pipe=pipe))


def build(name: str) -> Family:
    torch.manual_seed(0)
    family = FAMILIES[name]()
    family.pipe.set_progress_bar_config(disable=True)
    for module in modules(family.pipe).values():
        for part in module.modules():  # in evaluation mode, as from_pretrained leaves them
            part.training = type(part).__name__ == family.training
    return family


def modules(pipe) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def with_modules(pipe, dtype: torch.dtype):
    """A copy of the pipeline with copies of its modules in another type."""
    made = copy.copy(pipe)
    made.__dict__.update({name: copy.deepcopy(part).to(dtype) for name, part in modules(pipe).items()})
    return made


def cast(tree, dtype: torch.dtype):
    """Floating-point tensors of nested lists and tuples in another type."""
    if isinstance(tree, torch.Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    return type(tree)(cast(part, dtype) for part in tree) if isinstance(tree, list | tuple) else tree
