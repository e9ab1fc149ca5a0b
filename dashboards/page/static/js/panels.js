// The lists beside the picture: figures, flights, decisions, load, stores, the layer as a table.

import { KINDS } from "./model.js";
import { bytes, choices, fill, number, time } from "./text.js";

const STATES = {
  S1: "full precision", S2: "reduced", S3: "compressed", S4: "staged", S5: "in storage",
  S6: "in flight", S7: "recomputable",
};
const HEADS = {
  plans: ["Time", "Epoch", "Reason", "Cause", "Fetches", "Drops", "Vetoes", "Bytes"],
  decisions: ["Time", "What", "Store", "Block", "Format", "Reason", "Cause or bound"],
  arrivals: ["Time", "What", "Store", "Block", "Format", "Reason", "Source"],
};

const $ = (id) => document.getElementById(id);
const body = (id) => $(id).tBodies[0];

export function facts(m) {
  const states = Object.entries(m.states).filter(([, count]) => count)
    .map(([state, count]) => `${number(count)} ${STATES[state]}`).join(", ");
  const shown = [
    ["Epoch", `${m.epoch}, ${time(m.epoch_age_ns)} old`],
    ["Blocks", states || "none"],
    ["Stall", time(m.stall_ns)],
    ["Tokens routed", number(m.tokens)],
    ["Requests in flight", number(m.requests)],
    ["Transfers in flight", number(m.flights_total)],
    ["Rows lost by telemetry", number(m.dropped)],
  ];
  $("facts").replaceChildren(...shown.map(([name, value]) => {
    const box = document.createElement("div");
    const term = document.createElement("dt");
    const said = document.createElement("dd");
    term.textContent = name;
    said.textContent = value;
    box.append(term, said);
    return box;
  }));
}

export function flights(m) {
  $("flightsays").textContent = m.flights_total
    ? `${number(m.flights_total)} in flight, ${number(m.flights.length)} shown.` : "";
  fill(body("flights"), m.flights.map((one) => [one.block, one.source, one.store, one.format,
    one.reason, one.state, time(one.age_ns)]), "nothing is on its way");
}

export function stores(m) {
  fill(body("stores"), m.stores.map((one) => [one.name, one.tier, one.node.slice(0, 8), one.state,
    bytes(one.resident_bytes), bytes(one.capacity_bytes),
    Object.entries(one.blocks).map(([form, count]) => `${number(count)} ${form}`).join(", ")
      || "none"]), "no store has joined");
}

export function decisions(m) {
  const kind = $("kind").value;
  const head = document.createElement("tr");
  head.replaceChildren(...HEADS[kind].map((name) => {
    const cell = document.createElement("th");
    cell.scope = "col";
    cell.textContent = name;
    return cell;
  }));
  $("decisions").tHead.replaceChildren(head);
  const at = (one) => `+${time(one.at_ns - m.from_ns)}`;
  const rows = kind === "plans"
    ? m.plans.map((one) => [at(one), one.epoch, one.reason, one.cause, number(one.fetches),
      number(one.drops), number(one.vetoes), bytes(one.nbytes)])
    : m[kind].map((one) => [at(one), one.what, one.store, one.block || "-", one.format || "-",
      one.reason, one.note || "-"]);
  fill(body("decisions"), rows, "nothing yet");
}

export function load(m) {
  const { load: l } = m;
  choices($("plan"), [["", "the last one"],
    ...m.plans.map((one) => [String(one.epoch), `epoch ${one.epoch}: ${one.cause || one.reason}`])]);
  const share = (value) => (value === null ? "-" : `${(100 * value).toFixed(1)} %`);
  $("loadsays").textContent = (l.epoch ? `Epoch ${l.epoch}, ${l.reason}: ${l.cause}. ` : "")
    + `Weights: ${l.basis}. Balance (mean / most): before ${share(l.balance_before)}, `
    + `planned ${share(l.balance_after)}, now ${share(l.balance_now)}. On no device: before `
    + `${number(l.unplaced_before)}, planned ${number(l.unplaced_after)}, now `
    + `${number(l.unplaced_now)}.`;
  const most = Math.max(1e-9, ...l.devices.flatMap((d) => [d.before, d.after, d.now]));
  $("load").className = "load";
  fill(body("load"), l.devices.map((d) => [d.device,
    ...[d.before, d.after, d.now].map((value) => bar(value, most))]), "no device has joined");
}

function bar(value, most) {
  const piece = document.createDocumentFragment();
  const line = document.createElement("i");
  line.style.width = `${(45 * value) / most}%`;
  line.setAttribute("aria-hidden", "true");
  piece.append(line, number(value));
  return piece;
}

export function why(message) {
  $("whysummary").textContent = message.summary;
  const rows = (message.story || []).map((one) => [`+${time(one.at_ns - message.from_ns)}`,
    one.what, one.store, one.format || "-", one.reason, one.note || "-"]);
  if (message.told > rows.length) {
    $("whysummary").textContent += ` The last ${rows.length} of ${message.told} lines are shown.`;
  }
  fill(body("story"), rows, "nothing has happened to it yet");
}

export function legend(model, shown) {
  const counts = new Array(KINDS.length).fill(0);
  for (const store of shown) model.count(store, counts);
  const many = shown.length > 1 || shown[0] !== "best";
  $("legend").replaceChildren(...KINDS.flatMap((kind, place) => {
    if (!counts[place]) return [];
    const item = document.createElement("li");
    const swatch = document.createElement("i");
    swatch.className = `k${place} ${[1, 4, 7, 10].includes(place) ? "strong" : ""}`;
    swatch.dataset.kind = place;
    swatch.setAttribute("aria-hidden", "true");
    const name = place === 0 && many ? "nothing here" : kind.name;
    item.append(swatch, `${name}: ${number(counts[place])}`);
    return [item];
  }));
}

// One row an expert; rows stay, so that a button keeps the focus while the numbers change.
export function layerTable(model, shown, row, ask) {
  const table = body("cells");
  if (table.rows.length !== model.experts) {
    table.replaceChildren(...Array.from({ length: model.experts }, (_, expert) => {
      const line = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = expert;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = "why";
      button.addEventListener("click", () => ask(Number(line.dataset.row), expert));
      const cells = [0, 1, 2].map(() => document.createElement("td"));
      const swatch = document.createElement("i");
      swatch.setAttribute("aria-hidden", "true");
      cells[0].append(swatch, "");
      cells[2].append(button);
      line.append(head, ...cells);
      return line;
    }));
  }
  for (let expert = 0; expert < model.experts; expert += 1) {
    const line = table.rows[expert];
    const kind = model.kindAt(shown, row, expert);
    const said = model.words(row, expert);
    if (line.dataset.kind !== String(kind)) {
      line.dataset.kind = kind;
      line.cells[1].firstChild.className = `swatch k${kind}`;
    }
    const name = kind === 0 && shown !== "best" ? "nothing here" : KINDS[kind].name;
    set(line.cells[1].lastChild, name);
    set(line.cells[2], said);
    if (line.dataset.row !== String(row)) {
      line.dataset.row = row;
      line.querySelector("button").setAttribute(
        "aria-label", `why is ${model.block(row, expert)} here`);
    }
  }
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
