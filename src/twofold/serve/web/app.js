// The chat page: joins the views to conversations, settings and running replies. All decisions about what happens next
// are here; what things look like is in the views, what is kept in store.js, what is sent in request.js.

import { listModels } from "./api.js";
import { runCall } from "./calc.js";
import { composerView } from "./composer.js";
import { announce, fill, h, iconButton, toast } from "./dom.js";
import { setLanguage, t } from "./i18n.js";
import { errorCard } from "./message.js";
import { loadPrefs, resetSampling, savePrefs } from "./prefs.js";
import { chatRequest, modeOf } from "./request.js";
import { blankReply, startRun } from "./run.js";
import { settingsView } from "./settings.js";
import { download, sidebarView, titleOf } from "./sidebar.js";
import * as store from "./store.js";
import { threadView } from "./thread.js";
import { draftName } from "./toolcards.js";
import { ROOT, addNode, newConversation, path, pathTo, pickBranch, removeNode } from "./tree.js";

const SAVE_EVERY = 800; // ms, while a reply streams
const TOOL_ROUNDS = 8;
const MODES = ["on", "off", "auto"];
const WIDE = matchMedia("(min-width: 60rem)");

const state = {
  prefs: loadPrefs(),
  conversations: store.loadAll(),
  current: newConversation(),
  runs: new Map(), // id of a conversation to its running reply
  models: [],
  serverError: null,
  sidebar: WIDE.matches,
  settings: false,
};
let views = {};
const unsaved = new Map(); // id to the timer that will save it

// ---- what is on screen

function mount() {
  setLanguage(state.prefs.language);
  views = {
    sidebar: sidebarView(sidebarActs),
    thread: threadView(turnActs),
    composer: composerView(composerActs),
    settings: settingsView(settingsActs),
    header: h("header.top"),
    notice: h("div.server-notice"),
  };
  const skip = h(
    "a.skip",
    { href: "#message", onclick: (event) => (event.preventDefault(), views.composer.focus()) },
    t("jump_input"),
  );
  const shade = h("div.shade", { onclick: closePanels });
  const center = h("div.center", {}, views.header, views.notice, views.thread.element, views.composer.element);
  fill(document.getElementById("app"), skip, views.sidebar.element, center, shade, views.settings.element);
  showConversation();
  drawSettings();
}

function showConversation() {
  const opening = { mode: mode(), examples: model()?.about?.can || [] };
  try {
    views.thread.show(state.current, opening);
  } catch (error) {
    console.error(error);
    toast(t("cannot_show", { title: titleOf(state.current) }));
    state.current = newConversation(); // what is left of the page must work, or nobody could delete the other
    views.thread.show(state.current, opening);
  }
  refresh();
}

/** Everything but the turns. */
function refresh() {
  const { prefs, current } = state;
  const root = document.documentElement;
  root.dataset.theme = prefs.theme;
  root.dataset.sidebar = state.sidebar ? "open" : "closed";
  root.dataset.settings = state.settings ? "open" : "closed";
  root.dataset.mode = mode();
  document.title = current.title ? `${current.title} · Twofold` : "Twofold";
  views.sidebar.element.inert = !state.sidebar;
  views.settings.element.inert = !state.settings;
  views.sidebar.update({
    conversations: state.conversations,
    current: current.id,
    running: new Set(state.runs.keys()),
  });
  views.composer.update({
    prefs,
    mode: mode(),
    context: model()?.max_model_len,
    budget: model()?.capabilities?.thinking_budget !== false,
    running: state.runs.has(current.id),
    draftName: draftOf(current),
  });
  drawHeader();
  fill(views.notice, state.serverError && errorCard(state.serverError, loadModels, openSettings));
}

function drawHeader() {
  const name = model()?.id || (state.serverError ? t("no_server") : "");
  fill(
    views.header,
    iconButton("menu", t("menu"), toggleSidebar, {
      className: "icon-button menu",
      aria: { expanded: String(state.sidebar), controls: "sidebar" },
    }),
    h("div.heading", {}, h("b", {}, titleOf(state.current)), h("small", {}, name)),
    iconButton("plus", t("new_chat"), newChat, { className: "icon-button only-narrow" }),
    iconButton("sliders", t("settings"), toggleSettings, {
      className: "icon-button settings-button",
      aria: { expanded: String(state.settings), controls: "settings" },
    }),
  );
}

/** `fresh`: begin with the mode in use, not with the one that was looked at last. */
function drawSettings(fresh = false) {
  const { prefs, current, models } = state;
  views.settings.draw({ prefs, conversation: current, models, model: model(), mode: mode() }, fresh);
}

const model = () => state.models.find(({ id }) => id === state.prefs.model) || state.models[0];
const mode = () => modeOf(state.prefs, model());
const draftOf = (conversation) => (state.conversations.includes(conversation) ? conversation.id : "new");

// ---- keeping

function keepSoon(conversation) {
  if (!unsaved.has(conversation.id))
    unsaved.set(
      conversation.id,
      setTimeout(() => keep(conversation), SAVE_EVERY),
    );
}

function keep(conversation) {
  clearTimeout(unsaved.get(conversation.id));
  unsaved.delete(conversation.id);
  if (!state.conversations.includes(conversation)) state.conversations.push(conversation);
  if (conversation === state.current) store.rememberOpen(conversation.id);
  state.conversations.sort((a, b) => b.updated - a.updated);
  const outcome = store.save(conversation, state.conversations);
  if (outcome !== "saved") toast(t(outcome === "full" ? "storage_full" : "storage_trimmed"));
}

function keepAll() {
  for (const conversation of state.conversations) if (unsaved.has(conversation.id)) keep(conversation);
}

function changePrefs(fields) {
  const language = "language" in fields && fields.language !== state.prefs.language;
  Object.assign(state.prefs, fields);
  savePrefs(state.prefs);
  if ("key" in fields) loadModels();
  if (language) mount();
  else if ("mode" in fields && !path(state.current).length) showConversation();
  else refresh();
}

// ---- conversations

function openChat(id) {
  state.current = state.conversations.find((conversation) => conversation.id === id) || newConversation();
  store.rememberOpen(state.current.id);
  if (!WIDE.matches) state.sidebar = false;
  showConversation();
  drawSettings();
}

function newChat() {
  openChat(null);
  views.composer.focus();
}

function removeChat(id) {
  const conversation = state.conversations.find((other) => other.id === id);
  state.runs.get(id)?.stop();
  clearTimeout(unsaved.get(id));
  unsaved.delete(id);
  state.conversations = state.conversations.filter((other) => other !== conversation);
  store.forget(id);
  if (state.current === conversation) newChat();
  else refresh();
  const run = () => (keep(conversation), openChat(id));
  toast(t("removed", { title: titleOf(conversation) }), { label: t("undo"), run });
}

async function importFile(file) {
  try {
    const taken = new Set(state.conversations.map(({ id }) => id));
    const found = store.imported(await file.text(), taken);
    found.forEach(keep);
    toast(t("imported", { n: found.length }));
    if (found.length) openChat(found[0].id);
  } catch (error) {
    if (!error.key) throw error;
    toast(t("import_bad", { why: t(error.key, error.values) }));
  }
}

const day = () => new Date().toISOString().slice(0, 10);
const sidebarActs = {
  create: newChat,
  open: openChat,
  remove: removeChat,
  importFile,
  exportAll: () => download(`twofold-${day()}.json`, store.exported(state.conversations)),
  exportOne: (id) =>
    download(`twofold-${day()}-${id}.json`, store.exported(state.conversations.filter((c) => c.id === id))),
  close: () => toggleSidebar(),
  rename(id, title) {
    const conversation = state.conversations.find((other) => other.id === id);
    if (title) Object.assign(conversation, { title, named: true });
    keep(conversation);
    refresh();
  },
};

// ---- replies

function send(text) {
  const conversation = state.current;
  const last = path(conversation).at(-1);
  const node = addNode(conversation, last?.id ?? ROOT, { role: "user", content: text });
  if (!conversation.title) conversation.title = text.split("\n")[0].slice(0, 60);
  reply(conversation, node.id);
}

/** Answers the turn `parent` with a new node below it. */
async function reply(conversation, parent) {
  await stopRun(conversation);
  const node = addNode(conversation, parent, blankReply(model()?.id || ""));
  let stopped = false;
  state.runs.set(conversation.id, { stop: () => (stopped = true) });
  keep(conversation);
  showIfCurrent(conversation);
  if (!model()) await loadModels();
  node.model = model()?.id || "";
  const body = chatRequest(conversation.system, pathTo(conversation, parent), state.prefs, model() || { id: "" });
  const run = startRun(node, body, state.prefs.key, () => {
    views.thread.changed(node);
    if (node.state === "streaming") keepSoon(conversation);
    tell(node);
  });
  state.runs.set(conversation.id, run);
  if (stopped) run.stop();
  await run.finished;
  state.runs.delete(conversation.id);
  finish(conversation, node);
}

function finish(conversation, node) {
  if (leaving) return; // the browser ended the stream; what is stored says "interrupted" when it is read again
  if (state.conversations.includes(conversation)) keep(conversation); // else it was deleted meanwhile
  const results =
    node.state === "done" && node.calls.length ? node.calls.map((call) => runCall(call.name, call.arguments)) : [];
  if (results.length && results.every((result) => result !== null)) return answerCalls(conversation, node, results);
  if (node.calls.length) showIfCurrent(conversation);
  views.thread.changed(node);
  if (node.state === "done") announce(t("done", { n: node.stats.completion || 0 }));
  refresh();
}

/** Adds the results of a turn's calls and lets the model go on. */
function answerCalls(conversation, node, texts) {
  const before = pathTo(conversation, node.id);
  const rounds = before
    .slice(before.findLastIndex(({ role }) => role === "user"))
    .filter(({ role }) => role === "tool").length;
  if (rounds >= TOOL_ROUNDS) {
    toast(t("tool_limit", { n: TOOL_ROUNDS }));
    return showIfCurrent(conversation);
  }
  node.calls.forEach((_, index) => store.keepDraft(draftName(node, index), ""));
  const results = node.calls.map((call, index) => ({ id: call.id, content: texts[index] }));
  const answer = addNode(conversation, node.id, { role: "tool", content: "", results });
  return reply(conversation, answer.id);
}

async function stopRun(conversation) {
  const run = state.runs.get(conversation.id);
  run?.stop();
  await run?.finished;
}

function showIfCurrent(conversation) {
  if (conversation === state.current) showConversation();
  else refresh();
}

let leaving = false;
let told = null;
/** Says to screen readers what phase the reply on screen has reached, not every token. */
function tell(node) {
  const phase =
    node.state !== "streaming" ? "" : node.content.trim() ? "answering" : node.reasoning.trim() ? "thinking_now" : "";
  if (phase && told !== node.id + phase) announce(t(phase));
  told = node.id + phase;
}

const turnActs = {
  openSettings,
  chooseMode: (mode) => changePrefs({ mode }),
  suggest: (text) => views.composer.set(text),
  regenerate: (node) => reply(state.current, node.parent),
  results: (node, texts) => answerCalls(state.current, node, texts),
  pick(id) {
    pickBranch(state.current, id);
    keep(state.current);
    showConversation();
  },
  edit(node, text) {
    const other = addNode(state.current, node.parent, { role: "user", content: text });
    return reply(state.current, other.id);
  },
  retry(node) {
    removeNode(state.current, node.id);
    return reply(state.current, node.parent);
  },
};

const composerActs = {
  send,
  stop: () => state.runs.get(state.current.id)?.stop(),
  changed: changePrefs,
  editLast() {
    const last = path(state.current).findLast(({ role }) => role === "user");
    if (last && !state.runs.has(state.current.id)) views.thread.edit(last.id);
  },
};

// ---- panels and keys

const settingsActs = {
  changed: changePrefs,
  close: () => toggleSettings(),
  reset() {
    resetSampling(state.prefs);
    changePrefs({});
    drawSettings();
  },
  system(text) {
    state.current.system = text;
    keepSoon(state.current);
    if (draftOf(state.current) === "new") {
      const typed = store.draft("new"); // the conversation gets its place in the list, and takes its draft along
      keep(state.current);
      store.keepDraft(state.current.id, typed);
      store.keepDraft("new", "");
      refresh();
    }
  },
};

function toggleSidebar() {
  state.sidebar = !state.sidebar;
  refresh();
}

function toggleSettings() {
  state.settings = !state.settings;
  if (state.settings) drawSettings(true);
  refresh();
  (state.settings
    ? views.settings.element.querySelector("button")
    : document.querySelector(".settings-button")
  ).focus();
}

function openSettings() {
  if (!state.settings) toggleSettings();
}

function closePanels() {
  if (state.settings) toggleSettings();
  else if (state.sidebar && !WIDE.matches) toggleSidebar();
}

function escape() {
  if (state.runs.has(state.current.id)) composerActs.stop();
  else closePanels();
}

function showKeys() {
  openSettings();
  views.settings.element.querySelector(".key-list").scrollIntoView();
}

const nextMode = () => changePrefs({ mode: MODES[(MODES.indexOf(state.prefs.mode) + 1) % MODES.length] });
const ALT_KEYS = { KeyM: nextMode, KeyN: newChat, KeyS: toggleSettings };
const PLAIN_KEYS = { "/": () => views.composer.focus(), "?": showKeys };

document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const typing = event.target.closest?.("input:not([type=radio], [type=checkbox], [type=range]), textarea, select");
  const act =
    event.key === "Escape"
      ? escape
      : event.altKey && !event.ctrlKey && !event.metaKey
        ? ALT_KEYS[event.code]
        : !typing && !event.ctrlKey && !event.metaKey
          ? PLAIN_KEYS[event.key]
          : null;
  if (!act) return;
  event.preventDefault();
  act();
});

addEventListener("pagehide", () => {
  keepAll();
  leaving = true;
});
addEventListener("pageshow", (event) => event.persisted && location.reload());
document.addEventListener("visibilitychange", () => document.hidden && keepAll());
WIDE.addEventListener("change", () => ((state.sidebar = WIDE.matches), refresh()));
addEventListener("storage", (event) => {
  const id = store.idOfKey(event.key);
  if (!id || state.runs.has(id)) return; // another tab wrote a conversation
  const fresh = store.loadOne(id);
  state.conversations = [...state.conversations.filter((other) => other.id !== id), ...(fresh ? [fresh] : [])];
  state.conversations.sort((a, b) => b.updated - a.updated);
  if (state.current.id === id && fresh) state.current = fresh;
  showIfCurrent(state.current.id === id ? state.current : null);
});

async function loadModels() {
  try {
    state.models = await listModels(state.prefs.key);
    state.serverError = null;
  } catch (error) {
    state.serverError = { kind: error.kind || "server", message: error.message, wait: error.wait };
  }
  if (path(state.current).length) refresh();
  else showConversation();
  drawSettings();
}

state.current = state.conversations.find(({ id }) => id === store.lastOpen()) || state.current;
mount();
await loadModels();
views.composer.focus();
