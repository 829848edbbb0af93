"""An interrupted job, resumed, leaves the table of an unbroken one; so do several processes."""

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_scoring import SETTINGS, Brightness, Interrupted, brightness, interrupt, picture, pictures, score, table_in
from test_scoring_inputs import png, shard

from t2i_align.errors import T2IError
from t2i_align.scoring import Processes, Row, open_rows, score_file
from t2i_align.scoring.parts import Parts, Writer, create

ENDINGS = [".jsonl", ".csv", ".parquet"]


def partial(out):
    return out.with_name(out.name + ".partial")


def part(out, rank=0):
    return partial(out) / f"part-{rank:05d}.jsonl"


@pytest.mark.parametrize("suffix", ENDINGS)
def test_resume_after_an_interruption_equals_an_unbroken_run(tmp_path, suffix):
    rows = pictures(tmp_path / "in", 14)
    rows[1].image.unlink()
    out, whole = tmp_path / f"parts{suffix}", tmp_path / f"whole{suffix}"
    expected = score(rows, whole)
    interrupt(rows, out, at=6)
    assert not out.exists()
    scorer = Interrupted(at=0)
    assert score(rows, out, scorer, resume=True) == expected
    assert scorer.calls == 3  # of seven batches the first four, one chunk, were done
    assert out.read_bytes() == whole.read_bytes()
    assert not partial(out).exists()


def test_interruptions_in_the_first_batch_and_again_later(tmp_path):
    rows = pictures(tmp_path / "in", 20)
    expected = score(rows, tmp_path / "whole.jsonl")
    out = tmp_path / "parts.jsonl"
    interrupt(rows, out, at=1)
    interrupt(rows, out, at=6, resume=True)
    interrupt(rows, out, at=1, resume=True)
    assert score(rows, out, resume=True) == expected


def test_a_part_cut_short_at_any_byte_is_done_again(tmp_path):
    rows = pictures(tmp_path / "in", 20)
    rows[3] = Row(rows[3].image, "café")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    score(rows, whole)
    score_parts(rows, out)
    content, about = part(out).read_bytes(), (partial(out) / "job.json").read_bytes()
    heads = [n for n in range(len(content)) if content.startswith(b'{"chunk"', n)]
    assert len(heads) == 3
    lengths = {0, 1, *heads, *(head + 9 for head in heads), content.index("é".encode()) + 1, len(content) - 1}
    for length in sorted(lengths | set(random.Random(0).sample(range(len(content)), 20))):
        partial(out).mkdir(exist_ok=True)
        (partial(out) / "job.json").write_bytes(about)
        part(out).write_bytes(content[:length])
        score(rows, out, resume=True)
        assert out.read_bytes() == whole.read_bytes()
        out.unlink()


def score_parts(rows, out):
    """A job stopped just before its parts are merged."""
    from t2i_align.scoring import job

    finish = job._finish
    job._finish = lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            score(rows, out)
    finally:
        job._finish = finish


@pytest.mark.parametrize("damage", [b"\0" * 400, b"{", b'{"chunk": 1}\n', b"\xff\n"])
def test_what_a_power_cut_leaves_behind_a_chunk_is_cut_off(tmp_path, damage):
    rows = pictures(tmp_path / "in", 12)
    expected = score(rows, tmp_path / "whole.jsonl")
    out = tmp_path / "parts.jsonl"
    interrupt(rows, out, at=5)
    with part(out).open("ab") as file:
        file.write(damage)
    assert score(rows, out, resume=True) == expected


def test_a_chunk_whose_bytes_changed_is_done_again(tmp_path):
    rows = pictures(tmp_path / "in", 12)
    expected = score(rows, tmp_path / "whole.jsonl")
    out = tmp_path / "parts.jsonl"
    interrupt(rows, out, at=5)
    content = part(out).read_bytes()
    assert content.count(b"prompt 6") == 1
    part(out).write_bytes(content.replace(b"prompt 6", b"prompt 7"))
    assert score(rows, out, resume=True) == expected


def test_resume_on_nothing_is_a_job_of_its_own(tmp_path):
    assert brightness(score(pictures(tmp_path, 3), tmp_path / "out.jsonl", resume=True)) == [36, 72, 108]


def test_an_unfinished_job_is_not_replaced_silently(tmp_path):
    rows = pictures(tmp_path / "in")
    out = tmp_path / "out.jsonl"
    interrupt(rows, out, at=2)
    with pytest.raises(T2IError, match="unfinished job; pass --resume"):
        score(rows, out)
    scorer = Interrupted(at=0)
    assert len(score(rows, out, scorer, overwrite=True)) == 7
    assert scorer.calls == 4


def test_a_different_job_is_refused(tmp_path):
    rows = pictures(tmp_path / "in", 10)
    out = tmp_path / "out.jsonl"
    interrupt(rows, out, at=5)
    before = part(out).read_bytes()
    rows_said = "other images, prompts or columns"
    for other, settings, more, said in (
        (rows[::-1], SETTINGS, {}, rows_said),
        (rows[:-1], SETTINGS, {}, rows_said),
        ([*rows[:-1], Row(rows[-1].image, "another")], SETTINGS, {}, rows_said),
        ([*rows[:-1], Row(rows[-1].image, rows[-1].prompt, {"tag": 1})], SETTINGS, {}, rows_said),
        (rows, {"rewards": "verifier"}, {}, r'other rewards \("brightness"\);'),
        (rows, SETTINGS | {"base": "tiny-sd"}, {}, r"other base \(null\);"),
        (rows, SETTINGS, {"dtype": "bf16"}, r'other dtype \("fp32"\);'),
        (rows, SETTINGS, {"explain": True, "max_pixels": 9}, r"other explain \(false\), max_pixels \(89478485\);"),
    ):
        with pytest.raises(T2IError, match=said):
            score(other, out, settings=settings, resume=True, **more)
        assert part(out).read_bytes() == before
    assert len(score(rows, out, resume=True)) == 10


@pytest.mark.parametrize("finished", [False, True])
def test_images_that_changed_are_refused(tmp_path, finished):
    rows = pictures(tmp_path / "in", 10)
    shards = [Row(shard(tmp_path / "x.tar", {"a.png": png(1)}) / "a.png", None)]
    for number, (many, change) in enumerate(
        (
            (rows, lambda: picture(rows[9].image, 3)),
            (rows, lambda: os.utime(rows[0].image, (1, 1))),
            (rows, rows[5].image.unlink),
            (shards * 10, lambda: shard(tmp_path / "x.tar", {"a.png": png(2)})),
        )
    ):
        out = tmp_path / f"{number}.jsonl"
        score(many, out) if finished else interrupt(many, out, at=5)
        score(many, out, resume=True) if finished else None
        change()
        with pytest.raises(T2IError, match=r"other sizes or times of image files;"):
            score(many, out, resume=True)
    folder = [Row(tmp_path, None)]  # an empty cell of a table: the time of the folder does not count
    score(folder, tmp_path / "f.jsonl")
    assert len(score(folder, tmp_path / "f.jsonl", Interrupted(at=1), resume=True)) == 1


def test_two_tables_of_one_stem_are_told_apart(tmp_path):
    rows = pictures(tmp_path / "in", 3)
    score(rows, tmp_path / "w.parquet", settings={"rewards": "other"})
    score(rows, tmp_path / "w.csv")
    before = (tmp_path / "w.parquet").read_bytes()
    with pytest.raises(T2IError, match=r"w.config.yaml is the record of w.csv"):
        score(rows, tmp_path / "w.parquet", resume=True)
    assert (tmp_path / "w.parquet").read_bytes() == before
    assert len(score(rows, tmp_path / "w.csv", Interrupted(at=1), resume=True)) == 3


def test_another_batch_size_may_resume(tmp_path):
    rows = pictures(tmp_path / "in", 20)
    expected = score(rows, tmp_path / "whole.jsonl")
    out = tmp_path / "out.jsonl"
    interrupt(rows, out, at=6)
    score_file(rows, [Brightness()], out, settings=SETTINGS, batch_size=5, resume=True)
    assert table_in(out) == expected


def test_resume_on_a_finished_table_does_nothing(tmp_path):
    rows = pictures(tmp_path / "in", 3)
    out = tmp_path / "out.csv"
    score(rows, out)
    before, changed = out.read_bytes(), out.stat().st_mtime_ns
    scorer = Interrupted(at=1)
    outcome = score_file(rows, [scorer], out, settings=SETTINGS, batch_size=2, resume=True)
    assert (outcome.rows, outcome.scored, scorer.calls) == (3, 0, 0)
    assert (out.read_bytes(), out.stat().st_mtime_ns) == (before, changed)


def test_a_finished_table_is_not_replaced_silently(tmp_path):
    rows = pictures(tmp_path / "in", 2)
    out = tmp_path / "out.csv"
    score(rows, out)
    before = out.read_bytes()
    for how, message in (({}, "already exists"), ({"resume": True}, "not known to be the table of this job")):
        with pytest.raises(T2IError, match=message):
            score(rows[:1], out, **how)
        assert out.read_bytes() == before
    assert len(score(rows[:1], out, overwrite=True)) == len(table_in(out)) == 1


def test_a_kill_between_any_two_steps_of_the_end_can_be_resumed(tmp_path, monkeypatch):
    """The end merges: old table away, record, table, parts away. Stop before each file operation in turn."""
    rows, others = pictures(tmp_path / "in", 12), pictures(tmp_path / "others", 5)
    whole = tmp_path / "whole.csv"
    score(rows, whole)
    steps = ("unlink", "replace", "rmdir")
    for stop in range(1, 40):
        out = tmp_path / f"{stop}" / "out.csv"
        out.parent.mkdir()
        score(others, out)
        interrupt(rows, out, at=5, overwrite=True)
        calls = 0

        def killed(inner, stop=stop):
            def call(self, *arguments, **options):
                nonlocal calls
                calls += 1
                if calls == stop:
                    raise KeyboardInterrupt
                return inner(self, *arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in steps:
                patch.setattr(Path, name, killed(getattr(Path, name)))
            try:
                score(rows, out, resume=True)
                survived = True
            except KeyboardInterrupt:
                survived = False
        scorer = Interrupted(at=1)  # everything was scored before: only merging is left
        outcome = score_file(rows, [scorer], out, settings=SETTINGS, batch_size=2, resume=True)
        assert (outcome.rows, scorer.calls) == (12, 0)
        assert out.read_bytes() == whole.read_bytes()
        assert not partial(out).exists()
        if survived:
            break
    assert survived
    assert stop > 6


def test_an_input_that_changes_meanwhile_is_refused(tmp_path):
    class Growing:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(rows[: 4 + self.passes])

    rows = pictures(tmp_path / "in")
    with pytest.raises(T2IError, match="the input changed"):
        score(Growing(), tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_two_jobs_on_one_output_are_refused(tmp_path):
    create(tmp_path / "x.partial", "job", 4)
    with Writer(Parts(tmp_path / "x.partial"), 0) as first:
        with pytest.raises(T2IError, match="Another process is at work"):
            Writer(Parts(tmp_path / "x.partial"), 0)
        Writer(Parts(tmp_path / "x.partial"), 1).file.close()
        first.add(0, [{"a": 1}])
    assert list(Parts(tmp_path / "x.partial")) == [{"a": 1}]


class Slow(Brightness):
    def __init__(self, pause):
        super().__init__()
        self.pause = pause

    def forward(self, images, prompts):
        time.sleep(self.pause)
        return super().forward(images, prompts)


def run_job(source, out, pause=0.0, begun=None):
    torch.set_num_threads(1)
    if begun is not None:
        begun.send(True)
    processes = Processes.from_environment()
    options = {"settings": SETTINGS, "batch_size": 2, "resume": True, "processes": processes}
    score_file(open_rows(source), [Slow(pause)], out, **options)


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """400 rows, some of them bad, and the table of an unbroken run in each format."""
    folder = tmp_path_factory.mktemp("collection")
    rng = random.Random(0)
    with (folder / "in.jsonl").open("w") as file:
        for n in range(400):
            picture(folder / f"{n}.png", rng.randrange(256), rng.choice([(8, 6), (5, 5)]))
            if n % 17 == 0:
                (folder / f"{n}.png").write_bytes(b"")
            file.write(json.dumps({"image": f"{n}.png", "prompt": f"prompt {rng.randrange(30)}", "row": n}) + "\n")
    for suffix in ENDINGS:
        run_job(folder / "in.jsonl", folder / f"whole{suffix}")
    return folder


@pytest.fixture(scope="module")
def start():
    """Starts `run_job` in a process of its own, forked from one that has the libraries loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "pyarrow.parquet", "pytest", "t2i_align.scoring"])

    def run(*arguments):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=run_job, args=(*arguments, there))
        process.start()
        assert here.recv()
        return process

    return run


def done_in(out):
    """Chunks on disk."""
    return len(Parts(partial(out)).done) if (partial(out) / "job.json").exists() else 0


@pytest.mark.parametrize("suffix", ENDINGS)
def test_ten_kills_at_random_moments_lose_and_repeat_nothing(collection, start, suffix):
    out, rng = collection / f"killed{suffix}", random.Random(suffix)
    chunks = []
    for _ in range(10):
        process = start(collection / "in.jsonl", out, 0.02)  # 50 chunks of 0.08 s
        # Between the first line of the job and a few chunks later, however slow the machine is.
        goal, pause = chunks[-1] + rng.randrange(3) if chunks else 0, rng.uniform(0, 0.15)
        while done_in(out) < goal and process.is_alive():
            time.sleep(0.002)
        process.join(pause)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        chunks.append(done_in(out))
    assert chunks == sorted(chunks)
    assert len(set(chunks)) > 2  # the kills hit a job that was moving
    assert not out.exists()
    run_job(collection / "in.jsonl", out)
    assert out.read_bytes() == (collection / f"whole{suffix}").read_bytes()
    assert [int(row["row"]) for row in table_in(out)] == list(range(400))


def launch(words, folder, *launcher):
    """Run the command line under a launcher with two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *launcher, str(port), "-m", "t2i_align", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=280, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


ACCELERATE = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
ACCELERATE += " --dynamo_backend no --main_process_port"
TORCHRUN = "torch.distributed.run --nproc_per_node 2 --master_port"
WORDS = ["score", "in", "--rewards", "jpeg_compressibility", "--batch-size", "2", "--json", "--resume", "--out"]


def test_two_processes_of_a_launcher_make_the_table_of_one(tmp_path, cli, monkeypatch):
    for n in range(30):
        picture(tmp_path / "in" / f"{n:02d}.png", 8 * n)
    monkeypatch.chdir(tmp_path)
    assert cli(*WORDS, "one.csv")[0] == 0
    done = launch([*WORDS, "two.csv"], tmp_path, *ACCELERATE.split())
    assert done.returncode == 0, done.stderr
    assert Path("two.csv").read_bytes() == Path("one.csv").read_bytes()
    summary = json.loads(done.stdout)  # one process speaks
    assert summary["rows"] == summary["scored"] == 30  # of both
    assert "scoring images (2 of 2): 14/14" in done.stderr  # the other worked
    assert not partial(Path("two.csv")).exists()


def test_a_job_of_one_process_goes_on_with_two(tmp_path, cli, monkeypatch):
    for n in range(60):
        picture(tmp_path / "in" / f"{n:02d}.png", 4 * n)
    (tmp_path / "in" / "07.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert cli(*WORDS, "one.csv")[0] == 3
    add = Writer.add

    def killed(self, number, rows):
        add(self, number, rows)
        if number == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "add", killed)
        assert cli(*WORDS, "two.csv")[0] == 130
    done = launch([*WORDS, "two.csv"], tmp_path, *TORCHRUN.split())
    summary = json.loads(done.stdout.splitlines()[0])
    assert (summary["failed"], summary["scored"]) == (1, 60 - 3 * 8), done.stderr
    assert [set(row) for row in summary["failures"]] == [{"image", "error"}]
    assert "exitcode  : 3" in done.stderr  # a launcher turns the exit code of a failed row into its own
    assert Path("two.csv").read_bytes() == Path("one.csv").read_bytes()
