"""Takes the README's pictures of the chat page, with the trained demo: python tests/screenshots.py"""

import shutil
import time
from pathlib import Path

from helpers import FLAGS, serving  # puts the repository on the path
from playwright.sync_api import sync_playwright

from web_server import create_app

FOLDER = Path("web/screenshots")
SAMPLE = "green-ring_blue-star_purple-triangle.png"


def main():
    app = create_app("--demo")
    pause = [0.0]  # before each step of the model: a demo token takes 2 ms, too fast for a picture
    app.chat.model.tok_embeddings.register_forward_pre_hook(lambda *_: time.sleep(pause[0]))
    FOLDER.mkdir(exist_ok=True)
    with serving(app) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)

        def ask(locale, scheme, question):
            """A page on which a sample was picked and a question asked."""
            size = {"width": 900, "height": 760}
            page = browser.new_page(locale=locale, color_scheme=scheme, viewport=size, device_scale_factor=1.5)
            page.goto(address)
            page.locator(f"#samples img[alt='{SAMPLE}']").click()
            page.locator("#question").fill(question)
            page.locator("#question").press("Enter")
            return page

        for locale, ending, describe, colour, blue, look in (
            ("en-US", "", "What is in the picture?", "What colour is the star?", "blue", "What it looked at"),
            ("zh-CN", "_zh", "图中有什么？", "星形是什么颜色的？", "蓝色", "它看了哪里"),
        ):
            pause[0] = 0.3
            page = ask(locale, "light", describe)
            page.locator(".token").nth(6).wait_for()
            page.screenshot(path=FOLDER / f"answering{ending}.png")
            pause[0] = 0.0
            page.close()

            page = ask(locale, "dark", colour)
            page.get_by_role("button", name=look).click()
            page.locator(".heat select").select_option("5")
            page.locator(".token").filter(has_text=blue).click()
            page.evaluate("window.scrollTo({ top: document.documentElement.scrollHeight })")
            page.wait_for_timeout(600)
            page.screenshot(path=FOLDER / f"looking{ending}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
