"""The whole job without a host: model files, a prompt, a picture and voices in, a clip out.

    files = find_model_files("models")
    pipeline = NavaPipeline.from_files(files)
    pipeline("A woman on a pier says: <S>The storm has passed.<E>", seconds=6).save("clip.mp4")

Components are read from their files one by one, when their turn comes. The same files, seed and settings give the
latents that the ComfyUI nodes give.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .checkpoint import (
    FileInfo,
    FileKind,
    WrongFileError,
    describe_file,
    estimate_memory,
    explain_wrong_file,
    load_backbone,
)
from .components import (
    audio_vae_part,
    check_packages,
    denormalize_video,
    holds,
    load_audio_vae,
    load_problem,
    load_text_encoder,
    load_tokenizer,
    load_video_vae,
    memory_bytes,
    normalize_video,
)
from .components.weights import need
from .geometry import (
    AUDIO_BINS,
    AUDIO_CHANNELS,
    FPS,
    VIDEO_CHANNELS,
    ClipGeometry,
    audio_latent_to_tokens,
    audio_tokens_to_latent,
    choose_bucket,
    cover_crop,
)
from .media import fit_length, mux, read_audio, read_image, write_wav
from .prompt import TokenizedPrompt, bind_voices, timbre_inputs
from .sampling import Guidance, Interrupted, denoise, flow_sigmas
from .timbre import check_voice, encode_timbre, load_redimnet

Voice = str | os.PathLike | torch.Tensor | tuple[torch.Tensor, int]

KINDS = {
    "backbone": (FileKind.NAVA_BACKBONE, FileKind.NAVA_BACKBONE_FP8),
    "text_encoder": (FileKind.UMT5, FileKind.UMT5_ORIGINAL),
    "video_vae": (FileKind.WAN22_VAE,),
    "audio_vae": (FileKind.LTX_AUDIO_VAE,),
    "speaker_encoder": (FileKind.REDIMNET,),
}
NAMES = {role: role.replace("_", " ").replace("vae", "VAE") for role in KINDS}
OPTIONAL = ("speaker_encoder",)
MODEL_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
TOKENIZER_FILES = ("spiece.model", "tokenizer.json")

BATCH_TOKENS = 8192  # up to here a GPU is faster with several predictions in one pass
VOICE_SECONDS = 600.0  # read of a recording; the encoder takes 30 s of it
WORKSPACE = 2**30  # bytes of GPU memory that a component is given beside what it is known to need


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class ModelFiles:
    """The files a pipeline is made of. ``speaker_encoder`` is for reference voices; ``tokenizer`` is the folder that a
    text encoder without a tokenizer inside came with."""

    backbone: Path
    text_encoder: Path
    video_vae: Path
    audio_vae: Path
    speaker_encoder: Path | None = None
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, Path(value))

    def check(self) -> None:
        """Raise FileNotFoundError or WrongFileError, in a sentence, for the first file that is not what it should be.

        Reads the files' headers only.
        """
        for role, kinds in KINDS.items():
            path = getattr(self, role)
            if path is None:
                continue
            info = describe_file(path)
            if not holds(info, kinds):
                raise WrongFileError(explain_wrong_file(info, kinds[0]))
            problem = load_problem(audio_vae_part(info) if role == "audio_vae" else info)
            if problem:
                raise WrongFileError(problem)
        if self.tokenizer is not None and not self.tokenizer.is_dir():
            raise FileNotFoundError(f"There is no tokenizer folder {self.tokenizer}: check the name.")


def find_model_files(folder: str | os.PathLike, **chosen: str | os.PathLike) -> ModelFiles:
    """The model files in a folder and the folders below it, recognised by what they hold, not by their names.

    ``chosen`` names files by their role (``text_encoder=...``), which are then not looked for. Raises FileNotFoundError
    where a folder or a needed file is not there, ValueError where several files could be meant.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give the one with the model files.")
    unknown = set(chosen) - {field.name for field in fields(ModelFiles)}
    if unknown:
        raise ValueError(f"There is no model file called {', '.join(sorted(unknown))}; roles are {', '.join(KINDS)}.")
    infos = [describe_file(path) for path in _model_paths(folder)]
    found = {role: chosen.get(role) or _only(role, infos, folder) for role in KINDS}
    tokenizer = chosen.get("tokenizer") or _find_tokenizer(Path(found["text_encoder"]), folder)
    return ModelFiles(**found, tokenizer=tokenizer)


def _model_paths(folder: Path) -> Iterator[Path]:
    """Files that could be models, each once, links followed."""
    seen_folders, seen_files = set(), set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen_folders:
            folders.clear()
            continue
        seen_folders.add(real)
        folders.sort()
        for name in sorted(names):
            path = Path(here, name)
            if not name.lower().endswith(MODEL_SUFFIXES) or not path.is_file():
                continue
            status = path.stat()
            if (status.st_dev, status.st_ino) not in seen_files:
                seen_files.add((status.st_dev, status.st_ino))
                yield path


def _only(role: str, infos: Sequence[FileInfo], folder: Path) -> Path | None:
    """The one file for a role; a file that is this kind goes before a larger one that holds it as a part."""
    kinds = KINDS[role]
    fitting = [i for i in infos if i.kind in kinds] or [i for i in infos if holds(i, kinds)]
    if len(fitting) == 1 or (not fitting and role in OPTIONAL):
        return fitting[0].path if fitting else None
    if fitting:
        raise _ambiguous([info.path for info in fitting], role, folder)
    broken = [info.summary.rstrip(".") for info in infos if not info.is_readable]
    also = f" ({'; '.join(broken[:2])})" if broken else ""
    raise FileNotFoundError(f"There is no {NAMES[role]} in {folder}{also}: download it there, or say where it is.")


def _ambiguous(paths: Sequence[Path], role: str, folder: Path) -> ValueError:
    names = ", ".join(str(path.relative_to(folder)) for path in paths)
    return ValueError(
        f"In {folder} are {len(paths)} that could be the {NAMES.get(role, role)}: {names}; say which one ({role})."
    )


def _find_tokenizer(text_encoder: Path, folder: Path) -> Path | None:
    """A tokenizer folder for a text encoder that has none inside; None where it has, or none is found."""
    info = describe_file(text_encoder)
    if "spiece_model" in info.model_tensors:
        return None
    found = sorted({path.parent for name in TOKENIZER_FILES for path in folder.rglob(name)})
    if len(found) > 1:
        raise _ambiguous(found, "tokenizer", folder)
    return found[0] if found else None


# ---------------------------------------------------------------- the clip


@dataclass(frozen=True)
class Clip:
    """A finished clip.

    ``frames`` (T, H, W, 3) fp32 in 0..1, 24 a second, None without picture; ``waveform`` (2, N) fp32 within -1..1, None
    without sound, and ``sample_rate`` 0 then; ``video_latent`` (1, 48, T', H / 16, W / 16) and ``audio_latent``
    (1, 8, L, 16) fp32 in the VAEs' own spaces; all on the CPU. ``report`` says how the prompt's tokens were used;
    ``warnings`` are sentences on what will have made the clip worse, or other than asked for.
    """

    frames: torch.Tensor | None
    waveform: torch.Tensor | None
    sample_rate: int
    video_latent: torch.Tensor | None
    audio_latent: torch.Tensor | None
    report: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        """What its file ends in: ".wav" for sound alone, else ".mp4"."""
        return ".wav" if self.frames is None else ".mp4"

    def save(self, path: str | os.PathLike, *, callback: Callable[[int, int | None], None] | None = None) -> Path:
        """Write MP4 (H.264, with AAC where there is sound), or for sound alone 24-bit WAV; whole or not at all.

        ``callback(frame, frames)`` follows the encoding of a picture, and ends it by raising. Returns the path. Raises
        ValueError for another suffix, FileNotFoundError for a folder that is not there, NonFiniteError, naming the
        stage, for NaN or infinity.
        """
        path = Path(path)
        if path.suffix.lower() != self.suffix:
            what = "sound alone" if self.frames is None else "a clip with a picture"
            raise ValueError(f"Cannot write {path.name}: {what} is written as {self.suffix}, so let the name end so.")
        if self.frames is None:
            write_wav(path, self.waveform, self.sample_rate, bits=24)
        else:
            rate = None if self.waveform is None else self.sample_rate
            mux(path, self.frames, self.waveform, rate, FPS, callback=callback)
        return path


# ---------------------------------------------------------------- the pipeline


class NavaPipeline:
    """NAVA from its files. Make one with :meth:`from_files` and call it for each clip."""

    def __init__(
        self,
        files: ModelFiles,
        device: torch.device,
        dtype: torch.dtype | None,
        say: Callable[[str], None],
        keep_loaded: bool,
    ) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.say = say
        self.keep_loaded = keep_loaded
        self._kept: dict[str, torch.nn.Module] = {}
        self._tokenizer = load_tokenizer(files.text_encoder, files.tokenizer)

    @classmethod
    def from_files(
        cls,
        files: ModelFiles,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        say: Callable[[str], None] | None = None,
        keep_loaded: bool = False,
    ) -> NavaPipeline:
        """A pipeline over ``files``, of which only the headers and the tokenizer are read yet.

        ``device``: where the models work, as :func:`choose_device` takes it. ``dtype``: what the
        backbone and the video VAE compute in; None for bfloat16 on a GPU (float8 weights stay float8), and on the CPU
        for the backbone's own type and a float32 VAE; float8_e4m3fn makes the backbone's weights float8. ``say`` is
        told in short sentences what is going on.

        Text encoder and VAEs are on the device only while they work, and the backbone stays on a GPU between clips as
        long as the others fit beside it. Otherwise a component is dropped after its work and read again for the next
        clip; ``keep_loaded`` keeps all of them in RAM instead, which suits a batch on a machine with much RAM.

        Raises, in a sentence, FileNotFoundError and WrongFileError for files that are not what they should be or a
        missing tokenizer, RuntimeError for a missing package, ValueError for a device that is not there.
        """
        device = choose_device(device)
        files.check()
        check_packages()
        return cls(files, device, dtype, say or _say_nothing, keep_loaded)

    def unload(self) -> None:
        """Give back all memory; the next clip loads its components again."""
        self._kept.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(
        self,
        prompt: str,
        *,
        seconds: float = 6.0,
        width: int = 1280,
        height: int = 704,
        mode: str = "video+audio",
        image: torch.Tensor | str | os.PathLike | None = None,
        size_from_image: bool = True,
        voices: Sequence[Voice] = (),
        assignment: Sequence[int | None] | None = None,
        negative: str = "",
        seed: int = 0,
        steps: int = 50,
        shift: float = 5.0,
        guidance: Guidance | None = None,
        callback: Callable[[int, int, torch.Tensor | None, torch.Tensor | None], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Clip:
        """Make one clip.

        ``prompt``: one dense paragraph with speech as ``<S>words<E>``; empty for the null the model was trained with,
        as is an empty ``negative``. ``seconds``, ``width``, ``height`` and ``mode`` as :class:`ClipGeometry` takes
        them. ``image``, (H, W, 3) in 0..1 or a file, becomes the first frame: scaled to cover the clip and
        centre-cropped, the clip taking the trained size nearest to its proportions unless ``size_from_image`` is off.
        ``voices``: recordings (a file, or waveform and sample rate) or (1, 192) embeddings, bound to the spans by
        order, or as ``assignment`` says, with a voice's number or None for each span. ``guidance`` None: the makers'
        scales, which are lower for picture text and timbre where there are both an image and a voice.

        After each step ``callback(step, steps, x0_video, x0_audio)`` is called, step from 1, with the estimates in the
        network's space; ``should_stop`` is asked before each stage and each pass.

        Raises ValueError, in a sentence, for inputs that do not fit together, before anything large is loaded;
        Interrupted when ``should_stop`` says so; FloatingPointError where the network returns NaN or infinity.
        """
        stop = should_stop or _never
        picture = None if image is None else _read_picture(image)
        geometry = clip_geometry(seconds, width, height, mode, picture, size_from_image)
        sigmas = flow_sigmas(steps, shift)
        tokens, report = self._tokenize(prompt, voices, assignment)
        negative_tokens = self._tokenizer(negative) if negative.strip() else None
        warnings = [*geometry.warnings, *([report] if tokens is not None and tokens.is_cut else [])]

        _check_stop(stop)
        timbres = self._encode_voices(voices, warnings)
        timbre, positions = (None, None) if tokens is None else timbre_inputs(tokens, timbres, assignment)
        if guidance is None:
            guidance = default_guidance(picture is not None, timbre is not None)
        for warning in warnings:
            self.say(warning)
        _check_stop(stop)
        context, null = self._encode_text([tokens, negative_tokens])
        _check_stop(stop)
        first_frame = None if picture is None else self._encode_picture(fit_picture(picture, geometry))
        _check_stop(stop)
        video, audio = self._denoise(
            geometry,
            seed,
            first_frame,
            context=context,
            negative=null,
            timbre=timbre,
            timbre_positions=positions,
            sigmas=sigmas,
            guidance=guidance,
            callback=callback,
            should_stop=should_stop,
        )
        _check_stop(stop)
        frames = None if video is None else self._decode_video(video)
        _check_stop(stop)
        waveform, rate = (None, 0) if audio is None else self._decode_audio(audio, geometry.duration)
        return Clip(frames, waveform, rate, video, audio, report, tuple(warnings))

    # ------------------------------------------------------------ stages

    def _tokenize(
        self, prompt: str, voices: Sequence[Voice], assignment: Sequence[int | None] | None
    ) -> tuple[TokenizedPrompt | None, str]:
        """The prompt's tokens, None for an empty one, and the report; voices are checked against the spans."""
        if voices and self.files.speaker_encoder is None and not all(_is_embedding(voice) for voice in voices):
            raise ValueError(
                "A reference voice needs the speaker encoder: give M-vb2+vox2+cnc-ft_mix.pt as speaker_encoder."
            )
        if not prompt.strip():
            if voices:
                raise ValueError(
                    "Voices were given but the prompt is empty: write the words to be said as <S>words<E>."
                )
            return None, "Empty: the null the model was trained with."
        tokens = self._tokenizer(prompt)
        return tokens, tokens.report(bind_voices(tokens.spans, voices, assignment))

    def _encode_voices(self, voices: Sequence[Voice], warnings: list[str]) -> list[torch.Tensor]:
        """(1, 192) for each voice; what weakens one is added to ``warnings``. Small, so it runs on the CPU."""
        if not voices or all(_is_embedding(voice) for voice in voices):
            return list(voices)
        encoder = load_redimnet(self.files.speaker_encoder)
        timbres = []
        for number, voice in enumerate(voices, start=1):
            if _is_embedding(voice):
                timbres.append(voice)
                continue
            waveform, rate = voice if isinstance(voice, tuple) else read_audio(voice, VOICE_SECONDS)
            timbres.append(encode_timbre(encoder, waveform, rate))
            warnings += [f"Voice {number}: {sentence}" for sentence in check_voice(waveform, rate)]
        return timbres

    def _encode_text(self, prompts: Sequence[TokenizedPrompt | None]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Context (1, n, d) of the prompt and of the negative; None stands for the all-zero context."""
        if all(tokens is None for tokens in prompts):
            return torch.zeros(1, 1, self._text_width()), None
        with self._loaded("text_encoder") as encoder:
            self.say("Encoding the prompt.")
            context, negative = (None if tokens is None else encoder.encode(tokens.ids) for tokens in prompts)
        return torch.zeros_like(negative[:, :1]) if context is None else context, negative

    def _text_width(self) -> int:
        return describe_file(self.files.backbone).model_tensors["text_embedding.0.weight"].shape[1]

    def _encode_picture(self, picture: torch.Tensor) -> torch.Tensor:
        with self._loaded("video_vae") as vae:
            self.say("Encoding the first frame.")
            return vae.encode(picture)

    def _denoise(self, geometry: ClipGeometry, seed: int, first_frame: torch.Tensor | None, **settings):
        """(video latent, audio latent) in the VAEs' spaces on the CPU, None for an absent one."""
        given = {} if first_frame is None else _given_frame(geometry, first_frame, self.device)
        noise = [None if part is None else part.to(self.device) for part in clip_noise(geometry, seed)]
        with self._loaded("backbone") as backbone:
            self.say(f"Denoising {geometry.tokens:,} tokens in {len(settings['sigmas']) - 1} steps.")
            for name in ("context", "negative", "timbre", "timbre_positions"):
                tensor = settings[name]
                if tensor is not None:
                    dtype = tensor.dtype if name == "timbre_positions" else backbone.dtype
                    settings[name] = tensor.to(self.device, dtype)
            video, tokens = denoise(
                backbone,
                noise[0],
                None if noise[1] is None else audio_latent_to_tokens(noise[1]),
                batch_predictions=self.device.type != "cpu" and geometry.tokens <= BATCH_TOKENS,
                **given,
                **settings,
            )
        if video is not None:
            video = denormalize_video(video).cpu()
            if first_frame is not None:
                video[:, :, :1] = first_frame  # exactly, not up to the rounding of there and back
        return video, None if tokens is None else audio_tokens_to_latent(tokens).cpu()

    def _decode_video(self, latent: torch.Tensor) -> torch.Tensor:
        with self._loaded("video_vae") as vae:
            self.say("Decoding the picture.")
            fits = self._make_room(vae.decode_bytes(latent.shape))
            return vae.decode(latent, tiled=not fits)

    def _decode_audio(self, latent: torch.Tensor, duration: float) -> tuple[torch.Tensor, int]:
        """Waveform (2, N), as long as the clip, and its sample rate."""
        with self._loaded("audio_vae") as vae:
            self.say("Decoding the sound.")
            self._make_room(vae.decode_bytes(latent.shape))
            return fit_length(vae.decode(latent)[0], round(duration * vae.sample_rate)), vae.sample_rate

    # ------------------------------------------------------------ who is in memory

    @contextmanager
    def _loaded(self, role: str) -> Iterator[torch.nn.Module]:
        """A component on the device for the time of the block."""
        component = self._kept.pop(role, None)
        if component is None:
            path = getattr(self.files, role)
            self.say(f"Loading the {NAMES[role]}, {path.name}.")
            self._make_room(self._weight_bytes(role) + WORKSPACE)
            component = self._load(role, path)
        else:
            self._make_room(sum(p.nbytes for p in component.parameters()) + WORKSPACE)
            component = component.to(self.device)
        try:
            yield component
        finally:
            if role == "backbone" and self.device.type != "cpu":
                self._kept[role] = component
            elif self.keep_loaded:
                self._kept[role] = component.to("cpu")
            del component

    def _load(self, role: str, path: Path) -> torch.nn.Module:
        if role == "text_encoder":
            return load_text_encoder(path, device=self.device)
        if role == "video_vae":
            return load_video_vae(path, device=self.device, dtype=self._vae_dtype)
        if role == "audio_vae":
            return load_audio_vae(path, device=self.device)
        return load_backbone(path, device=self.device, dtype=self._backbone_dtype)

    @property
    def _vae_dtype(self) -> torch.dtype:
        if self.dtype is not None and self.dtype.itemsize > 1:
            return self.dtype
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def _backbone_dtype(self) -> torch.dtype | None:
        as_it_is = self.device.type == "cpu" or describe_file(self.files.backbone).kind is FileKind.NAVA_BACKBONE_FP8
        return self.dtype or (None if as_it_is else torch.bfloat16)

    def _weight_bytes(self, role: str) -> int:
        info = describe_file(getattr(self.files, role))
        if role == "audio_vae":
            return memory_bytes(audio_vae_part(info))
        return estimate_memory(info, {"backbone": self._backbone_dtype, "video_vae": self._vae_dtype}.get(role))

    def _make_room(self, needed: int) -> bool:
        """Whether ``needed`` bytes are free on a GPU, once the backbone has left it if need be; True on the CPU."""
        if self.device.type != "cuda" or _free_bytes(self.device) >= needed:
            return True
        backbone = self._kept.pop("backbone", None)
        if backbone is not None and self.keep_loaded:
            self._kept["backbone"] = backbone.to("cpu")
        del backbone
        return _free_bytes(self.device) >= needed


# ---------------------------------------------------------------- parts


def choose_device(name: torch.device | str | None = None) -> torch.device:
    """Where the models work: "cpu", "cuda", "cuda:1", "mps" or "xpu"; None for a GPU of CUDA, or else the CPU.

    Raises ValueError, in a sentence, for a device that is not there, or that the models do not run on.
    """
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count() if hasattr(torch, "xpu") and torch.xpu.is_available() else 0,
    }
    if name is None:
        return torch.device("cuda" if counts["cuda"] else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        there = [f"{kind}:0 to {kind}:{count - 1}" if count > 1 else kind for kind, count in counts.items() if count]
        raise ValueError(
            f"There is no device {name} here that the models could work on: use {' or '.join(there)}, or a torch build "
            "that knows your GPU."
        )
    return device


def default_guidance(has_image: bool, has_voice: bool) -> Guidance:
    """The makers' guidance scales: with an image and a voice, 2 for the picture's text and for timbre instead of 3."""
    return Guidance(video_text=2.0, audio_timbre=2.0) if has_image and has_voice else Guidance()


def clip_geometry(
    seconds: float, width: int, height: int, mode: str, picture: torch.Tensor | None, size_from_image: bool
) -> ClipGeometry:
    """The clip's geometry, for a first frame (H, W, 3) in the bucket nearest to its proportions if so wished.

    Raises ValueError as :class:`ClipGeometry` does, and for a first frame of a clip without picture.
    """
    if picture is None:
        return ClipGeometry(seconds, width, height, mode)
    if mode == "audio":
        raise ValueError("A first frame was given for a clip of sound alone: leave it out, or choose another mode.")
    if size_from_image:
        width, height = choose_bucket(picture.shape[1], picture.shape[0])
    return ClipGeometry(seconds, width, height, mode)


def clip_noise(geometry: ClipGeometry, seed: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Noise of a clip's (video (1, 48, T, H, W), audio (1, 8, L, 16)) latents, fp32 on the CPU, None for an absent one.

    Both come from one generator, video first, as ComfyUI draws them for a clip's nested latent; there an absent picture
    is one value a channel, and draws its noise too.
    """
    generator = torch.Generator().manual_seed(seed)
    video = torch.randn(1, *(geometry.latent_shape or (VIDEO_CHANNELS, 1, 1, 1)), generator=generator)
    audio = torch.randn(1, *(geometry.audio_shape or (AUDIO_CHANNELS, 1, AUDIO_BINS)), generator=generator)
    return video if geometry.has_video else None, audio if geometry.has_audio else None


def fit_picture(picture: torch.Tensor, geometry: ClipGeometry) -> torch.Tensor:
    """A picture (H, W, 3) in 0..1 -> (1, height, width, 3): scaled to cover the clip's size (Lanczos), then cropped."""
    image = need("PIL.Image", "A first frame")
    numpy = need("numpy", "A first frame")
    scaled, box = cover_crop(picture.shape[1], picture.shape[0], geometry.width, geometry.height)
    levels = (picture.float() * 255).clamp(0, 255).to(torch.uint8).cpu().numpy()
    fitted = image.fromarray(levels).resize(scaled, image.Resampling.LANCZOS).crop(box)
    return torch.from_numpy(numpy.asarray(fitted).astype("float32") / 255)[None]


def _given_frame(geometry: ClipGeometry, frame: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """The network's starting latent with ``frame`` (1, 48, 1, H, W) of the VAE as frame 0, and the mask that keeps it.

    The frames to come are zeros of the VAE's space, as in ComfyUI.
    """
    latent = torch.zeros(1, *geometry.latent_shape)
    latent[:, :, :1] = frame
    mask = torch.ones(1, 1, *geometry.latent_shape[1:])
    mask[:, :, 0] = 0
    return {"video_latent": normalize_video(latent).to(device), "video_mask": mask.to(device)}


def _read_picture(image: torch.Tensor | str | os.PathLike) -> torch.Tensor:
    """(H, W, 3) fp32 in 0..1 from a file or a tensor."""
    if not torch.is_tensor(image):
        return read_image(image)
    picture = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if picture.ndim != 3 or picture.shape[-1] not in (3, 4) or not picture.is_floating_point():
        raise ValueError(
            f"A first frame is (height, width, 3) floats in 0..1; got {tuple(image.shape)} of {image.dtype}."
        )
    return picture[..., :3].float()


def _is_embedding(voice: Voice) -> bool:
    return torch.is_tensor(voice)


def _free_bytes(device: torch.device) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def _check_stop(should_stop: Callable[[], bool]) -> None:
    if should_stop():
        raise Interrupted("The run was interrupted.")


def _never() -> bool:
    return False


def _say_nothing(_: str) -> None:
    pass
