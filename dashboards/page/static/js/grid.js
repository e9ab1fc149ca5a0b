// The residency picture: layers x experts of one store, of the nearest copies, or of all stores.
// Draws only when something has changed; one pixel a cell is painted and then scaled up.

import { KINDS } from "./model.js";

const GAP = 8;
const LABEL = 14;

export class Grid {
  constructor(canvas, box) {
    this.canvas = canvas;
    this.box = box;
    this.context = canvas.getContext("2d", { alpha: false });
    this.pixels = document.createElement("canvas");
    this.model = null;
    this.view = "best";
    this.cursor = { store: 0, row: 0, expert: 0 };
    this.frames = 0;
    this.dirty = false;
    this.onMove = () => {};
    this.onAsk = () => {};
    this.onStore = () => {};
    this.readColours();
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("click", (event) => this.#click(event));
    canvas.addEventListener("focus", () => this.invalidate());
    canvas.addEventListener("blur", () => this.invalidate());
    new ResizeObserver(() => this.invalidate()).observe(box);
  }

  // Colours come from the style sheet, so that light and dark are decided in one place.
  readColours() {
    const style = getComputedStyle(document.documentElement);
    this.colours = KINDS.map((_, kind) => style.getPropertyValue(`--k${kind}`).trim());
    this.paper = style.getPropertyValue("--paper").trim();
    this.ink = style.getPropertyValue("--ink").trim();
    this.focus = style.getPropertyValue("--focus").trim();
    const bytes = this.colours.map((text) => rgb(text));
    this.words = new Uint32Array(
      bytes.map(([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0),
    );
    this.byCell = {};
    this.letters = bytes.map((colour) => (luminance(colour) > 0.179 ? "#000" : "#fff"));
    this.invalidate();
  }

  setModel(model) {
    this.model = model;
    this.byCell = {};
    this.cursor = { store: 0, row: 0, expert: 0 };
    this.invalidate();
  }

  invalidate() {
    if (this.dirty) return;
    this.dirty = true;
    requestAnimationFrame(() => {
      this.dirty = false;
      this.draw();
    });
  }

  // Which stores are drawn, as arguments of Model.kindsOf.
  shown() {
    if (this.view === "all") return this.model.stores.map((_, number) => number);
    return [this.view === "best" ? "best" : Number(this.view)];
  }

  layout() {
    const { model } = this;
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(64, Math.floor(this.box.clientWidth * ratio));
    const rows = model.layers.length;
    const tiles = this.shown().length;
    const many = this.view === "all";
    if (!many) {
      const height = Math.floor(384 * ratio);
      const cellWidth = Math.max(1, Math.floor(width / model.experts));
      const cellHeight = Math.max(1, Math.floor(height / rows));
      return { ratio, width, height, columns: 1, cellWidth, cellHeight, tileWidth: width,
        tileHeight: height, label: 0 };
    }
    const gap = GAP * ratio;
    const label = LABEL * ratio;
    // As large as fits into the box; else one column after another of whole pixels, to scroll.
    let [columns, cell] = [1, 0];
    for (let tried = 1; tried <= tiles; tried += 1) {
      const across = ((width + gap) / tried - gap) / model.experts;
      const down = (384 * ratio / Math.ceil(tiles / tried) - label - gap) / rows;
      const size = Math.floor(Math.min(across, down));
      if (size > cell) [columns, cell] = [tried, size];
    }
    if (!cell) columns = Math.max(1, Math.floor((width + gap) / (model.experts + gap)));
    const cellWidth = Math.max(1, cell);
    const cellHeight = cellWidth;
    const tileWidth = cellWidth * model.experts + gap;
    const tileHeight = cellHeight * rows + label + gap;
    const height = Math.ceil(tiles / columns) * tileHeight;
    return { ratio, width, height, columns, cellWidth, cellHeight, tileWidth, tileHeight, label };
  }

  draw() {
    const { model, context } = this;
    if (!model || !model.moment) return;
    const shown = this.shown();
    const layout = this.layout();
    this.placed = layout;
    if (this.canvas.width !== layout.width || this.canvas.height !== layout.height) {
      this.canvas.width = layout.width;
      this.canvas.height = layout.height;
      this.canvas.style.height = `${layout.height / layout.ratio}px`;
    }
    context.fillStyle = this.paper;
    context.fillRect(0, 0, layout.width, layout.height);
    context.imageSmoothingEnabled = false;
    this.#paint(shown);
    const rows = model.layers.length;
    shown.forEach((store, tile) => {
      const [x, y] = this.#corner(tile, layout);
      context.drawImage(this.pixels, 0, tile * rows, model.experts, rows,
        x, y, layout.cellWidth * model.experts, layout.cellHeight * rows);
      if (layout.label) {
        context.fillStyle = this.ink;
        context.font = `${11 * layout.ratio}px system-ui, "DejaVu Sans", sans-serif`;
        context.fillText(model.stores[store].name, x, y - 3 * layout.ratio);
      }
    });
    if (shown.length === 1 && Math.min(layout.cellWidth, layout.cellHeight) >= 6 * layout.ratio) {
      this.#detail(layout, shown[0]);
    }
    this.#drawCursor(layout);
    this.frames += 1;
  }

  // One pixel a cell, tiles under each other.
  #paint(shown) {
    const { model } = this;
    const height = model.layers.length * shown.length;
    if (this.pixels.width !== model.experts || this.pixels.height !== height || !this.image) {
      this.pixels.width = model.experts;
      this.pixels.height = height;
      this.image = new ImageData(model.experts, height);
      this.painted = new Uint32Array(this.image.data.buffer);
      this.kinds = new Uint8Array(model.blocks);
    }
    const { painted } = this;
    shown.forEach((store, tile) => {
      const from = tile * model.blocks;
      if (store === "best") {
        model.kindsOf(store, this.kinds);
        for (let i = 0; i < model.blocks; i += 1) painted[i] = this.words[this.kinds[i]];
        return;
      }
      // Straight from cell to colour: with many stores this loop is most of a frame.
      const colours = this.#coloursOf(model.stores[store].tier);
      const { cells } = model;
      const first = store * model.blocks;
      for (let i = 0; i < model.blocks; i += 1) painted[from + i] = colours[cells[first + i]];
    });
    this.pixels.getContext("2d").putImageData(this.image, 0, 0);
  }

  // Colour of each possible cell in a tier.
  #coloursOf(tier) {
    if (!this.byCell[tier]) {
      const table = new Uint32Array(1 << 16);
      this.model.kinds[tier].forEach((kind, bits) => {
        table[bits] = this.words[kind];
      });
      this.byCell[tier] = table;
    }
    return this.byCell[tier];
  }

  // Lines between cells, and letters where they fit, so that colour is never alone.
  #detail(layout, store) {
    const { model, context } = this;
    const rows = model.layers.length;
    const { cellWidth, cellHeight } = layout;
    context.fillStyle = this.paper;
    for (let e = 1; e < model.experts; e += 1) {
      context.fillRect(e * cellWidth, 0, 1, rows * cellHeight);
    }
    for (let row = 1; row < rows; row += 1) {
      context.fillRect(0, row * cellHeight, model.experts * cellWidth, 1);
    }
    const size = Math.floor(Math.min(cellWidth, cellHeight, 22 * layout.ratio) * 0.62);
    if (size < 8 * layout.ratio) return;
    context.font = `${size}px ui-monospace, "DejaVu Sans Mono", monospace`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (let row = 0; row < rows; row += 1) {
      for (let expert = 0; expert < model.experts; expert += 1) {
        const kind = model.kindAt(store, row, expert);
        if (!KINDS[kind].letter) continue;
        context.fillStyle = this.letters[kind];
        context.fillText(KINDS[kind].letter, (expert + 0.5) * cellWidth, (row + 0.5) * cellHeight);
      }
    }
    context.textAlign = "start";
    context.textBaseline = "alphabetic";
  }

  #corner(tile, layout) {
    const column = tile % layout.columns;
    const line = Math.floor(tile / layout.columns);
    return [column * layout.tileWidth, line * layout.tileHeight + layout.label];
  }

  // Rectangle of a cell on the canvas: [x, y, width, height].
  rectangle(store, row, expert) {
    const tile = this.view === "all" ? store : 0;
    const [x, y] = this.#corner(tile, this.placed);
    const { cellWidth, cellHeight } = this.placed;
    return [x + expert * cellWidth, y + row * cellHeight, cellWidth, cellHeight];
  }

  #drawCursor(layout) {
    if (document.activeElement !== this.canvas) return;
    const { store, row, expert } = this.cursor;
    const [x, y, width, height] = this.rectangle(store, row, expert);
    const line = 2 * layout.ratio;
    const { context } = this;
    context.lineWidth = line * 2;
    context.strokeStyle = this.paper;
    context.strokeRect(x - line, y - line, width + 2 * line, height + 2 * line);
    context.lineWidth = line;
    context.strokeStyle = this.focus;
    context.strokeRect(x - line, y - line, width + 2 * line, height + 2 * line);
  }

  // Colour on the canvas of one cell, away from lines and letters.
  sample(store, row, expert) {
    const [x, y, width, height] = this.rectangle(store, row, expert);
    const at = [x + Math.floor(width * 0.15) + (width > 5 ? 1 : 0),
      y + Math.floor(height * 0.15) + (height > 5 ? 1 : 0)];
    return Array.from(this.context.getImageData(at[0], at[1], 1, 1).data.slice(0, 3));
  }

  move(store, row, expert) {
    const { model } = this;
    const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));
    this.cursor = {
      store: clamp(store, model.stores.length),
      row: clamp(row, model.layers.length),
      expert: clamp(expert, model.experts),
    };
    this.invalidate();
    this.onMove();
  }

  #key(event) {
    if (!this.model || event.ctrlKey || event.altKey || event.metaKey) return;
    const { store, row, expert } = this.cursor;
    const step = event.shiftKey ? 8 : 1;
    const steps = {
      ArrowLeft: [store, row, expert - step],
      ArrowRight: [store, row, expert + step],
      ArrowUp: [store, row - step, expert],
      ArrowDown: [store, row + step, expert],
      Home: [store, row, 0],
      End: [store, row, this.model.experts - 1],
      PageUp: [store - 1, row, expert],
      PageDown: [store + 1, row, expert],
    };
    if (event.key === "Enter") {
      this.onAsk();
    } else if (steps[event.key]) {
      this.move(...steps[event.key]);
      if (event.key.startsWith("Page")) this.onStore();
    } else {
      return;
    }
    event.preventDefault();
  }

  #click(event) {
    if (!this.placed) return;
    const bounds = this.canvas.getBoundingClientRect();
    const { ratio, cellWidth, cellHeight, columns, tileWidth, tileHeight, label } = this.placed;
    const x = (event.clientX - bounds.left) * ratio;
    const y = (event.clientY - bounds.top) * ratio;
    const many = this.view === "all";
    const column = many ? Math.floor(x / tileWidth) : 0;
    const line = many ? Math.floor(y / tileHeight) : 0;
    const tile = line * columns + column;
    if (many && tile >= this.model.stores.length) return;
    const expert = Math.floor((x - column * tileWidth * (many ? 1 : 0)) / cellWidth);
    const row = Math.floor((y - line * tileHeight * (many ? 1 : 0) - label) / cellHeight);
    if (expert >= this.model.experts || row < 0 || row >= this.model.layers.length) return;
    this.move(many ? tile : this.cursor.store, row, expert);
    this.onAsk();
  }
}

function rgb(text) {
  const hex = text.replace("#", "");
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

// Relative luminance by WCAG; above 0.179 black has more contrast than white.
function luminance(colour) {
  const [r, g, b] = colour.map((byte) => {
    const part = byte / 255;
    return part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
