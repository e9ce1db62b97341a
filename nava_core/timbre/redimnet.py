"""ReDimNet, the speaker encoder whose embedding is NAVA's timbre, and the safe reading of its published file.

The network follows "Reshape Dimensions Network for Speaker Recognition" (arXiv 2407.18223): features travel as
(batch, channels * bands, frames); every stage folds a learned mix of all earlier outputs into a 2-D map, refines it
with convolutions, unfolds it and lets frames attend to each other. Parameter names are the published checkpoint's.
"""

import json
import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from .mel import FFT_SIZE, HIGHEST_HZ, LOWEST_HZ, SAMPLE_RATE, WINDOW_SIZE, MelFrontEnd

EMBEDDING_SIZE = 192
ATTENTION_HEADS = 4
POSITION_KERNEL = 59
POOLING_BOTTLENECK = 128
NORM_EPS = 1e-6
MAX_FILE_BYTES = 512 << 20  # the M model has about 20 MB; a video model picked by mistake is never unpacked

# What a published `model_config` can say besides sizes. The first table has one value that this network computes;
# the second only matters in training.
_FIXED_SETTINGS = {
    "block_1d_type": ("att",),
    "block_2d_type": ("convnext_like",),
    "out_channels": (None,),
    "embed_dim": (EMBEDDING_SIZE,),
    "pooling_func": ("ASTP",),
    "feat_type": ("pt", "pt_mel"),
    "global_context_att": (False,),
    "emb_bn": (False,),
    "tf_optimized_arch": (False,),
    "return_all_outputs": (False,),
}
_FIXED_SPEC_SETTINGS = {
    "sample_rate": (SAMPLE_RATE,),
    "n_fft": (FFT_SIZE,),
    "win_length": (WINDOW_SIZE,),
    "f_min": (LOWEST_HZ,),
    "f_max": (HIGHEST_HZ,),
    "norm_signal": (False,),
    "do_preemph": (True,),
    "spec_norm": ("mn",),
}
_TRAINING_SETTINGS = {"num_classes", "class_dropout", "feat_agg_dropout", "head_activation"}
_TRAINING_SPEC_SETTINGS = {
    "do_spec_aug",
    "freq_mask_width",
    "time_mask_width",
    "freq_start_bin",
    "num_apply_spec_aug",
}


@dataclass(frozen=True)
class Stage:
    """One stage: bands are merged by `stride` while channels grow by it, then `blocks` convolution blocks, then
    frames attend to each other at 1 / `reduction` of the width (None: they do not)."""

    stride: int
    blocks: int
    reduction: int | None


@dataclass(frozen=True)
class ReDimNetConfig:
    """Sizes of the network; the defaults are the "M" model's."""

    bands: int = 72
    channels: int = 16
    stages: tuple[Stage, ...] = (
        Stage(1, 2, 12),
        Stage(2, 2, 12),
        Stage(1, 3, 12),
        Stage(2, 4, 8),
        Stage(1, 4, 8),
        Stage(2, 4, 4),
    )
    group_divisor: int = 4  # channels in one group of the 3 x 3 convolutions
    hop_length: int = 160

    def __post_init__(self):
        for name in ("bands", "channels", "group_divisor", "hop_length"):
            _check_count(name, getattr(self, name), 4096)
        if not 1 <= len(self.stages) <= 16:
            raise ValueError(f"model_config has {len(self.stages)} stages; ReDimNet has 1 to 16.")
        channels, bands = self.channels, self.bands
        for stage in self.stages:
            _check_count("stride", stage.stride, 16)
            _check_count("number of blocks", stage.blocks, 64)
            if bands % stage.stride:
                raise ValueError(f"model_config merges {bands} bands by {stage.stride}, which does not divide.")
            channels, bands = channels * stage.stride, bands // stage.stride
            if channels % self.group_divisor:
                raise ValueError(
                    f"model_config groups {channels} channels by {self.group_divisor}, which does not divide."
                )
            self._check_reduction(stage.reduction)

    def _check_reduction(self, reduction: int | None):
        if reduction is None:
            return
        _check_count("attention reduction", reduction, 4096)
        if not self.width // reduction or self.width // reduction % ATTENTION_HEADS:
            raise ValueError(
                f"model_config reduces {self.width} features by {reduction}, which leaves no multiple of "
                f"{ATTENTION_HEADS} attention heads."
            )

    @property
    def width(self) -> int:
        """Features per frame between stages."""
        return self.bands * self.channels

    @classmethod
    def from_published(cls, settings: Mapping) -> "ReDimNetConfig":
        """From a checkpoint's `model_config`; what it leaves out is the "M" model's. ValueError for a ReDimNet of
        another kind than the "pt" mel, attention and ConvNeXt-like one."""
        settings = dict(settings)
        spec = settings.pop("spec_params", None) or {}
        sizes = {
            ours: settings.pop(published)
            for ours, published in (
                ("bands", "F"),
                ("channels", "C"),
                ("group_divisor", "group_divisor"),
                ("hop_length", "hop_length"),
            )
            if published in settings
        }
        if "stages_setup" in settings:
            sizes["stages"] = tuple(_published_stage(entry) for entry in settings.pop("stages_setup"))
        _check_settings(settings, _FIXED_SETTINGS, _TRAINING_SETTINGS)
        _check_settings(spec, _FIXED_SPEC_SETTINGS, _TRAINING_SPEC_SETTINGS)
        return cls(**sizes)


def _check_count(name: str, value, limit: int):
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
        raise ValueError(f"model_config gives {value!r} for the {name}; a whole number from 1 to {limit} was expected.")


def _check_settings(settings: Mapping, fixed: Mapping, ignored: set[str]):
    for name, value in settings.items():
        if name in ignored:
            continue
        if name not in fixed:
            raise ValueError(f"model_config has the setting {name!r}, which is not one of a ReDimNet checkpoint's.")
        if value not in fixed[name]:
            raise ValueError(
                f"model_config has {name} = {value!r}, but NAVA's speaker encoder has {fixed[name][0]!r}; "
                "use the published file M-vb2+vox2+cnc-ft_mix.pt."
            )


def _published_stage(entry: Sequence) -> Stage:
    """(stride, blocks, channel expansion, kernel sizes, reduction) of `stages_setup`; the convolution blocks are
    3 x 3 whatever the fourth entry says."""
    if not isinstance(entry, Sequence) or len(entry) != 5:
        raise ValueError(f"model_config has the stage {entry!r}; five values were expected.")
    stride, blocks, expansion, _, reduction = entry
    if expansion != 1:
        raise ValueError(f"model_config widens a stage by {expansion!r}; NAVA's speaker encoder does not (1).")
    return Stage(stride, blocks, reduction)


class ReDimNet(nn.Module):
    """(B, samples) at 16 kHz, float32, at least one second -> speaker embeddings (B, 192)."""

    def __init__(self, config: ReDimNetConfig, *, use_torchaudio: bool | None = None):
        super().__init__()
        self.config = config
        with torch.device("cpu"):  # constants, real even where the rest is laid out on the meta device
            self.spec = MelFrontEnd(config.bands, config.hop_length, use_torchaudio=use_torchaudio)
        self.backbone = Backbone(config)
        self.pool = AttentiveStatistics(config.width)
        self.bn = nn.BatchNorm1d(2 * config.width)
        self.linear = nn.Linear(2 * config.width, EMBEDDING_SIZE)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        frames = self.backbone(self.spec(waveform).unsqueeze(1))
        return self.linear(self.bn(self.pool(frames)))


class Backbone(nn.Module):
    """Log mel map (B, 1, bands, frames) -> frame features (B, width, frames)."""

    def __init__(self, config: ReDimNetConfig):
        super().__init__()
        channels, bands, width = config.channels, config.bands, config.width
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), ChannelNorm(channels), Unfold2d())
        self.stage_names = []
        for index, stage in enumerate(config.stages):
            layers = [
                FeatureMix(index + 1, width if index else 1),
                Fold2d(channels, bands),
                nn.Conv2d(channels, channels * stage.stride, (stage.stride, 1), stride=(stage.stride, 1)),
            ]
            channels, bands = channels * stage.stride, bands // stage.stride
            layers += [ConvBlock(channels, channels // config.group_divisor) for _ in range(stage.blocks)]
            layers.append(Unfold2d())
            if stage.reduction is not None:
                layers.append(TimeContext(width, width // stage.reduction))
            self.stage_names.append(f"stage{index}")
            self.add_module(self.stage_names[-1], nn.Sequential(*layers))
        self.fin_wght1d = FeatureMix(len(config.stages) + 1, width)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        outputs = [self.stem(mel)]
        for name in self.stage_names:
            outputs.append(self.get_submodule(name)(outputs))
        return self.fin_wght1d(outputs)


class FeatureMix(nn.Module):
    """Convex combination of `count` feature sequences (B, width, frames), weighted per feature."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, count, width, 1))

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        weights = self.w.softmax(dim=1)
        return sum(weights[:, i] * feature for i, feature in enumerate(features))


class Fold2d(nn.Module):
    """(B, bands * channels, frames) -> (B, channels, bands, frames); bands are the slow index."""

    def __init__(self, channels: int, bands: int):
        super().__init__()
        self.channels, self.bands = channels, bands

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (self.bands, self.channels)).transpose(1, 2)


class Unfold2d(nn.Module):
    """The inverse: (B, channels, bands, frames) -> (B, bands * channels, frames)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).flatten(1, 2)


class ChannelNorm(nn.Module):
    """LayerNorm over dimension 1 of (B, channels, ...)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, NORM_EPS)
        return normed.movedim(-1, 1)


class ConvBlock(nn.Module):
    """Residual grouped 3 x 3 convolution, batch norm, GELU and a pointwise convolution on (B, C, bands, frames)."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.conv_block = nn.ModuleDict(
            {
                "dwconvs": nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1, groups=groups)]),
                "norm": nn.BatchNorm2d(channels),
                "pwconv1": nn.Conv2d(channels, channels, 1),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block = self.conv_block
        return x + block["pwconv1"](F.gelu(block["norm"](block["dwconvs"][0](x))))


class TimeContext(nn.Module):
    """Residual context over frames at a reduced width: (B, width, frames) -> (B, width, frames)."""

    def __init__(self, width: int, reduced: int):
        super().__init__()
        self.red_dim_conv = nn.Sequential(nn.Conv1d(width, reduced, 1), ChannelNorm(reduced))
        self.tcm = nn.Sequential(ConvPosition(reduced), TransformerLayer(reduced))
        self.exp_dim_conv = nn.Conv1d(reduced, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.exp_dim_conv(self.tcm(self.red_dim_conv(x)))


class ConvPosition(nn.Module):
    """Positions from a wide depthwise convolution over frames, added to (B, width, frames)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, POSITION_KERNEL, padding=POSITION_KERNEL // 2, groups=width)
        self.norm = ChannelNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.conv(x))


class TransformerLayer(nn.Module):
    """Post-norm self-attention and feed-forward layer on (B, width, frames)."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = SelfAttention(width)
        self.layer_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.feed_forward = nn.ModuleDict(
            {"intermediate_dense": nn.Linear(width, 2 * width), "output_dense": nn.Linear(2 * width, width)}
        )
        self.final_layer_norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        x = self.layer_norm(x + self.attention(x))
        hidden = F.gelu(self.feed_forward["intermediate_dense"](x), approximate="tanh")
        return self.final_layer_norm(x + self.feed_forward["output_dense"](hidden)).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention over (B, frames, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class AttentiveStatistics(nn.Module):
    """Attention-weighted mean and standard deviation over frames (ASTP): (B, width, frames) -> (B, 2 width)."""

    def __init__(self, width: int):
        super().__init__()
        self.linear1 = nn.Conv1d(width, POOLING_BOTTLENECK, 1)
        self.linear2 = nn.Conv1d(POOLING_BOTTLENECK, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.linear2(torch.tanh(self.linear1(x))).softmax(dim=-1)
        mean = (weights * x).sum(dim=-1)
        variance = (weights * x.square()).sum(dim=-1) - mean.square()
        return torch.cat([mean, variance.clamp(min=1e-7).sqrt()], dim=1)


def load_redimnet(
    path: str | os.PathLike, device: str | torch.device = "cpu", *, use_torchaudio: bool | None = None
) -> ReDimNet:
    """Load a published ReDimNet file (`{"model_config", "state_dict"}`, or the same tensors as safetensors with
    `model_config` as JSON in the metadata) without running any code from it.

    Returns the network in float32 and eval mode, its parameters frozen, on `device`. use_torchaudio: see
    `mel_spectrogram`. FileNotFoundError if there is no file; ValueError in one sentence for a file that is no
    ReDimNet checkpoint, is damaged, or is a ReDimNet of another kind.
    """
    path = Path(path)
    settings, state = _read_checkpoint(path)
    try:
        config = ReDimNetConfig.from_published(settings)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} is no ReDimNet that NAVA can use: {error}") from None
    # Laid out without memory first, so that a configuration that lies about its size costs nothing.
    with torch.device("meta"):
        model = ReDimNet(config, use_torchaudio=use_torchaudio)
    state = _matching_state(path, state, model.state_dict())
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False).to(device)


def _matching_state(path: Path, state: Mapping, expected: Mapping) -> dict[str, torch.Tensor]:
    """The file's tensors in the network's types, every name and shape checked; a training head is left out, a mel
    front end that the file lacks is computed."""
    state = {name: tensor for name, tensor in state.items() if not name.startswith("cls_head.")}
    missing = sorted(name for name in expected if name not in state and not name.startswith("spec."))
    foreign = sorted(name for name in state if name not in expected)
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"has the unknown tensor {foreign[0]}"
        raise ValueError(
            f"{path.name} does not fit its own model_config: it {what} ({len(missing)} tensors missing, {len(foreign)} "
            "unknown); download M-vb2+vox2+cnc-ft_mix.pt again."
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path.name} does not fit its own model_config: {name} has the shape {tuple(tensor.shape)} where "
                f"{tuple(expected[name].shape)} was expected; download M-vb2+vox2+cnc-ft_mix.pt again."
            )
    # Copies: how a file happens to align its tensors in memory would otherwise show in the last bits of the result.
    return {
        name: state[name].to(default.dtype, copy=True, memory_format=torch.contiguous_format)
        if name in state
        else default
        for name, default in expected.items()
    }


def _read_checkpoint(path: Path) -> tuple[Mapping, Mapping]:
    """(model_config, state_dict) of a file whose kind is told by its content."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no speaker encoder file at {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        raise ValueError(f"{path.name} is empty; download M-vb2+vox2+cnc-ft_mix.pt again.")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError(f"{path.name} is a web page, not a checkpoint; download the file itself, not its page.")
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path.name} is a Git LFS pointer, not the checkpoint; fetch the file with git lfs pull.")
    if size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path.name} has {size / 1e9:.1f} GB, but a ReDimNet speaker encoder about 0.02 GB; "
            "choose M-vb2+vox2+cnc-ft_mix.pt."
        )
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK\x03\x04"):
        _check_archive(path)
    elif not head.startswith(b"\x80"):  # neither a zip archive nor a pickle, the two forms that torch.save has had
        raise ValueError(f"{path.name} is neither a PyTorch nor a safetensors file; choose M-vb2+vox2+cnc-ft_mix.pt.")
    return _read_torch(path)


def _read_safetensors(path: Path) -> tuple[Mapping, Mapping]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            _check_is_redimnet(path, file.keys())
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        settings = json.loads(metadata.get("model_config", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or only partly downloaded ({error}); download it again.") from None
    except json.JSONDecodeError:
        raise ValueError(f"{path.name} has a model_config in its metadata that is not JSON.") from None
    return settings, state


def _read_torch(path: Path) -> tuple[Mapping, Mapping]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path.name} holds more than plain tensors (it asks to run code of its own), so it was not opened; "
            "choose M-vb2+vox2+cnc-ft_mix.pt."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{path.name} cannot be read as a checkpoint ({reason}); download it again.") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a ReDimNet checkpoint.")
    state = content.get("state_dict", content)
    settings = content.get("model_config", {})
    if not isinstance(state, Mapping) or not isinstance(settings, Mapping):
        raise ValueError(f"{path.name} has a state_dict or model_config that is not a table; download it again.")
    _check_is_redimnet(path, state)
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in state.items()):
        raise ValueError(f"{path.name} holds other things than named tensors in its state_dict; download it again.")
    return settings, state


def _check_archive(path: Path):
    """A zip archive cut short has no directory at its end; one that would unpack to gigabytes is refused unread."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile:
        raise ValueError(f"{path.name} is damaged or only partly downloaded; download it again.") from None
    if unpacked > MAX_FILE_BYTES:
        raise ValueError(f"{path.name} unpacks to {unpacked / 1e9:.1f} GB, too much for a ReDimNet speaker encoder.")


def _check_is_redimnet(path: Path, names):
    names = [str(name) for name in names]
    if {"backbone.stem.0.weight", "pool.linear1.weight"} <= set(names):
        return
    shown = ", ".join(names[:2]) or "nothing"
    raise ValueError(
        f"{path.name} is not a ReDimNet speaker encoder (it holds {shown}{', ...' if len(names) > 2 else ''}); "
        "choose M-vb2+vox2+cnc-ft_mix.pt."
    )
