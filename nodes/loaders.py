"""Loader nodes: the model files, from the host's own model folders."""

import folder_paths
from comfy_api.latest import io

from ..nava_core.timbre import load_redimnet
from .host.audio_vae import load_audio_vae
from .host.model import WEIGHT_DTYPES, load_backbone
from .host.text_encoder import load_text_encoder
from .host.video_vae import load_video_vae
from .types import SpeakerEncoder, category

DEVICES = ["default", "cpu"]


def file_input(folder: str, what: str) -> io.Combo.Input:
    return io.Combo.Input(
        "file",
        options=folder_paths.get_filename_list(folder),
        tooltip=f"{what} From ComfyUI's models/{folder} folder.",
    )


AUDIO_VAE_FOLDERS = ("vae", "checkpoints")  # ours, and where the stock LTX loader looks


def audio_vae_files() -> list[str]:
    return sorted({name for folder in AUDIO_VAE_FOLDERS for name in folder_paths.get_filename_list(folder)})


def audio_vae_path(file: str) -> str:
    found = (folder_paths.get_full_path(folder, file) for folder in AUDIO_VAE_FOLDERS)
    return next((path for path in found if path), None) or folder_paths.get_full_path_or_raise("vae", file)


def device_input(what: str, advanced: bool = True) -> io.Combo.Input:
    return io.Combo.Input(
        "device",
        options=DEVICES,
        default="default",
        advanced=advanced,
        tooltip=f"Where the {what} works: ComfyUI's choice, or the CPU to leave GPU memory to the backbone.",
    )


GGUF_FOLDER = "nava_gguf"  # the folders of diffusion_models once more, for files that ComfyUI does not list there


def backbone_files() -> list[str]:
    folders = folder_paths.folder_names_and_paths
    folders.setdefault(GGUF_FOLDER, (folders["diffusion_models"][0], {".gguf"}))
    return sorted(
        {name for folder in ("diffusion_models", GGUF_FOLDER) for name in folder_paths.get_filename_list(folder)}
    )


class NavaLoadBackbone(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaLoadBackbone",
            display_name="NAVA Load Backbone",
            category=category("loaders"),
            description="Loads the NAVA transformer, which makes picture and sound together.",
            search_aliases=["nava", "load model", "video with sound"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=backbone_files(),
                    tooltip="NAVA.safetensors, NAVA_fp8.safetensors, one of nava convert's smaller files, a .ckpt or a "
                    ".gguf. From ComfyUI's models/diffusion_models folder.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="auto",
                    tooltip="How the weights are kept in memory. auto: as the file and the GPU suit best; auto fast: "
                    "also multiplies in the file's own quantised type on GPUs that can, less exact; bf16: 12.6 GB; "
                    "fp8: 6.9 GB, a little less exact; fp8 fast: also multiplies in fp8 (Ada, Hopper and later).",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, file, weight_dtype) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("diffusion_models", file)
        return io.NodeOutput(load_backbone(path, weight_dtype))


class NavaLoadVideoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaLoadVideoVAE",
            display_name="NAVA Load Video VAE",
            category=category("loaders"),
            description="Loads the Wan2.2 video VAE, which turns latents into frames and a first image into a latent.",
            inputs=[
                file_input("vae", "wan2.2_vae.safetensors or Wan2.2_VAE.pth."),
                device_input("video VAE"),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, file, device) -> io.NodeOutput:
        return io.NodeOutput(load_video_vae(folder_paths.get_full_path_or_raise("vae", file), device))


class NavaLoadAudioVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaLoadAudioVAE",
            display_name="NAVA Load Audio VAE",
            category=category("loaders"),
            description="Loads the LTX-2.3 audio VAE with its vocoder, which turns latents into 48 kHz stereo sound.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=audio_vae_files(),
                    tooltip="ltx-2.3-22b-dev_audio_vae.safetensors or its bf16 repack. From ComfyUI's models/vae or "
                    "models/checkpoints folder.",
                ),
                device_input("audio VAE"),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls, file, device) -> io.NodeOutput:
        return io.NodeOutput(load_audio_vae(audio_vae_path(file), device))


class NavaLoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaLoadTextEncoder",
            display_name="NAVA Load Text Encoder",
            category=category("loaders"),
            description="Loads the umt5-xxl text encoder with NAVA's own tokenizer.",
            inputs=[
                file_input(
                    "text_encoders",
                    "umt5_xxl_fp16 or umt5_xxl_fp8_e4m3fn_scaled (tokenizer inside), or the makers' "
                    "models_t5_umt5-xxl-enc-bf16.pth with the folder google/umt5-xxl beside it.",
                ),
                device_input("text encoder", advanced=False),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, file, device) -> io.NodeOutput:
        return io.NodeOutput(load_text_encoder(folder_paths.get_full_path_or_raise("text_encoders", file), device))


class NavaLoadSpeakerEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="NavaLoadSpeakerEncoder",
            display_name="NAVA Load Speaker Encoder",
            category=category("loaders"),
            description="Loads the ReDimNet speaker encoder, which hears who is speaking in a recording.",
            inputs=[file_input("audio_encoders", "M-vb2+vox2+cnc-ft_mix.pt (ReDimNet M).")],
            outputs=[SpeakerEncoder.Output(display_name="speaker encoder")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(load_redimnet(folder_paths.get_full_path_or_raise("audio_encoders", file)))


LOADER_NODES = [NavaLoadBackbone, NavaLoadVideoVAE, NavaLoadAudioVAE, NavaLoadTextEncoder, NavaLoadSpeakerEncoder]
