// Draws the state of a run, asked for every second; every fifth while latency is measured, so as not to disturb it.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);
const number = (value, show) => (typeof value === "number" ? show(value) : "–");

function put(parent, tag, text, css, space) {
  const node = space ? document.createElementNS(space, tag) : document.createElement(tag);
  if (text !== undefined) node.textContent = text; // never as HTML: names come from anywhere
  if (css) node.setAttribute("class", css);
  parent.append(node);
  return node;
}

function seconds(s) {
  return s < 60 ? `${Math.round(s)} s` : `${Math.floor(s / 60)} min ${Math.round(s % 60)} s`;
}

function steps(state) {
  const list = at("steps");
  list.replaceChildren();
  for (const step of state.steps) {
    const kind = step.ended ? "done" : step.began ? "now" : "";
    const took = step.began ? ` ${seconds((step.ended || state.now) - step.began)}` : "";
    put(list, "li", `${{ done: "✓ ", now: "▶ " }[kind] || ""}${step.name}${took}`, kind);
  }
  const bar = state.bar;
  at("now").hidden = !bar;
  if (bar) {
    at("doing").textContent = `${bar.title} ${bar.done} of ${bar.total}${bar.left_s === null ? "" : `, ${seconds(bar.left_s)} left`}`;
    at("text").textContent = bar.text;
    at("bar").max = Math.max(bar.total, 1);
    at("bar").value = bar.done;
  }
}

function curve(parent, one, name) {
  const w = Math.max(parent.clientWidth, 280); // drawn in the page's own pixels, so that text keeps its size on a phone
  const [h, left, right, top, bottom] = [w < 600 ? 170 : 240, 50, 46, 14, 26];
  const losses = one.loss.map((p) => p[1]);
  const low = Math.min(...losses), high = Math.max(...losses, low + 1e-9);
  const last = losses[losses.length - 1];
  const svg = put(parent, "svg", undefined, undefined, SVG);
  svg.setAttribute("viewBox", `0 0 ${w} ${h}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Loss of ${name}: from ${losses[0].toPrecision(3)} to ${last.toPrecision(3)} in ${one.loss.length} points`);
  const x = (step) => left + (step / Math.max(one.total, 1)) * (w - left - right);
  const y = (value) => top + ((high - value) / (high - low)) * (h - top - bottom);
  const share = (value) => top + (1 - value) * (h - top - bottom);
  put(svg, "path", undefined, "axis", SVG).setAttribute("d", `M${left} ${top}V${h - bottom}H${w - right}V${top}`);
  const line = (points, scale, css) =>
    put(svg, "path", undefined, css, SVG).setAttribute("d", points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${scale(p[1]).toFixed(1)}`).join(""));
  line(one.loss, y, "loss");
  if (one.top1.length) line(one.top1, share, "top1");
  const text = (px, py, said, anchor) => {
    const node = put(svg, "text", said, undefined, SVG);
    node.setAttribute("x", px);
    node.setAttribute("y", py);
    node.setAttribute("text-anchor", anchor);
  };
  text(left - 6, top + 8, high.toPrecision(3), "end");
  text(left - 6, h - bottom, low.toPrecision(3), "end");
  text(w - right + 6, top + 8, "100 %", "start");
  text(w - right + 6, h - bottom, "0 %", "start");
  text(w / 2, h - 8, `step, of ${one.total}`, "middle");
  const top1 = one.top1.length ? `, top-1 on the choice images ${(100 * one.top1[one.top1.length - 1][1]).toFixed(1)} % (dashed)` : "";
  put(parent, "p", `${name}: loss ${last.toPrecision(3)}${top1}`, "soft");
}

function candidates(state) {
  const body = at("candidates").tBodies[0];
  body.replaceChildren();
  for (const target of state.targets) {
    for (const c of target.candidates) {
      const ships = target.ships === c.name;
      const row = put(body, "tr", undefined, ships ? "ships" : "");
      put(row, "td", target.name);
      put(row, "td", c.name);
      put(row, "td", number(c.top1, (v) => `${(100 * v).toFixed(2)} %`), "num");
      put(row, "td", c.void ? "void" : number(c.p50_s, (v) => (1e3 * v).toPrecision(3)), "num");
      put(row, "td", number(c.size_bytes, (v) => (v / 1e6).toFixed(2)), "num");
      put(row, "td", ships ? `ships: ${target.verdict}` : c.failure ? `refused: ${c.failure}` : "");
    }
  }
  at("candidates").hidden = !body.rows.length;
  at("none").hidden = !!body.rows.length;
}

function show(state) {
  if (state.name) {
    at("name").textContent = state.name;
    document.title = `${state.verdict || "running"}: ${state.name} · edgecnn`;
  }
  const verdict = state.verdict ? `verdict: ${state.verdict}` : state.error || "";
  if (at("verdict").textContent !== verdict) at("verdict").textContent = verdict;
  at("verdict").className = { pass: "pass", unproven: "unproven" }[state.verdict] || "fail";
  steps(state);
  at("training").hidden = !state.curves.length;
  at("curves").replaceChildren();
  for (const one of state.curves) if (one.loss.length) curve(at("curves"), one, state.steps[one.step] ? state.steps[one.step].name : "training");
  candidates(state);
  const said = at("said"), atEnd = said.scrollTop + said.clientHeight >= said.scrollHeight - 4;
  said.textContent = state.said.map((line) => `${new Date(1000 * line.at).toTimeString().slice(0, 8)}  ${line.text}`).join("\n");
  if (atEnd) said.scrollTop = said.scrollHeight;
}

async function watch() {
  let wait = 1000, ended = false;
  try {
    const state = await (await fetch("state")).json();
    show(state);
    wait = state.timing ? 5000 : 1000;
    ended = !!(state.verdict || state.error);
    at("pace").textContent = ended ? "The run has ended: this page does not change any more." : state.timing
      ? "Latency is being measured: this page asks every five seconds only, and is best left alone." : "Asked every second.";
  } catch {
    at("pace").textContent = "edgecnn does not answer any more: this is the last that was seen.";
  }
  if (!ended) setTimeout(watch, wait);
}
watch();
