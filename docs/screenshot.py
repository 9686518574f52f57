"""python docs/screenshot.py REPORT: the README's pictures of a report, light and dark, into docs/images.

Needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

VIEW = {"width": 1100, "height": 760, "deviceScaleFactor": 1, "mobile": False}
IMAGES = Path(__file__).with_name("images")


def main(report: Path) -> None:
    IMAGES.mkdir(exist_ok=True)
    options = webdriver.ChromeOptions()
    with tempfile.TemporaryDirectory() as profile:
        for argument in ("headless", "no-sandbox", "disable-gpu", "disable-background-networking", "disable-sync"):
            options.add_argument(f"--{argument}")
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument("--hide-scrollbars")
        driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        try:
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", VIEW)
            for scheme in ("light", "dark"):
                media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
                driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
                driver.get(report.resolve().as_uri())
                # One word of the answer, as a reader would point at it; the first entry is the whole answer.
                tokens = driver.find_elements(By.CSS_SELECTOR, ".token")[1:]
                driver.execute_script("arguments[0].focus()", max(tokens, key=lambda token: len(token.text)))
                picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
                picture.save(IMAGES / f"report-{scheme}.png", optimize=True)
        finally:
            driver.quit()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
