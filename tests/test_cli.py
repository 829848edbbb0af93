"""The verbs as a user types them; each bad input is one sentence and exit code 2."""

import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet
import pytest
import yaml
from PIL import Image

SMALL = ("--steps", 2, "--particles", 2)


def generate(cli, out, *more):
    return cli("generate", "a red circle", "--out", out, *SMALL, *more)


def test_the_settings_of_methods_are_listed(cli):
    code, out, _ = cli("train", "--settings", "vard")
    assert code == 0
    assert "value.net            features    reads the network's middle layer" in out
    code, out, _ = cli("generate", "--settings", "fk")
    assert code == 0
    assert "particles      4           samples drawn per prompt" in out
    code, _, err = cli("train", "--settings", "grop")
    assert code == 2
    assert "Did you mean 'grpo'?" in err


def test_every_setting_of_a_method_is_explained():
    from t2i_align.cli.tables import settings_rows
    from t2i_align.methods import METHODS, read_method
    from t2i_align.steering import METHODS as STEERING
    from t2i_align.steering import method_class

    kinds = [type(read_method({"use": name})[1]) for name in METHODS] + [method_class(name) for name in STEERING]
    for kind in kinds:
        assert all(row["what it is"] for row in settings_rows(kind)), kind


def test_generate_then_score(cli, tmp_path):
    images, table = tmp_path / "images", tmp_path / "scores.parquet"
    code, out, _ = generate(cli, images)
    assert code == 0
    assert "2 images of 1 prompts" in out
    rows = [json.loads(line) for line in (images / "results.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["particle"]) for row in rows] == [("a red circle", 0), ("a red circle", 1)]
    assert Image.open(images / "contact_sheet.png").size == (2 * 128 + 2, 128 + 16)
    assert {"config.yaml", "environment.json"} <= {path.name for path in images.iterdir()}

    code, out, _ = cli("score", images, "--rewards", "verifier,2 * jpeg_compressibility + verifier", "--out", table)
    assert code == 0
    scored = pyarrow.parquet.read_table(table).to_pylist()
    assert len(scored) == 2
    for row in scored:
        total = row["2 * jpeg_compressibility + verifier"]
        assert total == pytest.approx(2 * row["jpeg_compressibility"] + row["verifier"], rel=1e-6)
        assert row["error"] is None


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_generate_refuses_resumes_and_overwrites(cli, tmp_path):
    out = tmp_path / "out"
    assert generate(cli, out)[0] == 0
    first = pixels(out / "images/00000-001.png")
    code, _, err = generate(cli, out)
    assert code == 2
    assert "--resume" in err
    (out / "images/00000-001.png").unlink()
    assert generate(cli, out, "--resume")[0] == 0
    assert abs(pixels(out / "images/00000-001.png") - first).max() <= 1  # drawn alone now: rounding may differ
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len({(row["row"], row["particle"]) for row in rows}) == len(rows) == 2
    code, _, err = generate(cli, out, "--resume", "--seed", 1)
    assert code == 2
    assert "seed" in err
    assert generate(cli, out, "--overwrite", "--seed", 1)[0] == 0
    assert abs(pixels(out / "images/00000-001.png") - first).max() > 8


def test_generate_takes_files_of_prompts(cli, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo green stars\n")
    code, out, _ = cli("generate", tmp_path / "prompts.txt", "--out", tmp_path / "out", *SMALL)
    assert code == 0
    assert "4 images of 2 prompts" in out


def test_negative_prompts_and_keywords_of_the_pipeline(cli, tmp_path):
    table = tmp_path / "p.jsonl"
    table.write_text('{"prompt": "a red circle", "negative_prompt": "a blue square", "seed": 3}\n')
    guided = ("--particles", "1", "--steps", "2", "--guidance", "4")
    asked = {
        "column": (table, *guided),
        "option": ("a red circle", "--negative", "a blue square", *guided),
        "keyword": ("a red circle", "--keyword", "guidance_rescale=0.7", *guided),
        "none": ("a red circle", *guided),
        "steered": (table, *guided, "--steer", "best_of_n", "--rewards", "verifier"),
        "steered alike": ("a red circle", *guided, "--steer", "best_of_n", "--rewards", "verifier"),
    }
    made = {}
    for name, words in asked.items():
        assert cli("generate", *words, "--out", tmp_path / name)[0] == 0
        made[name] = pixels(tmp_path / name / "images/00000-000.png")
    assert (made["column"] == made["option"]).all()
    for name, other in {"keyword": "none", "column": "none", "steered": "steered alike"}.items():
        assert abs(made[name] - made[other]).max() > 5
    for name in ("column", "steered"):
        config = yaml.safe_load((tmp_path / name / "config.yaml").read_text())
        assert config["columns"] == {"negative_prompt": ["a blue square"]}
    words = ("generate", "a red circle", "--keyword", "guidance_rescale=abc", *guided)
    code, _, err = cli(*words, "--out", tmp_path / "x")
    assert code == 2
    assert "fails with --keyword guidance_rescale=abc (TypeError" in err.splitlines()[-1]
    assert not (tmp_path / "x").exists()
    idle = ("generate", "a red circle", "--negative", "x", *guided[:4])
    assert "acts with a guidance above 1" not in cli(*idle, "--out", tmp_path / "a")[2]  # tiny-sd's own is 1.5
    assert "acts with a guidance above 1" in cli(*idle, "--guidance", "1", "--out", tmp_path / "b")[2]


def test_score_reports_bad_rows_scores_the_rest_and_exits_with_3(cli, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:60])
    (tmp_path / "text.png").write_text("not an image")
    rows = [
        {"image": "good.png", "prompt": "a red circle"},
        {"image": "cut.png", "prompt": "a red circle"},
        {"image": "text.png", "prompt": "a red circle"},
        {"image": "missing.png", "prompt": "a red circle"},
        {"image": "good.png", "prompt": "a red dog"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "scores.jsonl"
    words = ("score", tmp_path / "in.jsonl", "--rewards", "verifier,jpeg_incompressibility", "--out", out, "--json")
    code, text, _ = cli(*words)
    assert code == 3
    assert json.loads(text)["failed"] == 4
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["verifier"] is None for row in scored] == [False, True, True, True, True]
    assert [row["jpeg_incompressibility"] is None for row in scored] == [False, True, True, True, False]
    assert "dog" in scored[4]["error"]
    assert "No such image" in scored[3]["error"]
    code, _, err = cli(*words)
    assert code == 2
    assert "--overwrite" in err


def test_a_size_that_the_latents_cannot_have_is_said(cli, tmp_path):
    size = ["--pipeline", "tiny-turbo", "--height", 63, "--particles", 1]
    code, _, err = cli("generate", "a red circle", *size, "--out", tmp_path / "a")
    assert code == 0
    assert "note: pictures are 64x64, not 64x63 as asked: tiny-turbo rounds sizes" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["genrate", "a red circle"], "Did you mean 'generate'"),
        (["generate", "a red circle", "--ou", "x"], "--out"),
        (["generate", "a red circle", "--out", "x", "--pipeline", "tiny-ds"], "Did you mean 'tiny-sd'"),
        (["generate", "nothing.txt", "--out", "x"], "No such file: nothing.txt"),
        (["generate", " ", "--out", "x"], "empty"),
        (["generate", "a red circle", "--out", "x", "--particles", "0"], "--particles"),
        (["generate", "a red circle", "--out", "x", "--keyword", "height=9"], "Expected --height in the place of"),
        (["generate", "a red circle", "--out", "x", "--keyword", "eta"], "KEY=VALUE"),
        (["generate", "a red circle", "--out", "x", "--keyword", "etta=1"], "Did you mean 'eta'"),
        (["generate", "a red circle", "--out", "x", "--keyword", "eta=[1"], "with YAML as value"),
        (["generate", "a", "--out", "x", "--keyword", "guidance_scale=2", "--guidance", "2"], "but got both"),
        (["score", ".", "--rewards", "verifer", "--out", "x.parquet"], "Did you mean 'verifier'"),
        (["score", ".", "--rewards", "2*verifier", "--out", "x.parquet"], "spaces around"),
        (["score", ".", "--rewards", "verifier", "--out", "x.parquet"], "no images"),
        (["score", "nowhere", "--rewards", "verifier", "--out", "x.parquet"], "No such file or folder"),
        (["score", ".", "--rewards", "verifier,verifier", "--out", "x.parquet"], "different scorers"),
        (["playground", "sampl"], "Did you mean 'sample'"),
        (["playground", "train", "sd", "--out", "x", "train.stesp=3"], "Did you mean 'steps'"),
        (["playground", "train", "sd", "--out", "x", "--vae", "nowhere"], "trained autoencoder"),
        (["playground", "train", "gan", "--out", "x"], "gan"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(cli, words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(*words)
    assert code == 2
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_wrong_output_ending_is_refused(cli, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, _, err = cli("score", tmp_path, "--rewards", "jpeg_compressibility", "--out", tmp_path / "x.xlsx")
    assert code == 2
    assert ".parquet, .csv, .jsonl" in err


def test_rewards_lists_the_table(cli):
    code, out, _ = cli("rewards")
    assert code == 0
    assert "verifier" in out
    rows = json.loads(cli("rewards", "--json")[1])
    assert {row["name"] for row in rows} >= {"verifier", "jpeg_compressibility", "jpeg_incompressibility"}
    assert all(row["license"] and row["differentiable"] in ("yes", "no") for row in rows)


def test_doctor_finds_this_installation_well(cli):
    code, out, _ = cli("doctor")
    assert code == 0, out
    assert "all is well" in out
    checks = {check["name"]: check for check in json.loads(cli("doctor", "--json")[1])}
    assert checks["torch"]["state"] == "ok"
    assert checks["pipeline tiny-sd"]["state"] == "ok"


def test_doctor_names_what_is_wrong(cli, tmp_path, monkeypatch):
    from t2i_align.pipelines import loading

    monkeypatch.setitem(loading.ALIASES, "tiny-sd", tmp_path)
    code, out, _ = cli("doctor")
    assert code == 1
    assert "playground train" in out


def test_playground_sample_writes_scenes_that_score_one(cli, tmp_path):
    out = tmp_path / "scenes"
    assert cli("playground", "sample", "--n", 12, "--split", "heldout", "--out", out)[0] == 0
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    code, text, _ = cli("score", out, "--rewards", "verifier", "--out", tmp_path / "s.csv", "--json")
    assert code == 0
    assert json.loads(text)["scores"]["verifier"]["min"] == 1


def test_playground_trains_resumes_and_measures(cli, tmp_path):
    tiny = ("scenes=64", "batch=4", "train.steps=2", "train.log_every=1", "train.precision=fp32")
    vae, sd = tmp_path / "vae", tmp_path / "sd"
    assert cli("playground", "train", "vae", "--out", vae, "--measure", 4, *tiny)[0] == 0
    command = ("playground", "train", "sd", "--out", sd, "--vae", vae / "vae", "--measure", 2, *tiny)
    assert cli(*command)[0] == 0
    card = json.loads((sd / "tiny-sd" / "card.json").read_text())
    assert card["steps"] == 2
    assert card["metrics"]["prompts_per_split"] == 2
    assert cli(*command)[0] == 2
    assert cli(*command, "--resume")[0] == 0
    code, out, _ = cli("playground", "measure", "--pipeline", sd / "tiny-sd", "--prompts", 2, "--steps", 2, "--json")
    assert code == 0
    assert {row["split"] for row in json.loads(out)} == {"train", "heldout"}


def test_demo_writes_a_self_contained_page(cli, tmp_path):
    code, out, _ = cli("demo", "--out", tmp_path / "demo")
    assert code == 0
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6 * 10
    assert "http" not in page
    assert "mean gold reward" in out


def test_interruption_is_said_and_exits_with_130(cli, monkeypatch):
    from t2i_align import prompts

    def interrupt(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(prompts, "read_prompts", interrupt)
    code, _, err = cli("generate", "a red circle", "--out", "x")
    assert (code, err.strip()) == (130, "Interrupted.")


def test_every_verb_has_help(cli):
    for verb in ("generate", "score", "rewards", "doctor", "demo", "playground"):
        code, out, _ = cli(verb, "--help")
        assert code == 0
        assert "Usage: t2i-align" in out


def test_words_default_to_the_command_line(cli, monkeypatch, capsys):
    from t2i_align.cli.main import main

    monkeypatch.setattr(sys, "argv", ["t2i-align", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.strip()


def test_a_prompt_that_tiny_sd_cannot_read_is_said(cli, tmp_path):
    code, _, err = cli("generate", "a red dog", "--out", tmp_path / "out", *SMALL)
    assert code == 0
    assert "note: tiny-sd was trained on playground captions alone" in err
    assert "'dog'" in err


def test_a_device_that_is_not_here_is_refused(cli, tmp_path):
    code, _, err = generate(cli, tmp_path / "out", "--device", "cuda:99")
    assert code == 2
    assert "cuda:99" in err
    assert not (tmp_path / "out").exists()


def test_score_can_explain(cli, tmp_path):
    assert cli("playground", "sample", "--n", 2, "--out", tmp_path / "scenes")[0] == 0
    out = tmp_path / "s.jsonl"
    assert cli("score", tmp_path / "scenes", "--rewards", "verifier", "--explain", "--out", out)[0] == 0
    assert "seen:" in json.loads(out.read_text().splitlines()[0])["verifier_report"]


def test_a_folder_that_cannot_be_made_is_one_sentence(cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = generate(cli, tmp_path / "file" / "out")
    assert code == 2
    assert len(err.strip().splitlines()) == 1


def test_no_verb_shows_the_help(cli):
    for words in ((), ("playground",)):
        code, out, _ = cli(*words)
        assert code == 0
        assert "Commands:" in out


def test_doctor_finds_damaged_weights(cli, tmp_path, monkeypatch):
    import shutil

    from t2i_align.pipelines import loading

    shutil.copytree(loading.ALIASES["tiny-sd"], tmp_path / "copy")
    weights = tmp_path / "copy" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.setitem(loading.ALIASES, "tiny-sd", tmp_path / "copy")
    code, out, _ = cli("doctor")
    assert code == 1
    assert "damaged" in out


def test_a_prompt_beyond_the_context_warns(tmp_path):
    words = ["generate", "a red circle " * 30, "--out", tmp_path / "out", *map(str, SMALL)]
    done = subprocess.run([sys.executable, "-m", "t2i_align", *words], capture_output=True, text=True)
    assert done.returncode == 0
    assert "truncated because CLIP can only handle sequences up to 32 tokens" in done.stderr
