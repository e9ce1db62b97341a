"""Files as they come back: codecs, lengths, colours, tags, and nothing left behind by a failure."""

import io
import json
import wave
from fractions import Fraction

import numpy as np
import pytest
import torch

from nava_core.media import (
    PEAK_LIMIT,
    NonFiniteError,
    apply_loudness,
    check_finite,
    mux,
    read_audio,
    read_image,
    write_wav,
)

av = pytest.importorskip("av")

RATE = 48_000
BARS = torch.tensor(
    [(1, 1, 1), (1, 1, 0), (0, 1, 1), (0, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 1), (0, 0, 0), (0.5, 0.5, 0.5)]
).float()


def moving(frames=9, height=48, width=64):
    """A picture that differs from frame to frame, (T, H, W, 3)."""
    ramp = torch.linspace(0, 1, width).expand(frames, height, width)
    shift = torch.linspace(0, 1, frames)[:, None, None]
    return torch.stack([ramp, (ramp + shift) % 1, shift.expand_as(ramp)], dim=-1)


def tone(samples, rate=RATE, hertz=440.0, channels=2):
    wave_ = 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(samples) / rate)
    return wave_.expand(channels, -1)


def probe(source):
    """What a file says of itself, and its decoded pictures as (T, H, W, 3) uint8."""
    with av.open(source) as container:
        video = container.streams.video[0]
        found = {
            "video": (video.codec_context.name, video.codec_context.pix_fmt, video.average_rate, video.frames),
            "size": (video.width, video.height),
            "video_seconds": video.duration * video.time_base,
            "metadata": dict(container.metadata),
            "starts": (video.start_time,),
        }
        if container.streams.audio:
            audio = container.streams.audio[0]
            found["audio"] = (audio.codec_context.name, audio.layout.name, audio.rate)
            found["audio_seconds"] = audio.duration * audio.time_base
            found["starts"] = (video.start_time, audio.start_time)
        found["frames"] = [frame.to_ndarray(format="rgb24") for frame in container.decode(video)]
    return found


@pytest.mark.parametrize("frames", [1, 25, 145, 241])
def test_a_clip_and_its_sound_are_equally_long(tmp_path, frames):
    path = tmp_path / "clip.mp4"
    picture = torch.rand(1, 16, 16, 3).expand(frames, -1, -1, -1)
    count = mux(path, picture, tone(frames * 2000 + 1500), RATE)
    found = probe(str(path))
    assert count == frames
    assert found["video"] == ("h264", "yuv420p", 24, frames)
    assert found["audio"] == ("aac", "stereo", RATE)
    assert len(found["frames"]) == frames
    assert found["video_seconds"] == Fraction(frames, 24)
    assert abs(found["audio_seconds"] - Fraction(frames, 24)) <= Fraction(1, RATE)
    assert found["starts"] == (0, 0)


def test_sound_stays_in_step_over_ten_seconds(tmp_path):
    """Chirps at known samples come back at those samples, the encoder's delay taken off, to the end of the clip."""
    frames, length = 241, 2048
    chirp = torch.hann_window(length) * torch.sin(torch.linspace(0, 25, length) ** 2)
    sound = torch.zeros(2, frames * 2000)
    starts = list(range(1000, frames * 2000 - 4000, 59_000))
    for at in starts:
        sound[:, at : at + length] = chirp
    mux(tmp_path / "clip.mp4", torch.zeros(frames, 16, 16, 3), sound, RATE)
    got, rate = read_audio(tmp_path / "clip.mp4")
    assert rate == RATE
    for at in starts:
        window = got[0, at - 1000 : at + length + 1000]
        delay = np.correlate(window.numpy(), chirp.numpy()).argmax() - 1000
        assert abs(delay) <= 1


@pytest.mark.parametrize(("samples", "says"), [(1000, "silence"), (100_000, "cut")])
def test_short_and_long_sound_are_fitted(tmp_path, samples, says):
    mux(tmp_path / "clip.mp4", moving(9), tone(samples), RATE)
    assert abs(probe(str(tmp_path / "clip.mp4"))["audio_seconds"] - Fraction(9, 24)) <= Fraction(1, RATE)
    got, _ = read_audio(tmp_path / "clip.mp4")
    if says == "silence":
        assert got[:, 4000:].abs().max() < 1e-3
    else:
        assert got[:, 12_000:18_000].abs().max() > 0.4


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (44_100, 2), (16_000, 1), (96_000, 2)])
def test_the_rate_is_kept_and_one_channel_is_on_both_sides(tmp_path, rate, channels):
    sound = tone(rate * 25 // 24, rate, channels=channels)
    mux(tmp_path / "clip.mp4", moving(25), sound, rate)
    found = probe(str(tmp_path / "clip.mp4"))
    assert found["audio"] == ("aac", "stereo", rate)
    assert abs(found["audio_seconds"] - Fraction(25, 24)) <= Fraction(1, rate)
    got, _ = read_audio(tmp_path / "clip.mp4")
    n = sound.shape[1] - 2000
    assert (got[:, 1000:n] - sound[:1, 1000:n]).abs().max() < 0.05


def test_colours_are_limited_range_bt709(tmp_path):
    path = tmp_path / "bars.mp4"
    picture = BARS.repeat_interleave(32, 0).expand(3, 64, -1, -1)
    mux(path, picture, crf=1)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
    width = picture.shape[2]
    planes = frame.to_ndarray().astype(float)
    luma = planes[:64][32, 16::32]
    chroma = [plane.reshape(32, width // 2)[16, 8::16] for plane in (planes[64:80], planes[80:])]
    red, green, blue = BARS.double().numpy().T
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert np.abs(luma - (16 + 219 * y)).max() < 1.5
    assert np.abs(chroma[0] - (128 + 224 * (blue - y) / 1.8556)).max() < 1.5
    assert np.abs(chroma[1] - (128 + 224 * (red - y) / 1.5748)).max() < 1.5


def test_values_outside_the_range_are_clamped(tmp_path):
    mux(tmp_path / "clip.mp4", torch.full((2, 32, 32, 3), 7.0), 9 * tone(4000), RATE)
    assert probe(str(tmp_path / "clip.mp4"))["frames"][0].min() >= 253
    assert read_audio(tmp_path / "clip.mp4")[0].isfinite().all()


def test_odd_sizes_repeat_their_last_row_and_column(tmp_path):
    picture = moving(3, 47, 63)
    mux(tmp_path / "clip.mp4", picture, crf=1)
    found = probe(str(tmp_path / "clip.mp4"))
    assert found["size"] == (64, 48)
    error = np.abs(found["frames"][1][:47, :63].astype(float) / 255 - picture[1].numpy())
    assert error.mean() < 0.02


def test_a_stream_of_chunks_equals_the_whole(tmp_path):
    picture, seen = moving(25), []
    mux(tmp_path / "whole.mp4", picture, tone(50_000), RATE)
    count = mux(
        tmp_path / "chunks.mp4",
        (chunk for chunk in picture.split(4)),
        tone(50_000),
        RATE,
        callback=lambda frame, frames: seen.append((frame, frames)),
    )
    assert count == 25
    assert seen == [(n, None) for n in range(1, 26)]
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "chunks.mp4").read_bytes()


@pytest.mark.parametrize("sizes", [(1, 4, 4), (9,), (3, 3, 3)])
def test_chunks_of_a_known_number_give_the_file_of_the_tensor(tmp_path, sizes):
    frames, sound, seen = moving(), tone(18_000), []
    mux(tmp_path / "tensor.mp4", frames, sound, RATE)
    chunks = iter(frames.split(sizes))
    mux(tmp_path / "chunks.mp4", chunks, sound, RATE, total=9, callback=lambda *frame: seen.append(frame))
    assert (tmp_path / "chunks.mp4").read_bytes() == (tmp_path / "tensor.mp4").read_bytes()
    assert seen == [(count, 9) for count in range(1, 10)]


@pytest.mark.parametrize(("total", "says"), [(8, "more frames than the 8"), (10, "are 9 frames where .* have 10")])
def test_another_number_of_frames_than_there_should_be_leaves_no_file(tmp_path, total, says):
    with pytest.raises(ValueError, match=says):
        mux(tmp_path / "clip.mp4", iter(moving().split(4)), tone(18_000), RATE, total=total)
    assert list(tmp_path.iterdir()) == []


def test_arrays_batches_and_file_objects(tmp_path):
    mux(tmp_path / "clip.mp4", moving(5), tone(10_000), RATE)
    buffer = io.BytesIO()
    mux(buffer, moving(5).numpy(), tone(10_000)[None].numpy(), RATE)
    assert buffer.getvalue() == (tmp_path / "clip.mp4").read_bytes()
    buffer.seek(0)
    assert probe(buffer)["video"][3] == 5


def test_metadata_and_other_frame_rates(tmp_path):
    graph = {"1": {"class_type": "NavaSampler", "text": "雨夜"}}
    mux(tmp_path / "clip.mp4", moving(5), fps=Fraction(24_000, 1001), metadata={"prompt": graph, "title": "rain"})
    found = probe(str(tmp_path / "clip.mp4"))
    assert json.loads(found["metadata"]["prompt"]) == graph
    assert found["metadata"]["title"] == "rain"
    assert found["video"][2] == Fraction(24_000, 1001)
    assert "audio" not in found


def broken_after(chunks):
    yield from chunks
    raise OSError("disk on fire")


def nan_at(tensor, *place):
    tensor = tensor.clone()
    tensor[place] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("frames", "sound", "error", "says"),
    [
        (nan_at(moving(9), 8, 0, 0, 0), tone(9), NonFiniteError, r"decoded video frames \(video VAE\)"),
        (moving(9) / 0, None, NonFiniteError, "video VAE"),
        (moving(9), nan_at(tone(9), 1, 3), NonFiniteError, r"decoded sound \(audio VAE\)"),
        (iter([moving(9), nan_at(moving(9), 0)]), None, NonFiniteError, "video VAE"),
        (broken_after([moving(9)]), None, OSError, "fire"),
        (iter([moving(9), moving(9, 32)]), None, ValueError, "one size"),
        (iter([]), None, ValueError, "no frames"),
        (torch.zeros(0, 8, 8, 3), None, ValueError, "T, H, W, 3"),
        (torch.zeros(2, 3, 8, 8), None, ValueError, "T, H, W, 3"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), None, ValueError, "uint8"),
        (moving(2), torch.zeros(6, 100), ValueError, "6: mix it down"),
        (moving(2), torch.zeros(2, 0), ValueError, "channels, samples"),
    ],
)
def test_a_failure_leaves_the_folder_as_it_was(tmp_path, frames, sound, error, says):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"an older clip")
    with pytest.raises(error, match=says):
        mux(path, frames, sound, RATE)
    assert path.read_bytes() == b"an older clip"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(frame, frames):
        assert frames == 9
        if frame == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mux(tmp_path / "clip.mp4", moving(9), tone(20_000), RATE, callback=interrupt)
    buffer = io.BytesIO()
    with pytest.raises(KeyboardInterrupt):
        mux(buffer, moving(9), callback=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert buffer.getvalue() == b""


def test_what_aac_and_folders_do_not_have_is_said(tmp_path):
    with pytest.raises(ValueError, match="AAC sound cannot have 50000 Hz"):
        mux(tmp_path / "clip.mp4", moving(2), tone(100), 50_000)
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        mux(tmp_path / "nowhere" / "clip.mp4", moving(2))
    with pytest.raises(ValueError, match="frame rate"):
        mux(tmp_path / "clip.mp4", moving(2), fps=0)


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_wav(tmp_path, bits):
    sound = torch.stack([torch.linspace(-1.2, 1.2, 1001), torch.linspace(0.5, -0.5, 1001)])
    assert write_wav(tmp_path / "sound.wav", sound, RATE, bits) == 1001
    with wave.open(str(tmp_path / "sound.wav")) as file:
        assert file.getparams()[:4] == (2, bits // 8, RATE, 1001)
    got, rate = read_audio(tmp_path / "sound.wav")
    assert rate == RATE
    torch.testing.assert_close(got, sound.clamp(-1, 1), atol=2 ** (2 - bits) + 1e-7, rtol=0)


def test_wav_length_and_failures(tmp_path):
    path = tmp_path / "sound.wav"
    assert write_wav(path, tone(100), RATE, duration=0.5) == 24_000
    assert write_wav(path, tone(100_000, channels=1), RATE, duration=4.3) == 206_400
    before = path.read_bytes()
    with pytest.raises(NonFiniteError, match="audio VAE"):
        write_wav(path, nan_at(tone(9), 0, 0), RATE)
    with pytest.raises(ValueError, match="bits"):
        write_wav(path, tone(9), RATE, bits=20)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    buffer = io.BytesIO()
    write_wav(buffer, tone(100), RATE)
    assert buffer.getvalue()[:4] == b"RIFF"


def test_reading_sound(tmp_path):
    write_wav(tmp_path / "voice.wav", tone(16_000, 16_000, channels=1), 16_000)
    got, rate = read_audio(tmp_path / "voice.wav", max_seconds=0.25)
    assert (got.shape, rate) == ((1, 4000), 16_000)
    mux(tmp_path / "silent.mp4", moving(2))
    (tmp_path / "page.mp3").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"no sound in silent\.mp4"):
        read_audio(tmp_path / "silent.mp4")
    with pytest.raises(ValueError, match=r"Cannot read page\.mp3 as sound"):
        read_audio(tmp_path / "page.mp3")
    with pytest.raises(FileNotFoundError, match=r"no file .*voice\.ogg"):
        read_audio(tmp_path / "voice.ogg")


def test_reading_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = (moving(1, 40, 60)[0] * 255).round().to(torch.uint8)
    image.fromarray(pixels.numpy()).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png"), pixels.float() / 255)

    exif = image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.fromarray(pixels.numpy()).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "turned.png"), pixels.rot90(-1).float() / 255)

    deep = np.linspace(0, 65535, 40 * 60).astype(np.uint16).reshape(40, 60)
    image.fromarray(deep).save(tmp_path / "deep.png")
    expected = torch.from_numpy(deep / 65535).float()[..., None].expand(-1, -1, 3)
    torch.testing.assert_close(read_image(tmp_path / "deep.png"), expected)

    (tmp_path / "page.png").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"Cannot read page\.png as a picture"):
        read_image(tmp_path / "page.png")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.png"):
        read_image(tmp_path / "b.png")


def test_loudness():
    clips = torch.stack([2 * tone(100), 0.1 * tone(100)])
    assert apply_loudness(clips) is clips
    limited = apply_loudness(clips, "limit peak to -1 dBFS")
    assert limited[0].abs().max().item() == pytest.approx(PEAK_LIMIT)
    assert torch.equal(limited[1], clips[1])
    assert torch.equal(apply_loudness(torch.zeros(2, 10), "limit peak to -1 dBFS"), torch.zeros(2, 10))
    with pytest.raises(ValueError, match="Loudness"):
        apply_loudness(clips, "loud")


def test_check_finite():
    check_finite(torch.ones(3), "latents (sampler)")
    check_finite(torch.ones(3, dtype=torch.int64), "latents (sampler)")
    with pytest.raises(NonFiniteError, match=r"in the latents \(sampler\)"):
        check_finite(torch.tensor([1.0, float("inf")]), "latents (sampler)")


def test_equal_frames_give_equal_files(tmp_path):
    """Also at widths that are no multiple of 128, where x264 does not by itself."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 7, 8, 12, generator=generator)
    frames = torch.nn.functional.interpolate(coarse, size=(25, 64, 112), mode="trilinear")[0].permute(1, 2, 3, 0)
    frames = (frames + 0.1 * torch.rand(25, 64, 112, 3, generator=generator)).clamp(0, 1)
    files = set()
    for index in range(12):
        _junk = [torch.randint(0, 255, (50000 + 997 * index,)) for _ in range(10)]  # other memory each time
        mux(tmp_path / "clip.mp4", frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    assert len(files) == 1


def test_the_file_names_the_transfer_curve_and_takes_a_preset(tmp_path):
    frames = torch.rand(3, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    sizes = set()
    for transfer, number, preset in (("BT.709", 1, "medium"), ("sRGB", 13, "ultrafast")):
        mux(tmp_path / "clip.mp4", frames, transfer=transfer, preset=preset)
        sizes.add((tmp_path / "clip.mp4").stat().st_size)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            assert container.streams.video[0].codec_context.color_trc == number
    assert len(sizes) == 2
    with pytest.raises(ValueError, match=r"transfer curve is one of BT\.709, sRGB; got HDR"):
        mux(tmp_path / "never.mp4", frames, transfer="HDR")
