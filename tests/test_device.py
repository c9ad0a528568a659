"""The machine: errors of the GPU, memory that is free, memory that is wired."""

import subprocess

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from flux2_mlx import DeviceError, Flux2Pipeline, InputError
from flux2_mlx import device as module
from flux2_mlx.convert import main as convert
from flux2_mlx.device import device_errors, free_in_sysctl, free_in_vm_stat, free_memory, wired_limit
from flux2_mlx.generate import main
from flux2_mlx.lora import main as lora
from flux2_mlx.models.autoencoder import Decoder, Encoder
from flux2_mlx.models.flux2 import FluxKlein
from flux2_mlx.models.qwen3 import Qwen3TextEncoder
from flux2_mlx.runtime import residency

SMALL = {"height": 64, "width": 80, "num_steps": 2, "max_sequence_length": 16, "seed": 1}
IMAGE = Image.new("RGB", (80, 64), "red")

# As reported to ml-explore/mlx and its users, and as its allocators write them.
METAL = "[METAL] Command buffer execution failed: "
STOPPED = [
    f"{METAL}Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity).",
    f"{METAL}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
    f"{METAL}Ignored (for causing prior/excessive GPU errors) "
    "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
]
FULL = [
    f"{METAL}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory).",
    "[metal::malloc] Attempting to allocate 21474836480 bytes which is greater than the maximum allowed buffer size of "
    "17179869184 bytes.",
    "[metal::malloc] Resource limit (499000) exceeded.",
    "[malloc] Unable to allocate 8589934592 bytes.",
    "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "std::bad_alloc",
]


def failing(error):
    """A function that fails once, as MLX does where it computes, and then raises AssertionError."""
    errors = [error]

    def fail(*_, **__):
        raise errors.pop() if errors else AssertionError("computed again")

    return fail


def pixels(pipe, **options):
    return np.asarray(pipe("a red fox", **SMALL, **options).images[0])


@pytest.fixture(scope="module")
def expected(checkpoint):
    return pixels(Flux2Pipeline.from_pretrained(checkpoint, cache=False), image=IMAGE)


def explained(error):
    """The line of the DeviceError that an error becomes."""
    with pytest.raises(DeviceError) as raised, device_errors():
        raise error
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("said", STOPPED)
def test_a_stopped_gpu_is_one_line(said):
    line = explained(RuntimeError(said))
    assert "stopped because its work took too long" in line
    assert "a smaller image" in line
    assert "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in line


@pytest.mark.parametrize("said", FULL)
def test_too_little_memory_is_one_line(said):
    line = explained((MemoryError if said == "std::bad_alloc" else RuntimeError)(said))
    assert "memory is too little" in line
    assert "--quantize 4" in line
    assert "--memory streamed" in line


@pytest.mark.parametrize("error", [RuntimeError("There is no Stream(cpu, 0) in current thread."), InputError("Unable")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, device_errors():
        raise error
    assert raised.value is error


@pytest.mark.parametrize("place", ["load", "text_encoder", "references", "denoise", "decode"])
def test_a_pipeline_generates_again_after_an_error_of_the_gpu(checkpoint, monkeypatch, expected, place):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, cache=False)
    places = {
        "load": (residency, "load_weights"),
        "text_encoder": (Qwen3TextEncoder, "__call__"),
        "references": (Encoder, "__call__"),
        "denoise": (FluxKlein, "forward_with_rope"),
        "decode": (Decoder, "__call__"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*places[place], failing(RuntimeError(FULL[0])))
        with pytest.raises(DeviceError, match="Insufficient Memory"):
            pixels(pipe, image=IMAGE)
    assert not pipe.stages.loaded()
    assert np.array_equal(pixels(pipe, image=IMAGE), expected)


def test_an_error_that_mlx_keeps_to_itself_is_found(checkpoint, monkeypatch, tmp_path):
    """Of commands that were handed over before the last ones; nothing of them reaches the cache of prompts."""
    monkeypatch.setenv("FLUX2_MLX_CACHE", str(tmp_path))
    pipe = Flux2Pipeline.from_pretrained(checkpoint)
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: 0)
    errors = [RuntimeError(FULL[0])]
    encode, encoded = Qwen3TextEncoder.__call__, []
    monkeypatch.setattr(Qwen3TextEncoder, "__call__", lambda *given: encoded.append(1) or encode(*given))

    def synchronize():
        if encoded and errors:
            raise errors.pop()

    monkeypatch.setattr(mx, "synchronize", synchronize)
    with pytest.raises(DeviceError, match="Insufficient Memory"):
        pixels(pipe)
    assert not list(tmp_path.rglob("*.safetensors"))
    pixels(pipe)
    assert list(tmp_path.rglob("*.safetensors"))


def test_commands_end_in_one_line(checkpoint, monkeypatch, tmp_path, capsys):
    words = ["a red fox", "--model", str(checkpoint), "--height", "64", "--width", "64", "--quiet", "--no-cache"]
    with monkeypatch.context() as patch:
        patch.setattr(FluxKlein, "forward_with_rope", failing(RuntimeError(STOPPED[0])))
        assert main([*words, "--output", str(tmp_path / "a.png")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the GPU was stopped because")
    assert message.count("\n") == 1
    monkeypatch.setattr("flux2_mlx.checkpoints.write.load_transformer", failing(RuntimeError(FULL[1])))
    assert convert([str(checkpoint), str(tmp_path / "converted"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: memory is too little (maximum allowed buffer size)")
    assert not (tmp_path / "converted").exists()
    monkeypatch.setattr("flux2_mlx.training.run.read_datasets", failing(RuntimeError(FULL[3])))
    assert (
        lora(["--data", str(tmp_path), "--output", str(tmp_path / "run"), "--model", str(checkpoint), "--quiet"]) == 2
    )
    assert capsys.readouterr().err.startswith("error: memory is too little (Unable to allocate)")


# ------------------------------------------------------------------------------------------------ memory

# Recorded: a Mac of 16 GB with 10 cores, as another project's tests of its own parser have it; a Mac of 32 GB with 4 KB
# pages (wazuh/wazuh 22113).
SYSCTL = "hw.memsize: 17179869184\nkern.memorystatus_level: 40\n"
VM_STAT = """Mach Virtual Memory Statistics: (page size of 4096 bytes)
Pages free:                             6127229.
Pages active:                            485320.
Pages inactive:                          628646.
Pages speculative:                       430715.
Pages throttled:                              0.
Pages wired down:                        715958.
Pages purgeable:                          11820.
"Translation faults":                  11477162.
Pages copy-on-write:                     356264.
Pages zero filled:                      7628050.
Pages reactivated:                         9561.
Pages purged:                              1423.
File-backed pages:                      1080348.
Anonymous pages:                         464333.
Pages stored in compressor:                   0.
Pages occupied by compressor:                 0.
Decompressions:                               0.
Compressions:                                 0.
Pageins:                                 280307.
Pageouts:                                     0.
Swapins:                                      0.
Swapouts:                                     0.
"""


def test_free_memory_of_macos():
    assert free_in_vm_stat(VM_STAT) == (6127229 + 628646 + 430715) * 4096
    assert free_in_sysctl(SYSCTL) == 6_871_947_673
    for was, becomes in (
        ("memsize", "size"),
        ("_level: 40", ""),
        (": 40", ": 101"),
        (": 40", ": -1"),
        (": 40", ": 4 %"),
    ):
        assert free_in_sysctl(SYSCTL.replace(was, becomes)) is None, becomes
    assert free_in_sysctl("hw.memsize: 0\nkern.memorystatus_level: 0\n") is None


@pytest.mark.parametrize(
    ("sysctl", "vm_stat", "expected"),
    [
        (SYSCTL, VM_STAT, 6_871_947_673),
        (None, VM_STAT, 7186590 * 4096),
        ("?\n", VM_STAT, 7186590 * 4096),
        (None, "?\n", None),
        (None, None, None),
    ],
)
def test_macos_is_asked_twice(monkeypatch, sysctl, vm_stat, expected):
    """None is a command that fails, as where a name is unknown."""
    said = {"sysctl": sysctl, "vm_stat": vm_stat}

    def run(words, **_):
        if said[words[0]] is None:
            raise subprocess.CalledProcessError(1, words)
        return subprocess.CompletedProcess(words, 0, said[words[0]])

    monkeypatch.setattr(module.sys, "platform", "darwin")
    monkeypatch.setattr(subprocess, "run", run)
    assert free_memory() == expected


@pytest.mark.parametrize("fails", [False, True])
def test_memory_stays_wired_until_the_gpu_is_done(monkeypatch, fails):
    done = []
    monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: done.append(limit) or 7)

    def synchronize():
        done.append("synchronized")
        if fails:
            raise RuntimeError(FULL[0])

    monkeypatch.setattr(mx, "synchronize", synchronize)
    with pytest.raises(RuntimeError if fails else ZeroDivisionError), wired_limit(5):
        raise ZeroDivisionError
    assert done == [5, "synchronized", 7]


# ------------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("stage", ["text_encoder", "transformer", "autoencoder"])
def test_parts_are_those_that_mlx_lists(checkpoint, stage):
    pipe = Flux2Pipeline.from_pretrained(checkpoint, quantize=4)
    model = getattr(pipe, stage)
    weights = dict(tree_flatten(model.parameters()))
    parts = module.parts_of(model)
    assert parts.keys() == weights.keys() | dict(model.named_modules()).keys()
    assert all(parts[name] is array for name, array in weights.items())
    assert all(parts[name] is own for name, own in model.named_modules())
    assert module.weights_of(model).keys() == weights.keys()
