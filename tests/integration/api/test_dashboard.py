"""The page through the whole application: who sees what, how keys become sessions, and what a browser may load."""

import json
import re

import pytest

from tests.support.control_plane import SECRET_LINE, Browser, failed, key, launch_id, loading, make, one_key_each, view
from tests.support.model_desk import OOM, FakeModels, entry
from vllm_bootstrap.api import pages
from vllm_bootstrap.auth.sessions import COOKIE
from vllm_bootstrap.models.types import ModelProgress

EVIL = "<script>alert(1)</script>\"'&"


@pytest.fixture
def services():
    made = make(one_key_each())
    made.supervisor.add(view(1))
    made.supervisor.add(loading(2))
    made.supervisor.add(failed(3))
    return made


def page(services, token=None, path="/", **headers):
    return Browser(services, token).get(path, **headers)


def parts(services, token=None):
    return Browser(services, token).get("/dashboard/parts").body.decode()


def cookie_of(answer):
    header = answer.headers["set-cookie"]
    match = re.fullmatch(rf"{COOKIE}=([^;]*); Path=/; Max-Age=(\d+); HttpOnly; SameSite=Strict", header)
    assert match, header
    return match[1]


# -- who sees what --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/dashboard"])
def test_without_a_key_the_page_is_empty(services, path):
    answer = page(services, path=path)
    assert answer.status == 200
    html = answer.body.decode()
    assert 'id="login"' in html
    assert "org/model" not in html
    assert launch_id(1) not in html
    assert 'id="board"' not in html


def test_a_key_with_monitor_gets_the_first_paint_from_the_server(services):
    html = page(services, "monitor").body.decode()
    assert launch_id(1) in html
    assert 'id="login" class="login card" aria-labelledby="login-title" hidden' in html


@pytest.mark.parametrize("token", ["realtime", "batch", "logs", "upload"])
def test_a_key_without_monitor_is_told_what_it_lacks(services, token):
    html = page(services, token).body.decode()
    assert f"“{token}”" in html
    assert launch_id(1) not in html


def test_what_a_key_may_do_is_what_it_is_offered(services):
    watcher, admin = parts(services, "monitor"), parts(services, "admin")
    assert 'data-allowed=""' in watcher
    assert "<button" not in watcher
    assert SECRET_LINE not in watcher
    assert 'data-allowed="admin logs"' in admin
    assert f'data-stop="{launch_id(1)}"' in admin
    assert f'data-log="{launch_id(3)}"' in admin
    assert f'data-forget="{launch_id(3)}"' in admin
    assert SECRET_LINE in admin


def test_an_open_daemon_shows_everything_and_has_nobody_to_sign_out():
    html = parts(make())
    assert 'data-allowed="admin logs"' in html
    assert 'data-session="no"' in html


def test_parts_show_states_progress_and_failures(services):
    html = parts(services, "monitor")
    assert 'aria-valuenow="43"' in html  # 3 s of 7
    assert "loading the model 50 % · 3.0 s · about 4.0 s left" in html
    assert "remove it" in html
    assert "exit code 2" in html


def test_foreign_text_is_never_markup():
    services = make()
    services.supervisor.add(view(1, model=EVIL, served_model_name=EVIL, labels={EVIL: EVIL}, owner_id=EVIL))
    html = page(services).body.decode()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert 'name="&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;"' in html


# -- sessions -------------------------------------------------------------------------------------------------------


def test_a_key_becomes_a_session_that_is_worth_the_same(services):
    stranger = Browser(services, x_requested_with="vllm-bootstrap-page")
    answer = stranger.post("/session", {"key": "monitor"})
    assert (answer.status, answer.body) == (204, b"")
    session = {"cookie": f"other=1; {COOKIE}={cookie_of(answer)}"}
    shown = stranger.get("/dashboard/parts", **session)
    assert 'data-session="yes"' in shown.body.decode()
    assert stranger.post("/stop/x", {}, **session).status == 403
    gone = stranger.call("DELETE", "/session", headers=session)
    assert gone.status == 204
    assert "Max-Age=0" in gone.headers["set-cookie"]
    assert stranger.get("/dashboard/parts", **session).status == 401
    assert stranger.call("DELETE", "/session").status == 204


def test_a_wrong_key_is_no_session_and_the_page_gets_no_challenge(services):
    page_call = Browser(services, x_requested_with="vllm-bootstrap-page").post("/session", {"key": "wrong"})
    assert page_call.status == 401
    assert "www-authenticate" not in page_call.headers
    assert "set-cookie" not in page_call.headers
    other = Browser(services).post("/session", {"key": "wrong"})
    assert other.headers["www-authenticate"].startswith("Basic")


@pytest.mark.parametrize("body", [{}, {"key": ""}, {"key": 1}, {"key": "k", "more": 1}, {"key": "k" * 5000}])
def test_a_session_needs_a_key_and_nothing_else(services, body):
    answer = Browser(services).post("/session", body)
    assert answer.status == 400
    assert "k" * 100 not in answer.body.decode()


def test_other_sites_cannot_open_or_close_sessions(services):
    for method, body in (("POST", json.dumps({"key": "monitor"}).encode()), ("DELETE", b"")):
        headers = {"origin": "http://evil.example", "content-type": "application/json"}
        assert Browser(services).call(method, "/session", body, headers).status == 403


@pytest.mark.parametrize(("path", "here"), [("/", "./"), ("/dashboard", "dashboard")])
def test_a_key_in_the_address_is_exchanged_at_once(services, path, here):
    answer = page(services, path=f"{path}?key=monitor")
    assert (answer.status, answer.headers["location"]) == (303, here)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert launch_id(1) in page(services, cookie=f"{COOKIE}={cookie_of(answer)}").body.decode()


def test_a_wrong_key_in_the_address_leads_to_the_empty_page(services):
    answer = page(services, path="/?key=wrong")
    assert (answer.status, answer.headers["location"]) == (303, "./#refused")
    assert "set-cookie" not in answer.headers


def test_a_key_in_an_address_opens_nothing_but_the_page(services):
    assert Browser(services).get("/dashboard/parts?key=monitor").status == 401
    assert Browser(services).get("/launches?key=admin").status == 401


def test_an_open_daemon_needs_no_exchange():
    services = make()
    answer = page(services, path="/?key=whatever")
    assert (answer.status, answer.headers["location"]) == (303, "./")
    assert Browser(services).post("/session", {"key": "whatever"}).status == 204


def test_over_tls_the_cookie_stays_there(services):
    browser = Browser(services)
    inner = browser.app

    async def over_tls(scope, receive, send):
        await inner({**scope, "scheme": "https"}, receive, send)

    browser.app = over_tls
    assert browser.post("/session", {"key": "monitor"}).headers["set-cookie"].endswith("; Secure")


def test_a_protected_page_needs_a_key_too():
    services = make([key("admin", "admin")], protect_all=True)
    assert page(services).status == 401
    assert "www-authenticate" in page(services).headers
    assert page(services, "admin").status == 200
    assert page(services, path="/assets/page.js").status == 401


# -- what a browser may load ----------------------------------------------------------------------------------------


def test_the_page_loads_nothing_but_our_own_files(services):
    answer = page(services, "admin")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert all(value in ("'self'", "'none'") for value in policy.values())
    html = answer.body.decode()
    assert not re.search(r"https?://", html)
    assert not re.search(r"<style|<script(?! src=\"assets/)|\sstyle=|\son[a-z]+=", html)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-frame-options"] == "DENY"


def test_assets_are_kept_under_a_name_that_changes_with_them(services):
    html = page(services).body.decode()
    for name, media in (("page.js", "text/javascript"), ("page.css", "text/css"), ("icon.svg", "image/svg+xml")):
        (address,) = set(re.findall(rf"assets/{re.escape(name)}\?v=[0-9a-f]{{12}}", html))
        answer = page(services, path=f"/{address}")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(media)
        assert "immutable" in answer.headers["cache-control"]
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fparts.html", "%2e%2e", "parts.html", "page.js%00"])
def test_there_are_no_other_assets(services, name):
    assert page(services, "admin", path=f"/assets/{name}").status == 404


def test_assets_fetch_nothing_from_elsewhere():
    for name, asset in pages.assets().items():
        text = asset.content.decode()
        allowed = re.sub(r"http://www\.w3\.org/\S+", "", text)
        assert not re.search(r"https?://|@import|url\(|eval\(|innerHTML|new Function", allowed), name


# -- models ---------------------------------------------------------------------------------------------------------


def with_models(services):
    services.models = FakeModels()
    services.models.put(entry("org/chat"), state="loading", progress=ModelProgress("weights", 0.5, 3.0, None))
    services.models.put(entry(EVIL), state="failed", trouble=OOM)
    return services


def test_models_are_shown_with_their_state_and_as_text(services):
    html = parts(with_models(services), "monitor")
    assert "1 failed · 1 loading" in html
    assert "loading weights 50 %" in html
    assert "The weights need more than there is." in html
    assert EVIL not in html
    assert "data-load" not in html
    assert "data-unload" not in html


def test_an_admin_may_load_and_unload(services):
    html = parts(with_models(services), "admin")
    assert 'data-unload="org/chat"' in html
    assert html.count("data-load=") == 1


def test_without_a_catalogue_there_is_no_such_part(services):
    services.models = FakeModels()
    assert 'id="models"' not in parts(services, "admin")
    services.models.note = "line 3 is broken"
    assert "line 3 is broken" in parts(services, "monitor")


def test_a_key_for_other_models_does_not_see_them():
    services = with_models(make([key("one", "monitor", models=("org/other",))]))
    assert "org/chat" not in parts(services, "one")
