"use strict";

const element = (id) => document.getElementById(id);
const token = document.querySelector("meta[name=review-token]").content;
const DONE = { confirm: "Confirmed", correct: "Corrected", reject: "Rejected", reopen: "Taken back" };
const POLL_MS = 3000;
// The longer side of a picture up to which its pixels are shown as squares rather than as a blur.
const SMALL_PICTURE = 200;

let state = "open";
let list = [];
let current = null; // the item shown, as /api/items/N gives it
let version = null;
let busy = false;
let searching = 0;
const mine = []; // decisions made on this page, for undo: {item, decision}

async function ask(path, options) {
  const reply = await fetch(path, options);
  let content = {};
  try { content = await reply.json(); } catch { /* no JSON: the message below */ }
  if (!reply.ok) {
    const error = new Error(content.error || `the server answered ${reply.status}`);
    error.status = reply.status;
    throw error;
  }
  return content;
}

function post(path, body) {
  const headers = { "X-Review-Token": token };
  if (!(body instanceof FormData)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  return ask(path, { method: "POST", headers, body });
}

function say(text, wrong = false) {
  const status = element("status");
  status.textContent = text;
  status.classList.toggle("wrong", wrong);
}

const failed = (error) => say(error instanceof TypeError ? "The server does not answer; is it still running?" : error.message, true);

// List

async function refresh() {
  const query = new URLSearchParams({ state, search: element("search").value, order: element("order").value });
  const found = await ask(`api/items?${query}`);
  list = found.items;
  version = found.version;
  element("more").hidden = !found.more;
  let all = 0;
  for (const button of element("states").children) {
    const count = found.counts[button.dataset.state];
    if (count !== undefined) all += count;
    button.querySelector("b").textContent = count === undefined ? all : count;
    button.setAttribute("aria-pressed", String(button.dataset.state === state));
  }
  drawList();
}

function drawList() {
  const focused = element("list").contains(document.activeElement) ? document.activeElement.dataset.item : null;
  element("list").replaceChildren(...list.map((item) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.item = item.id;
    const asked = document.createElement("span");
    asked.className = "asked";
    asked.textContent = `${item.id} · ${item.question}`;
    const said = document.createElement("span");
    said.className = "said";
    const answer = document.createElement(item.state === "correct" || item.state === "reject" ? "s" : "b");
    answer.textContent = item.answer || "(empty)";
    said.append(answer, item.corrected ? ` ${item.corrected}` : "");
    button.append(asked, said);
    if (item.state !== "open") {
      const by = document.createElement("span");
      by.className = "asked";
      by.textContent = DONE[item.state] + (item.reviewer ? ` by ${item.reviewer}` : "");
      button.append(by);
    }
    button.addEventListener("click", () => show(item.id).catch(failed));
    const entry = document.createElement("li");
    entry.append(button);
    return entry;
  }));
  markCurrent();
  if (focused) element("list").querySelector(`[data-item="${focused}"]`)?.focus({ preventScroll: true });
}

function markCurrent() {
  for (const button of element("list").querySelectorAll("button")) {
    const here = current !== null && Number(button.dataset.item) === current.id;
    if (here) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
    if (here && element("list").scrollHeight > element("list").clientHeight) button.scrollIntoView({ block: "nearest" });
  }
  const index = place();
  element("previous").disabled = index <= 0 && !(index < 0 && list.length);
  element("next").disabled = index >= list.length - 1;
}

const place = () => (current === null ? -1 : list.findIndex((item) => item.id === current.id));

// Item

async function show(id) {
  const item = await ask(`api/items/${id}`);
  if (current === null || current.id !== item.id) leaveEdit(false);
  current = item;
  drawItem();
  markCurrent();
  history.replaceState(null, "", `#${id}`);
}

function showNothing() {
  current = null;
  element("item").hidden = true;
  element("nothing").hidden = false;
  element("nothing").textContent = {
    open: "Nothing is open. All looked at.", confirm: "Nothing confirmed yet.", correct: "Nothing corrected yet.",
    reject: "Nothing rejected yet.", all: "The queue is empty.",
  }[state];
  if (element("search").value) element("nothing").textContent = "Nothing found.";
  history.replaceState(null, "", location.pathname);
  markCurrent();
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function drawItem() {
  const item = current;
  element("item").hidden = false;
  element("nothing").hidden = true;
  element("item").setAttribute("aria-label", `Item ${item.id}`);
  const frame = element("frame");
  const picture = `items/${item.id}/picture.png`;
  if (element("picture").getAttribute("src") !== picture) {
    element("picture").src = picture;
    element("picture").width = item.width;
    element("picture").height = item.height;
    element("picture").alt = `The picture of: ${item.question}`;
    frame.style.setProperty("--ratio", item.width / item.height);
    frame.classList.toggle("small", Math.max(item.width, item.height) < SMALL_PICTURE);
    element("map").hidden = !item.has_map;
    if (item.has_map) element("map").src = `items/${item.id}/map.png`;
    else element("map").removeAttribute("src");
    element("controls").hidden = !item.has_map;
  }
  element("number").textContent = `Item ${item.id}`;
  element("state").textContent = item.state === "open" ? "· open" : `· ${DONE[item.state].toLowerCase()}`;
  element("question").textContent = item.question;
  element("answer").textContent = item.answer || "(empty)";
  element("answer").classList.toggle("wrong-answer", item.state === "correct" || item.state === "reject");
  const decided = element("decided");
  decided.hidden = item.state === "open";
  if (!decided.hidden) {
    const by = item.reviewer ? ` by ${item.reviewer}` : "";
    const at = new Date(item.decided).toLocaleString();
    const answer = item.corrected ? `: ${item.corrected}` : "";
    decided.textContent = `${DONE[item.state]}${by}, ${at}${answer}` + (item.note ? `\n${item.note}` : "");
  }
  element("reason").textContent = item.reason || "No policy has judged it.";
  const facts = [
    ...item.facts,
    ["Chance of being right", item.score === null ? "–" : percent(item.score)],
    ["Queued", new Date(item.created).toLocaleString()],
    ["Model", item.model_name || "–"],
    ["Sample", item.sample_id || "–"],
  ];
  element("facts").replaceChildren(...facts.map(([name, value]) => {
    const row = document.createElement("div");
    const term = document.createElement("dt");
    const text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    row.append(term, text);
    return row;
  }));
  element("actions").querySelector("[data-verdict=undo]").disabled = !mine.length && item.state === "open";
  document.body.dataset.item = item.id;
}

async function move(step) {
  if (!list.length) return;
  const index = place();
  // An item that has left the list: its place is where the first later one is now.
  const from = index >= 0 ? index : list.findIndex((item) => current !== null && item.id > current.id) - (step > 0 ? 1 : 0);
  const to = Math.min(Math.max(from + step, 0), list.length - 1);
  if (list[to].id === current?.id) {
    say(step > 0 ? "This is the last one." : "This is the first one.");
    return;
  }
  const inList = element("list").contains(document.activeElement);
  await show(list[to].id);
  say(`Item ${to + 1} of ${list.length}: ${current.question}`);
  if (inList) element("list").querySelector("[aria-current]")?.focus();
}

// Decisions

async function decide(verdict, answer) {
  if (busy || current === null) return;
  busy = true;
  const item = current;
  const index = place();
  try {
    const body = { verdict, seen: item.decision, note: element("note").value, reviewer: element("reviewer").value };
    if (answer !== undefined) body.answer = answer;
    const { decision } = await post(`api/items/${item.id}/decisions`, body);
    mine.push({ item: item.id, decision });
    element("note").value = "";
    leaveEdit(true);
    await refresh();
    const following = list.find((other, at) => at >= Math.max(index, 0) && other.id !== item.id && (state !== "all" || other.state === "open"))
      || list.find((other) => other.id !== item.id && (state !== "all" || other.state === "open"));
    if (state !== "open" && state !== "all") await show(item.id);
    else if (following) await show(following.id);
    else if (state === "all") await show(item.id);
    else showNothing();
    keepFocus();
    say(`${DONE[verdict]}: item ${item.id}. ` + (state === "open" ? `${list.length} open.` : ""));
  } catch (error) {
    if (error.status === 409) {
      await show(item.id);
      await refresh();
    }
    failed(error);
  } finally {
    busy = false;
  }
}

async function undo() {
  if (busy) return;
  const last = mine.at(-1) || (current !== null && current.state !== "open" ? { item: current.id, decision: current.decision } : null);
  if (last === null) return say("There is nothing to undo.");
  busy = true;
  try {
    await post(`api/items/${last.item}/decisions`, { verdict: "reopen", seen: last.decision, reviewer: element("reviewer").value });
    mine.pop();
    await refresh();
    await show(last.item);
    keepFocus();
    say(`Taken back: item ${last.item} is open again.`);
  } catch (error) {
    if (error.status === 409) {
      mine.pop();
      await show(last.item);
    }
    failed(error);
  } finally {
    busy = false;
  }
}

// A control that has just vanished or been disabled must not send the focus back to the top of the page.
function keepFocus() {
  const at = document.activeElement;
  if (at && at !== document.body && !at.disabled && at.offsetParent !== null) return;
  (element("item").hidden ? element("nothing") : element("item")).focus({ preventScroll: true });
}

function startEdit() {
  if (current === null) return;
  element("edit").hidden = false;
  element("right-answer").value = current.corrected || current.answer;
  element("right-answer").focus();
  element("right-answer").select();
  element("edit").scrollIntoView({ block: "nearest" });
}

function leaveEdit(refocus) {
  if (element("edit").hidden) return;
  const inside = element("edit").contains(document.activeElement);
  element("edit").hidden = true;
  if (inside && refocus) element("item").focus({ preventScroll: true });
}

// What others do meanwhile

async function poll() {
  if (document.hidden || busy) return;
  try {
    const found = await ask("api/version");
    if (version !== null && found.version.join() !== version.join() && !busy) await catchUp();
  } catch { /* said when something is asked for */ }
}

async function catchUp() {
  await refresh();
  if (current === null) {
    if (list.length) await show(list[0].id);
    return;
  }
  const before = current;
  const now = await ask(`api/items/${before.id}`);
  if (current !== before || now.decision === before.decision) return;
  current = now;
  drawItem();
  markCurrent();
  const by = now.reviewer ? ` by ${now.reviewer}` : "";
  say(now.state === "open" ? `Taken back meanwhile${by}.` : `${DONE[now.state]} meanwhile${by}.`);
}

// Events

async function relist() {
  const asked = ++searching;
  await refresh();
  if (asked !== searching) return;
  if (place() >= 0) return;
  if (list.length) await show(list[0].id);
  else showNothing();
}

for (const button of element("states").children) {
  button.addEventListener("click", () => {
    state = button.dataset.state;
    relist().then(() => say(`${list.length} listed.`)).catch(failed);
  });
}
for (const [id, event] of [["search", "input"], ["order", "change"]]) {
  element(id).addEventListener(event, () => relist().catch(failed));
}
element("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === "Escape") element("item").focus({ preventScroll: true });
});
for (const button of element("actions").children) {
  button.addEventListener("click", () => act(button.dataset.verdict));
}
element("previous").addEventListener("click", () => move(-1).catch(failed));
element("next").addEventListener("click", () => move(1).catch(failed));
element("opacity").addEventListener("input", () => { element("map").style.opacity = element("opacity").value / 100; });
element("map").style.opacity = element("opacity").value / 100;
element("cancel").addEventListener("click", () => leaveEdit(true));
element("edit").addEventListener("submit", (event) => {
  event.preventDefault();
  decide("correct", element("right-answer").value);
});
element("right-answer").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    decide("correct", element("right-answer").value);
  } else if (event.key === "Escape") leaveEdit(true);
});
element("note").addEventListener("keydown", (event) => {
  if (event.key === "Enter" || event.key === "Escape") element("item").focus({ preventScroll: true });
});

try { element("reviewer").value = localStorage.getItem("reviewer") || ""; } catch { /* storage is off */ }
element("reviewer").addEventListener("change", () => {
  try { localStorage.setItem("reviewer", element("reviewer").value); } catch { /* storage is off */ }
});

element("open-help").addEventListener("click", () => element("help").showModal());
element("open-add").addEventListener("click", () => element("add").showModal());
element("close-add").addEventListener("click", () => element("add").close());
element("add-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  element("add-error").textContent = "";
  try {
    const found = await post("items", new FormData(event.target));
    event.target.reset();
    element("add").close();
    await refresh();
    await show(found.id);
    say(found.new ? `Added: item ${found.id}.` : `It is in the queue already: item ${found.id}.`);
  } catch (error) {
    element("add-error").textContent = error.message;
  }
});

function act(verdict) {
  if (verdict === "undo") undo();
  else if (verdict === "correct") startEdit();
  else decide(verdict);
}

function toggleMap() {
  const slider = element("opacity");
  if (Number(slider.value)) {
    slider.dataset.before = slider.value;
    slider.value = 0;
  } else slider.value = slider.dataset.before || 70;
  slider.dispatchEvent(new Event("input"));
}

const KEYS = {
  y: () => act("confirm"),
  c: () => act("correct"),
  n: () => act("reject"),
  u: () => act("undo"),
  j: () => move(1).catch(failed),
  ArrowDown: () => move(1).catch(failed),
  ArrowRight: () => move(1).catch(failed),
  k: () => move(-1).catch(failed),
  ArrowUp: () => move(-1).catch(failed),
  ArrowLeft: () => move(-1).catch(failed),
  m: toggleMap,
  "/": () => element("search").focus(),
  "?": () => element("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat && !/^Arrow|^[jk]$/.test(event.key)) return;
  if (document.querySelector("dialog[open]")) return;
  const at = event.target;
  const writes = at.matches("textarea, select, input:not([type=range])");
  if (writes || (at.matches("input[type=range]") && event.key.startsWith("Arrow"))) return;
  const known = KEYS[event.key];
  if (known === undefined) return;
  event.preventDefault();
  known();
});

(async () => {
  try {
    await refresh();
    const wanted = Number(location.hash.slice(1));
    if (Number.isInteger(wanted) && wanted > 0) await show(wanted).catch(failed);
    if (current === null) {
      if (list.length) await show(list[0].id);
      else showNothing();
    }
    element("item").hidden || element("item").focus({ preventScroll: true });
  } catch (error) {
    failed(error);
  }
  document.body.dataset.ready = "true";
  setInterval(poll, POLL_MS);
})();
