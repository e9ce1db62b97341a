"""Videos read in: sizes, rates, turned ones, sound in step; and frames kept without loss, whole or not at all."""

import os
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from nava_core.media import NonFiniteError, mux, read_image, write_wav
from nava_core.video_files import LosslessFrames, read_video, to_levels, write_picture

av = pytest.importorskip("av")

RATE = 48_000


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbered(frames, height=48, width=64):
    """Flat grey frames that say which they are, a step of 8 levels each, (T, H, W, 3) in 0..1."""
    return (torch.arange(frames) * 8 / 255)[:, None, None, None].expand(-1, height, width, 3)


def numbers(frames):
    return (frames.float().mean(dim=(1, 2, 3)) / 8).round().int().tolist()


def corners(height=48, width=64):
    """Red at the top left, green at the top right, blue at the bottom left."""
    picture = torch.zeros(height, width, 3)
    picture[: height // 2, : width // 2, 0] = 1
    picture[: height // 2, width // 2 :, 1] = 1
    picture[height // 2 :, : width // 2, 2] = 1
    return picture


def turn(path, matrix):
    """Write a matrix (a, b, c, d) into the header of an MP4's picture track, as telephones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4
    at += 40 if data[at] == 0 else 52
    values = (matrix[0], matrix[1], 0, matrix[2], matrix[3], 0, 0, 0)
    data[at : at + 32] = struct.pack(">8i", *(value << 16 for value in values))
    path.write_bytes(data)


# ---------------------------------------------------------------- reading


def test_a_clip_is_read_with_its_frames_rate_and_sound(tmp_path):
    sound = 0.3 * torch.sin(torch.arange(RATE) / 20).expand(2, -1)
    mux(tmp_path / "clip.mp4", numbered(12), sound, RATE)
    video = read_video(tmp_path / "clip.mp4")
    assert video.frames.dtype == torch.uint8
    assert tuple(video.frames.shape) == (12, 48, 64, 3)
    assert (video.fps, video.size, video.sample_rate) == (24, (64, 48), RATE)
    assert video.seconds == 0.5
    assert numbers(video.frames) == list(range(12))
    assert video.notes == ()
    assert video.waveform.shape == (2, RATE // 2)
    assert (video.waveform - sound[:, : RATE // 2]).abs().mean() < 0.02

    part = read_video(tmp_path / "clip.mp4", max_seconds=0.25)
    assert numbers(part.frames) == list(range(6))
    assert part.waveform.shape == (2, RATE // 4)
    small = read_video(tmp_path / "clip.mp4", size=(32, 32))
    assert tuple(small.frames.shape) == (12, 32, 32, 3)
    assert small.size == (64, 48)


@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 25, 12])
def test_odd_rates_and_silent_videos(tmp_path, fps):
    mux(tmp_path / "clip.mp4", numbered(7), fps=fps)
    video = read_video(tmp_path / "clip.mp4")
    assert video.fps == fps
    assert (video.waveform, video.sample_rate) == (None, 0)
    assert numbers(video.frames) == list(range(7))


def test_colours_are_those_that_the_file_says(tmp_path):
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.25, 0.75]])
    frames = colours[:, None, None, :].expand(-1, 32, 32, 3)
    mux(tmp_path / "clip.mp4", frames, crf=1)
    assert (read_video(tmp_path / "clip.mp4").frames.float() / 255 - frames).abs().max() < 0.02


@pytest.mark.parametrize("is_full", [False, True])
def test_small_videos_that_say_nothing_of_their_colours_are_bt_601(tmp_path, is_full):
    """Red is 81 in BT.601 of limited range and 76 of full range; in BT.709 these levels would be orange or pink."""
    luma, blue, red = (76, 85, 255) if is_full else (81, 90, 240)
    planes = np.concatenate([np.full(32 * 32, luma), np.full(16 * 16, blue), np.full(16 * 16, red)])
    with av.open(str(tmp_path / "plain.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=24)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        if is_full:
            stream.codec_context.color_range = 2
        frame = av.VideoFrame.from_ndarray(planes.astype("uint8").reshape(48, 32), format="yuv420p")
        frame.pts, frame.time_base, frame.color_range = 0, Fraction(1, 24), 2 if is_full else 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = read_video(tmp_path / "plain.mkv").frames[0].float()
    assert (read - torch.tensor([255.0, 0, 0])).abs().max() <= 3


def test_hdr_is_said(tmp_path):
    with av.open(str(tmp_path / "bright.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.color_trc = 18
        frame = av.VideoFrame.from_ndarray(to_levels(corners()).numpy(), format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (note,) = read_video(tmp_path / "bright.mp4").notes
    assert note.startswith("bright.mp4 is HDR")


@pytest.mark.parametrize(
    ("matrix", "turns"), [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1), ((1, 0, 0, 1), 0)]
)
def test_a_turned_video_is_read_upright(tmp_path, matrix, turns):
    path = tmp_path / "phone.mp4"
    mux(path, corners().expand(3, -1, -1, -1), crf=1)
    turn(path, matrix)
    video = read_video(path)
    expected = corners().rot90(turns)
    assert tuple(video.frames.shape[1:]) == tuple(expected.shape)
    assert video.size == (expected.shape[1], expected.shape[0])
    assert (video.frames[1].float() / 255 - expected).abs().mean() < 0.05


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        frame = av.VideoFrame.from_ndarray(to_levels(corners()).numpy(), format="rgb24").reformat(format="yuv420p")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = read_video(tmp_path / "wide.mp4")
    assert video.size == (85, 48)
    assert (video.frames[0].float() / 255 - corners(width=85)).abs().mean() < 0.05
    assert "pixels that are not square: it was scaled to 85x48" in video.notes[0]


def test_uneven_frames_are_read_at_an_even_rate(tmp_path):
    """Frame 2 stands still for three frames' time."""
    times = [0, 1, 2, 5, 6, 7, 8, 9]
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame_time, pixels in zip(times, to_levels(numbered(8)).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = frame_time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    video = read_video(tmp_path / "uneven.mkv")
    shown = {index / float(video.fps): number for index, number in enumerate(numbers(video.frames))}
    for second, number in shown.items():
        on_screen = sum(frame_time / 10 <= second + 0.011 for frame_time in times) - 1
        assert number == on_screen
    assert abs(video.seconds - 1.0) < 0.11
    assert [("unevenly" in note) for note in video.notes] == [True]


def test_sound_that_begins_late_stays_in_step(tmp_path):
    click = torch.zeros(1, RATE)
    click[:, RATE // 10] = 1
    write_wav(tmp_path / "click.wav", click, RATE)
    with av.open(str(tmp_path / "late.mkv"), "w") as container:
        picture = container.add_stream("ffv1", rate=24)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuv420p"
        sound = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for index, pixels in enumerate(to_levels(numbered(24)).numpy()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(picture.encode(frame))
        samples = (click[:, : RATE // 2] * 32767).short().numpy()
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = RATE, RATE // 4, Fraction(1, RATE)
        container.mux(sound.encode(frame))
        for stream in (picture, sound):
            container.mux(stream.encode(None))
    video = read_video(tmp_path / "late.mkv")
    assert int(video.waveform[0].argmax()) == RATE // 4 + RATE // 10
    assert video.waveform.shape[1] <= RATE


def test_what_is_no_video_is_refused_in_a_sentence(tmp_path):
    write_wav(tmp_path / "a.wav", noise(1, RATE).clamp(-1, 1), RATE)
    with pytest.raises(ValueError, match=r"There is no picture in a\.wav"):
        read_video(tmp_path / "a.wav")
    (tmp_path / "page.mp4").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"Cannot read page\.mp4 as video"):
        read_video(tmp_path / "page.mp4")
    mux(tmp_path / "clip.mp4", torch.rand(24, 64, 64, 3), noise(2, RATE), RATE)
    whole = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: whole.index(b"mdat") + 8])
    with pytest.raises(ValueError, match=r"(picture track of cut\.mp4 is empty or broken|Cannot read cut\.mp4)"):
        read_video(tmp_path / "cut.mp4")
    (tmp_path / "head.mp4").write_bytes(whole[:200])
    with pytest.raises(ValueError, match=r"Cannot read head\.mp4 as video: it is broken or cut off"):
        read_video(tmp_path / "head.mp4")
    at = whole.index(b"mdat")
    (tmp_path / "short.mp4").write_bytes(whole[: at + (len(whole) - at) // 2])
    short = read_video(tmp_path / "short.mp4")
    assert 1 <= len(short.frames) < 24
    assert short.notes == (
        f"Only {len(short.frames)} of the 24 frames that short.mp4 tells of are in it: it may be cut off.",
    )
    assert read_video(tmp_path / "short.mp4", 10).notes == short.notes
    assert read_video(tmp_path / "short.mp4", 1 / 24).notes == ()  # more of it was not asked for
    with pytest.raises(FileNotFoundError, match="no file"):
        read_video(tmp_path / "none.mp4")


# ---------------------------------------------------------------- without loss


@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
def test_frames_come_back_bit_for_bit(tmp_path, size):
    frames = torch.randint(0, 256, (19, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "frames.mkv"
    assert LosslessFrames.write(path, frames.split(5)) == 19
    chunks = list(LosslessFrames.read(path))
    assert [len(chunk) for chunk in chunks] == [8, 8, 3]
    assert torch.equal(torch.cat(chunks), frames)
    LosslessFrames.write(path, frames.float() / 255)
    assert torch.equal(torch.cat(list(LosslessFrames.read(path))), frames)
    assert torch.equal(read_video(path).frames, frames)
    assert os.listdir(tmp_path) == ["frames.mkv"]


def test_frames_that_cannot_be_kept_leave_no_file(tmp_path):
    frames = torch.rand(3, 32, 32, 3)
    path = tmp_path / "frames.mkv"

    def breaking():
        yield frames
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LosslessFrames.write(path, breaking())
    for wrong, message in (
        ([frames, frames[:, :16]], "one size; got 32x16 after 32x32"),
        ([], "no frames to write"),
        (frames[0], r"Frames must be \(F, H, W, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LosslessFrames.write(path, wrong)
    with pytest.raises(NonFiniteError, match="decoded video frames"):
        LosslessFrames.write(path, frames * float("nan"))
    assert os.listdir(tmp_path) == []


WRITER = """
import sys, torch
from nava_core.video_files import LosslessFrames
def chunks():
    while True:
        yield torch.randint(0, 256, (8, 64, 64, 3), dtype=torch.uint8)
        print("more", flush=True)
LosslessFrames.write(sys.argv[1], chunks())
"""


def test_a_killed_writer_leaves_no_file_of_that_name(tmp_path):
    path = tmp_path / "frames.mkv"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout.readline() == b"more\n"
    time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        list(LosslessFrames.read(path))


def test_files_that_are_not_kept_frames_are_refused(tmp_path):
    mux(tmp_path / "lossy.mp4", torch.rand(2, 32, 32, 3))
    with pytest.raises(ValueError, match=r"lossy\.mp4 holds no frames without loss"):
        list(LosslessFrames.read(tmp_path / "lossy.mp4"))
    (tmp_path / "page.mkv").write_text("no")
    with pytest.raises(ValueError, match=r"Cannot read page\.mkv as frames"):
        list(LosslessFrames.read(tmp_path / "page.mkv"))


def test_a_picture_comes_back_bit_for_bit(tmp_path):
    levels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8)
    for frame in (levels, levels.float() / 255):
        write_picture(tmp_path / "last.png", frame)
        assert torch.equal(read_image(tmp_path / "last.png"), levels.float() / 255)
    with pytest.raises(ValueError, match="A picture is"):
        write_picture(tmp_path / "other.png", levels[None])
    with pytest.raises(NonFiniteError):
        write_picture(tmp_path / "other.png", torch.full((4, 4, 3), float("nan")))
    assert os.listdir(tmp_path) == ["last.png"]
