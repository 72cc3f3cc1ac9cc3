"""Memory, work and speed of a setting, and the machine that they are held against."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from helios.errors import InputError
from helios.fit import devices
from helios.fit.costs import Setting, activation_bytes, stage_graphs, stage_shape, vae_flops
from helios.fit.estimate import (
    HOST_BASE,
    RESERVE,
    Work,
    count_work,
    fit_memory,
    parse_steps,
    predict,
    repository,
    text_parameters,
    vae_shares,
)
from helios.fit.host import Limits, cgroup_limits, hub_cache, read_host
from helios.fit.measure import matrix_rate
from helios.graph import Builder, Rate
from helios.model.presets import SIZES, VARIANTS
from helios.ops.pointwise import add, gelu

GB = 10**9


def setting(size: str = "14b", variant: str = "distilled", **changes: int) -> Setting:
    return Setting(SIZES[size], VARIANTS[variant], **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def work() -> dict[str, Work]:
    return {name: count_work(setting(variant=name)) for name in VARIANTS}


# --- counts ---


def test_parameters_of_the_published_networks() -> None:
    found = repository(setting())
    assert found.transformer == 2 * 14_312_427_584
    assert found.text == 2 * 5_680_910_336
    assert found.vae == pytest.approx(4 * 126.9e6, rel=1e-3)
    assert found.total == found.transformer + found.text + found.vae


def test_text_parameters_are_those_of_the_encoder() -> None:
    """Built on meta by transformers from the same config."""
    from transformers import UMT5Config, UMT5EncoderModel

    config = SIZES["mini"].text
    made = UMT5Config(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)})
    with torch.device("meta"):
        model = UMT5EncoderModel(made)
    assert text_parameters(config) == sum(p.numel() for p in model.parameters())


def test_work_of_the_published_size(work: dict[str, Work]) -> None:
    found = work["distilled"]
    assert [round(f / 1e12, 3) for f in found.step_flops] == [66.455, 115.74, 355.88]
    assert found.vae_flops / 1e12 == pytest.approx(69.26, abs=0.01)
    assert found.prompt == 419_430_400
    assert 28.6 * GB < found.weights < 28.8 * GB
    assert found.frames == 33 * 384 * 640 * 3
    assert found.largest_weight == 256_384 * 4096 * 2
    assert work["base"].step_flops == found.step_flops[2:]


def test_activations_are_counted_by_liveness() -> None:
    """a and b = gelu(a) are alive together; a dies at the sum's end, c after b."""
    with Builder("g") as build:
        x = build.input("x", (10,), torch.float32, Rate.STEP)
        held = build.input("held", (1000,), torch.float32, Rate.PROMPT)
        weight = build.input("w", (10,), torch.float32, Rate.WEIGHTS)
        a = add(x, weight)
        b = gelu(a)
        build.output("y", add(a, b))
        build.output("h", held)
    assert activation_bytes(build.graph()) == 4 * 10 * 4  # x, a, b and the result


def test_activations_grow_with_the_picture() -> None:
    small, large = (setting("tiny", height=side, width=side) for side in (64, 128))
    peaks = [activation_bytes(stage_graphs(s, [2])["stage2"]) for s in (small, large)]
    assert 0 < peaks[0] < peaks[1]


@pytest.mark.parametrize(
    ("variant", "height", "width", "fix"),
    [
        ("distilled", 390, 640, "--height 384 --width 640"),
        ("distilled", 384, 0, "--height 384 --width 64"),
        ("base", 400, 650, "--height 400 --width 656"),
        ("mid", -64, 640, "--height 64 --width 640"),
    ],
)
def test_pixels_must_divide_and_the_nearest_are_named(variant: str, height: int, width: int, fix: str) -> None:
    with pytest.raises(InputError, match="needs multiples of") as caught:
        setting("tiny", variant, height=height, width=width)
    assert caught.value.fix == fix


def test_stages_shrink_the_picture_and_not_its_history() -> None:
    shapes = [stage_shape(setting(), stage) for stage in range(3)]
    assert [(s.height, s.width) for s in shapes] == [(12, 20), (24, 40), (48, 80)]
    assert {(s.history.height, s.history.width) for s in shapes if s.history} == {(48, 80)}


def test_vae_flops_follow_the_pixels() -> None:
    half, whole = (vae_flops(setting("tiny", height=side, width=64)) for side in (64, 128))
    assert 1.9 < whole / half <= 2.1


# --- memory ---


def test_an_80_gb_device_holds_everything(work: dict[str, Work]) -> None:
    found = fit_memory(work["distilled"], devices.find("h100").memory)
    assert found.fits
    assert found.short == 0
    assert found.split is not None
    assert (found.split.group, found.split.tile) == (9, None)
    assert found.total == max(found.at("encode"), found.at("step"), found.at("decode"))
    assert found.at("encode") == work["distilled"].weights + work["distilled"].text_weights
    assert found.host_total > 11 * GB


def test_a_24_gb_device_does_not(work: dict[str, Work]) -> None:
    found = fit_memory(work["distilled"], devices.find("rtx4090").memory)
    assert not found.fits
    assert not found.fits_without_text
    assert found.short == found.total - int(24 * 2**30 * (1 - RESERVE))


def test_the_text_encoder_leaves_where_both_have_no_room(work: dict[str, Work]) -> None:
    both = work["distilled"].weights + work["distilled"].text_weights
    for size, apart in ((80, False), (40, True)):
        found = fit_memory(work["distilled"], size * GB)
        assert found.apart is apart is (both > found.usable)
        assert found.fits
        assert found.at("encode") == (work["distilled"].text_weights if apart else both)


@pytest.mark.parametrize(("memory", "stays"), [(48 * GB, False), (80 * GB, True), (141 * GB, True)])
def test_the_text_encoder_stays_where_there_is_plenty_of_room(memory: int, stays: bool, work: dict[str, Work]) -> None:
    (text,) = (part for part in fit_memory(work["distilled"], memory).parts if part.name == "text encoder weights")
    assert text.encode == work["distilled"].text_weights
    assert text.step == text.decode == (text.encode if stays else 0)


def test_the_text_encoder_may_be_the_only_one_without_room(work: dict[str, Work]) -> None:
    large = dataclasses.replace(work["distilled"], text_weights=39 * GB)
    found = fit_memory(large, 40 * GB)
    assert not found.fits
    assert found.fits_without_text
    assert found.short == found.at("encode") - found.usable == 39 * GB - found.usable


def test_two_prompts_are_held_with_guidance(work: dict[str, Work]) -> None:
    parts = {name: fit_memory(work[name], 80 * GB).parts[2].step for name in ("distilled", "mid")}
    assert parts == {"distilled": work["mid"].prompt, "mid": 2 * work["mid"].prompt}


def test_one_memory_for_host_and_device_counts_the_process(work: dict[str, Work]) -> None:
    apart, shared = (fit_memory(work["distilled"], 100 * GB, shared=flag) for flag in (False, True))
    assert apart.usable - shared.usable == HOST_BASE + work["distilled"].frames
    assert shared.host == ()


def test_less_memory_cuts_the_vae_finer(work: dict[str, Work]) -> None:
    groups = [fit_memory(work["distilled"], size * GB).split for size in (80, 45, 40)]
    assert groups[0] is not None
    assert groups[1] is not None
    assert groups[2] is not None
    assert 9 == groups[0].group > groups[1].group
    assert groups[2].tile is not None


# --- speed ---


def test_published_speeds_of_the_h100_lie_in_the_predicted_range(work: dict[str, Work]) -> None:
    device = devices.find("h100")
    assert len(device.published) == 3
    for known in device.published:
        found = predict(work[known.variant], known.steps, peak=device.peak, bandwidth=device.bandwidth)
        assert found.fps[0] < known.fps < found.fps[1], known


def test_speed_is_flops_over_a_share_of_the_peak(work: dict[str, Work]) -> None:
    found = predict(work["distilled"], (1, 1, 1), peak=1e15, bandwidth=math.inf)
    flops = sum(work["distilled"].step_flops) + work["distilled"].chunk_flops
    assert found.flops == flops
    assert found.denoise == pytest.approx((flops / 4e14, flops / 7e14))
    assert found.fps[1] == pytest.approx(33 / (found.denoise[1] + found.vae[1]))
    assert found.first_chunk[0] == pytest.approx(2 * found.denoise[0] + found.vae[0])


def test_guidance_doubles_the_forwards(work: dict[str, Work]) -> None:
    assert predict(work["base"], (50,), peak=1e15, bandwidth=1e13).forwards == 100
    assert predict(work["mid"], (20, 20, 20), peak=1e15, bandwidth=1e13).forwards == 120


def test_a_slow_memory_bounds_the_speed(work: dict[str, Work]) -> None:
    """Each forward reads the weights at least once."""
    found = predict(work["distilled"], (1, 1, 1), peak=1e18, bandwidth=1e11)
    assert found.denoise[1] == pytest.approx(3 * work["distilled"].weights / 1e11, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "steps"), [(None, (2, 2, 2)), ("1,1,1", (1, 1, 1)), (" 3, 2 ,1", (3, 2, 1)), ("4", (4, 4, 4))]
)
def test_steps(text: str | None, steps: tuple[int, ...]) -> None:
    assert parse_steps(text, VARIANTS["distilled"]) == steps


@pytest.mark.parametrize("text", ["", "0", "1,1", "1,1,1,1", "0,1,1", "-1,1,1", "a,b,c", "1.5,1,1"])
def test_steps_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError, match="one number ≥ 1, or 3") as caught:
        parse_steps(text, VARIANTS["distilled"])
    assert caught.value.fix == "--steps 2,2,2"


# --- devices ---


def test_every_row_is_complete_and_has_a_source() -> None:
    for device in devices.table().values():
        assert device.source.startswith(("data sheet: ", "secondary: "))
        assert 20 * 2**30 <= device.memory <= 300 * 2**30
        assert 5e13 < device.peak < 5e15
        assert 1e11 < device.bandwidth < 1e13
        re.compile(device.match)


def test_the_devices_that_people_ask_for_are_there() -> None:
    wanted = ["rtx4090", "a100-80", "h100", "h200", "l20", "h20", "a800", "ascend-910b"]
    assert [devices.find(name).name for name in wanted] == wanted
    assert devices.find("H100").name == devices.find("h 100").name == "h100"
    assert devices.find("ascend_910B").name == "ascend-910b"


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'rtx4090'"):
        devices.find("rtx4080")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-PCIE-40GB", "a100-40"),
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L20", "l20"),
        ("NVIDIA L20X", None),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Ascend910B1", "ascend-910b"),
        ("Ascend910B4", "ascend-910b-32"),
        ("Ascend910B4-1", "ascend-910b"),
        ("Ascend910_9392 (2.0 GiB of it taken by other processes)", "ascend-910c"),
        ("AMD EPYC", None),
    ],
)
def test_a_driver_s_name_finds_its_row_and_no_other(reported: str, name: str | None) -> None:
    found = devices.recognise(reported)
    assert (found.name if found else None) == name


# --- host ---


def test_this_host() -> None:
    host = read_host()
    assert 0 < host.available <= host.usable_memory <= host.memory
    assert 0 < host.usable_cores <= host.cores
    assert host.disk_free > 0


def test_no_cgroup_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_limits(tmp_path, tmp_path / "absent") == Limits()


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")
    return folder


def test_limits_of_version_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    root = group(tmp_path / "fs", cgroup__controllers="cpu memory")
    group(root / "a", memory__max="8000", memory__current="3000", memory__stat="anon 1\ninactive_file 500")
    group(root / "a", cpu__max="150000 100000")
    group(root / "a" / "b", memory__max="max", memory__current="1000", cpu__max="max 100000")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/a/b\n")
    assert cgroup_limits(root, membership) == Limits(8000, 2500, 1.5)


def test_limits_of_version_2_inside_a_container(tmp_path: Path) -> None:
    """There the mount is the group itself, whatever path the membership names."""
    root = group(tmp_path / "fs", cgroup__controllers="memory", memory__max="4096", memory__current="96")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/docker/abc\n")
    assert cgroup_limits(root, membership) == Limits(4096, 96, None)


def test_limits_of_version_1(tmp_path: Path) -> None:
    root = tmp_path / "fs"
    group(root / "memory" / "job", memory__limit_in_bytes="6000", memory__usage_in_bytes="1000")
    group(root / "memory", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    group(root / "cpu" / "job", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    group(root / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/job\n1:cpu,cpuacct:/job\n0::/\n")
    assert cgroup_limits(root, membership) == Limits(6000, 1000, 0.5)


def test_the_hub_s_cache_follows_its_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert hub_cache() == Path("~/.cache/huggingface/hub").expanduser()
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert hub_cache() == tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "x"))
    assert hub_cache() == tmp_path / "x"
    assert Path(read_host().cache) == tmp_path / "x"


def test_the_matrix_rate_is_a_rate() -> None:
    assert 1e8 < matrix_rate(torch.float32, budget=0.02) < 1e15


# --- the VAE's arithmetic ---


def test_a_vae_in_16_bits_is_half_as_large_and_faster() -> None:
    wide, narrow = (
        count_work(dataclasses.replace(setting("mini"), decoding=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.vae_weights == 2 * narrow.vae_weights
    assert wide.vae_flops == narrow.vae_flops
    memory = [fit_memory(work, 16 * GB).parts[-1] for work in (wide, narrow)]
    assert memory[1].decode < memory[0].decode
    speed = [predict(work, (1, 1, 1), peak=1e15, bandwidth=4e12).vae for work in (wide, narrow)]
    assert speed[1][0] < speed[0][0] / 3
    assert vae_shares(narrow.setting) == (0.36, 0.50)
