// A conversation as a tree: each node is a user turn, an assistant turn or the results of tools, and its branches are
// other versions of what follows. The path on screen goes from the root along the picked branch of every node.
// Plain data (it is what is stored and exported) and functions on it; no storage, no page, no network.

export const ROOT = "root";

/** What can go wrong with a reply; each has a text error_<kind>. */
export const ERRORS = ["offline", "cut", "key", "busy", "away", "large", "missing", "refused", "server", "late"];

/** A short random name. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => (byte % 36).toString(36)).join("");
}

/** An empty conversation. */
export function newConversation() {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    named: false,
    created: now,
    updated: now,
    system: "",
    nodes: {},
    kids: [],
    pick: null,
  };
}

/** Adds a node under `parent` (a node's id, or ROOT) and picks it. Returns the node. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, kids: [], pick: null, created: Date.now(), ...fields };
  conversation.nodes[node.id] = node;
  const above = holder(conversation, parent);
  above.kids.push(node.id);
  above.pick = node.id;
  conversation.updated = node.created;
  return node;
}

/** What holds the branches below `id`: the node, or the conversation itself for ROOT. */
function holder(conversation, id) {
  return id === ROOT ? conversation : conversation.nodes[id];
}

/** The nodes on screen, first to last. */
export function path(conversation) {
  const nodes = [];
  for (let next = conversation.pick; next; next = conversation.nodes[next].pick) nodes.push(conversation.nodes[next]);
  return nodes;
}

/** The nodes from the root down to `id`, itself included. */
export function pathTo(conversation, id) {
  const nodes = [];
  for (let at = id; at !== ROOT; at = conversation.nodes[at].parent) nodes.unshift(conversation.nodes[at]);
  return nodes;
}

/** Where a node stands among its branches: { at, ids }. */
export function branches(conversation, node) {
  const ids = holder(conversation, node.parent).kids;
  return { at: ids.indexOf(node.id), ids };
}

/** Shows another branch: the node `id` in place of its siblings. */
export function pickBranch(conversation, id) {
  holder(conversation, conversation.nodes[id].parent).pick = id;
}

/** Takes a node and all below it out of the tree (a failed answer that is tried again). */
export function removeNode(conversation, id) {
  const node = conversation.nodes[id];
  const above = holder(conversation, node.parent);
  above.kids = above.kids.filter((kid) => kid !== id);
  if (above.pick === id) above.pick = above.kids.at(-1) ?? null;
  const doomed = [id];
  while (doomed.length) {
    const next = doomed.pop();
    doomed.push(...conversation.nodes[next].kids);
    delete conversation.nodes[next];
  }
}

/**
 * A conversation read from outside, checked field by field: unknown fields are dropped, and links must form a tree.
 * Throws an Error where it cannot be mended.
 */
export function checked(raw) {
  if (!raw || typeof raw !== "object" || typeof raw.nodes !== "object" || !raw.nodes) throw new Error("no nodes");
  const conversation = newConversation();
  if (typeof raw.id === "string" && /^[a-z0-9]{1,32}$/.test(raw.id)) conversation.id = raw.id;
  conversation.title = text(raw.title).slice(0, 200);
  conversation.named = raw.named === true;
  conversation.system = text(raw.system);
  for (const field of ["created", "updated"]) conversation[field] = date(raw[field], conversation[field]);
  copyBranch(raw, conversation, ROOT, raw.kids);
  if (raw.pick in conversation.nodes && conversation.kids.includes(raw.pick)) conversation.pick = raw.pick;
  return conversation;
}

function copyBranch(raw, conversation, parent, kids) {
  const waiting = [[parent, kids]];
  while (waiting.length) {
    const [above, ids] = waiting.pop();
    if (!Array.isArray(ids)) throw new Error("no list of branches");
    for (const id of ids) {
      const from = raw.nodes[id];
      if (!from || id in conversation.nodes || !/^[a-z0-9]{1,32}$/.test(id)) throw new Error("broken links");
      const node = { id, parent: above, kids: [], pick: null, ...content(from) };
      conversation.nodes[id] = node;
      const over = holder(conversation, above);
      over.kids.push(id);
      if (!over.pick || (above !== ROOT && raw.nodes[above].pick === id)) over.pick = id;
      waiting.push([id, from.kids]);
    }
  }
}

function content(from) {
  if (!["user", "assistant", "tool"].includes(from.role)) throw new Error("unknown role");
  const node = { role: from.role, created: date(from.created, 0), content: text(from.content) };
  if (from.role === "tool")
    node.results = list(from.results).map((r) => ({ id: text(r.id), content: text(r.content) }));
  if (from.role !== "assistant") return node;
  node.reasoning = text(from.reasoning);
  node.calls = list(from.calls).map((c) => ({ id: text(c.id), name: text(c.name), arguments: text(c.arguments) }));
  node.state = ["done", "stopped", "error"].includes(from.state) ? from.state : "interrupted";
  if (node.state === "error") node.error = failure(from.error);
  node.finish = text(from.finish);
  node.stats = Object.fromEntries(
    Object.entries(from.stats || {}).filter(([, v]) => typeof v === "boolean" || (Number.isFinite(v) && v >= 0)),
  );
  node.tokens = list(from.tokens)
    .filter(isRated)
    .map((token) => [...rated(token), list(token[2]).filter(isRated).map(rated), token[3] ? 1 : 0]);
  node.model = text(from.model);
  node.warnings = list(from.warnings).map(String);
  return node;
}

function failure(error) {
  return { kind: ERRORS.includes(error?.kind) ? error.kind : "server", message: text(error?.message) };
}

/** Whether something begins with a text and its log-probability, and these two. */
const isRated = (token) => Array.isArray(token) && typeof token[0] === "string" && Number.isFinite(token[1]);
const rated = ([name, logprob]) => [name, Math.min(0, logprob)];

/** A time that a Date can hold. */
const date = (value, otherwise) => (Number.isFinite(value) && Math.abs(value) <= 8.64e15 ? value : otherwise);
const text = (value) => (typeof value === "string" ? value : "");
const list = (value) => (Array.isArray(value) ? value : []);
