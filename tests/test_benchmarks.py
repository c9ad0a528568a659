"""Benchmarks run, at the smallest sizes, and end with a line of JSON; what takes longer is nightly."""

import json
import sys

import pytest
from safetensors.torch import load_file

from benchmarks import (
    common,
    compare,
    gpu,
    hires,
    kernels,
    parity,
    plan,
    quality,
    regions,
    serve,
    step,
    strengths,
    training,
)
from benchmarks.common import figures_of, ratio

TINY = ["--random", "tiny", "--size", "64", "--text-length", "16", "--repeats", "1"]
# Of a step of klein-4b, 1024 x 1024: a change that needs more says so here.
BUDGET = {"kernels": 514, "gigabytes": 38}
# A benchmark, its options, and where its report has what it measured. CHECKPOINT and FOLDER stand for folders.
SMOKE = [
    (step, [*TINY, "--quantize", "4", "--lora", "4", "--reference", "64", "--kv", "--batch", "2"], "ratios"),
    (
        step,
        ["--model", "CHECKPOINT", "--size", "64", "--text-length", "16", "--steps", "2", "--repeats", "0"],
        "stages",
    ),
    (compare, [*TINY, "--against", "floor", "--against", "undivided", "--stages", *compare.STAGES[:-1]], "ratios"),
    (compare, [*TINY, "--quantize", "4", "--against", "floor", "--stages", "text_encoder", "step"], "errors"),
    (plan, ["FOLDER", "--tiny", "--size", "64", "--text-length", "16", "--memory", "streamed"], "stages"),
    (plan, ["--model", "klein-9b-kv", "--references", "1", "--quantize", "4", "--chip", "M4 Max"], "stages"),
    (kernels, [], "steps"),
]
WHOLE = ["--model", "CHECKPOINT", "--size", "64", "--text-length", "16", "--steps", "1", "--repeats", "1"]
IN_TURN = ["num_steps=12", "--captions", "1", "--edits", "1", "--beside", "step_cache=0.3", "--beside", "num_steps=6"]
NIGHTLY = [
    (compare, [*TINY, "--steps", "1", "--stages", "start", "--against", "cold"], "ratios"),
    (
        compare,
        [*WHOLE, "--stages", "start", *(w for n in ("cold-unread", "known-prompt") for w in ("--against", n))],
        "ratios",
    ),
    (plan, ["--size", "64", "--steps", "1"], "stages"),
    (quality, ["--model", "CHECKPOINT", "--ways", "--captions", "1", "--ranks", "1", "--layers"], "ways"),
    (quality, IN_TURN, "figures"),
    (gpu, ["FOLDER", "--tiny"], "sections"),
    (hires, ["--size", "96", "--steps", "1", "--captions", "1", "--strengths", "0.5", "--tile", "64"], "ways"),
    (strengths, ["--count", "1"], "percent"),
    (regions, ["--count", "1"], "percent"),
    (serve, ["--repeats", "1", "--clients", "2", "--requests", "4", "--soak", "5"], "overhead"),
    (training, ["--tiny", "--size", "64", "--text-length", "16", "--depth-single", "1", "2"], "whole"),
]


def run(benchmark, options, capsys):
    """Its report."""
    benchmark.main(options)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["benchmark"] == benchmark.__name__.removeprefix("benchmarks.")
    assert {"chip", "os", "mlx", "process_peak_gb"} <= report.keys()
    return report


@pytest.mark.parametrize(
    ("benchmark", "options", "measured"),
    [*SMOKE, *(pytest.param(*case, marks=pytest.mark.nightly) for case in NIGHTLY)],
    ids=lambda value: value.__name__ if hasattr(value, "main") else None,
)
def test_benchmarks_end_with_a_json_line(benchmark, options, measured, checkpoint, tmp_path, capsys):
    folders = {"CHECKPOINT": str(checkpoint), "FOLDER": str(tmp_path / "made")}
    report = run(benchmark, [folders.get(word, word) for word in options], capsys)
    assert report[measured]
    if benchmark is step:
        assert all(figures["peak_gb"] > 0 for figures in report["stages"].values())
    if benchmark is kernels:
        own = report["steps"]["flux2_mlx"]
        assert all(0.9 * most < own[what] <= most for what, most in BUDGET.items())


@pytest.mark.nightly
def test_parity_compares_both_sides(damaged, capsys):
    """On a checkpoint that is there already, here a tiny one, the benchmark draws with both and compares."""
    report = run(parity, [str(damaged), "--size", "64"], capsys)
    assert report["parts"].keys() == {"diffusers", "mlx"}
    assert report["max_levels"] <= 1
    assert 0 < report["relative_error"] < 1e-4


def test_one_turn_says_nothing_of_a_ratio():
    once, twice = figures_of([3.0, 1.0]), figures_of([3.0, 1.0, 2.0])
    assert ratio(once, once) == {}
    assert ratio(twice, twice) == {"median_s": 1.0, "min_s": 1.0}


@pytest.mark.nightly
def test_compare_compares_with_diffusers(checkpoint, tmp_path, capsys):
    """Stage by stage and in whole images, and what is written makes a page."""
    options = ["--model", str(checkpoint), "--width", "64", "--height", "96", "--text-length", "16", "--steps", "1"]
    options += ["--repeats", "2", "--dtype", "float32", "--output", str(tmp_path)]
    report = run(compare, [*options, "--against", "torch", "--against", "floor"], capsys)
    assert list(report["stages"]) == ["text_encoder", "step", "decode", "loop", "cold start", "next image"]
    assert report["stages"]["step"].keys() == {"flux2_mlx", "torch", "floor"}
    assert all(stage.keys() >= {"flux2_mlx", "torch"} for stage in report["stages"].values())
    assert all(stage["torch"]["median_s"] > 0 for stage in report["ratios"].values())
    assert report["stages"]["cold start"]["torch"]["min_s"] > report["stages"]["next image"]["torch"]["min_s"]
    assert all(0 < report["errors"][stage]["torch"] < 1e-5 for stage in ("text_encoder", "step", "decode"))
    (written,) = tmp_path.glob("*.json")
    assert json.loads(written.read_text()).items() <= report.items()  # but for the process's peak
    compare.main(["--collect", "--output", str(tmp_path)])
    assert written.name in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("peer", "package"), [("mflux", "mflux==0.24.0"), ("mlx-vlm", "mlx-vlm==0.7.10")])
def test_a_missing_peer_says_what_to_install(peer, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, peer.replace("-", "_"), None)
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--random", "tiny", "--against", peer])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"pip install --no-deps {package}" in line


def test_what_a_peer_cannot_do_is_said(capsys):
    with pytest.raises(SystemExit):
        training.main(["--against", "mlx-vlm"])
    assert "mlx-vlm 0.7.10 cannot train FLUX.2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--random", "tiny", "--against", "mlx-vlm"], "mlx-vlm's pipeline has klein's autoencoder alone"),
        (["--random", "small", "--text-length", "64"], "mflux's pipeline takes 512 text tokens alone"),
        (["--random", "small", "--size", "128", "--against", "mlx-vlm"], "takes images from 256 x 256 on"),
        (["--random", "4b", "--depth-text", "6", "--against", "floor"], "--depth-text leaves pipelines without layers"),
        (["--random", "4b", "--depth-text", "2", "--against", "floor"], "--depth-text must be at least 3"),
        (["--random", "4b", "--prompt-tokens", "513", "--against", "floor"], "must be 1 to --text-length 512"),
    ],
)
def test_what_cannot_be_compared_is_said_first(options, said, monkeypatch, capsys):
    """Before anything is measured, which a refusal would lose."""
    monkeypatch.setattr(compare, "missing", lambda name: None)
    with pytest.raises(SystemExit):
        compare.main(options)
    assert said in capsys.readouterr().err


def test_a_prompt_has_the_tokens_and_layers_that_were_asked_for(capsys):
    words = ["--against", "floor", "--stages", "text_encoder", "--prompt-tokens", "3", "--depth-text", "6"]
    report = run(compare, [*TINY, *words], capsys)
    assert (report["prompt_tokens"], report["model"]) == (3, "random tiny, 6 text layers")
    assert compare.file_name(report).endswith("-6-text-layers-64-float32-prompt-3.json")


def test_random_weights_are_written_in_the_layout_of_diffusers(tmp_path):
    """Names and shapes are those of the modules of diffusers and transformers."""
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = common.Model("tiny", *common.TINY, build={})
    common.write_checkpoint(tmp_path, common.random_parts(model))
    shape = {part: json.loads((tmp_path / part / "config.json").read_text()) for part in common.STEMS}
    theirs = {
        "text_encoder": Qwen3ForCausalLM(Qwen3Config(**shape["text_encoder"])),
        "transformer": Flux2Transformer2DModel.from_config(shape["transformer"]),
        "vae": AutoencoderKLFlux2.from_config(shape["vae"]),
    }
    for part, module in theirs.items():
        (file,) = (tmp_path / part).glob("*.safetensors")
        expected = {name: list(weight.shape) for name, weight in module.state_dict().items()}
        expected.pop("lm_head.weight", None)  # that of the embeddings
        assert {name: list(weight.shape) for name, weight in load_file(file).items()} == expected


def test_counting_kernels_leaves_the_package_as_it_was():
    from flux2_mlx import FluxKlein

    kernels.own_step(kernels.Recorder(), kernels.MODELS["tiny"], kernels.DTYPES["float32"], 64, 16)
    assert sys.modules["flux2_mlx"].FluxKlein is FluxKlein


def test_a_section_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    """A GPU that is there for ten minutes is not lost to one fault."""
    (tmp_path / "made.json").write_text('{"seconds": 1}')
    given = [
        gpu.Section("fails", ("no_such_module",), 60),
        gpu.Section("waits", ("http.server", "--bind", "127.0.0.1", "0"), 1),
        gpu.Section("tells", ("json.tool", "--compact", str(tmp_path / "made.json")), 60),
        gpu.Section("too late", ("json.tool",), 0),
    ]
    monkeypatch.setattr(gpu, "sections", lambda folder, *, tiny: given)
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    report = run(gpu, [str(tmp_path / "told")], capsys)
    became = {name: section["became"] for name, section in report["sections"].items()}
    assert became == {"fails": "ended with 1", "waits": "cut off", "tells": "done", "too late": "not begun"}
    assert report["sections"]["tells"]["report"] == {"seconds": 1}
    assert "no_such_module" in (tmp_path / "told" / "fails.txt").read_text()
    kept = json.loads((tmp_path / "told" / "report.json").read_text())
    assert kept["sections"] == report["sections"]


def test_results_say_how_to_add_a_mac_beside_every_peer(tmp_path):
    page = compare.collected(tmp_path)
    assert "mflux==0.24.0" in page
    assert "mlx-vlm==0.7.10" in page
    assert "--against mflux --against mlx-vlm --against floor" in page


def test_results_are_what_their_json_files_say():
    assert (compare.RESULTS / "README.md").read_text() == compare.collected(compare.RESULTS)
