// The drawing pad: a square that is drawn on with a brush and the shapes of the demo's world, and used as a picture.

import { icon, make } from "./common.js";

const SIDE = 448; // pixels of the drawing, twice what the demo's CLIP sees
const WIDTHS = { brush: 16, eraser: 40 };
const STEP = 16; // how far an arrow key moves

// colours as dataset/demo/drawing.py has them, and backgrounds
const COLOURS = {
  red: "#de2d2d", orange: "#f58c19", yellow: "#f5d723", green: "#2da546",
  cyan: "#46cdd7", blue: "#2850d2", purple: "#8c3cb9", black: "#232328",
};
const BACKGROUNDS = { white: "#ffffff", grey: "#dee2e6", beige: "#f6ecd6", pale: "#dceaf6", dark: "#101014" };

// the shapes of dataset/demo/drawing.py, at radius 1 around (0, 0), as SVG path data
const polygon = (corners) => `M${corners.join("L")}Z`;
const disc = (r) => `M${r},0A${r},${r},0,1,1,${-r},0A${r},${r},0,1,1,${r},0Z`;
const around = (count, radius) => Array.from({ length: count }, (_, k) => {
  const angle = (k / count) * 2 * Math.PI;
  return [Math.sin(angle) * radius(k), -Math.cos(angle) * radius(k)];
});
const A = 0.29; // half the width of the cross's arms
const SHAPES = {
  circle: disc(1),
  square: polygon([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]]),
  triangle: polygon(around(3, () => 1.05).map(([x, y]) => [x, y + 0.2])),
  star: polygon(around(10, (k) => (k % 2 ? 0.45 : 1.05))),
  cross: polygon([[-A, -1], [A, -1], [A, -A], [1, -A], [1, A], [A, A], [A, 1], [-A, 1], [-A, A], [-1, A], [-1, -A], [-A, -A]]),
  ring: disc(1) + disc(0.56),
};

function shapeIcon(shape) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "-1.2 -1.2 2.4 2.4");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", SHAPES[shape]);
  svg.append(path);
  return svg;
}

/** Draws a stroke {tool, colour, points} or a shape {tool, colour, x, y, radius}, or wipes everything off. */
function draw(pen, { tool, colour, points, x, y, radius }) {
  pen.save();
  if (tool === "wipe") pen.clearRect(0, 0, SIDE, SIDE);
  else if (points) {
    Object.assign(pen, { lineWidth: WIDTHS[tool], lineCap: "round", lineJoin: "round", strokeStyle: colour });
    if (tool === "eraser") pen.globalCompositeOperation = "destination-out";
    pen.beginPath();
    pen.moveTo(points[0][0] - 0.01, points[0][1]); // a line of no length would leave no dot
    for (const point of points) pen.lineTo(...point);
    pen.stroke();
  } else {
    pen.translate(x, y);
    pen.scale(radius, radius);
    pen.fillStyle = colour;
    pen.fill(new Path2D(SHAPES[tool]), "evenodd");
  }
  pen.restore();
}

/** Whether a picture may be an animation: a GIF, or what its first bytes call animated WebP, PNG or AVIF. */
const mayMove = ({ url }) => /^GIF|ANIM|acTL|avis/.test(atob(url.slice(url.indexOf(",") + 1).slice(0, 400)));

/** A dialog with a canvas and its tools; `element` goes into the page. What is drawn stays until it is used or cleared. */
export class Pad {
  /** use: called with the drawing, a PNG in a data: URL. */
  constructor(use) {
    this.use = use;
    this.items = []; // what was drawn, in order; see draw()
    this.current = null; // the item that the pointer is drawing
    this.cursor = null; // {x, y} while the arrow keys are used
    this.radius = 76; // of a shape that is tapped: one of the demo's big ones
    this.layer = make("canvas", { width: SIDE, height: SIDE }); // the items without the background
    this.canvas = this.makeCanvas();
    this.element = make("dialog", { id: "pad", data: { name: "pad" } }, this.canvas, this.makeTools());
    this.choose("tool", "brush");
    this.choose("colour", COLOURS.red);
    this.choose("background", BACKGROUNDS.white);
    document.addEventListener("keydown", (event) => {
      if (this.element.open && (event.ctrlKey || event.metaKey) && event.key === "z") this.undo();
    });
  }

  /** Opens the pad; if a single still picture is attached, it can be drawn over. */
  async open(pictures) {
    let picture = null;
    if (pictures.length === 1 && !mayMove(pictures[0])) {
      const image = make("img", { src: pictures[0].url });
      picture = await image.decode().then(() => image, () => null); // null: a format that the browser can't show
    }
    this.picture = picture;
    this.over.hidden = !picture;
    if (!picture && this.background === "picture") this.choose("background", BACKGROUNDS.white);
    this.paint();
    this.element.showModal();
  }

  // --- the dialog -------------------------------------------------------------------------------------------------

  makeCanvas() {
    const canvas = make("canvas", { width: SIDE, height: SIDE, tabIndex: 0, role: "application", data: { name: "canvas" } });
    const at = (event) => [event.offsetX, event.offsetY].map((offset) => (offset * SIDE) / canvas.clientWidth);
    canvas.onpointerdown = (event) => {
      if (!event.isPrimary || event.button !== 0) return;
      canvas.setPointerCapture(event.pointerId);
      this.cursor = null;
      this.begin(...at(event));
    };
    canvas.onpointermove = (event) => { if (this.current && event.isPrimary) this.drag(...at(event)); };
    canvas.ontouchstart = (event) => event.preventDefault(); // else a quick stroke is a fling, which swallows the tap after it
    canvas.onlostpointercapture = () => { this.current = null; };
    canvas.onkeydown = (event) => this.onKey(event);
    canvas.onblur = () => { this.cursor = null; this.paint(); };
    return canvas;
  }

  makeTools() {
    const group = (name, ...children) => make("div", { className: name, role: "group", data: { name } }, ...children);
    const choice = (field, value, names, properties, ...children) => make("button", {
      type: "button", onclick: () => this.choose(field, value), data: { [field]: value, ...names }, ...properties,
    }, ...children);
    const tool = (name, image) => choice("tool", name, { label: name }, {}, image);
    const swatch = (field) => ([label, value]) => choice(field, value, { label }, { className: "swatch", style: `--swatch: ${value}` });
    const action = (name, onclick, image) => make("button", { type: "button", onclick, data: { label: name } }, icon(image));

    const pickColour = (event) => this.choose("colour", event.target.value);
    this.over = choice("background", "picture", { text: "over" });
    return make("div", { className: "panel" },
      group("drawing_tools",
        ...Object.keys(WIDTHS).map((name) => tool(name, icon(name))), ...Object.keys(SHAPES).map((name) => tool(name, shapeIcon(name)))),
      group("colours", ...Object.entries(COLOURS).map(swatch("colour")), make("input", {
        type: "color", value: "#e667a8", className: "swatch", oninput: pickColour, onclick: pickColour, data: { label: "any_colour" },
      })),
      group("backgrounds", ...Object.entries(BACKGROUNDS).map(swatch("background")), this.over),
      make("div", { className: "actions" },
        action("undo", () => this.undo(), "undo"), action("wipe", () => this.add({ tool: "wipe" }), "clear"),
        action("cancel", () => this.element.close(), "close"),
        make("button", { type: "button", className: "use", onclick: () => this.finish(), data: { text: "use" } })));
  }

  /** Sets this.tool, this.colour or this.background, and shows which of the buttons for it is chosen. */
  choose(field, value) {
    this[field] = value;
    for (const button of this.element.querySelectorAll(`button[data-${field}]`)) {
      button.setAttribute("aria-pressed", String(button.dataset[field] === value));
    }
    this.paint();
  }

  // --- drawing ----------------------------------------------------------------------------------------------------

  /** Puts a dot or a shape of the usual size; dragging from there draws on, or resizes the shape. */
  begin(x, y) {
    const { tool, colour } = this;
    this.current = WIDTHS[tool] ? { tool, colour, points: [[x, y]] } : { tool, colour, x, y, radius: this.radius };
    this.add(this.current);
  }

  drag(x, y) {
    const item = this.current;
    if (item.points) item.points.push([x, y]);
    else {
      // a finger that taps moves a little too
      const distance = Math.hypot(x - item.x, y - item.y);
      item.radius = distance < 16 ? this.radius : distance;
    }
    this.paint();
  }

  /** Arrow keys move a cursor, + and - change the size of a shape, Enter and Space put it. */
  onKey(event) {
    const [dx, dy] = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] }[event.key] ?? [0, 0];
    const growth = { "+": 8, "=": 8, "-": -8 }[event.key] ?? 0;
    const put = event.key === "Enter" || event.key === " ";
    if (event.ctrlKey || event.metaKey || !(dx || dy || growth || put)) return;
    event.preventDefault();
    const inside = (value) => Math.min(SIDE, Math.max(0, value));
    const { x, y } = this.cursor ?? { x: SIDE / 2, y: SIDE / 2 };
    this.cursor = { x: inside(x + dx), y: inside(y + dy) };
    this.radius = Math.min(SIDE / 2, Math.max(16, this.radius + growth));
    if (put) this.begin(this.cursor.x, this.cursor.y);
    this.current = null;
    this.paint();
  }

  add(item) {
    this.items.push(item);
    this.paint();
  }

  undo() {
    this.items.pop();
    this.paint();
  }

  paint() {
    // the items on a layer of their own, so that the eraser leaves the background
    const layer = this.layer.getContext("2d");
    draw(layer, { tool: "wipe" });
    for (const item of this.items) draw(layer, item);

    // the background, with an attached picture squeezed to the square, as the model sees it
    const pen = this.canvas.getContext("2d");
    pen.fillStyle = this.background === "picture" ? BACKGROUNDS.white : this.background;
    pen.fillRect(0, 0, SIDE, SIDE);
    if (this.background === "picture" && this.picture) pen.drawImage(this.picture, 0, 0, SIDE, SIDE);
    pen.drawImage(this.layer, 0, 0);
    if (this.cursor) this.paintCursor(pen);
  }

  /** The outline of what Enter would put at the cursor. */
  paintCursor(pen) {
    const radius = WIDTHS[this.tool] / 2 || this.radius;
    pen.save();
    pen.translate(this.cursor.x, this.cursor.y);
    pen.scale(radius, radius);
    pen.lineWidth = 2 / radius;
    pen.setLineDash([6 / radius, 4 / radius]);
    pen.stroke(new Path2D(SHAPES[this.tool] ?? SHAPES.circle));
    pen.restore();
  }

  /** Hands the drawing over, and forgets it. */
  finish() {
    const url = this.canvas.toDataURL(); // at once; toBlob may wait for seconds on a busy machine
    this.items = [];
    this.element.close();
    this.use(url);
  }
}
