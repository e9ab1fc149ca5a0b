// Stall and traffic over time, by uPlot. Recreated when the size, the theme or the devices change.

const MOST_DEVICES = 6;

export class Charts {
  constructor(stall, moved, says) {
    this.boxes = { stall, moved };
    this.says = says;
    this.plots = {};
    this.data = null;
    this.atS = 0;
    const narrow = () => this.resize();
    new ResizeObserver(narrow).observe(stall);
  }

  take(message) {
    this.data = message;
    const x = message.edges_s.slice(0, -1);
    const names = Object.keys(message.stall);
    const { labels, lines } = reduce(names, message.stall, x.length);
    const width = message.edges_s[1] - message.edges_s[0];
    const rates = message.moved.map((moved) => moved / width / 1048576);
    this.#set("stall", "stalled %", labels, [x, ...lines.map((l) => l.map((v) => 100 * v))]);
    this.#set("moved", "moved MiB/s", ["all stores"], [x, rates]);
    const worst = names.map((name) => [name, sum(message.stall[name]) * width]);
    worst.sort((a, b) => b[1] - a[1]);
    this.says.textContent = worst.length
      ? `Compute waited, by device: ${worst.slice(0, MOST_DEVICES)
        .map(([name, s]) => `${name} ${(1000 * s).toFixed(1)} ms`).join(", ")}.`
      : "No wait is recorded; without trace files here, see the figure above.";
  }

  at(seconds) {
    this.atS = seconds;
    Object.values(this.plots).forEach((plot) => plot.redraw(false));
  }

  retheme() {
    Object.values(this.plots).forEach((plot) => plot.destroy());
    this.plots = {};
    if (this.data) this.take(this.data);
  }

  resize() {
    for (const [name, plot] of Object.entries(this.plots)) {
      const width = this.boxes[name].clientWidth;
      if (width && Math.abs(plot.width - width) > 1) plot.setSize({ width, height: plot.height });
    }
  }

  #set(name, title, labels, data) {
    const plot = this.plots[name];
    if (plot && plot.labels === labels.join()) {
      plot.setData(data);
      return;
    }
    if (plot) plot.destroy();
    const style = getComputedStyle(document.documentElement);
    const colour = (key) => style.getPropertyValue(key).trim();
    const dashes = [[], [6, 3], [2, 2], [8, 2, 2, 2], [1, 3], [10, 4]];
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 0.5 },
      ticks: { stroke: colour("--line") } };
    const marker = colour("--focus");
    const made = new uPlot({
      width: this.boxes[name].clientWidth || 400,
      height: 130,
      legend: { show: true, live: false },
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false }, y: { range: (_, low, high) => [0, high || 1] } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((tick) => `${tick} s`) },
        { ...axis, size: 56, label: title, labelSize: 16, labelFont: "12px sans-serif" }],
      series: [{ label: "time" }, ...labels.map((label, place) => ({
        label, stroke: colour(`--s${place % 6}`), width: 1.5, dash: dashes[place % 6],
        points: { show: false } }))],
      hooks: { draw: [(plot) => this.#mark(plot, marker)] },
    }, data, this.boxes[name]);
    made.labels = labels.join();
    this.plots[name] = made;
  }

  #mark(plot, colour) {
    const x = plot.valToPos(this.atS, "x", true);
    const { left, top, width, height } = plot.bbox;
    if (x < left || x > left + width) return;
    plot.ctx.save();
    plot.ctx.fillStyle = colour;
    plot.ctx.fillRect(Math.round(x) - 1, top, 2, height);
    plot.ctx.restore();
  }
}

function sum(values) {
  return values.reduce((total, value) => total + value, 0);
}

// Few devices: a line each. Many: the mean, and the most stalled device of each bin.
function reduce(names, stall, size) {
  if (names.length <= MOST_DEVICES) {
    return { labels: names, lines: names.map((name) => stall[name]) };
  }
  const most = new Array(size).fill(0);
  const mean = new Array(size).fill(0);
  for (const name of names) {
    stall[name].forEach((value, place) => {
      most[place] = Math.max(most[place], value);
      mean[place] += value / names.length;
    });
  }
  return { labels: [`mean of ${names.length}`, "most stalled"], lines: [mean, most] };
}
