"""`t2i-align`: the verbs, and what happens to errors."""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer

from t2i_align.cli.bench import bench
from t2i_align.cli.demo import demo
from t2i_align.cli.doctor import doctor
from t2i_align.cli.evaluate import evaluate
from t2i_align.cli.generate import generate
from t2i_align.cli.playground import playground
from t2i_align.cli.rewards import rewards
from t2i_align.cli.score import score
from t2i_align.cli.train import train
from t2i_align.config import nearest
from t2i_align.errors import T2IError

QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # diffusers says what it truncates
BAD_INPUT, ROWS_FAILED, INTERRUPTED = 2, 3, 130  # exit codes

app = typer.Typer(
    name="t2i-align",
    help="Score, steer and fine-tune text-to-image diffusion models with human-preference rewards.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for verb in (generate, score, train, evaluate, doctor, demo):
    app.command()(verb)
app.add_typer(rewards, name="rewards")
app.add_typer(playground, name="playground")
app.add_typer(bench, name="bench")


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and exit.")
) -> None:
    if version:
        from t2i_align import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main(words: list[str] | None = None) -> None:
    """Run the command line; bad input ends with one sentence and exit code 2."""
    words = sys.argv[1:] if words is None else words
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    command: Any = typer.main.get_command(app)
    known: list[str] = list(command.commands)
    if words and not words[0].startswith("-") and words[0] not in known:
        _fail(f"Unknown command {words[0]!r}.{nearest(words[0], known)} Available: {', '.join(known)}.")
    try:
        code = command.main(words, prog_name="t2i-align", standalone_mode=False)
    except typer.TyperException as error:
        verb = f" {words[0]}" if words and words[0] in known else ""
        _fail(f"{error.format_message().rstrip('.')}. See `t2i-align{verb} --help`.")
    except T2IError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}." if error.filename else f"{error}.")
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("Interrupted.", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    print(f"t2i-align: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)
