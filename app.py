"""Composition root: settings -> page and API on one port -> loader -> engine -> requests.

Run as `python app.py` (a Space does) or by scripts/run. Holds no logic of its own: it builds the
parts, hands them to each other, and ends them in order when the process is told to stop. Parses on
old Pythons, so that they can say what is missing.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036  (an old image runs this file too)
    from serve.bootstrap import restart_with_newer_python

    restart_with_newer_python(__file__)

import errno
import gc
import logging
import os
import signal
import socket
import tempfile
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.settings import PUBLIC_MODEL_NAME, BadSetting, Settings, from_env, prepare_libraries

if TYPE_CHECKING:
    from collections.abc import Callable

    import gradio as gr

    from loader import Loader
    from serve.engine.face import Engine
    from serve.keys import KeyRing
    from serve.limits import Budgets
    from serve.model import LoadedModel
    from serve.service import ServedModel, Service
    from serve.ui.visit import Visit

log = logging.getLogger("app")

DRAIN_SECONDS = 4.0
SWITCH_DRAIN_SECONDS = 120.0


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line per download range says nothing
    try:
        settings = from_env()
    except BadSetting as bad:
        print(bad, file=sys.stderr)
        return 2
    problem = port_problem(settings.host, settings.port) or folder_problem(settings.runtime_dir)
    if problem:
        print(problem, file=sys.stderr)
        return 2
    prepare_libraries(settings)
    return serve(settings)


def port_problem(host: str, port: int) -> str | None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                f"PORT={port} on HOST={host} cannot be used: {error.strerror}. "
                "Stop what listens there, or set PORT to a free one."
            )
    return None


def folder_problem(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return unusable(folder, error)


def unusable(folder: Path, error: OSError) -> str:
    fix = "Set WORK_DIR to a folder that this user may write to."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "Free disk space, or set WORK_DIR to a larger disk."
    return f"WORK_DIR={folder.parent} cannot be used: {error.strerror}. {fix}"


def serve(settings: Settings) -> int:
    """Bind first, load in a thread: the page is up while weights come. Returns the exit code."""
    if settings.is_zero_gpu:
        import spaces  # noqa: F401  (it has to come before torch and gradio)

    from openai_compat import create_api
    from serve.keys import KeyRing
    from serve.limits import Budgets
    from serve.service import Service
    from serve.ui.page import create_page, launch_options

    service = Service(", ".join(settings.model_ids) or settings.hf_model_id, PUBLIC_MODEL_NAME)
    try:
        keys, budgets = KeyRing.from_settings(settings), Budgets(settings)
    except OSError as error:  # a full disk has room for an empty file, but not for a key
        print(unusable(settings.runtime_dir, error), file=sys.stderr)
        return 2
    api = create_api(service, keys, settings, budgets)
    page = create_page(service, visit_of=visits(keys, budgets, settings))
    options = launch_options(service)
    api["middleware"] += middleware(page, options["middleware"], settings)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    if settings.is_zero_gpu:
        load(service, settings)  # there launch() hands over what the main thread has loaded
    page.launch(
        server_name=f"[{settings.host}]" if ":" in settings.host else settings.host,
        server_port=settings.port,
        prevent_thread_lock=True,
        quiet=True,
        app_kwargs=api,
        **options["launch"],
    )
    base = f"http://{local_name(settings.host)}:{settings.port}"
    print(f"Page: {base}/   API: {base}/v1", *keys.announcement(base), sep="\n", flush=True)
    if not settings.is_zero_gpu:
        threading.Thread(target=load, args=(service, settings), name="loader", daemon=True).start()
    stop.wait()
    log.info("Stopping: running answers get %.0f s to end.", DRAIN_SECONDS)
    page.server.config.timeout_graceful_shutdown = 2
    service.close(DRAIN_SECONDS)
    page.close(verbose=False)
    return 0


def middleware(
    page: gr.Blocks, first_paint: tuple[Any, dict[str, Any]], settings: Settings
) -> list[Any]:
    """The page's first paint, and on a lent GPU who the visitor is."""
    from starlette.middleware import Middleware

    from serve.ui.visitor import VisitorContext

    kind, arguments = first_paint
    found = [Middleware(kind, **arguments)]
    if settings.is_zero_gpu:
        found.append(Middleware(VisitorContext, page=lambda: page))
    return found


def visits(keys: KeyRing, budgets: Budgets, settings: Settings) -> Callable[[str, str], Visit]:
    """Who a visitor of the page is: an address's budget and a session's cache."""
    from serve.ui.visit import Visit

    def visit_of(address: str, session: str) -> Visit:
        who = keys.page_identity(address, session)
        may_switch = settings.model_switch == "all"  # the owner's page uses the chooser's route
        return Visit(who.tenant, may_switch, lambda: budgets.admit(who.bucket))

    return visit_of


def local_name(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def load(service: Service, settings: Settings) -> None:
    """The loading thread: the first model that fits, then whichever offered one is asked for."""
    import loader
    from serve.errors import ServeError

    wanted: str | None = ""
    while wanted is not None:
        if not wanted:  # at the start, and when somebody asks to try again: hubs are asked anew
            sources = loader.Loader(settings, service.report, service.pass_over)
        try:
            load_one(sources, wanted, service, settings)
        except loader.LoadFailed as failed:
            log.error("%s", failed)
            service.fail(str(failed))
        except ServeError as failed:
            log.error("%s", failed.message)
            service.fail(failed.message)
        except Exception:  # the thread's boundary: without it the page would say "loading" for ever
            log.exception("Loading broke")
            service.fail("Loading broke; the log has the details.")
        wanted = None if settings.is_zero_gpu else service.wait_for_switch()
        if wanted is not None and not sources.has_room_beside(wanted):
            retire(service)


def load_one(sources: Loader, wanted: str, service: Service, settings: Settings) -> None:
    """Load the offered model `wanted` ("": what the settings name) and let it serve."""
    loaded = sources.load_offered(wanted) if wanted else sources.load()
    shared = sources.cache_gb if wanted or settings.is_zero_gpu else sources.share_memory(loaded.id)
    served = assemble(loaded, settings, shared)
    service.attach(served)
    service.offer(sources.offered(), sources.seeing())
    served.format.warm()


def retire(service: Service) -> None:
    """End the loaded models: what runs may end first, and their memory is free before the next."""
    previous = list(iter(service.detach, None))
    for one in previous:
        one.engine.close(SWITCH_DRAIN_SECONDS)
    if previous:
        previous.clear()
        del one
        gc.collect()


def assemble(loaded: LoadedModel, settings: Settings, cache_gb: float | None = None) -> ServedModel:
    """Engine and format around a loaded model; `cache_gb` is its part where several are held."""
    from serve.engine.config import EngineConfig
    from serve.engine.engine import create_engine
    from serve.engine.seeing import create_seeing_engine
    from serve.formats.choose import choose
    from serve.service import ServedModel

    create = create_engine if loaded.processor is None else create_seeing_engine
    build = partial(
        create,
        loaded.model,
        eos_ids=loaded.eos_ids,
        context_length=loaded.context_length,
        device=loaded.device,
        config=EngineConfig(
            kv_cache_gb=settings.kv_cache_gb or cache_gb,
            packs_weights=settings.quant_type in ("auto", "int8"),
            dense_bits=int(settings.dense_bits),
        ),
    )
    vocabulary = int(loaded.model.get_input_embeddings().weight.shape[0])
    engine = per_request(build, vocabulary, loaded) if settings.is_zero_gpu else build()
    spoken = choose(
        loaded.tokenizer, loaded.model_type, loaded.eos_ids, vocabulary, loaded.processor
    )
    card = replace(loaded.card(spoken.capabilities()), context_length=engine.context_length)
    return ServedModel(card, spoken, engine)


def per_request(build: Callable[[], Engine], vocabulary: int, loaded: LoadedModel) -> Engine:
    """The engine where a GPU is lent for one request at a time."""
    import spaces

    from serve.engine.zerogpu import PerRequestEngine, duration, worker_task

    task = spaces.GPU(worker_task(build), duration=duration)
    return PerRequestEngine(task, vocabulary=vocabulary, context_length=loaded.context_length)


def leave(code: int) -> None:
    """End at once: unwinding an interpreter with torch, Triton and a thread inside a step takes
    seconds, prints their leaks, and may abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
