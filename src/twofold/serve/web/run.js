// One reply as it arrives: chunks of the stream become the fields of an assistant node, with counts and times.
// Knows nothing of the page; whoever starts a run is told of every change. A stopped run keeps what has arrived.

import { streamChat } from "./api.js";

/** The fields of an assistant node whose reply has not begun. */
export function blankReply(model) {
  return {
    role: "assistant",
    content: "",
    reasoning: "",
    calls: [],
    state: "streaming",
    finish: "",
    stats: {},
    tokens: [],
    model,
  };
}

/**
 * Starts the reply to `body` into `node`. Returns { stop, finished }: stop() ends it, `finished` resolves when the
 * node is at rest in state "done", "stopped" or "error"; it never rejects.
 */
export function startRun(node, body, key, onChange) {
  const abort = new AbortController();
  const clock = new Clock(node, body.thinking_budget ?? null);
  const finished = streamChat(body, key, abort.signal, (chunk) => {
    readChunk(node, chunk, clock);
    onChange();
  })
    .then(
      () => (node.state = "done"),
      (error) => fail(node, error),
    )
    .then(() => {
      clock.end();
      onChange();
    });
  return { stop: () => abort.abort(), finished };
}

function fail(node, error) {
  if (error.name === "AbortError") {
    node.state = "stopped";
    return;
  }
  node.state = "error";
  node.error = { kind: error.kind || "server", message: error.message, wait: error.wait ?? null };
  if (!error.kind) console.error(error);
}

/** Times and live counts of a node. Counts become the server's own when it sends `usage`. */
class Clock {
  constructor(node, budget) {
    this.stats = node.stats;
    this.started = performance.now();
    this.phase = "";
    if (budget !== null) this.stats.budget = budget;
  }

  /** Notes that so many tokens came, `forced` of them written by the engine: those are no thinking. */
  saw(phase, tokens, forced) {
    const now = performance.now() - this.started;
    const { stats } = this;
    if (tokens) stats.firstMs ??= now;
    if (phase) this.phase = phase;
    stats.completion = (stats.completion || 0) + tokens;
    if (this.phase === "think") {
      this.thinkFrom ??= now;
      stats.reasoning = (stats.reasoning || 0) + tokens - forced;
      stats.thinkMs = now - this.thinkFrom;
    }
    stats.totalMs = now;
  }

  usage(usage) {
    const { stats } = this;
    stats.prompt = usage.prompt_tokens;
    stats.completion = usage.completion_tokens;
    stats.reasoning = usage.completion_tokens_details?.reasoning_tokens ?? stats.reasoning ?? 0;
    stats.cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  }

  end() {
    this.stats.totalMs = performance.now() - this.started;
  }
}

function readChunk(node, chunk, clock) {
  const choice = chunk.choices?.[0];
  if (choice) {
    const delta = choice.delta || {};
    const thought = delta.reasoning_content ?? delta.reasoning ?? "";
    const answer = delta.content ?? "";
    node.reasoning += thought;
    node.content += answer;
    for (const part of delta.tool_calls || []) readCall(node, part);
    const entries = choice.logprobs?.content;
    for (const entry of entries || []) node.tokens.push(token(entry));
    const spoke = Boolean(thought || answer || delta.tool_calls?.length);
    const phase = answer.trim() || delta.tool_calls?.length ? "answer" : thought ? "think" : "";
    const forced = (entries || []).filter((entry) => entry.forced).length;
    if (forced) node.stats.forced = true;
    clock.saw(phase, entries ? entries.length : Number(spoke), forced);
    if (choice.finish_reason) node.finish = choice.finish_reason;
    if (choice.thinking) Object.assign(node.stats, { forced: choice.thinking.forced, looped: choice.thinking.looped });
  }
  if (chunk.warnings?.length) node.warnings = chunk.warnings.map(String);
  if (chunk.usage) clock.usage(chunk.usage);
}

function readCall(node, part) {
  const index = part.index ?? node.calls.length;
  const call = (node.calls[index] ??= { id: "", name: "", arguments: "" });
  if (part.id) call.id = part.id;
  if (part.function?.name) call.name = part.function.name;
  call.arguments += part.function?.arguments ?? "";
}

/** [text, log-probability, alternatives, forced]: short, because it is stored. */
function token(entry) {
  const short = (logprob) => Math.round(logprob * 1000) / 1000;
  const others = (entry.top_logprobs || []).map((other) => [readable(other), short(other.logprob)]);
  return [readable(entry), short(entry.logprob), others, entry.forced ? 1 : 0];
}

/** The token's text; bytes that are no whole characters ("bytes:…" in OpenAI's API) are shown as <E4><B8>. */
function readable({ token: text, bytes }) {
  if (!bytes || !/^bytes:|\ufffd/.test(text)) return text ?? "";
  return bytes.map((byte) => `<${byte.toString(16).toUpperCase().padStart(2, "0")}>`).join("");
}
