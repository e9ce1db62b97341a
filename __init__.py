"""ComfyUI's door to the pack: its nodes and its canvas extension."""

WEB_DIRECTORY = "./js"


async def comfy_entrypoint():
    """The extension that ComfyUI asks for the nodes."""
    from .nodes import NavaExtension

    return NavaExtension()


__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
