"""Writes docs/images/page-*.png from the live demo model: `python -m tests.e2e.page_screenshots`."""

from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.e2e.browser import CHROMIUM_FLAGS, chromium
from tests.e2e.servers import Server, eventually, serving

IMAGES = Path(__file__).parents[2] / "docs/images"
QUESTIONS = [
    "What is a front?",
    "How does dispatch work?",
    "What happens when an expert replica dies?",
    "What is a lane?",
    "How do I scale a group?",
    "What is the supervisor?",
]


def open_page(browser: Browser, server: Server, scheme: str, width: int, height: int) -> Page:
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
        device_scale_factor=1.5 if width < 600 else 1,
        is_mobile=width < 600,
    )
    page.goto(server.url)
    expect(page.locator("#state")).to_have_text("ready")
    return page


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_timeout(300)


def shoot(page: Page, name: str, full: bool = False) -> None:
    page.wait_for_timeout(1500)
    page.screenshot(path=IMAGES / f"{name}.png", full_page=full)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with serving("demo", "--served-model-name", "demo") as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CHROMIUM_FLAGS)
        page = open_page(browser, server, "light", 1360, 900)
        page.get_by_role("button", name="One more replica of group 1").click()
        for question in QUESTIONS[:2]:
            ask(page, question)
        eventually(lambda: len(server.get("/v1/cluster").json()["replicas"]) == 3, "a third replica", 60)
        expect(page.locator(".one .state.ready")).to_have_count(4, timeout=60_000)
        for question in QUESTIONS[2:4]:
            ask(page, question)
        page.hover(".cell >> nth=10")
        shoot(page, "page-light")
        page = open_page(browser, server, "dark", 1360, 900)
        for question in QUESTIONS[4:]:
            ask(page, question)
        page.get_by_label("this chat").check()
        page.locator(".turn.answer").last.locator(".tok").nth(6).hover()
        shoot(page, "page-dark")
        page = open_page(browser, server, "light", 390, 844)
        ask(page, QUESTIONS[0])
        shoot(page, "page-phone", full=True)
        browser.close()


if __name__ == "__main__":
    main()
