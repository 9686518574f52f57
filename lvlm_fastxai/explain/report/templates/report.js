"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  // Entry 0: the whole answer; then, where there is one, another method's; then one per token. So are the buttons.
  const entries = data.entries;
  const firstToken = entries.findIndex((entry) => entry.kind === "token");
  const anchors = data.anchors.map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const byId = (id) => document.getElementById(id);
  const buttons = Array.from(document.querySelectorAll(".token"));
  const weights = byId("weights"); // a row per token; absent for a method that weights none
  const rows = weights ? Array.from(weights.querySelectorAll("tbody tr")) : [];
  const picks = rows.map((row) => row.querySelector("button"));
  const words = Array.from(document.querySelectorAll(".words li"));
  const canvases = Array.from(document.querySelectorAll(".frame canvas"));
  const opacity = byId("opacity");
  const grid = byId("grid");
  const common = byId("common");
  const readout = byId("readout");
  const restingText = readout.textContent;

  let chosen = 0; // pinned by click, tap or keyboard
  let shown = 0; // what is drawn: the hovered token, else the chosen one

  const largest = (list) => list.reduce((most, value) => Math.max(most, value), 0);

  // One power of ten for all values of a kind, so that they can be compared at a glance.
  const unitOf = (maxima) => {
    const most = largest(maxima);
    return most > 0 ? Math.floor(Math.log10(most)) : 0;
  };
  const inUnit = (value, unit) => (value / 10 ** unit).toFixed(2);
  const unitText = (unit) => (unit === 0 ? "" : "\u202f\u00d7\u202f10" + String(unit).replace(/./g, (sign) => superscripts[sign]));
  const superscripts = { "-": "\u207b", 0: "\u2070", 1: "\u00b9", 2: "\u00b2", 3: "\u00b3", 4: "\u2074", 5: "\u2075", 6: "\u2076",
    7: "\u2077", 8: "\u2078", 9: "\u2079" };
  const percent = (share) => (100 * share).toFixed(1) + "\u202f%";

  const colour = (value) => {
    const place = Math.min(1, Math.max(0, value)) * (anchors.length - 1);
    const low = Math.min(Math.floor(place), anchors.length - 2);
    return anchors[low].map((part, channel) => part + (place - low) * (anchors[low + 1][channel] - part));
  };
  const alpha = (value) => data.floor + (1 - data.floor) * Math.min(1, Math.max(0, value));

  const imageMaxima = entries.map((entry) => largest(entry.maps.map(largest)));
  const wordMaxima = entries.map((entry) => largest(entry.words));
  // Another method's values have a unit and a scale of their own.
  const alike = (maxima) => {
    const compared = entries[shown].kind === "comparison";
    return maxima.filter((_, index) => (entries[index].kind === "comparison") === compared);
  };
  const imageUnit = () => unitOf(alike(imageMaxima));
  const wordUnit = () => unitOf(alike(wordMaxima));
  const scaleOf = (maxima) => (common.checked ? largest(alike(maxima)) : maxima[shown]);

  // Catmull–Rom weights between cell centres, as in colormap.py.
  const weightsFor = (cells, pixels) => Array.from({ length: pixels }, (_, pixel) => {
    const place = ((pixel + 0.5) * cells) / pixels - 0.5;
    const base = Math.floor(place);
    const t = place - base;
    const taps = [-0.5 * t + t * t - 0.5 * t ** 3, 1 - 2.5 * t * t + 1.5 * t ** 3,
      0.5 * t + 2 * t * t - 1.5 * t ** 3, -0.5 * t * t + 0.5 * t ** 3];
    return taps.map((weight, tap) => [Math.min(cells - 1, Math.max(0, base + tap - 1)), weight]);
  });
  const smooth = (values, rows, columns, height, width) => {
    const across = weightsFor(columns, width);
    const down = weightsFor(rows, height);
    const top = largest(values);
    const bottom = values.reduce((least, value) => Math.min(least, value), Infinity);
    const middle = new Float32Array(rows * width);
    for (let row = 0; row < rows; row++) {
      for (let x = 0; x < width; x++) {
        for (const [cell, weight] of across[x]) middle[row * width + x] += weight * values[row * columns + cell];
      }
    }
    const drawn = new Float32Array(height * width);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        let sum = 0;
        for (const [cell, weight] of down[y]) sum += weight * middle[cell * width + x];
        drawn[y * width + x] = Math.min(top, Math.max(bottom, sum));
      }
    }
    return drawn;
  };

  const paintMap = (canvas, index) => {
    const image = data.images[index];
    const values = entries[shown].maps[index];
    if (!values) return;
    const [rows, columns] = image.grid;
    const [left, top, right, bottom] = image.region;
    const raw = grid.checked;
    const detail = raw ? 1 : Math.max(2, Math.ceil(320 / Math.max(rows, columns)));
    const height = rows * detail;
    const width = columns * detail;
    const drawn = raw ? values : smooth(values, rows, columns, height, width);
    const scale = scaleOf(imageMaxima) || 1;
    const strength = Number(opacity.value) / 100;
    const tile = document.createElement("canvas");
    tile.width = width;
    tile.height = height;
    const pixels = new ImageData(width, height);
    for (let at = 0; at < drawn.length; at++) {
      const share = drawn[at] / scale;
      const [red, green, blue] = colour(share);
      pixels.data.set([red, green, blue, 255 * strength * alpha(share)], 4 * at);
    }
    tile.getContext("2d").putImageData(pixels, 0, 0);
    canvas.width = 2 * Math.round(image.drawn[0]);
    canvas.height = 2 * Math.round(image.drawn[1]);
    const stretchX = canvas.width / image.size[0];
    const stretchY = canvas.height / image.size[1];
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = !raw;
    pen.drawImage(tile, left * stretchX, top * stretchY, (right - left) * stretchX, (bottom - top) * stretchY);
  };

  const paintLegend = () => {
    const canvas = byId("scale");
    canvas.width = 256;
    canvas.height = 1;
    const pixels = new ImageData(256, 1);
    for (let at = 0; at < 256; at++) pixels.data.set([...colour(at / 255), 255], 4 * at);
    canvas.getContext("2d").putImageData(pixels, 0, 0);
  };

  const parts = ["image", "question", "template", "answer"];
  const paint = () => {
    const entry = entries[shown];
    canvases.forEach(paintMap);
    byId("most").textContent = inUnit(scaleOf(imageMaxima), imageUnit()) + unitText(imageUnit());
    const scale = scaleOf(wordMaxima) || 1;
    const unit = wordUnit();
    if (words.length) byId("word-unit").textContent = "relevancy" + (unit ? "," + unitText(unit) : "");
    words.forEach((word, index) => {
      const value = entry.words[index];
      const share = Math.min(1, Math.max(0, value / scale));
      // 0.5 at most: the text keeps a contrast above 4.5:1 on the tint in both themes.
      word.style.backgroundColor = "rgba(226, 104, 22, " + (0.5 * share).toFixed(3) + ")";
      word.dataset.value = String(value);
      word.querySelector("small").textContent = inUnit(value, unit);
    });
    buttons.forEach((button, index) => {
      button.classList.toggle("shown", index === shown);
      button.setAttribute("aria-checked", String(index === chosen));
      button.tabIndex = index === chosen ? 0 : -1;
    });
    rows.forEach((row, at) => {
      const index = firstToken + at;
      row.classList.toggle("shown", index === shown);
      row.classList.toggle("picked", index === chosen);
      if (index === chosen) picks[at].setAttribute("aria-current", "true");
      else picks[at].removeAttribute("aria-current");
      picks[at].tabIndex = index === Math.max(chosen, firstToken) ? 0 : -1;
    });
    const shares = entry.shares; // null for another method's, and for a head's
    const total = (shares && parts.reduce((sum, part) => sum + shares[part], 0)) || 1;
    parts.forEach((part) => {
      byId("bar-" + part).style.flexBasis = (shares ? (100 * shares[part]) / total : 0).toFixed(2) + "%";
      byId("share-" + part).textContent = shares ? percent(shares[part] / total) : "\u2013";
    });
    byId("chosen-text").textContent = {
      whole: "Whole answer", comparison: "Whole answer by " + entry.label, token: "\u201c" + entry.label + "\u201d",
    }[entry.kind];
    byId("chosen-probability").textContent = {
      whole: "confidence " + percent(entry.probability), comparison: "no sums by part",
      token: "probability " + percent(entry.probability),
    }[entry.kind];
    for (const element of document.querySelectorAll("[data-when]")) element.hidden = element.dataset.when !== entry.kind;
    document.body.dataset.shown = String(shown);
  };
  const announce = () => {
    byId("live").textContent = byId("chosen-text").textContent + ", " + byId("chosen-probability").textContent +
      (entries[shown].shares ? ", " + byId("share-image").textContent + " of its relevancy in the image" : "");
  };

  // Scrolls the table and nothing else, so far that the token's row is in sight below the table's head.
  const reveal = (index) => {
    const row = rows[index - firstToken];
    if (!row) return;
    const top = row.offsetTop - weights.querySelector("thead").offsetHeight;
    const bottom = row.offsetTop + row.offsetHeight - weights.clientHeight;
    weights.scrollTop = Math.min(top, Math.max(bottom, weights.scrollTop));
  };

  const show = (index) => {
    if (index !== shown) {
      shown = index;
      paint();
    }
  };
  const choose = (index, focus) => {
    chosen = index;
    shown = index;
    paint();
    reveal(index);
    if (focus) buttons[index].focus();
    announce();
  };

  buttons.forEach((button, index) => {
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "mouse") return;
      show(index);
      reveal(index);
    });
    button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(chosen));
    button.addEventListener("focus", () => index !== chosen && choose(index, false));
    button.addEventListener("click", () => choose(index, true));
  });
  byId("tokens").addEventListener("keydown", (event) => {
    const last = buttons.length - 1;
    const target = { ArrowRight: chosen + 1, ArrowDown: chosen + 1, ArrowLeft: chosen - 1, ArrowUp: chosen - 1, Home: 0, End: last };
    if (!(event.key in target)) return;
    event.preventDefault();
    choose((target[event.key] + buttons.length) % buttons.length, true);
  });
  rows.forEach((row, at) => {
    const index = firstToken + at;
    // Pointing at a row does not scroll: the next row would come under the pointer.
    row.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(index));
    row.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(chosen));
    row.addEventListener("click", () => choose(index, false));
    row.addEventListener("keydown", (event) => {
      const target = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: rows.length - 1 }[event.key];
      if (target === undefined) return;
      event.preventDefault();
      if (!rows[target]) return;
      choose(firstToken + target, false);
      picks[target].focus({ preventScroll: true });
    });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") choose(0, buttons.includes(document.activeElement));
  });
  [opacity, grid, common].forEach((control) => control.addEventListener("input", paint));

  for (const picture of document.querySelectorAll(".frame img")) {
    picture.parentElement.style.setProperty("--ratio", String(picture.getAttribute("width") / picture.getAttribute("height")));
  }
  canvases.forEach((canvas, index) => {
    const read = (event) => {
      const image = data.images[index];
      const box = canvas.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * image.size[0];
      const y = ((event.clientY - box.top) / box.height) * image.size[1];
      const [left, top, right, bottom] = image.region;
      const column = Math.floor(((x - left) / (right - left)) * image.grid[1]);
      const row = Math.floor(((y - top) / (bottom - top)) * image.grid[0]);
      const inside = row >= 0 && column >= 0 && row < image.grid[0] && column < image.grid[1];
      readout.textContent = inside
        ? "Row " + (row + 1) + ", column " + (column + 1) + ": " + inUnit(entries[shown].maps[index][row * image.grid[1] + column], imageUnit()) +
            unitText(imageUnit())
        : "Outside what the model saw";
    };
    canvas.addEventListener("pointermove", read);
    canvas.addEventListener("pointerdown", read);
    canvas.addEventListener("pointerleave", () => { readout.textContent = restingText; });
  });

  paintLegend();
  paint();
  document.body.dataset.ready = "true";
})();
