// What the pages share: two languages, light and dark colours, and a short way to make elements.

const SHARED_TEXTS = {
  zh: { language: "EN", language_label: "English", theme: "切换深浅色" },
  en: { language: "中", language_label: "中文", theme: "Light or dark" },
};

export const $ = (id) => document.getElementById(id);
const remembered = (name) => { try { return localStorage.getItem(name); } catch { return null; } };
const remember = (name, value) => { try { localStorage.setItem(name, value); } catch { /* private windows may have no storage */ } };

let language = remembered("language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let texts = SHARED_TEXTS;

/** A text in the language of the page; `values` fill its gaps. */
export function t(name, ...values) {
  const text = texts[language][name];
  return typeof text === "function" ? text(...values) : text;
}

/** An element with properties, data- attributes under `data`, and children. */
export function make(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** A picture of the page's sprite. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Fills in the texts that elements name: as content, placeholder, or accessible name, with data-label as tooltip too. */
export function translate(root = document) {
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of root.querySelectorAll("[data-placeholder]")) element.placeholder = t(element.dataset.placeholder);
  for (const element of root.querySelectorAll("[data-name]")) element.setAttribute("aria-label", t(element.dataset.name));
  for (const element of root.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    element.title = t(element.dataset.label);
  }
}

/**
 * Gives the page its texts, {zh: {name: text}, en: ...}, and makes its buttons for language and colours work.
 * Calls `changed` now and after each change of language.
 */
export function setUp(pageTexts, changed) {
  texts = { zh: { ...SHARED_TEXTS.zh, ...pageTexts.zh }, en: { ...SHARED_TEXTS.en, ...pageTexts.en } };
  const show = () => {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    translate();
    $("language").textContent = t("language");
    for (const attribute of ["aria-label", "title"]) $("language").setAttribute(attribute, t("language_label"));
    changed();
  };
  $("language").onclick = () => { language = language === "zh" ? "en" : "zh"; remember("language", language); show(); };

  // the system decides between light and dark until the visitor does
  const theme = remembered("theme");
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme-button").onclick = () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
    document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
    remember("theme", document.documentElement.dataset.theme);
  };
  show();
}
