/* The page of vllm-bootstrap: keeps the parts fresh, signs in and out, tails logs, launches and stops.
 *
 * What the server renders is put into place node by node, so that focus, open details and bars survive. Text from
 * engines is only ever set as text. Every request says that it comes from this page: a 401 then has no challenge, and
 * the browser does not open its own password window over the sign-in field. */
"use strict";

const PAGE = { "x-requested-with": "vllm-bootstrap-page" };
const POLL_MS = 2000;
const RETRY_MS = 1500;
const MAX_LINES = 3000;
const LOG_TAIL = 400;

const $ = (id) => document.getElementById(id);

/* Requests ------------------------------------------------------------------------------------------------------ */

class Refusal extends Error {
  constructor(status, error) {
    super(error.message || `The daemon answered ${status}.`);
    this.status = status;
    this.param = error.param;
  }
}

async function ask(method, path, { body, headers, signal } = {}) {
  const sent = { ...PAGE, ...headers };
  if (body !== undefined) sent["content-type"] = "application/json";
  const options = { method, headers: sent, signal, cache: "no-store", credentials: "same-origin", redirect: "error" };
  if (body !== undefined) options.body = JSON.stringify(body);
  const answer = await fetch(path, options);
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Refusal(answer.status, told.error || {});
  }
  return answer;
}

/* The parts ----------------------------------------------------------------------------------------------------- */

function sameKind(one, other) {
  return one.nodeType === other.nodeType && one.nodeName === other.nodeName && (one.id || "") === (other.id || "");
}

function morph(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.data !== fresh.data) old.data = fresh.data;
    return;
  }
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  }
  morphChildren(old, fresh);
}

function morphChildren(old, fresh) {
  const named = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let at = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const known = wanted.id ? named.get(wanted.id) : undefined;
    const match = known || (at && !at.id && sameKind(at, wanted) ? at : null);
    if (match && sameKind(match, wanted)) {
      if (match === at) at = at.nextSibling;
      else old.insertBefore(match, at);
      morph(match, wanted);
    } else {
      old.insertBefore(document.importNode(wanted, true), at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

let timer = 0;
let refreshing = null;

function refresh() {
  clearTimeout(timer);
  refreshing ||= load().finally(() => {
    refreshing = null;
    if (!document.hidden && !$("parts").hidden) timer = setTimeout(refresh, POLL_MS);
  });
  return refreshing;
}

async function load() {
  try {
    const html = await (await ask("GET", "dashboard/parts", { signal: AbortSignal.timeout(15000) })).text();
    morphChildren($("parts"), new DOMParser().parseFromString(html, "text/html").body);
    signedIn();
  } catch (problem) {
    if (problem instanceof Refusal && (problem.status === 401 || problem.status === 403)) signedOut(problem);
    else live("lost", "No connection, trying again");
  }
}

function live(state, text) {
  const shown = $("live");
  shown.dataset.state = state;
  if (shown.textContent !== text) shown.textContent = text;
}

function signedIn() {
  const board = $("board");
  const may = board.dataset.allowed.split(" ");
  $("login").hidden = true;
  $("parts").hidden = false;
  $("open-launch").hidden = !may.includes("admin");
  $("sign-out").hidden = board.dataset.session !== "yes";
  document.title = `${board.querySelector(".headline").textContent} – vllm-bootstrap`;
  live("ok", board.dataset.session === "yes" ? `Live, as ${board.dataset.caller}` : "Live");
}

function signedOut(problem) {
  const wasIn = !$("parts").hidden;
  $("login").hidden = false;
  $("parts").hidden = true;
  $("parts").replaceChildren();
  $("open-launch").hidden = true;
  $("sign-out").hidden = problem.status !== 403;
  live("idle", "");
  document.title = "vllm-bootstrap";
  for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
  if (problem.status === 403) $("login-why").textContent = problem.message;
  if (wasIn) $("login-error").textContent = "The session has ended.";
}

/* Signing in and out -------------------------------------------------------------------------------------------- */

async function signIn(event) {
  event.preventDefault();
  const field = $("login-key");
  $("login-error").textContent = "";
  try {
    await ask("POST", "session", { body: { key: field.value } });
    field.value = "";
    await refreshing;
    await refresh();
  } catch (problem) {
    $("login-error").textContent = problem.status === 401 ? "That key is not valid." : problem.message;
    field.select();
  }
}

async function signOut() {
  await ask("DELETE", "session").catch(complain);
  await refreshing;
  await refresh();
  $("login-error").textContent = "";
}

/* Notices ------------------------------------------------------------------------------------------------------- */

let noticeTimer = 0;

function complain(problem) {
  clearTimeout(noticeTimer);
  $("notice").textContent = problem.message;
  $("notice").hidden = false;
  noticeTimer = setTimeout(() => { $("notice").hidden = true; }, 10000);
}

/* Launching and stopping ---------------------------------------------------------------------------------------- */

function asValue(written) {
  try {
    return JSON.parse(written);
  } catch {
    return written;
  }
}

function launchBody(form) {
  const typed = new Set(form.dataset.typedFields.split(","));
  const body = {};
  const extra = {};
  for (const [name, written] of new FormData(form)) {
    const text = String(written).trim();
    if (name === "extra_args") {
      for (const line of text.split("\n").map((one) => one.trim()).filter(Boolean)) {
        const [option, ...rest] = line.split("=");
        const key = option.trim().replace(/^--/, "");
        const value = rest.length ? asValue(rest.join("=").trim()) : true;
        if (typed.has(key.replaceAll("-", "_"))) body[key.replaceAll("-", "_")] = value;
        else extra[key] = value;
      }
    } else if (text) {
      body[name] = ["gpu_count", "gpu_share", "max_model_len", "replicas"].includes(name) ? asValue(text) : text;
    }
  }
  return Object.keys(extra).length ? { ...body, extra_args: extra } : body;
}

async function launch(event) {
  event.preventDefault();
  const form = event.target;
  const button = form.querySelector("[type=submit]");
  const idempotency = { "idempotency-key": crypto.randomUUID ? crypto.randomUUID() : String(Math.random()) };
  $("launch-error").textContent = "";
  for (const field of form.elements) field.removeAttribute("aria-invalid");
  button.disabled = true;
  try {
    await ask("POST", "launch", { body: launchBody(form), headers: idempotency });
    $("launch-dialog").close();
    form.reset();
    await refresh();
  } catch (problem) {
    $("launch-error").textContent = problem.message;
    const name = (problem.param || "").split(".")[0];
    const field = name && form.elements.namedItem(name);
    if (field instanceof Element) {
      field.setAttribute("aria-invalid", "true");
      field.focus();
    }
  } finally {
    button.disabled = false;
  }
}

function askToStop(id) {
  const dialog = $("stop-dialog");
  $("stop-name").textContent = nameOf(id);
  dialog.dataset.launch = id;
  dialog.returnValue = "";
  dialog.showModal();
}

async function stop() {
  const { returnValue, dataset } = $("stop-dialog");
  if (!returnValue) return;
  const force = returnValue === "force" ? "&force=true" : "";
  await ask("POST", `stop/${encodeURIComponent(dataset.launch)}?wait=false${force}`).catch(complain);
  await refresh();
}

async function forget(id) {
  await ask("DELETE", `launches/${encodeURIComponent(id)}`).catch(complain);
  await refresh();
}

/* Each part of a model's name by itself: the slashes between them are the path's. */
async function move(name, verb) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  const button = document.activeElement;
  const asked = ask("POST", `models/${path}/${verb}`).catch(complain);
  await Promise.race([asked, new Promise((done) => setTimeout(done, POLL_MS))]);
  await refresh();
  if (!button?.isConnected) [...document.querySelectorAll("#models .row")].find((row) => row.dataset.name === name)?.querySelector("button")?.focus();
}

function askToCancel(id) {
  const dialog = $("cancel-dialog");
  $("cancel-name").textContent = nameOf(`request-${id}`);
  dialog.dataset.request = id;
  dialog.returnValue = "";
  dialog.showModal();
}

async function cancel() {
  const { returnValue, dataset } = $("cancel-dialog");
  if (!returnValue) return;
  await ask("POST", `requests/${encodeURIComponent(dataset.request)}/cancel`).catch((problem) => {
    complain(problem.status === 404 ? new Error("That request is over already.") : problem);
  });
  await refresh();
}

function nameOf(id) {
  return $(id)?.dataset.name || id;
}

/* Logs ---------------------------------------------------------------------------------------------------------- */

/* Control sequences of terminals, and all control characters but tab and line ends. */
const ESCAPES = new RegExp(
  "\\x1b\\[[0-?]*[ -/]*[@-~]|\\x1b[P\\]X^_][^\\x07\\x1b\\x9c]*(?:\\x07|\\x1b\\\\|\\x9c)?|\\x1b[ -/]*[0-~]?" +
  "|[\\x00-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f-\\x9f]", "g");
const WARNING = /\bWARN(ING)?\b/;
const ERROR = /\b(ERROR|CRITICAL|Traceback)\b|^\w*(Error|Exception):/;

const pause = () => new Promise((done) => setTimeout(done, RETRY_MS));

class LogTail {
  constructor(id) {
    this.id = id;
    this.stopped = new AbortController();
    this.lines = $("log-lines");
    this.lines.replaceChildren();
    this.rest = "";
    this.last = null;
    this.lastId = null;
    this.attempt = null;
    $("log-name").textContent = nameOf(id);
    this.run();
  }

  close() {
    this.stopped.abort();
  }

  async run() {
    while (!this.stopped.signal.aborted) {
      $("log-state").textContent = "Connecting";
      try {
        if (await this.follow()) {
          $("log-state").textContent = "This attempt has ended.";
          if (await this.nextAttempt()) continue;
          $("log-state").textContent = "This log has ended.";
          return;
        }
        $("log-state").textContent = "The connection broke, trying again";
      } catch (problem) {
        if (this.stopped.signal.aborted) return;
        $("log-state").textContent = problem.message;
        if (problem instanceof Refusal && problem.status < 500) return;
      }
      await pause();
    }
  }

  /* Go on with the attempt after the one that has ended; false when the launch has ended with it. */
  async nextAttempt() {
    for (;;) {
      const answer = await ask("GET", `status/${encodeURIComponent(this.id)}`, { signal: this.stopped.signal });
      const status = await answer.json();
      if (this.attempt !== null && status.attempt > this.attempt) {
        this.attempt += 1;
        this.lastId = null;
        if (this.rest) this.append("\n");
        const said = document.createElement("div");
        said.className = "said";
        said.textContent = `Attempt ${this.attempt}`;
        this.lines.append(said);
        return true;
      }
      if (["stopped", "failed"].includes(status.state)) return false;
      await pause();
    }
  }

  async follow() {
    const query = this.attempt === null ? `tail=${LOG_TAIL}` : `attempt=${this.attempt}`;
    const headers = { accept: "text/event-stream" };
    if (this.lastId !== null) headers["last-event-id"] = this.lastId;
    const path = `logs/${encodeURIComponent(this.id)}?${query}`;
    const answer = await ask("GET", path, { headers, signal: this.stopped.signal });
    $("log-state").textContent = "Live";
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let buffer = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return false;
      buffer += value;
      const events = buffer.split("\n\n");
      buffer = events.pop();
      for (const event of events) if (this.take(event)) return true;
    }
  }

  /* One event; true when it is the last. */
  take(event) {
    const fields = new Map(event.split("\n").map((line) => {
      const colon = line.indexOf(": ");
      return [line.slice(0, colon), line.slice(colon + 2)];
    }));
    if (fields.get("event") === "end") return true;
    if (fields.has("data")) {
      const page = JSON.parse(fields.get("data"));
      this.lastId = fields.get("id");
      this.attempt = page.attempt;
      this.append(page.content);
    }
    return false;
  }

  append(content) {
    const parts = (this.rest + content).split("\n");
    this.rest = parts.pop();
    const made = document.createDocumentFragment();
    if (this.last) this.last.remove();
    for (const part of parts.slice(-MAX_LINES)) made.append(this.line(part));
    this.last = this.rest ? this.line(this.rest) : null;
    if (this.last) made.append(this.last);
    this.lines.append(made);
    while (this.lines.childElementCount > MAX_LINES) this.lines.firstElementChild.remove();
    if ($("log-follow").checked) this.lines.scrollTop = this.lines.scrollHeight;
  }

  /* A line as a terminal would leave it: what stands behind the last carriage return, without control sequences. */
  line(raw) {
    const written = raw.replace(/\r+$/, "");
    const text = written.slice(written.lastIndexOf("\r") + 1).replace(ESCAPES, "");
    const element = document.createElement("div");
    element.textContent = text || "\u200b";
    if (ERROR.test(text)) element.className = "error";
    else if (WARNING.test(text)) element.className = "warning";
    return element;
  }
}

let tail = null;

function openLog(id) {
  tail?.close();
  $("log-follow").checked = true;
  $("log-dialog").showModal();
  tail = new LogTail(id);
}

/* Wiring -------------------------------------------------------------------------------------------------------- */

function clicked(event) {
  const button = event.target.closest("button");
  if (!button) return;
  const { log, stop: ending, forget: ended, cancel: request, load: wanted, unload: unwanted } = button.dataset;
  if (log) openLog(log);
  else if (ending) askToStop(ending);
  else if (ended) forget(ended);
  else if (request) askToCancel(request);
  else if (wanted) move(wanted, "load");
  else if (unwanted) move(unwanted, "unload");
  else if (button.hasAttribute("data-close")) button.closest("dialog").close();
}

function scrolled() {
  const lines = $("log-lines");
  $("log-follow").checked = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 30;
}

document.addEventListener("click", clicked);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
$("login-form").addEventListener("submit", signIn);
$("sign-out").addEventListener("click", signOut);
$("open-launch").addEventListener("click", () => $("launch-dialog").showModal());
$("launch-form").addEventListener("submit", launch);
$("stop-dialog").addEventListener("close", stop);
$("cancel-dialog").addEventListener("close", cancel);
$("log-dialog").addEventListener("close", () => { tail?.close(); tail = null; });
$("log-lines").addEventListener("wheel", () => setTimeout(scrolled, 50), { passive: true });
$("log-lines").addEventListener("touchmove", () => setTimeout(scrolled, 50), { passive: true });
$("log-lines").addEventListener("keyup", scrolled);
$("log-follow").addEventListener("change", () => {
  if ($("log-follow").checked) $("log-lines").scrollTop = $("log-lines").scrollHeight;
});
$("log-wrap").addEventListener("change", () => $("log-lines").classList.toggle("wrap", $("log-wrap").checked));
$("log-lines").classList.add("wrap");

if (location.hash === "#refused") {
  history.replaceState(null, "", location.pathname);
  $("login-error").textContent = "That key is not valid.";
}
if ($("board")) signedIn();
refresh();
