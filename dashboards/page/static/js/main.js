// Wires the page: what the viewer does becomes questions, what the server says becomes pictures.

import { Charts } from "./charts.js";
import { Grid } from "./grid.js";
import { Link } from "./link.js";
import { KINDS, Model } from "./model.js";
import * as panels from "./panels.js";
import { choices, time } from "./text.js";

const LISTS_MS = 250; // lists are rewritten at most this often; the picture with each moment
const LISTS_SHARE = 0.1; // and take at most this share of the time
const STEPS = 1000;
const $ = (id) => document.getElementById(id);

const state = { model: null, follow: true, offset: null, playing: false, plan: null, spanNs: 0,
  listsAt: 0, listsDue: 0, listsMs: 0, trouble: "", askedWhy: null };
const grid = new Grid($("grid"), $("gridbox"));
const charts = new Charts($("stall"), $("moved"), $("stallsays"));

const link = new Link({
  connection(text) {
    $("connection").textContent = text;
  },
  hello(message) {
    state.model = new Model(message);
    $("run").textContent = message.run;
    document.title = `hotset ${message.run}`;
    const notes = [message.model, message.digest && `[${message.digest.slice(0, 12)}]`, message.mode,
      `${message.layers.length} layers x ${message.experts} experts`,
      message.guessed ? "shape and decisions guessed: this run did not record its spec" : "",
      message.decides ? "" : "too large to replay decisions"];
    $("about").textContent = notes.filter(Boolean).join(", ");
    grid.setModel(state.model);
    choices($("layer"), message.layers.map((layer, row) => [String(row), `layer ${layer}`]));
    if (!state.follow) ask();
  },
  moment(header, buffer, start) {
    state.model.take(header, buffer, start);
    state.spanNs = header.span_ns;
    if (state.follow || state.offset === null) state.offset = header.offset_ns;
    views();
    grid.invalidate();
    lists();
  },
  series(message) {
    charts.take(message);
  },
  why(message) {
    panels.why(message);
  },
  error(message) {
    state.trouble = message.text;
    lists();
  },
});

// The one question that the page has about time.
function ask() {
  link.show({ offset_ns: state.follow ? null : Math.round(state.offset), plan: state.plan });
}

function views() {
  choices($("view"), [["best", "the copy nearest to compute"], ["all", "all stores"],
    ...state.model.stores.map((store, place) => [String(place), `${store.name} (${store.tier})`])]);
}

function shownStore() {
  return grid.view === "all" ? grid.cursor.store : grid.shown()[0];
}

// Everything but the picture, now or soon.
function lists() {
  const now = performance.now();
  const pause = Math.max(LISTS_MS, state.listsMs / LISTS_SHARE);
  if (now - state.listsAt < pause) {
    if (!state.listsDue) state.listsDue = setTimeout(lists, pause - (now - state.listsAt) + 1);
    return;
  }
  clearTimeout(state.listsDue);
  state.listsDue = 0;
  state.listsAt = now;
  const { moment } = state.model || {};
  if (!moment) return;
  panels.facts(moment);
  panels.flights(moment);
  panels.stores(moment);
  panels.decisions(moment);
  panels.load(moment);
  panels.legend(state.model, grid.shown());
  table();
  where();
  clock();
  const alarm = [...moment.alarms.map((text) => `Stalled progress: ${text}.`), state.trouble]
    .filter(Boolean).join("\n");
  state.trouble = "";
  if ($("alarm").textContent !== alarm) $("alarm").textContent = alarm;
  $("alarm").hidden = !alarm;
  const emulated = moment.emulated.join("; ");
  $("emulated").textContent = emulated && `EMULATED: ${emulated}`;
  $("emulated").hidden = !emulated;
  state.listsMs = performance.now() - now;
}

function table() {
  $("layer").value = String(grid.cursor.row);
  panels.layerTable(state.model, shownStore(), grid.cursor.row, (row, expert) => {
    grid.move(grid.cursor.store, row, expert);
    why();
  });
  const of = shownStore() === "best" ? "the copy nearest to compute"
    : state.model.stores[shownStore()].name;
  $("tablesays").textContent = `shows ${of}`;
}

// The cell under the cursor in words, for eyes and for screen readers.
function where() {
  const { row, expert } = grid.cursor;
  const shown = shownStore();
  const kind = KINDS[state.model.kindAt(shown, row, expert)].name;
  const place = shown === "best" ? "" : ` at ${state.model.stores[shown].name}`;
  const text = `Layer ${state.model.layers[row]}, expert ${expert}${place}: `
    + `${shown !== "best" && kind === "storage only" ? "nothing here" : kind}. `
    + `Copies: ${state.model.words(row, expert)}.`;
  if ($("cell").textContent !== text) $("cell").textContent = text;
  const view = $("view").selectedOptions[0]?.textContent || "";
  $("grid").setAttribute("aria-label", `Residency, ${view}`);
}

function clock() {
  const live = state.model.moment.live ? "live, " : "";
  $("when").textContent = `${live}+${time(state.offset)} of ${time(state.spanNs)}`;
  const place = state.spanNs ? Math.round((STEPS * state.offset) / state.spanNs) : STEPS;
  if (document.activeElement !== $("slider") || state.playing || state.follow) {
    $("slider").value = String(place);
  }
  $("slider").setAttribute("aria-valuetext", $("when").textContent);
  charts.at(state.offset / 1e9);
}

function why() {
  const { row, expert } = grid.cursor;
  const block = state.model.block(row, expert);
  $("block").value = block;
  link.why(block, state.follow ? null : Math.round(state.offset));
}

function setFollow(follow) {
  state.follow = follow;
  $("follow").checked = follow;
}

function setPlaying(playing) {
  state.playing = playing;
  $("play").textContent = playing ? "Pause" : "Play";
  $("play").setAttribute("aria-pressed", String(playing));
  if (!playing) return;
  if (state.follow || state.offset >= state.spanNs) state.offset = 0;
  setFollow(false);
  let before = performance.now();
  const step = (now) => {
    if (!state.playing) return;
    state.offset += (now - before) * 1e6 * Number($("speed").value);
    before = now;
    if (state.offset >= state.spanNs) {
      state.offset = state.spanNs;
      setPlaying(false);
    }
    if (link.idle || !state.playing) ask();
    requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

grid.onMove = () => {
  state.listsAt = -Infinity; // at once, whatever it cost the last time
  lists();
};
grid.onAsk = why;
grid.onStore = () => {
  if (grid.view === "all") return;
  const place = grid.view === "best" ? 0 : grid.cursor.store;
  grid.cursor.store = place;
  grid.view = String(place);
  $("view").value = grid.view;
  grid.invalidate();
  grid.onMove();
};
$("view").addEventListener("change", () => {
  grid.view = $("view").value;
  if (!Number.isNaN(Number(grid.view))) grid.cursor.store = Number(grid.view);
  grid.invalidate();
  grid.onMove();
});
$("layer").addEventListener("change", () => {
  grid.move(grid.cursor.store, Number($("layer").value), grid.cursor.expert);
});
$("kind").addEventListener("change", () => panels.decisions(state.model.moment));
$("plan").addEventListener("change", () => {
  state.plan = $("plan").value ? Number($("plan").value) : null;
  ask();
});
$("play").addEventListener("click", () => setPlaying(!state.playing));
$("slider").addEventListener("input", () => {
  setPlaying(false);
  setFollow(false);
  state.offset = (Number($("slider").value) / STEPS) * state.spanNs;
  ask();
});
$("follow").addEventListener("change", () => {
  setPlaying(false);
  setFollow($("follow").checked);
  ask();
});
$("whyform").addEventListener("submit", (event) => {
  event.preventDefault();
  const [layer, expert] = $("block").value.split(".").map(Number);
  const row = state.model.layers.indexOf(layer);
  if (row >= 0 && expert < state.model.experts) grid.move(grid.cursor.store, row, expert);
  link.why($("block").value, state.follow ? null : Math.round(state.offset));
});
for (const query of ["(prefers-color-scheme: dark)"]) {
  matchMedia(query).addEventListener("change", () => {
    grid.readColours();
    charts.retheme();
  });
}

// For tests and the console.
window.hotset = { grid, link, state, charts };
