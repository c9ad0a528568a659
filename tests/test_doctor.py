"""The doctor: each check passes on a CPU, and sees what is broken on purpose."""

import getpass
import threading
from functools import partial
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import pytest
from PIL import Image

from flux2_mlx import AutoEncoderConfig, Flux2Pipeline, FluxKleinParams, Quantization, doctor
from flux2_mlx.diagnosis import arithmetic, checks, full, machine, nano, speed
from flux2_mlx.diagnosis.findings import OK, REPORT_IT, SKIPPED, SLOW, WRONG, Check, Finding, examine
from flux2_mlx.quantization.layers import QuantizedLinear
from flux2_mlx.runtime.roofline import Speeds

TERA = 1e12
PARAMS = FluxKleinParams(hidden_size=128, num_heads=1, txt_embed_dim=192, depth=1, depth_single=1)
IMAGES = AutoEncoderConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
SMALL = partial(arithmetic.product, 16, 64, 32)


@pytest.fixture
def diagnose(monkeypatch, capsys):
    """A function that runs the command with one check alone: its verdict, its line, and whether the exit code fits."""

    def run(check, *arguments: str) -> tuple[str, str]:
        monkeypatch.setattr(checks, "quick_checks", lambda: [Check("it", check)])
        code = doctor.main(arguments)
        (line,) = capsys.readouterr().out.splitlines()
        _, verdict, told = line.split(": ", 2)
        assert code == (verdict == WRONG)
        return verdict, told

    return run


def wrong_in(dtype, function):
    """A function that is off by a tenth for arrays in a dtype."""
    return lambda x, *rest, **options: function(x, *rest, **options) * (1.1 if x.dtype == dtype else 1)


# ------------------------------------------------------------------------------------------------ the command


def test_an_error_within_a_check_is_something_wrong(diagnose):
    def fail():
        raise RuntimeError("[METAL] Command buffer\nexecution failed")

    assert diagnose(fail) == (WRONG, "RuntimeError: [METAL] Command buffer execution failed; " + REPORT_IT)

    def time_out():
        raise RuntimeError("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)")

    verdict, told = diagnose(time_out)
    assert verdict == WRONG
    assert "generate a smaller image" in told


def test_a_report_names_nobody(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", "/Users/jane")
    monkeypatch.setattr(getpass, "getuser", lambda: "janed")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "secret-token")
    monkeypatch.setattr("platform.node", lambda: "janes-mac.local")
    told = "/Users/jane/flux/a.png, ~/b/c, /srv/models/x and janed@janes-mac.local; hf_abcDEF and secret-token"
    monkeypatch.setattr(checks, "quick_checks", lambda: [Check("it", lambda: Finding(WRONG, told, told))])
    assert doctor.main(["--report", str(tmp_path / "report.md")]) == 1
    for text in (capsys.readouterr().out, (tmp_path / "report.md").read_text()):
        assert "WRONG" in text
        assert not [word for word in ("jane", "srv", "models", "flux/", "b/c", "hf_", "secret") if word in text]
    assert examine(Check("it", lambda: Finding(OK, "0.2 TFLOP/s, 12 GB/s"))).measured == "0.2 TFLOP/s, 12 GB/s"


def test_a_run_that_is_cut_off_leaves_what_it_found(monkeypatch, tmp_path, capsys):
    def interrupt():
        raise KeyboardInterrupt

    found = [Check("first", lambda: Finding(SLOW, "7 s", "wait")), Check("second", interrupt)]
    monkeypatch.setattr(checks, "quick_checks", lambda: found[:1])
    monkeypatch.setattr(checks, "full_checks", lambda: found[1:])
    file = tmp_path / "report.md"
    assert doctor.main(["--full", "--report", str(file)]) == 130
    assert file.read_text().splitlines()[-2:] == [
        "| first | slow | 7 s; wait |",
        "| second | skipped | the run was cut off here |",
    ]
    assert "first: slow: 7 s; wait\nsecond: " in capsys.readouterr().out
    assert doctor.main(["--report", str(file)]) == 0  # a report is written anew, another file is not
    file.write_text("notes")
    assert doctor.main(["--report", str(file)]) == 2
    assert "is no report; give --report another file" in capsys.readouterr().err


def test_every_check_has_a_name_of_its_own():
    names = [check.name for check in [*checks.quick_checks(), *checks.full_checks()]]
    assert len(set(names)) == len(names)
    assert len([name for name in names if name.startswith("packed in ")]) == 9
    assert len([name for name in names if name.startswith("nano's ")]) == 9


@pytest.mark.nightly
def test_a_cpu_is_healthy(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "cache"))
    assert doctor.main(["--report", str(tmp_path / "report.md")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(checks.quick_checks())
    assert not [line for line in lines if f": {WRONG}: " in line]


# ------------------------------------------------------------------------------------------------ the machine


def test_the_machine(diagnose, monkeypatch):
    verdict, told = diagnose(machine.describe_machine)
    assert verdict == OK
    assert "MLX" in told
    monkeypatch.setattr(machine, "requires", lambda _: ["numpy>=1", "mlx[cpu]>=99.1,<100; sys_platform == 'linux'"])
    assert "pip install 'mlx>=99.1,<100'" in diagnose(machine.describe_machine)[1]
    assert diagnose(machine.describe_machine)[0] == WRONG
    monkeypatch.setattr(machine, "requires", lambda _: ["mlx>=0.1,<0.2"])
    assert diagnose(machine.describe_machine)[0] == WRONG


def test_a_mac_without_its_gpu(diagnose, monkeypatch):
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(machine, "on_gpu", lambda: False)
    verdict, told = diagnose(machine.describe_machine)
    assert verdict == WRONG
    assert "MLX has no GPU" in told


@pytest.mark.parametrize("free", [None, 0, 10**18])
def test_free_memory_that_cannot_be(free, diagnose, monkeypatch):
    assert diagnose(machine.check_memory)[0] == OK
    monkeypatch.setattr(machine, "free_memory", lambda: free)
    verdict, told = diagnose(machine.check_memory)
    assert verdict == WRONG
    assert "--memory-limit" in told


def test_a_gpu_with_a_memory_of_its_own(diagnose, monkeypatch):
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setattr(machine, "free_memory", lambda: None)
    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    assert diagnose(machine.check_memory)[0] == OK


def test_a_cache_folder_that_cannot_be_written(diagnose, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "folder"))
    assert diagnose(machine.check_cache_folder)[0] == OK
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path / "file"))
    verdict, told = diagnose(machine.check_cache_folder)
    assert verdict == SLOW
    assert "set FLUX2_MLX_CACHE" in told


@pytest.mark.parametrize(
    ("token", "answer", "verdict", "told"),
    [
        (None, 200, OK, "reachable, not logged in"),
        ("hf_x", 200, OK, "reachable, logged in"),
        ("hf_x", 401, WRONG, "hf auth login"),
        (None, 503, SKIPPED, "503"),
        (None, OSError("no route"), SKIPPED, "cannot be reached (OSError)"),
    ],
)
def test_the_hub(token, answer, verdict, told, diagnose, monkeypatch):
    def get(url, headers, timeout):
        assert timeout <= 5
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(status_code=answer)

    monkeypatch.setattr(machine.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(machine, "get_session", lambda: SimpleNamespace(get=get))
    found = diagnose(machine.check_hub)
    assert found[0] == verdict
    assert told in found[1]
    monkeypatch.setattr(machine.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(machine, "get_session", None)  # not asked
    assert diagnose(machine.check_hub)[0] == SKIPPED


def test_models_in_the_cache(diagnose, monkeypatch):
    monkeypatch.setattr(machine, "cached_releases", lambda: ["klein-4b"])
    assert diagnose(machine.find_models) == (OK, "klein-4b in the Hub's cache")
    monkeypatch.setattr(machine, "cached_releases", lambda: [][0])
    assert diagnose(machine.find_models)[0] == WRONG


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("dtype", arithmetic.UNIT)
def test_products(dtype, diagnose):
    assert diagnose(partial(arithmetic.check_product, SMALL, dtype))[0] == OK


@pytest.mark.parametrize("off", [0.02, float("nan"), float("inf")])
def test_a_product_that_is_noise(off, diagnose):
    function, arrays = SMALL()
    noisy = lambda x, w: function(x, w) + (off * mx.abs(x).sum() if x.dtype == mx.bfloat16 else 0)  # noqa: E731
    verdict, told = diagnose(partial(arithmetic.check_product, lambda: (noisy, arrays), mx.bfloat16))
    assert verdict == WRONG
    assert "install MLX's own wheel" in told


@pytest.mark.parametrize("masked", [False, True])
def test_attention(masked, diagnose):
    function, arrays = arithmetic.attention(48, 2, 64, masked)
    for dtype in (mx.float32, mx.bfloat16):
        assert diagnose(partial(arithmetic.check_operation, lambda: (function, arrays), dtype))[0] == OK
    wrong = wrong_in(mx.bfloat16, function)
    assert diagnose(partial(arithmetic.check_operation, lambda: (wrong, arrays), mx.bfloat16))[0] == WRONG


def test_convolutions(diagnose, monkeypatch):
    settings = []
    function, arrays = arithmetic.convolution(8, 16)

    def watched(x, weight):
        settings.append(arithmetic.os.environ["MLX_CONV_WINOGRAD"])
        return function(x, weight)

    monkeypatch.setenv("MLX_CONV_WINOGRAD", "7")
    assert diagnose(partial(arithmetic.check_convolution, lambda: (watched, arrays), mx.bfloat16))[0] == OK
    assert settings == ["1", "1", "0", "0"]
    assert arithmetic.os.environ["MLX_CONV_WINOGRAD"] == "7"
    wrong = lambda x, w: function(x, w) * (1 + (x.dtype == mx.float16))  # noqa: E731
    assert diagnose(partial(arithmetic.check_convolution, lambda: (wrong, arrays), mx.float16))[0] == WRONG


def test_nothing_of_a_reference_is_compiled(monkeypatch):
    """A Mac need not have the C++ compiler with which MLX's CPU backend compiles."""
    state = ["on"]
    monkeypatch.setattr(mx, "disable_compile", lambda: state.append("off"))
    monkeypatch.setattr(mx, "enable_compile", lambda: state.append("on"))
    miniature = nano.Nano(64)
    for stage in nano.DTYPES:
        miniature.expected(stage)
    assert state == ["on", *["off", "on"] * (len(state) // 2)]  # never one within another, which would end it early
    assert len(state) > 8


def tf32(x: mx.array) -> mx.array:
    return ((x.view(mx.uint32) + 0x1000) & 0xFFFFE000).view(mx.float32)


def test_float32_that_is_tf32(diagnose, monkeypatch):
    check = partial(arithmetic.check_float32, 64, 8)
    assert diagnose(check)[0] == OK
    for owner, name, said in (
        (mx, "matmul", "products"),
        (mx.fast, "scaled_dot_product_attention", "attention"),
        (mx, "conv2d", "convolutions"),
        (mx, "quantized_matmul", "packed products"),
    ):
        usual = getattr(owner, name)

        def rounded(*arrays, usual=usual, **options):
            given = [tf32(array) if array.dtype == mx.float32 else array for array in arrays]
            return usual(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, rounded)
            verdict, told = diagnose(check)
        assert verdict == WRONG
        assert f": {said} are in TF32; set MLX_ENABLE_TF32=0" in told


PACKED = [Quantization(2), Quantization(5), Quantization(8), Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")]


@pytest.mark.parametrize("spec", PACKED, ids=str)
def test_packed_layers(spec, diagnose):
    assert diagnose(partial(arithmetic.check_packed, spec, mx.float32, 64, 128))[0] == OK


@pytest.mark.parametrize("way", ["fused", "dense"])
def test_a_packed_product_that_is_off(way, diagnose, monkeypatch):
    usual = getattr(QuantizedLinear, way)
    monkeypatch.setattr(QuantizedLinear, way, lambda layer, x: usual(layer, x) * (1.01 if len(x) > 1 else 1))
    assert diagnose(partial(arithmetic.check_packed, Quantization(4), mx.float32, 64, 128))[0] == WRONG


def test_weights_that_are_packed_wrongly(diagnose, monkeypatch):
    usual = mx.quantize
    monkeypatch.setattr(mx, "quantize", lambda w, **options: usual(w * 1.1, **options))
    verdict, told = diagnose(partial(arithmetic.check_packed, Quantization(8), mx.float32, 64, 128))
    assert verdict == WRONG
    assert "the packed weight's error" in told


# ------------------------------------------------------------------------------------------------ nano


@pytest.fixture(scope="module")
def miniature() -> nano.Nano:
    return nano.Nano(64)


@pytest.mark.parametrize("stage", nano.DTYPES)
def test_stages(stage, miniature, diagnose):
    assert diagnose(partial(nano.check_stage, lambda: miniature, stage, mx.bfloat16))[0] == OK


@pytest.mark.parametrize("stage", nano.DTYPES)
def test_a_stage_that_is_shifted(stage, miniature, diagnose, monkeypatch):
    out = miniature.expected(stage)
    monkeypatch.setattr(miniature, "compute", lambda *_: mx.roll(out, 1, axis=1))
    for dtype in nano.DTYPES[stage]:
        assert diagnose(partial(nano.check_stage, lambda: miniature, stage, dtype))[0] == WRONG
    monkeypatch.setattr(miniature, "compute", lambda *_: out * 1.005)
    assert diagnose(partial(nano.check_stage, lambda: miniature, stage, mx.float32))[0] == WRONG


def test_a_second_thread(diagnose, monkeypatch):
    assert diagnose(partial(nano.check_thread, 64))[0] == OK
    black, white = (SimpleNamespace(images=[Image.new("RGB", (64, 64), colour)]) for colour in ("black", "white"))

    def fail(pipe, *_, **__):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("There is no Stream(gpu, 0) in current thread.")
        return black

    def other(pipe, *_, **__):
        return black if threading.current_thread() is threading.main_thread() else white

    for broken in (fail, other):
        monkeypatch.setattr(Flux2Pipeline, "__call__", broken)
        assert diagnose(partial(nano.check_thread, 64))[0] == WRONG


def test_memory_beyond_the_plan(diagnose, monkeypatch, memory):
    memory()
    assert diagnose(partial(nano.check_peak, 64))[0] == OK
    monkeypatch.setattr(Flux2Pipeline, "__call__", lambda *_, **__: SimpleNamespace(peak_bytes={"decode": 10**9}))
    verdict, told = diagnose(partial(nano.check_peak, 64))
    assert verdict == WRONG
    assert "--memory-limit" in told


# ------------------------------------------------------------------------------------------------ speed


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        (Speeds(4 * TERA, 2 * TERA, 1 * TERA, 1e11), ""),
        (Speeds(0.4 * TERA, 2 * TERA, 1 * TERA, 1e11), "products are slower than NumPy's"),
        (Speeds(4 * TERA, 0.1 * TERA, 1 * TERA, 1e11), "attention beside products"),
        (Speeds(4 * TERA, 0.1 * TERA, 0.1 * TERA, 1e11), "attention and convolution beside products"),
    ],
)
def test_speeds(speeds, said, diagnose, monkeypatch):
    monkeypatch.setattr(speed, "numpy_speed", lambda: TERA)
    verdict, told = diagnose(partial(speed.check_speed, lambda: {mx.float32: speeds}, mx.float32))
    assert verdict == (SLOW if said else OK)
    assert said in told
    assert "TFLOP/s (NumPy's 1)" in told


def test_numpys_speed():
    assert speed.numpy_speed(8) > 0


def test_what_autotune_chose(diagnose, monkeypatch):
    check = partial(speed.check_autotune, mx.float32, 64, 64)
    assert diagnose(check) == (OK, "4 bits unpacked from 128 rows, 8 bits unpacked from 128 rows")
    monkeypatch.setenv("FLUX2_MLX_DENSE_ROWS", str(1 << 62))
    assert "4 bits never unpacked" in diagnose(check)[1]
    monkeypatch.setenv("FLUX2_MLX_DENSE_ROWS", "many")
    assert diagnose(check)[0] == WRONG


def test_the_longest_kernel(diagnose, monkeypatch):
    """klein-9b's largest product at 2048 x 2048 is 8 x 16896 x 4096^2 FLOP; attention is in parts of 10^12 at most."""

    def check(attention: float, products: float):
        speeds = Speeds(products * TERA, attention * TERA, 1, 1)
        return partial(speed.check_longest_kernel, lambda: {mx.float16: speeds}, mx.float16)

    assert diagnose(check(0.01, 0.01))[0] == OK  # no watchdog on a CPU
    monkeypatch.setattr(speed, "on_gpu", lambda: True)
    assert diagnose(check(4.0, 4.0)) == (OK, "product of klein-9b at 2048 x 2048, 2.3 TFLOP, about 0.6 s")
    assert diagnose(check(1.0, 4.0)) == (OK, "attention of klein-9b at 2048 x 2048, 1.0 TFLOP, about 1.0 s")
    for attention, products, said in ((0.3, 4.0, "about 3.3 s of 5"), (4.0, 0.5, "product of klein-9b")):
        verdict, told = diagnose(check(attention, products))
        assert verdict == SLOW
        assert said in told
        assert "macOS may end it" in told


# ------------------------------------------------------------------------------------------------ klein-4b's shapes

FULL = {
    "step": partial(full.check_step, mx.float32, 64, PARAMS),
    "decode": partial(full.check_decode, lambda: full.Decoding(64, IMAGES), mx.bfloat16, "1"),
    "packing": partial(full.check_packing, mx.float32, PARAMS),
    "attention": partial(full.check_attention, mx.float32, 32),
}


@pytest.mark.parametrize("name", FULL)
def test_full(name, diagnose, monkeypatch):
    monkeypatch.setattr(full, "LONG_START", 1e9)
    verdict, told = diagnose(partial(full.skipping, FULL[name]))
    assert verdict == OK
    assert " s" in told
    monkeypatch.setattr(full, "machine_memory", lambda: 10_000)
    verdict, told = diagnose(partial(full.skipping, FULL[name]))
    assert verdict == SKIPPED
    assert "GB of 0.0 free; close other programs" in told


def test_a_decode_that_is_wrong(diagnose, monkeypatch):
    usual = full.Decoding.decode

    def decode(decoding, dtype, setting):
        image, seconds = usual(decoding, dtype, setting)
        return image * (3 if setting == "1" else 1), seconds

    monkeypatch.setattr(full.Decoding, "decode", decode)
    for dtype in (mx.float32, mx.bfloat16):
        check = partial(full.check_decode, lambda: full.Decoding(64, IMAGES), dtype, "1")
        assert diagnose(check)[0] == WRONG


def test_a_start_that_packs_for_long(diagnose, monkeypatch):
    monkeypatch.setattr(full, "LONG_START", 0)
    verdict, told = diagnose(FULL["packing"])
    assert verdict == SLOW
    assert "flux2-convert" in told


def test_attention_that_macos_would_end(diagnose, monkeypatch):
    monkeypatch.setattr(full, "on_gpu", lambda: True)
    monkeypatch.setattr(full, "shortest_seconds", lambda *_: 4.0)
    verdict, told = diagnose(FULL["attention"])
    assert verdict == SLOW
    assert "macOS ends a kernel" in told


def test_what_is_packed_of_klein_4b():
    """The matrices of 27 layers of Qwen3-4B with its embedding, and of the transformer."""
    layer = 2560 * (2 * 4096 + 2 * 1024) + 3 * 2560 * 9728
    block = 4 * 3072**2 + 9 * 3072**2
    transformer = (2 * 5 + 20) * block + (1 + 6 + 6 + 3 + 2) * 3072**2 + (256 + 128 + 128 + 7680) * 3072
    assert full.packable() == 27 * layer + 151936 * 2560 + transformer
