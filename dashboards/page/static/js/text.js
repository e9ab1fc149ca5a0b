// How numbers are spelled, and tables filled. Text goes in as text, never as markup.

export function time(ns) {
  if (ns === null || ns === undefined) return "-";
  const sizes = [[6e10, "min"], [1e9, "s"], [1e6, "ms"], [1e3, "us"]];
  for (const [size, unit] of sizes) {
    if (Math.abs(ns) >= size) return `${(ns / size).toFixed(2)} ${unit}`;
  }
  return ns ? `${Math.round(ns)} ns` : "0";
}

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? value.toFixed(1) : value} ${units[unit]}`;
}

export function number(value) {
  return Number(value).toLocaleString("en-US", { maximumFractionDigits: 1 });
}

// Fill a table's body with rows of text.
export function fill(body, rows, empty) {
  const found = rows.length ? rows : [[empty]];
  body.replaceChildren(
    ...found.map((cells) => {
      const row = document.createElement("tr");
      cells.forEach((cell, place) => {
        const head = place === 0 && cells.length > 1;
        const node = document.createElement(head ? "th" : "td");
        if (head) node.scope = "row";
        if (cells.length === 1) node.colSpan = 9;
        if (cell instanceof Node) node.append(cell);
        else node.textContent = cell;
        row.append(node);
      });
      return row;
    }),
  );
}

// Choices of a select; keeps what is chosen if it is still there.
export function choices(select, options) {
  const spelled = JSON.stringify(options);
  if (select.dataset.options === spelled) return;
  const before = select.value;
  select.dataset.options = spelled;
  select.replaceChildren(...options.map(([value, label]) => new Option(label, value)));
  if (options.some(([value]) => value === before)) select.value = before;
}
