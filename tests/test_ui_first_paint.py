"""What the page's middleware adds to Gradio's HTML, and what it serves itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from serve.service import Service
from serve.ui import gradio_files
from serve.ui.bundle import bundle
from serve.ui.first_paint import FirstPaint
from serve.values import PassedOver, Progress

ASSETS = Path(__file__).parent.parent / "assets"
GRADIO = """<html><head><meta property="og:title" content="Gradio" />
<meta property="og:image"
 content="https://raw.githubusercontent.com/gradio-app/x.jpg" /></head>
<body><gradio-app></gradio-app></body></html>"""


async def inner(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    kind = b"text/html" if scope["path"] == "/" else b"application/json"
    body = GRADIO.encode() if scope["path"] == "/" else b"{}"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body[:20], "more_body": True})
    await send({"type": "http.response.body", "body": body[20:]})


def get(
    path: str, service: Service | None = None, query: str = "", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    app = FirstPaint(inner, service or Service("m"), ASSETS, "A <title>")
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": query.encode(),
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(app(scope, None, send))  # type: ignore[arg-type]
    head = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:])


def test_the_page_comes_with_our_markup_style_and_script_and_the_right_length() -> None:
    status, head, body = get("/")
    page = body.decode()
    assert status == 200 and int(head["content-length"]) == len(body)
    assert page.index('<div id="shell"') < page.index("<gradio-app")
    assert "A &lt;title&gt;" in page and "js/page.js" in page and "--accent" in page
    assert "raw.githubusercontent" not in page and 'content="Gradio"' not in page


def test_a_links_preview_gets_the_pictures_whole_address() -> None:
    def picture(**headers: str) -> str:
        return re.findall(r'og:image" content="([^"]*)"', get("/", **headers)[2].decode())[0]

    assert picture(host="a.test:7860") == "http://a.test:7860/ui/assets/social.png"
    proxied = picture(host="inside", x_forwarded_host="b.test", x_forwarded_proto="https")
    assert proxied == "https://b.test/ui/assets/social.png"
    assert picture(host='"><script>') == "http://&quot;&gt;&lt;script&gt;/ui/assets/social.png"


def test_the_page_is_packed_for_who_can_unpack_it() -> None:
    _, head, body = get("/", accept_encoding="gzip, br")
    assert head["content-encoding"] == "gzip" and int(head["content-length"]) == len(body)
    assert gzip.decompress(body) == get("/")[2]


def test_other_answers_pass_unchanged() -> None:
    assert get("/config")[2] == b"{}"


@pytest.mark.parametrize(
    ("name", "kind"),
    [("js/main.js", "text/javascript"), ("favicon.svg", "image/svg+xml"), ("page.css", "text/css")],
)
def test_a_file_is_served_and_not_again_when_it_is_known(name: str, kind: str) -> None:
    status, head, body = get(f"/ui/assets/{name}")
    assert status == 200 and head["content-type"].startswith(kind)
    assert body == (ASSETS / name).read_bytes()
    assert head["x-content-type-options"] == "nosniff"
    assert get(f"/ui/assets/{name}", if_none_match=head["etag"])[0] == 304


def test_a_file_is_packed_for_who_can_unpack_it() -> None:
    _, head, body = get("/ui/assets/js/main.js", accept_encoding="gzip, br")
    assert head["content-encoding"] == "gzip"
    assert gzip.decompress(body) == (ASSETS / "js" / "main.js").read_bytes()


@pytest.mark.parametrize(
    "name", ["../app.py", "js/../../app.py", "/etc/passwd", "js", "", "nothing.js", "%2e%2e/app.py"]
)
def test_nothing_outside_the_folder_is_served(name: str) -> None:
    assert get(f"/ui/assets/{name}")[0] == 404


def test_the_state_of_the_model_is_told_to_everybody() -> None:
    service = Service("big/model")
    service.report(Progress("downloading", "big/model", "hub", 1, 2, 3.0, 4.0))
    service.pass_over(PassedOver("other", "too big", "Set MODEL_IDS."))
    status, head, body = get("/ui/status", service)
    told = json.loads(body)
    assert status == 200 and head["cache-control"] == "no-store"
    assert not told["ready"] and told["progress"]["total_bytes"] == 2
    assert told["passed_over"][0]["reason"] == "too big" and told["boot"]


def test_every_script_is_in_the_one_that_the_page_asks_for() -> None:
    page = get("/")[2].decode()
    address = re.search(r'<script type="module" async src="\.(/ui/assets/\w+/js/page\.js)"', page)
    assert address is not None and page.count(address[1]) == 2  # announced in the head
    whole = get(address[1])[2].decode()
    for script in (ASSETS / "js").glob("*.js"):
        assert f"const ${script.stem} = " in whole, script.name


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('import x from "./b.js";\n', "cannot be bundled"),
        ("export default 1;\n", "cannot be bundled"),
        ("export let x = 1;\n", "cannot be bundled"),
        ('import { x } from "./main.js";\n', "imports itself"),
    ],
)
def test_a_script_in_a_form_that_the_bundle_does_not_know_is_refused(
    tmp_path: Path, source: str, complaint: str
) -> None:
    (tmp_path / "main.js").write_text(source)
    with pytest.raises(ValueError, match=complaint):
        bundle(tmp_path)


def test_what_gradios_script_will_fetch_is_asked_for_at_once_but_no_video_library() -> None:
    page = get("/")[2].decode()
    named = re.findall(r'href="\./assets/([\w-]+?)-[\w-]{8}\.(?:js|css)"', page)
    assert {"Blocks", "core", "HTML", "runtime"} <= set(named) and "Login" not in named
    assert re.search(r'load" [^>]*hls-', page) is None
    assert all(
        (gradio_files.folder() / name).is_file()
        for name in re.findall(r'href="\./assets/([^"]+)"', page)
    )
    found = re.search(r'<script type="importmap">(.*?)</script>', page)
    assert found is not None and page.index("importmap") < page.index("<meta")
    ((video, instead),) = json.loads(found[1])["imports"].items()
    assert (gradio_files.folder().parent / video).is_file()
    status, head, body = get(instead.removeprefix("."))
    assert status == 200 and head["content-type"].startswith("text/javascript")
    assert body.startswith(b"const no = () => false;") and len(body) < 200


def test_a_gradio_of_another_form_is_left_alone(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    (tmp_path / "index.html").write_text("<html></html>")
    (assets / "core-x.js").write_text("nothing known")
    assert gradio_files.chain(assets) == () and gradio_files.streaming(assets) is None


def test_a_script_under_its_version_is_kept_for_good_and_under_another_is_not_found() -> None:
    found = re.search(r"\./(ui/assets/(\w+)/js/page.js)", get("/")[2].decode())
    assert found is not None
    status, head, _ = get("/" + found[1])
    assert status == 200 and "immutable" in head["cache-control"]
    assert get("/" + found[1].replace(found[2], "0" * 12))[0] == 404


def test_the_scripts_fetch_nothing_from_elsewhere() -> None:
    for file in [*(ASSETS / "js").glob("*.js"), ASSETS / "page.css", ASSETS / "shell.html"]:
        assert "//cdn" not in file.read_text() and "https://" not in file.read_text(), file.name
