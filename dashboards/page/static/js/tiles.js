// Cells of stores as pixels, one tile a store, put where the grid says. Knows colours, no layout.
// Only tiles that are asked for are painted; where a cell is one pixel they go straight to the page.

export class Tiles {
  constructor() {
    this.canvas = document.createElement("canvas");
    this.context = this.canvas.getContext("2d");
    this.words = new Uint32Array(0);
    this.byTier = {};
  }

  // Colours of the kinds, as bytes [r, g, b].
  setColours(bytes) {
    this.words = new Uint32Array(
      bytes.map(([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0),
    );
    this.byTier = {};
  }

  // Room for `count` tiles of a model under each other.
  setSize(model, count) {
    const [width, height] = [model.experts, model.layers.length * count];
    if (this.image && this.image.width === width && this.image.height === height) return;
    this.canvas.width = width;
    this.canvas.height = height;
    this.image = new ImageData(width, height);
    this.painted = new Uint32Array(this.image.data.buffer);
    this.kinds = new Uint8Array(model.blocks);
  }

  // Paint what `shown` (a store's number, or "best") has into a tile.
  paint(model, shown, tile) {
    const { painted } = this;
    const from = tile * model.blocks;
    if (shown === "best") {
      model.kindsOf(shown, this.kinds);
      for (let i = 0; i < model.blocks; i += 1) painted[from + i] = this.words[this.kinds[i]];
      return;
    }
    // Straight from cell to colour: with many stores this loop is most of a frame.
    const colours = this.#coloursOf(model, model.stores[shown].tier);
    const { cells } = model;
    const first = shown * model.blocks;
    for (let i = 0; i < model.blocks; i += 1) painted[from + i] = colours[cells[first + i]];
  }

  // Put a painted tile on a page, its corner at x, y and its cells so large.
  put(context, model, tile, { x, y, cellWidth, cellHeight }) {
    const rows = model.layers.length;
    const top = tile * rows;
    if (cellWidth === 1 && cellHeight === 1) {
      context.putImageData(this.image, x, y - top, 0, top, model.experts, rows);
      return;
    }
    this.context.putImageData(this.image, 0, 0, 0, top, model.experts, rows);
    context.drawImage(this.canvas, 0, top, model.experts, rows,
      x, y, cellWidth * model.experts, cellHeight * rows);
  }

  // Colour of each possible cell in a tier.
  #coloursOf(model, tier) {
    if (!this.byTier[tier]) {
      const table = new Uint32Array(1 << 16);
      model.kinds[tier].forEach((kind, bits) => {
        table[bits] = this.words[kind];
      });
      this.byTier[tier] = table;
    }
    return this.byTier[tier];
  }
}
