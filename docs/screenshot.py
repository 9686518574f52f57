"""python docs/screenshot.py REPORT: the README's pictures of a report, light and dark, into docs/images.

Needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

IMAGES = Path(__file__).with_name("images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--folder", type=Path, default=IMAGES, help="where the pictures go")
    parser.add_argument("--name", default="report", help="NAME-light.png and NAME-dark.png")
    parser.add_argument("--width", type=int, default=1100)
    parser.add_argument("--height", type=int, default=760, help="0: the whole page")
    parser.add_argument("--entry", type=int, help="place in the answer, 0: the whole; default: its longest token")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument("--hide-scrollbars")
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            for scheme in ("light", "dark"):
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                resize(driver, args.width, args.height or 800)
                driver.get(args.report.resolve().as_uri())
                driver.execute_script("arguments[0].focus()", entry(driver, args.entry))
                if not args.height:
                    tall = driver.execute_script("return document.documentElement.scrollHeight")
                    resize(driver, args.width, tall)
                picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
                picture.save(args.folder / f"{args.name}-{scheme}.png", optimize=True)
        finally:
            driver.quit()


def resize(driver: Any, width: int, height: int) -> None:
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def entry(driver: Any, index: int | None) -> Any:
    """The button of an entry; by default one word of the answer, as a reader would point at it."""
    if index is not None:
        return driver.find_elements(By.CSS_SELECTOR, ".token")[index]
    return max(driver.find_elements(By.CSS_SELECTOR, ".token:not(.whole)"), key=lambda token: len(token.text))


if __name__ == "__main__":
    main()
