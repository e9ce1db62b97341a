"""Graphs in ComfyUI's API format, built node by node, over the small models of a test server."""

from __future__ import annotations

SCALES = {
    "alignment": True,
    "video_text": 3.0,
    "video_align": 3.0,
    "audio_text": 2.0,
    "audio_align": 2.0,
    "audio_timbre": 3.0,
    "text_start": 0.0,
    "text_end": 1.0,
    "align_start": 0.0,
    "align_end": 1.0,
    "timbre_start": 0.0,
    "timbre_end": 1.0,
}
PROMPT = "A woman by a window says <S>good morning to you all<E> while rain falls outside."


class Graph(dict):
    """``add`` gives a node's first output; ``of(link, n)`` another one of the same node."""

    def add(self, class_type: str, **inputs) -> list:
        name = str(len(self) + 1)
        self[name] = {"class_type": class_type, "inputs": inputs}
        return [name, 0]

    @staticmethod
    def of(link: list, output: int) -> list:
        return [link[0], output]

    # ------------------------------------------------------------ the usual parts

    def model(self, names, **settings):
        return self.add("NavaLoadBackbone", **{"file": names["backbone"], "weight_dtype": "auto", **settings})

    def clip(self, names, role="text_encoder"):
        return self.add("NavaLoadTextEncoder", file=names[role], device="default")

    def video_vae(self, names):
        return self.add("NavaLoadVideoVAE", file=names["video_vae"], device="default")

    def audio_vae(self, names):
        return self.add("NavaLoadAudioVAE", file=names["audio_vae"], device="default")

    def prompt(self, clip, text=PROMPT, **inputs):
        return self.add("NavaEncodePrompt", clip=clip, prompt=text, **inputs)

    def latent(self, seconds=1.0, width=96, height=64, mode="video and audio", batch=1):
        return self.add(
            "NavaEmptyLatent",
            seconds=seconds, preset="custom", width=width, height=height, mode=mode, batch_size=batch,
        )  # fmt: skip

    def sampler(self, model, positive, latent, seed=7, steps=3, **settings):
        inputs = {"model": model, "positive": positive, "latent": latent, "seed": seed, "steps": steps, "shift": 5.0}
        return self.add("NavaSampler", **{**inputs, **SCALES, **settings})

    def custom_sampler(self, guider, latent, sampler=None, sigmas=None, seed=7, steps=3):
        """Stock SamplerCustomAdvanced, by default with our solver and schedule."""
        return self.add(
            "SamplerCustomAdvanced",
            noise=self.add("RandomNoise", noise_seed=seed),
            guider=guider,
            sampler=sampler or self.add("NavaUniPC"),
            sigmas=sigmas or self.add("NavaSigmas", steps=steps, shift=5.0),
            latent_image=latent,
        )

    def frames(self, latent, vae, decoding="auto", tile_size=64, overlap=32):
        tiles = {"tile_size": tile_size, "overlap": overlap}
        return self.add("NavaDecodeVideo", latent=latent, vae=vae, decoding=decoding, **tiles)

    def sound(self, latent, audio_vae, loudness="as decoded"):
        return self.add("NavaDecodeAudio", latent=latent, audio_vae=audio_vae, loudness=loudness)

    def save_clip(self, frames, audio=None, prefix="clip"):
        sound = {} if audio is None else {"audio": audio}
        video = self.add("NavaMux", frames=frames, fps=24.0, **sound)
        return self.add("SaveVideo", video=video, filename_prefix=prefix, format="auto", codec="auto")

    def save_latents(self, latent, prefix):
        """Both parts through stock nodes, as PREFIX_video and PREFIX_audio."""
        parts = self.add("LTXVSeparateAVLatent", av_latent=latent)
        self.add("SaveLatent", samples=parts, filename_prefix=f"{prefix}_video")
        self.add("SaveLatent", samples=self.of(parts, 1), filename_prefix=f"{prefix}_audio")


def text_to_latent(names, **sampler) -> tuple[Graph, list]:
    graph = Graph()
    positive = graph.prompt(graph.clip(names))
    return graph, graph.sampler(graph.model(names), positive, graph.latent(), **sampler)
