"""Checks of the settings of `engine=endpoint`: a URL without secrets, and no unsendable setting."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from batchvlm.config import EngineName, GenerationConfig, Guided, JobConfig, SourceKind
from batchvlm.errors import ConfigError

# Settings for which the OpenAI API has no field.
_UNSUPPORTED = (
    *("min_new_tokens", "top_k", "min_p", "repetition_penalty", "ignore_eos"),
    "skip_special_tokens",
)


def check_endpoint(cfg: JobConfig) -> None:
    """Refuse settings that a server cannot apply, and secrets in a URL that is written to disk.

    Raises:
        ConfigError: the message never repeats a value that may hold a secret.
    """
    endpoint, gen = cfg.engine.endpoint, cfg.generation
    if cfg.engine.name is not EngineName.endpoint:
        if endpoint.url is not None:
            raise ConfigError(
                f"engine.endpoint.url has no effect with engine={cfg.engine.name.value}",
                hint="choose engine=endpoint",
            )
        return
    if endpoint.url is None:
        raise ConfigError(
            "engine.endpoint.url is required and not set",
            hint="add engine.endpoint.url=http://HOST:PORT/v1 to the command",
        )
    try:
        url = urlsplit(endpoint.url)
        is_address = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        is_address = False
    # These messages do not repeat the URL, which may hold a password.
    if not is_address:
        raise ConfigError("engine.endpoint.url is not an http or https URL")
    if "@" in url.netloc or url.query or url.fragment:
        raise ConfigError(
            "engine.endpoint.url holds a user, a query or a fragment, and settings are written "
            "into the output folder",
            hint="give a token by the environment variable that engine.endpoint.token_env names",
        )
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", endpoint.token_env):
        raise ConfigError("engine.endpoint.token_env is no name of an environment variable")
    for key in _UNSUPPORTED:
        # Only settings of the run are refused. Those of a row are sent under vLLM's names: its
        # author chose them for this server.
        if getattr(gen, key) != getattr(GenerationConfig, key):
            raise ConfigError(
                f"engine=endpoint cannot send generation.{key}: the OpenAI API has no field for it",
                hint="if this server has one, add it to engine.endpoint.extra_body, such as "
                "engine.endpoint.extra_body.top_k=20",
            )
    for setting, is_set in (
        # data=openai sets output.token_ids by default, and works without token ids.
        ("output.token_ids", cfg.output.token_ids and cfg.data.source is not SourceKind.openai),
        ("model.max_prompt_tokens", cfg.model.max_prompt_tokens is not None),
    ):
        if is_set:
            raise ConfigError(f"engine=endpoint does not support {setting}: it does not tokenize")
    if cfg.model.chat_template_kwargs:
        raise ConfigError(
            "engine=endpoint cannot apply model.chat_template_kwargs: the server has the template",
            hint="if it takes them by request, as vLLM does, add them to "
            "engine.endpoint.extra_body.chat_template_kwargs",
        )
    if cfg.model.prompt_tokens:
        raise ConfigError(
            "engine=endpoint cannot apply model.prompt_tokens: the server reads the prompts",
            hint="leave it out; most servers take text that spells a special token for the token",
        )
    if cfg.task.output.guided is Guided.strict:
        raise ConfigError(
            "engine=endpoint cannot guarantee task.output.guided=strict: no server reports whether "
            "it has constrained an answer",
            hint="auto asks the server to constrain answers, and each is validated here",
        )
    if reserved := sorted({"messages", "stream", "n"} & {*endpoint.extra_body}):
        raise ConfigError(f"engine.endpoint.extra_body.{reserved[0]} is set by the engine")
