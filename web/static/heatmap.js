// Heat maps of an answer: which patches of the pictures the model attended to as it wrote each piece of the text.

import { make, t, translate } from "./common.js";

/** The heat maps of one answer, one for each picture and each frame of a video; `element` goes into the page. */
export class HeatMap {
  /**
   * pieces: {element, ids} of the answer; pointing at an element, tapping or focusing it shows the maps of its tokens.
   * pictures: {url, name} of the question. attention: what /attention returned for this answer.
   */
  constructor(pieces, pictures, attention) {
    this.pieces = pieces;
    this.shares = attention.shares; // [layer][token][picture or frame][patch]
    this.maps = HeatMap.images(pictures, attention.frames).map(([image, frame]) => ({
      image,
      frame,
      canvas: make("canvas", { width: attention.grid, height: attention.grid }),
      caption: make("figcaption"),
    }));
    this.layer = this.makeLayerChoice();
    this.element = this.makeElement();
    pieces.forEach((piece, i) => this.makeFocusable(piece.element, i));
    this.show(0);
    translate(this.element);
  }

  /** [image, number of the frame or 0]: pictures as they were sent, and of videos the frames that the model saw. */
  static images(pictures, frames) {
    return pictures.flatMap((picture, i) => frames[i].map((url, k) => (
      [make("img", { src: url ?? picture.url, alt: picture.name }), url ? k + 1 : 0])));
  }

  makeLayerChoice() {
    const choice = make("select", { onchange: () => this.show(this.shown) }, make("option", { value: "mean", data: { text: "mean" } }));
    for (let i = 1; i <= this.shares.length; i++) choice.append(make("option", { value: i, textContent: i }));
    return choice;
  }

  makeElement() {
    const figures = this.maps.map(({ image, canvas, caption }) => (
      make("figure", {}, make("div", { className: "layered" }, image, canvas), caption)));
    return make("div", { className: "heat" },
      make("div", { className: "maps" }, ...figures),
      make("label", {}, make("span", { data: { text: "layer" } }), this.layer),
      make("p", { data: { text: "pick" } }));
  }

  makeFocusable(element, number) {
    element.role = "button";
    element.onpointerenter = element.onclick = element.onfocus = () => this.show(number);
    element.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) this.pieces[number + step]?.element.focus();
    };
  }

  /** Draws the maps of one piece of the answer. */
  show(number) {
    this.shown = number;

    // Tab reaches only this piece; the arrow keys go from piece to piece
    this.pieces.forEach(({ element }, i) => {
      element.classList.toggle("shown", i === number);
      element.tabIndex = i === number ? 0 : -1;
    });

    this.maps.forEach(({ canvas, caption, frame }, i) => {
      const shares = this.sharesOf(number, i);
      darken(canvas, shares);
      caption.textContent = [t("share", (sum(shares) * 100).toFixed(0)), frame && t("frame", frame)].filter(Boolean).join(" · ");
    });
  }

  /** The share of attention for each patch of a picture: the mean over a piece's tokens and the chosen layers. */
  sharesOf(number, picture) {
    // a piece without tokens of its own ends a character that the last token before it began
    const end = sum(this.pieces.slice(0, number + 1).map((piece) => piece.ids.length));
    const begin = Math.min(end - this.pieces[number].ids.length, end - 1);

    const layers = this.layer.value === "mean" ? this.shares : [this.shares[this.layer.value - 1]];
    const rows = layers.flatMap((tokens) => tokens.slice(begin, end)).map((pictures) => pictures[picture]);
    return rows[0].map((_, patch) => sum(rows.map((row) => row[patch])) / rows.length);
  }

  /** Renders the texts again, after a change of language. */
  describe() {
    translate(this.element);
    this.show(this.shown);
  }

  /** Removes the maps, and makes the answer plain text again. */
  remove() {
    this.element.remove();
    for (const { element } of this.pieces) {
      element.onpointerenter = element.onclick = element.onfocus = element.onkeydown = null;
      for (const name of ["tabindex", "role"]) element.removeAttribute(name);
    }
  }
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

/** Covers a picture with darkness, less of it where the share of attention is larger; none over the largest. */
function darken(canvas, shares) {
  const largest = Math.max(...shares) || 1;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  shares.forEach((share, i) => pixels.data.set([12, 14, 40, Math.round(215 * (1 - share / largest))], i * 4));
  context.putImageData(pixels, 0, 0);
}
