"""NAVA without a host: the model, its inputs and outputs, and the whole job from files to a clip.

Public names are imported when they are first used, so that ``import nava_core`` is quick.
"""

from importlib import import_module

_EXPORTS = {
    "backbone": ("BackboneConfig", "NavaBackbone"),
    "checkpoint": ("WrongFileError", "describe_file", "load_backbone"),
    "geometry": ("ClipGeometry",),
    "lora_merge": ("LoraMerge",),
    "media": ("mux", "read_audio", "read_image", "write_wav"),
    "pipeline": (
        "Clip",
        "ClipDecoder",
        "ClipLatents",
        "Decoding",
        "ModelFiles",
        "NavaPipeline",
        "find_model_files",
    ),
    "prompt": (
        "PromptTokenizer",
        "SpeechSpan",
        "StructuredPrompt",
        "check_prompt",
        "default_negative",
        "parse_spans",
    ),
    "report": ("ClipReport", "report_clip", "report_file"),
    "sampling": ("FlowEuler", "FlowUniPC", "Guidance", "denoise", "flow_sigmas"),
    "timbre": ("check_voice", "encode_timbre", "load_redimnet"),
    "voices": ("SavedVoice", "blend_voices", "encoder_fingerprint", "make_voice"),
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
