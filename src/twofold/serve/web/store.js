// What stays in this browser: conversations (one localStorage key each), drafts of everything half typed, and which
// conversation was open. Export and import as JSON. When the storage is full, token probabilities of old answers go
// first, and the reader is told. Not here: settings (prefs.js) and the shape of a conversation (tree.js).

import { checked, newId } from "./tree.js";

const PREFIX = "twofold.chat.";
const DRAFTS = "twofold.drafts";
const OPEN = "twofold.open";
const KIND = "twofold-conversations";

/** All stored conversations, latest first; a damaged one is left alone in the storage and not listed. */
export function loadAll() {
  const found = [];
  for (const key of Object.keys(localStorage)) {
    const conversation = key.startsWith(PREFIX) && loadOne(key.slice(PREFIX.length));
    if (conversation) found.push(conversation);
  }
  return found.sort((a, b) => b.updated - a.updated);
}

/** One stored conversation, or null. */
export function loadOne(id) {
  try {
    return checked(JSON.parse(localStorage.getItem(PREFIX + id)));
  } catch {
    return null;
  }
}

/** Writes a conversation. Returns "saved", "trimmed" (probabilities of older answers were dropped) or "full". */
export function save(conversation, others) {
  if (write(PREFIX + conversation.id, conversation)) return "saved";
  const oldest = [...others].sort((a, b) => a.updated - b.updated);
  for (const other of [...oldest.filter((o) => o.id !== conversation.id), conversation]) {
    if (!dropTokens(other)) continue;
    write(PREFIX + other.id, other);
    if (write(PREFIX + conversation.id, conversation)) return "trimmed";
  }
  return "full";
}

function dropTokens(conversation) {
  const kept = Object.values(conversation.nodes).filter((node) => node.tokens?.length && node.state !== "streaming");
  for (const node of kept) node.tokens = [];
  return kept.length > 0;
}

function write(key, value) {
  return put(key, JSON.stringify(value));
}

function put(key, text) {
  try {
    localStorage.setItem(key, text);
    return true;
  } catch {
    return false;
  }
}

/** Forgets a conversation. */
export function forget(id) {
  localStorage.removeItem(PREFIX + id);
}

/** The id of a conversation from a storage event's key, or null. */
export function idOfKey(key) {
  return key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null;
}

/** The conversation that was open last, by id. */
export function lastOpen() {
  return localStorage.getItem(OPEN);
}

/** Notes which conversation is open. */
export function rememberOpen(id) {
  put(OPEN, id);
}

function drafts() {
  try {
    return JSON.parse(localStorage.getItem(DRAFTS)) || {};
  } catch {
    return {};
  }
}

/** Half-typed text under a name, "" where there is none. */
export function draft(name) {
  const value = drafts()[name];
  return typeof value === "string" ? value : "";
}

/** Keeps half-typed text; null or "" forgets it. */
export function keepDraft(name, value) {
  const all = drafts();
  if (value) all[name] = value;
  else delete all[name];
  write(DRAFTS, all);
}

function problem(key, values) {
  return Object.assign(new Error(key), { key, values });
}

/** The text of an export file. */
export function exported(conversations) {
  return JSON.stringify({ kind: KIND, version: 1, conversations }, null, 1);
}

/**
 * The conversations of an export file; one whose id is taken gets a new one, so that nothing is overwritten.
 * Throws an Error with the `key` and `values` of the text that says what is wrong.
 */
export function imported(source, taken) {
  let data;
  try {
    data = JSON.parse(source);
  } catch {
    throw problem("import_json");
  }
  if (data?.kind !== KIND || !Array.isArray(data.conversations)) throw problem("import_kind");
  return data.conversations.map((raw, index) => {
    try {
      const conversation = checked(raw);
      if (taken.has(conversation.id)) conversation.id = newId();
      return conversation;
    } catch {
      throw problem("import_broken", { i: index + 1 });
    }
  });
}
