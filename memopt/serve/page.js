// The page at /: what GET /state says, every two seconds, and forms that ask the server's routes.

import {
  $,
  KEY,
  ask,
  digits,
  duration,
  element,
  megabytes,
  milliseconds,
  plural,
  shape,
} from "./ask.js";

const EVERY = 2000; // milliseconds between two looks at /state
const SHOWN = 300; // seconds that the lines go back, at most
const LEAST = 60; // and at least

// --- now ---

const history = []; // {at, requests, failures, compute, queue, fill, memory}, the newest last

function remember(state) {
  const fills = state.models.map((model) => model.fill ?? 0);
  history.push({
    at: Date.now() / 1000,
    requests: state.requests_per_second,
    failures: state.failures_per_second,
    compute: state.compute_ms,
    queue: state.queue_ms,
    fill: 100 * Math.max(0, ...fills),
    memory: state.rss_mb,
  });
  while (history[0].at < history.at(-1).at - SHOWN) history.shift();
}

function showNumbers(state) {
  const last = history.at(-1);
  const waiting = state.models.reduce((sum, model) => sum + (model.queue ?? 0), 0);
  const limit = state.memory_limit_mb;
  const any = state.p50_ms > 0;
  const texts = {
    requests: digits(last.requests),
    failures: digits(last.failures),
    p50: any ? milliseconds(state.p50_ms) : "none yet",
    p99: any ? milliseconds(state.p99_ms) : "none",
    compute: milliseconds(last.compute),
    queue: milliseconds(last.queue),
    fill: `${digits(last.fill)} %`,
    waiting: `${plural(waiting, "request waits", "requests wait")}`,
    memory: megabytes(last.memory),
    limit: limit ? `of ${megabytes(limit)} allowed` : "no limit",
    uptime: duration(state.uptime_seconds),
  };
  for (const [name, text] of Object.entries(texts)) $(`[data-of=${name}]`).textContent = text;
  line($("#rate svg"), ["requests", "failures"], "requests a second; failed");
  line($("#latency svg"), ["compute", "queue"], "milliseconds computing; waiting");
  line($("#fill svg"), ["fill"], "percent of a batch", 100);
  line($("#memory svg"), ["memory"], "megabytes", limit ?? 0);
}

/** Draw the history of one or two numbers, the newest at the right, from nothing up to the most. */
function line(svg, names, unit, least = 0) {
  const now = history.at(-1);
  const most = Math.max(least, ...history.flatMap((point) => names.map((name) => point[name]))) || 1;
  const span = Math.max(LEAST, now.at - history[0].at);
  const place = (point, name) =>
    `${(100 * (1 - (now.at - point.at) / span)).toFixed(2)} ${(29 - (27 * point[name]) / most).toFixed(2)}`;
  svg.setAttribute("viewBox", "0 0 100 30");
  svg.setAttribute("preserveAspectRatio", "none");
  const paths = [["floor", "M0 29.5H100"]];
  names.forEach((name, index) => {
    const points = history.map((point) => place(point, name));
    paths.push([index ? "b" : "a", `M${points.join("L")}`]);
  });
  svg.replaceChildren(...paths.map(([kind, d]) => shape("path", { class: kind, d })));
  const said = names.map((name) => digits(now[name])).join("; ");
  svg.setAttribute("aria-label", `${unit}: now ${said}, highest ${digits(most)}`);
}

// --- models ---

let shownModels = "";

function showModels(models) {
  const text = JSON.stringify(models.map(({ fill, ...rest }) => rest));
  if (text === shownModels) return; // what a reader opened or marked stays so
  shownModels = text;
  const body = $("#models tbody");
  const open = new Set([...body.querySelectorAll("details[open]")].map((d) => d.dataset.model));
  body.replaceChildren(...models.map((model) => modelRow(model, open.has(model.name))));
}

function modelRow(model, unfolded) {
  const row = element("tr");
  row.append(element("th", model.name, { scope: "row", "data-name": "Model" }));
  const cell = (name, text, kind) => {
    const made = element("td", "", { "data-name": name });
    made.append(element("span", text, kind ? { class: kind } : {}));
    if (name === "Waiting") made.classList.add("n");
    row.append(made);
    return made;
  };
  cell("Task", model.task);
  cell("State", model.open ? "open" : "not open", model.open ? "open" : "shut");
  cell("Device", model.device ?? "–");
  cell("Variant", model.variant ?? "–");
  cell("Runtime", model.runtime ?? "–");
  cell("Waiting", model.open ? String(model.queue) : "–");
  const events = model.fallbacks ?? [];
  const last = cell("Fallbacks", events.length ? "" : model.open ? "none" : "–");
  if (events.length) {
    const details = element("details", "", { "data-model": model.name });
    details.open = unfolded;
    const list = element("ul");
    list.append(...events.map((event) => element("li", event)));
    details.append(element("summary", plural(events.length, "fallback", "fallbacks")), list);
    last.replaceChildren(details);
  }
  return row;
}

/** Show the forms that a model here can answer, with a choice where several can. */
function showForms(models) {
  let any = false;
  for (const form of document.querySelectorAll("form[data-task]")) {
    const task = form.dataset.task;
    const able = models.filter((model) =>
      task === "text-classification" ? model.task.endsWith(task) : model.task === task,
    );
    form.hidden = !able.length;
    any ||= able.length > 0;
    $(".choice", form)?.remove();
    if (able.length < 2) continue;
    const label = element("label", "Model ", { class: "choice" });
    const select = element("select", "", { name: "model" });
    select.append(...able.map((model) => element("option", model.id, { value: model.id })));
    label.append(select);
    $("h3", form).after(label);
  }
  $("#nothing").hidden = any;
}

// --- looking ---

let timer = 0;
let formsShown = false;

async function look() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const state = await (await ask("/state")).json();
    if (!formsShown) {
      showForms((await (await ask("/v1/models")).json()).data);
      formsShown = true;
    }
    remember(state);
    showNumbers(state);
    showModels(state.models);
    tell("live", "live");
  } catch (error) {
    tell("lost", error.message);
    if (error.status === 401) {
      $("#access").open = true;
      return; // asking again without a key would only count as failures
    }
  }
  clearTimeout(timer);
  timer = setTimeout(look, EVERY);
}

function tell(kind, text) {
  const status = $("#status");
  document.body.classList.toggle("stale", kind === "lost");
  status.className = kind;
  if (status.textContent !== text) status.textContent = text; // a screen reader says it once
}

document.addEventListener("visibilitychange", look);

$("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("#key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("#key").value = "";
  showKey();
  look();
});

/** Links cannot send a key: with one they would only show a refusal. */
function showKey() {
  const held = Boolean(sessionStorage.getItem(KEY));
  $("#access summary").textContent = held ? "API key is set" : "API key";
  $("#access").open = false;
  $("footer").hidden = held;
}

// --- trying ---

/** Let a form ask and show: `answer` gets its fields and returns what to show. */
function tries(name, answer) {
  const form = document.getElementById(name);
  const output = $("output", form);
  const button = $("button", form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const fields = Object.fromEntries(new FormData(form));
    button.disabled = true;
    form.classList.add("working");
    try {
      output.replaceChildren(...(await answer(fields, form)));
    } catch (error) {
      output.replaceChildren(element("p", error.message, { class: "error" }));
      if (error.status === 401) $("#access").open = true;
    } finally {
      button.disabled = false;
      form.classList.remove("working");
    }
  });
}

/** Return an answer's JSON and a line that says how long it took, seen from here. */
async function timed(path, body) {
  const begin = performance.now();
  const answer = await (await ask(path, body)).json();
  const took = milliseconds(performance.now() - begin);
  return [answer, took];
}

const note = (text) => element("p", text, { class: "soft" });

/** Return a list of names with numbers and bars; bars start at 0, or at the least below it. */
function ranks(rows) {
  const values = rows.map((row) => row[1]);
  const low = Math.min(0, ...values);
  const span = Math.max(1, ...values) - low;
  const list = element("ol", "", { class: "ranks" });
  for (const [name, value] of rows) {
    const item = element("li");
    const head = element("div", "", { class: "line" });
    head.append(element("span", name), element("b", value.toFixed(3)));
    const bar = shape("svg", { "aria-hidden": "true", viewBox: "0 0 100 4" });
    bar.setAttribute("preserveAspectRatio", "none");
    bar.append(shape("rect", { class: "floor", width: 100, height: 4 }));
    bar.append(shape("rect", { width: ((value - low) / span) * 100, height: 4 }));
    item.append(head, bar);
    list.append(item);
  }
  return list;
}

tries("embed", async ({ text, model }) => {
  const [answer, took] = await timed("/v1/embeddings", { input: text, model: model ?? "" });
  const vector = answer.data[0].embedding;
  const first = vector.slice(0, 6).map((number) => number.toFixed(4)).join("  ");
  const tokens = plural(answer.usage.prompt_tokens, "token", "tokens");
  const about = `${vector.length} numbers of ${tokens} in ${took}, by ${answer.model}`;
  return [element("p", `${first}  …`, { class: "vector" }), note(about)];
});

tries("compare", async ({ first, second, model }) => {
  const inputs = { source_sentence: first, sentences: [second] };
  const [answer, took] = await timed("/similarity", { inputs, model: model ?? "" });
  return [ranks([["Cosine", answer[0]]]), note(`1 is the same direction, 0 unrelated; ${took}`)];
});

tries("rerank", async ({ query, documents, model }) => {
  const texts = documents.split("\n").map((text) => text.trim()).filter(Boolean);
  if (!texts.length) throw new Error("Give a document, one a line.");
  const body = { query, documents: texts, model: model ?? "" };
  const [answer, took] = await timed("/rerank", body);
  const rows = answer.results.map((row) => [texts[row.index], row.relevance_score]);
  return [ranks(rows), note(`the best first; ${took}, by ${answer.model}`)];
});

tries("classify", async ({ text, pair, model }) => {
  const body = { inputs: pair ? [[text, pair]] : [text], model: model ?? "" };
  const [[labels], took] = await timed("/predict", body);
  const rows = labels.slice(0, 8).map((row) => [row.label, row.score]);
  const rest = labels.length > 8 ? `the first 8 of ${labels.length} labels; ` : "";
  return [ranks(rows), note(`${rest}${took}`)];
});

// --- chat ---

const messages = [];
let stopping = null;

/** Yield the values of server-sent events until [DONE]. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function said(role, text) {
  const paragraph = element("p", text, { class: role });
  $("#said").append(paragraph);
  paragraph.scrollIntoView({ block: "nearest" });
  return paragraph;
}

/** Write an answer as it comes; returns its text, what ended it and its usage. */
async function written(body, paragraph) {
  const end = { text: "", finish: null, usage: null };
  const response = await ask("/v1/chat/completions", body, stopping.signal);
  for await (const event of events(response)) {
    if (event.error) throw new Error(`The answer broke off: ${event.error.message}`);
    const choice = event.choices[0];
    end.text += choice.delta.content ?? "";
    end.finish = choice.finish_reason;
    end.usage = event.usage ?? end.usage;
    paragraph.textContent = end.text;
    $("#said").scrollTop = $("#said").scrollHeight;
  }
  return end;
}

tries("chat", async ({ message, tokens, model }, form) => {
  form.message.value = "";
  const asked = said("user", message);
  const paragraph = said("assistant", "");
  stopping = new AbortController();
  form.stop.disabled = false;
  const body = { messages: [...messages, { role: "user", content: message }], stream: true };
  const begin = performance.now();
  try {
    const end = await written({ ...body, max_tokens: Number(tokens), model: model ?? "" }, paragraph);
    messages.push({ role: "user", content: message }, { role: "assistant", content: end.text });
    const rate = (1000 * end.usage.completion_tokens) / (performance.now() - begin);
    const cut = end.finish === "length" ? "; cut at the most tokens" : "";
    const count = plural(end.usage.completion_tokens, "token", "tokens");
    return [note(`${count}, ${digits(rate)} a second${cut}`)];
  } catch (error) {
    if (error.name === "AbortError") return [note("Stopped; this exchange is not remembered.")];
    asked.remove();
    paragraph.remove();
    form.message.value = message;
    throw error;
  } finally {
    form.stop.disabled = true;
  }
});

$("#chat [name=stop]").addEventListener("click", () => stopping?.abort());
$("#chat [name=clear]").addEventListener("click", () => {
  stopping?.abort();
  messages.length = 0;
  $("#said").replaceChildren();
  $("#chat output").replaceChildren();
});

showKey();
look();
