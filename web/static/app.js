// The chat page: pictures and a question go to /v1/chat/completions, the answer comes back piece by piece.
// Model output only ever becomes text nodes.

import { $, make, setUp, t, translate } from "./common.js";

const TEXTS = {
  zh: {
    clear: "清空对话", settings: "回答设置", training: "训练曲线",
    temperature: "温度（0 为最可能的字）", top_k: "top-k（0 为不限）", top_p: "top-p", max_tokens: "最多生成的 token 数",
    seed: "随机种子", seed_random: "每次不同", reset: "恢复默认",
    welcome: "让小小的模型看一看", samples: "点一张图片试试，或者拖入、粘贴你自己的图片",
    welcome_text: "图片由冻结的 CLIP 变成 50 个向量，经一个线性层译成语言模型的词嵌入，模型接着写出答案。每个问题单独回答：模型看得到图片，看不到前面说过的话。",
    ask: "问问这张图片……", ask_without: "先选一张图片，再提问……", add: "添加图片或短视频", send: "发送", stop: "停止", remove: "移除图片",
    attached: "要问的图片", questions: "可以这样问", log: "对话", picture: "图片", drop: "松手即可添加图片",
    alone: "每个问题单独回答，图片会保留，可以接着问。小模型会出错。",
    copy: "复制", copied: "已复制", again: "重新回答", look: "它看了哪里", hide: "收起",
    waiting: (n) => `前面还有 ${n} 位，请稍候……`, speed: (rate, n) => `${n} 个 token，${rate} token/s`, count: (n) => `${n} 个 token`,
    stopped: "已停止", cut: "已到长度上限", lost: "和服务器的连接断了，它还在运行吗？", empty: "先写下问题。",
    layer: "层", mean: "各层平均", share: (percent) => `这一步有 ${percent}% 的注意力在这里`,
    pick: "把指针移到、点按答案里的词，或用方向键选词。亮处是写下这个词的那一步注意力所在的图块（7×7，各头平均，相对最亮的一块）。注意力说明信息从哪里读来，并不说明模型为什么这样回答。",
    parameters: (n) => `${n}M 参数`, too_big: (name, mb) => `${name} 超过 ${mb} MB，请换一张小一些的。`,
    too_many: (n) => `模型一次最多看 ${n} 张图片。`, not_picture: (name) => `${name} 不是图片，也不是视频。`, describe: "描述这张图片。",
  },
  en: {
    clear: "Clear the talk", settings: "How it answers", training: "Training curves",
    temperature: "Temperature (0: the likeliest token)", top_k: "Top-k (0: no limit)", top_p: "Top-p", max_tokens: "Longest answer, in tokens",
    seed: "Seed", seed_random: "another each time", reset: "Back to defaults",
    welcome: "Let a tiny model look", samples: "Pick a picture to begin, or drop or paste one of yours",
    welcome_text: "A frozen CLIP turns a picture into 50 vectors, one linear layer translates them into the language model's embeddings, and the model writes on from there. Each question stands alone: the model sees the pictures, not what was said before.",
    ask: "Ask about the picture…", ask_without: "Pick a picture, then ask…", add: "Add pictures or a clip", send: "Send", stop: "Stop", remove: "Remove the picture",
    attached: "Pictures to ask about", questions: "Questions to try", log: "Talk", picture: "picture", drop: "Drop to add the picture",
    alone: "Each question stands alone; the pictures stay, so you can ask on. Small models make mistakes.",
    copy: "Copy", copied: "Copied", again: "Answer again", look: "What it looked at", hide: "Hide",
    waiting: (n) => `${n} ahead of you, one moment…`, speed: (rate, n) => `${n} tokens, ${rate} tokens/s`, count: (n) => `${n} tokens`,
    stopped: "stopped", cut: "cut at the longest length", lost: "The connection to the server is lost: is it still running?", empty: "Write a question first.",
    layer: "Layer", mean: "mean of all", share: (percent) => `${percent}% of this step's attention was here`,
    pick: "Point at or tap a word of the answer, or use the arrow keys. Bright are the patches (7×7, averaged over heads, relative to the brightest) that the step which wrote the word attended to. Attention tells where information was read from, not why the model answered so.",
    parameters: (n) => `${n}M parameters`, too_big: (name, mb) => `${name} is over ${mb} MB: pick a smaller one.`,
    too_many: (n) => `The model looks at ${n} pictures at most.`, not_picture: (name) => `${name} is neither picture nor video.`, describe: "描述这张图片。",
  },
};

let info = null; // the server's /info
let pictures = []; // {url (data:), name, questions}: what the next question is about
let asking = null; // the turn that is being answered
const turns = [];

// --- small helpers ------------------------------------------------------------------------------------------------

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

const button = (name, onclick, ...children) =>
  make("button", { type: "button", className: "plain", onclick, data: children.length ? {} : { label: name } }, icon(name), ...children);

let noticeTimer;
function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { $("notice").hidden = true; }, 6000);
}

function showLanguage() {
  if (info) $("model").textContent = `${info.model} · ${t("parameters", (info.parameters / 1e6).toFixed(1))}`;
  for (const turn of turns) turn.describe();
  showPictures();
}

// --- pictures -----------------------------------------------------------------------------------------------------

const readFile = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = reject;
  reader.readAsDataURL(file);
});

async function addFiles(files) {
  for (const file of files) {
    if (!/^(image|video)\//.test(file.type)) notice(t("not_picture", file.name));
    else if (file.size > info.max_picture_bytes) notice(t("too_big", file.name, info.max_picture_bytes / 1e6));
    else if (pictures.length >= info.max_pictures) notice(t("too_many", info.max_pictures));
    else pictures.push({ url: await readFile(file), name: file.name, questions: [] });
  }
  showPictures();
  $("question").focus();
}

const fileName = (path) => decodeURIComponent(path.split("/").pop());

async function pickSample(sample) {
  const files = await Promise.all(sample.pictures.map(async (path) => (await fetch(path)).blob()));
  const urls = await Promise.all(files.map(readFile));
  pictures = urls.map((url, i) => ({ url, name: fileName(sample.pictures[i]), questions: sample.questions }));
  showPictures();
  $("question").focus();
}

const isVideo = (picture) => picture.url.startsWith("data:video/");

/** A picture to look at; a video plays as a GIF does. */
function show(picture) {
  if (!isVideo(picture)) return make("img", { src: picture.url, alt: picture.name });
  return make("video", { src: picture.url, title: picture.name, muted: true, loop: true, autoplay: true, playsInline: true });
}

/** The thumbnails, and questions to try about them. */
function showPictures() {
  $("thumbnails").replaceChildren(...pictures.map((picture) => {
    const remove = make("button", {
      type: "button", data: { label: "remove" },
      onclick: () => { pictures = pictures.filter((one) => one !== picture); showPictures(); $("question").focus(); },
    }, icon("close"));
    return make("li", {}, show(picture), remove);
  }));
  $("question").dataset.placeholder = pictures.length ? "ask" : "ask_without";
  const questions = pictures.length ? new Set([...pictures[0].questions, ...(pictures.length === 1 ? [t("describe")] : [])]) : [];
  $("chips").replaceChildren(...[...questions].map((text) => make("button", { type: "button", textContent: text, onclick: () => ask(text) })));
  translate($("composer"));
}

// --- settings -----------------------------------------------------------------------------------------------------

const FIELDS = { temperature: "temperature", top_k: "top_k", top_p: "top_p", max_tokens: "max_new_tokens", seed: "seed" };
const field = (name) => document.querySelector(`#settings-panel [name=${name}]`);

function showSettings() {
  for (const value of document.querySelectorAll("#settings-panel b")) value.textContent = value.parentElement.querySelector("input").value;
}

/** The server's own settings, as near as a slider can show them. */
function resetSettings() {
  for (const [name, key] of Object.entries(FIELDS)) {
    const value = info.settings[key] ?? "";
    if (Number(field(name).max) < value) field(name).max = value;
    field(name).value = value;
    field(name).dataset.untouched = field(name).value;
  }
  showSettings();
}

/** Only what was changed here: all else is the server's. */
function readSettings() {
  const changed = Object.keys(FIELDS).map(field).filter(({ value, dataset }) => value !== "" && value !== dataset.untouched);
  return Object.fromEntries(changed.map(({ name, value }) => [name, Number(value)]));
}

// --- a question and its answer ------------------------------------------------------------------------------------

class Turn {
  constructor(question, asked) {
    this.question = question;
    this.pictures = asked;
    this.bubble = make("div", { className: "bubble" });
    this.tools = make("div", { className: "tools" });
    this.answer = make("div", { className: "answer" }, this.bubble, this.tools);
    const shown = make("div", { className: "pictures" }, ...asked.map(show));
    const mine = make("div", { className: "mine" }, shown, make("div", { className: "bubble", textContent: question }));
    this.element = make("article", { className: "turn" }, mine, this.answer);
  }

  get messages() {
    // what may move is sent as a clip; a still GIF, WebP or PNG is a clip of one frame
    const parts = this.pictures.map(({ url }) => (/^data:(video|image\/(gif|webp|a?png))/.test(url)
      ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } }));
    return [{ role: "user", content: [...parts, { type: "text", text: this.question }] }];
  }

  get text() {
    return this.pieces.map((piece) => piece.text).join("");
  }

  /** Asks, and shows the answer as it comes; `this.stopper` ends it, at the server too. */
  async ask() {
    Object.assign(this, { pieces: [], end: null, problem: null, ahead: 0, usage: null, shares: null });
    this.heat?.remove();
    this.heat = null;
    this.answer.classList.remove("heat-open");
    this.bubble.className = "bubble";
    this.bubble.replaceChildren();
    this.answer.setAttribute("aria-busy", "true");
    this.stopper = new AbortController();
    asking = this;
    showAsking();
    this.describe();
    try {
      await this.receive(await post("v1/chat/completions", {
        messages: this.messages, stream: true, stream_options: { include_usage: true }, return_token_ids: true, ...readSettings(),
      }, this.stopper.signal));
      if (!this.end) this.problem = t("lost");
    } catch (error) {
      if (error.name === "AbortError") this.end = "stopped";
      else this.problem = error instanceof Refusal ? error.message : t("lost");
    }
    this.answer.removeAttribute("aria-busy");
    if (this.problem) {
      this.bubble.classList.add("bad");
      this.bubble.textContent = this.problem;
    }
    asking = null;
    showAsking();
    this.describe();
  }

  async receive(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) this.hear(event);
    }
  }

  /** One server-sent event. */
  hear(event) {
    if (event.startsWith(": waiting ")) {
      this.ahead = Number(event.slice(10));
      this.describe();
      return;
    }
    if (!event.startsWith("data: {")) return;
    const { choices: [choice], usage } = JSON.parse(event.slice(6));
    if (usage) this.usage = usage;
    if (!choice) return;
    if (choice.finish_reason) this.end = choice.finish_reason;
    if (choice.delta.content) this.write({ text: choice.delta.content, ids: choice.delta.token_ids });
    else if (this.ahead) { this.ahead = 0; this.describe(); }
  }

  write(piece) {
    piece.element = make("span", { className: "token", textContent: piece.text });
    this.pieces.push(piece);
    const atBottom = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
    this.bubble.append(piece.element);
    if (atBottom) scrollDown();
  }

  /** What stands under the answer. */
  describe() {
    if (this.ahead) this.tools.textContent = t("waiting", this.ahead);
    else if (asking === this) this.tools.replaceChildren();
    else {
      const tools = [button("again", () => this.again())];
      if (!this.problem && this.pieces.length) {
        tools.unshift(button("copy", () => this.copy()));
        if (this.pictures.length) {
          this.lookButton = button("eye", () => this.look(), make("span", { data: { text: this.heat ? "hide" : "look" } }));
          this.lookButton.setAttribute("aria-expanded", String(Boolean(this.heat)));
          tools.push(this.lookButton);
        }
        tools.push(make("span", { className: "speed", textContent: this.speed() }));
      }
      this.tools.replaceChildren(...tools);
      translate(this.tools);
      if (this.heat) { translate(this.heat); this.showHeat(this.shown); }
    }
  }

  speed() {
    const tokens = this.usage?.completion_tokens ?? this.pieces.reduce((sum, piece) => sum + piece.ids.length, 0);
    const rate = this.usage?.tokens_per_second;
    const notes = [rate ? t("speed", rate.toFixed(0), tokens) : t("count", tokens)];
    if (this.end === "length") notes.push(t("cut"));
    if (this.end === "stopped") notes.push(t("stopped"));
    return notes.join(" · ");
  }

  again() {
    if (!asking) this.ask();
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.text);
    } catch { // only pages on https or localhost have a clipboard
      const area = make("textarea", { value: this.text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    notice(t("copied"));
  }

  // --- where it looked: one request for all tokens of the answer, when first asked for ---

  async look() {
    if (this.heat) {
      this.heat.remove();
      this.heat = null;
      this.answer.classList.remove("heat-open");
      for (const { element } of this.pieces) for (const name of ["tabindex", "role"]) element.removeAttribute(name);
      this.describe();
      return;
    }
    this.lookButton.disabled = true;
    const { pieces } = this;
    try {
      const ids = pieces.flatMap((piece) => piece.ids);
      const shares = this.shares ?? await (await post("attention", { messages: this.messages, token_ids: ids })).json();
      if (pieces !== this.pieces) return; // answered again meanwhile
      this.shares = shares;
    } catch (error) {
      notice(error instanceof Refusal ? error.message : t("lost"));
      this.lookButton.disabled = false;
      return;
    }
    this.openHeat();
    this.describe();
    this.pieces[this.shown].element.focus({ preventScroll: true });
    this.heat.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  openHeat() {
    this.layer = make("select", { onchange: () => this.showHeat(this.shown) }, make("option", { value: "mean", data: { text: "mean" } }));
    for (let i = 1; i <= info.layers; i++) this.layer.append(make("option", { value: i, textContent: i }));
    const grid = this.shares.grid;
    const seen = this.pictures.flatMap((picture, i) => this.shares.frames[i].map((url) => ({ url: url ?? picture.url, name: picture.name })));
    this.maps = seen.map(({ url, name }) => ({
      canvas: make("canvas", { width: grid, height: grid }),
      caption: make("figcaption"),
      image: make("img", { src: url, alt: name }),
    }));
    const figures = this.maps.map((map) => make("figure", {}, make("div", { className: "layered" }, map.image, map.canvas), map.caption));
    this.heat = make("div", { className: "heat" },
      make("div", { className: "maps" }, ...figures),
      make("label", {}, make("span", { data: { text: "layer" } }), this.layer),
      make("p", { data: { text: "pick" } }));
    this.answer.append(this.heat);
    this.answer.classList.add("heat-open");
    this.pieces.forEach((piece, i) => {
      piece.element.role = "button";
      piece.element.onpointerenter = piece.element.onclick = piece.element.onfocus = () => this.heat && this.showHeat(i);
      piece.element.onkeydown = (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (this.heat && step) this.pieces[i + step]?.element.focus();
      };
    });
    this.showHeat(0);
  }

  /** Draws the maps of one piece of the answer; of several tokens in a piece, their mean. */
  showHeat(number) {
    this.shown = number;
    this.pieces.forEach((piece, i) => {
      piece.element.classList.toggle("shown", i === number);
      piece.element.tabIndex = i === number ? 0 : -1;
    });
    const first = this.pieces.slice(0, number).reduce((sum, piece) => sum + piece.ids.length, 0);
    const layers = this.layer.value === "mean" ? this.shares.shares : [this.shares.shares[this.layer.value - 1]];
    this.maps.forEach((map, i) => {
      const rows = layers.flatMap((tokens) => tokens.slice(first, first + this.pieces[number].ids.length).map((images) => images[i]));
      const shares = rows[0].map((_, patch) => rows.reduce((sum, row) => sum + row[patch], 0) / rows.length);
      drawHeat(map.canvas, shares);
      const total = shares.reduce((sum, share) => sum + share, 0);
      map.caption.textContent = t("share", (total * 100).toFixed(0));
    });
  }
}

/** Night over the picture, but for where it looked. */
function drawHeat(canvas, shares) {
  const most = Math.max(...shares) || 1;
  const pen = canvas.getContext("2d");
  const data = pen.createImageData(canvas.width, canvas.height);
  shares.forEach((share, i) => data.data.set([12, 14, 40, Math.round(215 * (1 - share / most))], i * 4));
  pen.putImageData(data, 0, 0);
}

class Refusal extends Error {}

/** A response that is no refusal. */
async function ok(response) {
  if (response.ok) return response;
  const problem = await response.json().catch(() => null);
  throw new Refusal(problem?.error?.message ?? `${response.status} ${response.statusText}`);
}

async function post(path, body, signal) {
  return ok(await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal }));
}

// --- the page -----------------------------------------------------------------------------------------------------

function scrollDown() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

/** The send button stops while an answer is being written. */
function showAsking() {
  $("send-button").dataset.label = asking ? "stop" : "send";
  $("send-button").replaceChildren(icon(asking ? "stop" : "send"));
  translate($("composer"));
}

function ask(question) {
  if (asking || !info) return;
  if (!question.trim()) {
    notice(t("empty"));
    return;
  }
  const turn = new Turn(question.trim(), [...pictures]);
  turns.push(turn);
  $("welcome").hidden = true;
  $("log").append(turn.element);
  $("question").value = "";
  grow();
  turn.ask();
  scrollDown();
}

function grow() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight}px`;
}

function clearTalk() {
  asking?.stopper.abort();
  turns.length = 0;
  pictures = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  showPictures();
}

function openSettings(open) {
  $("settings-panel").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  if (open) field("temperature").focus();
}

function listen() {
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (asking) asking.stopper.abort();
    else ask($("question").value);
  };
  $("question").oninput = grow;
  $("question").onkeydown = (event) => { // Enter that ends the choice of a Chinese character is not meant for us
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!asking) ask($("question").value);
  };
  $("add").onclick = () => $("files").click();
  $("files").onchange = async () => { await addFiles([...$("files").files]); $("files").value = ""; };
  document.onpaste = (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) { event.preventDefault(); addFiles(files); }
  };
  let depth = 0; // dragenter and dragleave come for every element on the way
  document.ondragenter = (event) => { if (event.dataTransfer.types.includes("Files")) { depth += 1; $("drop").hidden = false; } };
  document.ondragleave = () => { depth = Math.max(0, depth - 1); $("drop").hidden = depth === 0; };
  document.ondragover = (event) => event.preventDefault();
  document.ondrop = (event) => {
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    addFiles([...event.dataTransfer.files]);
  };
  $("clear-button").onclick = clearTalk;
  $("settings-button").onclick = () => openSettings($("settings-panel").hidden);
  $("settings-panel").oninput = showSettings;
  $("reset").onclick = resetSettings;
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (!$("settings-panel").hidden) { openSettings(false); $("settings-button").focus(); } else asking?.stopper.abort();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#settings-panel, #settings-button")) openSettings(false);
  });
}

/** Sample pictures, each set of them once, with all its questions. */
function showSamples() {
  const sets = new Map();
  for (const { pictures: paths, question } of info.samples) {
    const key = paths.join();
    if (!sets.has(key)) sets.set(key, { pictures: paths, questions: [] });
    sets.get(key).questions.push(question);
  }
  $("samples").replaceChildren(...[...sets.values()].map((sample) => make("li", {},
    make("button", { type: "button", onclick: () => pickSample(sample) },
      ...sample.pictures.map((path) => make("img", { src: path, alt: fileName(path), loading: "lazy" }))))));
}

async function begin() {
  listen();
  setUp(TEXTS, showLanguage);
  showAsking();
  try {
    info = await (await ok(await fetch("info"))).json();
  } catch (error) {
    notice(error instanceof Refusal ? error.message : t("lost"));
    return;
  }
  resetSettings();
  showSamples();
  showLanguage();
  $("question").focus();
}

begin();
