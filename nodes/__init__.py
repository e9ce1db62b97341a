"""The pack's nodes, a file a family."""

from comfy_api.latest import ComfyExtension

from .assist import ASSIST_NODES
from .decode import DECODE_NODES
from .given import GIVEN_NODES
from .host.prompt_route import add_prompt_route
from .latents import LATENT_NODES
from .loaders import LOADER_NODES
from .prompt import PROMPT_NODES
from .report import REPORT_NODES
from .runtime import RUNTIME_NODES
from .sampling import SAMPLING_NODES
from .timbre import TIMBRE_NODES


class NavaExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def on_load(self):
        add_prompt_route()

    async def get_node_list(self):
        return [
            *LOADER_NODES,
            *RUNTIME_NODES,
            *TIMBRE_NODES,
            *PROMPT_NODES,
            *ASSIST_NODES,
            *LATENT_NODES,
            *GIVEN_NODES,
            *SAMPLING_NODES,
            *DECODE_NODES,
            *REPORT_NODES,
        ]
