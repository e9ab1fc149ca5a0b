// Cells of a run as the server sends them, and what kind each is. Knows no picture.

// Kinds, nearest to compute first; the style sheet has a colour --kN and the grid a letter for each.
export const KINDS = [
  { letter: "", name: "storage only" },
  { letter: "H", name: "HBM, full precision" },
  { letter: "Ḣ", name: "HBM, lossless" },
  { letter: "h", name: "HBM, reduced" },
  { letter: "D", name: "host memory, full precision" },
  { letter: "Ḋ", name: "host memory, lossless" },
  { letter: "d", name: "host memory, reduced" },
  { letter: "C", name: "CXL pool, full precision" },
  { letter: "Ċ", name: "CXL pool, lossless" },
  { letter: "c", name: "CXL pool, reduced" },
  { letter: "›", name: "asked for, on its way" },
];
const BASE = { hbm: 1, compressed: 1, host: 4, cxl: 7 };
const TIER_NAMES = { hbm: "HBM", compressed: "near HBM", host: "host memory", cxl: "CXL pool" };

export class Model {
  constructor(hello) {
    this.layers = hello.layers;
    this.experts = hello.experts;
    this.formats = hello.formats;
    this.askedBit = hello.asked_bit;
    this.blocks = hello.layers.length * hello.experts;
    this.cells = new Uint16Array(0);
    this.stores = [];
    this.moment = null;
    this.kinds = {};
    for (const tier of Object.keys(BASE)) this.kinds[tier] = this.#table(BASE[tier]);
  }

  // Kind of each possible cell in a tier.
  #table(base) {
    const full = 1 << this.formats.indexOf("bf16");
    const lossless = 1 << this.formats.indexOf("bf16z");
    const copies = (1 << this.formats.length) - 1;
    const table = new Uint8Array(1 << 16);
    for (let bits = 0; bits < table.length; bits += 1) {
      if (bits & full) table[bits] = base;
      else if (bits & lossless) table[bits] = base + 1;
      else if (bits & copies) table[bits] = base + 2;
      else if (bits & this.askedBit) table[bits] = 10;
    }
    return table;
  }

  // Take in a moment: its header and the bytes behind it.
  take(header, buffer, start) {
    if (header.cells === "full") {
      this.cells = new Uint16Array(buffer, start, header.count).slice();
    } else {
      const places = new Uint32Array(buffer, start, header.count);
      const values = new Uint16Array(buffer, start + 4 * header.count, header.count);
      for (let i = 0; i < places.length; i += 1) this.cells[places[i]] = values[i];
    }
    this.moment = header;
    this.stores = header.stores;
  }

  // Kinds of one store's cells, or ("best") of the copy that is nearest to compute; into `out`.
  kindsOf(shown, out) {
    if (shown !== "best") {
      const table = this.kinds[this.stores[shown].tier];
      const from = shown * this.blocks;
      for (let i = 0; i < this.blocks; i += 1) out[i] = table[this.cells[from + i]];
      return out;
    }
    out.fill(0);
    this.stores.forEach((store, number) => {
      const table = this.kinds[store.tier];
      const from = number * this.blocks;
      for (let i = 0; i < this.blocks; i += 1) {
        const kind = table[this.cells[from + i]];
        if (kind && (!out[i] || kind < out[i])) out[i] = kind;
      }
    });
    return out;
  }

  // Add the number of cells of each kind to `counts`.
  count(shown, counts) {
    if (shown === "best") {
      for (const kind of this.kindsOf(shown, new Uint8Array(this.blocks))) counts[kind] += 1;
      return;
    }
    const table = this.kinds[this.stores[shown].tier];
    const from = shown * this.blocks;
    for (let i = 0; i < this.blocks; i += 1) counts[table[this.cells[from + i]]] += 1;
  }

  kindAt(shown, row, expert) {
    const place = row * this.experts + expert;
    if (shown !== "best") {
      return this.kinds[this.stores[shown].tier][this.cells[shown * this.blocks + place]];
    }
    let best = 0;
    this.stores.forEach((store, number) => {
      const kind = this.kinds[store.tier][this.cells[number * this.blocks + place]];
      if (kind && (!best || kind < best)) best = kind;
    });
    return best;
  }

  // Every copy of a block: [{store, tier, formats, asked}].
  copiesOf(row, expert) {
    const place = row * this.experts + expert;
    const found = [];
    this.stores.forEach((store, number) => {
      const bits = this.cells[number * this.blocks + place];
      if (!bits) return;
      const formats = this.formats.filter((_, bit) => (bits >> bit) & 1);
      found.push({
        store: store.name,
        tier: TIER_NAMES[store.tier] || store.tier,
        formats,
        asked: Boolean(bits & this.askedBit),
      });
    });
    return found;
  }

  // The copies of a block in words.
  words(row, expert) {
    const parts = this.copiesOf(row, expert).map((one) => {
      const asked = one.asked ? "asked for" : "";
      return `${one.store} (${[one.formats.join(", "), asked].filter(Boolean).join("; ")})`;
    });
    return parts.join(", ") || "storage only";
  }

  block(row, expert) {
    return `${this.layers[row]}.${expert}`;
  }
}
