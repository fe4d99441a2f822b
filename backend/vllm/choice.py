"""Makes `moebius` a value of --all2all-backend, and notices when it is chosen.

`register` adds the name to the type that vLLM checks the value against, with a check of ours behind it that is run for
no other value; nothing else of vLLM is touched by it. The check installs the rest (`patches`). Processes that vLLM
starts get their configuration by pickle, without checks: so a configuration with our name says, when it is pickled,
that whoever unpickles it does the same first. There is no other moment that every process has in common: the
configuration arrives before plugins are loaded, and what comes later would have to be patched to be noticed.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any, Literal, get_args, get_origin

from moebius import env

NAME = "moebius"
FIELD = "all2all_backend"
_log = logging.getLogger("moebius")


def register() -> None:
    """Make the name known to vLLM in this process. Called by vLLM; may be called again.

    Silent also where it is not possible: whoever has another backend should not hear of us. vLLM then refuses
    `--all2all-backend moebius`, and `python -m moebius.vllm` says why.
    """
    try:
        _add_name()
        if env.vllm_gloo():
            from . import gloo

            gloo.install()
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        _log.debug("cannot add %s to vLLM's --all2all-backend: %r", NAME, error)


def is_registered() -> bool:
    """Whether vLLM knows the name in this process."""
    parallel = sys.modules.get("vllm.config.parallel")
    return parallel is not None and NAME in get_args(parallel.All2AllBackend)


def _add_name() -> None:
    import vllm.config.parallel as parallel
    from pydantic import AfterValidator
    from pydantic.dataclasses import rebuild_dataclass

    names = get_args(parallel.All2AllBackend)
    if NAME in names:
        return
    if get_origin(parallel.All2AllBackend) is not Literal:
        raise TypeError("All2AllBackend is no Literal")
    literal: Any = Literal.__getitem__((*names, NAME))
    checked: Any = Annotated[literal, AfterValidator(_seen)]
    config = parallel.ParallelConfig
    config.__dataclass_fields__[FIELD].type = checked
    config.__annotations__[FIELD] = checked
    config.__pydantic_fields__[FIELD].annotation = literal
    rebuild_dataclass(config, force=True)
    parallel.All2AllBackend = literal
    # The choices on the command line come from the type, and may have been asked for before.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is not None:
        arguments._compute_kwargs.cache_clear()


def _seen(name: str) -> str:
    """Run by vLLM's check of the value."""
    if name == NAME:
        activate()
    return name


def activate() -> None:
    """Install what running on us takes, in this process. May be repeated.

    Raises:
        VersionError: this vLLM is not one that it can be installed in; nothing was changed.
    """
    from . import patches

    register()
    patches.install_in_config()


def reduce(config: Any, protocol: int) -> Any:
    """How a `ParallelConfig` is pickled in a process that chose us: as before, but see `revive`."""
    reduced = object.__reduce_ex__(config, max(2, protocol))
    if getattr(config, FIELD, None) != NAME or not isinstance(reduced, tuple):
        return reduced
    return (revive, (type(config),), *reduced[2:])


def revive(config_type: type[Any]) -> Any:
    """An empty configuration to unpickle into, in a process that now runs on us."""
    activate()
    return object.__new__(config_type)
