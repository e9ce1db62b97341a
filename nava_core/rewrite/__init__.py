"""From one line to a good prompt: a chat model rewrites a draft, which is checked, or describes a picture."""

from .answers import clean_answer
from .backends import Answer, Backend, BackendMissingError, Question, RewriteError
from .checks import measure
from .instructions import LANGUAGES
from .local import LocalChat
from .memory import Remembered
from .rewriter import AUTO, Draft, Rewritten, caption, picture_digest, rewrite
from .server import ChatServer, ServerSettings, server_settings

__all__ = [
    "AUTO",
    "LANGUAGES",
    "Answer",
    "Backend",
    "BackendMissingError",
    "ChatServer",
    "Draft",
    "LocalChat",
    "Question",
    "Remembered",
    "RewriteError",
    "Rewritten",
    "ServerSettings",
    "caption",
    "clean_answer",
    "measure",
    "picture_digest",
    "rewrite",
    "server_settings",
]
