"""Takes the README's pictures of the chat page, with the trained demo: python tests/screenshots.py"""

import shutil
import time
from pathlib import Path

import test_web  # puts the repository on the path
from playwright.sync_api import sync_playwright
from test_browser import FLAGS

from web_server import create_app

FOLDER = Path("web/screenshots")
SAMPLE = "左上角大红色星形_中间小黑色三角形_左下角小黑色三角形.png"


def main():
    app = create_app("--demo")
    pause = [0.0]  # before each step of the model: a demo token takes 2 ms, too fast for a picture
    app.chat.model.register_forward_pre_hook(lambda *_: time.sleep(pause[0]))
    FOLDER.mkdir(exist_ok=True)
    with test_web.serving(app) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)

        def begin(locale, scheme):
            """A page on which a sample was picked and its second question answered."""
            size = {"width": 900, "height": 760}
            page = browser.new_page(locale=locale, color_scheme=scheme, viewport=size, device_scale_factor=1.5)
            page.goto(address)
            page.locator(f"#samples img[alt='{SAMPLE}']").click()
            page.locator("#chips button").nth(1).click()
            page.locator(".speed").wait_for()
            return page

        page = begin("zh-CN", "light")
        pause[0] = 0.3
        page.locator("#chips button").first.click()
        page.locator(".token").nth(6).wait_for()
        page.screenshot(path=FOLDER / "answering.png")
        pause[0] = 0.0

        page = begin("en-US", "dark")
        page.locator("#chips button").first.click()
        page.locator(".speed").nth(1).wait_for()
        page.get_by_role("button", name="What it looked at").last.click()
        page.locator(".answer").nth(1).locator(".token").nth(2).click()
        page.wait_for_timeout(600)  # scrolling there
        page.screenshot(path=FOLDER / "looking.png")
        browser.close()


if __name__ == "__main__":
    main()
