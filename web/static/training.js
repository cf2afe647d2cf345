// The training curves: fetches /training/runs every two seconds, and draws them as SVG.

import { $, make, setUp, t } from "./common.js";

const TEXTS = {
  zh: {
    title: "训练曲线", chat: "对话", runs: "训练", empty: "这里还没有训练记录。开始一个训练：python 1-pretrain_vlm.py --demo",
    loss: "损失（空心点：留出部分）", held: "留出部分", lr: "学习率", samples_per_s: "每秒样本数", step: "步",
    progress: (step, steps) => `第 ${step} / ${steps} 步`, last: (loss) => `损失 ${loss}`, left: (minutes) => `还剩 ${minutes} 分钟`,
    log: "损失用对数坐标", smooth: "平滑", lost: "和服务器的连接断了，它还在运行吗？",
  },
  en: {
    title: "training", chat: "Chat", runs: "Runs", empty: "No training log yet. Start a run: python 1-pretrain_vlm.py --demo",
    loss: "Loss (circles: held out)", held: "held out", lr: "Learning rate", samples_per_s: "Samples per second", step: "step",
    progress: (step, steps) => `step ${step} of ${steps}`, last: (loss) => `loss ${loss}`, left: (minutes) => `${minutes} min left`,
    log: "Logarithmic loss", smooth: "Smooth", lost: "Lost the connection to the server. Is it still running?",
  },
};
const CHARTS = { loss: ["loss", "val_loss"], lr: ["lr"], samples_per_s: ["samples_per_s"] };
const COLOURS = 6; // in style.css
const HEIGHT = 220, LEFT = 58, RIGHT = 12, TOP = 10, BOTTOM = 24;

let runs = [];
let touched = 0; // time when the pointer last moved over a chart
const hidden = new Set(); // names of runs that a click has hidden
const short = (value) => (value === 0 ? "0" : Math.abs(value) >= 1e-4 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(1));

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Round numbers between two values, about `count` of them. */
function ticks(least, most, count) {
  const rough = (most - least) / count || Math.abs(most) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(least / size);
  return Array.from({ length: Math.floor(most / size) - first + 1 }, (_, i) => (first + i) * size);
}

/** 1, 2 and 5 times powers of ten between two values. */
function logTicks(low, high) {
  const powers = Array.from({ length: Math.ceil(Math.log10(high)) - Math.floor(Math.log10(low)) + 1 }, (_, i) => Math.floor(Math.log10(low)) + i);
  const ones = powers.map((power) => 10 ** power);
  const all = ones.length > 3 ? ones : ones.flatMap((one) => [one, 2 * one, 5 * one]);
  return all.filter((value) => value >= low && value <= high);
}

/** Each point as the mean of those around it, a twentieth of the curve; of fewer at its ends, so that it doesn't lag. */
function smoothed(points) {
  const most = Math.max(2, Math.round(points.length / 40));
  return points.map(([step, value], i) => {
    const reach = Math.min(most, i, points.length - 1 - i);
    const near = points.slice(i - reach, i + reach + 1).map(([, other]) => other).filter((other) => other !== null);
    return [step, value === null ? null : near.reduce((sum, other) => sum + other, 0) / near.length];
  });
}

/** The smallest and the largest of the values, with a margin. */
function range(values) {
  let [least, most] = [Infinity, -Infinity];
  for (const value of values) { least = Math.min(least, value); most = Math.max(most, value); }
  const room = (most - least) * 0.05 || Math.abs(most) * 0.05 || 1;
  return [least - room, most + room];
}

/**
 * One chart. lines: [{colour, name, held, points: [[step, value or null], ...], raw}]; held: measured on held-out samples;
 * raw: the points before they were smoothed, if they were. logarithmic: where all values are above 0.
 */
function chart(title, lines, width, logarithmic) {
  const figure = make("figure", {}, make("figcaption", { textContent: title }));
  const points = lines.flatMap((line) => line.points).filter(([, value]) => value !== null);
  if (!points.length) return figure;
  const values = lines.flatMap((line) => line.raw ?? line.points).map(([, value]) => value).filter((value) => value !== null);
  const log = logarithmic && values.every((value) => value > 0);
  const scale = log ? Math.log10 : Number;
  const [low, high] = range(values.map(scale));
  const last = Math.max(1, ...points.map(([step]) => step));
  const x = (step) => LEFT + (step / last) * (width - LEFT - RIGHT);
  const y = (value) => TOP + ((high - scale(value)) / (high - low)) * (HEIGHT - TOP - BOTTOM);

  // grid and axes
  const picture = svg("svg", { width, height: HEIGHT, role: "img", "aria-label": title });
  for (const value of log ? logTicks(10 ** low, 10 ** high) : ticks(low, high, 4)) {
    picture.append(svg("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "grid" }));
    picture.append(svg("text", { x: LEFT - 8, y: y(value) + 4, class: "end" }, short(value)));
  }
  for (const step of ticks(0, last, Math.max(2, width / 120))) {
    picture.append(svg("text", { x: x(step), y: HEIGHT - 6, class: "middle" }, String(step)));
  }

  // a curve for each line, interrupted where a value is not finite; circles for held-out samples, which are few
  const draw = (points, kind) => {
    let path = "", pen = "M";
    for (const [step, value] of points) {
      if (value !== null) path += `${pen}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = value === null ? "M" : "L";
    }
    picture.append(svg("path", { d: path, class: kind }));
  };
  for (const line of lines) {
    if (line.raw) draw(line.raw, `raw c${line.colour}`);
    draw(line.points, `curve c${line.colour}`);
    if (!line.held) continue;
    for (const [step, value] of line.points.filter(([, value]) => value !== null)) {
      picture.append(svg("circle", { cx: x(step), cy: y(value), r: 3.5, class: `held c${line.colour}` }));
    }
  }

  // the pointer reads the values of the nearest step of any curve, of those that reach there
  const cursor = svg("line", { y1: TOP, y2: HEIGHT - BOTTOM, class: "cursor", visibility: "hidden" });
  const readout = make("p", { className: "readout" });
  picture.append(cursor);
  picture.onpointermove = (event) => {
    touched = Date.now();
    const step = ((event.clientX - picture.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT)) * last;
    const [at] = nearest(lines.flatMap((line) => line.points), step);
    const near = lines.filter(({ points }) => points.length && points[0][0] <= at && at <= points.at(-1)[0])
      .map((line) => [line, nearest(line.points, at)]);
    cursor.setAttribute("x1", x(at));
    cursor.setAttribute("x2", x(at));
    cursor.setAttribute("visibility", "visible");
    readout.replaceChildren(...near.map(([line, [at, value]]) => make("span", { className: `c${line.colour}` },
      `${line.name}${line.held ? ` (${t("held")})` : ""} · ${t("step")} ${at}: ${value === null ? "–" : short(value)}`)));
  };
  picture.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); readout.replaceChildren(); };
  figure.append(picture, readout);
  return figure;
}

const nearest = (points, step) => points.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));

/** A run's name and progress, as a button that shows or hides its curves. */
function describe(run, colour) {
  const loss = run.curves.loss?.at(-1)?.[1];
  const said = [t("progress", run.step, run.steps), loss == null ? "" : t("last", short(loss))];
  if (run.minutes_left) said.push(t("left", run.minutes_left.toFixed(1)));
  const bar = make("progress", { max: run.steps, value: run.step });
  bar.setAttribute("aria-label", run.name);
  return make("li", {}, make("button", {
    type: "button", data: { run: run.name }, className: `c${colour}`, ariaPressed: String(!hidden.has(run.name)),
    onclick: () => { if (!hidden.delete(run.name)) hidden.add(run.name); show(); },
  }, make("b", { textContent: run.name }), make("span", { textContent: said.filter(Boolean).join(" · ") }), bar));
}

function show() {
  const colours = new Map([...runs].sort((a, b) => a.name.localeCompare(b.name)).map((run, i) => [run.name, i % COLOURS]));
  $("empty").hidden = runs.length > 0;
  const focused = document.activeElement.dataset.run;
  $("runs").replaceChildren(...runs.map((run) => describe(run, colours.get(run.name))));
  if (focused) $("runs").querySelector(`[data-run="${CSS.escape(focused)}"]`)?.focus();
  const width = $("charts").clientWidth;
  const drawn = runs.filter((run) => !hidden.has(run.name));
  const line = (run, name) => {
    const points = run.curves[name] ?? [];
    const held = name === "val_loss";
    const smooth = $("smooth").checked && !held && name !== "lr";
    return { colour: colours.get(run.name), name: run.name, held, ...(smooth ? { points: smoothed(points), raw: points } : { points }) };
  };
  $("charts").replaceChildren(...Object.entries(CHARTS).map(([title, names]) => (
    chart(t(title), drawn.flatMap((run) => names.map((name) => line(run, name))), width, title === "loss" && $("log").checked))));
}

/** Without a model, as with --watch, there is no chat to go to: its address leads back here. */
async function hideChatLink() {
  const chat = document.querySelector("header a");
  chat.hidden = await fetch(".", { method: "HEAD" }).then((response) => response.redirected, () => false);
}

let seen = "";
async function ask() {
  try {
    const response = await fetch("training/runs");
    const text = await response.text();
    $("notice").hidden = true;
    if (text !== seen && Date.now() - touched > 3000) { // don't redraw a chart while the pointer reads it
      seen = text;
      runs = JSON.parse(text);
      show();
    }
  } catch {
    $("notice").textContent = t("lost");
    $("notice").hidden = false;
  }
  setTimeout(ask, 2000);
}

for (const name of ["log", "smooth"]) $(name).onchange = show;
setUp(TEXTS, show);
new ResizeObserver(show).observe($("charts"));
hideChatLink();
ask();
