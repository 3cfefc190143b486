"""The chat page as Gradio Blocks: the composer, one generator event, a place for our script.

The transcript is drawn by assets/js (exact text, versions, conversations in the browser) inside a
gr.HTML; what it shows comes from one generator event whose output is the answer so far. Knows no
tokens and no HTTP; the key is never here (assets/js/api_panel.js fetches it). app.py calls
create_page, and launch_options for what Gradio wants at launch.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import gradio as gr

from serve.service import Service
from serve.ui.chat import Snapshot, run_turn
from serve.ui.endpoints import add_endpoints
from serve.ui.first_paint import FirstPaint
from serve.ui.memory import Memory
from serve.ui.visit import VisitOf, open_visit, visit_from

ASSETS = Path(__file__).parent.parent.parent / "assets"
SESSION_SECONDS = 6 * 3600
QUEUE_SECONDS = 0.01  # Gradio's own 1 ms wakes an idle process a thousand times a second
LONGEST_PASTE = 1_000_000  # a pasted text stays text; Gradio's default makes a file of it at 1000

# What the script does when Gradio has put each part on the page; see assets/early.js.
PAGE_LOADED = "window.chatPage.bridge.page(element, trigger)"
STREAM_LOADED = "watch('value', () => window.chatPage.bridge.news(props.value))"
PREPARE = "(box, turn, memory) => window.chatPage.bridge.prepare(box, turn, memory)"
BROKEN = "() => window.chatPage.bridge.broken()"
FILL_BOX = "() => window.chatPage.bridge.fill()"
FILES = "box => window.chatPage.bridge.files(box)"


def create_page(
    service: Service, title: str = "gpt-oss chat", visit_of: VisitOf = open_visit
) -> gr.Blocks:
    """The page over `service`, which need not have a model yet."""

    async def answer(
        box: dict[str, Any], turn: Any, memory: Memory, request: gr.Request
    ) -> AsyncGenerator[Snapshot]:
        files = [str(path) for path in box.get("files") or ()]
        snapshots = run_turn(service, memory, turn, files, visit_from(visit_of, request))
        async with contextlib.aclosing(snapshots):
            async for snapshot in snapshots:
                yield snapshot

    with gr.Blocks(title=title, fill_width=True, analytics_enabled=False) as page:
        shell = gr.HTML(
            html_template='<div id="slot"></div>',
            js_on_load=PAGE_LOADED,
            apply_default_css=False,
            elem_id="page",
        )
        stream = gr.HTML(
            html_template="",
            js_on_load=STREAM_LOADED,
            apply_default_css=False,
            visible="hidden",
            elem_id="stream",
        )
        # Carries JSON to the server; gr.JSON would load a viewer that nobody sees.
        turn = gr.HTML(html_template="", js_on_load=None, visible="hidden")
        memory = gr.State(Memory(), time_to_live=SESSION_SECONDS)
        box = gr.MultimodalTextbox(
            file_count="multiple",
            file_types=None,  # types are read from the bytes, and explained, on the server
            max_plain_text_length=LONGEST_PASTE,
            submit_btn=True,
            stop_btn=True,
            show_label=False,
            container=False,
            elem_id="composer",
        )
        running = gr.on(
            [box.submit, shell.submit],
            answer,
            inputs=[box, turn, memory],
            outputs=[stream],
            js=PREPARE,
            show_progress="hidden",
            concurrency_limit=None,  # the engine decides who waits; the page shows it
            api_visibility="private",
        )
        running.failure(None, js=BROKEN, api_visibility="private")
        shell.stop(None, None, cancels=[running], api_visibility="private")
        shell.clear(None, None, [box], js=FILL_BOX, api_visibility="private")
        shell.upload(None, [box], None, js=FILES, api_visibility="private")
        add_endpoints(service, visit_of)
    page._queue.sleep_when_free = QUEUE_SECONDS
    page._queue.progress_update_sleep_when_free = 10 * QUEUE_SECONDS
    return page


def launch_options(service: Service, title: str = "gpt-oss chat") -> dict[str, Any]:
    """What Blocks.launch() needs for this page: theme, favicon, no extras, and under "middleware"
    the (class, options) pair that app.py puts into app_kwargs["middleware"]."""
    return {
        "launch": {
            "theme": gr.themes.Base(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            "css_paths": None,
            "favicon_path": str(ASSETS / "favicon.png"),
            "footer_links": [],
            "run_history": False,
            "enable_monitoring": False,
            "ssr_mode": False,
            "pwa": False,
            "max_file_size": "20mb",
        },
        "middleware": (FirstPaint, {"service": service, "assets": ASSETS, "title": title}),
    }
