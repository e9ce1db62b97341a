"""What kind of ReDimNet a published file holds: the sizes and choices of its `model_config`, checked before use."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

SAMPLE_RATE = 16000
EMBEDDING_SIZE = 192
ATTENTION_HEADS = 4

TIME_BLOCKS = ("att", "conv+att", "conv", "fc")
MAP_BLOCKS = ("convnext_like", "convnext_like_relu", "basic_resnet", "basic_resnet_fwse")
POOLINGS = ("ASTP", "TSTP", "TAP", "TMAP", "TSDP", "MHASTP", "MQMHASTP")
POOLING_HEADS = {"MHASTP": 2, "MQMHASTP": 8}
FRONT_ENDS = {"pt": "mel", "pt_mel": "mel", "tf": "tf_mel", "tf_mel": "tf_mel", "tf_spec": "tf_spectrogram"}
NORMS = ("mn", "mvn", "bn")
WINDOWS = ("hamming", "hann", "hanning", "sqrt_hann")

# Settings that say nothing about the network that an embedding is computed with: they matter in training, or choose
# what is returned beside it. `num_classes` only adds a head after the embedding.
_WITHOUT_EFFECT = {"num_classes", "class_dropout", "feat_agg_dropout", "head_activation", "return_all_outputs"}
_SPEC_WITHOUT_EFFECT = {
    "do_spec_aug",
    "freq_mask_width",
    "time_mask_width",
    "freq_start_bin",
    "num_apply_spec_aug",
}
# Settings of which there is one value that such a network can have.
_FIXED = {"tf_optimized_arch": False, "return_2d_output": False, "is_subnet": False, "offset_fm_weights": 0}


@dataclass(frozen=True)
class Stage:
    """One stage: bands are merged by `stride` while channels grow by it, then `blocks` convolution blocks of
    `expansion` times as many channels, then frames see each other at 1 / `reduction` of the width (None: they do not).
    """

    stride: int
    blocks: int
    expansion: float
    reduction: int | None


@dataclass(frozen=True)
class FrontEndConfig:
    """How a waveform becomes features. The fields carry the names of `spec_params`; lengths in samples, f_* in Hz.

    kind: "mel" (torchaudio's spectrogram), "tf_mel" or "tf_spectrogram" (a spectrogram as TensorFlow code had it).
    spec_norm: what is taken off every band: its mean ("mn"), mean and deviation ("mvn"), or learned ("bn").
    pool_freqs: (bands, frames) that are averaged, of "tf_spectrogram" only.
    """

    kind: str = "mel"
    hop_length: int = 160
    n_fft: int = 512
    win_length: int = 400
    f_min: float = 20.0
    f_max: float = 7600.0
    norm_signal: bool = False
    do_preemph: bool = True
    spec_norm: str = "mn"
    window: str = "hamming"
    pool_freqs: tuple[int, int] | None = (2, 1)
    eps: float = 1e-8

    def __post_init__(self):
        if self.win_length > self.n_fft:
            raise ValueError(f"model_config has win_length = {self.win_length}, longer than n_fft = {self.n_fft}.")
        if self.f_min >= self.f_max:
            raise ValueError(f"model_config has f_min = {self.f_min}, not below f_max = {self.f_max}.")


@dataclass(frozen=True)
class ReDimNetConfig:
    """Sizes and kinds; the defaults are those of the published code, which a `model_config` may leave out."""

    bands: int = 72
    channels: int = 16
    stages: tuple[Stage, ...] = (
        Stage(1, 2, 1, 12),
        Stage(2, 2, 1, 12),
        Stage(1, 3, 1, 12),
        Stage(2, 4, 1, 8),
        Stage(1, 4, 1, 8),
        Stage(2, 4, 1, 4),
    )
    time_block: str = "att"
    map_block: str = "convnext_like"
    group_divisor: int | None = 4  # channels in one group of the 3 x 3 convolutions; None: they are not grouped
    out_channels: int | None = None  # features per frame that are pooled; None: `width`
    pooling: str = "ASTP"
    global_context: bool = False  # of the pooling's attention
    embedding_norm: bool = False
    front_end: FrontEndConfig = field(default_factory=FrontEndConfig)

    def __post_init__(self):
        if not 1 <= len(self.stages) <= 16:
            raise ValueError(f"model_config has {len(self.stages)} stages; ReDimNet has 1 to 16.")
        channels, bands = self.channels, self.bands
        for stage in self.stages:
            if bands % stage.stride:
                raise ValueError(f"model_config merges {bands} bands by {stage.stride}, which does not divide.")
            channels, bands = channels * stage.stride, bands // stage.stride
            self._check_groups(channels, int(channels * stage.expansion), stage.expansion != 1)
            self._check_reduction(stage.reduction)
        heads = POOLING_HEADS.get(self.pooling, 1)
        if self.pooled % heads:
            raise ValueError(f"model_config pools {self.pooled} features with {heads} heads, which does not divide.")
        self._check_spectrogram()

    def _check_groups(self, channels: int, widened: int, narrows: bool):
        ways = [(widened, widened)] + ([(channels, widened), (channels, channels)] if narrows else [])
        for grouped, divided in ways:
            groups = group_count(grouped, self.group_divisor)
            if not groups or divided % groups:
                raise ValueError(
                    f"model_config has group_divisor = {self.group_divisor}, which does not divide {divided} channels."
                )

    def _check_reduction(self, reduction: int | None):
        heads = ATTENTION_HEADS if self.time_block.endswith("att") else 1
        if reduction is not None and (not self.width // reduction or self.width // reduction % heads):
            raise ValueError(
                f"model_config reduces {self.width} features by {reduction}, which leaves no multiple of "
                f"{heads} attention heads."
            )

    def _check_spectrogram(self):
        front_end = self.front_end
        if front_end.kind != "tf_spectrogram":
            return
        bands = front_end.n_fft // 2 // (front_end.pool_freqs or (1, 1))[0]
        if bands != self.bands:
            raise ValueError(f"model_config has F = {self.bands}, but its spectrogram has {bands} bands.")

    @property
    def width(self) -> int:
        """Features per frame between stages."""
        return self.bands * self.channels

    @property
    def pooled(self) -> int:
        """Features per frame that are pooled."""
        return self.out_channels or self.width

    @classmethod
    def from_published(cls, settings: Mapping) -> "ReDimNetConfig":
        """From a checkpoint's `model_config`. ValueError in a sentence that names the setting, for one that is not
        known, is out of range, or does not fit the others."""
        settings = dict(settings)
        _check_fixed(settings)
        time_block = _one_of(settings, "block_1d_type", "att", TIME_BLOCKS)
        _one_of(settings, "embed_dim", EMBEDDING_SIZE, (EMBEDDING_SIZE,))
        config = {
            "bands": _whole(settings, "F", cls.bands, 1024),
            "channels": _whole(settings, "C", cls.channels, 4096),
            "time_block": time_block,
            "map_block": _one_of(settings, "block_2d_type", "convnext_like", MAP_BLOCKS),
            "group_divisor": _whole(settings, "group_divisor", cls.group_divisor, 4096, optional=True),
            "out_channels": _whole(settings, "out_channels", None, 65536, optional=True),
            "pooling": _one_of(settings, "pooling_func", "ASTP", POOLINGS),
            "global_context": _one_of(settings, "global_context_att", False, (False, True)),
            "embedding_norm": _one_of(settings, "emb_bn", False, (False, True)),
            "front_end": _front_end(settings),
        }
        if "stages_setup" in settings:
            stages = _sequence("stages_setup", settings.pop("stages_setup"))
            config["stages"] = tuple(_stage(entry) for entry in stages)
        _check_known(settings, _WITHOUT_EFFECT, "model_config")
        return cls(**config)


def group_count(channels: int, divisor: int | None) -> int:
    """Groups of a convolution over `channels`."""
    return 1 if divisor is None else channels // divisor


def _front_end(settings: dict) -> FrontEndConfig:
    kind = FRONT_ENDS[_one_of(settings, "feat_type", "pt", tuple(FRONT_ENDS))]
    hop = _whole(settings, "hop_length", 160, 4096)
    spec = settings.pop("spec_params", None)
    if spec is not None and not isinstance(spec, Mapping):
        raise ValueError(f"model_config has spec_params = {_shown(spec)}; a table of settings was expected.")
    spec = dict(spec or {})
    chosen = {
        "kind": kind,
        "n_fft": _whole(spec, "n_fft", 512, 4096),
        "win_length": _whole(spec, "win_length", 400, 4096),
        "norm_signal": _one_of(spec, "norm_signal", False, (False, True)),
        "do_preemph": _one_of(spec, "do_preemph", True, (False, True)),
    }
    if kind == "tf_spectrogram":
        chosen["window"] = _one_of(spec, "window", "hamming", WINDOWS)
        chosen["pool_freqs"] = _pool(spec.pop("pool_freqs", (2, 1)))
        hop = _whole(spec, "hop_length", 160, 4096)
        for name, only in (("mode", "fft"), ("fft_mode", "abs")):
            _one_of(spec, name, only, (only,))
        for name in ("normalize_signal", "normalize_spectrogram"):
            _one_of(spec, name, False, (False,))
    else:
        chosen["f_min"] = _number(spec, "f_min", 20.0, 0, SAMPLE_RATE / 2)
        chosen["f_max"] = _number(spec, "f_max", 7600.0, 0, SAMPLE_RATE / 2)
    if kind == "mel":
        chosen["spec_norm"] = _one_of(spec, "spec_norm", "mn", NORMS)
    else:
        chosen["eps"] = _number(spec, "eps", 1e-8, 1e-30, 1e-2)
    _one_of(spec, "sample_rate", SAMPLE_RATE, (SAMPLE_RATE,))
    unused = {"f_min", "f_max", "n_mels"} if kind == "tf_spectrogram" else set()
    _check_known(spec, _SPEC_WITHOUT_EFFECT | unused, "model_config's spec_params")
    return FrontEndConfig(hop_length=hop, **chosen)


def _stage(entry) -> Stage:
    """(stride, blocks, channel expansion, kernel sizes, reduction) of `stages_setup`; the convolution blocks are
    3 x 3 whatever the fourth entry says."""
    entry = _sequence("a stage", entry)
    if len(entry) != 5:
        raise ValueError(f"model_config has the stage {_shown(entry)}; five values were expected.")
    names = ("stride", "number of blocks", "channel expansion", "kernel sizes", "reduction")
    values = dict(zip(names, entry, strict=True))
    return Stage(
        _whole(values, "stride", 1, 16),
        _whole(values, "number of blocks", 1, 64),
        _number(values, "channel expansion", 1, 1 / 64, 64),
        _whole(values, "reduction", None, 4096, optional=True),
    )


def _pool(value) -> tuple[int, int] | None:
    if value is None:
        return None
    bands, frames = (*_sequence("pool_freqs", value), None, None)[:2]
    sizes = {"pool_freqs": bands}, {"pool_freqs": frames}
    return tuple(_whole(size, "pool_freqs", 1, 64) for size in sizes)


def _check_fixed(settings: dict):
    for name, only in _FIXED.items():
        _one_of(settings, name, only, (only,))


def _check_known(settings: Mapping, ignored: set[str], where: str):
    for name in settings:
        if name not in ignored:
            raise ValueError(f"{where} has the setting {_shown(name)}, which is not one of ReDimNet's.")


def _one_of(settings: dict, name: str, default, choices: tuple):
    value = settings.pop(name, default)
    for choice in choices:
        if isinstance(value, (str, numbers.Real)) and value == choice:
            return choice
    known = " or ".join(repr(choice) for choice in choices)
    raise ValueError(f"model_config has {name} = {_shown(value)}; known is {known}.")


def _whole(settings: dict, name: str, default: int | None, limit: int, *, optional: bool = False) -> int | None:
    value = settings.pop(name, default)
    if value is None and optional:
        return None
    if _is_number(value) and value == int(value) and 1 <= value <= limit:
        return int(value)
    raise ValueError(f"model_config has {name} = {_shown(value)}; a whole number from 1 to {limit} was expected.")


def _number(settings: dict, name: str, default: float, lowest: float, highest: float) -> float:
    value = settings.pop(name, default)
    if _is_number(value) and lowest <= value <= highest:
        return value
    allowed = f"a number from {lowest:g} to {highest:g}"
    raise ValueError(f"model_config has {name} = {_shown(value)}; {allowed} was expected.")


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _sequence(name: str, value) -> Sequence:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return value
    raise ValueError(f"model_config has {name} = {_shown(value)}; a list was expected.")


def _shown(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
