"""The VIDEO of NAVA Mux against the host's own: what it tells, how it is cut, what Save Video's settings do."""

import io
import os
from fractions import Fraction

import comfy_host
import pytest
import torch
from graphs import Graph

comfy_host.import_comfyui()

import av  # noqa: E402
from comfy_api.latest import InputImpl, Types  # noqa: E402

video = comfy_host.pack_module("nodes.host.video")

FRAMES, WIDTH, HEIGHT, RATE = 49, 64, 48, 48000
LATER = "av1" in Types.VideoCodec.as_input()  # hosts whose Save Video has more than MP4 of H.264
later_hosts = pytest.mark.skipif(not LATER, reason="this ComfyUI's Save Video writes MP4 of H.264 alone")


def components():
    shift = torch.arange(FRAMES)[:, None, None, None] / FRAMES
    rows, columns = torch.linspace(0, 3, HEIGHT)[:, None, None], torch.linspace(0, 4, WIDTH)[:, None]
    noise = torch.rand(FRAMES, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(0))
    frames = 0.4 + 0.3 * torch.sin(rows + columns + 6 * shift + torch.arange(3)) + 0.2 * noise
    seconds = torch.arange(2 * RATE) / RATE  # a little less than the picture's 49 / 24 s
    sound = 0.3 * torch.sin(2 * torch.pi * torch.stack([220 * seconds, 330 * seconds]))[None]
    return frames.clamp(0, 1), {"waveform": sound, "sample_rate": RATE}


@pytest.fixture(scope="module")
def ours():
    return video.MuxedVideo(*components())


@pytest.fixture(scope="module")
def stock():
    frames, sound = components()
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, audio=sound, frame_rate=Fraction(24)))


def read(source):
    """(container format, codecs, tags, seconds of each stream, the picture's colours)."""
    with av.open(source) as container:
        picture, *sound = container.streams.video + container.streams.audio
        context = picture.codec_context
        seconds = []
        for stream in container.streams:
            container.seek(0)
            last = [frame for frame in container.decode(stream)][-1]
            length = last.samples / last.sample_rate if stream.type == "audio" else 1 / picture.average_rate
            seconds.append(float(last.pts * last.time_base + length))
        colours = tuple(int(getattr(context, f"color{each}")) for each in ("space", "_primaries", "_trc", "_range"))
        codecs = [stream.codec_context.codec.canonical_name for stream in (picture, *sound)]
        return container.format.name, codecs, dict(container.metadata), seconds, colours, picture.frames


# --- what it tells -----------------------------------------------------------------------------------------------


def test_it_tells_what_the_hosts_own_video_tells(ours, stock):
    told = [name for name in dir(type(stock)) if name.startswith(("get_", "has_")) and hasattr(ours, name)]
    assert {"get_dimensions", "get_duration", "get_frame_count", "get_frame_rate", "get_container_format"} <= set(told)
    for name in set(told) - {"get_components", "get_stream_source"}:
        assert getattr(ours, name)() == getattr(stock, name)(), name
    mine, theirs = ours.get_components(), stock.get_components()
    assert mine.images is ours.frames
    assert torch.equal(mine.images, theirs.images)
    assert torch.equal(mine.audio["waveform"], theirs.audio["waveform"])
    assert mine.frame_rate == theirs.frame_rate == 24
    source = read(ours.get_stream_source())
    assert source[0] == ours.get_container_format()
    assert source[5] == FRAMES


# --- how it is cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "duration", "first", "count"),
    [(0.0, 0.0, 0, 49), (0.5, 0.0, 12, 37), (0.5, 1.0, 12, 24), (-0.5, 0.0, 37, 12), (-1.0, 0.5, 25, 12),
     (-9.0, 0.0, 0, 49), (0.0, 9.0, 0, 49), (None, None, 0, 49), (0.0, 0.001, 0, 1)],
)  # fmt: skip
def test_trimming_takes_frames_and_their_sound(ours, start, duration, first, count):
    part = ours.as_trimmed(start, duration)
    assert torch.equal(part.frames, ours.frames[first : first + count])
    begin = first * RATE // 24
    assert torch.equal(part.audio["waveform"], ours.audio["waveform"][..., begin : begin + count * RATE // 24])
    assert part.get_duration() == pytest.approx(count / 24)


@pytest.mark.parametrize(("start", "duration"), [(0.5, 1.0), (-0.5, 0.25), (-1.0, 0.5)])
def test_trimming_takes_as_much_as_the_hosts_own(ours, stock, start, duration):
    (mine,), (theirs,) = (trim(each, start, duration, False) for each in (ours, stock))
    theirs = theirs.get_components()
    assert mine.get_frame_count() == theirs.images.shape[0]
    assert (mine.frames - theirs.images).abs().mean() < 0.1  # the host's went through a file


def trim(clip, start, duration, strict):
    nodes = pytest.importorskip("comfy_extras.nodes_video")
    return nodes.VideoSlice.execute(clip, start, duration, strict).result


def test_trimming_what_is_not_there_is_an_error(ours):
    assert ours.as_trimmed(3.0, 0.0) is None
    assert ours.as_trimmed(1.5, 1.0, strict_duration=True) is None
    assert ours.as_trimmed(-0.5, 1.0, strict_duration=True) is None
    with pytest.raises(ValueError, match="Failed to slice video"):
        trim(ours, 3.0, 0.0, False)


# --- what Save Video's settings do -------------------------------------------------------------------------------


def saved(clip, path, **settings):
    clip.save_to(str(path), **settings)
    return read(str(path))


def test_the_file_is_mp4_in_bt709_of_one_length(ours, tmp_path):
    tags = {"prompt": {"1": {"class_type": "NavaMux"}}, "note": "hello"}
    name, codecs, read_tags, seconds, colours, frames = saved(ours, tmp_path / "clip.mp4", metadata=tags)
    assert name == ours.get_container_format()
    assert codecs == ["h264", "aac"]
    assert (read_tags["prompt"], read_tags["note"]) == ('{"1": {"class_type": "NavaMux"}}', "hello")
    assert colours == (1, 1, 1, 1)
    assert frames == FRAMES
    assert max(seconds) - min(seconds) < 1 / 24


def test_quality_is_save_videos_or_else_the_nodes(ours, tmp_path):
    def size(name, clip=ours, **settings):
        clip.save_to(str(tmp_path / name), **settings)
        return (tmp_path / name).stat().st_size

    plain, worse, better = size("a.mp4"), size("b.mp4", crf=40.0), size("c.mp4", crf=5)
    assert worse < 0.6 * plain < plain < 0.8 * better
    assert size("d.mp4", crf=18.0) == pytest.approx(plain, rel=0.01)
    coarse = video.MuxedVideo(*components(), crf=40)
    assert size("e.mp4", coarse) == pytest.approx(worse, rel=0.01)
    assert size("f.mp4", preset="ultrafast") != plain


def test_srgb_is_said_in_the_file(ours, tmp_path):
    *_, colours, _ = saved(ours, tmp_path / "clip.mp4", color_space="sRGB", crf=23.0, bit_depth=8)
    assert colours == (1, 1, 13, 1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"color_space": "HDR"}, "SDR, which HDR is not"),
        ({"color_space": "HDR PQ"}, "SDR, which HDR PQ is not"),
        ({"bit_depth": 10}, "8 bits, not 10"),
        ({"format": "avi"}, "cannot write avi files: choose one of auto, mp4"),
        ({"codec": "h265"}, "cannot write h265: choose one of auto, h264"),
        ({"stereo_mode": "left"}, "does not know Save Video's setting stereo_mode"),
    ],
)
def test_what_cannot_be_written_is_refused_in_a_sentence(ours, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        ours.save_to(str(tmp_path / "never.mp4"), **settings)
    assert list(tmp_path.iterdir()) == []


@later_hosts
@pytest.mark.parametrize(
    ("container", "codec", "codecs"),
    [("mkv", "auto", ["h264", "aac"]), ("webm", "auto", ["av1", "opus"]), ("mp4", "av1", ["av1", "aac"])],
)
def test_what_later_hosts_write_they_write(ours, tmp_path, container, codec, codecs):
    path = tmp_path / f"clip.{container}"
    name, found, tags, seconds, colours, _ = saved(
        ours, path, format=container, codec=codec, metadata={"prompt": {"a": 1}}, crf=40.0
    )
    assert container in name.replace("matroska", "mkv")
    assert found == codecs
    assert {key.lower(): value for key, value in tags.items()}["prompt"] == '{"a": 1}'
    assert colours == (1, 1, 13, 1)
    assert max(seconds) - min(seconds) < 1 / 24
    assert list(tmp_path.iterdir()) == [path]
    ours.save_to(str(tmp_path / f"fine.{container}"), format=container, codec=codec, crf=10.0)
    assert path.stat().st_size < 0.7 * (tmp_path / f"fine.{container}").stat().st_size


@later_hosts
@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="this system tells no scheduling")
def test_writing_leaves_the_threads_priority_alone(ours, tmp_path):
    """As root the AV1 encoder would leave it at the highest real-time priority."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    ours.save_to(str(tmp_path / "clip.webm"), format="webm")
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


@later_hosts
def test_an_odd_size_is_written_by_the_host_too(tmp_path):
    odd = video.MuxedVideo(components()[0][:3, :47, :63])
    assert read_size(odd, tmp_path / "odd.mkv") == (64, 48)


def read_size(clip, path):
    clip.save_to(str(path))
    with av.open(str(path)) as container:
        assert container.format.name == "matroska,webm"
        return container.streams.video[0].width, container.streams.video[0].height


def test_it_is_written_into_memory(ours):
    buffer = io.BytesIO()
    ours.save_to(buffer, crf=30.0)
    buffer.seek(0)
    assert read(buffer)[5] == FRAMES


# --- the nodes on a server ---------------------------------------------------------------------------------------


def save_video(comfy, **settings):
    """A clip of the small models through NAVA Mux into Save Video with these settings."""
    graph = Graph()
    frames = graph.frames(graph.latent(seconds=0.5), graph.video_vae(comfy.names))
    clip = graph.add("NavaMux", frames=frames, fps=24.0)
    graph.add("SaveVideo", video=clip, filename_prefix="settings", **settings)
    return graph


@later_hosts
def test_save_videos_settings_reach_the_file(comfy):
    encode = {"format": "mp4", "format.codec": "h264", "format.codec.encoding": "re-encode"}
    crf, space = "format.codec.encoding.crf", "format.codec.encoding.color_space"
    coarse, fine = (
        comfy.ok(save_video(comfy, **encode, **{crf: value, space: "sRGB"})).file(".mp4") for value in (45.0, 5.0)
    )
    assert coarse.stat().st_size < 0.6 * fine.stat().st_size
    assert read(str(fine))[4] == (1, 1, 13, 1)
    node, message = comfy.fails(save_video(comfy, **encode, **{crf: 23.0, space: "HDR"}))
    assert node == "SaveVideo"
    assert "choose auto or sRGB as color space in Save Video" in message
    webm = comfy.ok(save_video(comfy, **{"format": "webm", "format.codec": "av1"})).file(".webm")
    assert read(str(webm))[1] == ["av1"]
