"""The page at `/` in a real Chromium, against a real server with the demo model.

Every test also holds that the page asks no other origin and that the browser has nothing to complain about. All are
synchronous: playwright's synchronous interface does not run inside an event loop.
"""

import base64
import io
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from deploy.page import PAGE
from tests.e2e.browser import CHROMIUM_FLAGS, chromium
from tests.e2e.servers import Server, eventually

QUESTION = "What is a front?"
DESKTOP, PHONE = (1360, 900), (390, 844)
KEY = "schlüssel-7"
# Chromium reports every answer that is no success on its console, whatever the page makes of it.
UNANSWERED = r"Failed to load resource"
WAIT_MS = 20_000
expect.set_options(timeout=WAIT_MS)

pytestmark = pytest.mark.needs("chromium")

Open = Callable[..., AbstractContextManager[Page]]


@pytest.fixture(scope="module")
def server(operated: Server) -> Server:
    return operated


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@contextmanager
def watched(browser: Browser, url: str, expected: str = r"(?!)", **options: Any) -> Iterator[Page]:
    """The page, and at the end no request to elsewhere and no console message beside those that are expected."""
    width, height = options.pop("size", DESKTOP)
    with browser.new_context(viewport={"width": width, "height": height}, **options) as context:
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        requests, complaints = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.goto(url)
        yield page
        assert [found for found in requests if not found.startswith((url + "/", "data:"))] == []
        assert [text for text in complaints if not re.match(expected, text)] == []


@pytest.fixture
def open_page(browser: Browser, server: Server) -> Open:
    @contextmanager
    def opened(expected: str = r"(?!)", **options: Any) -> Iterator[Page]:
        with watched(browser, server.url, expected, **options) as page:
            expect(page.locator("#state")).to_have_text("ready", timeout=60_000)
            expect(page.get_by_role("gridcell", name=re.compile("^layer 0, expert 0:"))).to_be_visible()
            yield page

    return opened


def ask(page: Page, question: str = QUESTION) -> Locator:
    """Ask and wait for the end; returns the text of the answer."""
    page.get_by_label("Message").fill(question)
    page.get_by_role("button", name="Send").click()
    answer = page.locator(".turn.answer").last
    expect(answer).to_have_attribute("aria-busy", "false")
    return answer.locator(".text")


def endless(page: Page) -> None:
    """The demo model ends its answers soon: from now on the page's requests go through with ignore_eos."""

    def rewrite(route: Route) -> None:
        body = json.loads(route.request.post_data or "{}") | {"ignore_eos": True, "max_tokens": 1500}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", rewrite)


def oracle(server: Server, question: str = QUESTION) -> tuple[str, np.ndarray, int]:
    """(answer, experts of shape (tokens, layers, top_k), number of prompt tokens) from the API itself."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 512}
    answer = httpx.post(
        f"{server.url}/v1/chat/completions", json=body | {"return_routed_experts": True}, timeout=60, trust_env=False
    ).json()
    choice = answer["choices"][0]
    routed = np.load(io.BytesIO(base64.b64decode(choice["routed_experts"])))
    return choice["message"]["content"], routed, answer["usage"]["prompt_tokens"]


def shown_counts(page: Page) -> list[list[int]]:
    """What the labels of the map say: choices by layer and expert."""
    labels = page.locator("#map .cell").evaluate_all("cells => cells.map(cell => cell.ariaLabel)")
    found = [re.match(r"layer (\d+), expert (\d+): (?:([\d,]+)|no) choices", label) for label in labels]
    assert all(found)
    counts = np.zeros((4, 8), int)
    for match in found:
        counts[int(match[1]), int(match[2])] = int((match[3] or "0").replace(",", ""))
    return counts.tolist()  # type: ignore[no-any-return]


# Numbers of tokens that were there while an answer was still being written: a short one may end before anybody looks.
COUNT_TOKENS_BEFORE_THE_END = """() => {
  window.seen = new Set();
  new MutationObserver(() => {
    const tokens = document.querySelectorAll(".turn.answer[aria-busy=true] .tok").length;
    if (tokens) window.seen.add(tokens);
  }).observe(document.body, { childList: true, subtree: true });
}"""


# Within the page: a whole answer may take less time than a browser on a busy machine takes for a click from outside.
STOP_IN_THE_MIDDLE = """how => new MutationObserver((_, observer) => {
    if (document.querySelectorAll(".turn.answer .tok").length < 6) return;
    observer.disconnect();
    if (how === "button") document.getElementById("stop").click();
    else document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: how, bubbles: true}));
}).observe(document.body, {childList: true, subtree: true})"""


class TestChat:
    def test_an_answer_streams_and_says_what_the_model_says(self, open_page: Open, server: Server) -> None:
        expected, *_ = oracle(server)
        assert any(self._shown_lengths(open_page, expected) > 1 for _ in range(4)), "tokens come one after the other"

    def _shown_lengths(self, open_page: Open, expected: str) -> int:
        """How many lengths the answer had on its way. On a busy machine all of it may have come before it is drawn."""
        with open_page() as page:
            page.evaluate(COUNT_TOKENS_BEFORE_THE_END)
            page.get_by_label("Message").fill(QUESTION)
            page.get_by_role("button", name="Send").click()
            answer = page.locator(".turn.answer")
            expect(answer).to_have_attribute("aria-busy", "false")
            expect(answer.locator(".text")).to_have_text(expected)
            expect(answer.locator(".note")).to_have_text(re.compile(r"^\d+ tokens in [\d.]+ s · first after [\d.]+ s$"))
            expect(page.get_by_label("Message")).to_have_value("")
            return int(page.evaluate("window.seen.size"))

    @pytest.mark.parametrize("how", ["button", "Escape"])
    def test_stop_ends_the_answer_here_and_in_the_server(self, open_page: Open, server: Server, how: str) -> None:
        with open_page() as page:
            endless(page)
            page.get_by_label("Message").fill(QUESTION)
            page.evaluate(STOP_IN_THE_MIDDLE, how)
            page.get_by_label("Message").press("Enter")
            expect(page.locator(".turn.answer .note")).to_have_text(re.compile("^Stopped"))
            server.wait_idle(5.0)
            expect(page.get_by_role("button", name="Send")).to_be_visible()
            assert page.locator(".turn.answer .tok").count() < 1400

    def test_the_settings_are_used(self, open_page: Open) -> None:
        sent: list[dict[str, Any]] = []
        with open_page() as page:
            page.on("request", lambda r: sent.append(json.loads(r.post_data)) if r.method == "POST" else None)
            page.get_by_text("Settings").click()
            page.get_by_label("System prompt").fill("Be brief.")
            page.get_by_label("max_tokens").fill("3")
            page.get_by_label("Temperature").fill("0.5")
            ask(page)
            expect(page.locator(".turn.answer .note")).to_have_text(
                re.compile("^Cut at the most tokens allowed. 3 tokens")
            )
            ask(page, "And then?")
            page.get_by_role("button", name="New chat").click()
            expect(page.locator(".turn")).to_have_count(0)
        assert [(body["max_tokens"], body["temperature"]) for body in sent] == [(3, 0.5)] * 2
        assert [message["role"] for message in sent[1]["messages"]] == ["system", "user", "assistant", "user"]
        assert sent[0]["messages"][0]["content"] == "Be brief."

    def test_a_refusal_is_told_in_words_and_the_question_is_kept(self, open_page: Open) -> None:
        with open_page(expected=UNANSWERED) as page:
            page.get_by_text("Settings").click()
            page.get_by_label("max_tokens").fill("999999")
            ask(page)
            expect(page.locator(".turn.answer .note")).to_have_text(re.compile("maximum context length is 2048 tokens"))
            expect(page.get_by_label("Message")).to_have_value(QUESTION)

    def test_text_is_never_markup(self, open_page: Open) -> None:
        with open_page() as page:
            ask(page, "<img src=x onerror=alert(1)><b>bold</b>")
            expect(page.locator(".turn.user")).to_have_text("You: <img src=x onerror=alert(1)><b>bold</b>")
            assert page.locator("#talk img, #talk b").count() == 0


class TestMap:
    def test_it_fills_with_what_the_server_counts(self, open_page: Open, server: Server) -> None:
        with open_page() as page:
            before = np.array(shown_counts(page)).sum()
            ask(page)
            eventually(lambda: shown_counts(page) == server.get("/v1/experts").json()["counts"], "the counts are shown")
            assert np.array(shown_counts(page)).sum() > before
            assert page.locator("#map .cell.hot").count() > 0
            assert page.locator("#map .cell.cold").count() > 0
            page.get_by_label("recent").check()
            recent = server.get("/v1/experts").json()["recent_counts"]
            eventually(lambda: shown_counts(page) == recent, "recent counts are shown")
            expect(page.locator("#map-sum")).to_have_text(re.compile("of the last 5 min$"))
            placement = server.get("/v1/experts").json()["placement"]
            expect(page.locator("#map .cell").first).to_have_attribute(
                "aria-label", re.compile(f"group {placement[0][0][0]}$")
            )
            hottest = page.locator("#hottest button").first
            expect(hottest).to_have_text(re.compile(r"^layer \d expert \d · \d\.\d.$"))

    def test_this_chat_shows_which_token_went_where(self, open_page: Open, server: Server) -> None:
        _, routed, num_prompt = oracle(server)
        counts = [np.bincount(routed[:, layer].ravel(), minlength=8).tolist() for layer in range(4)]
        with open_page() as page:
            ask(page)
            page.get_by_label("this chat").check()
            assert shown_counts(page) == counts
            # A chunk brings one token, or several where the reader was behind.
            shown = page.locator(".turn.answer .tok")
            ids = [[*map(int, told.split())] for told in shown.evaluate_all("toks => toks.map(t => t.dataset.tokens)")]
            assert [i for of_span in ids for i in of_span][:4] == [num_prompt + n for n in range(4)]
            place = min(4, len(ids) - 2)  # the last token of all is never computed
            shown.nth(place).hover()
            lit = page.locator("#map .cell").evaluate_all("cells => cells.map(c => c.classList.contains('lit'))")
            chosen = [sorted({*routed[ids[place], layer].ravel().tolist()}) for layer in range(4)]
            assert [np.flatnonzero(row).tolist() for row in np.reshape(lit, (4, 8))] == chosen
            expect(page.locator("#readout")).to_contain_text(f"0: {chosen[0][0]}, {chosen[0][1]}")
            expert = int(routed[num_prompt, 2, 0])
            page.get_by_role("gridcell", name=f"layer 2, expert {expert}:").hover()
            marked = shown.evaluate_all("toks => toks.map(t => t.classList.contains('on'))")
            computed = [[i for i in of_span if i < len(routed)] for of_span in ids]
            assert marked == [bool((routed[of_span, 2] == expert).any()) for of_span in computed]

    def test_thousands_of_experts_are_one_canvas(self, open_page: Open) -> None:
        """94 layers of 128 experts, with one that is hot: by zoom, by load, by pointer and by keys."""
        counts = [[100] * 128 for _ in range(94)]
        counts[70][90] = 5000
        placement = [[[expert // 64] for expert in range(128)] for _ in range(94)]
        answer = {"layers": 94, "experts": 128, "counts": counts, "recent_counts": counts, "placement": placement}
        answer |= {"balancedness": 0.7, "map_version": 1, "window_seconds": 300.0}
        with open_page() as page:
            page.route("**/v1/experts", lambda route: route.fulfill(json=answer))
            sheet = page.locator("#sheet")
            expect(sheet).to_be_visible()
            assert page.locator("#map *").count() == 1
            began = page.evaluate("performance.now()")
            page.evaluate("drawMap()")
            assert page.evaluate("performance.now()") - began < 500
            page.locator("#hottest button").first.click()
            expect(page.locator("#readout")).to_contain_text("layer 70, expert 90: 5,000 choices")
            page.get_by_label("each layer by load").check()
            sheet.hover(position={"x": 24 + 2, "y": 24 + 6 * 70 + 2})
            expect(page.locator("#readout")).to_contain_text("layer 70, expert 90:")
            page.get_by_label("each layer by load").uncheck()
            sheet.hover(position={"x": 24 + 2, "y": 24 + 6 * 70 + 2})
            expect(page.locator("#readout")).to_contain_text("layer 70, expert 0:")
            page.mouse.move(0, 0)
            page.locator("[name=zoom][value='12']").check()
            assert sheet.evaluate("node => node.clientWidth") == 24 + 12 * 128
            sheet.focus()
            page.keyboard.press("ArrowDown")
            page.keyboard.press("End")
            expect(page.locator("#readout")).to_contain_text("layer 1, expert 127: 100 choices")
            row = "node => [...node.getContext('2d').getImageData(24 + 12 * 90 + 4, 24 + 12 * 70 + 4, 13, 1).data]"
            pixels = sheet.evaluate(row)
            assert pixels[:4] != pixels[-4:], "the hot one has another colour"


class TestOperator:
    def test_a_button_adds_a_replica_and_another_takes_it_away(self, open_page: Open, server: Server) -> None:
        with open_page() as page:
            page.get_by_role("button", name="One more replica of group 1").click()
            expect(page.locator("#done")).to_have_text("group 1: 2 wanted")
            row = page.locator("tr[data-slot=expert-g1-r1]")
            expect(row.locator(".state")).to_have_text("ready", timeout=60_000)
            expect(page.get_by_label("group 1: wanted")).to_have_text("2")
            assert server.get("/v1/cluster").json()["wanted"] == {"fronts": 1, "replicas": [1, 2]}
            page.get_by_role("button", name="One less replica of group 1").click()
            expect(row).to_have_count(0, timeout=60_000)
            expect(page.get_by_role("button", name="One less replica of group 1")).to_be_disabled()
            expect(page.locator("#events")).to_contain_text("expert-g1-r1: gone")

    def test_rebalance_tells_numbers_first(self, open_page: Open, server: Server) -> None:
        with open_page() as page:
            ask(page)
            server.unbalance()
            page.get_by_role("button", name="Rebalance…").click()
            dialog = page.get_by_role("dialog", name="Rebalance experts over groups")
            dialog.get_by_label("every improvement").check()
            url = f"{server.url}/v1/cluster/rebalance"
            plan = httpx.post(url, json={"dry_run": True, "force": True}, timeout=60, trust_env=False).json()
            before, after = plan["balancedness"]["before"], plan["balancedness"]["after"]
            assert plan["layers"] > 0
            assert plan["bytes_to_move"] > 0
            expect(dialog.locator("#plan-balance")).to_have_text(f"{before:.3f} → {after:.3f}")
            expect(dialog.locator("#plan-bytes")).to_have_text(re.compile(r"^[\d.]+ (KiB|MiB)$"))
            version = server.get("/v1/experts").json()["map_version"]
            dialog.get_by_role("button", name="Cancel").click()
            expect(dialog).to_be_hidden()
            assert server.get("/v1/experts").json()["map_version"] == version
            page.get_by_role("button", name="Rebalance…").click()
            dialog.get_by_label("every improvement").check()
            dialog.get_by_role("button", name="Rebalance now").click()
            expect(page.locator("#done")).to_have_text(re.compile(r"^rebalanced: [\d.]+ → [\d.]+, \d+ experts loaded"))
            assert server.get("/v1/experts").json()["map_version"] > version

    def test_a_killed_replica_turns_red_and_comes_back(self, open_page: Open, server: Server) -> None:
        with open_page() as page:
            shown = page.locator("tr[data-slot=expert-g0-r0]")
            expect(shown.locator(".state")).to_have_text("ready")
            calm = shown.locator(".state").evaluate("node => getComputedStyle(node).color")
            rows = server.get("/v1/cluster").json()["replicas"]
            (pid,) = [row["pid"] for row in rows if re.fullmatch(r"expert-g0-r0(\.\d+)?", row["id"])]
            expect(shown).to_contain_text(f"pid {pid}")
            os.kill(pid, signal.SIGKILL)
            expect(shown.locator(".state.lost")).to_have_text(re.compile("^(dead|starting again|loading again)$"))
            red, green, blue, *_ = shown.locator(".state.lost").evaluate(RGB)
            assert red > 1.5 * max(green, blue)
            expect(shown.locator(".state.ready")).to_have_text("ready", timeout=60_000)
            assert shown.locator(".state").evaluate("node => getComputedStyle(node).color") == calm
            expect(shown).not_to_contain_text(f"pid {pid} ")
            expect(page.locator("#events")).to_contain_text("expert-g0-r0: ready again after")
            expect(page.locator("#state")).to_have_text("ready")
            assert ask(page).text_content() == oracle(server)[0]


class TestStates:
    def test_loading_is_shown_then_the_key_is_asked_once(self, browser: Browser) -> None:
        keyed = Server("demo", "--api-key", KEY)
        try:
            eventually(lambda: answers(keyed), "the page is served", 120)
            with watched(browser, keyed.url, expected=UNANSWERED) as page:
                boot = page.locator("#boot")
                expect(boot).to_be_visible()
                expect(boot.get_by_role("heading")).to_have_text("The model is starting")
                expect(boot.get_by_role("progressbar")).to_be_visible()
                dialog = page.get_by_role("dialog", name="This server asks for an API key")
                dialog.get_by_label("API key").fill("wrong")
                dialog.get_by_role("button", name="Use it").click()
                expect(dialog).to_contain_text("This key was refused.")
                dialog.get_by_label("API key").fill(KEY)
                dialog.get_by_label("API key").press("Enter")
                expect(dialog).to_be_hidden()
                expect(page.locator("#state")).to_have_text("ready", timeout=120_000)
                expect(boot).to_be_hidden()
                expect(page.locator("tr.one .state.ready")).to_have_count(3)
                assert len(ask(page).text_content() or "") > 20
                expect(dialog).to_be_hidden()
                assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
            keyed.wait_ready().stop()
        finally:
            keyed.kill()

    @pytest.mark.parametrize(
        ("health", "title", "text", "value"),
        [
            ({"state": "starting", "phase": "loading weights"}, "The model is starting", "1.50 GiB of 3.00 GiB", 0.5),
            ({"state": "starting", "phase": "warming up"}, "The model is starting", "1.50 GiB of 3.00 GiB", 0.5),
            ({"state": "failed", "phase": "failed", "error": "no GPU"}, "The cluster failed to start", "no GPU", None),
            ({"state": "recovering", "phase": "restarting front-0"}, "No front serves", "restarting front-0", None),
        ],
    )
    def test_every_state_has_words(
        self, open_page: Open, health: dict[str, Any], title: str, text: str, value: float | None
    ) -> None:
        with open_page(expected=UNANSWERED) as page:
            answer = {"loaded_bytes": 3 * 2**29, "total_bytes": 3 * 2**30, "error": None} | health
            page.route("**/health", lambda route: route.fulfill(status=503, json=answer))
            boot = page.locator("#boot")
            expect(boot.get_by_role("heading")).to_contain_text(title)
            expect(boot.locator("#boot-text")).to_contain_text(text)
            if value is None:
                expect(boot.get_by_role("progressbar")).to_be_hidden()
            else:
                assert boot.get_by_role("progressbar").evaluate("bar => bar.value") == value
                expect(boot.locator("[aria-current=step]")).to_have_text(health["phase"])

    def test_degraded_is_told_without_moving_the_page(self, open_page: Open) -> None:
        with open_page() as page:
            answer = {"state": "degraded", "phase": "restarting expert-g0-r0", "error": None}
            page.route("**/health", lambda route: route.fulfill(json=answer))
            expect(page.get_by_role("status", name="State of the cluster")).to_have_text(
                "degraded it serves, restarting expert-g0-r0"
            )
            expect(page.locator("#boot")).to_be_hidden()
            expect(page.get_by_role("button", name="Send")).to_be_enabled()

    def test_a_hidden_tab_asks_rarely(self, open_page: Open) -> None:
        asked: list[str] = []
        with open_page() as page:
            page.on("request", lambda request: asked.append(request.url))
            page.wait_for_timeout(3000)
            assert len(asked) <= 15
            while len(asked) < 4:  # or the test's time is up
                page.wait_for_timeout(100)
            page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
            page.wait_for_timeout(2500)  # the look that was planned before
            asked.clear()
            page.wait_for_timeout(2500)
            assert asked == []
            with page.expect_request("**/health"):
                page.evaluate("delete document.hidden, document.dispatchEvent(new Event('visibilitychange'))")

    def test_a_silent_server_is_told_and_asked_again(self, open_page: Open) -> None:
        with open_page(expected=UNANSWERED) as page:
            page.context.set_offline(True)
            expect(page.locator("#state")).to_have_text("no answer")
            expect(page.get_by_role("heading", name="The server does not answer")).to_be_visible()
            expect(page.get_by_role("button", name="Send")).to_be_disabled()
            page.context.set_offline(False)
            expect(page.locator("#state")).to_have_text("ready")
            expect(page.locator("#boot")).to_be_hidden()


def answers(server: Server) -> bool:
    assert server.process.poll() is None, server.log
    try:
        return server.get("/").status_code == 200
    except httpx.TransportError:
        return False


def focused(page: Page, what: str) -> str:
    return str(page.evaluate(f"document.activeElement.{what}"))


def tab_until(page: Page, what: str, value: str) -> list[str]:
    """Press Tab until the focus is there; returns its stops, each of which must be seen."""
    stops: list[str] = []
    while focused(page, what) != value:
        page.keyboard.press("Tab")
        stops.append(focused(page, "id") or focused(page, "textContent"))
        assert len(stops) < 40, stops
        assert page.evaluate(OUTLINE) == "solid 2px", stops
    return stops


# A radio button is not painted; its label has the outline.
OUTLINE = """(() => {
    const {outlineStyle, outlineWidth} = getComputedStyle(document.activeElement.closest('label:has([type=radio])')
        ?? document.activeElement)
    return `${outlineStyle} ${outlineWidth}`
})()"""

# Any CSS colour as bytes, by painting it.
RGB = """node => {
    const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
    context.fillStyle = getComputedStyle(node).color
    context.fillRect(0, 0, 1, 1)
    return [...context.getImageData(0, 0, 1, 1).data]
}"""

# [text, contrast] of every visible text that is not disabled, against what is painted behind it.
CONTRASTS = """() => {
    const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
    const paint = colours => {
        context.clearRect(0, 0, 1, 1)
        for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1) }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)
    }
    const light = rgb => rgb.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
    const found = []
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement
        if (!text || !node.checkVisibility() || node.closest('script, :disabled, .unseen, .skip')) continue
        const behind = []
        for (let at = node; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor)
        const back = paint(['Canvas', ...behind])
        const ink = paint(['Canvas', ...behind, getComputedStyle(node).color])
        const [low, high] = [light(back), light(ink)].sort((a, b) => a - b)
        found.push([text, (high + 0.05) / (low + 0.05)])
    }
    return found
}"""


class TestForEveryone:
    @pytest.mark.parametrize("width", [390, 320])
    def test_a_phone_needs_no_horizontal_scrolling(self, open_page: Open, width: int) -> None:
        with open_page(size=(width, 844), has_touch=True, is_mobile=True) as page:
            page.get_by_text("Settings").click()
            ask(page, "An" + "y" * 200)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.get_by_role("button", name="Rebalance…").click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            box = page.get_by_role("dialog").bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width

    def test_all_of_it_by_keyboard(self, open_page: Open) -> None:
        with open_page() as page:
            page.keyboard.press("Tab")
            assert focused(page, "textContent") == "Skip to the chat"
            page.keyboard.press("Enter")
            assert focused(page, "id") == "question"
            page.keyboard.type("What is")
            page.keyboard.press("Shift+Enter")
            page.keyboard.type("a front?")
            assert page.get_by_label("Message").input_value() == "What is\na front?"
            page.keyboard.press("Enter")
            expect(page.locator(".turn.answer")).to_have_attribute("aria-busy", "false")
            assert focused(page, "id") == "question"
            stops = tab_until(page, "getAttribute('role')", "gridcell")
            assert stops[:2] == ["send", "Settings"]
            for pressed, layer, expert in [
                ("ArrowRight", 0, 1),
                ("ArrowDown", 1, 1),
                ("End", 1, 7),
                ("PageDown", 3, 7),
                ("ArrowDown", 3, 7),
                ("Home", 3, 0),
            ]:
                page.keyboard.press(pressed)
                assert focused(page, "ariaLabel").startswith(f"layer {layer}, expert {expert}:")
                expect(page.locator("#readout")).to_contain_text(f"layer {layer}, expert {expert}:")
            tab_until(page, "id", "rebalance")
            page.keyboard.press("Enter")
            expect(page.get_by_role("dialog")).to_be_visible()
            page.keyboard.press("Escape")
            expect(page.get_by_role("dialog")).to_be_hidden()
            assert focused(page, "id") == "rebalance"
            page.keyboard.press("Tab")
            assert focused(page, "ariaLabel") == "One more front"

    def test_the_tokens_of_an_answer_by_keyboard(self, open_page: Open) -> None:
        with open_page() as page:
            answer = ask(page)
            answer.focus()
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            expect(page.locator("#say")).to_have_text(re.compile("^Token “ .+” went to, by layer, 0: "))
            assert page.locator("#map .cell.lit").count() >= 8, "4 layers and 2 experts of each token that came with it"

    def test_everything_has_a_name_and_a_place(self, open_page: Open) -> None:
        with open_page() as page:
            ask(page)
            page.get_by_text("Settings").click()
            tree = page.locator("body").aria_snapshot()
            roles = "button|textbox|radio|checkbox|spinbutton|grid|region|gridcell|columnheader|rowheader|table|log"
            assert re.findall(rf"^\s*- (?:{roles})(?! \")(?=:| \[|$).*", tree, re.MULTILINE) == []
            for part in (
                *("banner", "main", 'region "Chat"', 'region "Load of experts"', 'region "Groups and replicas"'),
                *('log "Conversation"', 'status "State of the cluster"', 'rowheader "layer 3"', "grid"),
            ):
                assert f"- {part}" in tree, part
            assert page.locator("html").get_attribute("lang") == "en"
            ids = page.locator("[id]").evaluate_all("nodes => nodes.map(node => node.id)")
            assert len(ids) == len(set(ids))
            named = page.evaluate(
                "[...document.querySelectorAll('[aria-labelledby], [aria-describedby]')].flatMap(node => "
                "`${node.getAttribute('aria-labelledby') ?? ''} ${node.getAttribute('aria-describedby') ?? ''}`"
                ".split(' ').filter(Boolean))"
            )
            assert set(named) <= set(ids)

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_text_has_contrast(self, open_page: Open, scheme: str) -> None:
        with open_page(color_scheme=scheme, reduced_motion="reduce") as page:
            ask(page)
            page.get_by_text("Settings").click()
            page.get_by_label("this chat").check()
            page.get_by_role("gridcell").nth(9).hover()
            page.get_by_role("button", name="Rebalance…").click()
            found = page.evaluate(CONTRASTS)
            assert len(found) > 60
            assert [(text, round(ratio, 2)) for text, ratio in found if ratio < 4.5] == []

    def test_nothing_moves_for_who_asked_so(self, open_page: Open) -> None:
        with open_page(reduced_motion="reduce") as page:
            endless(page)
            page.get_by_label("Message").fill(QUESTION)
            page.get_by_label("Message").press("Enter")
            page.wait_for_selector(".turn.answer .tok >> nth=5")
            assert page.evaluate("document.getAnimations().length") == 0
            page.keyboard.press("Escape")
            expect(page.locator(".turn.answer")).to_have_attribute("aria-busy", "false")


class TestTheFile:
    def test_it_is_served_with_a_strict_policy(self, server: Server) -> None:
        response = server.get("/")
        assert response.text == PAGE
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy
        for part in ("connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'"):
            assert part in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"

    def test_it_names_no_other_origin_and_no_storage(self) -> None:
        assert set(re.findall(r"https?://[^'\"\s)]+", PAGE)) == {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|localStorage|sessionStorage|document\.cookie|eval\(", PAGE)
