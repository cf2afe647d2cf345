// The chat page: it sends pictures and a question to /v1/chat/completions, and shows the answer piece by piece.
// What the model writes only ever becomes text nodes, never HTML.

import { $, icon, make, setUp, t, translate } from "./common.js";
import { HeatMap } from "./heatmap.js";
import { Pad } from "./pad.js";

const TEXTS = {
  zh: {
    clear: "新对话", settings: "生成设置", training: "训练曲线", cleared: "已开始新对话。", undo_clear: "恢复上一段对话",
    temperature: "随机程度（温度；0 = 总选最可能的词）", top_k: "每步考虑前几个候选词（top‑k；0 = 全部）",
    top_p: "候选词的概率合计（top‑p；1 = 全部）", max_tokens: "回答最长多少个 token",
    seed: "随机种子（同样的种子，同样的回答）", seed_random: "每次不同", reset: "恢复默认",
    welcome: "让小小的模型看一看", samples: "点一张图片试试，或者拖入、粘贴、画一张你自己的图片",
    welcome_demo: "选一张图片，问它画了什么、在哪里、什么颜色、有几个。演示模型只学过彩色图形，中文英文都行；问别的，它有时会说图里只有彩色的图形，有时会很自信地答错。每个问题单独回答：它看得到图片，看不到前面说过的话。",
    welcome_text: "选一张图片，问问里面有什么。模型很小，答错时也一样自信。每个问题单独回答：它看得到图片，看不到前面说过的话。",
    ask: "问问这张图片……", ask_without: "先选一张图片，再提问……", add: "添加图片或短视频", send: "发送", stop: "停止", remove: "移除图片",
    attached: "要问的图片", questions: "可以这样问", log: "对话", picture: "图片", drop: "松手即可添加图片",
    alone: "每个问题单独回答，图片会保留，可以接着问。小模型会出错。",
    copy: "复制", copied: "已复制", again: "重新回答", look: "它看了哪里", hide: "收起",
    waiting: (n) => `前面还有 ${n} 位，请稍候……`, speed: (rate, n) => `${n} 个 token，${rate} token/s`, count: (n) => `${n} 个 token`,
    no_picture: "没有图片，只能猜", single: "这个模型只学过单张图片", stopped: "已停止", cut: "已到长度上限", lost: "和服务器的连接断了，它还在运行吗？", empty: "请先输入问题。",
    unreadable: (name, why) => `读不了 ${name}，换一个试试（服务器说：${why}）。`, busy: "现在提问的人太多，请稍后再试。",
    too_long: (n, most) => `图片和问题一共 ${n} 个 token，模型最多读 ${most} 个：请缩短问题，或去掉一张图片。`, server: (why) => `服务器出错了：${why}`,
    edit: "改一改再问", down: "到最下面", enlarge: "放大", enlarged: "放大的图片", frames: (n) => `看 ${n} 帧`, frame: (n) => `第 ${n} 帧`,
    not_kept: "图片太大，刷新后没有保留", not_kept_long: "浏览器放不下全部图片，刷新页面后最大的会丢失。",
    layer: "层", mean: "各层平均", share: (percent) => `这一步有 ${percent}% 的注意力在这张图上`,
    pick: "把鼠标移到（或点按）答案里的某个词，也可以用方向键切换。亮处是模型写这个词时注意力集中的图块（7×7，各头平均，亮度以最亮的一块为准）。注意力说明信息从哪里读来，并不说明模型为什么这样回答。",
    draw: "画一张图", pad: "画板", canvas: "画布：方向键移动，加号和减号改变大小，回车键画上", drawing_file: "我的画.png",
    drawing_tools: "工具", brush: "画笔", eraser: "橡皮", circle: "圆形", square: "方形", triangle: "三角形", star: "星形", cross: "十字形", ring: "圆环",
    colours: "颜色", red: "红色", orange: "橙色", yellow: "黄色", green: "绿色", cyan: "青色", blue: "蓝色", purple: "紫色", black: "黑色", any_colour: "其他颜色",
    backgrounds: "背景", white: "白色背景", grey: "浅灰背景", beige: "米色背景", pale: "浅蓝背景", dark: "黑色背景", over: "画在图片上",
    undo: "撤销", wipe: "清空", cancel: "取消", use: "用这张画",
    parameters: (n) => `${n}M 参数`, too_big: (name, mb) => `${name} 超过 ${mb} MB，请换一个小一些的文件。`,
    too_many: (n) => `模型一次最多看 ${n} 张图片。`, nothing: "（模型什么也没写。）", ask_alone: "请描述这张图片。", not_picture: (name) => `${name} 不是图片，也不是视频。`,
  },
  en: {
    clear: "New chat", settings: "Generation settings", training: "Training curves", cleared: "Started a new chat.", undo_clear: "Bring back the last one",
    temperature: "Randomness (temperature; 0: always the likeliest word)", top_k: "Candidate words at each step (top‑k; 0: all)",
    top_p: "Total probability of the candidates (top‑p; 1: all)", max_tokens: "Longest answer (max new tokens)",
    seed: "Seed (the same seed, the same answer)", seed_random: "random", reset: "Reset to defaults",
    welcome: "Show a tiny model a picture", samples: "Pick a picture to start, or drop, paste or draw your own",
    welcome_text: "Pick a picture and ask what is in it. The model is tiny, and just as confident where it is wrong. It answers each question on its own: it sees the pictures, but not your earlier questions.",
    welcome_demo: "Pick a picture and ask what is in it, where, in which colour, or how many. The demo's model has only seen coloured shapes, and speaks Chinese and English; to anything else it answers just as confidently. It answers each question on its own: it sees the pictures, but not your earlier questions.",
    ask: "Ask about the picture…", ask_without: "Pick a picture, then ask…", add: "Add pictures or a short video", send: "Send", stop: "Stop", remove: "Remove picture",
    attached: "Attached pictures", questions: "Suggested questions", log: "Conversation", picture: "picture", drop: "Drop to add pictures",
    alone: "Each question is answered on its own. The pictures stay, so you can ask again. Small models make mistakes.",
    copy: "Copy", copied: "Copied", again: "Regenerate", look: "What it looked at", hide: "Hide",
    waiting: (n) => `${n} ahead of you, please wait…`, speed: (rate, n) => `${n} tokens, ${rate} tokens/s`, count: (n) => `${n} tokens`,
    no_picture: "saw no picture, so it guesses", single: "this model learned about single pictures only", stopped: "stopped", cut: "stopped at the length limit", lost: "Lost the connection to the server. Is it still running?", empty: "Write a question first.",
    unreadable: (name, why) => `${name} can't be read, try another one (the server says: ${why}).`, busy: "Too many questions at once: try again in a moment.",
    too_long: (n, most) => `Pictures and question are ${n} tokens, and the model reads at most ${most}: shorten the question, or remove a picture.`, server: (why) => `The server reported a problem: ${why}`,
    edit: "Edit and ask again", down: "To the bottom", enlarge: "Enlarge", enlarged: "Enlarged picture", frames: (n) => `sees ${n} frames`, frame: (n) => `frame ${n}`,
    not_kept: "Picture too large to keep over a reload", not_kept_long: "The browser can't hold all pictures: the largest will be gone after a reload.",
    layer: "Layer", mean: "mean of all layers", share: (percent) => `${percent}% of this step's attention is on this picture`,
    pick: "Point at or tap a word of the answer, or use the arrow keys. Bright patches are where the model's attention went at the step that wrote this word (7×7 patches, averaged over heads, relative to the brightest). Attention shows where information was read from, not why the model gave this answer.",
    draw: "Draw a picture", pad: "Drawing pad", canvas: "Canvas: arrow keys move, plus and minus change the size, Enter draws", drawing_file: "drawing.png",
    drawing_tools: "Tools", brush: "Brush", eraser: "Eraser", circle: "Circle", square: "Square", triangle: "Triangle", star: "Star", cross: "Cross", ring: "Ring",
    colours: "Colours", red: "Red", orange: "Orange", yellow: "Yellow", green: "Green", cyan: "Cyan", blue: "Blue", purple: "Purple", black: "Black", any_colour: "Another colour",
    backgrounds: "Background", white: "White background", grey: "Light grey background", beige: "Beige background", pale: "Light blue background", dark: "Black background", over: "Over the picture",
    undo: "Undo", wipe: "Clear", cancel: "Cancel", use: "Use the drawing",
    parameters: (n) => `${n}M parameters`, too_big: (name, mb) => `${name} is larger than ${mb} MB: pick a smaller one.`,
    too_many: (n) => `The model sees at most ${n} pictures at a time.`, nothing: "(The model wrote nothing.)", ask_alone: "Describe the picture.", not_picture: (name) => `${name} is neither a picture nor a video.`,
  },
};

let info = null; // the server's /info; `backend`: an engine answers, which tells neither its size nor where it looked
let pictures = []; // {url (data:), name, questions}: attached to the next question
let active = null; // the exchange that is being answered
const exchanges = [];
const pad = new Pad((url) => attach(url, t("drawing_file")));

// --- small helpers ------------------------------------------------------------------------------------------------

const button = (name, onclick, ...children) =>
  make("button", { type: "button", className: "plain", onclick, data: children.length ? {} : { label: name } }, icon(name), ...children);

let noticeTimer;
/** Shows an error, or with `good` other news, for a few seconds. */
function notice(text, good = false, ...children) {
  $("notice").replaceChildren(text, ...children);
  $("notice").classList.toggle("good", good);
  $("notice").hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(() => { $("notice").hidden = true; }, children.length ? 12_000 : 6000);
}

/** An error in the page's language: those of the server that visitors meet are known here, by its words. */
function explain(error) {
  if (!(error instanceof ServerError)) return t("lost");
  const [, tokens, most] = /the question has (\d+) tokens, the model reads at most (\d+)/.exec(error.message) ?? [];
  if (tokens) return t("too_long", tokens, most);
  return error.message.includes("others are waiting already") ? t("busy") : t("server", error.message);
}

function showLanguage() {
  if (info) {
    const parameters = info.parameters ? ` · ${t("parameters", (info.parameters / 1e6).toFixed(1))}` : "";
    $("model").textContent = info.model + parameters;
    $("welcome-text").textContent = t(info.demo ? "welcome_demo" : "welcome_text");
  }
  for (const exchange of exchanges) exchange.showTools();
  showPictures();
}

// --- pictures -----------------------------------------------------------------------------------------------------

const readFile = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = reject;
  reader.readAsDataURL(file);
});

// by its type, or by its name where browsers know no type
const isMedium = (file) => /^(image|video)\//.test(file.type) || /\.(heic|heif|avif|jp2|j2k|pgm|ppm|ico)$/i.test(file.name);

async function addFiles(files) {
  for (const file of files) {
    if (!isMedium(file)) notice(t("not_picture", file.name));
    else if (file.size > info.max_picture_bytes) notice(t("too_big", file.name, info.max_picture_bytes / 1e6));
    else if (pictures.length >= info.max_pictures) notice(t("too_many", info.max_pictures));
    else attach(await readFile(file), file.name);
  }
}

function attach(url, name) {
  const picture = { url, name, questions: [] };
  pictures.push(picture);
  checks.set(picture, check(picture));
  showPictures();
  $("question").focus();
}

const checks = new WeakMap(); // picture -> promise that it has been checked

/** Asks the server whether a picture can be read, and how many frames of it the model sees; takes it off if it can't. */
async function check(picture) {
  if (info.backend) return; // engines have no such route
  const { type } = asPart(picture);
  let found;
  try {
    found = await (await post("check", { type, url: picture.url })).json();
  } catch {
    return; // a question will tell what is wrong with the server
  }
  picture.frames = found.frames;
  if (!found.problem) return;
  pictures = pictures.filter((one) => one !== picture);
  notice(t("unreadable", picture.name, found.problem.replace(/^picture 1:? (can't be read: )?/, "")));
  showPictures();
}

/** What is sent of a picture. */
function asPart({ url }) {
  // what may move is sent as a video: our server takes a still GIF, WebP, PNG or AVIF for one of one frame, engines don't
  const moving = info.backend ? /^data:video/ : /^data:(video|image\/(gif|webp|a?png|avif))/;
  return moving.test(url) ? { type: "video_url", video_url: { url } } : { type: "image_url", image_url: { url } };
}

const fileName = (path) => decodeURIComponent(path.split("/").pop());

async function pickSample(sample) {
  const files = await Promise.all(sample.pictures.map(async (path) => (await fetch(path)).blob()));
  const urls = await Promise.all(files.map(readFile));
  pictures = urls.map((url, i) => ({ url, name: fileName(sample.pictures[i]), questions: sample.questions }));
  for (const picture of pictures) checks.set(picture, check(picture));
  showPictures();
  $("question").focus();
}

const isVideo = (picture) => picture.url.startsWith("data:video/");

/** An element that shows a picture; a video plays on its own, as a GIF does. */
function show(picture) {
  if (!picture.url) return make("span", { className: "gone", data: { text: "not_kept" }, textContent: t("not_kept") });
  if (!isVideo(picture)) return make("img", { src: picture.url, alt: picture.name });
  return make("video", { src: picture.url, title: picture.name, muted: true, loop: true, autoplay: true, playsInline: true });
}

/** The same as a button that enlarges it, and below its size and frames. */
function showWithSize(picture) {
  if (!picture.url) return show(picture);
  const shown = show(picture);
  const size = make("span", { className: "size" });
  const measure = () => {
    const [width, height] = isVideo(picture) ? [shown.videoWidth, shown.videoHeight] : [shown.naturalWidth, shown.naturalHeight];
    size.textContent = [width && `${width}×${height}`, picture.frames > 1 && t("frames", picture.frames)].filter(Boolean).join(" · ");
  };
  shown.onload = shown.onloadedmetadata = measure;
  checks.get(picture)?.then(measure);
  const enlarge = make("button", { type: "button", className: "enlarge", data: { label: "enlarge" }, onclick: () => view(picture) }, shown);
  return make("div", { className: "framed" }, enlarge, size);
}

function view(picture) {
  $("viewer").replaceChildren(show(picture), make("p", { textContent: picture.name }));
  $("viewer").showModal();
}

/** The attached pictures, and suggested questions about them. */
function showPictures() {
  $("thumbnails").replaceChildren(...pictures.map((picture) => {
    const remove = make("button", {
      type: "button", data: { label: "remove" },
      onclick: () => { pictures = pictures.filter((one) => one !== picture); showPictures(); $("question").focus(); },
    }, icon("close"));
    remove.className = "remove";
    return make("li", {}, showWithSize(picture), remove);
  }));
  $("question").dataset.placeholder = pictures.length ? "ask" : "ask_without";

  // the first picture's own questions in the page's language, and one that fits any single picture
  const own = (text) => /[\u4e00-\u9fff]/.test(text) === (document.documentElement.lang === "zh-CN");
  const all = pictures[0]?.questions ?? [];
  const questions = new Set(all.some(own) ? all.filter(own) : all);
  if (pictures.length === 1) questions.add(t("ask_alone"));
  $("chips").replaceChildren(...[...questions].map((text) => (
    make("button", { type: "button", textContent: text, onclick: () => ask(text) }))));
  translate($("composer"));
  save();
}

// --- settings -----------------------------------------------------------------------------------------------------

const FIELDS = { temperature: "temperature", top_k: "top_k", top_p: "top_p", max_tokens: "max_new_tokens", seed: "seed" };
const field = (name) => document.querySelector(`#settings-panel [name=${name}]`);

function showSettings() {
  for (const shown of document.querySelectorAll("#settings-panel b")) {
    // an engine may have a limit of its own, which nobody knows here
    const { name, value, dataset } = shown.parentElement.querySelector("input");
    shown.textContent = info?.settings[FIELDS[name]] === null && value === dataset.untouched ? "–" : value;
  }
}

/** Shows the server's own settings, as precisely as a slider can. */
function resetSettings() {
  for (const [name, key] of Object.entries(FIELDS)) {
    const value = info.settings[key] ?? "";
    if (Number(field(name).max) < value) field(name).max = value;
    field(name).value = value;
    field(name).dataset.untouched = field(name).value;
  }
  showSettings();
}

/** Only the settings that were changed on the page; the server has its own for the others. */
function readSettings() {
  const changed = Object.keys(FIELDS).map(field).filter(({ value, dataset }) => value !== "" && value !== dataset.untouched);
  return Object.fromEntries(changed.map(({ name, value }) => [name, Number(value)]));
}

// --- a question and its answer ------------------------------------------------------------------------------------

class Exchange {
  constructor(question, asked) {
    this.question = question;
    this.pictures = asked;
    this.bubble = make("div", { className: "bubble" });
    this.tools = make("div", { className: "tools" });
    this.answer = make("div", { className: "answer" }, this.bubble, this.tools);
    const shown = make("div", { className: "pictures" }, ...asked.map(showWithSize));
    const edit = button("edit", () => this.edit());
    edit.classList.add("edit");
    const mine = make("div", { className: "mine" }, shown, make("div", { className: "bubble", textContent: question }), edit);
    translate(mine);
    this.element = make("article", { className: "exchange" }, mine, this.answer);
  }

  get messages() {
    return [{ role: "user", content: [...this.pictures.map(asPart), { type: "text", text: this.question }] }];
  }

  get text() {
    return this.pieces.map((piece) => piece.text).join("");
  }

  /** Asks, and shows the answer as it comes; aborting `this.controller` stops it, on the server too. */
  async ask() {
    // forget an earlier answer
    Object.assign(this, { pieces: [], finishReason: null, problem: null, ahead: 0, usage: null, attention: null });
    this.closeHeatMap();
    this.bubble.className = "bubble";
    this.bubble.replaceChildren();
    this.answer.setAttribute("aria-busy", "true");

    this.controller = new AbortController();
    active = this;
    showSendButton();
    this.showTools();
    try {
      await this.receive(await post("v1/chat/completions", {
        messages: this.messages, stream: true, stream_options: { include_usage: true }, ...readSettings(),
        ...(info.backend ? {} : { return_token_ids: true }),
      }, this.controller.signal));
      if (!this.finishReason) this.problem = t("lost");
    } catch (error) {
      if (error.name === "AbortError") this.finishReason = "stopped";
      else this.problem = explain(error);
    }

    this.answer.removeAttribute("aria-busy");
    this.conclude();
    active = null;
    showSendButton();
    this.showTools();
    save();
  }

  /** The end of an answer: why there is none, or that it is empty. */
  conclude() {
    if (this.problem) {
      this.bubble.classList.add("bad");
      this.bubble.textContent = this.problem;
    }
    if (!this.problem && !this.text.trim()) {
      const note = this.finishReason === "stopped" ? "stopped" : "nothing";
      this.bubble.append(make("span", { data: { text: note }, textContent: t(note) }));
    }
  }

  /** What is kept over a reload, without the pictures. */
  get record() {
    const pieces = this.pieces.map(({ text, ids }) => ({ text, ids }));
    return { question: this.question, pieces, problem: this.problem, usage: this.usage, finishReason: this.finishReason ?? "stopped" };
  }

  static restore({ question, pieces, problem, usage, finishReason }, asked) {
    const exchange = new Exchange(question, asked);
    Object.assign(exchange, { pieces: [], ahead: 0, attention: null, problem, usage, finishReason });
    for (const { text, ids } of pieces) exchange.addPiece({ text, ids });
    exchange.conclude();
    exchange.showTools();
    return exchange;
  }

  /** Puts the question and its pictures back into the composer. */
  edit() {
    pictures = this.pictures.filter(({ url }) => url);
    showPictures();
    $("question").value = this.question;
    resizeQuestion();
    $("question").focus();
  }

  async receive(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;

      // an empty line ends an event; the rest of the text is the beginning of the next one
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) this.handle(event);
    }
  }

  /** One server-sent event. */
  handle(event) {
    if (event.startsWith(": waiting ")) {
      this.ahead = Number(event.slice(10));
      this.showTools();
      return;
    }
    if (!event.startsWith("data: {")) return;
    const { choices: [choice] = [], usage, error } = JSON.parse(event.slice(6));
    if (error) throw new ServerError(error.message);
    if (usage) this.usage = usage;
    if (!choice) return;
    if (choice.finish_reason) this.finishReason = choice.finish_reason;
    if (choice.delta.content) this.addPiece({ text: choice.delta.content, ids: choice.delta.token_ids });
    else if (this.ahead) { this.ahead = 0; this.showTools(); }
  }

  addPiece(piece) {
    piece.element = make("span", { className: "token", textContent: piece.text });
    this.pieces.push(piece);
    const atBottom = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;
    this.bubble.append(piece.element);
    if (atBottom) scrollDown();
  }

  /** The line under the answer: a place in the queue, or what can be done with the answer. */
  showTools() {
    if (this.ahead) this.tools.textContent = t("waiting", this.ahead);
    else if (active === this) this.tools.replaceChildren();
    else {
      const kept = this.pictures.every(({ url }) => url);
      const tools = kept ? [button("again", () => this.askAgain())] : [];
      if (!this.problem && this.pieces.length) {
        tools.unshift(button("copy", () => this.copy()));
        if (this.pictures.length && kept && !info.backend) {
          const label = make("span", { data: { text: this.heatMap ? "hide" : "look" } });
          this.lookButton = button("eye", () => this.toggleHeatMap(), label);
          this.lookButton.setAttribute("aria-expanded", String(Boolean(this.heatMap)));
          tools.push(this.lookButton);
        }
        tools.push(make("span", { className: "speed", textContent: this.speed() }));
      }
      this.tools.replaceChildren(...tools);
      translate(this.tools);
      this.heatMap?.describe();
    }
  }

  speed() {
    // an engine's answer that was stopped has neither usage nor token ids
    const tokens = this.usage?.completion_tokens ?? this.pieces.reduce((sum, { ids = [] }) => sum + ids.length, 0);
    const rate = this.usage?.tokens_per_second;
    const notes = [];
    if (tokens) notes.push(rate ? t("speed", rate.toFixed(0), tokens) : t("count", tokens));
    if (this.finishReason === "length") notes.push(t("cut"));
    if (this.finishReason === "stopped") notes.push(t("stopped"));
    if (!this.pictures.length && !info.backend) notes.push(t("no_picture"));
    if (this.pictures.length > 1 && info.single) notes.push(t("single"));
    return notes.join(" · ");
  }

  askAgain() {
    if (!active) this.ask();
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.text);
    } catch { // the clipboard is only there on https and localhost
      const area = make("textarea", { value: this.text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    notice(t("copied"), true);
  }

  async toggleHeatMap() {
    if (this.heatMap) {
      this.closeHeatMap();
      this.showTools();
      return;
    }

    // one request for all tokens of the answer, the first time only
    this.lookButton.disabled = true;
    const { pieces } = this;
    try {
      const ids = pieces.flatMap((piece) => piece.ids);
      const attention = this.attention ?? await (await post("attention", { messages: this.messages, token_ids: ids })).json();
      if (pieces !== this.pieces) return; // there is another answer by now
      this.attention = attention;
    } catch (error) {
      notice(explain(error));
      this.lookButton.disabled = false;
      return;
    }

    this.heatMap = new HeatMap(pieces, this.pictures, this.attention);
    this.answer.append(this.heatMap.element);
    this.answer.classList.add("heat-open");
    this.showTools();
    pieces[0].element.focus({ preventScroll: true });

    // on a phone the answer goes to the top, where it stays while the map below it is looked at
    const phone = matchMedia("(max-width: 32rem)").matches;
    const [target, block] = phone ? [this.answer, "start"] : [this.heatMap.element, "nearest"];
    target.scrollIntoView({ block, behavior: "smooth" });
  }

  closeHeatMap() {
    this.heatMap?.remove();
    this.heatMap = null;
    this.answer.classList.remove("heat-open");
  }
}

/** An error that the server explained. */
class ServerError extends Error {}

/** The response; throws a ServerError if the server refused the request. */
async function checked(response) {
  if (response.ok) return response;
  const problem = await response.json().catch(() => null);
  throw new ServerError(problem?.error?.message ?? `${response.status} ${response.statusText}`);
}

async function post(path, body, signal) {
  return checked(await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal }));
}

// --- the page -----------------------------------------------------------------------------------------------------

function scrollDown() {
  window.scrollTo({ top: document.documentElement.scrollHeight });
}

/** While an answer is being written, the send button stops it. */
function showSendButton() {
  $("send-button").dataset.label = active ? "stop" : "send";
  $("send-button").replaceChildren(icon(active ? "stop" : "send"));
  translate($("composer"));
}

function ask(question) {
  if (active || !info) return;
  const text = question.trim() || (pictures.length ? t("ask_alone") : "");
  if (!text) {
    notice(t("empty"));
    return;
  }
  if (!$("notice").querySelector("button")) $("notice").hidden = true;
  const exchange = new Exchange(text, [...pictures]);
  exchanges.push(exchange);
  $("welcome").hidden = true;
  $("log").append(exchange.element);
  $("question").value = "";
  resizeQuestion();
  exchange.ask();
  save();
  scrollDown();
}

/** Makes the text field as high as its text. */
function resizeQuestion() {
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight}px`;
}

/** Begins a new chat; the last one can be brought back for some seconds. */
function clearChat() {
  active?.controller.abort();
  const last = { exchanges: [...exchanges], pictures };
  showChat([], []);
  if (!last.exchanges.length && !last.pictures.length) return;
  const undo = make("button", { type: "button", textContent: t("undo_clear"), onclick: () => {
    showChat([...last.exchanges, ...exchanges], pictures.length ? pictures : last.pictures);
    $("notice").hidden = true;
  } });
  notice(t("cleared"), true, undo);
}

function showChat(all, attached) {
  exchanges.splice(0, Infinity, ...all);
  pictures = attached;
  $("log").replaceChildren(...exchanges.map(({ element }) => element));
  $("welcome").hidden = exchanges.length > 0;
  showPictures();
}

// --- over a reload: the talk is kept by this browser, for this tab ---------------------------------------------------

const KEPT = "talk";

function save() {
  if (!info) return; // before the last talk is restored
  const urls = [...new Set([...exchanges.flatMap((one) => one.pictures), ...pictures].map(({ url }) => url).filter(Boolean))];
  const all = (list) => list.map(({ url, ...rest }) => ({ ...rest, number: urls.indexOf(url) }));
  const kept = [...urls];
  const talk = { exchanges: exchanges.filter((one) => one.pieces).map((one) => ({ ...one.record, pictures: all(one.pictures) })), pictures: all(pictures) };

  // browsers keep some megabytes: drop the largest pictures until the talk fits
  for (;;) {
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ ...talk, urls: kept }));
      break;
    } catch {
      const largest = kept.reduce((best, url, i) => (url && url.length > (kept[best]?.length ?? 0) ? i : best), -1);
      if (largest < 0) return;
      kept[largest] = null;
    }
  }
  for (const url of urls.filter((_, i) => !kept[i])) {
    if (!warned.has(url)) notice(t("not_kept_long"), true);
    warned.add(url);
  }
}

// amid an answer: it is stopped, so that its end isn't taken for a lost connection
addEventListener("beforeunload", () => { active?.controller.abort(); save(); });

const warned = new Set(); // pictures that were said to be too large

function restore() {
  let talk;
  try {
    talk = JSON.parse(sessionStorage.getItem(KEPT));
  } catch { /* no storage */ }
  if (!talk) return;
  const all = (list) => list.map(({ number, ...rest }) => ({ ...rest, url: talk.urls[number] }));
  showChat(talk.exchanges.map((one) => Exchange.restore(one, all(one.pictures))), all(talk.pictures).filter(({ url }) => url));
  scrollDown();
}

function openSettings(open) {
  $("settings-panel").hidden = !open;
  $("settings-button").setAttribute("aria-expanded", String(open));
  if (open) field("temperature").focus();
}

function addListeners() {
  // asking: Enter sends, unless it confirms a Chinese character of an input method
  $("composer").onsubmit = (event) => {
    event.preventDefault();
    if (active) active.controller.abort();
    else ask($("question").value);
  };
  $("question").oninput = resizeQuestion;
  $("question").onkeydown = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    if (!active) ask($("question").value);
  };

  // adding pictures: by the button, drawn, pasted, or dropped
  $("add").onclick = () => $("files").click();
  $("files").onchange = async () => { await addFiles([...$("files").files]); $("files").value = ""; };
  document.body.append(pad.element);
  $("draw").onclick = () => {
    if (!(pictures.length >= info?.max_pictures)) pad.open(pictures); // an engine's limit is not known
    else notice(t("too_many", info.max_pictures));
  };
  document.onpaste = (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) { event.preventDefault(); addFiles(files); }
  };
  let depth = 0; // of elements under the pointer: each of them sends dragenter and dragleave
  document.ondragenter = (event) => { if (event.dataTransfer.types.includes("Files")) { depth += 1; $("drop").hidden = false; } };
  document.ondragleave = () => { depth = Math.max(0, depth - 1); $("drop").hidden = depth === 0; };
  document.ondragover = (event) => event.preventDefault();
  document.ondrop = (event) => {
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    addFiles([...event.dataTransfer.files]);
  };

  // a click anywhere closes an enlarged picture; a button leads back to the newest answer
  $("viewer").onclick = () => $("viewer").close();
  $("down-button").onclick = scrollDown;
  const showDown = () => {
    $("down-button").hidden = document.documentElement.scrollHeight - window.innerHeight - window.scrollY < 200;
  };
  addEventListener("scroll", showDown);
  new ResizeObserver(showDown).observe(document.body);

  // the buttons at the top; Escape and a click elsewhere close the settings. In the pad Escape closes the pad only
  $("clear-button").onclick = clearChat;
  $("settings-button").onclick = () => openSettings($("settings-panel").hidden);
  $("settings-panel").oninput = showSettings;
  $("reset").onclick = resetSettings;
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing || pad.element.open || $("viewer").open) return;
    if (!$("settings-panel").hidden) { openSettings(false); $("settings-button").focus(); } else active?.controller.abort();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("#settings-panel, #settings-button")) openSettings(false);
  });
}

/** The sample pictures, each set once, with all questions about it. */
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

async function start() {
  addListeners();
  setUp(TEXTS, showLanguage);
  showSendButton();
  try {
    info = await (await checked(await fetch("info"))).json();
  } catch (error) {
    notice(explain(error));
    return;
  }
  resetSettings();
  showSamples();
  restore();
  showLanguage();
  $("question").focus();
}

start();
