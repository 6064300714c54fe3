// The live view of a run. One ES module: no bundler, nothing from outside, text only through textContent.
// The traits of LiveWidget (live_widget.py) are the whole contract; hover and log scale are state of this page only.

const SVG = "http://www.w3.org/2000/svg";
const ACTIVE_WORDS = { queued: "queued", starting: "starting", running: "running", stopping: "stopping" };
const HEIGHT = 132;
const LABEL_CHAR = 6.2; // pixels of a character beside an axis
const MARGIN = { right: 10, top: 8, bottom: 20 };
const TAIL_CHARS = 10; // at most; a name is told from others by its end

// --- numbers as people read them (the same rules as numerals.py) ---

export function formatNumber(value, digits = 4) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "not finite";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e7 || size < 1e-4) {
    const [mantissa, exponent] = value.toExponential(digits - 2).split("e");
    const short = mantissa.includes(".") ? mantissa.replace(/\.?0+$/, "") : mantissa;
    return `${short}e${Number(exponent)}`;
  }
  const decimals = Number.isInteger(value) ? 0 : Math.max(0, digits - 1 - Math.floor(Math.log10(size)));
  return value.toLocaleString("en-US", { maximumFractionDigits: decimals });
}

export function formatDuration(seconds) {
  if (seconds < 9.95) return `${Math.max(0, seconds).toFixed(1)} s`;
  const whole = Math.round(seconds);
  for (const [size, unit, smaller, name] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole >= size) {
      const rest = Math.floor((whole % size) / smaller);
      return `${Math.floor(whole / size)} ${unit}${rest ? ` ${rest} ${name}` : ""}`;
    }
  }
  return `${whole} s`;
}

// --- elements ---

function node(parent, tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}

function draw(parent, tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  parent.append(element);
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// A name that is shortened in its middle where it does not fit.
function setName(element, name) {
  if (element.title === name && element.childElementCount) return;
  element.title = name;
  element.replaceChildren();
  const tail = name.length > TAIL_CHARS ? Math.min(TAIL_CHARS, name.length >> 1) : 0;
  node(element, "span", "llmc-name-head", name.slice(0, name.length - tail));
  if (tail) node(element, "span", "llmc-name-tail", name.slice(-tail));
}

// --- the server ---

function pageConfig() {
  const element = document.getElementById("jupyter-config-data");
  if (!element) return null;
  try {
    return JSON.parse(element.textContent);
  } catch {
    return null;
  }
}

function cookie(name) {
  const found = document.cookie.split("; ").find((part) => part.startsWith(`${name}=`));
  return found ? decodeURIComponent(found.slice(name.length + 1)) : "";
}

// What the kernel cannot hear while it runs the cell goes through the server.
// The JSON of the answer; null when there is no server behind this page, or it refuses.
async function ask(method, path, content = {}) {
  const config = pageConfig();
  if (!config) return null;
  const base = (config.baseUrl || "/").replace(/\/?$/, "/");
  const headers = { "Content-Type": "application/json" };
  const xsrf = cookie("_xsrf");
  if (xsrf) headers["X-XSRFToken"] = xsrf;
  if (config.token) headers.Authorization = `token ${config.token}`;
  try {
    const body = method === "GET" ? undefined : JSON.stringify(content);
    const answer = await fetch(`${base}llmcloud/api/${path}`, { method, headers, body, credentials: "same-origin" });
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

const runPath = (runId) => `runs/${encodeURIComponent(runId)}`;

// --- stopping ---

function stopButton(model, parent, hint) {
  const button = node(parent, "button", "llmc-stop", "Stop");
  button.type = "button";
  let presses = 0;
  const show = () => {
    const run = model.get("run");
    if (!run.active) presses = 0;
    button.disabled = !run.active;
    button.hidden = !run.active;
    const stopping = presses > 0 || run.state === "stopping";
    setText(button, stopping ? (presses > 1 ? "Forcing…" : "Stopping…") : "Stop");
    const label = stopping ? `Stopping ${run.name}; press again to force it` : `Stop ${run.name}`;
    button.title = label;
    button.setAttribute("aria-label", label);
    button.classList.toggle("llmc-stopping", stopping);
  };
  button.addEventListener("click", async () => {
    presses += 1;
    show();
    const reached = await ask("POST", `${runPath(model.get("run").id)}/stop`);
    if (!reached) {
      model.send({ type: "stop" });
      setText(hint, "Asked the kernel to stop. If nothing happens, use the notebook's own Stop button.");
    }
  });
  return show;
}

// --- a kernel that has gone: the run goes on without it, and the server knows how ---

const ASK_EVERY_MS = 2000;
const GONE = "The kernel of this cell has gone; the run goes on without it.";
const ENDED = "The run has ended without the kernel of this cell.";

function goOnWithoutKernel(model, card) {
  const line = node(card, "div", "llmc-hint");
  line.setAttribute("role", "status");
  let timer = null;
  const show = async () => {
    const run = model.get("run");
    const told = await ask("GET", runPath(run.id));
    const state = told ? told.state : run.state;
    const active = state in ACTIVE_WORDS;
    setText(line, `${active ? GONE : ENDED} %runs attach ${run.id} shows all of it.`);
    if (state !== run.state || active !== run.active) model.set("run", { ...run, state, active });
    if (active) return;
    clearInterval(timer);
    if (!told) return;
    model.set("elapsed", Math.max(0, told.ended - told.created));
    const last = state === "finished" ? "done" : state;
    model.set("ranks", model.get("ranks").map((rank) => (rank.state === "running" ? { ...rank, state: last } : rank)));
  };
  const begin = () => {
    if (timer !== null || !model.get("run").active) return;
    timer = setInterval(show, ASK_EVERY_MS);
    show();
  };
  model.on("comm_live_update", begin); // the front end has lost its kernel
  return () => {
    model.off("comm_live_update", begin);
    clearInterval(timer);
  };
}

// --- header, progress, ranks ---

function header(model, card) {
  const row = node(card, "div", "llmc-header");
  const dot = node(row, "span", "llmc-dot");
  const name = node(row, "span", "llmc-name");
  const state = node(row, "span", "llmc-state");
  state.setAttribute("role", "status");
  const clock = node(row, "span", "llmc-clock");
  const hint = node(card, "div", "llmc-hint");
  const showStop = stopButton(model, row, hint);
  let heard = { elapsed: model.get("elapsed"), at: performance.now() };
  const tick = () => {
    const since = model.get("run").active ? (performance.now() - heard.at) / 1000 : 0;
    const elapsed = heard.elapsed + since;
    setText(clock, elapsed < 9.95 ? `${Math.floor(elapsed)} s` : formatDuration(elapsed));
  };
  return {
    tick,
    hear() {
      heard = { elapsed: model.get("elapsed"), at: performance.now() };
      tick();
    },
    show() {
      const run = model.get("run");
      setName(name, run.name);
      setText(state, ACTIVE_WORDS[run.state] ?? run.state);
      dot.dataset.state = run.state;
      if (!run.active) setText(hint, "");
      showStop();
      tick();
    },
  };
}

function notice(model, card) {
  const line = node(card, "div", "llmc-notice");
  line.setAttribute("role", "alert");
  return () => {
    const text = model.get("notice");
    setText(line, text ? `⚠ ${text}` : "");
    line.hidden = !text;
  };
}

function barWords(bar) {
  const words = [];
  const done = formatNumber(bar.done);
  words.push(bar.total ? `${done} of ${formatNumber(bar.total)}` : done);
  if (bar.waits) return [...words, bar.waits].join(" · ");
  if (bar.rate) words.push(bar.rate >= 1 ? `${formatNumber(bar.rate, 3)} per s` : `${formatNumber(1 / bar.rate, 3)} s each`);
  if (bar.eta !== null && bar.fraction < 1) words.push(`${formatDuration(Math.round(bar.eta))} left`);
  return words.join(" · ").replace(".0 s left", " s left");
}

function progress(model, card) {
  const host = node(card, "div", "llmc-progress");
  const rows = [];
  const addRow = () => {
    const row = node(host, "div", "llmc-bar-row");
    const words = node(row, "div", "llmc-bar-words");
    const percent = node(words, "span", "llmc-percent");
    const desc = node(words, "span", "llmc-desc");
    const facts = node(words, "span", "llmc-facts");
    const track = node(row, "div", "llmc-track");
    track.setAttribute("role", "progressbar");
    track.setAttribute("aria-valuemin", "0");
    track.setAttribute("aria-valuemax", "100");
    return { row, percent, desc, facts, track, fill: node(track, "div", "llmc-fill") };
  };
  return () => {
    const bars = model.get("progress");
    while (rows.length < bars.length) rows.push(addRow());
    while (rows.length > bars.length) rows.pop().row.remove();
    bars.forEach((bar, at) => {
      const { percent, desc, facts, track, fill } = rows[at];
      const share = bar.fraction === null ? null : bar.fraction * 100;
      setText(percent, share === null ? "" : `${Math.floor(share)} %`);
      setText(desc, bar.desc);
      setText(facts, barWords(bar));
      track.setAttribute("aria-label", bar.desc || "progress");
      if (share === null) track.removeAttribute("aria-valuenow");
      else track.setAttribute("aria-valuenow", share.toFixed(0));
      track.classList.toggle("llmc-unknown", share === null);
      fill.style.width = share === null ? "" : `${share}%`;
    });
  };
}

function ranks(model, card) {
  const host = node(card, "ul", "llmc-ranks");
  host.setAttribute("aria-label", "ranks");
  return () => {
    const chips = model.get("ranks").map((rank) => {
      const chip = node(null, "li", "llmc-chip");
      chip.dataset.state = rank.state;
      node(chip, "span", "llmc-chip-dot");
      node(chip, "span", "", rank.label);
      node(chip, "span", "llmc-chip-state", rank.state);
      if (rank.detail) chip.title = rank.detail;
      return chip;
    });
    host.replaceChildren(...chips);
  };
}

// --- a chart ---

class Chart {
  constructor(host, name, color, shared) {
    this.shared = shared;
    this.name = name;
    this.chart = null;
    this.latest = undefined;
    this.card = node(host, "figure", "llmc-chart");
    this.card.style.setProperty("--llmc-color", color);
    const head = node(this.card, "figcaption", "llmc-chart-head");
    setName(node(head, "span", "llmc-chart-name"), name);
    this.warning = node(head, "span", "llmc-warning");
    this.readout = node(head, "span", "llmc-readout");
    this.value = node(head, "span", "llmc-value");
    this.note = node(this.card, "div", "llmc-chart-note");
    this.svg = draw(this.card, "svg", { class: "llmc-plot", height: HEIGHT, role: "img" });
    this.toggle = node(this.card, "button", "llmc-log", "log");
    this.toggle.type = "button";
    this.toggle.setAttribute("aria-label", `logarithmic scale for ${name}`);
    this.ranks = node(this.card, "div", "llmc-rank-values");
    this.grid = draw(this.svg, "g", { class: "llmc-grid" });
    this.data = draw(this.svg, "g", {});
    this.cursor = draw(this.svg, "g", { class: "llmc-cursor" });
    this.listen();
  }

  listen() {
    this.aborter = new AbortController();
    const { signal } = this.aborter;
    this.toggle.addEventListener("click", () => this.shared.toggleLog(this.name), { signal });
    this.svg.addEventListener("pointermove", (event) => this.hover(event), { signal });
    this.svg.addEventListener("pointerleave", () => this.shared.point(null), { signal });
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.svg);
  }

  remove() {
    this.aborter.abort();
    this.observer.disconnect();
    this.card.remove();
  }

  setData(chart) {
    this.chart = chart;
    this.draw();
  }

  setLatest(latest) {
    this.latest = latest;
    setText(this.warning, latest?.alarm ? `⚠ ${latest.alarm}` : "");
    setText(this.ranks, latest?.ranks ?? "");
    this.showNote();
    if (this.shared.step === null) setText(this.value, latest?.text ?? "");
    this.svg.setAttribute("aria-label", this.words());
  }

  showNote() {
    const outside = this.frame?.isLog ? "" : this.chart?.outside;
    setText(this.note, [this.latest?.note, outside].filter(Boolean).join(" · "));
  }

  words() {
    const means = this.chart?.points.map((point) => point[1]).filter((mean) => mean !== null) ?? [];
    if (!means.length || !this.latest) return this.name;
    const low = formatNumber(Math.min(...means));
    const high = formatNumber(Math.max(...means));
    const { text, step, note, ranks } = this.latest;
    const facts = [`${this.name}: ${text} at step ${formatNumber(step)}, from ${low} to ${high}`, note, ranks];
    return facts.filter(Boolean).join("; ");
  }

  makeFrame(width) {
    const { steps, values, log } = this.chart;
    const isLog = log !== null && this.shared.isLog(this.name);
    const axis = isLog ? log : values;
    const scale = isLog ? Math.log10 : (value) => value;
    const [low, high] = [scale(axis.low), scale(axis.high)];
    const left = 10 + LABEL_CHAR * Math.max(...axis.ticks.map(([, text]) => text.length));
    const across = width - left - MARGIN.right;
    const down = HEIGHT - MARGIN.top - MARGIN.bottom;
    const share = (value) => Math.max(0, Math.min(1, (scale(value) - low) / (high - low)));
    return {
      width, left, isLog, steps, ticks: axis.ticks,
      x: (step) => left + (across * (step - steps.low)) / (steps.high - steps.low),
      y: (value) => MARGIN.top + down * (1 - share(value)), // at the edge when it lies outside
      step: (x) => steps.low + ((x - left) / across) * (steps.high - steps.low),
    };
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!this.chart?.points.length || !width) return;
    this.frame = this.makeFrame(width);
    this.toggle.disabled = this.chart.log === null;
    this.toggle.setAttribute("aria-pressed", String(this.frame.isLog));
    this.drawGrid(this.frame);
    this.drawData(this.frame);
    this.showCursor();
    this.showNote();
    this.svg.setAttribute("aria-label", this.words());
  }

  drawGrid(frame) {
    this.grid.replaceChildren();
    for (const [value, label] of frame.ticks) {
      const y = Math.round(frame.y(value)) + 0.5;
      draw(this.grid, "line", { x1: frame.left, x2: frame.width - MARGIN.right, y1: y, y2: y });
      draw(this.grid, "text", { x: frame.left - 7, y: y + 3.5, "text-anchor": "end" }).textContent = label;
    }
    for (const [step, label] of frame.steps.ticks) {
      const half = (LABEL_CHAR * label.length) / 2;
      const x = Math.min(frame.x(step), frame.width - half); // moved inwards where it would be cut off
      draw(this.grid, "text", { x, y: HEIGHT - 5, "text-anchor": "middle" }).textContent = label;
    }
  }

  drawData(frame) {
    this.data.replaceChildren();
    const at = (step, value) => `${frame.x(step).toFixed(1)},${frame.y(value).toFixed(1)}`;
    for (const run of stretches(this.chart.points)) {
      if (run.some((point) => point.length > 2)) {
        const upper = run.map(([step, mean, , most]) => at(step, most ?? mean));
        const lower = run.map(([step, mean, least]) => at(step, least ?? mean)).reverse();
        draw(this.data, "path", { class: "llmc-band", d: `M${upper.join("L")}L${lower.join("L")}Z` });
      }
      if (run.length === 1) {
        draw(this.data, "circle", { class: "llmc-lone", cx: frame.x(run[0][0]), cy: frame.y(run[0][1]), r: 2.5 });
      } else {
        draw(this.data, "path", { class: "llmc-line", d: `M${run.map(([step, mean]) => at(step, mean)).join("L")}` });
      }
    }
    for (const [first, last] of this.chart.marks) {
      const x = frame.x(first) - 1;
      draw(this.data, "rect", { class: "llmc-gap", x, width: frame.x(last) + 1 - x, y: HEIGHT - MARGIN.bottom - 6, height: 6 });
    }
  }

  hover(event) {
    if (!this.frame) return;
    const box = this.svg.getBoundingClientRect();
    this.shared.point(this.frame.step(event.clientX - box.left));
  }

  showCursor() {
    this.cursor.replaceChildren();
    const { step } = this.shared;
    if (step === null || !this.frame || !this.chart.points.length) {
      setText(this.readout, "");
      this.setLatest(this.latest);
      return;
    }
    const points = this.chart.points;
    const [where, mean, low, high] = nearest(points, step);
    const x = Math.round(this.frame.x(where)) + 0.5;
    draw(this.cursor, "line", { x1: x, x2: x, y1: MARGIN.top, y2: HEIGHT - MARGIN.bottom });
    if (mean !== null) draw(this.cursor, "circle", { cx: x, cy: this.frame.y(mean), r: 3.5 });
    const shownStep = Number.isInteger(points[0][0]) ? Math.round(where) : where;
    setText(this.readout, `step ${formatNumber(shownStep)}`);
    setText(this.value, formatNumber(mean));
    if (low === undefined) return;
    const [least, most] = [formatNumber(low, 3), formatNumber(high, 3)];
    if (least === most) return;
    const corner = { x: this.frame.width - MARGIN.right, y: MARGIN.top + 5, "text-anchor": "end" };
    const spread = draw(this.cursor, "text", corner);
    spread.textContent = `${least} to ${most}`;
  }
}

function stretches(points) {
  const runs = [[]];
  for (const point of points) {
    if (point[1] === null) runs.push([]);
    else runs[runs.length - 1].push(point);
  }
  return runs.filter((run) => run.length);
}

function nearest(points, step) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= step) low = middle;
    else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
}

function charts(model, card) {
  const host = node(card, "div", "llmc-charts");
  const shown = new Map();
  const shared = {
    step: null,
    point(step) {
      shared.step = step;
      for (const chart of shown.values()) chart.showCursor();
    },
    isLog: (name) => model.get("log_scales").includes(name),
    toggleLog(name) {
      const before = model.get("log_scales");
      const names = before.includes(name) ? before.filter((other) => other !== name) : [...before, name];
      model.set("log_scales", names);
      model.save_changes();
      ask("PUT", `${runPath(model.get("run").id)}/view`, { log: names });
    },
  };
  return {
    showLatest() {
      const latest = model.get("latest");
      for (const [name, chart] of shown) chart.setLatest(latest[name]);
    },
    show() {
      const wanted = model.get("charts");
      const names = new Set(wanted.map((chart) => chart.name));
      for (const [name, chart] of shown) {
        if (names.has(name)) continue;
        chart.remove();
        shown.delete(name);
      }
      for (const chart of wanted) {
        if (!shown.has(chart.name)) shown.set(chart.name, new Chart(host, chart.name, chart.color, shared));
        shown.get(chart.name).setData(chart);
      }
      this.showLatest();
    },
    redraw() {
      for (const chart of shown.values()) chart.draw();
    },
    remove() {
      for (const chart of shown.values()) chart.remove();
      shown.clear();
    },
  };
}

// Escape gives the focus back to where it was before it came here: the cell, usually.
function returnFocus(card) {
  let before = null;
  card.addEventListener("focusin", (event) => {
    if (!card.contains(event.relatedTarget)) before = event.relatedTarget;
  });
  card.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    const back = before?.isConnected ? before : card.closest(".jp-Notebook, [tabindex]");
    if (back) back.focus({ preventScroll: true });
    else document.activeElement?.blur();
  });
}

// --- the widget ---

function render({ model, el }) {
  const card = node(el, "section", "llmc-card");
  card.setAttribute("aria-label", `run ${model.get("run").name}`);
  returnFocus(card);
  const top = header(model, card);
  const showNotice = notice(model, card);
  const showProgress = progress(model, card);
  const plots = charts(model, card);
  const showRanks = ranks(model, card);
  const listeners = {
    "change:run": () => top.show(),
    "change:elapsed": () => top.hear(),
    "change:progress": showProgress,
    "change:ranks": showRanks,
    "change:charts": () => plots.show(),
    "change:latest": () => plots.showLatest(),
    "change:notice": showNotice,
    "change:log_scales": () => plots.redraw(),
  };
  for (const [event, listener] of Object.entries(listeners)) {
    model.on(event, listener);
    listener();
  }
  const clock = setInterval(top.tick, 1000);
  const leave = goOnWithoutKernel(model, card);
  return () => {
    leave();
    clearInterval(clock);
    for (const [event, listener] of Object.entries(listeners)) model.off(event, listener);
    plots.remove();
    card.remove();
  };
}

export default { render };
