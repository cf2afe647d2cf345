"""Takes the README's pictures of the chat page, with the trained demo: python tests/screenshots.py"""

import shutil
import time
from pathlib import Path

from helpers import FLAGS, serving  # puts the repository on the path
from playwright.sync_api import sync_playwright

from web_server import create_app

FOLDER = Path("web/screenshots")
SAMPLE = "左上角大红色星形_中间小黑色三角形_左下角小黑色三角形.png"


def main():
    app = create_app("--demo")
    pause = [0.0]  # before each step of the model: a demo token takes 2 ms, too fast for a picture
    app.chat.model.tok_embeddings.register_forward_pre_hook(lambda *_: time.sleep(pause[0]))
    FOLDER.mkdir(exist_ok=True)
    with serving(app) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)

        def ask(locale, scheme, number):
            """A page on which a sample was picked and one of its questions asked."""
            size = {"width": 900, "height": 760}
            page = browser.new_page(locale=locale, color_scheme=scheme, viewport=size, device_scale_factor=1.5)
            page.goto(address)
            page.locator(f"#samples img[alt='{SAMPLE}']").click()
            page.locator("#chips button").nth(number).click()
            return page

        for locale, look, ending in (("en-US", "What it looked at", ""), ("zh-CN", "它看了哪里", "_zh")):
            pause[0] = 0.3
            page = ask(locale, "light", 0)
            page.locator(".token").nth(6).wait_for()
            page.screenshot(path=FOLDER / f"answering{ending}.png")
            pause[0] = 0.0
            page.close()

            page = ask(locale, "dark", 1)
            page.get_by_role("button", name=look).click()
            page.locator(".heat select").select_option("1")
            page.locator(".token").last.click()
            page.evaluate("window.scrollTo({ top: document.documentElement.scrollHeight })")
            page.wait_for_timeout(600)
            page.screenshot(path=FOLDER / f"looking{ending}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
